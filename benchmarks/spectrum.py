"""Where the frequencies of images end: python benchmarks/spectrum.py --run pretrained --data DATA.

Prints power against training slices, in dB, for slices of people held out, their reconstructions and generated images,
both without texture and with it, and writes a grid of them (docs/results.md, Texture).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from conditions import draw_rows  # noqa: E402
from config import PredictConfig  # noqa: E402
from dataset import load_splits_as_trained  # noqa: E402
from device import pick_device  # noqa: E402
from metrics import batches, power_spectrum, psnr, ssim  # noqa: E402
from pictures import image_grid, png_bytes, to_pixels  # noqa: E402
from sampling import ImageSampler, load_run, plan_sampling  # noqa: E402
from utils import UserError, evenly_spaced, run_script  # noqa: E402
from weights import write_atomic  # noqa: E402


@dataclass(frozen=True)
class SpectrumConfig:
    """Compare the power of a run's images with that of training slices, band by band."""

    data: str
    """The data that the run was trained on."""
    run: str = "pretrained"
    """Run in CHECKPOINTS with a texture."""
    checkpoints: str = "checkpoints"
    """Folder of all runs."""
    cache: str = "cache"
    """Folder for decoded slices."""
    num_images: int = 64
    """Images of each kind."""
    seed: int = 5
    """Seed of the generated images."""
    device: str = "auto"
    """auto, cuda or cpu."""
    precision: str = "bf16"
    """Precision of the networks."""
    out: str = "spectrum.png"
    """Grid: slices of people held out, then generated images without texture and with it."""


def decibels(pixels: Tensor) -> Tensor:
    """Mean power of images uint8 [N, S, S] at 1 ... S/2 - 1 cycles an image, in dB."""
    return 10 * torch.cat([power_spectrum(x) for x in batches(pixels)]).mean(0)


@torch.no_grad()
def main(cfg: SpectrumConfig) -> None:
    device = pick_device(cfg.device)
    model, vae, meta, _ = load_run(Path(cfg.checkpoints) / cfg.run, "best", device, cfg.precision)
    if vae.texture is None:
        raise UserError(f"run {cfg.run} has no texture: python texture.py --run {cfg.run} comes first")
    splits = load_splits_as_trained(cfg.data, cfg.cache, meta, vae.config["image_size"])
    train, held_out = splits["train"].images, splits["val"]
    index = torch.tensor(evenly_spaced(len(held_out), cfg.num_images))
    x = held_out.batch(index, device)

    # Latents of people and of the U-Net, then both as images, without texture and with it.
    z = torch.cat([vae.encode(part)[0] for part in x.split(16)])
    how = plan_sampling(PredictConfig(run=cfg.run), model)
    sampler, made = ImageSampler(model, vae, 16, **how), []
    y = draw_rows(model.attributes, {}, cfg.seed, range(cfg.num_images))
    for k in torch.arange(cfg.num_images).split(16):
        made.append(sampler(cfg.seed, k.tolist(), y[k])[1])
    shown = {"people held out": to_pixels(x).cpu()}
    for name, latents in (("reconstructed", z), ("generated", torch.cat(made))):
        for words, seed in (("", None), (", with texture", cfg.seed)):
            parts = []
            for k in torch.arange(len(latents)).split(16):
                noise = None if seed is None else vae.texture_noise(seed, k.tolist())
                parts.append(vae.decode(latents[k], noise))
            shown[name + words] = to_pixels(torch.cat(parts)).cpu()

    # A row for each set; reconstructions also against their slices.
    reference = decibels(train[torch.tensor(evenly_spaced(len(train), 8 * cfg.num_images))])
    real = shown["people held out"][:, None] / 255
    print(
        "| power against training slices, dB | 48 | 64 | 80 | 96 | 112 | upper half | PSNR, SSIM |\n|---"
        + "|---" * 7
        + "|"
    )
    for name, pixels in shown.items():
        difference = decibels(pixels) - reference
        bands = [difference[k - 1 : k + 15].mean().item() for k in range(48, len(difference) - 14, 16)]
        row = [f"{value:.1f}" for value in [*bands, difference[len(difference) // 2 :].mean().item()]]
        images = pixels[:, None] / 255
        same = f"{psnr(images, real).mean():.1f} dB, {ssim(images, real).mean():.3f}" if "recon" in name else ""
        print("| " + " | ".join([name, *row, same]) + " |")
    rows = [shown[name][:8].numpy() for name in ("people held out", "generated", "generated, with texture")]
    write_atomic(Path(cfg.out), png_bytes(image_grid(np.concatenate(rows), columns=len(rows[0]))))


if __name__ == "__main__":
    run_script(main, tyro.cli(SpectrumConfig, description=__doc__))
