"""python dataset.py slice: made volumes, whole and damaged, in any orientation."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from conftest import PATIENCE, ROOT, run, run_any, start
from scipy.spatial.transform import Rotation

SHAPE = np.array([80, 96, 80])
VOXEL = 2.4


def head(world: np.ndarray, seed: int = 0) -> np.ndarray:
    """Intensities at world coordinates [..., 3]: a skull, a brain with folds, and a bright spot front right.

    Its top is at z = 85; the spot lies 60 mm below, 30 mm to the right and 35 mm in front of the middle.
    """
    x, y, z = np.moveaxis(world, -1, 0)
    outer, inner = ((x / a) ** 2 + (y / b) ** 2 + (z / b) ** 2 for a, b in ((72, 85), (62, 75)))
    folds = 60 + 12 * np.sin(x / 9 + seed) * np.cos(y / 11) * np.cos(z / 8)
    spot = 60 * np.exp(-((x - 30) ** 2 + (y - 35) ** 2 + (z - 25) ** 2) / 72)
    return np.where(outer > 1, 0, np.where(inner > 1, 90, folds + spot)).astype(np.float32)


def sampled(affine: np.ndarray, shape: np.ndarray, seed: int = 0) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return head(index @ affine[:3, :3].T + affine[:3, 3], seed)


def upright(voxel: float | tuple[float, float, float] = VOXEL, shape: np.ndarray = SHAPE) -> np.ndarray:
    """Affine of a RAS grid around the origin."""
    affine = np.diag([*np.broadcast_to(voxel, 3), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine


def write_nifti(path: Path, voxels: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return path


def write_dicom(
    folder: Path, voxels: np.ndarray, affine: np.ndarray, patient: str = "P1", series: int = 1
) -> list[Path]:
    """Slices along the last axis; affine in RAS, as NIfTI has it."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    paths = []
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MRImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = f"1.2.3.{series}.{k + 1}.{zlib.crc32(voxels[:, :, k].tobytes())}"
        ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        ds.SOPClassUID, ds.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        ds.PatientID, ds.SeriesInstanceUID, ds.Modality = (
            patient,
            f"1.2.3.{series}.{zlib.crc32(f'{patient}{folder}'.encode())}",
            "MR",
        )
        ds.SeriesNumber = series
        ds.Rows, ds.Columns = voxels.shape[:2]
        ds.PixelSpacing = [f"{sizes[0]:.6f}", f"{sizes[1]:.6f}"]
        along = [*lps[:3, 1] / sizes[1], *lps[:3, 0] / sizes[0]]
        ds.ImageOrientationPatient = [f"{v:.8f}" for v in along]
        ds.ImagePositionPatient = [f"{v:.6f}" for v in lps[:3, 3] + k * lps[:3, 2]]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = f"{0.01 + 0.001 * (k % 3)}", "-5"
        stored = (voxels[:, :, k] + 5) / (0.01 + 0.001 * (k % 3))
        ds.PixelData = stored.round().astype("<u2").tobytes()
        path = folder / f"{k * 7 % 100:02d}-{k}-{affine[0, 0]:.1f}.dcm"  # named in another order than they lie
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def slices(out: Path) -> dict[str, dict[int, np.ndarray]]:
    """Images by scan and number."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for path in sorted(out.glob("t*/*/*.png")):
        scan, _, number = path.stem.rpartition("_")
        found.setdefault(scan, {})[int(number)] = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return found


def table(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "volumes.csv").open()))


def reordered(voxels: np.ndarray, affine: np.ndarray, order: tuple[int, int, int], flips: tuple[int, ...]) -> tuple:
    """The same volume as another scanner stores it: axes in another order, some backwards."""
    change = np.zeros((4, 4))
    change[3, 3] = 1
    for new, old in enumerate(order):
        change[old, new] = -1 if new in flips else 1
        change[old, 3] = voxels.shape[old] - 1 if new in flips else 0
    return np.ascontiguousarray(np.flip(voxels.transpose(order), flips)), affine @ change


ORDERS = {"axial": ((0, 1, 2), ()), "coronal": ((0, 2, 1), (0, 2)), "sagittal": ((1, 2, 0), (1,))}


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_the_same_slices_however_the_volume_is_stored(tmp_path: Path, plane: str):
    """NIfTI and DICOM in three orders of axes give the same pixels; an oblique volume, to within interpolation."""
    affine, inputs = upright(), tmp_path / "in"
    voxels = sampled(affine, SHAPE)
    for k, (name, (order, flips)) in enumerate(ORDERS.items()):
        turned = reordered(voxels * 2**k, affine, order, flips)  # twice as bright: else they were the same volume
        write_nifti(inputs / f"nifti{name}.nii.gz", *turned)
        write_dicom(inputs / f"dicom{name}", *turned)
    tilted = np.eye(4)
    tilted[:3, :3] = Rotation.from_euler("xyz", [9, -6, 12], degrees=True).as_matrix()
    fine = np.array([140, 150, 140])
    coarse = np.array([60, 90, 40])  # sides of 3, 2 and 4.5 mm
    anisotropic = upright((3, 2, 4.5), coarse)
    values = sampled(anisotropic, coarse)
    write_dicom(inputs / "coarse-dicom", *reordered(values, anisotropic, (0, 2, 1), (1,)))
    write_nifti(inputs / "coarse-nifti.nii", values, anisotropic)
    write_nifti(inputs / "oblique.nii", sampled(tilted @ upright(1.4, fine), fine), tilted @ upright(1.4, fine))
    where = ["--range", 36, 72] if plane == "axial" else ["--range", -14, 34]
    run(
        "dataset.py",
        "slice",
        inputs,
        tmp_path / "out",
        "--plane",
        plane,
        *where,
        "--spacing",
        12,
        "--pixel-size",
        VOXEL,
    )
    found = slices(tmp_path / "out")
    coarse_ones = found.pop("coarse-dicom"), found.pop("coarse-nifti")
    for k in coarse_ones[0]:
        assert np.abs(coarse_ones[0][k].astype(int) - coarse_ones[1][k]).max() <= 1, k
    assert len(found) == 7
    reference = found.pop("niftiaxial")
    assert list(reference) == list(range(4 if plane == "axial" else 5))
    oblique = found.pop("oblique")
    for scan, images in found.items():
        for k, image in images.items():
            assert np.abs(image.astype(int) - reference[k]).max() <= (0 if "nifti" in scan else 1), (scan, k)
    h, w = reference[0].shape
    for k, image in oblique.items():  # its middle is found to within 2 mm
        moved = [np.roll(image, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        best = min(np.abs(m.astype(float) - reference[k]).mean() for m in moved)
        assert best < 12, k  # of 255; edges of the skull, half a pixel off, are most of it
    # Front or top upwards, the patient's right (in a sagittal slice, the front) on the left side: the spot tells.
    down, right = {"axial": (35, 30), "coronal": (25, 30), "sagittal": (25, 35)}[plane]
    image, middle = reference[4 if plane != "axial" else 2].astype(float), (np.array([h, w]) - 1) / 2
    corners = {
        (i, j): image[round(middle[0] + i * down / VOXEL), round(middle[1] + j * right / VOXEL)]
        for i in (-1, 1)
        for j in (-1, 1)
    }
    assert max(corners, key=corners.get) == (-1, -1)


def test_positions_and_pixels_are_millimetres(tmp_path: Path):
    """Anisotropic voxels do not stretch the head, and --range counts from its top."""
    shape = np.array([190, 60, 110])
    affine = upright((1.0, 3.2, 1.7), shape)
    write_nifti(tmp_path / "in/a.nii.gz", sampled(affine, shape), affine)
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", "--range", "20", "85", "--spacing", "65")
    images = slices(tmp_path / "out")["a"]
    for k, below in ((0, 20), (1, 85)):
        z = 85 - below
        wide = 2 * 72 * np.sqrt(1 - (z / 85) ** 2)
        long = 2 * 85 * np.sqrt(1 - (z / 85) ** 2)
        rows, columns = (np.flatnonzero((images[k] > 60).any(axis)) for axis in (1, 0))
        assert np.ptp(columns) * 240 / 256 == pytest.approx(wide, abs=5)
        assert np.ptp(rows) * 240 / 256 == pytest.approx(long, abs=6)
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "two", "--range", "20", "85", "--pixel-size", "2")
    assert slices(tmp_path / "two")["a"][0].shape == (120, 120) and images[0].shape == (256, 256)
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "three", "--range", "20", "85", "--frame", "200")
    widths = [np.ptp(np.flatnonzero((slices(tmp_path / o)["a"][0] > 60).any(0))) for o in ("out", "three")]
    assert widths[1] / widths[0] == pytest.approx(240 / 200, abs=0.04)


def test_window_is_of_the_brain(tmp_path: Path):
    """Twice the gain and a bright skull change nothing; --window sets black and white."""
    affine = upright()
    voxels = sampled(affine, SHAPE)
    bright = np.where(voxels == 90, 250, voxels)
    write_nifti(tmp_path / "in/a.nii", voxels, affine)
    write_nifti(tmp_path / "in/b.nii", bright * 7, affine)
    stored = nibabel.Nifti1Image(voxels - 3.0 * (voxels > 0), affine)  # as integers, with slope and intercept
    stored.set_data_dtype(np.int16)
    nibabel.save(stored, tmp_path / "in/c.nii")
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", "--spacing", "10")
    a, b, c = (slices(tmp_path / "out")[scan] for scan in "abc")
    inner = slice(30, 50)
    for k in a:
        assert np.abs(a[k][inner, inner].astype(int) - b[k][inner, inner]).max() <= 1
        assert np.abs(a[k][inner, inner].astype(int) - c[k][inner, inner]).max() <= 1
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "hard", "--spacing", "10", "--window", "40", "60")
    hard = slices(tmp_path / "hard")["a"][0][inner, inner]
    assert np.mean((hard == 0) | (hard == 255)) > 0.7


def make(kind: str, folder: Path) -> None:
    """A volume that cannot be used."""
    affine = upright()
    voxels = sampled(affine, SHAPE)
    whole = gzip.compress(nibabel.Nifti1Image(voxels, affine).to_bytes(), 1)
    folder.mkdir(parents=True)
    if kind == "torn":
        (folder / "a.nii.gz").write_bytes(whole[: len(whole) // 2])
    elif kind == "flipped":
        (folder / "a.nii.gz").write_bytes(whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:])
    elif kind == "short":
        (folder / "a.nii").write_bytes(nibabel.Nifti1Image(voxels, affine).to_bytes()[:-9])
    elif kind == "nothing":
        (folder / "a.nii").write_bytes(b"")
    elif kind == "text":
        (folder / "a.nii.gz").write_bytes(b"dear reader, " * 50)
    elif kind == "4-D":
        write_nifti(folder / "a.nii", np.stack([voxels] * 2, 3), affine)
    elif kind == "empty":
        write_nifti(folder / "a.nii", 0 * voxels, affine)
    elif kind == "flat":
        write_nifti(folder / "a.nii", 0 * voxels + 7, affine)
    elif kind == "colour":
        colour = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
        nibabel.save(nibabel.Nifti1Image(colour, affine), folder / "a.nii")
    elif kind == "huge":
        header = bytearray(nibabel.Nifti1Image(voxels, affine).to_bytes())
        header[42:48] = np.array([30000] * 3, "<i2").tobytes()
        (folder / "a.nii").write_bytes(header)
    elif kind == "lying":
        image = nibabel.Nifti1Image(voxels, None)
        image.header["sform_code"] = image.header["qform_code"] = 0
        nibabel.save(image, folder / "a.nii")
    elif kind == "slab":
        write_nifti(folder / "a.nii", voxels[:, :, 40:56], affine)
    elif kind == "freesurfer":
        (folder / "a.mgz").write_bytes(gzip.compress(b"\0\0\0\1" * 99))
    elif kind == "gap":
        write_dicom(folder, voxels, affine)[40].unlink()
    elif kind == "localizer":
        write_dicom(folder, voxels[:, :, 40:42], affine)
        write_dicom(folder, *[x[:, :, 40:42] if x.ndim == 3 else x for x in reordered(voxels, affine, (2, 1, 0), ())])
    elif kind == "repeated":
        for path in write_dicom(folder, sampled(affine, SHAPE, 1), affine):
            path.rename(path.with_name("again" + path.name))
        write_dicom(folder, voxels, affine)
    elif kind == "no dicom":
        (folder / "a.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"rubbish" * 9)


REASONS = {
    "torn": "end-of-stream", "flipped": "CRC", "short": "shorter than its header", "nothing": "", "text": "not a nifti",
    "4-D": "4-D", "empty": "empty", "flat": "neighbouring", "colour": "", "huge": "larger than",
    "lying": "orientation", "slab": "below the top of the head", "freesurfer": "", "gap": "missing",
    "localizer": "orientations", "repeated": "one position", "no dicom": "",
}  # fmt: skip


def test_what_cannot_be_used_is_said_and_the_rest_goes_on(tmp_path: Path):
    affine = upright()
    voxels = sampled(affine, SHAPE)
    for kind in REASONS:
        make(kind, tmp_path / "in" / kind)
    write_nifti(tmp_path / "in/good.nii.gz", voxels, affine)
    with_holes = 2 * voxels  # else it would be the same volume
    with_holes[voxels == 0] = np.nan
    write_nifti(tmp_path / "in/nan.nii", with_holes[..., None], affine)
    write_dicom(tmp_path / "in/dicom", voxels, affine)
    (tmp_path / "in/dicom/notes.txt").write_text("not a volume")
    done = run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", "--spacing", "10")
    rows = {r["source"].split("/")[1].partition(":")[0]: r for r in table(tmp_path / "out")}
    for kind, reason in REASONS.items():
        assert rows[kind]["left_out"] and reason in rows[kind]["left_out"], (kind, rows[kind]["left_out"])
        assert rows[kind]["left_out"] in done.stdout
    found = slices(tmp_path / "out")
    assert set(found) == {"good", "nan", "dicom"}
    for k in found["good"]:
        assert np.array_equal(found["good"][k], found["nan"][k])
    assert f"left out: {len(REASONS)} of {len(REASONS) + 3} volumes" in done.stdout


LONI = """"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type","Acq Date","Format"
"I100001","002_S_0001","AD","F","78","sc","MRI","MPR; GradWarp","Processed","8/18/2005","NiFTI"
"I100002","002_S_0001","AD","F","79","m06","MRI","MPR; GradWarp","Processed","3/01/2006","NiFTI"
"I100003","011_S_0002","CN","M","81","sc","MRI","MPR; GradWarp","Processed","9/10/2005","NiFTI"
"I100004","011_S_0003","MCI","M","70","sc","MRI","MPR; GradWarp","Processed","9/11/2005","NiFTI"
"""


def test_classes_and_patients_of_a_loni_table(tmp_path: Path):
    affine = upright()
    home = tmp_path / "ADNI"
    paths = [
        "002_S_0001/MPR/2005-08-18_10_00_00.0/I100001/ADNI_002_S_0001_MR_MPR_Br_20061231_S1_I100001.nii",
        "002_S_0001/MPR/2006-03-01_10_00_00.0/I100002/ADNI_002_S_0001_MR_MPR_Br_20061231_S2_I100002.nii",
        "011_S_0002/by-subject.nii",
        "011_S_0003/MPR/I100004/x.nii",
        "099_S_9999/MPR/I999999/x.nii",
    ]
    for seed, path in enumerate(paths):
        write_nifti(home / path, sampled(affine, SHAPE, seed), affine)
    write_dicom(home / "011_S_0002/MPR/2005/I100003", sampled(affine, SHAPE, 9), affine, patient="somebody")
    (tmp_path / "loni.csv").write_text(LONI)
    flags = ["--table", tmp_path / "loni.csv", "--groups", "AD", "CN", "--spacing", "10"]
    run("dataset.py", "slice", home, tmp_path / "out", *flags)
    assert {p.parent.name for p in (tmp_path / "out/train").glob("*/*.png")} == {"AD", "CN"}
    patients = dict(csv.reader((tmp_path / "out/subjects.csv").open()))
    assert patients["I100001"] == patients["I100002"] == "002_S_0001"
    assert patients["I100003"] == patients["011_S_0002-by-subject"] == "011_S_0002"
    left = {r["source"].split("/")[1]: r["left_out"] for r in table(tmp_path / "out") if r["left_out"]}
    assert "MCI" in left["011_S_0003"] and "no row" in left["099_S_9999"]
    done = run_any("dataset.py", "check", tmp_path / "out", "--cache", tmp_path / "cache")
    assert "2 people" in done.stdout and "class AD has 1 person" in done.stderr  # as training would say
    # A table that was mended changes what it must, and a volume that went keeps its slices and its patient.
    (tmp_path / "loni.csv").write_text(LONI.replace('"I100002","002_S_0001","AD"', '"I100002","002_S_0001","CN"'))
    (home / paths[0]).unlink()
    run("dataset.py", "slice", home, tmp_path / "out", *flags)
    where = {p.stem.rpartition("_")[0]: p.parent.name for p in (tmp_path / "out/train").glob("*/*.png")}
    assert where == {"I100001": "AD", "I100002": "CN", "I100003": "CN", "011_S_0002-by-subject": "CN"}
    assert dict(csv.reader((tmp_path / "out/subjects.csv").open())) == patients
    refused = run_any("dataset.py", "slice", home, tmp_path / "o", "--table", tmp_path / "loni.csv", "--groups", "NC")
    assert refused.returncode == 2 and "no row" in refused.stderr and "NC" in refused.stderr


def test_a_hospitals_patient_number_does_not_get_into_the_data_set(tmp_path: Path):
    affine = upright()
    for n in (1, 2):
        write_dicom(tmp_path / f"in/scan{n}", sampled(affine, SHAPE, n), affine, patient="MRN-4711", series=n)
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", "--spacing", "10")
    assert len({r["patient"] for r in table(tmp_path / "out")}) == 1
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and b"4711" in p.read_bytes()]


def test_odd_folders(tmp_path: Path):
    """Hidden copies, links to nowhere, pipes, names without ending or not in UTF-8, several people in one folder."""
    affine = upright()
    home = tmp_path / "in"
    for n in (1, 2, 3):  # one flat folder, one series number
        write_dicom(home / f"{n}", sampled(affine, SHAPE, n), affine, patient=f"P{n}", series=3)
        for k, path in enumerate(sorted((home / f"{n}").iterdir())):
            (home / "flat").mkdir(exist_ok=True)
            path.rename(home / "flat" / f"MR.1.2.840.{n}.{k}")  # as many scanners name them
        (home / f"{n}").rmdir()
    write_nifti(home / ".git/annex/x.nii.gz", sampled(affine, SHAPE, 4), affine)
    (home / "sub-01").mkdir()
    (home / "sub-01/x.nii.gz").symlink_to(home / ".git/annex/x.nii.gz")
    (home / "sub-02.nii.gz").symlink_to(home / "nowhere")
    os.mkfifo(home / "pipe")
    write_nifti(home / os.fsdecode(b"caf\xe9.nii"), sampled(affine, SHAPE, 5), affine)
    write_nifti(home / "/".join(["long" * 20] * 4) / "a.nii", sampled(affine, SHAPE, 6), affine)
    for _ in range(2):
        done = run("dataset.py", "slice", home, tmp_path / "out", "--spacing", "10")
        found, rows = slices(tmp_path / "out"), table(tmp_path / "out")
        assert len(found) == 6 and all(len(images) == 4 for images in found.values())
        assert len({r["patient"] for r in rows if r["scan"].startswith("flat")}) == 3
        assert [r["left_out"] for r in rows if r["left_out"]] == ["a link that leads nowhere"]
        assert "2 scans follow no known convention of names" in done.stdout
        assert "not looked at: files that are no volumes: 1" in done.stdout


def test_a_path_that_names_two_subjects_is_not_guessed_at(tmp_path: Path):
    affine = upright()
    for path in ("1107/2011-05-07_12_30_15.0/a.nii", "scan-15-of-1107.nii", "15/I999999/b.nii"):
        write_nifti(tmp_path / "in" / path, sampled(affine, SHAPE), affine)
    (tmp_path / "t.csv").write_text("Image Data ID,Subject,Group\nI1000001,1107,AD\nI1000002,15,CN\n")
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", "--table", tmp_path / "t.csv", "--spacing", "10")
    rows = {r["source"]: r for r in table(tmp_path / "out")}
    assert rows["in/1107/2011-05-07_12_30_15.0/a.nii"]["patient"] == "1107"
    assert "several subjects" in rows["in/scan-15-of-1107.nii"]["left_out"]
    assert "no row for the image" in rows["in/15/I999999/b.nii"]["left_out"]


def test_classes_and_sides_of_the_split_by_several_commands(tmp_path: Path):
    affine = upright()
    for n, folder in enumerate(("sick", "well", "held")):
        write_nifti(tmp_path / folder / f"{folder}{n}.nii", sampled(affine, SHAPE, n), affine)
    for folder, flags in (("sick", ["A"]), ("well", ["B"]), ("held", ["B", "--split", "test"])):
        flags = ["--spacing", "10", "--class-name", *flags]
        run("dataset.py", "slice", tmp_path / folder, tmp_path / "out", *flags)
    places = {p.parent.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").glob("*/*/*.png")}
    assert places == {"train/A", "train/B", "test/B"}
    assert len(table(tmp_path / "out")) == 3 and len(list(csv.reader((tmp_path / "out/subjects.csv").open()))) == 4
    # Two files of one name are two scans, and another folder of the same name is refused before it replaces anything.
    write_nifti(tmp_path / "more/sick0.nii", sampled(affine, SHAPE, 7), affine)
    run("dataset.py", "slice", tmp_path / "more", tmp_path / "out", "--spacing", "10", "--class-name", "B")
    assert len({p.stem.rpartition("_")[0] for p in (tmp_path / "out/train/B").glob("sick0-*.png")}) == 1
    write_nifti(tmp_path / "elsewhere/sick/sick0.nii", sampled(affine, SHAPE, 8), affine)
    before = snapshot(tmp_path / "out")
    refused = run_any("dataset.py", "slice", tmp_path / "elsewhere/sick", tmp_path / "out", "--spacing", "10")
    assert refused.returncode == 2 and "another folder named sick" in refused.stderr
    assert snapshot(tmp_path / "out") == before
    # The same volumes under another name are moved, not doubled.
    run("dataset.py", "slice", tmp_path / "sick", tmp_path / "out", "--spacing", "10", "--class-name", "C")
    assert not list((tmp_path / "out/train/A").glob("*.png")) and list((tmp_path / "out/train/C").glob("sick0_*.png"))


def snapshot(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name[0] != "."}


def test_the_same_command_goes_on_after_a_kill(tmp_path: Path):
    affine = upright()
    for n in range(12):
        write_nifti(tmp_path / f"in/{n:02d}.nii.gz", sampled(affine, SHAPE, n), affine)
    command = ["slice", tmp_path / "in", "--spacing", "1", "--workers", "2"]
    run("dataset.py", *command[:2], tmp_path / "whole", *command[2:])
    for wanted in (1, 4):
        process = start("dataset.py", *command[:2], tmp_path / "out", *command[2:])
        end = time.time() + PATIENCE
        while len(set((tmp_path / "out").glob("train/all/*_010.png"))) < wanted and time.time() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        assert 0 < len(slices(tmp_path / "out")) < 12, "killed too late to show anything"
        # Whoever has slices is known by then, also those of the time before.
        patients = dict(csv.reader((tmp_path / "out/subjects.csv").open()))
        assert set(slices(tmp_path / "out")) <= set(patients)
    run("dataset.py", *command[:2], tmp_path / "out", *command[2:])
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
    # A slice that went is made again, a volume that changed is cut again, and nothing else is touched.
    gone, kept = (sorted((tmp_path / "out/train/all").glob(f"{n}_*.png"))[0] for n in ("03", "05"))
    gone.unlink()
    stamp = kept.stat().st_mtime_ns
    write_nifti(tmp_path / "in/04.nii.gz", sampled(affine, SHAPE, 99), affine)
    run("dataset.py", *command[:2], tmp_path / "out", *command[2:])
    assert gone.exists() and kept.stat().st_mtime_ns == stamp
    changed = {k for k, v in snapshot(tmp_path / "out").items() if snapshot(tmp_path / "whole").get(k) != v}
    assert changed and all("04_" in k for k in changed - {"volumes.csv", "slices.html"})
    # What was put into subjects.csv by hand stays.
    subjects = tmp_path / "out/subjects.csv"
    subjects.write_text(subjects.read_text().replace("01,01", "01,00"))
    (tmp_path / "out/train/all/02_010.png").unlink()
    run("dataset.py", *command[:2], tmp_path / "out", *command[2:])
    assert dict(csv.reader(subjects.open()))["01"] == "00"
    refused = run_any("dataset.py", *command[:2], tmp_path / "out", "--spacing", "2")
    assert refused.returncode == 2 and "--spacing" in refused.stderr
    assert json.loads((tmp_path / "out/slices.json").read_text())["spacing"] == 1


WRONG: dict[str, Callable[[Path], list]] = {
    "no folder of volumes": lambda p: [p / "nowhere", p / "o"],
    "holds no volumes": lambda p: [p / "none", p / "o"],
    "inside of the folder": lambda p: [p / "in", p / "in/o"],
    "holds other files": lambda p: [p / "in", p / "full"],
    "--range needs": lambda p: [p / "in", p / "o", "--range", "9", "3"],
    "--window needs": lambda p: [p / "in", p / "o", "--window", "99", "1"],
    "--spacing 0": lambda p: [p / "in", p / "o", "--spacing", "0"],
    "no column that says whose row": lambda p: [p / "in", p / "o", "--table", p / "full/x.csv"],
    "--groups needs a table": lambda p: [p / "in", p / "o", "--groups", "AD"],
    "cannot be the name of a folder": lambda p: [p / "in", p / "o", "--class-name", "../x"],
    "no slice could be cut": lambda p: [p / "bad", p / "o"],
}


def test_wrong_commands_end_in_one_sentence(tmp_path: Path):
    write_nifti(tmp_path / "in/a.nii", sampled(upright(), SHAPE), upright())
    make("4-D", tmp_path / "bad")
    (tmp_path / "none").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x.csv").write_text("a,b\n1,2\n")
    for sentence, words in WRONG.items():
        done = run_any("dataset.py", "slice", *words(tmp_path))
        assert done.returncode == 2 and sentence in done.stderr, (sentence, done.stderr)
        assert "Traceback" not in done.stderr


@pytest.mark.full
def test_many_volumes_at_a_time_stay_small(tmp_path: Path):
    """20 volumes of ADNI's size, 8 at a time, by the memory that the process ever had (benchmarks/data.py: 100)."""
    shape = np.array([256, 256, 170])
    voxels = (20 * sampled(upright(1.0, shape), shape)).astype(np.int16)
    for n in range(20):  # each another volume, or they would count once
        voxels[n] += 1
        write_nifti(tmp_path / f"in/{n:02d}.nii", voxels, upright(1.0, shape))
    # Not ru_maxrss, which begins with what this process of pytest had when it started the other.
    code = "import runpy; runpy.run_path(sys.argv[0], run_name='__main__'); "
    code += "print('KiB', open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    words = [ROOT / "dataset.py", "slice", tmp_path / "in", tmp_path / "out", "--spacing", "8", "--workers", "8"]
    program = f"import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r}); {code}"
    done = subprocess.run([sys.executable, "-c", program, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(slices(tmp_path / "out")) == 20
    assert int(done.stdout.split("KiB")[1]) < 2 * 2**20


def test_a_table_that_somebody_edited_is_still_read():
    from volumes import Row

    rows = [Row.from_table({"source": "a", "slices": text}) for text in ("7", "", "seven", "-3", "1.5")]
    assert [r.slices for r in rows] == [7, 0, 0, 0, 0]
