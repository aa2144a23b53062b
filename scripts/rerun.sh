#!/usr/bin/env bash
# Runs a command again as long as it ends with status 75: told to stop, saved where it is.
#   scripts/rerun.sh python -m dualpath_jax.main --config=configs/ssv2_vitb.py
# Ends with the command's status; also after a SIGTERM of its own, when the command has ended.
set -u
case ${1:---help} in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    echo "RERUN_SECONDS in the environment: how long to wait before it is started again (10)."
    [ $# -gt 0 ]
    exit
    ;;
esac
told=
trap 'told=1' TERM
while
    "$@"
    status=$?
    [ "$status" -eq 75 ] && [ -z "$told" ]
do
    echo "ended with status 75; again in ${RERUN_SECONDS:=10} s"
    sleep "$RERUN_SECONDS"
    [ -z "$told" ] || break
done
echo "ended with status $status"
exit "$status"
