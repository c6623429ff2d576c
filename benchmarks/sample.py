"""Drawing images in ten steps, decoding and PNG files included, beside diffusers and MONAI.

    python benchmarks/sample.py [--batch 64] [--json FILE]

Networks of matched sizes with random weights. Ours is predict.py's ImageSampler with DPM-Solver++(2M); theirs are
their DDIM loops, one call after the other, as their pipelines run them. Last, predict.py itself from process start to
files.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from common import Bench, BenchConfig, PeerUNet, PeerVAE, make_run, peak_gb, script

from device import fetch_async
from pictures import png_bytes, to_uint8
from sampling import ImageSampler
from weights import write_atomic


@dataclass(frozen=True)
class SampleConfig(BenchConfig):
    """Drawing images in ten steps, beside the peers."""

    batch: int = 0
    """Images at a time. Default: 64 on a GPU, 16 on a CPU."""


def write(folder: Path, images: np.ndarray, count: itertools.count) -> None:
    for image in images:
        write_atomic(folder / f"{next(count)}.png", png_bytes(image))


def our_drawing(b: Bench, batch: int, folder: Path, compile: str) -> tuple[Callable[[], None], Callable[[], None]]:
    """(draw and write a batch, wait for the files).

    As in predict.py, files are written by threads while the next batch is drawn; one image at a time is waited for.
    """
    model, vae = b.model().eval().requires_grad_(False), b.vae().eval().requires_grad_(False)
    if not b.gpu:
        model.amp_dtype = vae.amp_dtype = None  # predict.py's default on a CPU
    drawer, pool, count, jobs = (
        ImageSampler(model, vae, batch, compile=compile),
        ThreadPoolExecutor(8),
        itertools.count(),
        [],
    )
    y = torch.zeros(batch, 1)

    def save(path: Path, image: np.ndarray) -> None:
        write_atomic(path, png_bytes(image))

    def wait() -> None:
        for job in jobs:
            job.result()
        jobs.clear()

    drawn = deque()

    def draw() -> None:
        first = next(count) * batch
        drawn.append((first, fetch_async(drawer(0, range(first, first + batch), y)[0])))
        if len(drawn) > (batch > 1):
            first, images = drawn.popleft()
            images = images()
            wait()
            jobs.extend(pool.submit(save, folder / f"ours{first + j}.png", image) for j, image in enumerate(images))
        if batch == 1:
            wait()

    return draw, wait


def peer_drawing(b: Bench, peer: str, batch: int, folder: Path) -> Callable[[], None]:
    """Their DDIM loop of ten steps, their decoder, and the files."""
    unet, vae = PeerUNet(b, peer).eval().requires_grad_(False), PeerVAE(b, peer).eval().requires_grad_(False)
    if peer == "diffusers":
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
        scheduler.set_timesteps(10)
    else:
        from monai.networks.schedulers import DDIMScheduler

        scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
        scheduler.set_timesteps(num_inference_steps=10)
    count, dtype = itertools.count(), b.amp_dtype if b.gpu else None

    @torch.no_grad()
    def draw() -> None:
        z, y = torch.randn(batch, *b.latent, device=b.device), torch.zeros(batch, 1, device=b.device)
        with torch.autocast(b.device.type, dtype, enabled=dtype is not None):
            for t in scheduler.timesteps:
                out = unet(z, t.to(b.device).expand(batch), y)
                step = scheduler.step(out.float(), t, z)
                z = step.prev_sample if peer == "diffusers" else step[0]
            images = to_uint8(vae.decode(z))
        write(folder, images, count)

    return draw


def main(cfg: SampleConfig) -> None:
    b = Bench(cfg)
    batch, compiled = cfg.batch or (64 if b.gpu else 16), b.gpu and not cfg.quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n in (batch, 1):
            ours, wait = our_drawing(b, n, folder, "on" if compiled else "off")
            calls = {"ours": ours} | {p: peer_drawing(b, p, n, folder) for p in ("diffusers", "MONAI")}
            times = b.interleave(calls)
            wait()
            for peer in ("diffusers", "MONAI"):
                if n == batch:
                    b.compare(f"ten steps, decode and PNG, {n} at a time", times, "ours", peer, n)
                else:
                    a, c = (1e3 * statistics.median(times[k]) for k in ("ours", peer))
                    b.row("one image, ten steps, decode and PNG", a, peer, c, "ms")
            if b.gpu:
                b.row("peak GPU memory", torch.cuda.max_memory_allocated(b.device) / 1e9, "", None, "GB")
        make_run(b, folder / "run")
        flags = ["--checkpoints", name, "--run", "run", "--wandb", "disabled", "--device", str(b.device)]
        seconds = [
            script("predict.py", *flags, "--num-images", "16", "--out", str(folder / f"out{i}"))
            for i in range(1 if cfg.quick else 3)
        ]
        b.row("16 images, process start to files", statistics.median(seconds), "", None, "s")
    print(f"peak memory of the benchmark: {peak_gb():.2f} GB")


if __name__ == "__main__":
    main(tyro.cli(SampleConfig, description=__doc__))
