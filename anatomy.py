"""Anatomy of brain slices, measured by thresholds: simple enough to check by eye, the same for real and generated.

Images are axial, skull-stripped, T1-weighted slices, uint8. The areas are biased because a pixel can hold two tissues
(partial volume), but equally so in every set: use them to compare groups, not as absolute values. Phantoms come with
their true areas, which the tests compare against (docs/evaluation.md).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

MEASURES = {
    "brain_area": "brain outline, share of the image",
    "ventricle_fraction": "ventricles, share of the brain",
    "csf_fraction": "dark fluid, share of the brain",
    "contrast": "grey/white contrast",
    "symmetry": "left-right symmetry",
}


def measure(images: np.ndarray, progress: Callable[[int], object] = lambda n: None) -> dict[str, np.ndarray]:
    """uint8 [N, H, W] -> {measure: float64 [N]} for each of MEASURES. All of them are 0 for an image without a brain.

    `progress` is called with 1 after each image.
    """
    rows = []
    with ThreadPoolExecutor(2) as pool:  # threads help because OpenCV and SciPy release the GIL
        for row in pool.map(_measure, images):
            rows.append(row)
            progress(1)
    return {name: np.array([r[i] for r in rows], dtype=np.float64) for i, name in enumerate(MEASURES)}


def _measure(image: np.ndarray) -> tuple[float, ...]:
    """The numbers of MEASURES, in their order, of one uint8 [H, W] image."""
    import cv2
    from scipy import ndimage

    # Enlarge to 256 pixels first: in a small image the tips of the ventricles are thinner than a pixel, and an outline
    # between the pixels of the enlarged image follows them better than one along the original pixels.
    f = 256 / max(image.shape)
    how = cv2.INTER_CUBIC if f > 1 else cv2.INTER_AREA
    x = image if f == 1 else cv2.resize(image, None, fx=f, fy=f, interpolation=how)
    x = cv2.GaussianBlur(x.astype(np.float32), (0, 0), 0.7)

    # Brain: the largest connected region that is not black, with its holes filled.
    lit = x[x > 12]
    if lit.size < 200:
        return (0.0,) * len(MEASURES)
    white = float(np.percentile(lit, 85))  # about the intensity of white matter
    n, label, stats, _ = cv2.connectedComponentsWithStats((x > 0.09 * white).astype(np.uint8))
    if n < 2:
        return (0.0,) * len(MEASURES)
    brain = ndimage.binary_fill_holes(label == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))
    area = brain.sum()
    if area > 0.95 * x.size:  # a brain leaves black corners; this image is one flat grey
        return (0.0,) * len(MEASURES)

    # Fluid: darker than half of the white matter.
    dark = (x < 0.50 * white) & brain

    # Ventricles: connected dark regions in the middle of the brain. Positions (u, v) are relative to the brain's
    # median, in half widths and half heights; u is a distance from the midline, v grows towards the back.
    ys, xs = np.nonzero(brain)
    cy, cx, ry, rx = np.median(ys), np.median(xs), np.ptp(ys) / 2 + 1, np.ptp(xs) / 2 + 1
    v, u = np.ogrid[: x.shape[0], : x.shape[1]]
    v, u = (v - cy) / ry, np.abs((u - cx) / rx)
    # The search region ends before the insula at the sides, and before the fissure at the front and the back.
    centre = (v > -0.56) & (v < 0.58) & (u < 0.50) & ((u > 0.12) | ((v > -0.47) & (v < 0.30)))
    n, label, stats, _ = cv2.connectedComponentsWithStats((dark & centre).astype(np.uint8))
    # A region counts if over 30 % of it lies in the core. Sulci and fissures that reach into the centre do not.
    core = (v > -0.40) & (v < 0.42) & (u < 0.28 + 0.6 * np.clip(v, 0, 0.3)) & ((u > 0.24) | (v < 0.34))
    inside = np.bincount(label[core], minlength=n) > 0.3 * stats[:, cv2.CC_STAT_AREA]
    inside[0] = False  # label 0 is everything that is not dark
    ventricles = stats[inside, cv2.CC_STAT_AREA].sum()

    # Contrast: split what is not fluid into grey and white matter by Otsu's threshold, and compare their medians.
    tissue = x[brain & ~dark]
    split, _ = cv2.threshold(np.clip(tissue, 0, 255).astype(np.uint8), 0, 255, cv2.THRESH_OTSU)
    grey, bright = tissue[tissue <= split], tissue[tissue > split]
    contrast = 0.0
    if len(grey) and len(bright):
        contrast = (np.median(bright) - np.median(grey)) / (np.median(bright) + np.median(grey))

    # Symmetry: correlation with the mirror image, at the best of nine midlines near the median column. Half size is
    # enough for that. Columns c and m - c mirror each other, so a midline at column cx of the full image is m = cx.
    half, half_brain = (
        cv2.resize(v.astype(np.float32), None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for v in (x, brain)
    )
    middle = round(cx - 0.5)
    symmetry = max(_mirrored(half, half_brain > 0.5, m) for m in range(middle - 4, middle + 5))
    return area / x.size, ventricles / area, dark.sum() / area, contrast, symmetry


def _mirrored(x: np.ndarray, brain: np.ndarray, middle: int) -> float:
    """Correlation of the grey values of column c with those of column `middle` - c, within the brain; in [-1, 1].

    x float32 [H, W], brain bool [H, W]. 0 if the brain and its mirror image do not overlap, or have no contrast.
    """
    columns = np.arange(x.shape[1])
    in_image = (middle - columns >= 0) & (middle - columns < x.shape[1])
    overlap = brain[:, in_image] & brain[:, (middle - columns)[in_image]]
    a, b = x[:, in_image][overlap], x[:, (middle - columns)[in_image]][overlap]
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def ventricle_fraction(images: np.ndarray) -> np.ndarray:
    """Ventricle area over brain area of uint8 slices [N, H, W]: float64 [N]."""
    return measure(images)["ventricle_fraction"]


@overload
def cohens_d(a: ArrayLike, b: ArrayLike) -> float: ...
@overload
def cohens_d(a: ArrayLike, b: ArrayLike, wa: np.ndarray, wb: np.ndarray) -> np.ndarray: ...
def cohens_d(
    a: ArrayLike, b: ArrayLike, wa: np.ndarray | None = None, wb: np.ndarray | None = None
) -> float | np.ndarray:
    """Cohen's d, (mean a - mean b) / pooled standard deviation, of samples a [N] and b [M].

    A float, or with bootstrap weights [N, R] and [M, R] one number per resample, float64 [R], NaN for a resample
    without anybody of a sample.
    """
    moments = []
    for values, weights in ((a, wa), (b, wb)):
        x = np.asarray(values, dtype=np.float64)[:, None]
        w = np.ones((len(x), 1)) if weights is None else np.asarray(weights)
        n = w.sum(0)
        mean = (w * x).sum(0) / np.where(n > 0, n, np.nan)
        moments.append((n, mean, (w * (x - mean) ** 2).sum(0)))
    (na, mean_a, squares_a), (nb, mean_b, squares_b) = moments
    d = (mean_a - mean_b) / np.sqrt((squares_a + squares_b) / (na + nb - 2))
    return float(d[0]) if wa is None and wb is None else d
