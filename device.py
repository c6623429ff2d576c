"""The machine: device, precision, compilation, CUDA graphs, moving rows of big tensors, and what a training costs.

Several processes are in cluster.py.
"""

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
    """The device of this process: `auto` takes CUDA, else the CPU; each rank its own GPU of the machine.

    UserError if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        # Modulo, because Slurm may let each rank see only its own GPU.
        name = f"cuda:{job_ranks()[2] % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} is not available here: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        # Streams, events and graphs are made on the current GPU, which is cuda:0 unless it is set.
        torch.cuda.set_device(device)
        # cuDNN would compute float32 convolutions in TF32, with 10 bits of mantissa. SSIM takes the difference of two
        # nearly equal means, and --precision fp32 should mean float32.
        torch.backends.cudnn.allow_tf32 = False
    return device


def pick_amp_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype for autocast, None for float32. `auto`: bf16 where the hardware computes in it, else fp16 on CUDA."""
    # What is asked for by name
    if precision == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU: take fp32, bf16 or auto on a CPU")
    if precision != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # auto: where a dtype is emulated it is slower than float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # private, but the only way to ask
    return torch.bfloat16 if has_bf16() else None


def autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    """A context that runs networks in this dtype on the device of x, or changes nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype)


def describe_hardware(device: torch.device) -> str:
    """For example "NVIDIA H200" or "CPU, 2 threads, torch 2.15.0"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Inside, the models are in evaluation mode and without gradients; each module's mode is restored after."""
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
    """Compile the networks' forward passes in place by torch.compile; returns whether that was done.

    `choice` is "on", "off", or "auto": on a GPU only, because on a CPU a minute of compiling gains a few per cent
    (docs/speed.md). `trial` must call the networks as they will be called. If compilation fails there, one line on
    stderr says so and the networks stay as they were.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    start = time.time()
    for network in networks:
        network.forward = torch.compile(network.forward, dynamic=False)  # type: ignore[method-assign]
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        for network in networks:
            del network.forward  # the compiled one, which hid the class's own
        reason = next((line for line in str(e).splitlines() if line.strip()), "")[:160]
        print(f"torch.compile cannot be used here, going on without ({type(e).__name__}: {reason})", file=sys.stderr)
        return False
    print(f"compiled in {time.time() - start:.0f} s")
    return True


class Replay:
    """call(*tensors) -> tensors, recorded once as a CUDA graph and replayed: one launch instead of thousands.

    `call` must not wait for the GPU, and inputs must have the shapes of `example`. Each call overwrites the outputs of
    the one before. Where `call` runs a backward pass, `parameters` are those whose gradients it leaves: every replay
    computes them anew and puts them into `.grad`. `warm_up` runs before recording, by default `call` itself. A
    RuntimeError of recording leaves the GPU as it was.
    """

    def __init__(
        self,
        call: Callable[..., tuple[Tensor, ...]],
        *example: Tensor,
        parameters: Iterable[nn.Parameter] = (),
        warm_up: Callable[..., object] | None = None,
    ):
        self.inputs, self.parameters = [x.clone() for x in example], list(parameters)
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):  # before recording, so that libraries choose kernels and allocate workspaces
            for _ in range(3):
                (warm_up or call)(*self.inputs)
        current.wait_stream(stream)
        # A backward pass that finds no gradient makes one, here in the graph's own memory, and does not add to an old.
        for p in self.parameters:
            p.grad = None
        self.graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may copy batches meanwhile: only what this thread does is recorded and checked.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = call(*self.inputs)
        except RuntimeError:
            torch.cuda.synchronize()
            torch.cuda.set_stream(current)  # the failed recording left its own
            for p in self.parameters:
                p.grad = None
            raise
        self.gradients = [p.grad for p in self.parameters]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for recorded, x in zip(self.inputs, inputs):
            recorded.copy_(x, non_blocking=True)
        self.graph.replay()
        for p, gradient in zip(self.parameters, self.gradients):
            p.grad = gradient
        return self.outputs


def to_half(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Convert the weights of convolutions and linear layers in place, once, to what autocast would make of them.

    For networks that only generate: autocast converts their weights anew in every call. Its results are the same, bit
    for bit. None changes nothing. Weights of norms and embeddings, which autocast leaves in float32, stay.
    """
    for layer in network.modules():
        if dtype is not None and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Moving rows of big tensors to the device, without waiting


def to_device_if_it_fits(data: Tensor, device: torch.device) -> Tensor:
    """Move to the GPU if it needs less than a quarter of the free memory there; else return it as it is."""
    room = torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else 0
    return data.to(device) if data.nbytes < room else data


