"""What every loop shares: errors, device, precision, seeds, averaged weights, files that are whole, logs, pictures."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import netrc
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from config import MachineConfig

FORMAT = 1  # of the weight files; raised when old files can no longer be read
STATE_FORMAT = 3  # of last.pt, likewise


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


# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, seeds


def job_ranks() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine), as torchrun or srun say; (0, 1, 0) alone."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):  # a batch script has no SLURM_STEP_NUM_TASKS, srun sets it
            return tuple(int(os.environ[name]) for name in names)
    return 0, 1, 0


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then CPU; a device that is not there is a UserError. Each rank takes its own GPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        device = torch.device("cuda", job_ranks()[2] % torch.cuda.device_count())  # Slurm may show a rank its GPU alone
        torch.cuda.set_device(device)
        return device
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not available here: {str(e).splitlines()[0]}") from None
    return device


def pick_amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Autocast's dtype, None for float32. `auto`: bf16 where the hardware computes in it, else fp16 on CUDA."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: take fp32, bf16 or auto on a CPU")
    if precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # private, but the only way to ask
        return torch.bfloat16 if has_bf16() else None
    return None


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    """The one place where precision is chosen: autocast to dtype on x's device, nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype)


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed from (seed, purpose, index ...): different numbers give independent streams."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "big") >> 1


