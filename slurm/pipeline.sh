#!/bin/bash
# slurm/pipeline.sh [preset] [--run NAME] [--data DIR] [--flag value ...]   from the repository's folder.
# Submits VAE, U-Net, images and evaluation as a chain: each starts when the one before has finished well, and when one
# fails the rest is cancelled. Flags that are given here go to all four; those of one stage go into a variable:
#   TRAIN="--epochs 100" PREDICT="--num-images 4000" slurm/pipeline.sh small --run my-run --data slices
# With TEXTURE="--epochs 10", say, texture.py runs before images are generated.
set -euo pipefail
source slurm/site.env
preset=adni
if [[ ${1-} && $1 != -* ]]; then preset=$1 && shift; fi
run=$preset checkpoints=checkpoints last=
for word in "$@"; do
    case $last in --run) run=$word ;; --checkpoints) checkpoints=$word ;; esac
    case $word in --run=*) run=${word#*=} ;; --checkpoints=*) checkpoints=${word#*=} ;; esac
    last=$word
done
images=${OUT:-$checkpoints/$run/images}

previous=
submit() { # STAGE [args]
    previous=$(sbatch --parsable --kill-on-invalid-dep=yes ${previous:+--dependency=afterok:$previous} \
        "slurm/$1.sbatch" "$preset" "${@:2}")
    previous=${previous%%;*} # a federation adds the cluster's name
    echo "$1 $previous"
}
# shellcheck disable=SC2086
{
    submit pre_train "$@" ${PRE_TRAIN-}
    submit train "$@" ${TRAIN-}
    [[ -z ${TEXTURE-} ]] || submit texture "$@" $TEXTURE
    submit predict "$@" --run "$run" --num-images 1000 --out "$images" ${PREDICT-}
    submit evaluate "$@" --run "$run" --images "$images" --out "$checkpoints/$run/report" ${EVALUATE-}
}
