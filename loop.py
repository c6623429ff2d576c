"""What the three trainings share: averaged weights, the optimiser step, the log."""

from __future__ import annotations

import json
import netrc
import os
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from device import fetch_async
from pictures import plot_curves
from utils import UserError, read_jsonl
from weights import write_atomic

if TYPE_CHECKING:
    from config import MachineConfig


def make_ema(model: nn.Module, decay: float) -> torch.optim.swa_utils.AveragedModel:
    """Exponential moving average of the weights; young averages forget faster: min(decay, (1 + n) / (10 + n))."""
    from torch.optim.swa_utils import AveragedModel

    def update(averaged: list[Tensor], current: list[Tensor], n: Tensor) -> None:
        n = n.item()  # it lives on the CPU
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))

    ema = AveragedModel(model, multi_avg_fn=update)
    ema.eval().requires_grad_(False)
    return ema


def optimise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    ema: torch.optim.swa_utils.AveragedModel,
    clip: float,
    rival: nn.Module | None = None,
) -> Tensor:
    """Unscale, clip, step, average: with the gradients that are there. Returns their norm before clipping.

    A `rival` (discriminator) of the same optimiser is clipped by itself, and both step or neither.

    Where it is not finite, no step is taken, in any precision. A fused optimiser skips it by itself, without a wait for
    the GPU; MPS's does not, and so is not used there.
    """
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf")).detach()
    if rival is not None:
        theirs = nn.utils.clip_grad_norm_(rival.parameters(), clip or float("inf"))
        norm = torch.where(theirs.isfinite(), norm, theirs)
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults["fused"]:
        getattr(optimizer, "inner", optimizer).found_inf = 1 - norm.isfinite().float()
        optimizer.step()
    elif norm.isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update_parameters(model)
    return norm


class NonFiniteWatch:
    """Counts steps in a row whose gradients are not finite; says so after `patience`, without waiting for a GPU."""

    def __init__(self, device: torch.device, patience: int = 20):
        self.patience, self.reading = patience, None
        self.count, self.since = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)

    def hopeless(self, norm: Tensor, step: int) -> int:
        """0, or the step that was one too many, up to 20 steps later."""
        self.count = torch.where(norm.isfinite(), 0, self.count + 1)
        self.since = torch.where((self.count == self.patience) & (self.since == 0), step, self.since)
        seen = 0
        if step % 10 == 0:  # what was read ten steps ago has arrived
            seen = int(self.reading()) if self.reading else 0
            self.reading = fetch_async(self.since.clone())
        return seen

    def sentence(self, step: int, epoch: float, folder: Path) -> str:
        """What to tell a person then."""
        return (
            f"the gradients of {self.patience} steps in a row were not finite, up to step {step} (epoch {epoch:.2f}); "
            f"none of them was taken and {folder} keeps the weights before them: start over with --fresh and a smaller "
            "--lr, or with --precision fp32"
        )


def skipped_steps_note(numbers: Mapping[str, float]) -> str:
    """The end of an epoch's line: how many steps were not taken, if any."""
    n = numbers.get("skipped steps", 0)
    return f"  {n:.0f} steps skipped: gradients not finite" if n else ""


def find_micro_batch(
    choice: int | str | None, share: int, model: nn.Module, copies: int, trial: Callable[[int], object]
) -> int:
    """Images that go through the network at a time: `choice`, all `share` of them for None, what fits for "auto".

    `trial(n)` is a step's forward and backward pass of n images; beside it so many copies of the weights find room:
    DDP's buckets and the best weights, and AdamW's moments where they are not there yet.
    """
    if choice != "auto":
        return min(choice or share, share)
    n = share
    while True:
        try:
            room = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
            trial(n)
            del room
            if n < share:
                print(f"--micro-batch auto: {n} images at a time")
            return n
        except torch.OutOfMemoryError:
            room = None
        if n == 1:
            raise UserError("not even one image fits the GPU's memory: take smaller --channels, or a larger GPU")
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        n = -(-n // 2)


# ---------------------------------------------------------------------------------------------------------------------
# The log of a run


class RunLog:
    """Numbers to FOLDER/metrics.jsonl, curves to FOLDER/curves.png, both and pictures to wandb if it works.

    `step` is where the run resumes: rows after it were written by a job that died before it saved, and are dropped.
    wandb can fail at any call: then one line says so and the run goes on without it.
    """

    PATIENCE = 60.0  # seconds

    def __init__(self, folder: Path, cfg: MachineConfig, stage: str, step: int = 0):
        self.folder, self.path, self.wandb = folder, folder / "metrics.jsonl", None
        self.sends_people = cfg.wandb in ("online", "offline")  # somebody asked for it
        self.rows = [r for r in read_jsonl(self.path) if r["step"] <= step] if step else []
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in self.rows).encode())
        if cfg.wandb != "disabled":
            self._guard(lambda: self._start_wandb(cfg, stage))

    def _start_wandb(self, cfg: MachineConfig, stage: str) -> None:
        import wandb

        mode = cfg.wandb
        if mode == "auto":
            mode = "online" if logged_in_to_wandb() else "offline"
        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, uuid.uuid4().hex[:8].encode())
        facts = dict(
            project="Stable-Diffusion-ADNI", name=f"{cfg.run}-{stage}", group=cfg.run, id=id_file.read_text(),
            resume="allow", dir=str(self.folder), config=asdict(cfg),
            settings=wandb.Settings(silent=True, init_timeout=60),
        )  # fmt: skip
        try:
            self.wandb = wandb.init(mode=mode, **facts)
        except Exception as e:
            if mode == "offline":
                raise
            reason = next(iter(str(e).splitlines()), "")
            print(f"wandb cannot be reached and logs offline: wandb sync later ({reason})", file=sys.stderr)
            self.wandb = wandb.init(mode="offline", **facts)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as e:
            self.wandb = None
            reason = next(iter(str(e).splitlines()), "")
            print(f"wandb is off for the rest of this run ({type(e).__name__}: {reason})", file=sys.stderr)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Append numbers at a step."""
        row = {"step": step, **{k: round(float(v), 8) for k, v in row.items()}}
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            self._guard(lambda: self.wandb.log(row, step=step))

    def picture(self, step: int, name: str, path: Path, people: bool = False) -> None:
        """Show a picture file in wandb; one with slices of `people` in it only if wandb was asked for by name."""
        if self.wandb is not None and (self.sends_people or not people):
            import wandb

            kind = wandb.Video if path.suffix == ".gif" else wandb.Image
            self._guard(lambda: self.wandb.log({name: kind(str(path))}, step=step))

    def plot(self) -> None:
        """Redraw FOLDER/curves.png."""
        plot_curves(self.rows, self.folder / "curves.png")

    def close(self) -> None:
        """End the wandb run; a server that does not answer is waited for a minute."""
        if self.wandb is not None:
            ending = threading.Thread(target=self._guard, args=(self.wandb.finish,), daemon=True)
            ending.start()
            ending.join(self.PATIENCE)
            if ending.is_alive():
                print("wandb does not come to an end and is left behind: wandb sync later", file=sys.stderr)


def logged_in_to_wandb() -> bool:
    """Is there a key in the environment or in ~/.netrc, where `wandb login` puts it? Opens no connection."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].strip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
