"""From a volume to slices: where the head is, what is grey MRI and what is not, and how a slice lies in the world."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from config import SliceConfig
from pictures import import_cv2
from readers import Unusable, Volume


@dataclass(frozen=True)
class Plane:
    """How slices of one plane lie in the world: RAS+ millimetres, x to the right, y to the front, z upwards.

    `right` and `down` are the directions in which the columns and the rows of the image run: (world axis, sign).
    """

    across: int  # the world axis that the slices are perpendicular to
    right: tuple[int, int]
    down: tuple[int, int]
    range: tuple[float, float]  # default positions of the first and the last slice in mm, as in SliceConfig.range
    registered: tuple[float, float]  # the same for volumes that are registered: coordinates of MNI152


# Radiological convention: the patient's right is on the left side of the image (sagittal: the front). Front or top is
# upwards. Both ranges of a plane show about the same anatomy: the top of the template's brain is at z = 80.
PLANES = {
    "axial": Plane(2, (0, -1), (1, -1), (44.0, 75.0), (5.0, 36.0)),
    "coronal": Plane(1, (0, -1), (2, -1), (-16.0, 15.0), (-34.0, -3.0)),
    "sagittal": Plane(0, (1, -1), (2, -1), (-16.0, 15.0), (-16.0, 15.0)),
}
MNI_MIDDLE = np.array([0.0, -18.0, 5.0])  # of the template's brain: slices of registered volumes are centred there


@dataclass(frozen=True)
class Head:
    """Where the head is, in world mm, and which intensities become black and white."""

    low: np.ndarray  # [3] where it begins and ends; below, 170 mm under the top at most
    high: np.ndarray
    crown: float  # mm² of head in its highest plane: large if the volume ends below the top of the head
    black: float
    white: float

    @property
    def top(self) -> float:
        return float(self.high[2])

    @property
    def middle(self) -> np.ndarray:
        """[x, y, z]"""
        return (self.low + self.high) / 2


# ---------------------------------------------------------------------------------------------------------------------
# What is in a volume


def faces(voxels: np.ndarray) -> np.ndarray:
    """The values on the six faces of a volume, in one row: mostly air, or what a mask left."""
    return np.concatenate([voxels.take(end, axis).ravel() for axis in range(3) for end in (0, -1)])


def commonest(values: np.ndarray) -> tuple[float, float]:
    """The value that occurs most often, and its share of all."""
    unique, counts = np.unique(values, return_counts=True)
    return float(unique[counts.argmax()]), float(counts.max() / len(values))


def why_not_mri(volume: Volume) -> str:
    """Why this is no grey image of a head, as far as intensities show it: a label map, or a statistical map; else "".

    In a map of labels, or of the probability of a tissue, most neighbours are equal. In a statistical map the
    background is 0 and the values lie evenly on both sides of it. Of a z-scored MRI, dark liquor makes the distribution
    skewed: in the 60 of ds002748, 24 to 32 % of the values are below the mean, and the skewness is -0.36 to -0.87.
    """
    voxels = volume.voxels
    middle = voxels[tuple(slice(n // 4, n - n // 4) for n in voxels.shape)]
    first, second = middle[:-1].reshape(-1), middle[1:].reshape(-1)
    of_head = (first != 0) | (second != 0)
    if of_head.sum() > 1000 and np.mean((first == second)[of_head]) > 0.7:
        return "most neighbouring voxels are equal: a map of labels or probabilities, or a mask"
    values = middle[middle != 0]
    if len(values) > 1000 and np.mean(middle == 0) < 0.99 and np.mean(voxels == 0) > 0.2:
        values = values.astype(np.float64)
        score = (values - values.mean()) / max(values.std(), 1e-12)
        below = np.mean(values < 0)
        if 0.4 < below < 0.6 and abs(np.mean(score**3)) < 0.3 and np.mean(score**4) > 2.5:
            return "its values lie on both sides of a background of 0, as a statistical map's do"
    return ""


def find_head(volume: Volume, window: tuple[float, float]) -> Head:
    """Find the head in a volume, with or without a skull, and blacken what is outside. Unusable if there is none.

    Nothing is assumed about the intensity of air. Where one value that is not the lowest fills much of the volume's
    faces, as in masked z-scores, that value is background. Where the faces are noisier than the head, as in MP2RAGE's
    uniform images, the head is where neighbouring voxels agree. Otherwise it is what is brighter than half of Otsu's
    threshold, counted from the faces' median. It begins and ends at the first and last plane (2 mm thick) with at least
    2 cm² of it. Black and white are percentiles (`window`) of the brain's intensities: of what is brighter than the
    background within 50 mm of a point 75 mm below the top, which is brain whether or not there is a skull around it.
    """
    cv2 = import_cv2()
    from scipy import ndimage

    # A coarse copy, about 2 mm, is accurate enough; of that, the faces.
    voxels = volume.voxels
    stride = [max(1, int(2 / s)) for s in volume.sizes]
    coarse = voxels[:: stride[0], :: stride[1], :: stride[2]]
    outer = faces(coarse)
    masked, share = commonest(outer)
    air = float(np.median(outer))
    bottom, peak = np.percentile(coarse, (0.2, 99.8))
    if not np.isfinite(peak) or peak <= air:
        raise Unusable("empty: nothing is brighter than its edges")

    # Foreground, by the kind of background
    spread = 1.4826 * np.median(np.abs(outer - air))
    outside: np.ndarray | None = None  # of the head, voxel by voxel, where it cannot be left as it is
    if share > 0.3 and np.mean(coarse < masked) > 0.01:
        inside = coarse != masked
        bright = inside
        outside = voxels == masked
    elif spread > 0.15 * (peak - bottom):
        mean, square = (
            ndimage.uniform_filter(x.astype(np.float64), 3) for x in (coarse, coarse.astype(np.float64) ** 2)
        )
        noise = np.sqrt(np.maximum(square - mean**2, 0))
        scaled = np.clip(noise * (255 / max(noise.max(), 1e-12)), 0, 255).astype(np.uint8)
        threshold = cv2.threshold(scaled.reshape(-1, 1), 0, 0, cv2.THRESH_OTSU)[0]
        inside = ndimage.binary_opening(scaled <= threshold, iterations=2)
        pieces, count = ndimage.label(inside)
        if not count:
            raise Unusable("no head found: noise everywhere")
        inside = ndimage.binary_fill_holes(pieces == 1 + np.bincount(pieces.ravel())[1:].argmax())
        whole = ndimage.binary_dilation(inside, iterations=2)  # at its edge, scalp and noise are alike
        bright = inside = ndimage.binary_dilation(whole)
        for axis, step in enumerate(stride):
            whole = whole.repeat(step, axis)
        outside = ~whole[tuple(slice(n) for n in voxels.shape)]
    else:
        grey = np.clip((coarse - air) * (255 / (peak - air)), 0, 255).astype(np.uint8)
        threshold = cv2.threshold(grey.reshape(-1, 1), 0, 0, cv2.THRESH_OTSU)[0]
        inside, bright = grey > threshold / 2, coarse > air
    voxel_volume = np.prod(volume.sizes) * np.prod(stride)  # of the coarse copy, mm³
    world = np.argwhere(inside) * stride @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    if len(world) * voxel_volume < 1e5:
        raise Unusable(f"no head found: only {len(world) * voxel_volume / 1000:.0f} cm³ are brighter than the rest")

    def extent(x: np.ndarray) -> tuple[float, float, float]:
        """First and last coordinate (mm) along an axis where a plane holds 200 mm² of head or more; the last's mm²."""
        # Rounded before binning, so that a volume and its mirror image fall into the same 2 mm bins.
        bins = np.floor(x.round(3) / 2).astype(int)
        areas = np.bincount(bins - bins.min()) * voxel_volume / 2  # mm²
        filled = np.flatnonzero(areas >= 200)
        if not len(filled):
            raise Unusable("no head found: no plane has 2 cm² of it")
        return 2.0 * (filled[0] + bins.min()), 2.0 * (filled[-1] + 1 + bins.min()), float(areas[filled[-1]])

    # Where it begins and ends; neck and shoulders, more than 170 mm below the top, would shift the middle
    _, top, crown = extent(world[:, 2])
    world = world[world[:, 2] > top - 170]
    low, high, _ = np.array([extent(world[:, axis]) for axis in range(3)]).T

    # Black and white, by the intensities around the brain's centre
    centre = np.array([*((low + high) / 2)[:2], top - 75])
    place = np.argwhere(bright) * stride @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    values = coarse[bright][np.linalg.norm(place - centre, axis=1) < 50]
    if len(values) < 100:
        raise Unusable("no brain found within 50 mm of where it should be")
    black, white = np.percentile(values, window)
    if white <= black:
        raise Unusable("all of its brain has one intensity")
    if outside is not None:
        voxels[outside] = black
    return Head(low, high, crown, float(black), float(white))


