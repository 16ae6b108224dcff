#!/usr/bin/env bash
# Submits a run to a Ray cluster as a job. No secret passes through here: a job's command, metadata
# and runtime environment can be read by everybody who may look at the cluster.
set -euo pipefail

usage() {
    cat <<'TEXT'
Submit a run to a Ray cluster as a job, and follow its log.

  scripts/submit.sh [OPTIONS] run RECIPE --to DIR [KEY=VALUE...] [--profile]
  scripts/submit.sh [OPTIONS] resume DIR [--trials N]

DIR is the run directory, an absolute path on the head node: the job's working folder is a copy
that Ray deletes, so a relative path would be lost with it.

Options, before the verb:
  --working-dir DIR   what travels with the job: the recipe, its prompt files, your scorers
                      (default: the recipe's folder; a resumed run needs it again if it reads
                      such files). What .gitignore names stays here.
  --id NAME           the job's name (default: NAME OF DIR, date and time)
  --stop-wait N       seconds that a stopped job gets to end (default: 60)
  --no-wait           submit, and return
  -h, --help          this text

Environment:
  RAY_API_SERVER_ADDRESS, or RAY_ADDRESS   the cluster's job server
                      (default: http://127.0.0.1:8265, where `ray dashboard cluster.yaml` puts it)
  RAY_AUTH_TOKEN_PATH, or RAY_AUTH_TOKEN   the cluster's token (default: ~/.ray/auth_token)

Ctrl-C ends the following, not the job. To stop that, and go on later:
  ray job stop NAME
  scripts/submit.sh resume DIR

Hub tokens are not passed here; they are on the head node (docs/operations.md).
TEXT
}

fail() {
    printf 'submit.sh: %s\n' "$*" >&2
    exit 2
}

working_dir='' id='' no_wait='' stop_wait=60
while (($#)); do
    case $1 in
        --working-dir | --id | --stop-wait)
            (($# > 1)) || fail "$1 needs a value"
            case $1 in
                --working-dir) working_dir=$2 ;;
                --id) id=$2 ;;
                --stop-wait) stop_wait=$2 ;;
            esac
            shift 2
            ;;
        --no-wait) no_wait=yes && shift ;;
        -h | --help) usage && exit ;;
        run | resume) break ;;
        *) fail "$1 is not an option; see --help" ;;
    esac
done
(($# > 1)) || fail "what is to be done? See --help"
[[ $stop_wait =~ ^[0-9]+$ ]] || fail "--stop-wait $stop_wait is not a number of seconds"
for argument; do
    [[ ! $argument =~ hf_[A-Za-z0-9]{16} ]] ||
        fail "an argument looks like a Hub token, and would be shown to everybody; see --help"
done

verb=$1
shift
case $verb in
    run)
        recipe=$1
        shift
        [[ -f $recipe ]] || fail "there is no recipe $recipe"
        directory=''
        for ((i = 1; i <= $#; i++)); do
            case ${!i} in
                --to) next=$((i + 1)) && directory=${!next-} ;;
                --to=*) directory=${!i#--to=} ;;
            esac
        done
        [[ -n $directory ]] || fail "--to DIR is needed"
        recipe=$(realpath -- "$recipe")
        working_dir=$(realpath -- "${working_dir:-$(dirname -- "$recipe")}")
        [[ $recipe == "$working_dir"/* ]] || fail "$recipe is not in the working folder $working_dir"
        entry=(ray-abliterate run "${recipe#"$working_dir"/}" "$@")
        ;;
    resume)
        directory=$1
        recipe=''
        entry=(ray-abliterate resume "$@")
        ;;
esac
[[ $directory == /* ]] || fail "the run directory $directory is not an absolute path; see --help"

export RAY_AUTH_MODE=token
token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
[[ -n ${RAY_AUTH_TOKEN-} || -s $token_file ]] ||
    fail "no token in $token_file; copy the cluster's, or make one: ray get-auth-token --generate"
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-${RAY_ADDRESS:-http://127.0.0.1:8265}}

json() { # pairs of key and value
    python3 -c 'import json, sys; print(json.dumps(dict(zip(sys.argv[1::2], sys.argv[2::2]))))' "$@"
}

id=${id:-$(basename -- "$directory" | tr -c '[:alnum:]_.\n-' '-')-$(date +%Y%m%d-%H%M%S)}
exec ray job submit --submission-id "$id" ${no_wait:+--no-wait} \
    ${working_dir:+--working-dir "$working_dir"} \
    --runtime-env-json "{\"env_vars\": $(json RAY_JOB_STOP_WAIT_TIME_S "$stop_wait")}" \
    --metadata-json "$(json verb "$verb" recipe "${recipe##*/}" run_directory "$directory")" \
    -- "${entry[@]}"
