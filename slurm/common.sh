# common.sh   what the scripts of this folder share: read by them, not run.
#
# Variables, see slurm/README.md: RECIPE OUT DATA DS PYTHON EXTRA IVTLR_ROOT
# shellcheck shell=bash

fail() {
  echo "error: $*" >&2
  exit 2
}

words_of() { # ARRAY TEXT: split at blanks and at ends of lines
  read -r -d '' -a "$1" <<<"$2" || true
}

name_of_recipe() { # what its line `name:` says, as in training; of several files the last that says one
  local files file line name="" says="^name: *[\"']?([^\"'# ]+)"
  IFS=, read -r -a files <<<"$recipe"
  for file in "${files[@]}"; do
    [[ -f $file ]] || continue
    while IFS= read -r line || [[ -n $line ]]; do
      [[ ! $line =~ $says ]] || name=${BASH_REMATCH[1]}
    done <"$file"
  done
  [[ -n $name ]] || name=${recipe##*/} name=${name%.*}
  echo "$name"
}

enter_project() { # goes to the project root and sets recipe, out and recipe_options
  # Slurm runs a copy of the job file, so the project is found by where the job was submitted
  root=${IVTLR_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
  [[ -f $root/pipeline/train.py ]] || fail "$root is not the project root; submit from there, or set IVTLR_ROOT"
  cd "$root"
  recipe=${RECIPE:-recipes/demo.yaml}
  out=${OUT:-runs/$(name_of_recipe)}
  local extra
  words_of extra "${EXTRA:-}"
  recipe_options=(--recipe "$recipe")
  [[ -z ${DATA:-} ]] || recipe_options+=(--data "$DATA")
  recipe_options+=("${extra[@]}")
}

find_ds() { # sets ds, the DeepSpeed file
  ds=${DS:-ds_configs/zero3.json}
  [[ -f $ds ]] || fail "no DeepSpeed config $ds; set DS"
}

ask_slurm() { # WORD...: scontrol; where the controller does not answer, such as while the network is away, again
  local tries said status away="unable to contact|connection|timed out|zero bytes|standby"
  for ((tries = 0; tries < 30; tries++)); do # five minutes, and what each try takes
    ((tries == 0)) || sleep 10
    status=0
    said=$(scontrol "$@" 2>&1) || status=$?
    if ((status == 0)) || [[ ! ${said,,} =~ $away ]]; then break; fi
  done
  [[ -z $said ]] || echo "$said"
  return "$status"
}

may_be_queued_again() { # sets shown, what Slurm says of this job; only of a batch job that is running this start
  shown=" $(ask_slurm show job --oneliner "$SLURM_JOB_ID") " || { echo "${shown:1}" >&2 && return 1; }
  # not in an salloc shell, nor under --no-requeue, nor where Slurm has given this start up and made another
  [[ $shown =~ " BatchFlag="[1-9] && $shown == *" Requeue=1 "* &&
    $shown == *" Restarts=${SLURM_RESTART_COUNT:-0} "* ]]
}

is_running() { # by shown: that a job is just being told a signal (of which Slurm says so for a while) ends nothing
  [[ $shown =~ " JobState="(RUNNING|SIGNALING)" " ]]
}

find_python() { # sets python, and puts its programs first
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
  local programs
  programs=$(command -v "$python")
  programs=$(cd "${programs%/*}" && pwd)
  export PATH=$programs:$PATH PYTHONUNBUFFERED=1
}
