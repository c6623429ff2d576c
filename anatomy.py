"""Anatomy of brain slices by thresholds alone: simple enough to be checked by eye, the same for real and generated.

For skull-stripped T1-weighted slices, axial, uint8. What is measured is biased by partial volume, and the same way in
every set: it is there to compare groups with. On phantoms the truth is on record (docs/evaluation.md, tests).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

MEASURES = {
    "brain_area": "brain outline, share of the image",
    "ventricle_fraction": "ventricles, share of the brain",
    "csf_fraction": "dark fluid, share of the brain",
    "contrast": "grey/white contrast",
    "symmetry": "left-right symmetry",
}


def measure(images: np.ndarray, progress: Callable[[int], object] = lambda n: None) -> dict[str, np.ndarray]:
    """uint8 [N, H, W] -> float64 [N] for each of MEASURES; all 0 where there is no brain to be seen."""
    rows = []
    with ThreadPoolExecutor(2) as pool:  # OpenCV and SciPy release the interpreter's lock
        for row in pool.map(_measure, images):
            rows.append(row)
            progress(1)
    return {name: np.array([r[i] for r in rows], dtype=np.float64) for i, name in enumerate(MEASURES)}


def _measure(image: np.ndarray) -> tuple[float, ...]:
    import cv2
    from scipy import ndimage

    # Enlarged first, so that thin horns of small images are cut between pixels and not along them.
    f = 256 / max(image.shape)
    how = cv2.INTER_CUBIC if f > 1 else cv2.INTER_AREA
    x = image if f == 1 else cv2.resize(image, None, fx=f, fy=f, interpolation=how)
    x = cv2.GaussianBlur(x.astype(np.float32), (0, 0), 0.7)
    lit = x[x > 12]
    if lit.size < 200:
        return (0.0,) * len(MEASURES)
    white = float(np.percentile(lit, 85))
    n, label, stats, _ = cv2.connectedComponentsWithStats((x > 0.09 * white).astype(np.uint8))
    if n < 2:
        return (0.0,) * len(MEASURES)
    brain = ndimage.binary_fill_holes(label == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))
    area = brain.sum()
    if area > 0.95 * x.size:  # a picture of nothing, all of one grey
        return (0.0,) * len(MEASURES)

    # Fluid is darker than halfway between grey matter and black.
    dark = (x < 0.50 * white) & brain

    # Ventricles are the dark regions that lie deep in the brain's centre.
    ys, xs = np.nonzero(brain)
    cy, cx, ry, rx = np.median(ys), np.median(xs), np.ptp(ys) / 2 + 1, np.ptp(xs) / 2 + 1
    v, u = np.ogrid[: x.shape[0], : x.shape[1]]
    v, u = (v - cy) / ry, np.abs((u - cx) / rx)
    # The centre ends before the insula at the sides, and before the fissure at the front and the back.
    centre = (v > -0.56) & (v < 0.58) & (u < 0.50) & ((u > 0.12) | ((v > -0.47) & (v < 0.30)))
    n, label, stats, _ = cv2.connectedComponentsWithStats((dark & centre).astype(np.uint8))
    # They reach the core; sulci and fissures that stray into the centre do not.
    core = (v > -0.40) & (v < 0.42) & (u < 0.28 + 0.6 * np.clip(v, 0, 0.3)) & ((u > 0.24) | (v < 0.34))
    inside = np.bincount(label[core], minlength=n) > 0.3 * stats[:, cv2.CC_STAT_AREA]
    inside[0] = False
    ventricles = stats[inside, cv2.CC_STAT_AREA].sum()

    # Grey and white are the two sides of Otsu's threshold among what is not fluid.
    tissue = x[brain & ~dark]
    split, _ = cv2.threshold(np.clip(tissue, 0, 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    grey, bright = tissue[tissue <= split], tissue[tissue > split]
    contrast = 0.0
    if len(grey) and len(bright):
        contrast = (np.median(bright) - np.median(grey)) / (np.median(bright) + np.median(grey))

    # Correlation with the mirror image, at the middle line that gives the most.
    half, there = (
        cv2.resize(v.astype(np.float32), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for v in (x, brain)
    )
    symmetry = max(_mirrored(half, there > 0.5, m) for m in np.arange(round(cx - 0.5) - 4, round(cx - 0.5) + 5))
    return area / x.size, ventricles / area, dark.sum() / area, contrast, symmetry


def _mirrored(x: np.ndarray, brain: np.ndarray, middle: int) -> float:
    """Correlation of grey values inside the brain with those at column `middle` - c; 0 if nothing overlaps."""
    columns = np.arange(x.shape[1])
    there = (middle - columns >= 0) & (middle - columns < x.shape[1])
    both = brain[:, there] & brain[:, (middle - columns)[there]]
    a, b = x[:, there][both], x[:, (middle - columns)[there]][both]
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def ventricle_fraction(images: np.ndarray) -> np.ndarray:
    """Ventricle area over brain area of uint8 slices [N, H, W], as float64 [N]."""
    return measure(images)["ventricle_fraction"]


def cohens_d(a: np.ndarray, b: np.ndarray, wa: np.ndarray | None = None, wb: np.ndarray | None = None) -> np.ndarray:
    """Standardised mean difference, (mean a - mean b) / pooled standard deviation; with weights [N, R] R of them."""
    moments = []
    for x, w in ((a, wa), (b, wb)):
        x = np.asarray(x, dtype=np.float64)[:, None]
        w = np.ones((len(x), 1)) if w is None else np.asarray(w)
        n = w.sum(0)
        mean = (w * x).sum(0) / n
        moments.append((n, mean, (w * (x - mean) ** 2).sum(0)))
    (na, ma, sa), (nb, mb, sb) = moments
    d = (ma - mb) / np.sqrt((sa + sb) / (na + nb - 2))
    return float(d[0]) if wa is None and wb is None else d
