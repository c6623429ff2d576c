"""What every file may need: errors, seeds, progress bars, tables."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
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
    """main(cfg); what a person can cause ends in one sentence and exit code 2, not in a traceback."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not fit the terminal's encoding
    try:
        main(cfg)
    except UserError as e:
        sys.exit(_complain(str(e)))
    except KeyboardInterrupt:
        sys.exit(130)
    except torch.OutOfMemoryError:
        batch = getattr(cfg, "batch_size", None) or 64
        by_portions = getattr(cfg, "micro_batch", "auto") != "auto"
        slowly = "--micro-batch auto (the same steps, in portions that fit) or " if by_portions else ""
        sys.exit(_complain(f"the GPU's memory is full: take {slowly}--batch-size {max(1, batch // 2)}"))
    except OSError as e:
        if e.filename is None and e.strerror is None:
            raise
        where = e.filename or "a file"
        sys.exit(_complain(f"{where}: {e.strerror}: mend that or name another folder; what was saved is whole"))


def _complain(sentence: str) -> int:
    rank, sentence = job_ranks()[0], sentence.replace("\n", " ")  # a file may have any name
    print(f"error{f' (rank {rank})' if rank else ''}: {sentence}", file=sys.stderr)
    return 2


def job_ranks() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine), as torchrun or srun say; (0, 1, 0) alone."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):  # a batch script has no SLURM_STEP_NUM_TASKS, srun sets it
            return tuple(int(os.environ[name]) for name in names)
    return 0, 1, 0


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def derive_seed(*numbers: object) -> int:
    """A 63-bit seed from (seed, purpose, index ...): different numbers give independent streams."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def generator(*numbers: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `derive_seed(*numbers)`."""
    return torch.Generator(device).manual_seed(derive_seed(*numbers))


# ---------------------------------------------------------------------------------------------------------------------
# Bars and tables


def progress_bar(total: int, done: int = 0, what: str = "", unit: str = " images") -> tqdm:
    """A bar in images, with images/s and time left; in a log file, where it cannot redraw itself, once a minute."""
    return tqdm(
        total=total, initial=done, desc=what or None, unit=unit, unit_scale=total >= 10_000, dynamic_ncols=True,
        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 60, leave=not what, delay=0.5,
        disable=job_ranks()[0] > 0,
    )  # fmt: skip


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl: numbers, one of them the step. A line that was torn or damaged is left out."""

    def is_row(row: object) -> bool:
        numbers = isinstance(row, dict) and all(
            isinstance(v, float) or (type(v) is int and abs(v) < 2**63) for v in row.values()
        )
        return numbers and isinstance(row.get("step"), int)

    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if is_row(row) else []
    return rows


def read_table(path: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a CSV file in which these columns are filled; UserError says what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # as spreadsheets write it, too
        table = csv.DictReader(io.StringIO(text, newline=""))
        rows, head = list(table), table.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path} is no table of comma-separated values in UTF-8 ({e}): mend or remove it") from None
    if not {*columns} <= {*head}:
        raise UserError(f"{path} needs the columns {','.join(columns)}; it has {repr(head)[1:-1][:100]}")
    for n, row in enumerate(rows, 1):
        if not all(row[c] and "\0" not in row[c] for c in columns):
            raise UserError(f"{path} lacks {' or '.join(columns)} in row {n:,} below the head: mend it")
    return rows


def csv_text(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table as `read_table` reads it."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def is_folder_name(name: object) -> bool:
    """Can a folder of this name be made inside of another, and be one cell of a table in UTF-8?"""
    try:
        plain = isinstance(name, str) and name not in ("", ".", "..") and not {*"/\0\r\n"} & {*name}
        return plain and len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False


def evenly_spaced(n: int, most: int) -> list[int]:
    """At most that many of the indices 0 to n - 1, evenly, both ends in."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int)).tolist()


def git_commit() -> str:
    """The commit of the code, for the record; "unknown" outside a clone."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def __getattr__(name: str) -> Any:
    """Other people's code imports `visualise_denoising_process` from here; it lives in pictures.py now."""
    if name == "visualise_denoising_process":
        return getattr(import_module("pictures"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
