"""Prepare a volume before it is cut: remove the skull, even out the brightness, align the brain with MNI152.

Registration is linear and changes only the volume's affine, so voxels are interpolated once, when slices are cut. What
takes time is remembered by the content of the volume: the mask, the bias field, and the matrix.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from cutting import MNI_MIDDLE, commonest, faces
from readers import Unusable, Volume
from weights import write_atomic

VERSION = 1  # of what is remembered: raise it when a step changes
# Correlation ratio with the template below which a registration has failed. Of 69 brains of ds000011 and ds002748 it is
# 0.81 to 0.90, of some of them turned by 15 degrees or moved by 10 mm 0.74 at most.
SIMILAR = 0.78
LPS = np.diag([-1.0, -1, 1, 1])  # between the RAS+ world of volumes and the LPS+ world of ITK
ONE_AT_A_TIME = threading.Lock()  # deepbet takes 1 GB


@dataclass(frozen=True)
class Prepared:
    """The volume, and what was found out about it: brain_ml, similarity, already_stripped, scale."""

    volume: Volume
    facts: dict[str, float | bool] = field(default_factory=dict)


def prepare(
    volume: Volume, strip: bool, bias: bool, register: str, folder: Path, key: str, device: torch.device
) -> Prepared:
    """The volume after these steps. `key` stands for its content; what the steps find is kept in `folder`/prepared/.

    Unusable if no brain is found, or if it cannot be aligned.
    """
    facts: dict[str, float | bool] = {}
    place = hashlib.blake2b(np.round(volume.affine, 4).tobytes(), digest_size=4).hexdigest()
    name, voxels = f"v{VERSION}-{key}-{place}", volume.voxels

    def remembered(step: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return remember(folder / "prepared" / f"{name}-{step}.npz", make)

    # The brain: as it is, or found by deepbet. It is needed by every step.
    facts["already_stripped"] = has_no_skull(volume)
    if facts["already_stripped"]:
        brain = voxels != commonest(faces(voxels))[0]
    else:
        packed = remembered("brain", lambda: {"bits": np.packbits(find_brain(volume, device))})
        brain = np.unpackbits(packed["bits"], count=voxels.size).astype(bool).reshape(voxels.shape)
    facts["brain_ml"] = float(brain.sum() * np.prod(volume.sizes) / 1000)
    if facts["brain_ml"] < 300:
        raise Unusable(f"no brain was found: only {facts['brain_ml']:.0f} ml of it")
    if strip and not facts["already_stripped"]:
        voxels = np.where(brain, voxels, voxels[brain].min())

    if bias:
        log_field = remembered("bias", lambda: {"log": find_bias(volume, brain)})["log"]
        lowest = voxels[brain].min()
        voxels = (voxels - lowest) / np.exp(enlarged(log_field, bias_steps(volume), voxels.shape)) + lowest
    affine = volume.affine
    if register != "off":
        small, grid = coarse(Volume(np.where(brain, voxels, voxels[brain].min()), affine))
        matrix = remembered(f"affine{bias:d}", lambda: {"matrix": find_alignment(small, grid)})["matrix"]
        facts["similarity"] = similarity(small, grid, np.linalg.inv(matrix))
        facts["scale"] = float(np.cbrt(np.linalg.det(matrix[:3, :3])))
        if facts["similarity"] < SIMILAR:
            raise Unusable(
                f"its brain could not be aligned with the template (similarity {facts['similarity']:.2f}, at least "
                f"{SIMILAR} is needed): look at it, or leave out --register"
            )
        affine = (rigid(matrix) if register == "rigid" else matrix) @ affine
    return Prepared(Volume(voxels.astype(np.float32), affine, volume.note), facts)


def remember(path: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What is in this file; if it is not there, or damaged, make it and write it."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return dict(found)
    except Exception:  # a damaged archive can make its reader fail in any way
        made = make()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **made)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The brain


def has_no_skull(volume: Volume) -> bool:
    """Is the skull removed already? Then half of the volume or more has one value, and the rest is as large as a brain.

    Of ds002748's brains, 63 to 68 % are one value and the rest is 1,148 to 1,620 ml; of ds000011's heads, 17 to 19 %
    and 8,500 ml. A head whose air was set to 0 is still twice as large as a brain.
    """
    inside = volume.voxels != commonest(faces(volume.voxels))[0]
    return bool(inside.mean() < 0.6 and inside.sum() * np.prod(volume.sizes) < 2.2e6)


@cache
def brain_finder(device: torch.device) -> Any:
    """deepbet's two networks, on this device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from deepbet.bet import BrainExtraction

        finder = BrainExtraction(no_gpu=True)
    finder.model, finder.bbox_model = finder.model.to(device), finder.bbox_model.to(device)
    return finder


