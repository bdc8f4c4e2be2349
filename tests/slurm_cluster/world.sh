#!/usr/bin/env bash
# world.sh STATE NODES   pid 1 of the test cluster: network, munge, the Slurm controller and the nodes.
#
# Started by tests/slurm_cluster/__init__.py in namespaces of its own.  Nodes are further namespaces inside,
# and none has a name: when this process dies, all of the cluster is gone.
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

for ((i = 1; i <= nodes; i++)); do
  unshare --net --uts --mount --pid --kill-child --mount-proc \
    bash "$here/node.sh" "$state" "node$i" "10.213.0.$i" &
  until [[ -e $state/node$i.exists ]]; do sleep 0.02; done
  ip link add "v$i" type veth peer name eth0 netns "$!"
  ip link set "v$i" master br0 up
done

touch "$state/started"
while :; do wait; sleep 1; done # reaps what dies
