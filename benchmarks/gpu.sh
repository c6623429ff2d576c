#!/usr/bin/env bash
# Everything about speed that only a CUDA GPU can say, in 8 minutes on one card, from the repository's folder:
#   DATA=path/to/slices bash benchmarks/gpu.sh
# needs make bench-env for the peers. Each part has its own limit in seconds, the most valuable comes first, and what a
# part had measured when it failed or was cut stays in docs/results/gpu-PART.json. gpu-status.jsonl says how each part
# ended; the exit code is 1 if one did not end well. With TRAIN=1 it then trains the `adni` preset on DATA, generates,
# maps and evaluates (about an hour).
set -uo pipefail
DATA=${DATA:-data}
OUT=${OUT:-docs/results}
PY=${PY:-.venv/bin/python}
BENCH=${BENCH:-.venv-bench/bin/python}
LIMIT=${LIMIT:-} # seconds for every part, instead of the table's
mkdir -p "$OUT"
STATUS=$OUT/gpu-status.jsonl
: >"$STATUS"

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=${LIMIT:-$2} start=$SECONDS code
  shift 2
  echo "== $name: $limit s at most"
  timeout -k 10 "$limit" "$@"
  code=$?
  echo "{\"part\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - start)), \"limit\": $limit}" | tee -a "$STATUS"
}

{
  date -u +%F
  git rev-parse --short HEAD
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  part train_step    150 "$BENCH" benchmarks/train_step.py --device cuda --seconds 15 --json "$OUT/gpu-train_step.json"
  part train_step_16  40 "$BENCH" benchmarks/train_step.py --device cuda --batch 16 --quick --json "$OUT/gpu-train_step_16.json"
  part profile_step   40 "$PY" benchmarks/profile_step.py --device cuda --out "$OUT/gpu-profile.txt"
  part sample         80 "$BENCH" benchmarks/sample.py --device cuda --seconds 10 --json "$OUT/gpu-sample.json"
  part train_epoch    80 "$BENCH" benchmarks/train_epoch.py --device cuda --seconds 10 --json "$OUT/gpu-train_epoch.json" --data "$DATA"
  part tests          90 "$PY" -m pytest -q -n 0 tests/test_gpu.py
  gpus=$(nvidia-smi -L | wc -l)
  if ((gpus > 1)); then
    part scaling      90 "$PY" benchmarks/scaling.py --device cuda --ranks 1 2 "$gpus" --json "$OUT/gpu-scaling.json"
  fi
} 2>&1 | tee "$OUT/gpu-log.txt"
if [ "${TRAIN:-0}" = 1 ]; then
  {
    time $PY pre_train.py adni --data "$DATA" --run gpu --epochs 60 --wandb offline
    time $PY train.py adni --data "$DATA" --run gpu --epochs 200 --wandb offline
    $PY predict.py --run gpu --num-images 256 --out "$OUT/gpu-images"
    $PY tsne.py --run gpu --data "$DATA" --wandb offline
    time $PY evaluate.py --run gpu --data "$DATA" --wandb offline --no-training-pictures
  } 2>&1 | tee "$OUT/gpu-training.txt"
fi
! grep -qv '"exit": 0,' "$STATUS"
