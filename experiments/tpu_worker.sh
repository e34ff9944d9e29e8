#!/usr/bin/env bash
# What `launch_tpu.sh` runs on each worker of a TPU, in ~/.karploop, where it puts these files:
#
#   tpu_worker.sh   this script              tree.tar      the files of the checkout
#   job.sh          id, requirements, arguments            environment   NAME=VALUE, read once
#
#   tpu_worker.sh status [SECONDS]   "karploop-worker ID STATE": none, running, lost, stopped or an
#                                    exit code; waits up to SECONDS for the end of a run
#   tpu_worker.sh install            unpacks the tree; makes venv/ if the requirements are not in it
#   tpu_worker.sh start ATTEMPT      starts the run, which outlives the connection; once an attempt
#   tpu_worker.sh follow LINES       shows the log from LINES on (as of `tail -n`) until the run ends
#   tpu_worker.sh complain           shows the end of the log of a run that went wrong
#
# A run holds a lock on run/lock for as long as it lives; the kernel drops it, however it ends. Who
# waits for that shares the lock, so as not to be taken for a run.
set -euo pipefail
cd "$HOME/.karploop"
id='' requirements='' arguments=() # job.sh sets them

alive() { [[ -f run/lock ]] && ! flock --shared --nonblock run/lock true; }

status() {
  local id=- state=none
  if [[ -f run/id ]]; then
    id=$(<run/id)
    flock --shared --timeout "${1:-0}" run/lock true || true
    if alive; then
      state=running
    else
      state=$(cat run/exit 2>/dev/null) || state=lost # killed, without time for a word
    fi
  fi
  printf 'karploop-worker %s %s\n' "$id" "$state"
}

# Ends what may still run here; a run that is asked finishes its chunk first.
stop_run() {
  alive || return 0
  local group
  group=$(<run/pid)
  kill -TERM -- "-$group" 2>/dev/null || true
  flock --shared --timeout 60 run/lock true && return
  kill -KILL -- "-$group" 2>/dev/null || true
  flock --shared --timeout 10 run/lock true
}

install() {
  stop_run
  # shellcheck source=/dev/null
  source ./job.sh
  rm -rf tree.new
  mkdir tree.new
  tar -xf tree.tar -C tree.new
  rm -rf tree
  mv tree.new tree
  local wanted
  wanted="$requirements: $(cd tree && cat requirements.txt "$requirements")"
  if [[ -x venv/bin/python && "$wanted" == "$(cat venv/installed 2>/dev/null)" ]]; then
    return
  fi
  # The system's Python is older than 3.11 on most TPU images; uv finds or fetches one.
  [[ -x uv/bin/uv ]] || python3 -m pip install --quiet --target uv uv
  rm -rf venv
  uv/bin/uv venv --quiet --python '>=3.11,<3.14' venv
  uv/bin/uv pip install --quiet --python venv/bin/python -r "tree/$requirements" 'jax[tpu]' gcsfs
  printf '%s' "$wanted" >venv/installed
}

start() {
  if alive && [[ "$(cat run/attempt)" == "$1" ]]; then
    return # the connection broke after the start, and was tried again
  fi
  stop_run
  mkdir -p run
  rm -f run/exit
  exec 9>>run/lock
  flock --timeout 10 9 # whoever watched the last run may hold it for a moment
  # shellcheck source=/dev/null
  source ./job.sh
  printf '%s\n' "$id" >run/id
  printf '%s\n' "$1" >run/attempt
  : >run/log
  setsid bash ./tpu_worker.sh supervise </dev/null >>run/log 2>&1 &
  printf '%s\n' "$!" >run/pid
}

supervise() {
  local stopped='' code=0 child=''
  trap 'stopped=stopped' TERM # every process of a group or of a machine that goes down gets its own
  # shellcheck source=/dev/null
  source ./job.sh
  if [[ -f environment ]]; then
    # shellcheck source=/dev/null
    source ./environment
    rm -f environment
  fi
  cd tree
  export PYTHONUNBUFFERED=1
  if [[ ! $stopped ]]; then
    ../venv/bin/python -m experiments.run --distributed "${arguments[@]}" &
    child=$!
    wait "$child" || code=$?
  fi
  while [[ $child ]] && kill -0 "$child" 2>/dev/null; do # the trap ended the wait
    code=0
    wait "$child" || code=$?
  done
  cd ..
  # A run that is told to stop exits with 0, like one that is done.
  printf '%s\n' "${stopped:-$code}" >run/exit.new
  mv run/exit.new run/exit
}

follow() {
  flock --shared run/lock true &
  tail -n "$1" --pid=$! -s 0.1 -f run/log
}

complain() {
  [[ "$(cat run/exit 2>/dev/null)" == 0 ]] || tail -n 5 run/log | sed "s/^/$HOSTNAME: /"
}

"$@"
