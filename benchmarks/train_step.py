"""A training step of the U-Net on latents, beside diffusers' and MONAI's of the same size: images/s and FLOP/s.

    python benchmarks/train_step.py [--device cuda] [--batch 256] [--json FILE]

Ours is the step of train.py: a fresh posterior draw, antithetic timesteps, loss by timestep, clipping, AdamW, EMA.
Theirs is that of their own scripts (see common.py). No image is read or encoded by any of them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import torch
import tyro
from common import Bench, BenchConfig, PeerUNet, cost, peer_step
from torch import nn

from cluster import Ranks
from loop import EMA, Gradients, make_scaler, optimise
from modules import CosineAnnealingWarmupScheduler, StableDiffusion
from train import backward, step_randomness
from utils import generator


@dataclass(frozen=True)
class StepConfig(BenchConfig):
    """A training step of the U-Net, beside the peers'."""

    batch: int = 0
    """Images in a step. Default: 256 on a GPU, 16 on a CPU."""


def matrix_peak(b: Bench) -> float:
    """FLOP/s of a large matrix product in the networks' precision: the most that this device gives."""
    n = 8192 if b.gpu else 2048
    x, y = (torch.randn(n, n, device=b.device, dtype=b.amp_dtype or torch.float32) for _ in range(2))
    times = b.interleave({"matrix": lambda: x @ y}, 4)["matrix"]
    return 2 * n**3 / statistics.median(times)


def our_step(b: Bench, model: StableDiffusion, moments: torch.Tensor, y: torch.Tensor):
    """The step of train.py."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
    ema, schedule = EMA(model, 0.999), CosineAnnealingWarmupScheduler(optimizer, 10, 10**6)
    scaler = make_scaler(b.amp_dtype, b.device)
    call, batch, ranks = partial(backward, model, model, scaler, 10), len(y), Ranks(b.device)
    gradients = Gradients(call, [model], optimizer, scaler, 1.0, ranks, batch, batch)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        randomness = step_randomness(model, batch, moments.shape[3:], b.tra, generator(0, count, device=b.device))
        optimise(model, optimizer, ema, gradients(moments, y, *randomness)[0])
        schedule.step()

    return step


def main(cfg: StepConfig) -> None:
    b = Bench(cfg)
    batch = cfg.batch or (256 if b.gpu else 16)
    model, shape = b.model(), b.latent
    g = torch.Generator(b.device).manual_seed(0)
    z = torch.randn(batch, *shape, generator=g, device=b.device)
    moments = torch.stack([z, 0.1 * torch.ones_like(z)], 1)[:, None].half().contiguous()
    y = torch.randint(2, (batch, 1), generator=g, device=b.device).float()
    with torch.device("meta"):
        meta = torch.empty(1, *shape), torch.empty(1, dtype=torch.int64), torch.empty(1, 1)
    parameters, flops = cost(model.unet, lambda: type(model.unet)(**model.unet.config).to("meta")(*meta))
    print(f"our U-Net: {parameters / 1e6:.2f} M parameters, {flops / 1e9:.2f} GFLOP forward, batch {batch}")

    peers = {name: PeerUNet(b, name) for name in ("diffusers", "MONAI")}
    steps = {"ours": our_step(b, model, moments, y)}
    steps |= {name: partial(peer_step(b, net, name), z, y) for name, net in peers.items()}
    # What conditions cost: two categories and three numbers, against none.
    for name, conditions in (("five conditions", (2, 2, 0, 0, 0)), ("none", ())):
        steps[name] = our_step(b, b.model(conditions), moments, y.repeat(1, 5)[:, : len(conditions)])
    if not cfg.quick:
        twin = b.model()
        twin.unet.forward = torch.compile(twin.unet.forward, dynamic=False)
        steps["ours, compiled"] = our_step(b, twin, moments, y)
        for name in peers:
            net: nn.Module = PeerUNet(b, name)
            net.net = torch.compile(net.net, dynamic=False)
            steps[f"{name}, compiled"] = partial(peer_step(b, net, name), z, y)
    peak, times = matrix_peak(b), b.interleave(steps)
    for name in peers:
        b.compare("U-Net training step, all eager", times, "ours", name, batch)
    b.compare("U-Net training step, ours eager", times, "five conditions", "none", batch)
    if not cfg.quick:
        for name in peers:
            b.compare("U-Net training step, all compiled", times, "ours, compiled", f"{name}, compiled", batch)
        for name in peers:
            b.compare("U-Net training step, ours compiled", times, "ours, compiled", name, batch)
    for name in ("ours", "ours, compiled"):
        if name in times:
            rate = 3 * flops * batch / statistics.median(times[name])
            b.row(f"FLOP/s over matrix peak, {name}", rate / 1e12, "matrix product", peak / 1e12, "TFLOP/s")
    if b.gpu:
        b.row("peak memory, all contenders together", torch.cuda.max_memory_allocated(b.device) / 1e9, "", None, "GB")


if __name__ == "__main__":
    main(tyro.cli(StepConfig, description=__doc__))
