#!/usr/bin/env bash
# The weights in checkpoints/pretrained/, each by one command, from the repository's folder:
#   DATA=path/to/ds002748 bash benchmarks/pretrained.sh real       # two hours on two CPU cores
#   bash benchmarks/pretrained.sh phantoms                         # two hours on two CPU cores, conditioned on all attributes
#   DATA=path/to/ds002748 bash benchmarks/pretrained.sh real256    # one GPU; replaces `real` once it has been run and read
# With LIMIT=540 it leaves after so many seconds, with 75, and the same command goes on from there: checkpoints/ must be
# kept in between. What it ships in the end (VAE and U-Net of real256, float32) takes less than 64 MB.
set -euo pipefail
END=$((SECONDS + ${LIMIT:-31536000}))
step() { # COMMAND...: what is interrupted by SIGTERM saves, leaves with 75 and goes on when it is called again
  local left=$((END - SECONDS)) code=75
  if ((left > 20)); then
    code=0
    timeout --preserve-status -s TERM -k 60 $((left - 20)) "$@" || code=$?
  fi
  if ((code == 75)); then echo "time is over: the same command goes on"; fi
  if ((code != 0)); then exit $code; fi
}
PY=${PY:-.venv/bin/python}
DS="OpenNeuro ds002748 v1.0.5 (licence CC0; Bezmaternykh et al., Neural Plasticity 2021, 8846097), adults with depression and healthy volunteers, not known to have dementia:"
what=${1:?real, phantoms or real256}

case $what in
real)
  vae=(small --data "$DATA" --run real --wandb disabled)
  unet=(small --data "$DATA" --run real --wandb disabled)
  out=checkpoints/pretrained notes="Trained for an hour on CPU cores: folds of the cortex are rougher than in people. 128x128. About one image in seventy is closer to a training slice than strangers are: --reject-copies finds it." ;;
real256)
  vae=(adni --data "$DATA" --run real256 --downsample 4 --latent-channels 4 --channels 128 --blocks 2 --no-attention
       --schedule cosine --adversarial 0.5 --flip --lr 6e-4 --kl-weight 1e-3 --epochs 60 --wandb disabled)
  unet=(adni --data "$DATA" --run real256 --patch 2 --channels 128 256 --blocks 1 --attention 16 --grid full --flip --dropout 0.1 --ema-decay 0.9995 --lr 3e-4 --batch-size 64
        --epochs 600 --sample-every 50 --wandb disabled)
  out=checkpoints/pretrained notes="256x256." ;;
phantoms)
  DATA=phantom-1000
  vae=(small --data "$DATA" --run phantoms --epochs 3 --wandb disabled)
  unet=(small --data "$DATA" --run phantoms --condition level age sex group --epochs 13 --sample-every 4 --wandb disabled)
  DS="Procedural phantoms of phantom.py (no people and nobody's data: no licence restricts them): AD and NC are borrowed names."
  out=checkpoints/pretrained/phantoms notes="Classes, ages and sexes are those of drawings and say nothing about a disease or about people. 128x128." ;;
*) echo "real, phantoms or real256, not $what" >&2; exit 2 ;;
esac

step $PY pre_train.py "${vae[@]}"
[ "$what" != real ] || step $PY pre_train.py "${vae[@]}" --epochs 16 --adversarial 1 # a sharper decoder for the same latents
step $PY train.py "${unet[@]}"
step $PY evaluate.py --run "$what" --data "$DATA" --no-training-pictures --wandb disabled
step $PY benchmarks/ship.py --run "$what" --out $out --data "$DS" --notes "$notes" --commands "bash benchmarks/pretrained.sh $what"
