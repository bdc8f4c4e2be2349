#!/usr/bin/env bash
# node.sh STATE NAME ADDRESS   pid 1 of one node: its own host name, address, processes and shared memory.
set -euo pipefail
state=$1 name=$2 address=$3

hostname "$name"
mount -t tmpfs -o size=25% tmpfs /dev/shm
touch "$state/$name.exists" # only now can world.sh plug in its cable
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip address add "$address/24" dev eth0
ip link set eth0 up
export SLURM_CONF=$state/slurm.conf
mkdir -p "$state/spool.$name"
slurmd -N "$name"
while :; do sleep 600 & wait; done # reaps orphans
