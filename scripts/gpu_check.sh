#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests marked gpu, on 1 and 2 ranks, a training run on each device, and
# the benchmark, also of the PyTorch adapter beside DistributedDataParallel. Writes a report.
#
#   scripts/gpu_check.sh [REPORT.md]      default docs/reference/gpu-report.md
#
# DATA names a folder of MNIST: the adapter's steps are timed on it too; with heavyball installed, beside Muon's and SOAP's.
# Uses PYTHON (default python3) where that has all that is needed; else makes an environment, .venv-gpu, with CuPy and the
# libraries of the driver's CUDA: EXTRA=cuda12 (the default) or cuda13. QNEWTON_TEST_CUDA_MPI=1 where MPI is CUDA-aware.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
report=$(realpath -m "${1:-docs/reference/gpu-report.md}")
python=${PYTHON:-python3}
if ! command -v nvidia-smi >/dev/null; then
  echo "gpu_check.sh: no nvidia-smi here: run it on a machine with a GPU" >&2
  exit 2
fi
needed='import array_api_compat, array_api_strict, cupy, h5py, hypothesis, mpi4py.MPI, pytest, pytest_timeout, torch, tqdm'
if ! "$python" -c "$needed" 2>/dev/null; then
  case ${EXTRA:=cuda12} in
    cuda12) libraries=(nvidia-cublas-cu12 nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 nvidia-nccl-cu12) ;;
    *) libraries=(nvidia-cublas nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-nccl-cu13) ;;
  esac
  [ -x .venv-gpu/bin/python ] || "$python" -m venv .venv-gpu || exit 2
  .venv-gpu/bin/python -m pip install --quiet --editable ".[mpich,plot,dev,$EXTRA]" "${libraries[@]}" || exit 2
  python=$PWD/.venv-gpu/bin/python
fi
PATH=$(dirname "$(command -v "$python")"):$PATH
export PYTHONPATH=$PWD
mkdir -p runs
failed=0

section() {  # title, command …: its output as a section of the report
  local title=$1; shift
  { echo "## $title"; echo; echo '```'; echo "$*"; } >>"$report"
  if ! "$@" 2>&1 | tail -40 | tee -a "$report"; then failed=1; echo "(failed)" >>"$report"; fi
  { echo '```'; echo; } >>"$report"
}

{ echo "# Checked on a GPU"; echo; echo "By \`scripts/gpu_check.sh\`, $(date -u +%F), commit ${COMMIT:-$(git rev-parse --short HEAD)}."; echo; } >"$report"
section "The machine" nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
section "Libraries" "$python" -c 'import cupy, numpy; cupy.show_config()'
section "Tests, one process" "$python" -m pytest -q -rs tests/test_gpu.py
section "Tests, 2 ranks" mpiexec -n 2 "$python" -m pytest -q -rs tests/mpi/test_gpu.py
section "Who has which GPU" mpiexec -n 2 "$python" -m qnewton_mpi info
for device in cpu cuda; do
  section "Training, $device" mpiexec -n 2 "$python" -m qnewton_mpi train --steps 200 --device "$device" --progress lines \
    --output "runs/gpu-check-$device.h5" --overwrite
done
tables() {  # title, command …: what it prints is Markdown; the end of what it says of an error stands below
  local title=$1 errors; shift; errors=$(mktemp)
  { echo "## $title"; echo; echo "    $*"; echo; } >>"$report"
  if ! "$@" 2>"$errors" | tee -a "$report"; then
    failed=1
    { echo; echo '```'; tail -5 "$errors"; echo "(failed)"; echo '```'; } >>"$report"
  fi
  echo >>"$report"
  rm "$errors"
}
tables "Speed" "$python" scripts/gpu_bench.py
tables "Steps of the PyTorch adapter beside PyTorch's" \
  "$python" -m benchmarks.ddp --device cuda --workloads ${DATA:+mlp convnet-mnist} text ${DATA:+--data-dir "$DATA"}
echo "report: $report"
exit $failed
