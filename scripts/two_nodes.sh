#!/bin/bash
# Run a program on two ranks that see each other only through an emulated network: two network namespaces, a virtual
# cable with a rate and, where the kernel has netem, a delay. Needs root, iproute2, and the MPICH of the `mpich` extra.
#
# Usage: scripts/two_nodes.sh RATE DELAY PROGRAM…      e.g. scripts/two_nodes.sh 1gbit 50us python scripts/scaling.py measure two.json
set -euo pipefail
if [ $# -lt 3 ]; then sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
if [ "$(id -u)" != 0 ] || ! command -v ip tc >/dev/null; then
  echo "two_nodes.sh: needs root, ip and tc (iproute2)" >&2; exit 2
fi
rate=$1 delay=$2; shift 2
name=qn$$
launcher=$(mktemp)

clean_up() {
  rm -f "$launcher"
  for k in 1 2; do ip netns del "$name-$k" 2>/dev/null || true; done
}
trap clean_up EXIT

for k in 1 2; do ip netns add "$name-$k"; ip -n "$name-$k" link set lo up; done
ip link add "$name.1" netns "$name-1" type veth peer name "$name.2" netns "$name-2"
for k in 1 2; do
  ip -n "$name-$k" addr add "10.77.0.$k/24" dev "$name.$k"
  ip -n "$name-$k" link set "$name.$k" up
  if ! ip netns exec "$name-$k" tc qdisc add dev "$name.$k" root netem delay "$delay" rate "$rate" limit 100000 2>/dev/null; then
    [ "$k" = 2 ] || echo "two_nodes.sh: this kernel has no netem: the rate is emulated, the delay is not" >&2
    ip netns exec "$name-$k" tc qdisc add dev "$name.$k" root tbf rate "$rate" burst 256kb latency 100ms
  fi
done

# The kernel tells of a carrier a moment later, and UCX takes no device without.
for k in 1 2; do
  for _ in $(seq 50); do
    if ip -n "$name-$k" link show "$name.$k" | grep -q "state UP"; then break; fi
    sleep 0.1
  done
done

# What mpiexec calls in place of ssh: [options] HOST COMMAND…
cat >"$launcher" <<END
#!/bin/sh
while [ "\${1#-}" != "\$1" ]; do shift; done
host=\$1; shift
exec ip netns exec "$name-\${host##*.}" /bin/sh -c "\$*"
END
chmod +x "$launcher"
# By TCP only: both namespaces are on one machine, and shared memory would pass the cable by.
ip netns exec "$name-1" env UCX_LOG_LEVEL=error UCX_TLS=tcp UCX_NET_DEVICES="$name.1,$name.2" MPIR_CVAR_NOLOCAL=1 "${MPIEXEC:-mpiexec}" \
  -launcher rsh -launcher-exec "$launcher" -localhost 10.77.0.1 -hosts 10.77.0.1,10.77.0.2 -n 2 "$@"
