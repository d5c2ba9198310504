#!/bin/bash
# A recipe on several machines under Slurm: one torchrun on each, which meet at the first.
#
#   sbatch --nodes 64 scripts/recipes/slurm.sh scripts/recipes/4b-512-gpus.yaml
#
# Without Slurm: deepspeed --hostfile HOSTS --module cogview train RECIPE, or on each machine the torchrun line below with
# --rdzv-endpoint FIRST_MACHINE:29500. All machines must see the folder of the results and the stores. A job that is cut off goes on where it stood, with any number of machines.
#SBATCH --job-name=cogview
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -eu
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Five minutes before the time is over SIGTERM comes: each process finishes its step, and the run is saved. torchrun would
# kill them after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280
exec srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-endpoint "$first:29500" --rdzv-id "$SLURM_JOB_ID" \
    --no-python cogview train "$1" --resume auto "${@:2}"
