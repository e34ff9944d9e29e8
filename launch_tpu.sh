#!/usr/bin/env bash
# Runs one loop on every worker of a Cloud TPU, from creating the TPU to deleting it.
#
#   ./launch_tpu.sh --name=NAME --zone=ZONE --accelerator_type=TYPE [option …] \
#       --config=configs/NAME.py --workdir=gs://BUCKET/DIR [--config.KEY=VALUE …]
#
# Creates the TPU unless there is one of that name, waits for it, copies the checkout, installs what
# the requirements ask for, runs `python -m experiments.run --distributed` with the same arguments on
# all workers, shows worker 0's log, and deletes what it created. A run that is preempted or fails
# starts again and goes on where it was; one that exits with 2 (a mistake in its arguments) does not.
#
#   --name=NAME              of the TPU, or of the queued resource; slice K of several is NAME-K
#   --zone=ZONE              such as us-west4-a;  --project=PROJECT  else gcloud's own
#   --accelerator_type=TYPE  such as v5litepod-16, v5p-32, v6e-8
#   --runtime_version=V      of the machines' software; by default the one for that type
#   --spot                   cheaper, and may be preempted at any time
#   --queued                 wait in the queue for it, instead of failing where there is none
#   --num_slices=N           slices that work as one; more than 1 are always queued
#   --network=N, --subnetwork=N
#   --create_flag=FLAG       further flag of `gcloud … create`, such as --reserved; may be repeated
#   --ssh_flag=FLAG          the same for ssh and scp, such as --internal-ip
#   --env=NAME               hand on this variable of your environment; may be repeated. Its value
#                            travels in a file of mode 600, which the run removes once it is read
#   --requirements=FILE      of the checkout; default requirements.txt
#   --max_restarts=N         of a run that fails; default 3. Preemptions do not count
#   --backoff=SECONDS        before a restart, doubled each time; default 60, in which the claim of
#                            a lost run on its workdir lapses
#   --poll=SECONDS           between looks at the TPU's state; default 30
#   --fetch=DIR              copy WORKDIR/runs (with --run_name that run) to DIR at the end
#   --replace                stop another run that is found on the TPU
#   --keep                   leave the TPU at the end
#   --delete                 delete it at the end, and when preempted, even if it was there before
#   --delete_on_interrupt    delete also on Ctrl-C; else TPU and run go on, and the same command
#                            watches them again
#   --dry_run                print every command and run none
#
# What starts with --config, --workdir or --run_name goes to experiments.run, and all that follows
# `--`. Copied are the tracked files as they stand, changes that are not committed included. SSH
# keys must be without passphrase or in an agent. Exit codes: 0 done, 2 a mistake, 1 anything else.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec 3>&1 # where a dry run prints

name='' zone='' project='' accelerator_type='' runtime_version='' network='' subnetwork='' fetch=''
num_slices=1 max_restarts=3 backoff=60 poll=30 requirements=requirements.txt
spot='' queued='' replace='' keep='' delete='' delete_on_interrupt='' dry_run=''
create_flags=() ssh_flags=() env_names=() arguments=() # read as ${x[@]+…}: bash 3.2 minds empty ones
config='' workdir='' run_name='' # as experiments.run will read them from its arguments
scratch='' id=''                 # a folder here; the job, named by its tree and arguments
creating='' owned='' had=''      # being created; ours to delete; was ready once
started='' child='' interrupted=''
state='' phase='' # the TPU's, as `look` found it

