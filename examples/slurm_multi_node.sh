#!/bin/bash
# One run on several machines under SLURM: `sbatch examples/slurm_multi_node.sh MODEL DATASET [more options of saekit train]`.
# --save-dir has to be a folder that all machines see: under layer-map and zero3 each rank writes layers of its own.
#SBATCH --job-name=saekit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
# Before the time is up, or when the job is preempted, the run saves; submitted again (or requeued) it goes on. To work
# through a long run, submit several: `sbatch --dependency=singleton ...`; each takes over where the last one stopped.
#SBATCH --requeue
#SBATCH --signal=USR1@180

set -euo pipefail
per_node=${GPUS_PER_NODE:-8}
config=${CONFIG:-accelerate_configs/multi_node.yaml}
# Not through a pipe to `head`, whose early end can end scontrol, and with it the job, without a message.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}

# The launchers hand USR1 on to their processes, and leave them the time to save.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=170

# One launcher per machine. SLURM_PROCID is the machine's number; it is known only inside srun, hence the quotes.
threads=$((SLURM_CPUS_PER_TASK / per_node))
export per_node config head OMP_NUM_THREADS=$((threads > 0 ? threads : 1))
# Two jobs that share a machine meet on different ports.
export port=${PORT:-$((10000 + SLURM_JOB_ID % 22000))}
# Since SLURM 22.05, srun does not take --cpus-per-task over from sbatch: without this, all ranks would share one core.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# If a machine's launcher ends with an error, the others end: none is left waiting for ranks that are gone.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --config_file "$config" \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * per_node))" \
    --machine_rank "$SLURM_PROCID" --main_process_ip "$head" --main_process_port "$port" \
    -m saekit train --resume auto --grace 150 "$@"' saekit "$@"
