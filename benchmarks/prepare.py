"""Are slices of several data sets alike? python benchmarks/prepare.py OUT [OUT ...]

Each OUT was written by `dataset.py slice`, from the same volumes, with other flags. For each, and for pairs of
different people at the same level: the overlap of brain outlines (Dice), SSIM, and how data sets differ in anatomy.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import torch
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parent.parent))

import anatomy  # noqa: E402
from metrics import ssim  # noqa: E402


def outline(image: np.ndarray) -> np.ndarray:
    """The brain with its holes filled: the largest piece that is not black."""
    pieces, count = ndimage.label(image > 25)
    if not count:
        return np.zeros(image.shape, bool)
    return ndimage.binary_fill_holes(pieces == 1 + np.bincount(pieces.ravel())[1:].argmax())


def compare(out: Path, levels: int = 5, most: int = 24) -> list[dict]:
    """Rows of numbers about a folder of slices: at `levels` evenly spaced levels, of `most` people of each data set."""
    volumes = {r["scan"]: r for r in csv.DictReader((out / "volumes.csv").open()) if int(r["slices"])}
    by_set: dict[str, list[str]] = defaultdict(list)
    for scan, row in sorted(volumes.items()):
        by_set[row["source"].split("/")[0]].append(scan)
    numbers = sorted({int(p.stem.rpartition("_")[2]) for p in out.glob("*/*/*.png")})
    chosen = [numbers[i] for i in np.linspace(0, len(numbers) - 1, levels).round().astype(int)]

    def image(scan: str, number: int) -> np.ndarray | None:
        row = volumes[scan]
        return cv2.imread(str(out / row["split"] / row["label"] / f"{scan}_{number:03d}.png"), cv2.IMREAD_GRAYSCALE)

    rows, anatomies = [], {}
    groups = {name: scans[:most] for name, scans in by_set.items()}
    pairs = {name: [*combinations(scans, 2)] for name, scans in groups.items()}
    for a, b in combinations(groups, 2):
        pairs[f"{a} and {b}"] = [(x, y) for x in groups[a] for y in groups[b]]
    loaded = {(s, k): x for scans in groups.values() for s in scans for k in chosen if (x := image(s, k)) is not None}
    outlines = {key: outline(x) for key, x in loaded.items()}
    for name, of in pairs.items():
        dice, alike = [], []
        for a, b in of:
            for k in chosen:
                if (a, k) in loaded and (b, k) in loaded:
                    x, y = outlines[a, k], outlines[b, k]
                    dice.append(2 * (x & y).sum() / max(1, x.sum() + y.sum()))
                    box = ndimage.find_objects((x | y).astype(np.uint8))[
                        0
                    ]  # black around a brain is alike in everybody
                    both = [torch.from_numpy(loaded[s, k][box])[None, None].float() / 255 for s in (a, b)]
                    alike.append(float(ssim(*both)))
        rows.append(
            {
                "people": name,
                "pairs": len(of),
                "Dice": (np.mean(dice), np.std(dice)),
                "SSIM": (np.mean(alike), np.std(alike)),
            }
        )
    for name, scans in groups.items():
        values = anatomy.measure(np.stack([loaded[s, k] for s in scans for k in chosen if (s, k) in loaded]))
        anatomies[name] = {k: (float(v.mean()), float(v.std())) for k, v in values.items()}
        widest = [max(chosen, key=lambda k: ventricles(loaded.get((s, k)))) for s in scans]
        rows.append(
            {"people": name, **anatomies[name], "level of the widest ventricles": (np.mean(widest), np.std(widest))}
        )
    return [{k: [round(float(x), 4) for x in v] if isinstance(v, tuple) else v for k, v in row.items()} for row in rows]


def ventricles(image: np.ndarray | None) -> float:
    return 0.0 if image is None else float(anatomy.ventricle_fraction(image[None])[0])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if len(sys.argv) > 1 else 2)
    for folder in sys.argv[1:]:
        for row in compare(Path(folder)):
            print(json.dumps({"out": Path(folder).name, **row}), flush=True)
