#!/usr/bin/env bash
# The weights in checkpoints/pretrained/, each by one command, from the repository's folder:
#   DATA=path/to/registered bash benchmarks/pretrained.sh real      # 256x256: six minutes of one H100, and texture (67 minutes of two CPU cores)
#   bash benchmarks/pretrained.sh phantoms                          # 128x128: four minutes of one H100
# where the real slices come from the volumes of ds002748, people 1 to 50 to train on and 51 to 60 held out (people.tsv is
# its participants.tsv with the columns participant_id, age and sex), by
#   python dataset.py slice VOLUMES registered --match "sub-[0-4]*" "sub-50*" --table people.tsv --attributes age sex \
#     --class-name NC --prepare all --range -20 50                  # and again: --match "sub-5[1-9]*" "sub-60*" --split val
# With LIMIT=540 it leaves after so many seconds, with 75, and the same command goes on from there: checkpoints/ must be
# kept in between. On a CPU of two cores either takes a day and more.
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
what=${1:?real or phantoms}
alike=(--no-draw-by-weight) # what `small` was then

case $what in
real)
  vae=(small --data "$DATA" --run real --image-size 256 --latent-channels 16 --channels 64 128 256 --no-attention
       --adversarial 0.5 --adversarial-start 0.6 --batch-size 16 --lr 8e-4 --epochs 16
       --evaluate-every 4 --gif-every 4 --compile off --wandb disabled)
  unet=(small --data "$DATA" --run real --attention 16 --dropout 0.1 --augment 6 --condition level age sex --batch-size 64 --lr 1e-3
        "${alike[@]}" --epochs 170 --evaluate-every 10 --sample-every 50 --wandb disabled)
  texture=(small --data "$DATA" --run real --noise 1 --wandb disabled)
  student=(--teacher real --run real-4 --trajectories 4096 --epochs 14 --batch-size 64 --lr 2e-4 --compile off --wandb disabled)
  student_texture=(--teacher real --run real-4 --part texture --num-steps 3 --trajectories 448 --epochs 8 --batch-size 8 --lr 5e-4
       --ema-decay 0.99 --evaluate-every 4 --compile off --wandb disabled)
  student_2=(--teacher real --run real-2 --num-steps 2 --trajectories 2048 --epochs 12 --batch-size 32 --lr 2e-4 --evaluate-every 2
       --compile off --wandb disabled)
  out=checkpoints/pretrained bits=16 notes="256x256, brains aligned with MNI152, z from -20 to 50 mm, adults of 19 to 55 years. Structures of a few pixels are drawn, not remembered: the leaves of the cerebellum are less regular than in people." ;;
phantoms)
  DATA=phantom-1000
  vae=(small --data "$DATA" --run phantoms --batch-size 32 --lr 1e-3 --epochs 12 --gif-every 3 --compile off --wandb disabled)
  unet=(small --data "$DATA" --run phantoms --condition level age sex group --batch-size 32 --lr 1e-3 --epochs 60
        "${alike[@]}" --sample-every 15 --compile off --wandb disabled)
  texture=() student=()
  DS="Procedural phantoms of phantom.py (no people and nobody's data: no licence restricts them): AD and NC are borrowed names."
  out=checkpoints/pretrained/phantoms bits=8 notes="Classes, ages and sexes are those of drawings and say nothing about a disease or about people. 128x128." ;;
*) echo "real or phantoms, not $what" >&2; exit 2 ;;
esac

made="bash benchmarks/pretrained.sh $what"
if [[ $what == real ]]; then made="DATA=path/to/registered $made"; fi
publish() { # RUN OUT [FLAGS of ship.py]
  step $PY evaluate.py --run "$1" --data "$DATA" --no-training-pictures --wandb disabled
  step $PY benchmarks/ship.py --run "$1" --out "$2" --data "$DS" --notes "$notes" --commands "$made" "${@:3}"
}
step $PY pre_train.py "${vae[@]}"
step $PY train.py "${unet[@]}"
if ((${#texture[@]})); then step $PY texture.py "${texture[@]}"; fi
publish "$what" $out --bits $bits
if ((${#student[@]})); then
  step $PY distil.py "${student[@]}"
  step $PY distil.py "${student_texture[@]}"
  publish real-4 $out/student --bits 8
  rm -rf $out/student/vae && ln -s ../vae $out/student/vae # its teacher's
  step $PY distil.py "${student_2[@]}"
  rm -rf checkpoints/real-2/texture && ln -s ../real-4/texture checkpoints/real-2/texture # three steps draw on its images, too
  publish real-2 $out/student-2 --bits 8
  rm -rf $out/student-2/{vae,texture}
  ln -s ../vae $out/student-2/vae
  ln -s ../student/texture $out/student-2/texture
fi
