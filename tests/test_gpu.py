"""What only a GPU can show: both half precisions train, and the GPU draws the CPU's images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_UNET, TINY_VAE, run
from test_pipeline import images

from utils import read_jsonl

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_training_in_half_precision_follows_float32(precision: str, phantoms: Path, tmp_path: Path):
    losses = {}
    for name in ("fp32", precision):
        where = ["--data", phantoms, "--checkpoints", tmp_path, "--cache", tmp_path / "cache", "--run", name]
        flags = ["--epochs", "4", "--device", "cuda", "--precision", name]
        run("pre_train.py", *where, *TINY_VAE, *flags)
        run("train.py", *where, *TINY_UNET, *flags)
        losses[name] = [read_jsonl(tmp_path / name / part / "metrics.jsonl")[-1] for part in ("vae", "diffusion")]
    for full, half in zip(*losses.values()):
        assert half["loss/val"] == pytest.approx(full["loss/val"], rel=0.1)
        assert half["GPU memory (GB)"] > 0


def test_gpu_and_cpu_draw_the_same_images(trained: Path, tmp_path: Path):
    made = []
    for device in ("cuda", "cpu"):
        flags = ["--device", device, "--precision", "fp32", "--num-images", "4", "--out", tmp_path / device]
        run("predict.py", "--checkpoints", trained, "--run", "tiny", *flags)
        made.append(images(tmp_path / device))
    for name in made[0]:
        assert np.abs(made[0][name].astype(int) - made[1][name]).max() <= 2
