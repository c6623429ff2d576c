"""The pictures of the README, from a trained run: python benchmarks/pictures.py --run real.

Draws architecture.png and normal_and_fast.png, plots loss, PSNR, SSIM and learning rate, and copies what training and
t-SNE left, into visualisations/.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).parent.parent))

from conditions import draw_rows  # noqa: E402
from config import PredictConfig  # noqa: E402
from device import pick_device, training_cost  # noqa: E402
from modules import StableDiffusion  # noqa: E402
from sampling import ImageSampler, load_run, plan_sampling  # noqa: E402
from utils import read_jsonl  # noqa: E402
from vae import VAE  # noqa: E402
from weights import write_atomic  # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#dbe9f6", "#fde3c8", "#dcefd9", "#eeeeee"


@dataclass(frozen=True)
class PicturesConfig:
    """Draw and copy the pictures of one run."""

    run: str = "real"
    """Run that was trained here, with its frames and numbers."""
    checkpoints: str = "checkpoints"
    """Folder of all runs."""
    out: str = "visualisations"
    """Folder to write to."""
    device: str = "cpu"
    """Where the two samplings are timed."""


def save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
    print(path)


def box(ax, x: float, y: float, w: float, h: float, words: str, colour: str, size: float = 8) -> None:
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", fc=colour, ec="#555", lw=0.8))
    ax.text(x + w / 2, y + h / 2, words, ha="center", va="center", fontsize=size, linespacing=1.35)


def arrow(ax, a: tuple[float, float], b: tuple[float, float], **style) -> None:
    ax.annotate(
        "", b, a, arrowprops={"arrowstyle": "-|>", "color": "#444", "lw": 1, "shrinkA": 0, "shrinkB": 0, **style}
    )


def architecture(model: StableDiffusion, vae: VAE, path: Path) -> None:
    """Both stages and the sampler, with the numbers of these weights."""
    v, u = vae.config, model.unet.config
    side, (c, h, _) = v["image_size"], vae.latent_shape
    x = torch.zeros(1, 1, side, side)
    encoder, decoder = training_cost(vae.encoder, x), training_cost(vae.decoder, torch.zeros(1, *vae.latent_shape))
    y = torch.zeros(1, dtype=torch.int64)
    unet = training_cost(model.unet, torch.zeros(1, *vae.latent_shape), y, torch.zeros(1, len(model.attributes)))

    def cost(what: tuple) -> str:
        return f"{what[0] / 1e6:.1f} M parameters, {what[1]:.1f} GFLOP"

    figure = Figure(figsize=(11, 5.6))
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, 11.05), ylim=(0, 5.6))
    ax.axis("off")
    ax.text(0.1, 5.35, "Stage one: the VAE", fontsize=10, weight="bold")
    box(ax, 0.1, 4.2, 1.5, 0.8, f"slice\n1 x {side} x {side}", GREY)
    box(ax, 2.1, 4.2, 2.3, 0.8, f"encoder {v['downsample']}x\n{cost(encoder)}", BLUE)
    box(ax, 4.9, 4.2, 2.5, 0.8, f"latent {c} x {h} x {h}\nto principal axes, mean 0, deviation 1", GREEN)
    box(ax, 7.9, 4.2, 1.9, 0.8, f"decoder\n{cost(decoder)}", BLUE, 7)
    box(ax, 10.1, 4.2, 0.85, 0.8, "slice", GREY)
    for a, b in ((1.6, 2.1), (4.4, 4.9), (7.4, 7.9), (9.8, 10.1)):
        arrow(ax, (a, 4.6), (b, 4.6))

    ax.text(0.1, 3.72, f"Stage two: the U-Net, {cost(unet)}", fontsize=10, weight="bold")
    levels, n = u["channels"], len(u["channels"])
    resolution = [h // u["patch"] // 2**i for i in range(n)]
    tall, low = 2.1 / n, 1.25
    for i, (width, r) in enumerate(zip(levels, resolution)):
        top, inset = low + (n - 1 - i) * tall, 0.5 * i
        attention = "attention, " if r in u["attention"] else ""
        words = f"{attention}{u['blocks']} residual block{'s' * (u['blocks'] > 1)}\n{width} channels, {r} x {r}"
        box(ax, 2.1 + inset, top, 1.9, tall - 0.25, words, ORANGE, 7)
        box(ax, 6.0 - inset, top, 1.9, tall - 0.25, words, ORANGE, 7)
        arrow(ax, (4.0 + inset, top + tall / 2 - 0.12), (6.0 - inset, top + tall / 2 - 0.12), linestyle="dashed")
        if i < n - 1:
            arrow(ax, (3.05 + inset, top), (3.4 + inset, top - 0.25))
            arrow(ax, (6.6 - inset, top - 0.25), (6.95 - inset, top))
    top = low + (n - 0.5) * tall - 0.12
    box(
        ax,
        0.1,
        top - 0.35,
        1.5,
        0.7,
        "x_t = α z + σ ε\ntimestep t" + ", conditions y" * model.conditional,
        GREEN,
    )
    output = {"v": "v = α ε − σ z", "eps": "ε", "flow": "ε − z"}[model.prediction]
    box(ax, 8.4, top - 0.35, 1.6, 0.7, output, GREEN)
    arrow(ax, (1.6, top), (2.1, top))
    arrow(ax, (7.9, top), (8.4, top))

    # The steps by which predict.py goes, of many only the first and the last; then decoder and texture.
    grid = "all 1000 timesteps" if model.scheduler.config["grid"] == "full" else "the same timesteps"
    how = plan_sampling(PredictConfig(), model)
    steps = [f"U-Net\nt = {t}" for t in how["timesteps"][::-1]]
    shown = steps if len(steps) <= 7 else [*steps[:4], "…", *steps[-2:]]
    words = f"Generating: trained on {grid}, sampled in {len(steps)}" + ", new noise in each" * bool(how["eta"])
    chain = [("noise", GREEN), *((step, ORANGE) for step in shown), ("z", GREEN), ("decoder", BLUE)]
    if vae.texture is not None:
        x = torch.zeros(1, vae.texture.unet.config["in_channels"], side, side)
        number, flops = training_cost(vae.texture.unet, x, torch.zeros(1, dtype=torch.int64))[:2]
        count = len(vae.texture.scheduler.timesteps)
        words += f"; texture, {number / 1e6:.1f} M parameters, {count} x {flops:.1f} GFLOP"
        chain.append((f"texture\n{count} steps", BLUE))
    ax.text(0.1, 0.9, words, fontsize=10, weight="bold")
    w = 10.9 / (len(chain) + 1)
    for i, (word, colour) in enumerate([*chain, ("slice", GREY)]):
        box(ax, 0.1 + i * w, 0.1, w - 0.18, 0.55, word, colour, 7)
        if i:
            arrow(ax, (0.1 + i * w - 0.18, 0.375), (0.1 + i * w, 0.375))
    save(figure, path)


def normal_and_fast(model: StableDiffusion, vae: VAE, path: Path, n: int = 6) -> None:
    """The same seeds in predict.py's two ways of sampling, with the seconds of an image."""
    rows, plans = [], [PredictConfig(sampling="fast"), PredictConfig(sampling="normal")]
    for plan in plans:
        how = plan_sampling(plan, model)
        drawer = ImageSampler(model, vae, n, **how)
        start = time.time()
        images, _ = drawer(0, range(n), draw_rows(model.attributes, {}, 0, range(n)))
        images, seconds = images.cpu().numpy(), (time.time() - start) / n
        rows.append((f"{plan.sampling}: {len(how['timesteps'])} steps\n{seconds:.2f} s an image", images))
    figure = Figure(figsize=(1.7 * n + 1.6, 3.6), layout="constrained")
    for i, (words, images) in enumerate(rows):
        for j, image in enumerate(images):
            ax = figure.add_subplot(2, n, i * n + j + 1)
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
            if not j:
                ax.set_ylabel(words, fontsize=10)
    save(figure, path)


