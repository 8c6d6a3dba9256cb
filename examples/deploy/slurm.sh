#!/bin/bash
#SBATCH --job-name=minipool
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1     # one node process per host, which starts a worker for each GPU that it may see
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=01:00:00
#SBATCH --signal=B:TERM@60      # to this script, a minute before the end: time for running jobs (30 s) and results
#
# Lends an allocation to a pool whose server runs elsewhere (or starts one, if MINIPOOL_ADDRESS is not set):
#
#     export MINIPOOL_ADDRESS=192.0.2.10:8899 MINIPOOL_SECRET_FILE=~/.config/minipool/secret
#     sbatch examples/deploy/slurm.sh
#
# CUDA_VISIBLE_DEVICES is left as Slurm has set it: the node obeys it. The variables reach the nodes because sbatch and
# srun export the environment; the secret is in a file on the shared file system, readable by you alone.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
python=${PYTHON:-python3} port=${MINIPOOL_PORT:-8899} server=''

if [[ -z ${MINIPOOL_ADDRESS:-} ]]; then
    MINIPOOL_ADDRESS=$(hostname):$port
    export MINIPOOL_ADDRESS
    "$python" minipool.py serve --host 0.0.0.0 --port "$port" &
    server=$!
    until "$python" minipool.py secret >/dev/null 2>&1; do sleep 0.2; done     # the first server of a user makes it
fi

# srun takes a SIGTERM of its own as an order to kill, so the tasks are told by scancel. Without --batch or --full it
# tells the steps only: each node lets its running jobs end, gives the rest back, and leaves.
drain() { scancel --signal=TERM "$SLURM_JOB_ID"; }
trap drain TERM

# --lifetime is for clusters that send no warning: a little less than --time.
srun "$python" minipool_worker.py connect --lifetime "${LIFETIME:-57m}" --death-timeout 10m --tag slurm &
nodes=$!

# Your program may follow here, as `"$python" program.py || failed=1; drain`: the allocation ends with it.
until wait "$nodes" || ! kill -0 "$nodes" 2>/dev/null; do :; done       # a signal interrupts a wait
[[ -z $server ]] || { kill "$server"; wait "$server"; }
