#!/bin/bash
# Convert on four nodes with a shared file system: sbatch slurm.sh
#SBATCH --job-name=upcycle
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node 2 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m upcycle_cli convert /shared/Llama-3.1-405B /shared/Llama-3.1-405B-E8G1T2 --recipe E8G1T2
