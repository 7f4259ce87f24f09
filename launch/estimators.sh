#!/usr/bin/env bash
# The studies of the estimators on two halves, end digit and three parts, then their comparison over all three.
# Stopped at any time, the same command goes on. Same .venv as local.sh, or READY_PYTHON.
# Usage: bash launch/estimators.sh [--reduced] [--at_once=2] [--workdir=runs/estimators]
#   --reduced: one seed of set_control_variate and ParaGator and of the base, to check their order on each task
#   --at_once: runs side by side, each with its share of the cores, and of a GPU's memory
cd "$(dirname "$0")/.."
source launch/venv.sh

at_once=2 workdir=runs/estimators chosen=()
for argument in "$@"; do
  case "$argument" in
    --reduced) chosen=("--arms=base,set_control_variate,paragator" --seeds=0) ;;
    --at_once=*) at_once=${argument#--at_once=} ;;
    --workdir=*) workdir=${argument#--workdir=} ;;
    *)
      sed -n '2,/^cd/{/^#/s/^# \{0,1\}//p}' "$0" >&2
      exit 2
      ;;
  esac
done

if [ -n "${READY_PYTHON:-}" ]; then
  python=$READY_PYTHON
else
  install "."
  python=$VENV/bin/python
fi

reports=()
for task in two_halves end_digit three_parts; do
  echo "== $task"
  rm -f "$workdir/$task/report.json"
  # A study ends with status 1 where a claim does not hold, or has too few seeds to tell. It has written its report
  # then, and has not where it was stopped.
  "$python" -m spiral_jax.study --config="configs/study_estimators_$task.py" --workdir="$workdir/$task" \
    --at_once="$at_once" "${chosen[@]}" || [ -f "$workdir/$task/report.json" ]
  reports+=("$workdir/$task/report.json")
done
echo "== all three"
"$python" -m spiral_jax.study --across="$(IFS=,; echo "${reports[*]}")" --best=set_control_variate \
  --out="$workdir/all"
