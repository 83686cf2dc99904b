# shellcheck shell=bash
# The one file that a site edits. The batch scripts here source it on the first node of the job, before srun, which
# hands the variables on to all nodes. Another file of the same kind: export NANODIST_ENV=/path/to/mine.sh

# --- Software: NANODIST is the command that the scripts run ----------------------------------------------------------
# Example A, a GPU cluster with environment modules and a virtual environment:
# module load gcc/13 cuda/12.8 openmpi/5.0 python/3.11
# source "$HOME/venvs/nanodist/bin/activate"
# Example B, a cluster that runs containers (Apptainer). The folders of data and runs have to be visible inside. srun
# and scontrol stay outside, so the image needs no Slurm; under pack.sbatch its MPI has to speak NANODIST_MPI (below).
# NANODIST=(apptainer exec --nv --bind "$SLURM_SUBMIT_DIR" --bind /scratch "$HOME/nanodist.sif" python -m nanodist)
# shellcheck disable=SC2034  # used by the scripts that source this file
NANODIST=(python -m nanodist)

# --- Network: set these where nodes have several interfaces ('ip -brief address' on a compute node shows them) -------
# Example A, InfiniBand:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# Example B, CPU nodes with Ethernet:
# export GLOO_SOCKET_IFNAME=eth0
# Ports follow from the job id (10000-29999), so that jobs which share a node do not meet; MASTER_PORT overrules.

# --- MPI, for pack.sbatch: what 'srun --mpi=list' shows and the MPI of mpi4py speaks: pmi2 (MPICH), pmix (Open MPI) --
NANODIST_MPI=${NANODIST_MPI:-pmi2}

# --- Weights & Biases: compute nodes without internet record offline; 'wandb sync' on a login node sends it later ----
# export WANDB_MODE=offline

# --- Paths ------------------------------------------------------------------------------------------------------------
# What is compiled at run time goes to each node's own disk: shared file systems are slow at it, lock badly, and nodes
# may differ. Not $TMPDIR, which some sites make for the first node only.
NANODIST_LOCAL=${NANODIST_LOCAL:-/tmp/nanodist-$UID}
export TRITON_CACHE_DIR="$NANODIST_LOCAL/triton" TORCH_EXTENSIONS_DIR="$NANODIST_LOCAL/torch-extensions"
export TORCHINDUCTOR_CACHE_DIR="$NANODIST_LOCAL/inductor"
# timm and torch.hub download on login nodes only; compute nodes read what is there.
# export HF_HOME=/project/shared/huggingface HF_HUB_OFFLINE=1

# --- Restarts: how often one job may be started again, after preemptions and failures together -----------------------
export NANODIST_MAX_RESTARTS=${NANODIST_MAX_RESTARTS:-20}
