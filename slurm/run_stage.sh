#!/usr/bin/env bash
# run_stage.sh STAGE [OPTION...]   one training stage inside a Slurm allocation.
#
#   Command    run by slurm/stageN.sbatch; in an salloc shell: GPUS_PER_NODE=8 bash slurm/run_stage.sh 0
#   Hardware   all allocated nodes, one rank for each of their GPUs
#   Does       looks whether the nodes are fit (slurm/health.py), and is queued again without those that are not;
#              starts pipeline/train.py --stages STAGE OPTION... as one task per GPU; succeeds only if
#              training wrote OUT/stageSTAGE.done; a batch job that was asked to stop, or whose training crashed or
#              hung, is queued again
#   Watch      squeue --me; tail -f slurm/logs/ivtlr-stageN-JOB.out; tensorboard --logdir runs
#
# One task per GPU, with no launcher between Slurm and the ranks: each rank gets Slurm's signals itself, one
# that dies ends the others and the job, every line of the log tells its rank, and nodes need no ssh.
#
# Variables, see slurm/README.md:
# RECIPE OUT DATA DS PYTHON GPUS_PER_NODE TASKS_PER_NODE EXTRA SRUN_EXTRA MAX_FRUITLESS HEALTH_CHECK LOCAL_DATA
# IVTLR_ROOT
set -euo pipefail
STOPPED=75 # status of training that was asked to stop, saved, and can go on (pipeline/watching/watch.py)
AT_ONCE=130 # and of one that was interrupted twice

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ ${1:-} =~ ^[0-9]+$ ]] || fail "give the stage's number: run_stage.sh STAGE [OPTION...]"
stage=$1
shift
[[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_JOB_NODELIST:-} ]] ||
  fail "not in a Slurm job; from the project root: sbatch slurm/stage$stage.sbatch"
[[ -z ${SLURM_ARRAY_JOB_ID:-}${SLURM_HET_SIZE:-} ]] || fail "a stage is one job, so not --array, nor one of parts"

enter_project
find_ds
max_fruitless=${MAX_FRUITLESS:-3}
[[ $max_fruitless =~ ^(0|[1-9][0-9]*)$ ]] || fail "MAX_FRUITLESS=$max_fruitless: expected a whole number"
health_seconds=${HEALTH_CHECK:-120}
[[ $health_seconds =~ ^(0|[1-9][0-9]*)$ ]] || fail "HEALTH_CHECK=$health_seconds: expected seconds, or 0 for no check"

find_python

tasks=${TASKS_PER_NODE:-${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}}
[[ $tasks =~ ^[1-9][0-9]*$ ]] ||
  fail "no GPUs in this job: sbatch --gpus-per-node N, or set GPUS_PER_NODE (on CPUs: TASKS_PER_NODE)"
# the smallest node's; the variable looks like 64(x2),32
cpus=$(tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | sed -n 1p)
cpus=$((cpus / tasks))
((cpus > 0)) || cpus=1

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${nodes%%$'\n'*}
# by job, so that jobs on one node do not meet; below the ports that systems give out (32768 and up)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
export SLURM_EXPORT_ENV=ALL # to the ranks, under sbatch --export=NONE, too
unset RANK LOCAL_RANK WORLD_SIZE # left in the submitting shell they would hide Slurm's ranks

words_of extra "${EXTRA:-}"
words_of srun_extra "${SRUN_EXTRA:-}"
if [[ -n ${LOCAL_DATA:-} ]]; then
  [[ $LOCAL_DATA == /* && -n ${DATA:-} ]] || fail "LOCAL_DATA needs a whole path, and DATA, the shard folder to copy"
  [[ -f $DATA/manifest.json ]] || fail "LOCAL_DATA: $DATA is not a shard folder that could be copied (no manifest.json)"
  # by content, too: what another job of the node trains on stays, whatever its folder is called
  data=$LOCAL_DATA/$(basename "$(realpath -- "$DATA")")-$(sha256sum <"$DATA/manifest.json" | cut -c 1-12)
else
  data=${DATA:-}
fi
options=(--ds "$ds" --recipe "$recipe" --out "$out" --stages "$stage")
[[ -z $data ]] || options+=(--data "$data")

# ---- restarts ----------------------------------------------------------------------------------------------
mkdir -p "$out" || fail "$out cannot be made a run folder"
restarts=$out/slurm_restarts # the job, its starts in a row that added nothing, the furthest checkpoint before this one
# a name of this start's own: a network file system may remember for a while that a file was not there
start=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
ended=$out/slurm_ended.$start
rm -rf "$out/slurm_ended.$SLURM_JOB_ID".* "$out/slurm_health.$SLURM_JOB_ID".* # of starts that were killed

newest_checkpoint() { # by stage and step; one without a manifest is not complete
  local manifests=("$out"/checkpoints/stage*-step*/manifest.json)
  [[ -e ${manifests[0]} ]] || return 0
  printf '%s\n' "${manifests[@]%/manifest.json}" | sed 's|.*/||' | sort -V | tail -n 1
}

