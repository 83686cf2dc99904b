"""Fine-tuning of a pretrained encoder on a handful of labels."""
