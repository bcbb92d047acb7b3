#!/usr/bin/env bash
# A SLURM cluster of two virtual nodes on this machine, for tests: root, no systemd.
# Usage: cluster.sh start DIR | stop DIR        then: export SLURM_CONF=DIR/slurm.conf
set -euo pipefail
action=${1:?start or stop} dir=${2:?a folder}
host=$(hostname -s)

if [ "$action" = stop ]; then
  for file in slurmd-n1.pid slurmd-n2.pid slurmctld.pid munge/pid; do
    if [ -s "$dir/$file" ]; then kill "$(cat "$dir/$file")" || true; fi
  done
  sleep 1
  # What is still there: steps that try to reach the controller, and their slurmd.
  { grep --files-with-matches --text "SLURM_CONF=$dir/slurm.conf" /proc/[0-9]*/environ 2>/dev/null || true; } |
    cut -d/ -f3 | while read -r process; do kill -KILL "$process" 2>/dev/null || true; done
  exit 0
fi

# Numbers of jobs are not used twice on a machine: see slurm/resumable.sh on what killed jobs leave in its shared memory.
mkdir -p "$dir"/{state,log,munge,spool-n1,spool-n2}
cat >"$dir/slurm.conf" <<END
ClusterName=test
FirstJobId=$((EPOCHSECONDS % 50000000 + 1))
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=16827
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=5
InactiveLimit=0
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=16828 CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=16829 CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
END
[ -s "$dir/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
chmod 755 "$dir" "$dir/munge"
munged --force --key-file="$dir/munge/key" --socket="$dir/munge/socket" --pid-file="$dir/munge/pid" \
  --log-file="$dir/log/munged.log" --seed-file="$dir/munge/seed"
export SLURM_CONF=$dir/slurm.conf
slurmctld
for node in n1 n2; do slurmd -N "$node"; done
for _ in $(seq 600); do
  if [ "$(sinfo --noheader --format=%T --partition=main)" = idle ]; then exit 0; fi
  sleep 0.2
done
echo "cluster.sh: the nodes did not come up: $dir/log" >&2
exit 1