def allocate_rows(shape: Sequence[int], dtype: torch.dtype, folder: Path) -> Tensor:
    """Allocate a tensor on the host; above half of the RAM, back it with an unnamed memory-mapped file in `folder`."""
    size = int(np.prod(shape)) * dtype.itemsize
    if size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2:
        return torch.empty(*shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as f:
        f.truncate(size)
        return torch.from_numpy(np.memmap(f, np.uint8, mode="r+")).view(dtype).view(*shape)


def shuffled_batches(n: int, batch: int, step: int, *seed: int) -> Iterator[Tensor]:
    """Yield the indices of the batches of step, step + 1, ..., int64 [batch], without end.

    Every epoch, n // batch steps, has a permutation of its own that depends on (*seed, epoch) alone.
    """
    # The first epoch may begin in the middle, where a run resumes.
    epoch, place = divmod(step, n // batch)
    while True:
        order = torch.randperm(n, generator=generator(*seed, epoch))
        yield from order.split(batch)[place : n // batch]
        epoch, place = epoch + 1, 0


def gather_batches(tensors: Sequence[Tensor], order: Iterable[Tensor], device: torch.device) -> Iterator[list[Tensor]]:
    """Yield [t[index] for t in tensors] on the device, for every index [B] of `order`.

    If the tensors lie on the host and the device is a GPU, a thread gathers the next batches into page-locked memory
    meanwhile.
    """
    if device.type != "cuda":
        for index in order:
            yield [t[index].to(device) for t in tensors]
    # Already on the GPU: only the index travels.
    elif tensors[0].is_cuda:
        for index in order:
            index = index.pin_memory().to(device, non_blocking=True)
            yield [t[index] for t in tensors]
    else:
        for parts in read_ahead(lambda index: [t[index].pin_memory() for t in tensors], order):
            yield [p.to(device, non_blocking=True) for p in parts]


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Inside, what this thread asks of a GPU goes into a stream of its own, which fills the gaps that others leave."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


def read_ahead(make: Callable[[Any], Any], items: Iterable[Any], depth: int = 3) -> Iterator[Any]:
    """Yield make(item) in order; a thread makes up to `depth` of them ahead of time."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fetch_async(x: Tensor) -> Callable[[], np.ndarray]:
    """Start to copy x to the host. The function that is returned waits for this copy only and returns it as NumPy."""
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


def training_cost(
    model: nn.Module, *inputs: Tensor | None, amp_dtype: torch.dtype | None = None
) -> tuple[int, float, float]:
    """(parameters, GFLOP of a forward pass, MB of activations kept for the backward pass) for one image.

    The inputs have one row each. On the meta device, where tensors have shapes but no contents, nothing is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode

    # What autograd saves for the backward pass, each tensor counted once.
    def forward(rows: int) -> tuple[float, float]:
        saved: dict[tuple, int] = {}

        def pack(t: Tensor) -> Tensor:
            saved[(id(t.untyped_storage()), t.shape)] = t.numel() * t.element_size()
            return t

        given = [None if t is None else torch.cat([t] * rows) for t in inputs]
        device = next(model.parameters()).device.type
        with (
            FlopCounterMode(display=False) as flops,
            nullcontext() if amp_dtype is None else torch.autocast(device, amp_dtype),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        ):
            alive = model(*given)  # noqa: F841  # keeps what is saved, so that no two tensors get the same id
        return flops.get_total_flops() / 1e9, sum(saved.values()) / 1e6

    # A second image adds activations, but no weights and no copies of them in half precision.
    (gflop, one), (_, two) = forward(1), forward(2)
    return sum(p.numel() for p in model.parameters()), gflop, two - one


def describe_cost(
    name: str, parameters: int, gflop: float, mb: float, batch: int, epochs: int, steps: int, device: torch.device,
    amp_dtype: torch.dtype | None, seconds: float,
) -> str:  # fmt: skip
    """The lines of a dry run: size, work, memory, device, time. `seconds` of a step are as `rehearse` (loop.py) says.

    Memory is what the rehearsal took on a GPU; elsewhere 20 bytes a parameter (weight, gradient, two moments of AdamW,
    average) and the activations of each image.
    """
    memory = 20 * parameters / 1e9 + batch * mb / 1e3
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device) / 1e9
    dtype = str(amp_dtype or torch.float32).removeprefix("torch.")
    minutes = steps * seconds / 60
    whole = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return (
        f"{name:9} {parameters / 1e6:.1f} M parameters, {gflop:.2f} GFLOP forward per image\n"
        f"schedule  {epochs:,} epochs, {steps:,} steps of {batch} images, {3 * gflop * batch * steps / 1e6:.2f} PFLOP\n"
        f"memory    about {memory:.1f} GB at this batch size\n"
        f"device    {describe_hardware(device)}, {dtype}\n"
        f"time      about {whole}, evaluation not counted: {batch / seconds:.4g} images/s in a few steps just now"
    )
