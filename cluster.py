"""Many processes as one training, the lock of a run's folder, and signals.

Ranks are processes that share each step; torchrun or srun starts them. What a run saves and logs is in loop.py.
"""

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
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UserError, derive_seed, job_ranks

T = TypeVar("T")


class Ranks:
    """The processes of a job that was started by torchrun or srun. A process alone is rank 0 of 1 and pays nothing.

    A step is the same whatever the number of ranks: every rank samples the randomness of the whole batch and uses its
    own rows. Rank 0 alone writes and prints. Gradients travel by NCCL between GPUs; counts, flags and tensors on the
    host travel by Gloo.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size, _ = job_ranks()
        self.is_main, self.device = self.rank == 0, device
        self.host: Any = None  # the process group for what lies on the host
        if self.size == 1:
            return
        if not self.is_main:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        # srun tells no address: take the first node of the job, and a port that no other step of a job is likely to use
        if "MASTER_ADDR" not in os.environ:
            ask = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
            nodes = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
            os.environ["MASTER_ADDR"] = nodes[0]
            job, step = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])
            os.environ["MASTER_PORT"] = str(20_000 + (97 * job + step) % 20_000)
        # NCCL knows only GPUs, so a second group carries what lies on the host.
        nccl = device.type == "cuda"
        dist.init_process_group("nccl" if nccl else "gloo", rank=self.rank, world_size=self.size)
        self.host = dist.new_group(backend="gloo") if nccl else dist.group.WORLD

    # Rank 0 acts, the others wait

    def run_on_rank0(self, call: Callable[[], T]) -> T | None:
        """Run `call` on rank 0 only and return its result there, None elsewhere.

        If it raises UserError or OSError, every rank exits: rank 0 with that error, the others with code 2.
        """
        result = problem = None
        if self.is_main:
            try:
                result = call()
            except (UserError, OSError) as e:
                problem = e
        # All ranks learn here whether rank 0 failed; otherwise they would wait for it forever.
        if self.sum(torch.tensor(float(problem is not None))):
            raise problem or SystemExit(2)
        return result

    def rank0_first(self, call: Callable[[], T]) -> T:
        """Run `call` on every rank, on rank 0 before the others, so that they find on disk what it repaired there."""
        result = self.run_on_rank0(call)
        return result if self.is_main else call()  # type: ignore[return-value]

    def fail(self, sentence: str) -> NoReturn:
        """End all ranks, once rank 0 has arrived here: rank 0 with this sentence, the others with code 2."""
        self.barrier()
        raise UserError(sentence) if self.is_main else SystemExit(2)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            dist.barrier(group=self.host)

    def close(self) -> None:
        """Leave together: a launcher that sees one rank leave early ends the others."""
        if self.size > 1:
            self.barrier()
            dist.destroy_process_group()

    # Who does what

    def share(self, n: int) -> slice:
        """This rank's contiguous share of n things. Shares differ by one at most, and rank 0 is never without."""
        return slice(-(-self.rank * n // self.size), -(-(self.rank + 1) * n // self.size))

    def batch_rows(self, batch: int) -> slice:
        """This rank's rows of a batch. UserError if a rank would be left without any."""
        if batch < self.size:
            raise UserError(
                f"--batch-size {batch} is less than the {self.size} ranks: take a larger one or fewer ranks"
            )
        return self.share(batch)

    def row_bounds(self, n: int, batch: int) -> list[int]:
        """Bounds that split n rows among the ranks in whole batches: rank r has rows bounds[r] to bounds[r + 1]."""
        steps = -(-n // batch)
        return [min(n, batch * -(-r * steps // self.size)) for r in range(self.size + 1)]

    def micro_batches(
        self, batch: int, micro: int, *networks: Any
    ) -> Iterator[tuple[slice, float, AbstractContextManager]]:
        """Split this rank's rows of a batch into micro-batches: yields (rows of its share, loss weight, context).

        With these weights the gradients of the micro-batches' mean losses add up to the gradient of the batch's mean
        loss. Forward and backward run inside the context, which lets DDP exchange gradients in the last one only;
        `networks` are what `wrap_ddp` returned.
        """
        share = self.share(batch)
        n = share.stop - share.start
        for start in range(0, n, micro):
            rows = slice(start, min(start + micro, n))
            context = self.no_sync(*networks if rows.stop < n else ())
            yield rows, (rows.stop - start) * self.size / batch, context

    def no_sync(self, *networks: Any) -> ExitStack:
        """A context in which the backward passes of networks from `wrap_ddp` exchange no gradients."""
        context = ExitStack()
        for network in networks if self.size > 1 else ():
            context.enter_context(network.no_sync())
        return context

    def wrap_ddp(self, model: nn.Module) -> nn.Module:
        """The model to call in a step: with several ranks, its backward pass averages the gradients over them."""
        if self.size == 1:
            return model
        ids = [self.device] if self.device.type == "cuda" else None
        # No buffer ever differs between ranks, so none is sent.
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False
        )

    # What the ranks tell each other

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place, on whichever device it is; returns x."""
        if self.size > 1:
            dist.all_reduce(x, group=None if x.is_cuda else self.host)
        return x

    def any_rank(self, flag: object, step: int) -> bool:
        """Is the flag set on any rank? The ranks ask each other at every tenth step only; all get the same answer."""
        if self.size == 1:
            return bool(flag)
        return step % 10 == 0 and bool(self.sum(torch.tensor(int(bool(flag)))))

    def check_same(self, *facts: object) -> None:
        """UserError if the ranks do not hold the same facts (data, step ...), that is, if they do not share a disk."""
        # For equal numbers, and only for them, size * (sum of squares) is (sum) squared. float64 holds both exactly.
        number = derive_seed(*facts) % 2**20
        total, squares = self.sum(torch.tensor([number, number**2], dtype=torch.float64)).tolist()
        if squares * self.size != total**2:
            raise UserError("the ranks do not find the same data and checkpoints: both must lie on a disk they share")

    def all_gather_rows(self, rows: Tensor, bounds: list[int]) -> None:
        """Fill `rows`, a tensor on the host, on every rank: rank r holds rows bounds[r] to bounds[r + 1]."""
        # As bytes, because Gloo does not know every dtype.
        for r in range(self.size if self.size > 1 else 0):
            if bounds[r] < bounds[r + 1]:
                dist.broadcast(rows[bounds[r] : bounds[r + 1]].view(torch.uint8), r, group=self.host)


# ---------------------------------------------------------------------------------------------------------------------
# The lock of a run, and its end


class RunLock:
    """Lets one job at a time work on a stage of a run. UserError if another one does; RUN/<stage>.lock names it.

    The operating system's lock on that file ends with its process, however the process ends. Some file systems do not
    carry locks from one machine to another, so the holder also touches the file every 20 s. The record of another
    machine counts for two minutes after the last touch, unless it is of this same Slurm job, requeued to this machine.
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

        # Take the system's lock.
        held, locks = False, True
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = True
        except OSError:  # a file system without locks: only the heartbeat counts
            locks = False

        # A record stays behind when its process was killed, so it counts only while it is being touched.
        # Read who holds the run, or held it last, and decide whether that still counts.
        try:
            other = json.loads(os.pread(self.file, 4096, 0))
            who = f"process {other['pid']} on {other['host']}{f', job {j}' if (j := other['job']) else ''}"
        except (ValueError, KeyError, TypeError):  # empty: the last holder released it
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

        # Take over: write our own record, and keep touching it.
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
            with suppress(OSError):  # a file server that does not answer for a moment
                os.utime(self.path)

    def release(self) -> None:
        """Empty the record and unlock."""
        if not self.left.is_set():
            self.left.set()
            with suppress(OSError):  # then the next job finds the record and takes over
                os.ftruncate(self.file, 0)
            os.close(self.file)


def boot_id() -> str:
    """Identify this machine since its last start. Containers may share a host name, so that is not enough."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


class StopSignal:
    """True once SIGTERM, SIGUSR1 or Ctrl-C arrived: the loop then finishes its step, saves and leaves.

    Create it first of all, so that a signal that arrives during the start is not lost. Before `begin`, and when it is
    pressed a second time, Ctrl-C ends the process at once. After `end` signals are ignored: all is saved, and they must
    not change the exit code.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.name = ""  # of the first signal
        for s in self.NUMBERS[:2]:
            signal.signal(s, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler cannot interrupt the wait for other ranks

    def begin(self) -> None:
        """From here on there is something to save, so Ctrl-C saves first."""
        signal.signal(signal.SIGINT, self._stop)

    def end(self) -> None:
        """All is saved: ignore further signals."""
        for s in self.NUMBERS:
            signal.signal(s, signal.SIG_IGN)  # unlike a handler of our own, this holds until the process is gone

    def _stop(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.name:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return bool(self.name)


def leave_early(stop: StopSignal, epoch: float) -> NoReturn:
    """Say how to go on, and exit: with 130 after Ctrl-C, else with 75 (EX_TEMPFAIL: saved, not finished)."""
    name = stop.name or "a signal to another rank"
    print(f"stopped by {name} and saved at epoch {epoch:.2f}: the same command goes on from there", flush=True)
    sys.exit(130 if name == "SIGINT" else 75)