def find_brain(volume: Volume, device: torch.device) -> np.ndarray:
    """The brain with its liquor, by deepbet (Fisch et al. 2024): bool, like the voxels. Unusable if there is none."""
    from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

    upright = io_orientation(volume.affine)
    voxels = np.ascontiguousarray(apply_orientation(volume.voxels, upright))
    with ONE_AT_A_TIME:
        finder = brain_finder(device)
        try:
            mask = finder.postprocess(finder.run_model(voxels) > 0.5)
        except (AssertionError, IndexError, RuntimeError) as e:  # of what is no head
            if isinstance(e, torch.OutOfMemoryError):
                raise
            raise Unusable("no brain was found in it") from None
    back = ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), upright)
    return np.asarray(apply_orientation(np.asarray(mask, bool), back))


# ---------------------------------------------------------------------------------------------------------------------
# Brightness


def find_bias(volume: Volume, brain: np.ndarray) -> np.ndarray:
    """The logarithm of the bias field by N4 (Tustison et al. 2010), on a grid of 4 mm: float32 [i, j, k]."""
    import SimpleITK as itk

    itk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # several volumes are worked on at the same time
    steps = bias_steps(volume)
    small, inside = (x[:: steps[0], :: steps[1], :: steps[2]] for x in (volume.voxels, brain))
    low = float(small[inside].min())
    shifted = small - low + 1e-3 * np.ptp(small[inside])  # N4 takes logarithms
    image = itk.GetImageFromArray(np.where(inside, shifted, 0).astype(np.float32))
    mask = itk.GetImageFromArray(inside.astype(np.uint8))
    for x in (image, mask):
        x.SetSpacing([float(v) for v in (volume.sizes * steps)[::-1]])
    corrector = itk.N4BiasFieldCorrectionImageFilter()
    corrector.SetMaximumNumberOfIterations([50, 50, 50])
    corrector.Execute(image, mask)
    return itk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(image)).astype(np.float32)


def bias_steps(volume: Volume) -> tuple[int, ...]:
    """Voxels between two points of the bias field's grid, along each axis: about 4 mm."""
    return tuple(max(1, round(4 / s)) for s in volume.sizes)


