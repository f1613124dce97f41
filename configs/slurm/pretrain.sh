#!/bin/bash
# Pre-train on two nodes with four GPUs each; preempted or out of time, the job goes on where it was:
#   sbatch configs/slurm/pretrain.sh --config gvsl --data.root=FOLDER
#SBATCH --job-name=gvsl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4 # one process for each GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@300 # seconds before the end: more than a step with a validation takes
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append # one log, whatever happens
set -euo pipefail

# no shell between srun and Python, which would get the signal instead
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" python -m gvsl_lightning fit "$@" \
    --trainer.num_nodes="$SLURM_NNODES" --trainer.devices="$SLURM_NTASKS_PER_NODE"
