"""Does the work grow in proportion? Time and memory against slices, image side and sampling steps, in one plot.

    python benchmarks/scale.py [--json FILE] [--plot FILE]

Slices: up to a million, simulated by files of zeros; what batches of 16 take that are in memory, and the memory of
everything that is kept per slice. Image side: a training step of the VAE, per image. Steps: drawing a batch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import tyro
from common import ROOT, Bench, BenchConfig

from cluster import Ranks
from config import PretrainConfig
from dataset import ADNIDataset, Slice, carve_validation, fingerprint
from device import gather_batches, shuffled_batches
from loop import EMA, Gradients, make_scaler, optimise
from modules import make_grid
from pre_train import backward
from sampling import ImageSampler
from vae import VAE, PatchDiscriminator

COUNTS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)


@dataclass(frozen=True)
class ScaleConfig(BenchConfig):
    """Time and memory against slices, image side and sampling steps."""

    plot: str = "docs/results/scale.png"
    """The picture."""


def resident_gb() -> float:
    """Memory that this process holds now, GB (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def slices_part(n: int, folder: Path) -> dict[str, float]:
    """Seconds to split n slices by person and to visit 200 batches of 16, and GB kept; in this process."""
    before, start = resident_gb(), time.perf_counter()
    slices = [
        Slice(f"train/C{i % 2}/{i // 20:06d}_{i % 20}.jpg", "train", f"C{i % 2}", f"{i // 20:06d}", (i, i))
        for i in range(n)
    ]
    fingerprint(slices), carve_validation(slices, 0.1, 0)
    with open(folder / f"{n}.u8", "wb") as f:
        f.truncate(n * 128 * 128)
    images = torch.from_numpy(np.memmap(folder / f"{n}.u8", np.uint8, mode="c", shape=(n, 128, 128)))
    data = ADNIDataset(slices, images, range(n), ["C0", "C1"])
    index = time.perf_counter() - start
    gb, order = resident_gb() - before, list(islice(shuffled_batches(n, 16, 0, 0, 1), 60))
    for _ in range(2):  # the first round meets the pages of a file that nobody has touched, which says what the disk is
        start = time.perf_counter()
        for _ in gather_batches([data.images], order, torch.device("cpu")):
            pass
    return {"index": index, "batch": (time.perf_counter() - start) / 60, "gb": gb}


def measure_slices(n: int, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", str(n), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def vae_step(b: Bench, side: int):
    """A training step of this preset's VAE on 4 images of this side."""
    c = b.pre
    vae = VAE(side, c.downsample, c.latent_channels, c.channels, c.blocks, c.attention)
    vae = vae.to(b.device, memory_format=torch.channels_last)
    vae.amp_dtype = b.amp_dtype
    optimizer, ema = torch.optim.AdamW(vae.parameters(), lr=1e-4, fused=True), EMA(vae, 0.999)
    scaler = make_scaler(b.amp_dtype, b.device)
    call = partial(backward, vae, PatchDiscriminator(), None, scaler, PretrainConfig(kl_weight=1e-3))
    gradients = Gradients(call, [vae], optimizer, scaler, 1.0, Ranks(b.device), 4, 4)
    x = torch.randint(256, (4, side, side), dtype=torch.uint8, device=b.device)
    u = torch.zeros(4, 5, device=b.device)

    def step() -> None:
        noise = torch.randn(4, *vae.latent_shape, device=b.device)
        optimise(vae, optimizer, ema, gradients(x, u, noise, u[:, 0])[0])

    return step


def draw_plot(path: Path, found: dict[str, tuple[list[float], list[float], str, str]]) -> None:
    """Log-log panels: measurements, and the line of proportional growth through the last one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullFormatter

    fig = Figure(figsize=(3.1 * len(found), 3.1), layout="constrained")
    for i, (title, (x, y, xlabel, ylabel)) in enumerate(found.items()):
        ax = fig.add_subplot(1, len(found), i + 1)
        ax.loglog(x, y, "o", color="#d55e00", label="measured", ms=5)
        ax.loglog(x, [y[-1] * v / x[-1] for v in x], color="#0072b2", lw=1, label="proportional")
        ax.set(title=title, xlabel=xlabel, ylabel=ylabel)
        ax.title.set_fontsize(10)
        for axis, values in ((ax.xaxis, x), (ax.yaxis, y)):
            wide = max(values) / min(values) > 30
            axis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
            axis.set_major_formatter(LogFormatterMathtext() if wide else FuncFormatter(lambda v, _: f"{v:g}"))
            axis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
        if i == 0:
            ax.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)


def main(cfg: ScaleConfig) -> None:
    b, found = Bench(cfg), {}
    counts = COUNTS[:3:2] if cfg.quick else COUNTS
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure_slices(n, Path(folder)) for n in counts]
    for n, r in zip(counts, rows):
        b.row(f"{n:,} slices: scan results split and kept", r["index"], "", None, "s")
        b.row(f"{n:,} slices: memory for them", r["gb"], "", None, "GB")
        b.row(f"{n:,} slices: a batch of 16", 1e3 * r["batch"], "", None, "ms")
    found["reading, an epoch"] = (list(counts), [r["batch"] * n / 16 for n, r in zip(counts, rows)], "slices", "s")
    found["memory for what is kept"] = (list(counts), [max(r["gb"], 1e-4) for r in rows], "slices", "GB")
    sides = (64, 128, 192) if cfg.quick else (64, 96, 128, 192, 256, 384)
    times = b.interleave({str(s): vae_step(b, s) for s in sides})
    y = [statistics.median(times[str(s)]) / 4 for s in sides]
    for s, t in zip(sides, y):
        b.row(f"VAE training step, {s}x{s}", 1e3 * t, "", None, "ms")
    found["VAE step, an image"] = ([s * s for s in sides], y, "pixels", "s")
    model, vae = b.model().eval().requires_grad_(False), b.vae().eval().requires_grad_(False)
    if not b.gpu:
        model.amp_dtype = vae.amp_dtype = None
    steps, conditions = (5, 10, 20, 50), torch.zeros(8, 1)
    drawers = {}
    for s in steps:
        drawer = ImageSampler(model, vae, 8, timesteps=make_grid("logsnr", s, model.scheduler.abar).tolist())
        drawers[str(s)] = lambda d=drawer: d(0, range(8), conditions)
    times = b.interleave(drawers)
    y = [statistics.median(times[str(s)]) / 8 for s in steps]
    for s, t in zip(steps, y):
        b.row(f"drawing, {s} steps, an image", 1e3 * t, "", None, "ms")
    found["drawing, an image"] = (list(steps), y, "steps", "s")
    draw_plot(Path(cfg.plot), found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(slices_part(int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main(tyro.cli(ScaleConfig, description=__doc__))
