#!/usr/bin/env bash
# submit_all.sh [--dry_run] [OPTION of train.py...]   a whole run: preparation, every stage, evaluation.
#
#   Command    RECIPE=recipes/X.yaml DS=ds_configs/zero2.json slurm/submit_all.sh
#   Does       submits jobs that each start when the one before has succeeded: prep.sbatch if the shard folder is not
#              there, a job for every stage of the recipe that is not done, evaluate.sbatch; --dry_run only prints
#   Watch      what it prints at its end
#
# Variables, see slurm/README.md: those of run_stage.sh, and SBATCH_EXTRA EVALUATE_EXTRA
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

dry_run=0 train_options=()
for word in "$@"; do
  case $word in
    --dry_run | --dry-run) dry_run=1 ;;
    --help | -h)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
      exit
      ;;
    --recipe | --recipe=* | --out | --out=* | --data | --data=* | --ds | --ds=*)
      name=${word#--} name=${name%%=*}
      fail "$word: the jobs take this from the variable ${name^^}"
      ;;
    --stages | --stages=*) fail "$word: this submits every stage that is not done; one: sbatch slurm/stageN.sbatch" ;;
    *) train_options+=("$word") ;;
  esac
done
export IVTLR_ROOT=${IVTLR_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
enter_project
IVTLR_ROOT=$PWD # jobs are submitted from here
find_ds
((dry_run)) || command -v sbatch >/dev/null || fail "no sbatch here: this needs a Slurm cluster (--dry_run does not)"
find_python
words_of sbatch_extra "${SBATCH_EXTRA:-}"

# a mistake in the recipe or an option ends it here, before anything waits in a queue
asked=$("$python" slurm/recipe.py "${recipe_options[@]}" "${train_options[@]}") || exit 2
stages=$(sed -n 's/^stages=//p' <<<"$asked")
make_data=$(sed -n 's/^make_data=//p' <<<"$asked")

last="" watched=""
submit() { # NAME WORD...: sbatch WORD..., after the job before
  local name=$1 command=(sbatch --parsable)
  shift
  [[ -z $last ]] || command+=("--dependency=afterok:$last" --kill-on-invalid-dep=yes)
  command+=("$@")
  if ((dry_run)); then
    printf '%q ' "${command[@]}" | sed 's/ $/\n/'
    last=$name
  else
    last=$("${command[@]}") || fail "sbatch refused $name; cancel what is submitted with scancel, or leave it and go on"
    last=${last%%;*} # a federation adds the cluster's name
    echo "$name: job $last"
    [[ -n $watched ]] || watched=slurm/logs/ivtlr-$name-$last.out
  fi
}

((!make_data)) || submit prep slurm/prep.sbatch "${train_options[@]}"
for ((stage = 0; stage < stages; stage++)); do
  if [[ -s $out/stage$stage.done ]]; then
    echo "stage$stage: done already"
  elif [[ -f slurm/stage$stage.sbatch ]]; then
    submit "stage$stage" "${sbatch_extra[@]}" "slurm/stage$stage.sbatch" "${train_options[@]}"
  else
    submit "stage$stage" "${sbatch_extra[@]}" "--job-name=ivtlr-stage$stage" \
      slurm/stage.sbatch "$stage" "${train_options[@]}"
  fi
done
submit evaluate slurm/evaluate.sbatch

((dry_run)) || cat <<END
watch: squeue --me
       tail -f $watched
       tensorboard --logdir $out/tensorboard
END