say() { printf 'launch: %s\n' "$*" >&2; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
mistake() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# -- the command line --------------------------------------------------------------------------

parse() {
  local flag='' # of experiments.run, whose value is the next argument
  while (($#)); do
    case $1 in
      -h | --help)
        sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
      --name=* | --zone=* | --project=* | --accelerator_type=* | --runtime_version=* | \
        --num_slices=* | --network=* | --subnetwork=* | --requirements=* | --max_restarts=* | \
        --backoff=* | --poll=* | --fetch=*)
        flag=${1%%=*}
        printf -v "${flag#--}" %s "${1#*=}"
        flag=''
        ;;
      --spot | --queued | --replace | --keep | --delete | --delete_on_interrupt | --dry_run)
        printf -v "${1#--}" yes
        ;;
      --create_flag=*) create_flags+=("${1#*=}") ;;
      --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
      --env=*) env_names+=("${1#*=}") ;;
      --config* | --workdir* | --run_name*)
        arguments+=("$1")
        if [[ $1 == *=* ]]; then flag=''; else flag=$1; fi
        ;;
      --)
        shift
        arguments+=("$@")
        break
        ;;
      -*) mistake "no option '$1' with or without such a value: see --help; further options of" \
        "experiments.run go after --" ;;
      *)
        [[ $flag ]] || mistake "unexpected argument '$1': write --option=VALUE, and see --help"
        arguments+=("$1")
        flag=''
        ;;
    esac
    shift
  done
  flag=''
  local argument
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case $flag$argument in
      --config=*) config=${argument#--config=} ;;
      --workdir=*) workdir=${argument#--workdir=} ;;
      --run_name=*) run_name=${argument#--run_name=} ;;
    esac
    case $argument in
      --config | --workdir | --run_name) flag=$argument= ;;
      *) flag='' ;;
    esac
  done
}

whole_number() { # name, least
  if ! [[ ${!1} =~ ^[0-9]{1,6}$ ]] || ((10#${!1} < $2)); then
    mistake "--$1 must be a whole number of $2 or more, got '${!1}'"
  fi
  printf -v "$1" %d "$((10#${!1}))"
}

check() {
  [[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
    mistake "--name=NAME must be lower-case letters, digits and dashes, got '$name'"
  [[ $zone ]] || mistake "--zone=ZONE is missing, such as --zone=us-west4-a"
  [[ $accelerator_type ]] || mistake "--accelerator_type=TYPE is missing, such as v5litepod-16"
  whole_number num_slices 1
  whole_number max_restarts 0
  whole_number backoff 0
  whole_number poll 0
  ((num_slices == 1)) || queued=yes # only queued resources give slices that know of each other
  [[ ! $keep || ! $delete ]] || mistake "--keep and --delete exclude each other"
  if [[ ! $runtime_version ]]; then
    case $accelerator_type in # https://cloud.google.com/tpu/docs/runtimes
      v6e-*) runtime_version=v2-alpha-tpuv6e ;;
      v5p-*) runtime_version=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime_version=v2-alpha-tpuv5-lite ;;
      v[234]-*) runtime_version=tpu-ubuntu2204-base ;;
      *) mistake "no runtime version is known for '$accelerator_type': give --runtime_version=V" ;;
    esac
  fi
  [[ $config ]] || mistake "--config=configs/NAME.py is missing"
  [[ $workdir == gs://?* ]] || mistake "--workdir must be gs://BUCKET/DIR, got '$workdir': the" \
    "workers share it, and a run whose machines were taken away resumes from it"
  local one
  for one in ${env_names[@]+"${env_names[@]}"}; do
    [[ $one =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || mistake "--env takes a name: --env=NAME, no value"
    [[ ${!one+set} ]] || mistake "--env=$one: there is no such variable in your environment"
  done
  [[ ! -e $fetch || -d $fetch ]] || mistake "--fetch: '$fetch' is no folder"
  [[ $dry_run ]] || command -v gcloud >/dev/null || mistake "gcloud is not installed"
}

# -- commands: one place that prints or runs them ----------------------------------------------

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@" | sed 's/ $//' >&3
    printf '\n' >&3
  else
    "$@"
  fi
}

# Like run, but Ctrl-C and SIGTERM end it at once, with all that it started.
run_watched() {
  local code=0
  if [[ $dry_run ]]; then
    run "$@"
    return
  fi
  set -m # a process group of its own
  "$@" </dev/null &
  child=$!
  set +m
  wait "$child" || code=$?
  child=''
  return "$code"
}

pause() { [[ $dry_run ]] || run_watched sleep "$1"; }

tpu() { # run or run_watched, tpu-vm or queued-resources, verb, name, flags
  local how=$1
  shift
  "$how" gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"} --quiet
}

kind() { if [[ $queued ]]; then echo queued-resources; else echo tpu-vm; fi; }

on_workers() { # run or run_watched, 0 or all, command
  tpu "$1" "$(kind)" ssh "$name" ${queued:+"--node=$2"} "--worker=$2" \
    ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$3"
}

# -- the TPU -----------------------------------------------------------------------------------

query() { # kind, name, key
  local error=$scratch/error
  if tpu run "$1" describe "$2" "--format=value($3)" 2>"$error"; then
    if [[ $dry_run && ! $had ]]; then echo NONE; elif [[ $dry_run ]]; then echo READY; fi
  elif grep -q NOT_FOUND "$error"; then
    echo NONE
  else
    cat "$error" >&2
    echo UNREACHABLE
  fi
}

# Sets state, and phase to none, pending, ready, lost or unreachable.
look() {
  local slice node
  if [[ ! $queued ]]; then
    state=$(query tpu-vm "$name" state)
  else
    state=$(query queued-resources "$name" state.state)
    for ((slice = 0; slice < num_slices; slice++)); do
      [[ $state == ACTIVE ]] || break
      node=$name
      ((num_slices == 1)) || node=$name-$slice
      node=$(query tpu-vm "$node" state)
      [[ $node == READY ]] || state=${node/NONE/REPLACING}
    done
  fi
  case $state in
    NONE) phase=none ;;
    READY | ACTIVE) phase=ready ;;
    PREEMPTED | TERMINATED | STOPPED | HIDDEN | UNKNOWN | SUSPENDED | FAILED) phase=lost ;;
    UNREACHABLE) phase=unreachable ;;
    *) phase=pending ;;
  esac
}