# ---------------------------------------------------------------------------------------------------------------------
# Slices


@dataclass(frozen=True)
class Cut:
    """What is cut out of a volume, decided before the first slice is."""

    head: Head
    positions: list[tuple[int, float, float]]  # (number of the slice, its level as attributes.csv has it, world mm)
    missing: str  # which part of --range the volume does not cover, as a sentence; "" if it covers all


def plan_cut(volume: Volume, cfg: SliceConfig) -> Cut:
    """Find the head and decide which slices are cut.

    A level is in mm and grows upwards (coronal: to the front, sagittal: to the right): of registered volumes the
    coordinate of MNI152; else axial ones are counted from the top of the head, the others from its middle. Unusable if
    the volume covers less than half of the slices that are asked for.
    """
    head, plane, registered = find_head(volume, cfg.window), PLANES[cfg.plane], cfg.register != "off"
    across = plane.across
    side = [axis for axis in range(3) if axis != across]
    if (head.high - head.low)[side].min() < 90:
        raise Unusable("it shows {:.0f} x {:.0f} x {:.0f} mm, less than a head".format(*(head.high - head.low)))
    if across == 2 and not registered and head.crown > 5000:
        raise Unusable("it ends below the top of the head, from which slices are counted: --register does without it")
    first, last = cfg.range or (plane.registered if registered else plane.range)
    asked = np.arange(first, last + 1e-6, cfg.spacing)
    if registered:
        world, level = asked, asked
    elif across == 2:
        world, level = head.top - asked, -asked
    else:
        world, level = head.middle[across] + asked, asked

    # A slice is covered if nine tenths of the ellipse that the head may fill there lie in the volume.
    u, v = np.meshgrid(np.linspace(-0.9, 0.9, 25), np.linspace(-0.9, 0.9, 25))
    u, v = u[u**2 + v**2 < 0.81], v[u**2 + v**2 < 0.81]
    points, half = np.empty((3, len(u))), (head.high - head.low) / 2
    for axis, x in zip(side, (u, v)):
        points[axis] = head.middle[axis] + x * half[axis]
    to_voxel, shape = np.linalg.inv(volume.affine), np.array(volume.voxels.shape)[:, None]

    def covered(mm: float) -> bool:
        points[across] = mm
        index = to_voxel[:3, :3] @ points + to_voxel[:3, 3:]
        return bool(np.mean(((index > -0.51) & (index < shape - 0.49)).all(0)) >= 0.9)

    inside = [covered(mm) for mm in world]
    if sum(inside) < len(inside) / 2:
        seen = f"{asked[inside].min():g} to {asked[inside].max():g}" if any(inside) else "none"
        raise Unusable(f"of the slices from {first:g} to {last:g} mm it covers {seen}: choose another --range")
    missing = ""
    if not all(inside):
        missing = f"covers {asked[inside].min():g} to {asked[inside].max():g} mm of {first:g} to {last:g}"
    positions = [(k, float(level[k]), float(world[k])) for k in np.flatnonzero(inside).tolist()]
    return Cut(head, positions, missing)