def enlarged(grid: np.ndarray, steps: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The values of a grid, which has one every few voxels from the first on, at every voxel: float32."""
    index = np.meshgrid(*(np.arange(n) / s for n, s in zip(shape, steps)), indexing="ij")
    return ndimage.map_coordinates(grid, index, order=1, mode="nearest", output=np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Registration


@cache
def template() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(voxels, affine, smoothed voxels) of the brain of the MNI152 template that nilearn's package brings, at 2 mm."""
    import nibabel

    spec = importlib.util.find_spec("nilearn")
    assert spec and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    image: Any = nibabel.load(folder / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz")
    voxels = ndimage.uniform_filter(np.asarray(image.dataobj, np.float32), 2)[::2, ::2, ::2]
    affine = image.affine @ np.diag([2.0, 2, 2, 1])
    return voxels, affine, ndimage.gaussian_filter(voxels, 2)


def as_itk(voxels: np.ndarray, affine: np.ndarray) -> Any:
    """An ITK image of these voxels. Its axes must be perpendicular to one another."""
    import SimpleITK as itk

    image = itk.GetImageFromArray(np.ascontiguousarray(voxels.T, np.float32))
    world = LPS @ affine
    sizes = np.linalg.norm(world[:3, :3], axis=0)
    u, _, v = np.linalg.svd(world[:3, :3] / sizes)  # the nearest matrix with perpendicular axes
    image.SetSpacing(sizes.tolist())
    image.SetDirection((u @ v).ravel().tolist())
    image.SetOrigin(world[:3, 3].tolist())
    return image


def coarse(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """(voxels, affine) of about 2 mm."""
    steps = tuple(max(1, round(2 / s)) for s in volume.sizes)
    small = ndimage.uniform_filter(volume.voxels, steps)[:: steps[0], :: steps[1], :: steps[2]]
    return small - small.min(), volume.affine @ np.diag([*steps, 1.0])


def rigid(matrix: np.ndarray) -> np.ndarray:
    """The rotation and shift of an affine matrix, by its polar decomposition; the template's middle stays in place.

    Fitted by itself, a rotation would suffer from the template being larger than most brains.
    """
    u, _, v = np.linalg.svd(matrix[:3, :3])
    turned = np.eye(4)
    turned[:3, :3] = u @ v
    turned[:3, 3] = MNI_MIDDLE - turned[:3, :3] @ np.linalg.solve(matrix[:3, :3], MNI_MIDDLE - matrix[:3, 3])
    return turned


def find_alignment(brain: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The matrix [4, 4], 12 degrees of freedom, from the world of a brain (0 outside) to the template's, RAS+ mm.

    First as the header has it turned, with the middles on one another; if that fails, from turned starts.
    """
    fixed_voxels, fixed_affine = template()[:2]
    fixed, moving = as_itk(fixed_voxels, fixed_affine), as_itk(brain, affine)
    pairs = ((fixed_voxels, fixed_affine), (brain, affine))
    start, end = (a[:3, :3] @ np.array(ndimage.center_of_mass(x > 0.2 * x.max())) + a[:3, 3] for x, a in pairs)

    def attempt(guess: np.ndarray, quick: bool = False) -> tuple[float, np.ndarray]:
        """(similarity, matrix from the template to the brain) after optimising from this guess."""
        matrix = LPS @ optimised(fixed, moving, LPS @ guess @ LPS, start * [-1, -1, 1], quick) @ LPS
        return similarity(brain, affine, matrix), matrix

    def turned(turn: np.ndarray) -> np.ndarray:
        guess = np.eye(4)
        guess[:3, :3], guess[:3, 3] = turn, end - turn @ start
        return guess

    found = attempt(turned(np.eye(3)))
    if found[0] < SIMILAR:
        coarsely = sorted((attempt(turned(turn), quick=True) for turn in starts()), key=lambda a: -a[0])
        found = max([found, *(attempt(matrix) for _, matrix in coarsely[:2])], key=lambda a: a[0])
    return np.linalg.inv(found[1])


def starts() -> Iterator[np.ndarray]:
    """Rotations to begin with: by 35 degrees about each axis, and quarter and half turns."""
    for degrees, axis in product((35, -35, 90, -90, 180), "xyz"):
        yield Rotation.from_euler(axis, degrees, degrees=True).as_matrix()


def optimised(fixed: Any, moving: Any, guess: np.ndarray, centre: np.ndarray, quick: bool) -> np.ndarray:
    """The matrix [4, 4] from fixed to moving world (LPS+) with the largest mutual information (Mattes et al. 2003).

    First a rigid one, and from there an affine one. quick: rigid, at 6 mm only.
    """
    import SimpleITK as itk

    itk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # several volumes at a time; and sums in the same order
    initial = itk.AffineTransform(3)
    initial.SetMatrix(guess[:3, :3].ravel().tolist())
    initial.SetTranslation(guess[:3, 3].tolist())
    found = initial
    levels = 1 if quick else 2
    for degrees in ("rigid", "affine")[:levels]:
        step: Any = itk.Euler3DTransform() if degrees == "rigid" else itk.AffineTransform(3)
        step.SetCenter(centre.tolist())
        method = itk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentagePerLevel([0.5, 0.1][:levels], seed=1)
        method.SetInterpolator(itk.sitkLinear)
        method.SetShrinkFactorsPerLevel([3, 1][:levels])
        method.SetSmoothingSigmasPerLevel([4.0, 1.0][:levels])
        method.SetOptimizerAsRegularStepGradientDescent(2.0, 1e-3, 100, relaxationFactor=0.6)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetMovingInitialTransform(found)
        method.SetInitialTransform(step, inPlace=True)
        try:
            method.Execute(fixed, moving)
        except RuntimeError:  # the brains came apart
            break
        found = composed(found, step)
    return matrix_of(found)


def matrix_of(transform: Any) -> np.ndarray:
    """A linear ITK transform as a matrix [4, 4]."""
    matrix = np.eye(4)
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    for i, unit in enumerate(np.eye(3).tolist()):
        matrix[:3, i] = np.array(transform.TransformPoint(unit)) - matrix[:3, 3]
    return matrix


def composed(outer: Any, inner: Any) -> Any:
    """The affine ITK transform that does `inner` first."""
    import SimpleITK as itk

    matrix = matrix_of(outer) @ matrix_of(inner)
    both = itk.AffineTransform(3)
    both.SetMatrix(matrix[:3, :3].ravel().tolist())
    both.SetTranslation(matrix[:3, 3].tolist())
    return both


def similarity(voxels: np.ndarray, affine: np.ndarray, matrix: np.ndarray) -> float:
    """Correlation ratio (Roche et al. 1998): how much of a brain's contrast the template at the same place explains.

    1 if equal grey in the template means equal grey in the brain, whatever the contrast is, and 0 if it says nothing.
    `matrix` leads from the template's world to the brain's, RAS+.
    """
    fixed, fixed_affine, smooth = template()
    index = np.argwhere(fixed > 0)[::2]
    to_voxel = np.linalg.inv(affine) @ matrix @ fixed_affine
    # Both smoothed by 4 mm, because people's folds differ
    seen = ndimage.map_coordinates(
        ndimage.gaussian_filter(voxels, 2), to_voxel[:3, :3] @ index.T + to_voxel[:3, 3:], order=1
    )
    grey = smooth[tuple(index.T)]
    bins = np.minimum((grey / grey.max() * 32).astype(int), 31)
    count = np.bincount(bins, minlength=32)
    mean = np.bincount(bins, seen, 32) / np.maximum(count, 1)
    return float(np.sqrt(max(0.0, 1 - ((seen - mean[bins]) ** 2).mean() / max(seen.var(), 1e-20))))
