"""Every format of a volume, written by its own library, comes back as the same voxels at the same place."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from pydicom import Dataset, dcmread
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from scipy.spatial.transform import Rotation

import readers
from readers import Unusable, kind_of, read_series, read_volume, scan_dicom

# A volume whose axes differ in everything: sides of voxels, lengths, direction; positive integers, so that all keep it.
AFFINE = np.eye(4)
AFFINE[:3, :3] = Rotation.from_euler("xyz", [20, -10, 5], degrees=True).as_matrix() * [0.9, 1.1, 2.5]
AFFINE[:3, 3] = [-30, 12, 7]
VOXELS = np.random.default_rng(0).integers(0, 900, (18, 22, 12)).astype(np.int16)
LPS = np.diag([-1.0, -1, 1, 1])


def nifti(kind: type = nibabel.Nifti1Image) -> bytes:
    image = kind(VOXELS, AFFINE)
    return image.to_bytes()


def sitk() -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(VOXELS.T))
    world = LPS @ AFFINE
    sizes = np.linalg.norm(world[:3, :3], axis=0)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((world[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(world[:3, 3].tolist())
    return image


def save_pair(path: Path) -> Path:
    nibabel.save(nibabel.Nifti1Pair(VOXELS, AFFINE), path)
    return path


def only_qform(path: Path) -> Path:
    image = nibabel.Nifti1Image(VOXELS, None)
    image.set_qform(AFFINE, 1)
    image.header["sform_code"] = 1  # and all zeros
    path.write_bytes(image.to_bytes())
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def with_itk(path: Path) -> Path:
    SimpleITK.WriteImage(sitk(), str(path), useCompression=True)
    return path


def mgh(path: Path) -> Path:
    nibabel.save(nibabel.freesurfer.MGHImage(VOXELS, AFFINE), path)
    return path


FILES: dict[str, Callable[[Path], Path]] = {
    "nifti": lambda d: written(d / "a.nii", nifti()),
    "nifti-2": lambda d: written(d / "a.nii", nifti(nibabel.Nifti2Image)),
    "gzip": lambda d: written(d / "a.nii.gz", gzip.compress(nifti())),
    "gzip named nii": lambda d: written(d / "a.nii", gzip.compress(nifti())),
    "nii named gzip": lambda d: written(d / "a.nii.gz", nifti()),
    "two members": lambda d: written(d / "a.nii.gz", gzip.compress(nifti()[:500]) + gzip.compress(nifti()[500:])),
    "bzip2": lambda d: written(d / "a.nii.bz2", bz2.compress(nifti())),
    "no ending": lambda d: written(d / "scan", gzip.compress(nifti())),
    "only a qform": lambda d: only_qform(d / "a.nii"),
    "pair": lambda d: save_pair(d / "a.hdr"),
    "mgh": lambda d: mgh(d / "a.mgh"),
    "mgz": lambda d: mgh(d / "a.mgz"),
    "nrrd": lambda d: with_itk(d / "a.nrrd"),
    "nrrd in two files": lambda d: with_itk(d / "a.nhdr"),
    "meta": lambda d: with_itk(d / "a.mha"),
    "meta in two files": lambda d: with_itk(d / "a.mhd"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_volume_from_every_format(name: str, tmp_path: Path):
    path = FILES[name](tmp_path)
    assert kind_of(path) in ("nifti", "mgh", "nrrd", "meta")
    volume = read_volume(path)
    assert volume.voxels.dtype == np.float32 and np.array_equal(volume.voxels, VOXELS)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)


def test_slope_and_byte_order_of_nifti(tmp_path: Path):
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    image.header.set_slope_inter(0.5, -20)
    swapped = nibabel.Nifti1Image(VOXELS, AFFINE, image.header.as_byteswapped())
    for name, x in (("a.nii", image), ("b.nii", swapped)):
        x.header.set_slope_inter(0.5, -20)
        data = bytearray(x.to_bytes())
        at = 112
        data[at : at + 8] = np.array([0.5, -20], x.header.structarr.dtype["scl_slope"]).tobytes()
        volume = read_volume(written(tmp_path / name, bytes(data)))
        stored = np.asarray(x.dataobj)
        assert volume.voxels.shape == stored.shape
    assert np.isfinite(volume.voxels).all()


@pytest.mark.parametrize(("orient", "axes"), [(0, "LAS"), (1, "LSA"), (2, "ASL"), (3, "LPS"), (4, "LIA"), (5, "AIL")])
def test_analyze_files_have_the_orientation_that_they_name(orient: int, axes: str, tmp_path: Path):
    image = nibabel.AnalyzeImage(VOXELS, None)
    image.header.set_zooms((0.9, 1.1, 2.5))
    image.to_filename(tmp_path / "a.hdr")
    data = bytearray((tmp_path / "a.hdr").read_bytes())
    data[252] = orient
    (tmp_path / "a.hdr").write_bytes(data)
    assert (kind_of(tmp_path / "a.hdr"), kind_of(tmp_path / "a.img")) == ("analyze", "pair")
    volume = read_volume(tmp_path / "a.hdr")
    assert np.array_equal(volume.voxels, VOXELS) and "left and right" in volume.note
    assert "".join(nibabel.aff2axcodes(volume.affine)) == axes
    assert volume.sizes == pytest.approx([0.9, 1.1, 2.5])
    assert volume.affine @ [*(np.array(VOXELS.shape) - 1) / 2, 1] == pytest.approx([0, 0, 0, 1])
    (tmp_path / "a.img").unlink()
    with pytest.raises(Unusable, match=".img file is missing"):
        read_volume(tmp_path / "a.hdr")


# ---------------------------------------------------------------------------------------------------------------------
# DICOM


def base(storage: str, syntax: str = ExplicitVRLittleEndian) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = storage, syntax
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
    ds.SeriesInstanceUID, ds.SeriesNumber, ds.PatientID, ds.Modality = "1.2.3", 7, "P", "MR"
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *VOXELS.shape[:2], 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    return ds


def geometry(k: int) -> tuple[list[str], list[str], list[str]]:
    """(position, orientation, spacing) of the slice k along the last axis."""
    world = LPS @ AFFINE
    sizes = np.linalg.norm(world[:3, :3], axis=0)
    along = [*world[:3, 1] / sizes[1], *world[:3, 0] / sizes[0]]
    place = world[:3, 3] + k * world[:3, 2]
    return [f"{v:.6f}" for v in place], [f"{v:.8f}" for v in along], [f"{v:.6f}" for v in sizes[:2]]


def classic(folder: Path, syntax: str = "", change: Callable[[Dataset, int], None] = lambda ds, k: None) -> list[Path]:
    """A file a slice; compressed by GDCM if a transfer syntax of it is named."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(VOXELS.shape[2]):
        ds = base(MRImageStorage)
        ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = geometry(k)
        ds.PixelData = VOXELS[:, :, k].astype("<u2").tobytes()
        change(ds, k)
        paths.append(folder / f"IM{(5 * k) % 12:02d}")  # in another order than they lie
        ds.save_as(paths[-1], enforce_file_format=True)
        if syntax:
            compress(paths[-1], syntax)
    return paths


