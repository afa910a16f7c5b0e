#!/usr/bin/env bash
# Train on a Cloud TPU slice of any size: create it, install, run on all hosts.
#
#   export PROJECT=my-project ZONE=us-west4-a TYPE=v5litepod-16 BUCKET=my-bucket
#   launch/tpu_pod.sh create
#   launch/tpu_pod.sh run dpo --training.max_steps=100
#   launch/tpu_pod.sh delete
#
# `run` goes on from the newest checkpoint, so run it again after a preemption (exit
# code 75). The work directory is gs://BUCKET/NAME, which every host sees; the account of
# the hosts has to be allowed to read, write and delete there. A model and data may be in
# a bucket too: --model.name_or_path=gs://... --data.train=gs://...
set -euo pipefail

: "${PROJECT:?the Google Cloud project}" "${ZONE:?such as us-west4-a}"
: "${TYPE:=v5litepod-16}" "${NAME:=jaxtrain}" "${VERSION:=v2-alpha-tpuv5-lite}"
: "${SPOT:=}" "${BUCKET:=}"
SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
WHERE=(--project="$PROJECT" --zone="$ZONE")

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
  on_all_hosts "mkdir -p jaxtrain && tar -xzf jaxtrain.tar.gz -C jaxtrain &&
    pip install -q -U pip && pip install -q -e 'jaxtrain[tpu,gcs]'"
}

run() {
  : "${BUCKET:?a Cloud Storage bucket that the hosts can write to}"
  # Quoted once more: the arguments pass through the shells of the hosts.
  local arguments
  arguments=$(printf ' %q' "$@")
  on_all_hosts "cd jaxtrain && JAXTRAIN_DISTRIBUTED=1 python3 -m jaxtrain.main \
    --workdir=gs://${BUCKET#gs://}/$NAME$arguments"
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

case "${1:-}" in
  create | run | delete) "$@" ;;
  *)
    echo "usage: $0 create | run FLAGS... | delete" >&2
    exit 2
    ;;
esac
