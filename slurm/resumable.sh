#!/usr/bin/env bash
# In a batch script: run `qnewton-mpi ARGUMENTS` on the job's tasks so that it outlives preemption and limits of time.
#
# The ranks save a checkpoint and exit with 75 when a signal comes or the time is nearly up; then the job goes back to the
# queue, and its next start goes on from there. A signal to this script (#SBATCH --signal=B:USR2@120) is passed on.
#
# VENV       virtual environment, .venv by default
# SRUN_MPI   what srun speaks to the MPI library; by default pmi2 for MPICH, pmix for Open MPI
set -uo pipefail

venv=${VENV:-.venv}
library=$("$venv/bin/python" -c 'import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])')
case $library in
  "Open MPI") mpi=pmix ;;
  *) mpi=pmi2 ;;
esac
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# MPICH names a node's shared memory by job and step. Ranks that were killed leave theirs behind, and at the next start on
# that node MPI_Init would take it for its own, and hang or fail. So each start of a job gets a step number of its own.
restarts=${SLURM_RESTART_COUNT:-0}
for ((step = 0; step < restarts; step++)); do
  srun --nodes=1 --ntasks=1 true
done

# shellcheck disable=SC2317  # called by the traps
pass_on() { scancel --signal="$1" "$SLURM_JOB_ID.$restarts"; }
trap 'pass_on USR1' USR1
trap 'pass_on USR2' USR2
trap 'pass_on TERM' TERM

srun --mpi="${SRUN_MPI:-$mpi}" --kill-on-bad-exit=1 "$venv/bin/qnewton-mpi" "$@" &
tasks=$!
wait "$tasks"
code=$?
while kill -0 "$tasks" 2>/dev/null; do # a trapped signal ends `wait`, but not the tasks
  wait "$tasks"
  code=$?
done

if [ "$code" = 75 ]; then
  echo "resumable.sh: job $SLURM_JOB_ID goes back to the queue"
  scontrol requeue "$SLURM_JOB_ID" || true # it may be on its way already, where it was preempted
fi
exit "$code"
