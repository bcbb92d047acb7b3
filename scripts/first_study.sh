#!/usr/bin/env bash
# Every method on full Fashion-MNIST, 800 steps of batch 256, tanh: the table of docs/explanation/results.md.
#
# Usage: first_study.sh [FOLDER]      (default runs/first-study; MPIEXEC, RANKS (2) and SEEDS ("0 1 2") from the environment)
#
# Runs that are there already are kept: after an interruption it goes on where it stopped.
set -euo pipefail

folder=${1:-runs/first-study}
mpiexec=${MPIEXEC:-mpiexec}
ranks=${RANKS:-2}

run() {  # run NAME OPTIONS...
  for seed in ${SEEDS:-0 1 2}; do
    local target=$folder/$1-seed$seed.h5
    if [[ -e $target ]]; then continue; fi
    echo "$1, seed $seed" >&2
    # Written under another name, so that an interrupted run is not taken for a whole one. A run that diverges is kept.
    "$mpiexec" -n "$ranks" qnewton-mpi train --data fashion-mnist --activation tanh --batch 256 --steps 800 \
      --seed "$seed" --progress off --overwrite --output "$target.part" "${@:2}" || [[ $? == 2 ]]
    mv "$target.part" "$target"
  done
}

mkdir -p "$folder"
for lr in 0.01 0.1 0.3 0.5 1; do run "sgd-$lr" --method sgd --lr $lr; done
for lr in 0.02 0.05 0.1; do run "heavy-ball-$lr" --method momentum --lr $lr; done
for lr in 0.02 0.05 0.1; do run "nesterov-$lr" --method momentum --nesterov --lr $lr; done
for lr in 0.001 0.003 0.01; do run "adam-$lr" --method adam --lr $lr; done
for lr in 0.001 0.003 0.01; do run "nadam-$lr" --method adam --nesterov --lr $lr; done
for lr in 0.01 0.1; do
  for m in 2 4 8; do run "multisecant-m$m-$lr" --method multisecant --replicas $m --lr $lr; done
done
for m in 2 4 8 16 32; do run "fisher-m$m" --method fisher --replicas $m; done
