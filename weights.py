"""Files that are written whole or not at all: the state of a training (last.pt), weights with a header (safetensors).

A file can come from anywhere, so nothing in it is believed before it was checked, and code in it is never run.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from config import check_arguments
from utils import UserError, is_folder_name

Network = TypeVar("Network", bound=nn.Module)

# Raised when files of before can no longer be read (CHANGELOG.md).
FORMAT = 1  # of weights
STATE_FORMAT = 4  # of last.pt


def write_atomic(path: Path, data: bytes, keep: Path | None = None, flush: bool = True) -> None:
    """Write to a temporary file, flush it to disk, then rename it: readers find the old file or the new one, whole.

    `keep` is a name under which the old file is kept. Without `flush` the file survives the end of the process, but
    perhaps not a power cut: for many files that `flush_disk` flushes together. OSError where it cannot be written; the
    old file then stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            f.write(data)
            f.flush()
            if flush:
                os.fsync(f.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(tmp, path)
        if flush:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # so that the new name, too, survives a power cut
            finally:
                os.close(folder)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        e.filename = str(path)
        raise


def flush_disk(folder: Path) -> None:
    """Flush to disk, at once, all files that were written on the file system of this folder. OSError if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):  # not Linux
        os.sync()
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        if libc.syncfs(number):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(number)


def file_hash(path: Path) -> str:
    """The first 12 hex digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# The state of a training: last.pt


def save_state(path: Path, state: dict) -> None:
    """Write all that resuming needs; the state before it stays as `*.prev.pt` until the next write."""
    buffer = io.BytesIO()  # in memory first, so that only write_atomic can meet a full disk
    torch.save({"format": STATE_FORMAT, **state}, buffer)
    write_atomic(path, buffer.getvalue(), keep=path.with_suffix(".prev.pt"))


def load_state(path: Path) -> dict | None:
    """The state last saved, None if there is none.

    A damaged file is renamed to `*.torn.pt`, and the state before it is returned. UserError if there is none, or if
    another version of the code wrote the file.
    """
    # The newest state that can be read, with its checksums compared.
    torn = False
    for p in (path, path.with_suffix(".prev.pt")):
        if not p.exists():
            continue
        try:
            with zipfile.ZipFile(p) as z:
                if z.testzip() is not None:  # torch does not check the checksums
                    raise zipfile.BadZipFile
            state = torch.load(p, map_location="cpu", weights_only=True)  # never runs code from the file
        except Exception as e:
            print(f"{p} cannot be read ({type(e).__name__}); trying the one before it", file=sys.stderr)
            torn = True
            continue
        # A state of another version is whole, so it is refused and not put aside.
        if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
            raise UserError(
                f"{p} was written by another version of this code: finish the run with that version, or use --fresh"
            )
        if "judge" in state:  # what older versions called the discriminator
            state["discriminator"] = state.pop("judge")
        for part in ("model", "ema"):  # what they called the one condition there was
            own = state.get(part, {})
            for name in [name for name in own if "unet.label." in name]:
                own[name.replace("unet.label.", "unet.conditions.0.")] = own.pop(name)
        if torn:
            os.replace(path, path.with_suffix(".torn.pt"))  # so that the next save does not keep it as the good one
        return state
    if torn:
        raise UserError(f"{path} cannot be read and there is none before it: start over with --fresh")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Weights: safetensors with a header


SCALE = ".scale"  # what the scales of an eight-bit tensor are called after it


def save_weights(path: Path, module: nn.Module, meta: Mapping[str, Any], bits: int = 16) -> None:
    """Write weights and buffers as safetensors, with `meta` (kind, config, classes, ...) as JSON in the header.

    With 16 `bits` tensors are written in the types that they have. With 8 matrices and convolutions become int8, as
    `to_eight_bits` says.
    """
    from safetensors.torch import save

    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    if bits == 8:
        tensors = to_eight_bits(tensors)
    text = json.dumps({"format": FORMAT, **meta})
    write_atomic(path, save(tensors, metadata={"meta": text, "digest": weights_digest(text, tensors)}))


def to_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round every matrix and convolution to int8, row by row: a row's largest number becomes 127.

    The scales of tensor NAME are float32 [rows] under NAME.scale; vectors stay as they are. Of weights that are
    normally distributed the error is about 1 %.
    """
    found = {}
    for name, v in tensors.items():
        if v.dim() < 2 or not v.is_floating_point():
            found[name] = v
            continue
        rows = v.float().flatten(1)
        scale = (rows.abs().amax(1) / 127).clamp(min=1e-30)
        found[name] = (rows / scale[:, None]).round().to(torch.int8).view(v.shape)
        found[name + SCALE] = scale
    return found


def from_eight_bits(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `to_eight_bits` rounded, as float32, and the other tensors. ValueError where a scale does not fit."""
    found = dict(tensors)
    for name, v in tensors.items():
        if v.dtype == torch.int8 and name + SCALE in tensors:
            scale = found.pop(name + SCALE)
            if v.dim() < 2 or scale.shape != v.shape[:1]:
                raise ValueError(f"{name} has {tuple(v.shape)} numbers and {tuple(scale.shape)} scales")
            found[name] = (v.flatten(1) * scale[:, None].float()).view(v.shape)
    return found


def read_meta(path: Path) -> dict:
    """The header of a weights file, unchecked; empty if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            meta = json.loads((f.metadata() or {}).get("meta", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def weights_digest(meta: str, tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the SHA-256 over the header's text and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(meta.encode())
    for name, v in sorted(tensors.items()):
        digest.update(f"\n{name} {v.dtype} {tuple(v.shape)}\n".encode())
        digest.update(v.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def load_weights(path: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """(state dict in float32, header) of a file of this kind: "vae", "diffusion" or "texture".

    UserError if the file is damaged, of another kind or version, or holds numbers that are not finite. Its checksum is
    compared if it has one (the first files had none), and class names are always checked, because folders get them.
    """
    from safetensors import SafetensorError, safe_open

    # Read header and tensors.
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
    # Check what the file says of itself.
    if not isinstance(meta, dict) or meta.get("format") != FORMAT or meta.get("kind") != kind:
        raise UserError(f"{path} does not hold {kind} weights of this version: use a file that training wrote")
    if "digest" in header and header["digest"] != weights_digest(header["meta"], tensors):
        raise UserError(f"{path} does not match its own checksum: copy it again, or take it from a backup")
    classes = meta.get("classes", [])
    if not isinstance(classes, list) or not all(map(is_folder_name, classes)) or len({*classes}) < len(classes):
        raise UserError(f"{path} names classes that cannot be folders: use a file that training wrote")
    try:
        tensors = from_eight_bits(tensors)
    except ValueError as e:
        raise UserError(f"{path} cannot be read ({e}): copy it again, or take it from a backup") from None
    # Copies, because the file is memory-mapped and may be changed later.
    tensors = {k: v.to(torch.float32 if v.is_floating_point() else v.dtype, copy=True) for k, v in tensors.items()}
    for name, v in tensors.items():
        if v.is_floating_point() and not v.isfinite().all():
            raise UserError(f"{path} holds numbers that are not finite ({name}): train again with a smaller --lr")
    return tensors, meta


def load_into(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Make the tensors the parameters and buffers of the module, which may be on the meta device.

    UserError if they are of another architecture.
    """
    try:
        # load_state_dict(assign=True) checks names and shapes, but not types.
        for name, own in module.state_dict().items():
            if name in tensors and tensors[name].dtype != own.dtype:
                raise RuntimeError(f"{name} is of type {tensors[name].dtype}")
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        reason = " ".join(str(e).split())[:160]
        raise UserError(f"{path} holds weights of another architecture than its own header says: {reason}") from None


def build_network(network: type[Network], header: object, tensors: Mapping[str, Tensor]) -> Network:
    """Build the network that a file's header describes, on the meta device, where any size takes no memory.

    ValueError if there is no such network.
    """
    settings = check_arguments(network, header)
    # Without this, a header could ask for so many layers that making them takes minutes, even without memory.
    if not 0 < settings.get("blocks", 1) * len(settings.get("channels", [1])) <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors are too few for its levels and blocks")
    with torch.device("meta"):
        return network(**settings)
