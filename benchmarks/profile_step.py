"""Where a training step goes: torch's profiler over whole iterations of train.py, data included.

    python benchmarks/profile_step.py [--device cuda] [--out FILE]

Prints the share of time in which the GPU is busy (one stream: kernels do not overlap), how often the host waits, and
the operators that take the most.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from common import Bench, BenchConfig, commit
from torch.profiler import ProfilerActivity, profile
from train_epoch import our_iteration

from device import describe_hardware


@dataclass(frozen=True)
class ProfileConfig(BenchConfig):
    """Where a training step goes."""

    batch: int = 0
    """Images in a step. Default: 256 on a GPU, 16 on a CPU."""
    steps: int = 20
    """Steps under the profiler."""
    out: str = ""
    """File for the summary."""


def main(cfg: ProfileConfig) -> None:
    b = Bench(cfg)
    batch = cfg.batch or (256 if b.gpu else 16)
    iteration = our_iteration(b, batch, 4096)
    for _ in range(5):
        iteration()
    b.synchronise()
    start = time.perf_counter()
    for _ in range(cfg.steps):
        iteration()
    b.synchronise()
    alone = (time.perf_counter() - start) / cfg.steps
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * b.gpu) as prof:
        start = time.perf_counter()
        for _ in range(cfg.steps):
            iteration()
        b.synchronise()
        wall = (time.perf_counter() - start) / cfg.steps
    events = prof.key_averages()
    lines = [
        f"{b.preset} U-Net, batch {batch}, {describe_hardware(b.device)}, {time.strftime('%Y-%m-%d')}, code {commit()}",
        f"step {1e3 * alone:.2f} ms; under the profiler {1e3 * wall:.2f} ms",
    ]
    if b.gpu:
        kernels = sum(e.self_device_time_total for e in events) / cfg.steps / 1e6
        waits = sum(e.count for e in events if e.key.startswith("cuda") and e.key.endswith("Synchronize"))
        lines.append(f"GPU busy {kernels / alone:.1%} of a step; {waits / cfg.steps:.2f} waits of the host a step")
    key = "self_device_time_total" if b.gpu else "self_cpu_time_total"
    total = sum(getattr(e, key) for e in events)
    for e in sorted(events, key=lambda e: -getattr(e, key))[:20]:
        lines.append(f"{getattr(e, key) / total:7.1%}  {e.count / cfg.steps:7.1f} calls a step  {e.key[:80]}")
    text = "\n".join(lines) + "\n"
    print(text)
    if cfg.out:
        Path(cfg.out).write_text(text)


if __name__ == "__main__":
    main(tyro.cli(ProfileConfig, description=__doc__))
