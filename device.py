"""The machine: device, precision, compilation, CUDA graphs, and the way of big tensors to the device."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils import UserError, generator, job_ranks


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


def describe_hardware(device: torch.device) -> str:
    """e.g. "NVIDIA H200" or "CPU, 2 threads"."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type.upper()}, " + (f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    )


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
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
# Compilation and CUDA graphs


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


def to_device_if_it_fits(data: Tensor, device: torch.device) -> Tensor:
    """On a GPU where it takes less than a quarter of the memory that is free there; else where it is."""
    room = torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else 0
    return data.to(device) if data.nbytes < room else data


def allocate_rows(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Memory for that many numbers; a nameless file in `folder`, mapped, where it takes over half of the machine's."""
    size = int(np.prod(shape)) * dtype.itemsize
    if size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        return torch.empty(*shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as f:
        f.truncate(size)
        return torch.from_numpy(np.memmap(f, np.uint8, mode="r+")).view(dtype).view(*shape)


def shuffled_batches(n: int, batch: int, step: int, *seed: int) -> Iterator[Tensor]:
    """int64 [batch] for step, step + 1, ...: each epoch of n // batch steps has its permutation, by (*seed, epoch)."""
    epoch, place = divmod(step, n // batch)
    while True:
        order = torch.randperm(n, generator=generator(*seed, epoch))
        yield from order.split(batch)[place : n // batch]
        epoch, place = epoch + 1, 0


def gather_batches(tensors: Sequence[Tensor], order: Iterable[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
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


def fetch_async(x: Tensor) -> Callable[[], np.ndarray]:
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
# What a training costs


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
