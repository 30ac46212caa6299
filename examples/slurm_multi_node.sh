#!/bin/bash
# One run on several machines under SLURM: `sbatch examples/slurm_multi_node.sh MODEL DATASET [more options of saekit train]`.
# --save-dir has to be a folder that all machines see: under layer-map and zero3 each rank writes layers of its own.
#SBATCH --job-name=saekit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00

set -euo pipefail
per_node=${GPUS_PER_NODE:-8}
config=${CONFIG:-accelerate_configs/multi_node.yaml}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# One launcher per machine. SLURM_PROCID is the machine's number; it is known only inside srun, hence the quotes.
export per_node config head
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / per_node))
srun bash -c 'exec accelerate launch --config_file "$config" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * per_node))" \
    --machine_rank "$SLURM_PROCID" --main_process_ip "$head" --main_process_port "${PORT:-29500}" \
    -m saekit train "$@"' saekit "$@"
