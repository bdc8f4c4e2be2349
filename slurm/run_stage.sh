#!/usr/bin/env bash
# run_stage.sh STAGE [OPTION...]   one training stage inside a Slurm allocation.
#
#   Command    run by slurm/stageN.sbatch; in an salloc shell: GPUS_PER_NODE=8 bash slurm/run_stage.sh 0
#   Hardware   all allocated nodes, one rank for each of their GPUs
#   Does       starts pipeline/train.py --stages STAGE OPTION... as one task per GPU; succeeds only if
#              training wrote OUT/stageSTAGE.done
#   Watch      squeue --me; tail -f slurm/logs/ivtlr-stageN-JOB.out; tensorboard --logdir runs
#
# One task per GPU, with no launcher between Slurm and the ranks: each rank gets Slurm's signals itself, one
# that dies ends the others and the job, every line of the log tells its rank, and nodes need no ssh.
#
# Variables, see slurm/README.md:
# RECIPE OUT DATA DS PYTHON GPUS_PER_NODE TASKS_PER_NODE EXTRA SRUN_EXTRA IVTLR_ROOT
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

[[ ${1:-} =~ ^[0-9]+$ ]] || fail "give the stage's number: run_stage.sh STAGE [OPTION...]"
stage=$1
shift
[[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NODELIST:-} ]] ||
  fail "not in a Slurm job; from the project root: sbatch slurm/stage$stage.sbatch"

# Slurm runs a copy of the job file, so the project is found by where the job was submitted
root=${IVTLR_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
[[ -f $root/pipeline/train.py ]] || fail "$root is not the project root; submit from there, or set IVTLR_ROOT"
cd "$root"

recipe=${RECIPE:-recipes/demo.yaml}
name=${recipe##*/}
out=${OUT:-runs/${name%.*}}
ds=${DS:-ds_configs/zero3.json}
[[ -f $ds ]] || fail "no DeepSpeed config $ds; set DS"

if [[ -n ${PYTHON:-} ]]; then
  python=$PYTHON
  command -v "$python" >/dev/null || fail "no Python at PYTHON=$python"
elif [[ -x .venv/bin/python ]]; then
  python=$PWD/.venv/bin/python
else
  python=python3
  "$python" -c 'import importlib.util as u; raise SystemExit(not u.find_spec("deepspeed"))' 2>/dev/null ||
    fail "no Python environment: make .venv in $root, or set PYTHON to one that has DeepSpeed"
fi
# DeepSpeed compiles with the ninja that PATH gives: the environment's own, first
programs=$(command -v "$python")
programs=$(cd "${programs%/*}" && pwd)
export PATH=$programs:$PATH

tasks=${TASKS_PER_NODE:-${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}}
[[ $tasks =~ ^[1-9][0-9]*$ ]] ||
  fail "no GPUs in this job: sbatch --gpus-per-node N, or set GPUS_PER_NODE (on CPUs: TASKS_PER_NODE)"
cpus=${SLURM_JOB_CPUS_PER_NODE%%[^0-9]*} # the first node's; the variable looks like 64(x2),32
cpus=$((cpus / tasks))
((cpus > 0)) || cpus=1

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*}
# by job, so that jobs on one node do not meet; below the ports that systems give out (32768 and up)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus} PYTHONUNBUFFERED=1
unset RANK LOCAL_RANK WORLD_SIZE # left in the submitting shell they would hide Slurm's ranks

read -r -a extra <<<"${EXTRA:-}"
read -r -a srun_extra <<<"${SRUN_EXTRA:-}"
options=(--ds "$ds" --recipe "$recipe" --out "$out" --stages "$stage")
[[ -z ${DATA:-} ]] || options+=(--data "$DATA")

where="$SLURM_JOB_NUM_NODES nodes x $tasks ranks, $MASTER_ADDR:$MASTER_PORT"
echo "job $SLURM_JOB_ID: stage $stage of $out, $where"
status=0
# block: consecutive ranks share a node.  GPUs stay unbound: a rank sees all of its node's, takes the one of
# its local rank and reaches the others directly.  (--gpu-bind=none hides which of a shared node's are ours.)
srun --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
  --distribution=block --kill-on-bad-exit=1 --label "${srun_extra[@]}" \
  "$python" pipeline/train.py "${options[@]}" "${extra[@]}" "$@" || status=$?

if ((status != 0)); then
  echo "error: stage $stage: training ended with status $status; the ranks' own errors are above" >&2
  exit "$status"
fi
# an exit code alone is no proof: launchers and clusters lose them
[[ -s $out/stage$stage.done ]] || fail "stage $stage: training ended without writing $out/stage$stage.done"
