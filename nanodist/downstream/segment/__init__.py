"""Segmentation: masks from a pretrained trunk and a decoder."""
