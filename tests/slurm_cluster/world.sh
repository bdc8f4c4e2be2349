#!/usr/bin/env bash
# world.sh STATE NODES   pid 1 of the test cluster: network, munge, the Slurm controller and the nodes.
#
# Started by tests/slurm_cluster/__init__.py in namespaces of its own.  Nodes are further namespaces inside,
# and none has a name: when this process dies, all of the cluster is gone.
# Takes orders through STATE/orders, `on|off N FILE`: boots node N or powers it off, then makes FILE.
set -euo pipefail
state=$1 nodes=$2
here=$(dirname "${BASH_SOURCE[0]}")

hostname control
mount --bind "$state/hosts" /etc/hosts
ip link set lo up
ip link add br0 type bridge
ip address add 10.213.0.254/24 dev br0
ip link set br0 up

munged --force --key-file="$state/munge.key" --socket="$state/munge.socket" --pid-file="$state/munged.pid" \
  --log-file="$state/log/munged" --seed-file="$state/munged.seed"
export SLURM_CONF=$state/slurm.conf
slurmctld -c -i

boot() { # N
  rm -f "$state/node$1.exists"
  unshare --net --uts --mount --pid --kill-child --mount-proc \
    bash "$here/node.sh" "$state" "node$1" "10.213.0.$1" &
  node[$1]=$!
  until [[ -e $state/node$1.exists ]]; do sleep 0.02; done
  ip link delete "v$1" 2>/dev/null || true # one whose node is just vanishing
  ip link add "v$1" type veth peer name eth0 netns "${node[$1]}"
  ip link set "v$1" master br0 up
}

for ((i = 1; i <= nodes; i++)); do boot "$i"; done

mkfifo "$state/orders"
exec 3<>"$state/orders"
touch "$state/started"
while read -r order n file <&3; do # bash reaps what dies meanwhile
  case $order in
    on) boot "$n" ;;
    off) # nothing gets to say goodbye
      kill -KILL "${node[$n]}"
      wait "${node[$n]}" 2>/dev/null || true
      ;;
  esac
  touch "$file"
done
