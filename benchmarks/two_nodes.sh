#!/bin/bash
# Runs `ep-backend ...` under torchrun on two nodes that are made up of one machine: network namespaces joined by
# a link with a limited rate, RANKS ranks in each. Needs to be root, with iproute2.
#
# usage: two_nodes.sh RATE RANKS ...      RATE as tc has it (1gbit), or none

set -euo pipefail
rate=$1 ranks=$2
shift 2
nodes=("ep-$$-0" "ep-$$-1")

clean_up() {
  local running
  mapfile -t running < <(jobs -p)
  [[ ${#running[@]} == 0 ]] || kill "${running[@]}" 2>/dev/null || true
  wait
  for node in "${nodes[@]}"; do ip netns delete "$node" 2>/dev/null || true; done
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for node in "${nodes[@]}"; do ip netns add "$node"; done
ip link add ep0 netns "${nodes[0]}" type veth peer name ep0 netns "${nodes[1]}"
for number in 0 1; do
  ip -n "${nodes[$number]}" addr add "10.99.0.$((number + 1))/24" dev ep0
  ip -n "${nodes[$number]}" link set lo up
  ip -n "${nodes[$number]}" link set ep0 up
  [[ $rate == none ]] || tc -n "${nodes[$number]}" qdisc add dev ep0 root tbf rate "$rate" burst 128kb latency 50ms
done

# Instead of the shell that it is called in, so that this can be stopped.
run() {
  exec env GLOO_SOCKET_IFNAME=ep0 OMP_NUM_THREADS=1 ip netns exec "${nodes[$1]}" torchrun --nnodes 2 --nproc-per-node "$ranks" \
    --node-rank "$1" --master-addr 10.99.0.1 --master-port 29500 -m ep_backend.cli "${@:2}"
}
(run 1 "$@") &
other=$!
(run 0 "$@") &
wait $! # not in the foreground: a trap would wait for its end
wait $other
