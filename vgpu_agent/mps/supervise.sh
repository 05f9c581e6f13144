#!/bin/sh
# The MPS daemons of a node, each kept running by a loop of its own. `vgpu-agent mps daemon` becomes
# this: no Python of ours is the parent of a daemon.
#
#     supervise.sh PYTHON DIRECTORY OPTIONS [NAME GPUS]...
#
# OPTIONS are the daemons' own, or empty. This is the leader of a process group, in which daemons are
# not, and descriptor 9 is a lock that is held until all loops have ended. No process is ended by its
# PID here: serve.py knows better which is which. A loop that somebody ends is begun again, which ends its
# daemon, as nobody would start that again.
set -u
python=$1 directory=$2 options=$3
shift 3

serve() {
  exec "$python" -m vgpu_agent.mps.serve "$@" 9>&-
}

# In whole seconds; a clock that is set does not matter.
uptime() {
  read -r seconds _ </proc/uptime
  echo "${seconds%%.*}"
}

# One daemon, until SIGTERM.
keep() {
  name=$1 gpus=$2 pause=1 fresh=''
  trap 'trap "" TERM; (serve end "$directory" "$name"); exit' TERM
  while :; do
    begun=$(uptime)
    # shellcheck disable=SC2086 # words, or nothing
    serve start "$directory" "$name" "$gpus" $options $fresh &
    wait "$!"
    code=$? lived=$(($(uptime) - begun))
    # What makes a daemon end at once may be in its pipe directory.
    if [ "$lived" -lt 10 ]; then fresh=--fresh; else fresh=''; fi
    if [ "$lived" -ge 60 ]; then pause=1; fi
    echo "MPS daemon $name ended after $lived s with exit code $code: started again in $pause s" >&2
    sleep "$pause" 9>&-
    pause=$((pause * 2))
    if [ "$pause" -gt 30 ]; then pause=30; fi
  done
}

# The loop of one daemon, until SIGTERM.
guard() {
  trap 'trap "" TERM; wait; exit' TERM
  while :; do
    keep "$@" &
    wait "$!"
    echo "the loop of MPS daemon $1 was ended: begun again in 1 s" >&2
    sleep 1 9>&-
  done
}

trap 'trap "" TERM; kill -TERM 0; wait; exit 0' TERM INT
while [ "$#" -ge 2 ]; do
  guard "$1" "$2" &
  shift 2
done
wait
echo "the loops of all MPS daemons were killed" >&2
exit 1
