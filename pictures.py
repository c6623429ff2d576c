"""Pictures: PNG, GIF, grids, strips and curves. Whole pages are in report.py."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils import evenly_spaced
from weights import write_atomic

MAX_PIXELS = 2**25  # of a file that is decoded


def to_pixels(x: Tensor) -> Tensor:
    """Images in [-1, 1], [B, 1, H, W] -> uint8 [B, H, W] on the same device."""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)[:, 0]


def to_uint8(x: Tensor) -> np.ndarray:
    """Images in [-1, 1], [B, 1, H, W] -> uint8 [B, H, W] in NumPy."""
    return to_pixels(x).cpu().numpy()


def image_grid(images: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images uint8 [N, H, W] -> one uint8 picture, row by row with thin grey lines between; square by default."""
    # 64 is the grey of the lines between the images
    n, h, w = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    grid = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap), 64, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        grid[y * (h + gap) : y * (h + gap) + h, x * (w + gap) : x * (w + gap) + w] = image
    return grid


def import_cv2() -> ModuleType:
    """OpenCV, which refuses to decode files whose header claims more than MAX_PIXELS, before it takes memory for them.

    It reads that limit from the environment once, when it is imported, so whatever decodes a file imports it from here.
    """
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
    import cv2

    return cv2


def in_font(text: str) -> str:
    """The text as matplotlib's own font can show it: a letter that it lacks becomes its number, such as U+5065."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))
    return "".join(c if c == "\n" or font.get_char_index(ord(c)) else f"U+{ord(c):04X} " for c in text)


def png_bytes(image: np.ndarray) -> bytes:
    """The bytes of a PNG file of a uint8 picture, grey [H, W] or RGB [H, W, 3]."""
    cv2 = import_cv2()

    return cv2.imencode(".png", image if image.ndim == 2 else image[..., ::-1])[1].tobytes()


def save_gif(path: Path, frames: Sequence[np.ndarray], seconds: float = 0.25) -> None:
    """Write uint8 [H, W] frames as a looping GIF that stays on its last frame for two seconds."""
    from PIL import Image

    # Pillow writes to memory, so that only write_atomic touches the disk.
    images, buffer = [Image.fromarray(f) for f in frames], io.BytesIO()
    durations = [int(1000 * seconds)] * (len(images) - 1) + [2000]
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    write_atomic(path, buffer.getvalue())


def add_gif_frame(folder: Path, name: str, frame: np.ndarray, epoch: int, last: bool = True) -> None:
    """Write this frame to FOLDER/<name>.png and FOLDER/frames, and all frames so far to FOLDER/<name>.gif.

    The GIF is written with the 1st, 2nd, 4th, 8th ... and the `last` frame only: writing it every time would cost the
    square of the number of frames.
    """
    cv2 = import_cv2()

    # Every frame is a file of its own, so that a resumed run has the frames of before.
    write_atomic(folder / "frames" / f"{epoch:05d}.png", png_bytes(frame))
    write_atomic(folder / f"{name}.png", png_bytes(frame))
    paths = sorted((folder / "frames").glob("*.png"))
    if not last and len(paths).bit_count() != 1:
        return
    # A frame that is damaged or of another size is left out.
    frames = [cv2.imdecode(np.frombuffer(p.read_bytes() or b"\0", np.uint8), cv2.IMREAD_GRAYSCALE) for p in paths]
    save_gif(folder / f"{name}.gif", [f for f in frames if f is not None and f.shape == frame.shape])


def difference_map(change: np.ndarray) -> np.ndarray:
    """int [..., H, W] in [-255, 255] -> RGB [..., H, W, 3]: darker is blue, brighter is orange, no change is white."""
    amount = np.clip(np.abs(change) / 100, 0, 1)[..., None]
    colour = np.where(change[..., None] > 0, [217, 95, 2], [33, 102, 172])
    return (255 - amount * (255 - colour)).astype(np.uint8)


def table_of_images(path: Path, rows: Mapping[str, Sequence[np.ndarray]], columns: Sequence[str], title: str) -> None:
    """Write a PNG: images side by side, uint8 [H, W] or RGB, with the names of rows and columns in words."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(1.3 * len(columns) + 0.5, 1.32 * len(rows) + 0.6), layout="constrained")
    for i, (name, images) in enumerate(rows.items()):
        for j, image in enumerate(images):
            ax = fig.add_subplot(len(rows), len(columns), 1 + i * len(columns) + j)
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.set_xticks([]), ax.set_yticks([])
            ax.set_ylabel(in_font(name) if j == 0 else "", fontsize=8)
            ax.set_title(in_font(columns[j]) if i == 0 else "", fontsize=8)
    fig.suptitle(in_font(title), fontsize=9)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=140)
    write_atomic(path, buffer.getvalue())


def denoising_strip(x_t: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """Images at S steps, uint8 [S, N, H, W] -> one picture: each image's x_t above its x0, time to the right."""
    rows = np.stack([x_t, x0], axis=1)  # [S, 2, N, H, W]
    return image_grid(rows.transpose(2, 1, 0, 3, 4).reshape(-1, *x_t.shape[2:]), columns=len(x_t))


def visualise_denoising_process(
    steps: Sequence[tuple[int, Tensor, Tensor]], decode: Callable[[Tensor], Tensor], folder: Path
) -> None:
    """Decode the sampler's steps and write them as FOLDER/denoising.gif (x_t) and FOLDER/denoising.png.

    steps: (t, x_t, x0) with latents [N, C, h, w]; decode: latents -> images in [-1, 1]. In the PNG each image has two
    rows, x_t above and the estimate of the clean image below; time runs to the right in at most ten columns.
    """
    # All x_t for the GIF; the estimates are decoded only at the steps that the PNG shows.
    x_t = np.stack([to_uint8(decode(x)) for _, x, _ in steps])  # [S, N, H, W]
    columns = evenly_spaced(len(steps), 10)
    x0 = np.stack([to_uint8(decode(steps[i][2])) for i in columns])  # [10, N, H, W]
    write_atomic(folder / "denoising.png", png_bytes(denoising_strip(x_t[columns], x0)))
    save_gif(folder / "denoising.gif", [image_grid(frame) for frame in x_t])


def plot_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot numbers over the epochs to a PNG, a panel per group: "loss/train" and "loss/val" share the panel "loss"."""
    from matplotlib.figure import Figure

    # Which numbers share a panel
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(k for r in rows for k in r if k not in ("step", "epoch")):
        groups.setdefault(name.split("/")[0], []).append(name)
    if not groups:
        return
    # One panel after the other
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
        # Losses fall by orders of magnitude, but a logarithmic axis has no place for zero.
        if group.startswith("loss") and min(values) > 0:
            ax.set_yscale("log")
        if len(names) > 1:
            outside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if len(names) > 4 else {}
            ax.legend(fontsize=7, frameon=False, **outside)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
