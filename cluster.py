"""Many processes as one: ranks that share a step, the lock of a run's folder, signals, resuming."""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UserError, derive_seed, job_ranks

if TYPE_CHECKING:
    from config import LoopConfig

T = TypeVar("T")


class Ranks:
    """The processes of a job, started by torchrun, by srun, or one alone, for which everything here costs nothing.

    A step is the same whatever their number: all draw the randomness of the whole batch and each takes its rows. Rank 0
    alone writes and prints. Gradients travel by NCCL between GPUs; counts, signals and what lies on the host by Gloo.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size, _ = job_ranks()
        self.main, self.device, self.host = self.rank == 0, device, None
        if self.size == 1:
            return
        if not self.main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        if "MASTER_ADDR" not in os.environ:  # srun: the first node of the job, a port of its own for every step
            ask = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
            nodes = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
            os.environ["MASTER_ADDR"] = nodes[0]
            job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
            os.environ["MASTER_PORT"] = str(20_000 + (97 * job + step) % 20_000)
        nccl = device.type == "cuda"
        dist.init_process_group("nccl" if nccl else "gloo", rank=self.rank, world_size=self.size)
        self.host = dist.new_group(backend="gloo") if nccl else dist.group.WORLD

    def alone(self, call: Callable[[], T]) -> T | None:
        """call() on rank 0, None elsewhere; where it cannot be done, all leave."""
        result = problem = None
        if self.main:
            try:
                result = call()
            except (UserError, OSError) as e:
                problem = e
        if self.sum(torch.tensor(float(problem is not None))):
            raise problem or SystemExit(2)
        return result

    def first(self, call: Callable[[], T]) -> T:
        """call(), on rank 0 before the others, who find what it put right on disk."""
        result = self.alone(call)
        return result if self.main else call()

    def fail(self, sentence: str) -> NoReturn:
        """Leave with this sentence, said once, when rank 0 has saved."""
        self.barrier()
        raise UserError(sentence) if self.main else SystemExit(2)

    def open(self, cfg: LoopConfig, stage: str) -> Path:
        """The folder of a stage of the run, locked and put in order by rank 0."""
        folder = Path(cfg.checkpoints) / cfg.run / stage

        def prepare() -> None:
            self.lock = RunLock(folder)
            open_run(cfg, stage)

        self.alone(prepare)
        return folder

    def check_same(self, *facts: object) -> None:
        """UserError where the ranks do not see the same (data, step ...): their disks are not shared."""
        number = derive_seed(*facts) % 2**20
        total, squares = self.sum(torch.tensor([number, number**2], dtype=torch.float64)).tolist()
        if squares * self.size != total**2:
            raise UserError("the ranks do not find the same data and checkpoints: both must lie on a disk they share")

    def rows(self, batch: int) -> slice:
        """This rank's rows of a batch, at least one."""
        if batch < self.size:
            raise UserError(f"--batch-size {batch} does not reach {self.size} ranks: take a larger one, or fewer ranks")
        return self.share(batch)

    def share(self, n: int) -> slice:
        """This rank's of n things, in one piece; pieces differ by one at most, and rank 0 is never without."""
        return slice(-(-self.rank * n // self.size), -(-(self.rank + 1) * n // self.size))

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model as the step calls it: its backward pass averages gradients over the ranks."""
        if self.size == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def portions(
        self, batch: int, micro: int, *networks: nn.Module
    ) -> Iterator[tuple[slice, float, AbstractContextManager]]:
        """This rank's rows of a batch, at most `micro` at a time: (rows of its share, weight, context of the pass).

        The weights make gradients of a portion's mean loss add up to those of the batch's; they travel with the last.
        """
        share = self.share(batch)
        n = share.stop - share.start
        for start in range(0, n, micro):
            rows = slice(start, min(start + micro, n))
            passing = ExitStack()
            if self.size > 1 and rows.stop < n:
                for network in networks:
                    passing.enter_context(network.no_sync())
            yield rows, (rows.stop - start) * self.size / batch, passing

    def sum(self, x: Tensor) -> Tensor:
        """x summed over the ranks, in place, where it is."""
        if self.size > 1:
            dist.all_reduce(x, group=None if x.is_cuda else self.host)
        return x

    def any(self, flag: object, step: int) -> bool:
        """Is the flag set on some rank? Asked of each other at every tenth step, with one answer for all."""
        if self.size == 1:
            return bool(flag)
        return step % 10 == 0 and bool(self.sum(torch.tensor(int(bool(flag)))))

    def cuts(self, n: int, batch: int) -> list[int]:
        """Where n rows are cut so that each rank has its share of the batches: rank r has cuts[r] to cuts[r + 1]."""
        steps = -(-n // batch)
        return [min(n, batch * -(-r * steps // self.size)) for r in range(self.size + 1)]

    def complete(self, rows: Tensor, cuts: list[int]) -> None:
        """Give each other the rows [cuts[r], cuts[r + 1]) that rank r holds; `rows` lies on the host."""
        for r in range(self.size if self.size > 1 else 0):
            if cuts[r] < cuts[r + 1]:
                dist.broadcast(rows[cuts[r] : cuts[r + 1]].view(torch.uint8), r, group=self.host)

    def barrier(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            dist.barrier(group=self.host)

    def close(self) -> None:
        """Leave together: a launcher that sees one leave early ends the others."""
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# A run: its lock, its folder, its end


class RunLock:
    """One job at a time works on a stage of a run: RUN/<stage>.lock says which.

    The system's lock on that file ends with its process, however that dies. For file systems that do not carry locks
    between machines there is a heartbeat: the record of another machine counts for two minutes after its last beat,
    unless it is this very Slurm job, started again elsewhere.
    """

    BEAT = 20.0  # seconds

    def __init__(self, folder: Path):
        self.path = folder.with_name(f"{folder.name}.lock")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        me = {
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "pid": os.getpid(), "boot": boot_id(),
            "job": os.environ.get("SLURM_JOB_ID", ""), "start": os.environ.get("SLURM_RESTART_COUNT", "0"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }  # fmt: skip
        held, locks = False, True
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        except OSError:  # a file system without locks: the heartbeat alone
            locks = False
        try:
            other = json.loads(os.pread(self.file, 4096, 0))
            who = f"process {other['pid']} on {other['host']}{f', job {j}' if (j := other['job']) else ''}"
        except (ValueError, KeyError, TypeError):  # empty: the last one left in good order
            other, who = {}, "another process"
        age = time.time() - os.fstat(self.file).st_mtime
        beats = other and age < 6 * self.BEAT and (other.get("boot") != me["boot"] or not locks)
        requeued = me["job"] and other.get("job") == me["job"] and other.get("start") != me["start"]
        if held or (beats and not requeued):
            os.close(self.file)
            ago = f", last seen {age:.0f} s ago" if not held else ""
            raise UserError(
                f"{folder} is being worked on by {who}, since {other.get('since', 'just now')}{ago}: wait for it, stop "
                "it, or take another --run"
            )
        if other:
            print(f"taking over {folder} from {who}, which is gone")
        try:
            os.ftruncate(self.file, 0)
            os.pwrite(self.file, json.dumps(me).encode(), 0)
        except OSError as e:
            e.filename = str(self.path)
            raise
        self.left = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        atexit.register(self.release)

    def _beat(self) -> None:
        while not self.left.wait(self.BEAT):
            with suppress(OSError):  # a file server that is away for a moment
                os.utime(self.path)

    def release(self) -> None:
        """Empty the record and let go."""
        if not self.left.is_set():
            self.left.set()
            with suppress(OSError):  # the record then says who is gone
                os.ftruncate(self.file, 0)
            os.close(self.file)


def boot_id() -> str:
    """Which machine this is, since it was started; containers may share a host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def open_run(cfg: LoopConfig, stage: str) -> Path:
    """The folder CHECKPOINTS/RUN/<stage>, writable and tidy. --fresh moves an older one aside."""
    folder = Path(cfg.checkpoints) / cfg.run / stage
    if cfg.fresh and folder.exists():
        old = folder.parent / f"old-{time.strftime('%Y%m%d-%H%M%S')}" / stage
        old.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, old)
        print(f"the old {stage} run is now in {old}")
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.rglob(".*.tmp"):  # of a job that was killed while it wrote
        torn.unlink()
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written: choose another --checkpoints folder")
    return folder


# What may differ between the two commands of one run; anything else would make the resumed run a mixture of two.
FREE_TO_CHANGE = {
    "epochs", "device", "wandb", "cache", "checkpoints", "save_minutes", "fresh", "dry_run", "gif_every",
    "sample_every", "data", "micro_batch", "adversarial",
}  # fmt: skip


def check_same_run(cfg: LoopConfig, data: str, state: dict, folder: Path) -> None:
    """UserError if this command would continue a run that was started with other settings or on other data."""
    old, new = state["config"], asdict(cfg)
    changed = [k for k in new if k not in FREE_TO_CHANGE and old.get(k) != new[k]]
    if changed:
        was = ", ".join(f"{k} {old.get(k)} -> {new[k]}" for k in changed)
        raise UserError(f"{folder} was started with other settings ({was}): use those, another --run, or --fresh")
    if state["data"] != data:
        raise UserError(f"{folder} was started on other slices than {cfg.data} now holds: use another --run or --fresh")


class StopSignal:
    """True once SIGTERM, SIGUSR1 or Ctrl-C arrived: the loop then finishes its step, saves and leaves.

    Made first of all, so that a signal during the start is not lost. Ctrl-C leaves at once before `begin`, and when it
    comes again. After `end` all is saved, and no signal may change the exit code.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.name = ""
        for s in self.NUMBERS[:2]:
            signal.signal(s, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own could not interrupt the wait for other ranks

    def begin(self) -> None:
        """From here on there is something to save."""
        signal.signal(signal.SIGINT, self._stop)

    def end(self) -> None:
        """Nothing is left to do but to leave."""
        for s in self.NUMBERS:
            signal.signal(s, signal.SIG_IGN)  # which, unlike a handler, outlives the interpreter

    def _stop(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.name)


def leave_early(stop: StopSignal, epoch: float) -> NoReturn:
    """Say how to go on after a signal, and exit: 130 after Ctrl-C, else 75 (EX_TEMPFAIL: saved, not finished)."""
    name = stop.name or "a signal to another rank"
    print(f"stopped by {name} and saved at epoch {epoch:.2f}: the same command goes on from there", flush=True)
    sys.exit(130 if name == "SIGINT" else 75)
