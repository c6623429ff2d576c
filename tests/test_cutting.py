"""Where the head is, what is grey MRI, and how slices lie in the world: on volumes in memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from test_volumes import SHAPE, sampled, upright

from config import SliceConfig
from cutting import PLANES, cut, find_head, plan_cut, why_not_mri
from readers import Unusable, Volume

CFG = SliceConfig("in", "out", range=(40.0, 70.0), spacing=10.0)
RNG = np.random.default_rng(0)


def noisy_head(affine: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Skull, folded brain, noise inside; outside of it is 0."""
    voxels = 10 * sampled(affine, shape)
    return np.where(voxels > 0, voxels + RNG.normal(0, 15, shape), 0).astype(np.float32)


def images(volume: Volume, cfg: SliceConfig = CFG) -> dict[float, np.ndarray]:
    """{level: slice}, as float."""
    return {level: image.astype(float) for _, level, image in cut(volume, cfg, plan_cut(volume, cfg))}


def standardised(x: np.ndarray, inside: np.ndarray) -> np.ndarray:
    return (x - x[inside].mean()) / x[inside].std()


AFFINE = upright()
HEAD = noisy_head(AFFINE, SHAPE)
INSIDE = HEAD > 0
SCALES = {
    "z-scores": standardised(HEAD, INSIDE),
    "masked z-scores": np.where(INSIDE, standardised(HEAD, INSIDE), 0),
    "from -1 to 1": HEAD / HEAD.max() * 2 - 1,
    "as CT": HEAD - 1024,
    "tiny": HEAD * 1e-9,
}


@pytest.mark.parametrize("name", SCALES)
def test_air_need_not_be_zero(name: str):
    want, got = images(Volume(HEAD.copy(), AFFINE)), images(Volume(SCALES[name].astype(np.float32), AFFINE))
    assert got.keys() == want.keys()
    for level, image in got.items():
        assert np.abs(image - want[level]).mean() < 3 and image[:20, :20].max() == 0


@pytest.mark.parametrize("loud", [0.5, 1.0, 2.0])
def test_noise_outside_of_the_head_is_blackened(loud: float):
    """As in MP2RAGE's uniform images, where air is whatever two weak signals make of it."""
    noise = RNG.uniform(0, loud * HEAD.max(), SHAPE).astype(np.float32)
    want, got = find_head(Volume(HEAD.copy(), AFFINE), (0.5, 99.5)), Volume(np.where(INSIDE, HEAD, noise), AFFINE)
    head = find_head(got, (0.5, 99.5))
    assert np.abs(head.high - want.high).max() <= 6 and np.abs(head.middle[:2] - want.middle[:2]).max() <= 4
    assert (head.black, head.white) == pytest.approx((want.black, want.white), rel=0.05)
    for image in images(got).values():
        assert image[:20].max() == image[:, :20].max() == 0 and image[100:150, 100:150].mean() > 30


@pytest.mark.parametrize("size", [(1.0, 1.0, 1.0), (0.9, 1.2, 2.0), (2.4, 2.4, 2.4)])
@pytest.mark.parametrize("margin", [0, 40])
def test_the_field_of_view_does_not_set_the_scale(size: tuple, margin: int):
    """The same head in a tight and in a wide volume, in fine and coarse voxels: as many pixels."""
    tight = np.array([150, 176, 176])  # mm
    reference = images(Volume(sampled(upright(1.0, tight), tight), upright(1.0, tight)))
    shape = np.ceil((tight + 2 * margin) / size).astype(int)
    affine = upright(size, shape)
    got = images(Volume(sampled(affine, shape), affine))
    assert got.keys() == reference.keys()
    for level, image in got.items():
        assert image.shape == (256, 256)
        for axis in (0, 1):
            widths = [np.ptp(np.flatnonzero((x > 60).any(axis))) for x in (image, reference[level])]
            assert widths[0] == pytest.approx(widths[1], abs=4)


@pytest.mark.parametrize("angle", [0, 18, 30])
def test_tilt_costs_nothing(angle: float):
    """A volume whose axes lie obliquely in the world, around a head that does not."""
    turned = np.eye(4)
    turned[:3, :3] = Rotation.from_euler("x", angle, degrees=True).as_matrix()
    shape = np.array([100, 100, 100])
    affine = turned @ upright(2.0, shape)
    assert len(images(Volume(sampled(affine, shape), affine))) == 4


def test_what_the_volume_does_not_cover_is_said_before_it_is_cut():
    slab = HEAD[:, :, 36:]  # 93 mm from the top
    what = plan_cut(Volume(slab.copy(), AFFINE @ moved(2, 36)), replace(CFG, range=(70.0, 110.0)))
    assert [-level for _, level, _ in what.positions] == [
        70,
        80,
        90,
    ] and what.missing == "covers 70 to 90 mm of 70 to 110"
    with pytest.raises(Unusable, match="of the slices from 90 to 150 mm it covers 90 to 90: choose another --range"):
        plan_cut(Volume(slab.copy(), AFFINE @ moved(2, 36)), replace(CFG, range=(90.0, 150.0)))
    # An oblique slab would give slices of stripes
    turned, shape = np.eye(4), np.array([100, 100, 15])
    turned[:3, :3] = Rotation.from_euler("x", 35, degrees=True).as_matrix()
    affine = turned @ upright((2.0, 2.0, 4.0), shape)
    with pytest.raises(Unusable, match="choose another --range"):
        plan_cut(Volume(sampled(affine, shape), affine), CFG)


def moved(axis: int, voxels: int) -> np.ndarray:
    """The matrix that gives a volume's part from this voxel on its place."""
    matrix = np.eye(4)
    matrix[axis, 3] = voxels
    return matrix


def test_registered_volumes_are_cut_at_coordinates_of_the_template():
    """Levels are its coordinates, and its middle is the middle of the frame, wherever the head lies."""
    up = AFFINE.copy()
    up[:3, 3] += [0, -18, -5]
    cfg = replace(CFG, range=None, spacing=31.0, frame=200.0, register="affine")
    found = images(Volume(HEAD.copy(), up), cfg)
    assert [*found] == [*PLANES["axial"].registered]
    off = up.copy()
    off[:3, 3] += [12, 0, 0]
    beside = images(Volume(HEAD.copy(), off), cfg)
    columns = [np.flatnonzero((x[5.0] > 60).any(0)).mean() for x in (found, beside)]
    assert columns[0] == pytest.approx(127.5, abs=2) and columns[0] - columns[1] == pytest.approx(12 / 200 * 256, abs=1)


def test_maps_are_no_mri():
    labels = np.digitize(HEAD, [100, 500, 800]).astype(np.float32)
    probability = gaussian_filter(INSIDE.astype(np.float32), 1).round(2)
    smooth = gaussian_filter(RNG.normal(0, 1, SHAPE), 2)
    statistic = np.where(INSIDE, smooth / smooth.std(), 0).astype(np.float32)
    noise = np.where(INSIDE, RNG.normal(0, 1, SHAPE), 0).astype(np.float32)
    for x, word in ((labels, "labels"), (INSIDE.astype(np.float32), "mask"), (probability, "probabilities"),
                    (statistic, "statistical"), (noise, "statistical")):  # fmt: skip
        assert word in why_not_mri(Volume(x, AFFINE))
    for x in (HEAD, HEAD.round(), *SCALES.values()):
        assert why_not_mri(Volume(np.asarray(x, np.float32), AFFINE)) == ""