def generator(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `derive_seed(*numbers)`."""
    return torch.Generator(device).manual_seed(derive_seed(*numbers))


def compile_networks(
    choice: str, networks: Sequence[nn.Module], trial: Callable[[], object], device: torch.device
) -> bool:
    """torch.compile the forward passes in place, and say whether it was done.

    choice "on", "off", or "auto": on a GPU (on a CPU a minute of compiling gains a few percent, docs/speed.md). `trial`
    calls the networks as they will be called, so that what cannot be compiled shows itself here: then one line says so,
    and they stay as they were.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    start = time.time()
    for network in networks:
        network.forward = torch.compile(network.forward, dynamic=False)
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        for network in networks:
            del network.forward
        reason = next((line for line in str(e).splitlines() if line.strip()), "")[:160]
        print(f"torch.compile cannot be used here, going on without ({type(e).__name__}: {reason})", file=sys.stderr)
        return False
    print(f"compiled in {time.time() - start:.0f} s")
    return True


class Replay:
    """call(*tensors) -> tensors, recorded once as a CUDA graph: replayed, it is one launch instead of thousands.

    `call` must not wait for the GPU; inputs keep the shapes of `example`. The next call overwrites the outputs.
    """

    def __init__(self, call: Callable[..., tuple[Tensor, ...]], *example: Tensor):
        self.inputs = [x.clone() for x in example]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries choose their kernels and take their workspaces before recording
            for _ in range(3):
                call(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = call(*self.inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for mine, x in zip(self.inputs, inputs):
            mine.copy_(x, non_blocking=True)
        self.graph.replay()
        return self.outputs


# ---------------------------------------------------------------------------------------------------------------------
# Rows of big tensors, without waiting


def fit(data: Tensor, device: torch.device) -> Tensor:
    """On a GPU where it takes less than a quarter of the memory that is free there; else where it is."""
    room = torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else 0
    return data.to(device) if data.nbytes < room else data


def empty_anywhere(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Memory for that many numbers; a nameless file in `folder`, mapped, where it takes over half of the machine's."""
    size = int(np.prod(shape)) * dtype.itemsize
    if size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        return torch.empty(*shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as f:
        f.truncate(size)
        return torch.from_numpy(np.memmap(f, np.uint8, mode="r+")).view(dtype).view(*shape)


def shuffled(n: int, batch: int, step: int, *seed: int) -> Iterator[Tensor]:
    """int64 [batch] for step, step + 1, ...: each epoch of n // batch steps has its permutation, by (*seed, epoch)."""
    epoch, place = divmod(step, n // batch)
    while True:
        order = torch.randperm(n, generator=generator(*seed, epoch))
        yield from order.split(batch)[place : n // batch]
        epoch, place = epoch + 1, 0


def visit(tensors: Sequence[Tensor], order: Iterable[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """[t[index] for t in tensors] on the device, for every index [B] of `order`.

    From the host to a GPU they come by a thread that gathers the next ones into page-locked memory meanwhile.
    """
    if device.type != "cuda":
        for index in order:
            yield [t[index].to(device) for t in tensors]
    elif tensors[0].is_cuda:
        for index in order:
            index = index.pin_memory().to(device, non_blocking=True)
            yield [t[index] for t in tensors]
    else:
        for parts in read_ahead(lambda index: [t[index].pin_memory() for t in tensors], order):
            yield [p.to(device, non_blocking=True) for p in parts]


def read_ahead(make: Callable[[Any], Any], items: Iterable[Any], depth: int = 3) -> Iterator[Any]:
    """map(make, items) in order, by one thread that stays up to `depth` ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fetch(x: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy x to the host; the call that comes back waits for that alone, not for what is queued after it."""
    if not x.is_cuda:
        return x.cpu().numpy
    host, done = x.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def wait() -> np.ndarray:
        done.synchronize()
        return host.numpy()

    return wait


# ---------------------------------------------------------------------------------------------------------------------
# Averaged weights


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


class Watch:
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
            self.reading = fetch(self.since.clone())
        return seen

    def sentence(self, step: int, epoch: float, folder: Path) -> str:
        """What to tell a person then."""
        return (
            f"the gradients of {self.patience} steps in a row were not finite, up to step {step} (epoch {epoch:.2f}); "
            f"none of them was taken and {folder} keeps the weights before them: start over with --fresh and a smaller "
            "--lr, or with --precision fp32"
        )


def skipped(numbers: Mapping[str, float]) -> str:
    """The end of an epoch's line: how many steps were not taken, if any."""
    n = numbers.get("skipped steps", 0)
    return f"  {n:.0f} steps skipped: gradients not finite" if n else ""


def fit_micro_batch(
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
# Files that are whole


def write_atomic(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Write beside, flush to disk, then rename: a reader finds the old file or the new one, never a part of one.

    `keep` is the name under which the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the names, too, outlive a power cut
        finally:
            os.close(folder)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        e.filename = str(path)
        raise


def save_state(path: Path, state: dict) -> None:
    """Everything resuming needs, by torch.save; the state before it stays as `*.prev.pt` until the next write."""
    buffer = io.BytesIO()  # serialised in memory, so that a full disk is met by write_atomic alone
    torch.save({"format": STATE_FORMAT, **state}, buffer)
    write_atomic(path, buffer.getvalue(), keep=path.with_suffix(".prev.pt"))


def load_state(path: Path) -> dict | None:
    """The state last saved, None if there is none. A torn file is put aside and gives way to the one before it."""
    torn = False
    for p in (path, path.with_suffix(".prev.pt")):
        if not p.exists():
            continue
        try:
            with zipfile.ZipFile(p) as z:
                if z.testzip() is not None:  # torch does not look at the checksums
                    raise zipfile.BadZipFile
            state = torch.load(p, map_location="cpu", weights_only=True)  # never runs code from the file
        except Exception as e:
            print(f"{p} cannot be read ({type(e).__name__}); trying the one before it", file=sys.stderr)
            torn = True
            continue
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise UserError(f"{p} was written by another version of this code: finish it there, or use --fresh")
        if torn:
            os.replace(path, path.with_suffix(".torn.pt"))  # so that the next save does not keep it as the good one
        return state
    if torn:
        raise UserError(f"{path} cannot be read and there is none before it: start over with --fresh")
    return None


def save_weights(path: Path, module: nn.Module, meta: Mapping[str, Any]) -> None:
    """Weights and buffers as safetensors, with `meta` (kind, config, classes, ...) as JSON in the header."""
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    text = json.dumps({"format": FORMAT, **meta})
    write_atomic(path, save(tensors, metadata={"meta": text, "digest": weights_digest(text, tensors)}))


def read_meta(path: Path) -> dict:
    """What a weights file says of itself, nothing of it checked; empty where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get("meta", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def weights_digest(meta: str, tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the SHA-256 over the header's words and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(meta.encode())
    for name, v in sorted(tensors.items()):
        digest.update(f"\n{name} {v.dtype} {tuple(v.shape)}\n".encode())
        digest.update(v.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """(state dict in float32, meta) of a file of this kind ("vae" or "diffusion"). Code in a file is never run.

    What the file says of itself is checked by its checksum, if it has one (version 1 began without), and what it says
    of classes in any case, because folders are named by them.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"there are no weights at {path}: train the run first, or name another with --run")
    try:
        with safe_open(path, framework="pt") as f:
            header = f.metadata() or {}
            meta = json.loads(header.get("meta", "null"))
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, RecursionError):
        raise UserError(
            f"{path} is not a safetensors file of this project (damaged, or a pickle, which is never opened): "
            "use the best.safetensors or final.safetensors that training wrote"
        ) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("kind") != kind:
        raise UserError(f"{path} does not hold {kind} weights of this version: use a file that training wrote")
    if "digest" in header and header["digest"] != weights_digest(header["meta"], tensors):
        raise UserError(f"{path} does not match its own checksum: copy it again, or take it from a backup")
    classes = meta.get("classes", [])
    if not isinstance(classes, list) or not all(map(is_folder_name, classes)) or len({*classes}) < len(classes):
        raise UserError(f"{path} names classes that cannot be folders: use a file that training wrote")
    # Copies: the tensors of the file are mapped, and what happens to it later must not happen to them.
    tensors = {k: v.to(torch.float32 if v.is_floating_point() else v.dtype, copy=True) for k, v in tensors.items()}
    for name, v in tensors.items():
        if v.is_floating_point() and not v.isfinite().all():
            raise UserError(f"{path} holds numbers that are not finite ({name}): train again with a smaller --lr")
    return tensors, meta


def is_folder_name(name: object) -> bool:
    """Can a folder of this name be made inside of another, and be one cell of a table in UTF-8?"""
    try:
        plain = isinstance(name, str) and name not in ("", ".", "..") and not {*"/\0\r\n"} & {*name}
        return plain and len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False


def load_into(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """The tensors become the module's own, which may be on the meta device, where a wrong shape costs no memory.

    A sentence for weights of another architecture.
    """
    try:
        for name, own in module.state_dict().items():
            if name in tensors and tensors[name].dtype != own.dtype:
                raise RuntimeError(f"{name} is of type {tensors[name].dtype}")
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:160]
        raise UserError(f"{path} holds weights of another architecture than its own header says: {reason}") from None


def file_hash(path: Path) -> str:
    """First 12 hex digits of the file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# Bars, logs, and what goes on record


def progress_bar(total: int, done: int = 0, what: str = "", unit: str = " images") -> tqdm:
    """A bar in images, with images/s and time left; in a log file, where it cannot redraw itself, once a minute."""
    return tqdm(
        total=total, initial=done, desc=what or None, unit=unit, unit_scale=total >= 10_000, dynamic_ncols=True,
        smoothing=0.05, mininterval=0.5 if sys.stderr.isatty() else 60, leave=not what, delay=0.5,
        disable=job_ranks()[0] > 0,
    )  # fmt: skip


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


def git_commit() -> str:
    """The commit of the code, for the record; "unknown" outside a clone."""
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or "unknown"


def training_cost(model: nn.Module, *inputs: Tensor) -> tuple[int, float, float]:
    """(parameters, GFLOP of a forward pass, MB of activations kept for backward) for these inputs, computing nothing.

    Runs on the meta device, where tensors have shapes and no contents.
    """
    from torch.utils.flop_counter import FlopCounterMode

    saved: dict[tuple, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[(id(t.untyped_storage()), t.shape)] = t.numel() * t.element_size()
        return t

    own = {id(p.untyped_storage()) for p in model.parameters()}
    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*inputs)
    kept = sum(size for (storage, _), size in saved.items() if storage not in own)
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() / 1e9, kept / 1e6


def describe_cost(
    name: str, parameters: int, gflop: float, mb: float, batch: int, epochs: int, steps: int, device: torch.device,
    amp_dtype: torch.dtype | None,
) -> str:  # fmt: skip
    """Lines of a dry run: size, work and memory. Activations count half under autocast; the average is included."""
    memory = 20 * parameters / 1e9 + batch * mb / 1e3 * (0.5 if amp_dtype else 1.0)  # weight, gradient, 2 Adam, EMA
    dtype = str(amp_dtype or torch.float32).removeprefix("torch.")
    return (
        f"{name:9} {parameters / 1e6:.1f} M parameters, {gflop:.2f} GFLOP forward per image\n"
        f"schedule  {epochs:,} epochs, {steps:,} steps of {batch} images, {3 * gflop * batch * steps / 1e6:.2f} PFLOP\n"
        f"memory    about {memory:.1f} GB at this batch size\n"
        f"device    {describe_hardware(device)}, {dtype}"
    )


def describe_hardware(device: torch.device) -> str:
    """e.g. "NVIDIA H200" or "CPU, 2 threads"."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type.upper()}, " + (f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    )


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; each module's own mode is put back after."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def to_pixels(x: Tensor) -> Tensor:
    """Images in [-1, 1], [B, 1, H, W] -> uint8 [B, H, W], where they are."""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)[:, 0]


def to_uint8(x: Tensor) -> np.ndarray:
    """Images in [-1, 1], [B, 1, H, W] -> uint8 [B, H, W]."""
    return to_pixels(x).cpu().numpy()


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """uint8 [N, H, W] -> one uint8 picture, row by row, with thin grey lines between."""
    n, h, w = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    grid = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap), 64, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        grid[y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = image
    return grid


def png_bytes(image: np.ndarray) -> bytes:
    """A grey uint8 [H, W] picture as PNG."""
    import cv2

    return cv2.imencode(".png", image)[1].tobytes()


def save_gif(path: Path, frames: Sequence[np.ndarray], seconds: float = 0.25) -> None:
    """uint8 [H, W] frames -> a looping GIF that rests on its last frame."""
    from PIL import Image

    images, buffer = [Image.fromarray(f) for f in frames], io.BytesIO()
    durations = [int(1000 * seconds)] * (len(images) - 1) + [2000]
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    write_atomic(path, buffer.getvalue())


def grow_gif(folder: Path, name: str, frame: np.ndarray, epoch: int, last: bool = True) -> None:
    """FOLDER/<name>.png shows this frame, FOLDER/<name>.gif all frames so far; each is kept in FOLDER/frames.

    The GIF is made anew with the 1st, 2nd, 4th, 8th ... frame and the `last`, or its cost would grow with the square.
    """
    import cv2

    write_atomic(folder / "frames" / f"{epoch:05d}.png", png_bytes(frame))
    write_atomic(folder / f"{name}.png", png_bytes(frame))
    paths = sorted((folder / "frames").glob("*.png"))
    if not last and len(paths).bit_count() != 1:
        return
    frames = [cv2.imdecode(np.frombuffer(p.read_bytes() or b"\0", np.uint8), cv2.IMREAD_GRAYSCALE) for p in paths]
    save_gif(folder / f"{name}.gif", [f for f in frames if f is not None and f.shape == frame.shape])


def spread_over(n: int, most: int) -> list[int]:
    """At most that many of the indices 0 to n - 1, evenly, both ends in."""
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int)).tolist()


def denoising_strip(x_t: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """Images at S moments, uint8 [S, N, H, W] -> one picture: each image's x_t above its x0, time to the right."""
    rows = np.stack([x_t, x0], axis=1)  # [S, 2, N, H, W]
    return image_grid(rows.transpose(2, 1, 0, 3, 4).reshape(-1, *x_t.shape[2:]), columns=len(x_t))


def visualise_denoising_process(
    steps: Sequence[tuple[int, Tensor, Tensor]], decode: Callable[[Tensor], Tensor], folder: Path
) -> None:
    """What the sampler's callback saw, decoded, as FOLDER/denoising.gif (x_t) and FOLDER/denoising.png.

    steps: (t, x_t, x0) each [N, C, h, w]; decode: latents -> images in [-1, 1]. In the PNG each image has two rows,
    x_t above and the estimate of the clean image below; time runs to the right, at most ten columns.
    """
    x_t = np.stack([to_uint8(decode(x)) for _, x, _ in steps])  # [S, N, H, W]
    columns = spread_over(len(steps), 10)
    x0 = np.stack([to_uint8(decode(steps[i][2])) for i in columns])  # [10, N, H, W]
    write_atomic(folder / "denoising.png", png_bytes(denoising_strip(x_t[columns], x0)))
    save_gif(folder / "denoising.gif", [image_grid(frame) for frame in x_t])


def plot_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """One panel per group of numbers ("loss/train" and "loss/val" share the panel "loss") over the epochs."""
    from matplotlib.figure import Figure

    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(k for r in rows for k in r if k not in ("step", "epoch")):
        groups.setdefault(name.split("/")[0], []).append(name)
    if not groups:
        return
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines), layout="constrained")
    for i, (group, names) in enumerate(groups.items()):
        ax = figure.add_subplot(lines, columns, i + 1)
        for name in names:
            xy = [(r["epoch"], r[name]) for r in rows if name in r and "epoch" in r]
            x, y = [x for x, _ in xy], [y for _, y in xy]
            ax.plot(x, y, label=name.partition("/")[2] or name, marker="." if len(xy) < 20 else None)
        ax.set_title(group, fontsize=10)
        ax.set_xlabel("epoch", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
        values = [r[n] for r in rows for n in names if n in r]
        if group.startswith("loss") and min(values) > 0:
            ax.set_yscale("log")
        if len(names) > 1:
            outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(names) > 4 else {}
            ax.legend(fontsize=7, frameon=False, **outside)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
