"""Skull, brightness and registration: on the template's own brain, moved and spoilt, and on a real head."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from scipy import ndimage
from scipy.spatial.transform import Rotation
from test_volumes import table

import prepare
from prepare import Prepared, has_no_skull, template
from readers import Unusable, Volume, read_volume

CPU = torch.device("cpu")
REAL = ROOT.parent / "shared" / "data"
MIDDLE = np.array([0.0, -18, 10])


def brain(moved: np.ndarray) -> Volume:
    """The template's brain, somewhere else in the world: stripped, 0 outside."""
    voxels, affine, _ = template()
    return Volume(voxels.copy(), moved @ affine)


def motion(degrees: tuple[float, float, float], shift: tuple[float, float, float], scale: float = 1.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = scale * Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = shift
    return matrix


def prepared(volume: Volume, folder: Path, key: str = "k", **how) -> Prepared:
    return prepare.prepare(
        volume, **{"strip": False, "bias": False, "register": "off", **how}, folder=folder, key=key, device=CPU
    )


def error(found: Volume) -> float:
    """Largest distance in mm of points of the brain from where they belong in the template."""
    corners = MIDDLE + 60 * np.array(np.meshgrid(*[(-1, 1)] * 3)).reshape(3, -1).T
    _, affine, _ = template()
    moved = found.affine @ np.linalg.inv(affine)
    return float(np.abs(corners @ moved[:3, :3].T + moved[:3, 3] - corners).max())


@pytest.mark.parametrize(
    ("kind", "matrix", "least"),
    [
        ("rigid", motion((12, -8, 15), (20, -30, 12)), 1.0),
        ("affine", motion((-10, 5, -12), (-15, 25, 40), 1.12) @ np.diag([1.05, 1, 0.95, 1]), 1.5),
    ],
)
def test_a_moved_brain_is_moved_back(kind: str, matrix: np.ndarray, least: float, tmp_path: Path):
    """However its axes are stored; and no voxel is interpolated."""
    volume = brain(matrix)
    done = prepared(volume, tmp_path, register=kind)
    assert np.array_equal(done.volume.voxels, volume.voxels)
    assert error(done.volume) < least and done.facts["similarity"] > 0.95
    turned = nibabel.as_closest_canonical(
        nibabel.Nifti1Image(volume.voxels[::-1].transpose(2, 0, 1), volume.affine @ swap(volume))
    )
    other = prepared(Volume(np.asarray(turned.dataobj, np.float32), turned.affine), tmp_path, "other", register=kind)
    ends = [prepared_middle(x.volume) for x in (done, other)]
    assert np.abs(ends[0] - ends[1]).max() < 1


def swap(volume: Volume) -> np.ndarray:
    """The change of index for voxels[::-1].transpose(2, 0, 1)."""
    n = volume.voxels.shape[0]
    return np.array([[0, -1, 0, n - 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])


def prepared_middle(volume: Volume) -> np.ndarray:
    return volume.affine[:3, :3] @ np.array(ndimage.center_of_mass(volume.voxels)) + volume.affine[:3, 3]


@pytest.mark.full
@pytest.mark.parametrize("degrees", [(90, 0, 0), (35, 20, -30)])
def test_a_brain_that_lies_otherwise_is_found_from_turned_starts(degrees: tuple, tmp_path: Path):
    assert error(prepared(brain(motion(degrees, (5, 5, 5))), tmp_path, register="rigid").volume) < 1.5


def test_what_is_no_brain_is_not_aligned(tmp_path: Path):
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, 60)] * 3, indexing="ij")
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(0, 1, x.shape), 3)
    lump = np.where(x**2 + y**2 + z**2 < 0.8, 100 + 300 * noise, 0).astype(np.float32)
    with pytest.raises(Unusable, match=r"could not be aligned with the template \(similarity 0\.\d\d, at least"):
        prepared(Volume(lump, np.diag([3.0, 3, 3, 1])), tmp_path, register="rigid")
    with pytest.raises(Unusable, match="no brain was found"):
        prepared(Volume(lump, np.diag([1.0, 1, 1, 1])), tmp_path, strip=True)


