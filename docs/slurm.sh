#!/bin/bash
# Fisher matrices of a large dataset on 4 nodes of 8 GPUs: sbatch docs/slurm.sh
# When the time is up or a node fails, submit it again: finished batches are kept.
#SBATCH --job-name=residual-fisher
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00

set -euo pipefail
# --output-dir has to be on a file system that all nodes share
output=${1:-/shared/$USER/fisher_results_llama_8b}

export OMP_NUM_THREADS=8
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    compute_fisher.py --config configs/llama_8b.yaml --output-dir "$output"
