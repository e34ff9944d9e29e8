#!/usr/bin/env bash
# Runs one loop on every worker of a TPU VM slice.
#
#   ./launch_tpu.sh TPU_NAME ZONE --config=configs/addition.py --workdir=gs://BUCKET/DIR [--config.K=V …]
#
# Copies this checkout to each worker, installs jax for TPU next to the requirements, and starts the
# same command everywhere; the workers find each other. Run it again to resume.
set -euo pipefail
if [[ $# -lt 3 || "$1" == -* ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
tpu=$1 zone=$2
shift 2
arguments=$(printf '%q ' "$@")
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$(dirname "$0")" archive --format=tar.gz -o "$archive" HEAD

gcloud compute tpus tpu-vm scp "$archive" "$tpu:karploop.tar.gz" --zone="$zone" --worker=all
gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="
  set -e
  mkdir -p karploop && tar -xzf karploop.tar.gz -C karploop && cd karploop
  [ -d .venv ] || python3 -m venv .venv
  .venv/bin/pip install -q -r requirements.txt 'jax[tpu]' gcsfs
  .venv/bin/python -m experiments.run --distributed $arguments
"
