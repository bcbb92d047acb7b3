#!/usr/bin/env bash
# In a batch script: run `qnewton-mpi ARGUMENTS` on the job's tasks so that it outlives preemption and limits of time.
#
# The ranks save a checkpoint and exit with 75 when a signal comes or the time is nearly up; then the job goes back to the
# queue, and its next start goes on from there. A signal to this script (#SBATCH --signal=B:USR2@120) is passed on.
#
# QNEWTON_COMMAND  the program, as "apptainer exec qnewton.sif qnewton-mpi"; without it that of VENV
# VENV             a virtual environment; without it .venv where the job is submitted, or beside the folder of this
#                  script; then what the PATH has
# QNEWTON_SETUP    a file of shell commands that come first: module load …
# SRUN_MPI         what srun speaks to the MPI library; without it pmix for Open MPI, pmi2 for all others
set -uo pipefail

# Until there are tasks to pass it on to, a signal is remembered.
told=
for name in USR1 USR2 TERM; do
  # shellcheck disable=SC2064  # the name of now
  trap "told=$name" "$name"
done

if [ -n "${QNEWTON_SETUP:-}" ]; then
  # shellcheck disable=SC1090  # the user's
  source "$QNEWTON_SETUP" || exit
fi
beside=$(dirname "${BASH_SOURCE[0]}")/../.venv
program=(qnewton-mpi)
if [ -n "${QNEWTON_COMMAND:-}" ]; then
  read -r -a program <<<"$QNEWTON_COMMAND"
else
  for venv in ${VENV:+"$VENV"} .venv "$beside"; do
    if [ -x "$venv/bin/qnewton-mpi" ]; then
      program=("$venv/bin/qnewton-mpi")
      break
    fi
  done
fi
if ! command -v "${program[0]}" >/dev/null; then
  echo "resumable.sh: ${program[0]} is not there: activate its environment before sbatch, or set VENV or QNEWTON_COMMAND" >&2
  exit 2
fi
mpi=${SRUN_MPI:-$("${program[@]}" slurm --pmi)} || exit
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# MPICH names a node's shared memory by job and step. Ranks that were killed leave theirs behind, and at the next start on
# that node MPI_Init would take it for its own, and hang or fail. So each start of a job gets a step number of its own.
restarts=${SLURM_RESTART_COUNT:-0}
for ((step = 0; step < restarts; step++)); do
  srun --nodes=1 --ntasks=1 true
done

srun --mpi="$mpi" --kill-on-bad-exit=1 "${program[@]}" "$@" &
tasks=$!
pass_on() {
  until scancel --signal="$1" "$SLURM_JOB_ID.$restarts" 2>/dev/null; do # the step is not there yet, or not any more
    kill -0 "$tasks" 2>/dev/null || return 0
    sleep 1
  done
}
for name in USR1 USR2 TERM; do
  # shellcheck disable=SC2064
  trap "pass_on $name" "$name"
done
if [ -n "$told" ]; then pass_on "$told"; fi
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
