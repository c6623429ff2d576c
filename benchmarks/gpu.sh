#!/usr/bin/env bash
# What is to be run once on a CUDA GPU, from the repository's folder, with the slices of ds002748 in DATA:
#   DATA=../shared/data/ds002748 bash benchmarks/gpu.sh
# Correctness under both half precisions, then the job at 256 x 256, then sampling one image and 256. Logs go to OUT.
set -euo pipefail
DATA=${DATA:-../shared/data/ds002748}
OUT=${OUT:-docs/results/gpu}
PY=${PY:-.venv/bin/python}
mkdir -p "$OUT"
{
  date -u +%F
  git rev-parse --short HEAD
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  $PY -m pytest -q -n 0 tests/test_gpu.py
  time $PY pre_train.py adni --data "$DATA" --run gpu --epochs 60 --wandb offline
  time $PY train.py adni --data "$DATA" --run gpu --epochs 200 --wandb offline
  for n in 1 256; do
    $PY predict.py --run gpu --num-images $n --batch-size 64 --out "$OUT/out-$n"
  done
  $PY tsne.py --run gpu --data "$DATA" --wandb offline
  time $PY evaluate.py --run gpu --data "$DATA" --wandb offline --no-training-pictures
} 2>&1 | tee "$OUT/log.txt"
cp checkpoints/gpu/{vae/reconstructions.png,diffusion/samples.png,diffusion/curves.png} "$OUT"
