"""Building the slice cache from JPEGs, and finding a million files: files/s and memory.

    python benchmarks/data.py [--files 20000] [--index 1000000] [--json FILE]

256x240 grey JPEGs, decoded, padded to square and written to the cache by `dataset.load_slices`; beside it MONAI's and
PIL's way of reading them, with as many threads. Each part runs in a process of its own, whose peak memory is told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from common import ROOT, Bench, BenchConfig, peak_gb

from config import DataConfig


@dataclass(frozen=True)
class FilesConfig(BenchConfig):
    """Building the slice cache from JPEGs, and finding a million files."""

    files: int = 20_000
    """JPEGs to decode."""
    index: int = 1_000_000
    """Files to find."""


def make_jpegs(root: Path, n: int) -> None:
    """n grey JPEGs of 256x240 (20 a person) whose texture compresses to 15 KB."""
    import cv2

    rng = np.random.default_rng(0)
    (root / "train" / "NC").mkdir(parents=True)
    noise = cv2.GaussianBlur(rng.normal(0, 1, (600, 600)).astype(np.float32), (0, 0), 2.5)
    y, x = np.mgrid[-1:1:256j, -1:1:240j]
    head = (x**2 + y**2 < 0.8) * 110.0

    def write(i: int) -> None:
        top, left = (i * 7919) % 344, (i * 104729) % 344
        image = head + (head > 0) * 250 * noise[top : top + 256, left : left + 240]
        cv2.imwrite(str(root / f"train/NC/{i // 20:06d}_{i % 20}.jpg"), image.clip(0, 255).astype(np.uint8))

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(n)))


def part(name: str, root: Path) -> None:
    """One measurement in this process: prints seconds and peak memory as JSON."""
    import dataset

    start, before = time.perf_counter(), peak_gb()
    if name == "ours":
        dataset.load_slices(root, dataset.scan(root, DataConfig.subject_regex), 256, root / "cache")
    elif name == "index":
        slices = dataset.scan(root, DataConfig.subject_regex)
        dataset.find_overlap(slices), dataset.carve_validation(slices, 0.1, 0), dataset.fingerprint(slices)
    else:
        files = sorted((root / "train").rglob("*.jpg"))
        if name == "MONAI":
            from monai.transforms import Compose, EnsureChannelFirst, LoadImage, ResizeWithPadOrCrop

            read = Compose([LoadImage(image_only=True), EnsureChannelFirst(), ResizeWithPadOrCrop((256, 256))])
        else:
            from PIL import Image, ImageOps

            def read(path: Path) -> np.ndarray:
                return np.asarray(ImageOps.pad(Image.open(path), (256, 256)))

        start = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in pool.map(read, files):
                pass
    print(json.dumps({"seconds": time.perf_counter() - start, "gb": peak_gb(), "before": before}))


def measure(name: str, root: Path) -> dict:
    """`part` in a process of its own."""
    command = [sys.executable, __file__, "--part", name, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: {name}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(cfg: FilesConfig) -> None:
    if cfg.quick:
        cfg = replace(cfg, files=min(cfg.files, 3000), index=min(cfg.index, 50_000))
    b = Bench(cfg)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "jpegs"
        make_jpegs(root, cfg.files)
        found = {who: measure(who, root) for who in ("PIL", "MONAI", "ours")}
        for who in ("PIL", "MONAI"):
            rates = (cfg.files / found[k]["seconds"] for k in ("ours", who))
            task = f"cache of {cfg.files:,} JPEGs of 256x240"
            ours, theirs = rates
            b.row(task, ours, f"{who}, {os.cpu_count()} threads, kept nowhere", theirs, "files/s")
        b.row("peak memory of building it", found["ours"]["gb"], "", None, "GB")
        root = Path(name) / "many"
        for i in range(cfg.index):
            if i % 100_000 == 0:
                folder = root / "train" / f"C{i // 100_000}"
                folder.mkdir(parents=True)
            (folder / f"{i // 20:06d}_{i % 20}.jpg").touch()
        index = measure("index", root)
        b.row(f"{cfg.index:,} files found and split by person", index["seconds"], "", None, "s")
        b.row("peak memory of that, libraries included", index["gb"], "", None, "GB")
        b.row("libraries alone", index["before"], "", None, "GB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        part(sys.argv[2], Path(sys.argv[3]))
    else:
        main(tyro.cli(FilesConfig, description=__doc__))
