#!/usr/bin/env bash
# Runs a training on the hosts of a Cloud TPU slice, with gcloud.
usage='scripts/tpu_pod.sh create|setup|run|status|stop|delete --name=NAME --zone=ZONE [OPTION...] [-- ARGUMENTS]

  create   creates the slice: --accelerator=v5litepod-16, --version=SOFTWARE, --spot, --queued
  setup    copies this folder to every host and installs the packages; --repository=URL clones a
           repository instead; --data=gs://FOLDER --data_to=data/NAME also copies prepared data
  run      starts python -m dualpath_jax.main ARGUMENTS on every host and returns; the hosts
           repeat it after status 75 and write its output to dualpath_jax/run.log
  status   prints the state of the slice and the end of run.log of each host
  stop     makes the run save and end
  delete   deletes the slice and its disks

  --project=PROJECT and --zone are those of gcloud. --python=python3.11 is the Python to install
  with. --queued is needed for every verb if the slice was created with it. --dry_run only prints
  the commands. The environment variables POD_NAME, POD_ZONE, POD_PROJECT, POD_ACCELERATOR and
  POD_QUEUED=1 replace the options.'
set -euo pipefail

name=${POD_NAME:-} zone=${POD_ZONE:-} project=${POD_PROJECT:-}
accelerator=${POD_ACCELERATOR:-} queued=${POD_QUEUED:-}
version='' spot='' repository='' data='' data_to='' python=python3.11 dry_run=''
root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

quoted() { # quotes the arguments for a shell
    local LC_ALL=C argument words=''
    for argument in "$@"; do
        case $argument in
        '' | *[!A-Za-z0-9_./:=,@%+-]*)
            argument="'$(printf '%s' "$argument" | sed "s/'/'\\\\''/g")'"
            ;;
        esac
        words+="${words:+ }$argument"
    done
    printf '%s' "$words"
}

step() { # prints a command, and runs it unless --dry_run
    printf '%s\n' "$(quoted "$@")"
    [ -n "$dry_run" ] || "$@"
}

place=() # zone and project of the slice, for gcloud
on_hosts() { step gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all "--command=$1"; }

