#!/usr/bin/env bash
# Start a node on each host of a list by ssh, and show what they say. Ctrl-C: running jobs end, then all nodes leave.
#
#     MINIPOOL_SECRET=mp1_... ./ssh.sh 192.0.2.10:8899 hosts.txt        # a host a line; ~/minipool is on each of them
#
# The secret goes through ssh's input, so that no list of processes shows it. What follows it says that this script
# lives: at the end of that input, also of a line that was cut, the node drains and leaves.
set -euo pipefail
address=$1 hosts=$2 alive=$(mktemp)
node="read -r MINIPOOL_SECRET && export MINIPOOL_SECRET && cd minipool && exec 3<&0 || exit
      (cat <&3; kill -TERM \$\$) >/dev/null 2>&1 &
      exec '${PYTHON:-python3}' minipool_worker.py connect '$address' 3<&-"
while read -r host; do
    # shellcheck disable=SC2029  # the command is made here
    { echo "$MINIPOOL_SECRET"
      while sleep 1 >/dev/null && kill -0 $$ 2>/dev/null && [[ -e $alive ]]; do echo; done; } |
        ssh "$host" "$node" &
done <"$hosts"
trap 'rm -f "$alive"' INT TERM EXIT
until wait; do :; done          # a signal interrupts it
