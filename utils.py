"""What any file may need: errors that people can put right, seeds, progress bars, tables.

The device is in device.py, files in weights.py, pictures in pictures.py.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm


class UserError(Exception):
    """Something a person can put right: one sentence that says what is wrong, where, and what to do."""


def run_script(main: Callable[[Any], None], cfg: Any) -> None:
    """Run main(cfg). Errors people can cause end in one sentence on stderr and exit code 2, bugs in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not fit the terminal's encoding
    signal.signal(signal.SIGINT, signal.default_int_handler)  # config.parse put its own there while torch was imported
    try:
        main(cfg)
        sys.stdout.flush()
    except BrokenPipeError:  # of `| head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except UserError as e:
        sys.exit(_complain(str(e)))
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        batch = getattr(cfg, "batch_size", None) or 64
        splits = getattr(cfg, "micro_batch", "auto") != "auto"
        smaller = "--micro-batch auto (the same steps with fewer images at a time) or " if splits else ""
        sys.exit(_complain(f"the GPU's memory is full: take {smaller}--batch-size {max(1, batch // 2)}"))
    except OSError as e:
        if e.filename is None and e.strerror is None:  # raised by code and not by the system: a bug
            raise
        where = e.filename or "a file"
        sys.exit(
            _complain(f"{where}: {e.strerror}: fix this or choose another folder; existing checkpoints are intact")
        )


def _complain(sentence: str) -> int:
    """Print an error as one line on stderr and return the exit code for it."""
    rank, sentence = job_ranks()[0], sentence.replace("\n", " ")  # file names may hold line breaks
    print(f"error{f' (rank {rank})' if rank else ''}: {sentence}", file=sys.stderr)
    return 2


def job_ranks() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine) as torchrun or srun set them; (0, 1, 0) without either."""
    # SLURM_STEP_NUM_TASKS is set by srun only: a batch script outside of srun is one process.
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            rank, size, local = (int(os.environ[name]) for name in names)
            return rank, size, local
    return 0, 1, 0


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def derive_seed(*numbers: object) -> int:
    """A 63-bit seed from (seed, purpose, index ...), so that different numbers give independent random streams.

    PyTorch's generator on a CPU takes 32 bits of it: of n streams about n^2 / 2^33 pairs are the same. Image k begins
    with the stream (seed, k), so a new purpose needs a third number.
    Purposes in use: pre_train.py 1 and 2; train.py 3 to 7, 9 and 19; evaluate.py 8; evidence.py 9, 10, 20 and 21;
    distil.py 11 to 15 and 17; conditions.py 16; vae.py 18; texture.py 22 to 25. They never change, or runs could not
    be resumed.
    """
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def generator(*numbers: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `derive_seed(*numbers)`."""
    return torch.Generator(device).manual_seed(derive_seed(*numbers))


# ---------------------------------------------------------------------------------------------------------------------
# Bars and tables


def progress_bar(total: int, done: int = 0, what: str = "", unit: str = " images") -> tqdm:
    """A bar with images/s and time left, on rank 0. In a log file, where it cannot redraw itself, one line a minute."""
    # Smoothing over about 20 updates: a speed that follows every step cannot be read.
    return tqdm(
        total=total, initial=done, desc=what or None, unit=unit, unit_scale=total >= 10_000, dynamic_ncols=True,
        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 60, leave=not what, delay=0.5,
        disable=job_ranks()[0] > 0,
    )  # fmt: skip


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl, each {"step": int, name: number ...}. Lines that are torn or damaged are left out."""

    def is_row(row: object) -> bool:
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            return False
        return all(isinstance(v, float) or (type(v) is int and abs(v) < 2**63) for v in row.values())

    rows = []
    # A job that was killed can leave half a line at the end.
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if is_row(row) else []
    return rows


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a CSV file as {column: text}. UserError if one of these columns is missing or not filled in a row."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that spreadsheets put first
        table = csv.DictReader(io.StringIO(text, newline=""))
        rows, head = list(table), table.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} is no table of comma-separated values in UTF-8 ({e}): fix or remove it") from None
    if not {*columns} <= {*head}:
        raise UserError(f"{path} needs the columns {','.join(columns)}; it has {repr(head)[1:-1][:100]}")
    for n, row in enumerate(rows, 1):
        if not all(row[c] and "\0" not in row[c] for c in columns):
            raise UserError(f"{path} lacks {' or '.join(columns)} in row {n:,} below the head: fill it in")
    return rows


def csv_text(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """The text of a CSV file with this head and these rows, as `read_table` reads it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def is_folder_name(name: object) -> bool:
    """Is this the name of a folder, not a path, and can it be written into a table in UTF-8?"""
    try:
        if not isinstance(name, str) or name in ("", ".", "..") or {*"/\0\r\n"} & {*name}:
            return False
        return len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False


def evenly_spaced(n: int, most: int) -> list[int]:
    """At most `most` of the indices 0 to n - 1, evenly spaced, both ends included."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int)).tolist()


def stratified(n: int, count: int, seed: int) -> np.ndarray:
    """`count` of the indices 0 to n - 1, ascending: one at random of each of `count` equal parts.

    Where the order means something, as people and levels in a list of slices, so few are spread as the whole is. If
    `count` exceeds n, each index comes about equally often.
    """
    edges = np.arange(count + 1) * n // count
    size = np.maximum(np.diff(edges), 1)
    return edges[:-1] + (np.random.default_rng(seed).random(count) * size).astype(int)


def git_commit() -> str:
    """The short hash of the commit of this code; "unknown" outside of a git clone."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def __getattr__(name: str) -> Any:
    """Other people's code imports `visualise_denoising_process` from here; it lives in pictures.py now."""
    if name == "visualise_denoising_process":
        return getattr(import_module("pictures"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
