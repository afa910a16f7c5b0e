#!/usr/bin/env bash
# Train on a Cloud TPU slice of any size: create it, install, run on all hosts.
#
#   export PROJECT=my-project ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=my-bucket
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh run dpo --training.max_steps=100
#   launch/tpu_pod.sh log                          # what host 0 says, until Ctrl-C
#   launch/tpu_pod.sh delete
#
# HF_TOKEN, if it is set as the slice is created, goes to every host for gated models; it
# stands on no command line. The hosts' own Python is too old: PYTHON is installed there.
# `run` goes on from the newest checkpoint, so run it again after a preemption (exit
# code 75). The work directory is gs://BUCKET/NAME, which every host sees; the account of
# the hosts has to be allowed to read, write and delete there. A model and data may be in
# a bucket too: --model.name_or_path=gs://... --data.train=gs://...
set -euo pipefail

: "${PROJECT:?the Google Cloud project}" "${ZONE:?such as us-west4-a}"
: "${TYPE:=v5litepod-16}" "${NAME:=jaxtrain}" "${VERSION:=v2-alpha-tpuv5-lite}"
: "${SPOT:=}" "${BUCKET:=}" "${PYTHON:=python3.12}" "${HF_TOKEN:=}"
SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WHERE=(--project="$PROJECT" --zone="$ZONE")

# A Python that jaxtrain takes, in an environment of its own.
INSTALL_PYTHON="
  command -v $PYTHON ||
    { sudo add-apt-repository -y ppa:deadsnakes/ppa &&
      sudo apt-get install -q -y $PYTHON $PYTHON-venv; }
  $PYTHON -m venv venv"

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=all --command="$1"
}

create() {
  local options=()
  if [[ -n "$SPOT" ]]; then options+=(--spot); fi
  gcloud compute tpus queued-resources create "$NAME" "${WHERE[@]}" \
    --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
    "${options[@]}"
  until [[ $(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" \
    --format='value(state.state)') == ACTIVE ]]; do
    echo "waiting for $TYPE in $ZONE"
    sleep 30
  done
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  # Without what is made here: environments of gigabytes, caches, results.
  tar --exclude='./.*' --exclude=./out --exclude=./build --exclude=./dist \
    --exclude=__pycache__ --exclude='*.egg-info' -czf "$archive" -C "$SOURCE" .
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:jaxtrain.tar.gz" \
    "${WHERE[@]}" --worker=all
  rm "$archive"
  if [[ -n "$HF_TOKEN" ]]; then send_token; fi
  on_all_hosts "$INSTALL_PYTHON"
  on_all_hosts "mkdir -p jaxtrain && tar -xzf jaxtrain.tar.gz -C jaxtrain &&
    venv/bin/pip install -q -U pip && venv/bin/pip install -q -e 'jaxtrain[tpu,gcs]'"
}

# As a file that only its owner reads, where `hf auth login` would put it.
send_token() {
  local file
  file=$(mktemp)
  printf %s "$HF_TOKEN" > "$file"
  gcloud compute tpus tpu-vm scp "$file" "$NAME:hf_token" "${WHERE[@]}" --worker=all
  rm "$file"
  on_all_hosts "mkdir -p .cache/huggingface && chmod 600 hf_token &&
    mv hf_token .cache/huggingface/token"
}

run() {
  : "${BUCKET:?a Cloud Storage bucket that the hosts can write to}"
  # Quoted once more: the arguments pass through the shells of the hosts.
  local arguments
  arguments=$(printf ' %q' "$@")
  on_all_hosts "set -o pipefail && cd jaxtrain &&
    JAXTRAIN_DISTRIBUTED=1 ../venv/bin/python -m jaxtrain.main \
    --workdir=gs://${BUCKET#gs://}/$NAME$arguments 2>&1 | tee -a ~/jaxtrain.log"
}

# Process 0 writes all lines of a run but other hosts' errors.
log() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker=0 \
    --command="tail -n 100 -F jaxtrain.log"
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

case "${1:-}" in
  create | run | log | delete) "$@" ;;
  *)
    echo "usage: $0 create | run FLAGS... | log | delete" >&2
    exit 2
    ;;
esac
