"""Files that are always whole: the state of a training (last.pt), and weights with a header (safetensors)."""

from __future__ import annotations

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

FORMAT = 1  # of the weight files; raised when old files can no longer be read
STATE_FORMAT = 3  # of last.pt, likewise


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


def file_hash(path: Path) -> str:
    """First 12 hex digits of the file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------------
# The state of a training: last.pt


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


# ---------------------------------------------------------------------------------------------------------------------
# Weights: safetensors with a header


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


def build_network(network: type[Network], header: object, tensors: Mapping[str, Tensor]) -> Network:
    """The network that a file's header describes, on the meta device, where whatever it asks for takes no memory.

    ValueError where there is no such network.
    """
    settings = check_arguments(network, header)
    if not 0 < settings.get("blocks", 1) * len(settings.get("channels", [1])) <= len(tensors):
        raise ValueError(f"{len(tensors)} tensors are too few for its levels and blocks")
    with torch.device("meta"):
        return network(**settings)
