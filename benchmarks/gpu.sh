#!/usr/bin/env bash
# Everything about speed that only a CUDA GPU can say, in under 8 minutes on one card, from the repository's folder:
#   DATA=path/to/slices bash benchmarks/gpu.sh
# needs make bench-env for the peers. Rows go to docs/results/gpu-*.json, the log and the profile beside them.
# With TRAIN=1 it then trains the `adni` preset on DATA, draws, maps and evaluates (about an hour).
set -euo pipefail
DATA=${DATA:-data}
OUT=${OUT:-docs/results}
PY=${PY:-.venv/bin/python}
BENCH=${BENCH:-.venv-bench/bin/python}
mkdir -p "$OUT"
{
  date -u +%F
  git rev-parse --short HEAD
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  $PY -m pytest -q -n 0 tests/test_gpu.py
  $BENCH benchmarks/train_step.py  --device cuda --seconds 20 --json "$OUT/gpu-train_step.json"
  $PY benchmarks/profile_step.py --device cuda --out "$OUT/gpu-profile.txt"
  $BENCH benchmarks/sample.py      --device cuda --seconds 15 --json "$OUT/gpu-sample.json"
  $BENCH benchmarks/train_epoch.py --device cuda --seconds 15 --json "$OUT/gpu-train_epoch.json" --data "$DATA"
  gpus=$(nvidia-smi -L | wc -l)
  if ((gpus > 1)); then $PY benchmarks/scaling.py --device cuda --ranks 1 2 "$gpus" --json "$OUT/gpu-scaling.json"; fi
} 2>&1 | tee "$OUT/gpu-log.txt"
[ "${TRAIN:-0}" = 1 ] || exit 0
{
  time $PY pre_train.py adni --data "$DATA" --run gpu --epochs 60 --wandb offline
  time $PY train.py adni --data "$DATA" --run gpu --epochs 200 --wandb offline
  $PY predict.py --run gpu --num-images 256 --out "$OUT/gpu-images"
  $PY tsne.py --run gpu --data "$DATA" --wandb offline
  time $PY evaluate.py --run gpu --data "$DATA" --wandb offline --no-training-pictures
} 2>&1 | tee "$OUT/gpu-training.txt"