create() {
  local flags=("--accelerator-type=$accelerator_type" ${spot:+--spot} ${network:+"--network=$network"}
    ${subnetwork:+"--subnetwork=$subnetwork"} ${create_flags[@]+"${create_flags[@]}"})
  if [[ ! $queued ]]; then
    tpu run_watched tpu-vm create "$name" "--version=$runtime_version" "${flags[@]}"
  elif ((num_slices == 1)); then
    tpu run_watched queued-resources create "$name" "--node-id=$name" \
      "--runtime-version=$runtime_version" "${flags[@]}"
  else
    tpu run_watched queued-resources create "$name" "--node-count=$num_slices" \
      "--node-prefix=$name" "--runtime-version=$runtime_version" "${flags[@]}"
  fi
}

remove() { tpu "$1" "$(kind)" delete "$name" ${queued:+--force}; }

# Returns when the TPU is ready; creates what is missing, and anew what was taken away.
obtain() {
  local tries=0 last=''
  while true; do
    look
    [[ $state == "$last" ]] || say "$name: $state"
    last=$state
    case $phase in
      ready)
        had=yes
        return
        ;;
      pending) pause "$poll" ;;
      unreachable)
        [[ $had || $owned ]] || fail "gcloud cannot say whether there is a '$name'"
        pause "$poll"
        ;;
      lost)
        [[ $owned || $delete ]] || fail "'$name' is $state and was not created by this command:" \
          "delete it, or give --delete"
        [[ $had || $state != FAILED || ! $owned ]] || fail "'$name' cannot be had: see above, and" \
          "gcloud compute tpus $(kind) describe $name --zone=$zone"
        owned=yes
        remove run_watched || pause "$poll" # and look again: it may have gone by itself
        ;;
      none)
        creating=yes
        if create; then
          owned=yes
          [[ ! $dry_run ]] || had=yes
        else
          [[ $had ]] || fail "'$name' could not be created; with --queued it waits until it can"
          tries=$((tries < 5 ? tries + 1 : 5))
          say "no '$name' for now, trying again"
          pause $((backoff << (tries - 1)))
        fi
        creating=''
        ;;
    esac
  done
}

