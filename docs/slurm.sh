#!/bin/bash
# Workers of a mech study as a SLURM array: one task, one GPU, one model. Any number may come, go and be requeued.
#
#   export BLOCKS=/shared/me/blocks                          # a folder that all machines see, or s3://...
#   sbatch --array=0-63 docs/slurm.sh                        # the workers
#   mech study -m Qwen/Qwen3-VL-8B-Instruct --out study --blocks "$BLOCKS" --elsewhere      # the driver, anywhere
#   mech status "$BLOCKS"                                    # from any shell
#
#SBATCH --job-name=mech-work
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=48G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.log
set -euo pipefail
: "${BLOCKS:?set BLOCKS to the folder of --blocks}"
export OMP_NUM_THREADS=1
echo "worker ${SLURM_ARRAY_TASK_ID:-0} on $(hostname): $BLOCKS"
exec mech work "$BLOCKS" --idle "${IDLE:-1800}"
