#!/usr/bin/env bash
# Runs a training script as a Ray job until it succeeds. `ray job submit` runs it once.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: submit.sh --name NAME --storage URI [options] -- SCRIPT [ARGUMENT...]

Submits `python SCRIPT ARGUMENT... --storage URI --name NAME` to a Ray cluster and follows its log.
If the job fails, it is submitted again with the same name and storage, so that the run goes on
from its last checkpoint. The jobs are called NAME-1, NAME-2, ...

  --name NAME         the run: letters, digits, '_' and '-'
  --storage URI       where it saves, reached by all nodes: s3://..., gs://..., a shared directory
  --address URL       the cluster's job server (default: $RAY_API_SERVER_ADDRESS, else
                      http://127.0.0.1:8265)
  --working-dir DIR   sent to the cluster with the job; SCRIPT is then relative to it
  --failures N        give up at the Nth failure (default: 5)
  --pause SECONDS     between a failure and the next attempt (default: 30)
  --help              this text

A job of this run that is still going is followed and no second one is started: two drivers would
write to one run. So after a lost connection or a closed terminal the same command takes up again.
Ctrl-C and SIGTERM stop the job; what was done since its last checkpoint is lost. A job that
somebody else stops is not started again.

Exit status: 0 the job succeeded; 1 it failed too often, or was stopped; 2 wrong arguments;
130 Ctrl-C; 143 SIGTERM.
EOF
}

say() { printf 'submit.sh: %s\n' "$*" >&2; }

refuse() {
    say "$*"
    say "see submit.sh --help"
    exit 2
}

name='' storage='' working_dir='' failures=5 pause=30
address=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}
while (($#)); do
    case $1 in
        --help) usage; exit 0 ;;
        --) shift; break ;;
        --name | --storage | --address | --working-dir | --failures | --pause)
            (($# > 1)) || refuse "$1 needs a value"
            case $1 in
                --name) name=$2 ;;
                --storage) storage=$2 ;;
                --address) address=$2 ;;
                --working-dir) working_dir=$2 ;;
                --failures) failures=$2 ;;
                --pause) pause=$2 ;;
            esac
            shift 2 ;;
        *) refuse "what is '$1'? The script and its arguments come after --" ;;
    esac
done
[[ $name =~ ^[A-Za-z0-9_-]+$ ]] || refuse "--name must be of letters, digits, '_' and '-': '$name'"
[[ -n $storage ]] || refuse "--storage is missing: without it nothing survives"
[[ $failures =~ ^[1-9][0-9]*$ ]] || refuse "--failures must be a number from 1 on: '$failures'"
[[ $pause =~ ^[0-9]+$ ]] || refuse "--pause must be a number of seconds: '$pause'"
(($# > 0)) || refuse "no script: -- SCRIPT [ARGUMENT...]"
command -v ray >/dev/null || refuse "no 'ray' on PATH: pip install 'ray[default]'"
entrypoint=(python "$@" --storage "$storage" --name "$name")

# Waited for in the background: a trap runs at once then, not when the command is over.
child=''
run() {
    "$@" &
    child=$!
    local status=0
    wait "$child" || status=$?
    child=''
    return "$status"
}

job=''
interrupted() {
    trap '' INT TERM
    [[ -z $child ]] || kill "$child" 2>/dev/null || true
    if [[ -n $job ]]; then
        say "stopping $job"
        ray job stop --address "$address" "$job" || say "could not stop $job: it may still run"
    fi
    exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

# absent, going, succeeded, failed, stopped; or unknown: the job server does not answer.
state_of() {
    local answer
    answer=$(ray job status --address "$address" "$1" 2>&1) || true
    case $answer in
        *"Job '$1' failed"*) echo failed ;;
        *"Job '$1' succeeded"*) echo succeeded ;;
        *"Job '$1' was stopped"*) echo stopped ;;
        *"Status for job '$1': "*) echo going ;;
        *"$1 does not exist"*) echo absent ;;
        *) echo unknown ;;
    esac
}

submit() {
    run ray job submit --address "$address" --submission-id "$1" \
        ${working_dir:+--working-dir "$working_dir"} -- "${entrypoint[@]}"
}

failed=0
count_failure() {
    failed=$((failed + 1))
    say "$1 (failure $failed of $failures)"
    ((failed < failures)) || exit 1
    run sleep "$pause"
}

number=1
while true; do
    id=$name-$number
    state=$(state_of "$id")
    case $state in
        absent)
            say "submitting $id"
            job=$id
            submit "$id" || true
            [[ $(state_of "$id") != absent ]] || count_failure "$id was not accepted"
            ;;
        going)
            [[ $job == "$id" ]] || say "$id is going already: following it"
            job=$id
            run ray job logs --address "$address" --follow "$id" || true
            [[ $(state_of "$id") != going ]] || count_failure "lost the log of $id"
            ;;
        unknown)
            count_failure "the job server at $address does not answer"
            ;;
        *)
            # A job that was over before this script began is history.
            if [[ $job == "$id" ]]; then
                case $state in
                    succeeded) say "$id succeeded"; exit 0 ;;
                    stopped) say "$id was stopped: not started again"; exit 1 ;;
                    failed) count_failure "$id failed" ;;
                esac
            fi
            number=$((number + 1))
            ;;
    esac
done