# -- the run -----------------------------------------------------------------------------------

# Fills the scratch folder with what goes to the workers, and names the job.
pack() {
  local git=(git -C "$here") commit tree untracked file
  [[ -z $("${git[@]}" rev-parse --show-prefix 2>&1) ]] ||
    mistake "'$here' is no git checkout, so that it is not known which files to copy"
  # A commit of the tracked files as they are, which no branch or stash shows. It is refused where
  # the index knows of older times than the files have, though they are the same.
  "${git[@]}" update-index -q --refresh >/dev/null || true
  commit=$("${git[@]}" -c user.name=launch -c user.email=launch@localhost stash create) ||
    mistake "git cannot tell what the files of '$here' are: see git status"
  tree=$("${git[@]}" rev-parse "${commit:-HEAD}^{tree}")
  [[ ! $commit ]] || say "changes that are not committed go along"
  untracked=$("${git[@]}" ls-files --others --exclude-standard | sed -n '1,5p' | tr '\n' ' ')
  [[ ! $untracked ]] || say "not copied, as git does not track them: $untracked"
  for file in "${config%%:*}" "$requirements"; do
    "${git[@]}" cat-file -e "$tree:${file#./}" 2>/dev/null ||
      mistake "'$file' will not be on the workers: name a file of the checkout that git tracks"
  done
  run "${git[@]}" archive --format=tar "--output=$scratch/tree.tar" "$tree"
  {
    printf 'requirements=%q\narguments=(' "$requirements"
    printf ' %q' "${arguments[@]}"
    printf ' )\n'
  } >"$scratch/job.sh"
  id=$(printf '%s\n' "$tree" ${env_names[@]+"${env_names[@]}"} | cat - "$scratch/job.sh" |
    git hash-object --stdin)
  printf 'id=%s\n' "$id" >>"$scratch/job.sh"
  [[ ! $dry_run ]] || sed 's/^/# job.sh: /' "$scratch/job.sh"
  local one
  for one in ${env_names[@]+"${env_names[@]}"}; do
    if [[ $dry_run ]]; then printf '# environment: %s\n' "$one"; else
      (umask 077 && printf 'export %s=%q\n' "$one" "${!one}" >>"$scratch/environment")
    fi
  done
}

copy_and_start() {
  local files=("$scratch/tree.tar" "$scratch/job.sh" "$here/experiments/tpu_worker.sh")
  ((${#env_names[@]} == 0)) || files+=("$scratch/environment")
  tpu run_watched "$(kind)" scp "${files[@]}" "$name:.karploop/" ${queued:+--node=all} \
    --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"} &&
    on_workers run_watched all "bash .karploop/tpu_worker.sh install" &&
    on_workers run_watched all "bash .karploop/tpu_worker.sh start $$-$RANDOM"
}

# Prints "ID STATE" of the workers, each pair once; at most SECONDS after a run's end is awaited.
worker_states() { # seconds
  local report
  report=$(on_workers run all "if [ -f .karploop/tpu_worker.sh ]; then \
bash .karploop/tpu_worker.sh status $1; else mkdir -p -m 700 .karploop && \
echo karploop-worker - none; fi") || return
  printf '%s\n' "$report" | awk '$1 == "karploop-worker" {print $2, $3}' | sort -u
}

# Of a run that ended: 0 done, 1 failed, 2 a mistake, 4 the machines have forgotten it.
verdict() { # states
  case " $(awk '{printf "%s ", $2}' <<<"$1")" in
    *' none '* | *' lost '* | ' ') return 4 ;;
    *' 2 '*) return 2 ;;
    ' 0 ') return 0 ;;
    *) return 1 ;;
  esac
}