def compress(path: Path, syntax: str) -> None:
    import gdcm

    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(path))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()


def enhanced(path: Path, count: int = VOXELS.shape[2], shared: bool = True, order: Sequence[int] | None = None) -> Path:
    """All slices as frames of one file, in any order."""
    ds = base(EnhancedMRImageStorage)
    order = list(order or np.random.default_rng(1).permutation(VOXELS.shape[2]))[:count]

    def item(**parts) -> Dataset:
        made = Dataset()
        for sequence, values in parts.items():
            inner = Dataset()
            for name, value in values.items():
                setattr(inner, name, value)
            setattr(made, sequence, [inner])
        return made

    frames, common = [], {}
    for k in order:
        place, along, sizes = geometry(k)
        own = {"PlanePositionSequence": {"ImagePositionPatient": place}}
        same = {
            "PlaneOrientationSequence": {"ImageOrientationPatient": along},
            "PixelMeasuresSequence": {"PixelSpacing": sizes},
            "PixelValueTransformationSequence": {"RescaleSlope": "2", "RescaleIntercept": "-3"},
        }
        frames.append(item(**own, **({} if shared else same)))
        common = same
    ds.NumberOfFrames, ds.PerFrameFunctionalGroupsSequence = len(order), frames
    ds.SharedFunctionalGroupsSequence = [item(**common) if shared else Dataset()]
    ds.PixelData = np.stack([VOXELS[:, :, k] for k in order]).astype("<u2").tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def check_same(volume: readers.Volume, values: np.ndarray = VOXELS) -> None:
    """Axes may run the other way, as long as each voxel lies where it belongs."""
    assert volume.voxels.shape == values.shape
    flip = np.sign(np.round(np.linalg.inv(AFFINE[:3, :3]) @ volume.affine[:3, :3]).diagonal())
    turned = values[tuple(slice(None, None, int(f)) for f in flip)]
    assert np.array_equal(volume.voxels, turned)
    corner = [0 if f > 0 else n - 1 for f, n in zip(flip, values.shape)]
    np.testing.assert_allclose(volume.affine[:3, 3], AFFINE[:3, :3] @ corner + AFFINE[:3, 3], atol=1e-3)


SYNTAXES = [
    "",
    "JPEGLosslessProcess14_1",
    "JPEGLSLossless",
    "JPEG2000Lossless",
    "RLELossless",
    "ImplicitVRLittleEndian",
]


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_series_in_every_lossless_transfer_syntax(syntax: str, tmp_path: Path):
    paths = classic(tmp_path / "in", syntax)
    assert {kind_of(p) for p in paths} == {"dicom"}
    found = [scan_dicom(p) for p in paths]
    assert {(f.series, f.number, f.patient, f.problem) for f in found} == {("1.2.3", "7", "P", "")}
    check_same(read_series(paths))


