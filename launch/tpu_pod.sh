#!/usr/bin/env bash
# Trains on all workers of a Cloud TPU slice: makes it if it is not there, installs, trains, and does so again after each
# preemption until the run has ended (it resumes at its newest checkpoint). Needs gcloud, logged in; run it in tmux.
#
# Usage: bash launch/tpu_pod.sh [--dry_run] NAME ACCELERATOR ZONE WORKDIR --config=configs/qwen3_4b.py [--config.a.b=c ...]
#   bash launch/tpu_pod.sh spiral v5litepod-64 us-west4-b /mnt/spiral/runs/4b --config=configs/qwen3_4b.py \
#       --config.model.hf_path=/mnt/spiral/models/Qwen3-4B-Instruct-2507
# WORKDIR, model and data must be files that all workers see: SHARE is mounted on each of them at /mnt/spiral.
#
# Environment:
#   SHARE=10.0.0.2:/spiral   NFS share, such as a Filestore instance's (required)
#   SPOT=1                   spot capacity (default); 0: on demand
#   QUEUED=1                 asks through a queued resource (default) and waits; 0: creates the slice at once or fails
#   RUNTIME=...              TPU software version; default: the one for ACCELERATOR
#   RESTARTS=3               times that a run which ends with an error on a healthy slice is started again
# --dry_run prints every command and runs none. The slice stays after the run: delete it with the printed command.
set -euo pipefail
cd "$(dirname "$0")/.."

dry_run=0
if [ "${1:-}" = --dry_run ]; then
  dry_run=1
  shift
fi
if [ $# -lt 5 ] || [[ "$4" == --* ]]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
name=$1 accelerator=$2 zone=$3 workdir=$4
shift 4
share=${SHARE:?error: SHARE is not set: SERVER:/PATH of an NFS share that all workers can mount}

case "$accelerator" in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
runtime=${RUNTIME:-$runtime}

run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [ "$dry_run" = 1 ] || "$@"
}

on_all_workers() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

state() {  # of the slice; empty: there is none
  [ "$dry_run" = 1 ] || gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || true
}

create() {
  local capacity=()
  [ "${SPOT:-1}" = 0 ] || capacity=(--spot)
  if [ "${QUEUED:-1}" = 0 ]; then
    run gcloud compute tpus tpu-vm create "$name" --zone="$zone" --accelerator-type="$accelerator" --version="$runtime" \
      "${capacity[@]}"
    return
  fi
  if [ "$dry_run" = 1 ] || ! gcloud compute tpus queued-resources describe "$name" --zone="$zone" >/dev/null 2>&1; then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
      --accelerator-type="$accelerator" --runtime-version="$runtime" "${capacity[@]}"
  fi
  until [ "$dry_run" = 1 ] || [ "$(state)" = READY ]; do
    echo "waiting for $accelerator in $zone"
    sleep 60
  done
}

delete() {
  if [ "${QUEUED:-1}" = 0 ]; then
    run gcloud compute tpus tpu-vm delete "$name" --zone="$zone" --quiet
  else
    run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --quiet --force
  fi
}

install_on_all() {
  local code
  code=$(mktemp -d)/spiral_jax.tar.gz
  run git archive --format=tar.gz --output="$code" HEAD
  run gcloud compute tpus tpu-vm scp "$code" "$name:spiral_jax.tar.gz" --zone="$zone" --worker=all
  on_all_workers "set -e
sudo apt-get -qq update && sudo apt-get -qq install -y nfs-common python3.11 python3.11-venv
sudo mkdir -p /mnt/spiral && { mountpoint -q /mnt/spiral || sudo mount -t nfs $(printf %q "$share") /mnt/spiral; }
mkdir -p spiral_jax && tar -xzf spiral_jax.tar.gz -C spiral_jax
cd spiral_jax && PYTHON=python3.11 && source launch/venv.sh && install .[tpu]"
}

train=$(printf ' %q' .venv/bin/python -m spiral_jax.train --workdir="$workdir" "$@")
log=$(mktemp)
ends_by_itself() {  # a preempted run saves, says so, and ends without an error
  on_all_workers "cd spiral_jax &&$train" | tee "$log" && ! grep -q "preempted: saved at step" "$log"
}

left=${RESTARTS:-3}
[ "$(state)" = READY ] || create
install_on_all
until ends_by_itself; do
  sleep 60 # a slice says only after a while that it is preempted
  now=$(state)
  if [ "$now" != READY ]; then
    echo "the slice is ${now:-gone}: making it again"
    delete || true
    create
    install_on_all
  elif grep -q "preempted: saved at step" "$log"; then
    echo "the run was told to end on a slice that stays: starting it again"
  elif [ "$left" -gt 0 ]; then
    echo "the run has ended too early on a healthy slice; starts left: $left"
    left=$((left - 1))
  else
    echo "error: the run ends with an error again and again: see above" >&2
    exit 1
  fi
done
echo "the run has ended. To give the slice back:"
dry_run=1 delete