def plots(home: Path, out: Path) -> None:
    """Loss, PSNR, SSIM and learning rate of both stages, one picture each."""
    # Published weights have no log.
    if not (home / "diffusion" / "metrics.jsonl").exists():
        return
    stages = {
        "VAE": read_jsonl(home / "vae" / "metrics.jsonl"),
        "U-Net": read_jsonl(home / "diffusion" / "metrics.jsonl"),
    }
    wanted = {
        "loss": {"VAE": ["loss/train", "loss/val"], "U-Net": ["loss/train", "loss/val"]},
        "psnr": {"VAE": ["PSNR/val"], "U-Net": [f"denoising PSNR/t={t}" for t in (0, 222, 444, 666, 999)]},
        "ssim": {"VAE": ["SSIM/val"], "U-Net": [f"denoising SSIM/t={t}" for t in (0, 222, 444, 666, 999)]},
        "learning_rate": {"VAE": ["learning rate"], "U-Net": ["learning rate"]},
    }
    titles = {"loss": "loss", "psnr": "PSNR (dB)", "ssim": "SSIM", "learning_rate": "learning rate"}
    for name, by_stage in wanted.items():
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        for i, (stage, series) in enumerate(by_stage.items()):
            ax = figure.add_subplot(1, 2, i + 1)
            for key in series:
                xy = np.array([(r["epoch"], r[key]) for r in stages[stage] if key in r])
                if len(xy):
                    ax.plot(*xy.T, label=key.partition("/")[2] or None, marker="." if len(xy) < 20 else None)
            what = "one-step denoising, " if stage == "U-Net" and name in ("psnr", "ssim") else ""
            ax.set(title=f"{stage}: {what}{titles[name]}", xlabel="epoch", yscale="log" if name == "loss" else "linear")
            ax.grid(alpha=0.3)
            if len(series) > 1:
                ax.legend(fontsize=8, frameon=False, loc="center right")
        save(figure, out / f"real_{name}.png")


def main(cfg: PicturesConfig) -> None:
    home, out, device = Path(cfg.checkpoints) / cfg.run, Path(cfg.out), pick_device(cfg.device)
    model, vae, _, _ = load_run(home, "best", device)
    architecture(model, vae, out / "architecture.png")
    plots(home, out)
    normal_and_fast(model, vae, out / "normal_and_fast.png")
    pictures = {
        "vae/reconstructions.png": "real_reconstructions.png",
        "vae/reconstructions.gif": "real_reconstructions.gif",
        "diffusion/samples.gif": "real_training.gif",
        "texture/texture.png": "real_texture.png",
        "tsne/tsne.png": "real_tsne.png",
    }
    for source, name in pictures.items():
        if (home / source).exists():
            shutil.copyfile(home / source, out / name)
            print(out / name)


if __name__ == "__main__":
    main(tyro.cli(PicturesConfig, description=__doc__))