@pytest.mark.parametrize("implicit", [True, False])
def test_files_without_preamble(implicit: bool, tmp_path: Path):
    from pydicom.filewriter import dcmwrite

    for path in (paths := classic(tmp_path / "in")):
        bare = Dataset()
        bare.update({e.tag: e for e in dcmread(path)})
        dcmwrite(path, bare, implicit_vr=implicit, little_endian=True)
        assert kind_of(path) == "dicom" and scan_dicom(path).series == "1.2.3"
    check_same(read_series(paths))


@pytest.mark.parametrize("shared", [True, False])
def test_a_file_of_many_frames(shared: bool, tmp_path: Path):
    check_same(read_series([enhanced(tmp_path / "a", shared=shared)]), 2 * VOXELS - 3)
    halves = [enhanced(tmp_path / f"{i}", order=[*range(i, 12, 2)]) for i in (0, 1)]
    check_same(read_series(halves), 2 * VOXELS - 3)


def test_inverted_doubled_and_scaled_slices(tmp_path: Path):
    def invert(ds: Dataset, k: int) -> None:
        ds.PhotometricInterpretation = "MONOCHROME1"
        ds.PixelData = (VOXELS[:, :, k].max() - VOXELS[:, :, k]).astype("<u2").tobytes()

    volume = read_series(classic(tmp_path / "inverted", change=invert))
    assert np.array_equal(
        np.diff(volume.voxels, axis=0) > 0, np.diff(read_series(classic(tmp_path / "x")).voxels, axis=0) > 0
    )
    paths = classic(tmp_path / "once")
    doubled = [p.with_name(p.name + "again") for p in paths[:4]]
    for old, new in zip(paths, doubled):
        ds = dcmread(old)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()  # exported twice
        ds.save_as(new)
    check_same(read_series([*paths, *doubled]))


def test_a_wrong_file_is_named_and_the_rest_is_judged(tmp_path: Path):
    """At the end it is missed by nobody; in the middle it leaves a gap."""
    for name, spoil, word in (
        ("torn", lambda p: p.write_bytes(p.read_bytes()[:-300]), "cannot be decoded"),
        ("elsewhere", lambda p: with_tag(p, ImagePositionPatient=["9", "nan", "1"]), "damaged"),
        ("nowhere", lambda p: without_tag(p, "ImagePositionPatient"), "no position"),
        ("pixels", lambda p: without_tag(p, "PixelData"), "no pixels"),
        ("tilted", lambda p: with_tag(p, ImageOrientationPatient=["1", "0", "0", "0", "0", "1"]), "orientation"),
    ):
        paths = classic(tmp_path / name)
        spoil(paths[-1])
        volume = read_series(paths)
        assert volume.voxels.shape[2] == 11 and paths[-1].name in volume.note and word in volume.note
        spoil(paths[5])
        with pytest.raises(Unusable) as e:
            read_series(paths)
        assert any(p.name in str(e.value) for p in (paths[5], paths[-1])) or "localizer" in str(e.value)
    paths = classic(tmp_path / "gap")
    with pytest.raises(Unusable, match="one is missing after"):
        read_series(paths[:5] + paths[6:])
    two = classic(tmp_path / "4-D") + classic(tmp_path / "second", change=lambda ds, k: brighter(ds))
    with pytest.raises(Unusable, match="several images at one position"):
        read_series(two)


def with_tag(path: Path, **tags) -> None:
    ds = dcmread(path)
    for name, value in tags.items():
        setattr(ds, name, value)
    ds.save_as(path)


def without_tag(path: Path, name: str) -> None:
    ds = dcmread(path)
    del ds[name]
    ds.save_as(path)


def brighter(ds: Dataset) -> None:
    ds.PixelData = (np.frombuffer(ds.PixelData, "<u2") + 1).astype("<u2").tobytes()


def test_what_is_no_volume(tmp_path: Path):
    """Nothing is claimed of files that are something else, and what is not an image is not counted as one."""
    others = {
        "a.txt": b"dear reader, " * 50,
        "b": bytes(range(256)) * 4,
        "c.json": b"{}",
        "d": b"",
        "e": b"\x08\0\5\0" + b"z" * 500,
    }
    for name, data in others.items():
        assert kind_of(written(tmp_path / name, data)) == "", name
    assert kind_of(written(tmp_path / "x.zip", b"PK\3\4")) == "archive" and kind_of(tmp_path / "none") == ""
    assert kind_of(written(tmp_path / "x.mif.gz", b"")) == "MRtrix" and kind_of(tmp_path) == ""
    report = classic(tmp_path / "sr", change=lambda ds, k: setattr(ds, "Modality", "SR"))[0]
    assert kind_of(report) == "dicom" and scan_dicom(report) is None
    damaged = scan_dicom(written(tmp_path / "y.dcm", b"\0" * 128 + b"DICM" + b"rubbish" * 9))
    assert damaged is None or damaged.problem
