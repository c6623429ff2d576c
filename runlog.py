"""The log of a run: metrics.jsonl, curves.png, and Weights & Biases where it works."""

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

from pictures import plot_curves
from utils import read_jsonl
from weights import write_atomic

if TYPE_CHECKING:
    from config import MachineConfig


class NullLog:
    """A run log that keeps nothing, for the ranks that write nothing."""

    rows: list[dict[str, Any]] = []

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Append numbers at a step."""

    def picture(self, step: int, name: str, path: Path, people: bool = False) -> None:
        """Show a picture file in wandb; one that shows slices of `people` only if wandb was asked for by name."""

    def plot(self) -> None:
        """Plot all numbers to FOLDER/curves.png."""

    def close(self) -> None:
        """End the wandb run. A server that does not answer is waited for a minute, then left behind."""


class RunLog(NullLog):
    """Writes numbers to FOLDER/metrics.jsonl and curves to FOLDER/curves.png, and sends both and pictures to wandb.

    `step` is where the run resumes: rows after it come from a job that died before it saved, and are dropped. wandb can
    fail at any call: then one line says so and the run goes on without it.
    """

    PATIENCE = 60.0  # seconds that `close` waits for wandb

    def __init__(self, folder: Path, cfg: MachineConfig, stage: str, step: int = 0):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.wandb: Any = None
        self.sends_people = cfg.wandb in ("online", "offline")  # asked for by name, not by `auto`
        self.rows = [r for r in read_jsonl(self.path) if r["step"] <= step] if step else []
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in self.rows).encode())
        if cfg.wandb != "disabled":
            self._guard(lambda: self._start_wandb(cfg, stage))

    def _start_wandb(self, cfg: MachineConfig, stage: str) -> None:
        import wandb

        mode = cfg.wandb
        if mode == "auto":
            mode = "online" if logged_in_to_wandb() else "offline"
        elif mode == "online" and not logged_in_to_wandb():  # wandb would ask, and wait for an answer
            print("nobody is logged in to wandb, so it logs offline: wandb login, then wandb sync", file=sys.stderr)
            mode = "offline"
        # The id is kept beside the log, so that a resumed run goes on in the same wandb run.
        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            write_atomic(id_file, uuid.uuid4().hex[:8].encode())
        facts: dict[str, Any] = dict(
            project="Stable-Diffusion-ADNI", name=f"{cfg.run}-{stage}", group=cfg.run, id=id_file.read_text(),
            resume="allow", dir=str(self.folder), config=asdict(cfg),
            settings=wandb.Settings(silent=True, init_timeout=60),
        )  # fmt: skip
        # A server that cannot be reached must not stop a training: log offline then.
        try:
            self.wandb = wandb.init(mode=mode, **facts)
        except Exception as e:
            if mode == "offline":
                raise
            reason = next(iter(str(e).splitlines()), "")
            print(f"wandb cannot be reached and logs offline: run wandb sync later ({reason})", file=sys.stderr)
            self.wandb = wandb.init(mode="offline", **facts)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as e:
            self.wandb = None
            reason = next(iter(str(e).splitlines()), "")
            print(f"wandb is off for the rest of this run ({type(e).__name__}: {reason})", file=sys.stderr)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        # On disk first: wandb may fail.
        row = {"step": step, **{k: round(float(v), 8) for k, v in row.items()}}
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            self._guard(lambda: self.wandb.log(row, step=step))

    def picture(self, step: int, name: str, path: Path, people: bool = False) -> None:
        if self.wandb is not None and (self.sends_people or not people):
            import wandb

            kind = wandb.Video if path.suffix == ".gif" else wandb.Image
            self._guard(lambda: self.wandb.log({name: kind(str(path))}, step=step))

    def plot(self) -> None:
        plot_curves(self.rows, self.folder / "curves.png")

    def close(self) -> None:
        if self.wandb is not None:
            # In a thread, because wandb has no time limit of its own here.
            ending = threading.Thread(target=self._guard, args=(self.wandb.finish,), daemon=True)
            ending.start()
            ending.join(self.PATIENCE)
            if ending.is_alive():
                print("wandb does not finish and is left behind: run wandb sync later", file=sys.stderr)


def logged_in_to_wandb() -> bool:
    """Is there a wandb key in the environment, or in ~/.netrc where `wandb login` puts it? Opens no connection."""
    # The two places where wandb itself looks
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].strip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