is_further() { # CHECKPOINT: whether it is behind the furthest one
  [[ $1 != "$furthest" && $(printf '%s\n' "$1" "$furthest" | sort -V | tail -n 1) == "$1" ]]
}

refuse_fruitless() { # [WHY]
  fail "stage $stage: ${1:+$1; }started $((max_fruitless + 1)) times without getting past" \
    "${furthest:-its beginning}, so not again: save more often (--train.checkpoint_every), ask for more time, or see" \
    "above; then submit the stage anew"
}

queue_again() { # WHY [NODES]: this job, without NODES; does not return
  local now excluded
  now=$(newest_checkpoint)
  is_further "$now" || ((fruitless < max_fruitless)) || refuse_fruitless "$1"
  echo "job $SLURM_JOB_ID: $1; queued again, to go on from ${now:-its beginning}"
  trap '' TERM # comes with the next line, and the one after it is wanted
  ask_slurm requeue "$SLURM_JOB_ID" || fail "stage $stage: Slurm did not queue the job again; submit the stage anew"
  if [[ -n ${2:-} ]]; then # only a job that waits can be told; it does so for as long as credentials live (120 s)
    excluded=$(sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p' <<<"$shown")
    [[ -z $excluded || $excluded == "(null)" ]] || set -- "$1" "$2,$excluded"
    scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$2" ||
      echo "warning: Slurm does not exclude $2; they are looked at again" >&2
  fi
  exit "$STOPPED"
}

end_if_stopped() { # asked to stop, or over the time limit: queue this job again, where that may be
  # not when it is being ended for another reason: cancelled for good, pre-empted to be queued again by Slurm itself
  if may_be_queued_again && { [[ $shown == *" Reason=TimeLimit "* ]] ||
    { ((status == STOPPED)) && is_running; }; }; then
    queue_again "training was asked to stop"
  fi
  ((status != STOPPED)) || { echo "stage $stage: stopped on request; submit it again to go on" >&2 && exit "$STOPPED"; }
}

before=$(newest_checkpoint)
job="" fruitless=0 furthest=""
[[ ! -e $restarts ]] || read -r job fruitless furthest <"$restarts" || true
[[ $fruitless =~ ^(0|[1-9][0-9]*)$ ]] || fruitless=0 # a damaged file
if [[ ${SLURM_RESTART_COUNT:-0} == 0 || $job != "$SLURM_JOB_ID" ]] || is_further "$before"; then
  fruitless=0 furthest=$before
else
  fruitless=$((fruitless + 1))
  ((fruitless <= max_fruitless)) || refuse_fruitless # Slurm itself queues jobs again, too
fi
echo "$SLURM_JOB_ID $fruitless $furthest" >"$restarts"

# Every start numbers its steps from 0.  An earlier one's srun, on a node that was cut off and comes back, would end our
# step of the same number when its own rank fails: so the three numbers of each start before are used up.
for ((i = 0; i < 3 * ${SLURM_RESTART_COUNT:-0}; i++)); do
  srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 true || true
done

# ---- what a task runs in -----------------------------------------------------------------------------------
# notes how the first task ended that did not end well.  When it has, Slurm kills the others, and srun's own status may
# be theirs.  Signals go to the whole task, so training gets them, and this waits.
noting=(bash -c '
trap asked=1 USR1 TERM
asked=0 status=0
"${@:2}" || status=$?
case $asked:$status in 1:138 | 1:143) status='$STOPPED' ;; esac # ended by the signal, as it had nothing to save yet
((status == 0)) || (set -o noclobber; echo "$status" >"$1") 2>/dev/null || true
exit "$status"' task)

noted() { # FILE: sets status to what a task noted there
  [[ ! -s $1 ]] || status=$(<"$1")
  rm -f "$1"
}

trap : TERM # comes to this script too, at a time limit

# ---- nodes -------------------------------------------------------------------------------------------------
on_each_node=(srun --overlap --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpus-per-task="$cpus"
  --kill-on-bad-exit=0 "${srun_extra[@]}")

check_nodes() { # goes on only with nodes that are fit for training
  local folder=$out/slurm_health.$start bad="" status=0 told
  local about=(--folder "$folder" --word "$start.$RANDOM$RANDOM") cpus_do=()
  [[ -z ${TASKS_PER_NODE:-} ]] || cpus_do=(--cpus_do) # else there are as many ranks as GPUs
  mkdir "$folder" && printf %s "${about[3]}" >"$folder/word" || fail "$out cannot be written"
  told=$(date +%s)
  timeout --kill-after=10 "$health_seconds" "${on_each_node[@]}" "${noting[@]}" "$folder/ended" \
    "$python" slurm/health.py check "${about[@]}" </dev/null >"$folder/answers" 2>"$folder/errors" || status=$?
  if ((status != 124 && status != 137)); then # no node is unfit that was asked to stop, except by `timeout`
    noted "$folder/ended"
    ((status != STOPPED)) || { rm -rf "$folder" && end_if_stopped; }
  fi
  status=0
  bad=$("$python" slurm/health.py judge "${about[@]}" --answers "$folder/answers" --nodes "$nodes" \
    --gpus "$tasks" "${cpus_do[@]}" --asked "$told" --limit "$health_seconds" --note "$out/bad_nodes") || status=$?
  ((status == 0 || status == 3)) || tail -n 5 "$folder/errors" >&2
  rm -rf "$folder"
  case $status in
    0) return ;;
    3) bad=${bad//$'\n'/,} ;; # some
    4) fail "stage $stage: the nodes are not fit for training, and others would not be; HEALTH_CHECK=SECONDS gives" \
      "them more time, and 0 skips this" ;;
    *) echo "warning: the nodes' answers could not be judged" >&2 && return ;;
  esac
  # under --nodelist it would wait for the unfit node for ever
  may_be_queued_again && is_running && [[ $shown == *" ReqNodeList=(null) "* ]] ||
    fail "stage $stage: submit it again with --exclude=$bad"
  queue_again "$bad not fit for training (see $out/bad_nodes)" "$bad"
}