check() {
    [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
        fail "--name=$name must be the slice's name: small letters, digits and -, a letter first"
    [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
        fail "--zone=$zone must be a zone such as us-west4-a; gcloud compute tpus locations list" \
            "shows those with TPUs"
    [[ $verb != create || $accelerator =~ ^(v2|v3|v4|v5litepod|v5p|v6e)-[1-9][0-9]*$ ]] ||
        fail "--accelerator=$accelerator must be a type and a number, such as v4-16," \
            "v5litepod-16, v5p-16 or v6e-16; gcloud compute tpus accelerator-types list" \
            "--zone=$zone lists those of the zone"
    [[ -z $data || $data == gs://?* ]] ||
        fail "--data=$data must be a folder in Cloud Storage, gs://BUCKET/FOLDER"
    [[ -n $data_to || -z $data ]] || fail "--data=$data needs --data_to=FOLDER on the hosts, such as data/k400"
    [[ -n $data || -z $data_to ]] || fail "--data_to=$data_to needs --data=gs://BUCKET/FOLDER"
    [[ $verb == run || $# -eq 0 ]] || fail "only run takes arguments behind --, $verb got: $*"
    [[ $verb != run || " $*" == *' --config='* ]] ||
        fail "run needs the arguments of dualpath_jax.main: -- --config=configs/ssv2_vitb.py" \
            "--workdir=gs://BUCKET/FOLDER ..., it got: ${*:-none}"
    [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
        fail "there is no gcloud: install the Google Cloud CLI, or see the commands with --dry_run"
}

create() {
    if [ -z "$version" ]; then
        case $accelerator in
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v6e-*) version=v2-alpha-tpuv6e ;;
        *) version=tpu-ubuntu2204-base ;;
        esac
    fi
    local what=("${place[@]}" "--accelerator-type=$accelerator" ${spot:+--spot})
    if [ -n "$queued" ]; then
        step gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${what[@]}" \
            "--runtime-version=$version"
    else
        step gcloud compute tpus tpu-vm create "$name" "${what[@]}" "--version=$version"
    fi
}

setup() {
    local archive="$root/runs/$name.tar.gz" files get
    if [ -n "$repository" ]; then
        get="if [ -d dualpath_jax/.git ]; then git -C dualpath_jax pull --ff-only; "
        get+="else git clone $(quoted "$repository") dualpath_jax; fi"
    else
        files="git -C $(quoted "$root") ls-files -z --cached --others --exclude-standard"
        step mkdir -p "$root/runs"
        step bash -o pipefail -c \
            "$files | tar -C $(quoted "$root") --null -T - -czf $(quoted "$archive")"
        step gcloud compute tpus tpu-vm scp "$archive" "$name:dualpath_jax.tar.gz" "${place[@]}" \
            --worker=all
        get="mkdir -p dualpath_jax && tar -C dualpath_jax -xzf dualpath_jax.tar.gz"
    fi
    on_hosts "$get"
    # A new host may still be installing its own updates.
    local apt='sudo apt-get -o DPkg::Lock::Timeout=600'
    on_hosts "$python -m ensurepip --version || { $apt update && $apt install -y $python $python-venv; }"
    # The extras tpu and gcs of pyproject.toml; requirements.txt decides the version of JAX.
    local extras="'jax[tpu]' 'array_record>=0.8.6' 'google-cloud-storage>=3.0'"
    on_hosts "cd dualpath_jax && $python -m venv .venv && .venv/bin/pip install -r requirements.txt $extras"
    [ -z "$data" ] ||
        on_hosts "cd dualpath_jax && mkdir -p $(quoted "$data_to") && gcloud storage rsync --recursive $(quoted "$data" "$data_to")"
}

run() {
    local command
    command="nohup setsid flock run.lock scripts/rerun.sh .venv/bin/python -m dualpath_jax.main $(quoted "$@")"
    # shellcheck disable=SC2016 # the host's name and process
    on_hosts 'cd dualpath_jax || exit; if ! flock -n run.lock true; then echo "a run is going on on $(hostname): stop it first" >&2; exit 1; fi; '"$command"' >> run.log 2>&1 < /dev/null & echo $! > run.pid'
}

status() {
    step gcloud compute tpus "$resource" describe "$name" "${place[@]}" '--format=value(state)'
    # shellcheck disable=SC2016
    on_hosts 'cd dualpath_jax || exit; if flock -n run.lock true; then echo "$(hostname): no run"; else echo "$(hostname): a run is going on"; fi; tail -n 3 run.log'
}

stop() {
    # shellcheck disable=SC2016
    on_hosts 'cd dualpath_jax && kill -TERM -- "-$(cat run.pid)"'
}

delete() {
    step gcloud compute tpus "$resource" delete "$name" "${place[@]}" ${queued:+--force}
}

verb=${1:-}
case $verb in
create | setup | run | status | stop | delete) shift ;;
-h | --help)
    printf '%s\n' "$usage"
    exit
    ;;
*) fail "unknown verb '$verb': it is one of create, setup, run, status, stop, delete (--help)" ;;
esac
while [ $# -gt 0 ]; do
    case $1 in
    --name=* | --zone=* | --project=* | --accelerator=* | --version=* | --repository=* | --data=* | --data_to=* | --python=*)
        key=${1%%=*}
        printf -v "${key#--}" '%s' "${1#*=}"
        ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --dry_run) dry_run=1 ;;
    --)
        shift
        break
        ;;
    *) fail "unknown option '$1' of $verb (--help lists them; arguments of dualpath_jax.main follow --)" ;;
    esac
    shift
done
check "$@"
place=("--zone=$zone" ${project:+"--project=$project"})
if [ -n "$queued" ]; then resource='queued-resources'; else resource='tpu-vm'; fi
"$verb" "$@"
