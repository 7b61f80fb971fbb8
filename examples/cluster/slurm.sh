#!/bin/bash
# Distil on Slurm: a Ray head on the first node, a worker on every other, one driver.
#   sbatch slurm.sh experiment=radio_v2_5_b out=/shared/runs/b data.train=/shared/pictures/train
# A job that is requeued (preemption, a lost node) resumes: the same command finds `out` again.
#SBATCH --job-name=radio-distill
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --output=%x-%j.log
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
# One token for all nodes, in a folder that they share; Ray refuses strangers without it.
umask 077
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="${SLURM_SUBMIT_DIR}/.ray-token-${SLURM_JOB_ID}"
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

srun --nodes=1 --ntasks=1 --nodelist="$head" \
    ray start --head --block --port="$port" --labels=role=student &
workers=$((SLURM_JOB_NUM_NODES - 1))
if [ "$workers" -gt 0 ]; then
    srun --nodes="$workers" --ntasks="$workers" --exclude="$head" \
        ray start --block --address="$head:$port" --labels=role=teacher &
fi
trap 'kill $(jobs -p) 2> /dev/null || true; rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

# The driver is told to stop two minutes before the end: it saves a checkpoint after the step.
trap 'kill -TERM "$driver"' TERM
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
    radio train stream=ray "cluster.address=$head:$port" device=cuda "$@" &
driver=$!
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2> /dev/null; do  # `wait` ends when the signal comes, the driver later
    code=0
    wait "$driver" || code=$?
done
if [ "$code" -eq 130 ]; then  # stopped, not finished
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