# Starts the run, or finds it, and watches it: as above, or 3, the connection broke while watching;
# 5, there was none, or the start failed.
attempt() {
  local states lines=20
  states=$(worker_states 0) || return 5
  if [[ $states != "$id running" ]]; then
    if [[ $started && $states != *running* ]]; then # it ended while nobody watched
      verdict "$states"
      return
    fi
    if grep running <<<"$states" | grep -qv "^$id " && [[ ! $replace ]]; then
      mistake "'$name' runs something else: wait for it, or stop it with --replace"
    fi
    copy_and_start || return 5
    lines=+1
  fi
  started=yes
  [[ ! $delete ]] || owned=yes
  on_workers run_watched 0 "bash .karploop/tpu_worker.sh follow $lines" || return 3
  states=$(worker_states 60) || return 3
  [[ $dry_run ]] || verdict "$states"
}

fetch_results() {
  [[ $fetch ]] || return 0
  run mkdir -p "$fetch${run_name:+/$run_name}"
  run_watched gcloud storage rsync --recursive "${workdir%/}/runs${run_name:+/$run_name}" \
    "$fetch${run_name:+/$run_name}" ${project:+"--project=$project"}
}

launch() {
  local outcome failures=0 since wait
  while true; do
    obtain
    since=$SECONDS outcome=0
    attempt || outcome=$?
    ((outcome)) || break
    look
    while [[ $phase == unreachable ]]; do # the network here: nothing is known of the run
      pause "$poll"
      look
    done
    wait=$backoff
    if [[ $phase != ready ]]; then
      say "$name is $state; the run goes on when it is back"
      failures=0 started=''
    elif ((outcome == 3 && SECONDS - since >= 60)); then
      say "the connection broke; watching again"
      wait=$poll
    elif ((outcome == 4)); then
      say "the machines were restarted, and so is the run"
    else
      ((outcome > 2)) || on_workers run_watched all "bash .karploop/tpu_worker.sh complain" || true
      failures=$((failures + 1))
      if ((outcome == 2 || failures > max_restarts)); then
        fetch_results || say "the results stay in $workdir"
        ((outcome != 2)) || mistake "the run refuses its arguments, see above"
        fail "the run failed $failures times, see above; what it computed is in $workdir"
      fi
      wait=$((backoff << (failures < 5 ? failures - 1 : 4)))
      say "the run failed or could not be started; restart $failures of $max_restarts in $wait s"
    fi
    ((outcome == 3 || outcome == 5)) || started=''
    pause "$wait"
  done
  say "done; results in ${workdir%/}/runs"
  fetch_results || fail "the results could not be copied from $workdir"
}

# -- the end -----------------------------------------------------------------------------------

interrupt() { # exit code
  trap '' INT TERM HUP
  interrupted=yes
  [[ ! $child ]] || kill -TERM -- "-$child" 2>/dev/null || true
  exit "$1"
}

finish() {
  local code=$?
  trap '' INT TERM HUP
  rm -rf "$scratch"
  if [[ $interrupted && ($owned || $creating || $started) && ! $delete_on_interrupt ]]; then
    say "'$name' is left as it is, with the run on it, and costs what it costs. The same command" \
      "watches it again; with --delete it then deletes it at the end. To delete it now:" \
      "gcloud compute tpus $(kind) delete $name ${queued:+--force }--zone=$zone"
  elif [[ ($owned || ($interrupted && $creating)) && ! $keep ]]; then
    remove run || say "'$name' could not be deleted: look after it, it costs money"
  fi
  exit "$code"
}

main() {
  parse "$@"
  check
  scratch=$(mktemp -d)
  trap finish EXIT
  trap 'interrupt 130' INT
  trap 'interrupt 143' TERM
  trap 'interrupt 129' HUP
  pack
  launch
}

main "$@"
