# shellcheck shell=bash
# The one file that a site edits: sourced by the batch scripts here before srun.

# Software. Modules of the site, then the environment that nanodist is installed in.
# module load cuda/12.8 python/3.11
# source "$HOME/venvs/nanodist/bin/activate"

# Network. Set these where nodes have several interfaces (ip -brief address shows their names).
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0

# Weights & Biases. Compute nodes without internet record offline; 'wandb sync' on a login node sends it later.
# export WANDB_MODE=offline

# What is compiled at run time goes to the node's own disk: shared file systems are slow at it, and nodes may differ.
export TRITON_CACHE_DIR="${TMPDIR:-/tmp}/triton-$UID"
export TORCH_EXTENSIONS_DIR="${TMPDIR:-/tmp}/torch-extensions-$UID"