def test_a_bias_field_is_evened_out(tmp_path: Path):
    volume = brain(np.eye(4))
    i, j, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in volume.voxels.shape), indexing="ij")
    spoilt = Volume((volume.voxels * np.exp(0.3 * i + 0.2 * j)).astype(np.float32), volume.affine)
    white = volume.voxels > 0.85 * volume.voxels.max()

    def variation(x: np.ndarray) -> float:
        return float(x[white].std() / x[white].mean())

    done = prepared(spoilt, tmp_path, bias=True).volume
    assert variation(done.voxels) - variation(volume.voxels) < 0.3 * (
        variation(spoilt.voxels) - variation(volume.voxels)
    )


def test_what_was_found_is_remembered_by_content_and_made_again_if_damaged(tmp_path: Path):
    volume = brain(motion((5, 0, 0), (9, 0, 0)))
    first = prepared(volume, tmp_path, register="rigid")
    (file,) = (tmp_path / "prepared").iterdir()
    kept = file.read_bytes()
    # What is there is believed: with another matrix in it, the result is another.
    np.savez(tmp_path / "x.npz", matrix=np.linalg.inv(motion((5, 0, 0), (10, 0, 0))))
    file.write_bytes((tmp_path / "x.npz").read_bytes())
    second = prepared(volume, tmp_path, register="rigid")
    assert not np.array_equal(second.volume.affine, first.volume.affine)
    # What is damaged is made again, to the bit.
    for data in (b"", b"rubbish", kept[:200]):
        file.write_bytes(data)
        again = prepared(volume, tmp_path, register="rigid")
        assert np.array_equal(again.volume.affine, first.volume.affine) and file.read_bytes() != data
    # Another content, or another place in the world, is another volume.
    prepared(brain(motion((5, 0, 0), (8, 0, 0))), tmp_path, register="rigid")
    assert len([*(tmp_path / "prepared").iterdir()]) == 2


def test_a_brain_without_skull_is_recognised(tmp_path: Path):
    assert has_no_skull(brain(np.eye(4)))
    voxels, affine, _ = template()
    head = ndimage.binary_dilation(voxels > 0, iterations=9)  # 18 mm of skull and scalp
    assert not has_no_skull(Volume(np.where(voxels > 0, voxels, 0.7 * head).astype(np.float32), affine))
    noise = np.random.default_rng(0).uniform(0, 9, voxels.shape).astype(np.float32)
    assert not has_no_skull(Volume(voxels + noise, affine))
    stripped = prepared(brain(np.eye(4)), tmp_path, strip=True)
    assert stripped.facts["already_stripped"] and np.array_equal(stripped.volume.voxels, voxels)


@pytest.mark.full
@pytest.mark.skipif(not (REAL / "ds000011").exists(), reason="the real heads are not beside this checkout")
def test_a_raw_head_and_a_stripped_one_come_out_alike(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sub-raw_T1w.nii.gz").symlink_to(REAL / "ds000011" / "sub-01_T1w.nii.gz")
    (tmp_path / "in" / "sub-done_T1w.nii.gz").symlink_to(REAL / "ds002748-volumes" / "sub-01_T1w.nii.gz")
    flags = ["--prepare", "all", "--spacing", "31", "--cache", tmp_path / "cache"]
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", *flags)
    rows = {r["patient"]: r for r in table(tmp_path / "out")}
    for person, low, high in (("sub-raw", 1300, 1700), ("sub-done", 1300, 1700)):
        assert low < float(rows[person]["brain_ml"]) < high and float(rows[person]["similarity"]) > 0.8
    raw = read_volume(tmp_path / "in" / "sub-raw_T1w.nii.gz")
    assert not has_no_skull(raw) and has_no_skull(read_volume(tmp_path / "in" / "sub-done_T1w.nii.gz"))
    import cv2

    a, b = (cv2.imread(str(tmp_path / f"out/train/all/sub-{n}_T1w_000.png"), 0) > 40 for n in ("raw", "done"))
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9  # two people, one level