((health_seconds == 0)) || check_nodes

if [[ -n ${LOCAL_DATA:-} ]]; then
  status=0
  "${on_each_node[@]}" --kill-on-bad-exit=1 "${noting[@]}" "$ended.copy" \
    "$python" slurm/local_data.py --data "$DATA" --local "$data" || status=$?
  noted "$ended.copy"
  ((status == 0 || status == 2)) || end_if_stopped
  ((status == 0)) || fail "stage $stage: $DATA could not be copied to $data on every node; see above"
fi

# ---- training ----------------------------------------------------------------------------------------------
where="$SLURM_JOB_NUM_NODES nodes x $tasks ranks, $MASTER_ADDR:$MASTER_PORT"
echo "job $SLURM_JOB_ID: stage $stage of $out, $where"
status=0
# block: consecutive ranks share a node.  GPUs stay unbound: a rank sees all of its node's, takes the one of
# its local rank and reaches the others directly.  (--gpu-bind=none hides which of a shared node's are ours.)
srun --ntasks="$((SLURM_JOB_NUM_NODES * tasks))" --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
  --distribution=block --kill-on-bad-exit=1 --label "${srun_extra[@]}" \
  "${noting[@]}" "$ended" "$python" pipeline/train.py "${options[@]}" "${extra[@]}" "$@" || status=$?
noted "$ended"

# an exit code alone is no proof: launchers and clusters lose them
# and a rank that is killed after the marker was written has nothing left to do
((status != 0 && status < 128)) || [[ ! -s $out/stage$stage.done ]] || exit 0
((status == 2)) || end_if_stopped # 2: a user's mistake
((status != 0)) || fail "stage $stage: training ended without writing $out/stage$stage.done"
told="training ended with status $status; the ranks' own errors, or srun's, are above"
# a rank that crashed, hung or lost another one; the next start looks at the nodes
if ((status != 2 && status != AT_ONCE)) && may_be_queued_again && is_running; then
  queue_again "$told"
fi
echo "error: stage $stage: $told" >&2
exit "$status"
