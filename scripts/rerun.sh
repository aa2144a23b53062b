#!/usr/bin/env bash
# Repeats a command as long as it ends with status 75, which means: stopped by a signal, and saved.
#   scripts/rerun.sh python -m dualpath_jax.main --config=configs/ssv2_vitb.py
# Ends with the command's status. After a SIGTERM it waits for the command and does not repeat it.
set -u
case ${1:---help} in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    echo "The environment variable RERUN_SECONDS sets the seconds before a repetition (10)."
    [ $# -gt 0 ]
    exit
    ;;
esac
stop_requested=
trap 'stop_requested=1' TERM
case " $* " in
*" --start_over "*)
    echo "error: --start_over would begin at step 0 at every repetition; give it once, without $0" >&2
    exit 2
    ;;
esac
while
    "$@"
    status=$?
    [ "$status" -eq 75 ] && [ -z "$stop_requested" ]
do
    echo "ended with status 75; again in ${RERUN_SECONDS:=10} s"
    sleep "$RERUN_SECONDS"
    [ -z "$stop_requested" ] || break
done
echo "ended with status $status"
exit "$status"