def size_of_slices(cfg: SliceConfig) -> tuple[float, float, int]:
    """(side in mm, side of a pixel in mm, pixels along each side). A brain without its skull needs less room."""
    side = cfg.frame or (200.0 if cfg.strip else 240.0)
    pixel = cfg.pixel_size or side / 256
    return side, pixel, round(side / pixel)


def cut(volume: Volume, cfg: SliceConfig, what: Cut) -> Iterator[tuple[int, float, np.ndarray]]:
    """(number, level, grey uint8 [H, W]) of each planned slice that is not all black.

    Every slice shows the same square of mm around the head, whatever the volume's field of view is. Voxels are
    interpolated linearly. But if the volume's own planes are parallel to the cut, a slice is the nearest of them: the
    mean of two neighbouring planes would be smoother than either. If pixels are larger than voxels, slices are cut with
    finer pixels and averaged.
    """
    cv2 = import_cv2()
    from scipy.ndimage import map_coordinates

    # The middle of the frame. Slices that show the vertical have the top of the head 15 mm below their upper edge.
    plane, head, (side, pixel, count) = PLANES[cfg.plane], what.head, size_of_slices(cfg)
    middle = MNI_MIDDLE if cfg.register != "off" else np.array([*head.middle[:2], head.top + 15 - side / 2])

    # World coordinates of the rows and columns
    finest = float(volume.sizes.min())
    finer = max(1, round(pixel / finest))  # pixels per final pixel, along each side
    offsets = (np.arange(count * finer) - (count * finer - 1) / 2) * (pixel / finer)
    grid = np.empty((3, len(offsets), len(offsets)))
    grid[plane.down[0]] = (middle[plane.down[0]] + plane.down[1] * offsets)[:, None]
    grid[plane.right[0]] = (middle[plane.right[0]] + plane.right[1] * offsets)[None]

    # The volume's axis that runs across the slices, and whether its planes are parallel to them
    to_voxel = np.linalg.inv(volume.affine)
    own = np.abs(to_voxel[:3, plane.across]).argmax()
    parallel = np.abs(to_voxel[own, plane.across]) > 0.99999 * np.linalg.norm(to_voxel[own, :3])

    for number, level, mm in what.positions:
        # A position halfway between two planes must round to the same plane however the volume is stored: hence 0.01.
        grid[plane.across] = mm + 0.01 * parallel
        index = np.einsum("ij,jhw->ihw", to_voxel[:3, :3], grid) + to_voxel[:3, 3, None, None]
        if parallel:
            index[own] = np.round(index[own])
        # Rounded, so that the centre of a voxel gives exactly that voxel in spite of floating-point errors.
        image = map_coordinates(volume.voxels, index.round(4), order=1, mode="constant", cval=head.black)
        if finer > 1:
            image = cv2.resize(image, (count, count), interpolation=cv2.INTER_AREA)
        image = np.clip((image - head.black) * (255 / (head.white - head.black)), 0, 255).round().astype(np.uint8)
        if image.any():
            yield number, level, image
