"""Many ranks: what two processes gain here, and what the same arithmetic gives on many GPUs.

python benchmarks/scaling.py [--ranks 1 2] measures a step of train.py by N ranks (a GPU each, or a CPU thread), with
the same images in all and the same per rank, and the all-reduce of the gradients alone. A model that is checked
against these figures is then worked out for up to 64 GPUs: docs/scaling.md.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from common import Bench, BenchConfig
from torch.utils.flop_counter import FlopCounterMode

from cluster import Ranks
from loop import EMA, Gradients, make_scaler, optimise
from train import backward, step_randomness
from utils import generator

PEAK, SHARE = 989e12, 0.35  # FLOP/s of an H200 in bfloat16, and the part of it that a well-fed training reaches
FABRICS = {  # GPUs, bytes per second around their ring, latency of a hop
    "one machine with NVLink": (8, 350e9, 5e-6),
    "400 Gb/s a GPU": (64, 40e9, 10e-6),
    "100 Gb/s a machine of 8": (64, 10e9, 20e-6),  # a ring leaves a machine once, whatever the number of its GPUs
}


@dataclass(frozen=True)
class ScalingConfig(BenchConfig):
    """Many ranks, measured and modelled."""

    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks to measure."""
    batch: int = 16
    """Images in a step, or per rank."""
    worker: bool = False
    """Be one rank; set by the benchmark itself."""
    threads: int = 1
    """CPU threads of a rank."""


def work(cfg: ScalingConfig) -> None:
    """One rank: seconds of a step with `batch` images in all, with `batch` per rank, and of the all-reduce alone."""
    torch.set_num_threads(cfg.threads)
    b = Bench(cfg)
    ranks, found = Ranks(b.device), {}
    for name, images in (("same in all", cfg.batch), ("same per rank", cfg.batch * ranks.size)):
        model = b.model()
        optimizer, ema = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), EMA(model, 0.999)
        scaler, network = make_scaler(None, b.device), ranks.wrap_ddp(model)
        call = partial(backward, network, model, scaler, 10)
        share = ranks.share(images)
        n = share.stop - share.start
        gradients = Gradients(call, [model], optimizer, scaler, 1.0, ranks, images, n, [network])
        moments = torch.rand(n, 1, 2, *b.latent, device=b.device).half()
        y, times = torch.zeros(n, 1, device=b.device), []
        for step in range(4 if cfg.quick else 24):
            ranks.barrier()
            b.synchronise()
            start = time.perf_counter()
            g = generator(0, step, device=b.device)
            randomness = [r[share] for r in step_randomness(model, images, b.latent, b.tra, g)]
            optimise(model, optimizer, ema, gradients(moments, y, *randomness)[0])
            b.synchronise()
            times.append(time.perf_counter() - start)
        found[name] = statistics.median(times[2:])
    gradients, times = torch.zeros(sum(p.numel() for p in model.parameters()), device=b.device), []
    for _ in range(3 if cfg.quick else 10):
        ranks.barrier()
        start = time.perf_counter()
        ranks.sum(gradients)
        b.synchronise()
        times.append(time.perf_counter() - start)
    found |= {"all-reduce": statistics.median(times), "bytes": gradients.nbytes}
    if ranks.is_main:
        print("FOUND " + json.dumps(found))
    ranks.close()


def measure(cfg: ScalingConfig, size: int, threads: int = 1) -> dict[str, float]:
    """`work` by `size` processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    flags = [
        "--worker",
        "--device",
        cfg.device,
        "--preset",
        cfg.preset,
        "--batch",
        str(cfg.batch),
        "--threads",
        str(threads),
    ]
    command = [sys.executable, __file__, *flags, *["--quick"] * cfg.quick]
    processes = [
        subprocess.Popen(command, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(size)
    ]
    out = [p.communicate()[0] for p in processes][0]
    return json.loads(next(line for line in out.splitlines() if line.startswith("FOUND "))[6:])


def step_seconds(compute: float, size: int, gradients: float, bandwidth: float, latency: float) -> float:
    """A step of `size` ranks that each compute for `compute` seconds, with a ring all-reduce of the gradients' bytes.

    The backward pass, two thirds of the computing, can hide all of it but the last of DDP's 25 MB buckets.
    """
    if size == 1:
        return compute
    reduce = 2 * (size - 1) * (gradients / size / bandwidth + latency)
    return compute + max(min(1.0, 25e6 / gradients) * reduce, reduce - compute * 2 / 3)


def cost_of_adni() -> tuple[float, float]:
    """(bytes of gradients, seconds an image) of the adni U-Net on the GPU that PEAK and SHARE describe."""
    b = Bench(BenchConfig(device="cpu", preset="adni"))
    model, t = b.model(), torch.zeros(1, dtype=torch.int64)
    z = torch.zeros(1, *b.latent)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(z, t, z, t[:, None].float())
    return 4.0 * sum(p.numel() for p in model.parameters()), 3 * flops.get_total_flops() / (SHARE * PEAK)


def main(cfg: ScalingConfig) -> None:
    if cfg.worker:
        return work(cfg)
    b = Bench(cfg)
    found = {size: measure(cfg, size) for size in cfg.ranks}
    one = found[cfg.ranks[0]]
    for size, f in found.items():
        for name in ("same in all", "same per rank"):
            images = [cfg.batch * (n if name == "same per rank" else 1) for n in (size, cfg.ranks[0])]
            b.row(f"ranks: {size}, {name}", images[0] / f[name], "one rank", images[1] / one[name], "images/s")
        if size > 1:
            rate = 2 * (size - 1) / size * f["bytes"] / f["all-reduce"]
            b.row(f"ranks: {size}, all-reduce of {f['bytes'] / 1e6:.0f} MB", 1e3 * f["all-reduce"], "", None, "ms")
            told = step_seconds(one["same in all"] / size, size, f["bytes"], rate, 0.0)
            b.row(f"ranks: {size}, step", 1e3 * f["same in all"], "model", 1e3 * told, "ms")
    if not b.gpu:
        f = measure(cfg, 1, threads=max(cfg.ranks))
        b.row(f"ranks: 1 with {max(cfg.ranks)} threads", cfg.batch / f["same in all"], "one rank",
              cfg.batch / one["same in all"], "images/s")  # fmt: skip

    gradients, image = cost_of_adni()
    print(f"modelled, not measured: {gradients / 1e6:.0f} MB of gradients, {1e3 * image:.2f} ms an image on an H200")
    for fabric, (n, bandwidth, latency) in FABRICS.items():
        for images in (2, 16, 64, 256):
            alone = images * image
            efficiency = alone / step_seconds(alone, n, gradients, bandwidth, latency)
            b.row(f"modelled: {n} GPUs, {fabric}, {images} images each", efficiency, "", None, "efficiency")


if __name__ == "__main__":
    main(tyro.cli(ScalingConfig, description=__doc__))
