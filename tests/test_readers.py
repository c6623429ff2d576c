"""One oblique volume in every format and transfer syntax comes back the same; what is damaged is named."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import random
import socket
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import readers
from readers import Unusable, Volume, kind_of, read_series, read_volume, scan_dicom

SHAPE = (13, 11, 9)
AFFINE = np.eye(4)
AFFINE[:3, :3] = Rotation.from_euler("xyz", [12, -8, 20], degrees=True).as_matrix() * (1.1, 0.9, 2.5)
AFFINE[:3, 3] = -31.5, 12.25, 40
VOXELS = (np.arange(np.prod(SHAPE)).reshape(SHAPE) * 7 % 1009 + 50 * np.arange(SHAPE[0])[:, None, None]).astype(
    np.int16
)


def check(volume: Volume, voxels: np.ndarray = VOXELS, affine: np.ndarray = AFFINE, within: float = 0) -> None:
    """The same voxels at the same places, whatever the order of axes in the file."""
    assert volume.voxels.dtype == np.float32 and volume.voxels.ndim == 3
    change = np.linalg.inv(volume.affine) @ affine  # from our voxel indices to those that were read
    assert np.abs(change - change.round()).max() < 1e-4, change
    order = np.abs(change[:3, :3]).argmax(axis=0)
    flips = [i for i in range(3) if change[order[i], i] < 0]
    got = np.flip(volume.voxels.transpose(order), flips)
    assert got.shape == voxels.shape and np.abs(got - voxels).max() <= within
    start = change[:3, 3].round()[order]
    assert all(start[i] == (voxels.shape[i] - 1 if i in flips else 0) for i in range(3))


# ---------------------------------------------------------------------------------------------------------------------
# Formats of one file or two


def nifti(kind: type = nibabel.Nifti1Image) -> bytes:
    return kind(VOXELS, AFFINE).to_bytes()


def without_sform() -> bytes:
    """sform_code is set, but its numbers are zeros; the qform is right."""
    image = nibabel.Nifti1Image(VOXELS, None)
    image.set_qform(AFFINE, 1)
    data = bytearray(image.to_bytes())
    data[254:256] = b"\1\0"
    data[280:328] = bytes(48)
    return bytes(data)


def big_endian() -> bytes:
    image = nibabel.Nifti1Image(VOXELS, AFFINE)
    header = image.header.as_byteswapped(">")
    return header.binaryblock + bytes(4) + VOXELS.astype(">i2").tobytes(order="F")


def scaled() -> bytes:
    data = bytearray(nifti())
    data[112:120] = np.array([0.25, -7], "<f4").tobytes()
    return bytes(data)


RAW = nifti()
BYTES: dict[str, Callable[[], bytes]] = {
    "a.nii": nifti,
    "a.nii.gz": lambda: gzip.compress(RAW),
    "members.nii.gz": lambda: gzip.compress(RAW[:500]) + gzip.compress(RAW[500:]),
    "gzip-named.nii": lambda: gzip.compress(RAW),
    "plain-named.nii.gz": nifti,
    "a.nii.bz2": lambda: bz2.compress(RAW),
    "a.nii.xz": lambda: lzma.compress(RAW),
    "no-ending": nifti,
    "named.dcm": nifti,
    "two.nii": lambda: nifti(nibabel.Nifti2Image),
    "two.nii.gz": lambda: gzip.compress(nifti(nibabel.Nifti2Image)),
    "zeros.nii": without_sform,
    "big.nii": big_endian,
}


@pytest.mark.parametrize("name", BYTES)
def test_nifti_by_its_content(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(BYTES[name]())
    assert kind_of(tmp_path / name) == "nifti"
    check(read_volume(tmp_path / name), within=1e-3)


@pytest.mark.parametrize("name", ["a.mgh", "a.mgz", "a.hdr", "a.img"])
def test_what_nibabel_writes(tmp_path: Path, name: str):
    kind = nibabel.Nifti1Pair if name[-3:] in ("hdr", "img") else nibabel.MGHImage
    nibabel.save(kind(VOXELS, AFFINE), tmp_path / name)
    header = tmp_path / name.replace(".img", ".hdr")
    check(read_volume(header), within=1e-3)
    assert read_volume(header).note == ""
    if name.endswith("hdr"):
        assert kind_of(tmp_path / "a.img") == "pair"
        for ending in (".hdr", ".img"):
            (tmp_path / f"z{ending}.gz").write_bytes(gzip.compress((tmp_path / f"a{ending}").read_bytes()))
        assert kind_of(tmp_path / "z.img.gz") == "pair" and kind_of(tmp_path / "z.hdr.gz") == "nifti"
        check(read_volume(tmp_path / "z.hdr.gz"), within=1e-3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
def test_what_simpleitk_writes(tmp_path: Path, name: str, packed: bool):
    import SimpleITK

    lps = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(VOXELS.T)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((lps[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(tmp_path / name), packed)
    assert kind_of(tmp_path / name) == {"n": "nrrd", "m": "meta"}[name[2]]
    assert [kind_of(p) for p in tmp_path.iterdir()].count("") == len([*tmp_path.iterdir()]) - 1
    check(read_volume(tmp_path / name))


SPACES = {
    "right-anterior-superior": (1, 1), "left-posterior-superior": (-1, -1), "left-anterior-superior": (-1, 1),
    "RAS": (1, 1), "LPS": (-1, -1),
}  # fmt: skip


@pytest.mark.parametrize("space,signs", SPACES.items())
def test_spaces_of_nrrd(tmp_path: Path, space: str, signs: tuple[int, int]):
    change = np.diag([*signs, 1, 1]) @ AFFINE
    vectors = " ".join("(" + ",".join(f"{v:.9f}" for v in change[:3, i]) + ")" for i in range(3))
    origin = "(" + ",".join(f"{v:.9f}" for v in change[:3, 3]) + ")"
    head = f"NRRD0004\ntype: int16\ndimension: 3\nspace: {space}\nsizes: 13 11 9\nspace directions: {vectors}\n"
    head += f"kinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: {origin}\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.encode() + VOXELS.tobytes(order="F"))
    try:
        check(read_volume(tmp_path / "a.nrrd"))
    except Unusable as e:
        assert space == "left-anterior-superior" and "orientation" in str(e)


def test_what_is_upright_only_by_default_is_refused(tmp_path: Path):
    head = "NRRD0004\ntype: int16\ndimension: 3\n{}sizes: 13 11 9\nendian: little\nencoding: raw\n\n"
    axes = "space directions: (1,0,0) (0,1,0) (0,0,1)\n"
    for more in ("", f"space dimension: 3\n{axes}", f"space: scanner-xyz\n{axes}", f"space: 3D-right-handed\n{axes}"):
        (tmp_path / "a.nrrd").write_bytes(head.format(more).encode() + VOXELS.tobytes(order="F"))
        with pytest.raises(Unusable, match="orientation"):
            read_volume(tmp_path / "a.nrrd")
    head = "ObjectType = Image\nNDims = 3\nDimSize = 13 11 9\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
    (tmp_path / "a.mha").write_bytes(head.encode() + VOXELS.tobytes(order="F"))
    with pytest.raises(Unusable, match="orientation"):
        read_volume(tmp_path / "a.mha")
    nibabel.save(nibabel.MGHImage(VOXELS, AFFINE), tmp_path / "a.mgh")
    data = bytearray((tmp_path / "a.mgh").read_bytes())
    data[28:30] = b"\0\0"
    (tmp_path / "a.mgh").write_bytes(data)
    with pytest.raises(Unusable, match="orientation"):
        read_volume(tmp_path / "a.mgh")


def test_slope_and_intercept(tmp_path: Path):
    (tmp_path / "a.nii").write_bytes(scaled())
    check(read_volume(tmp_path / "a.nii"), VOXELS * 0.25 - 7, within=1e-3)


# Which way i, j and k go, by the letters of nibabel, for the values of `orient` in the Analyze format.
@pytest.mark.parametrize("orient,axes", enumerate(["LAS", "LSA", "ASL", "LPS", "LIA", "AIL"]))
@pytest.mark.parametrize("order", "<>")
def test_analyze_by_its_orient_byte(tmp_path: Path, orient: int, axes: str, order: str):
    header = nibabel.AnalyzeHeader(endianness=order)
    header.set_data_shape((*SHAPE, 1))  # as OASIS-1 has it
    header.set_zooms((1.1, 0.9, 2.5, 1))
    header.set_data_dtype(np.dtype(f"{order}i2"))
    header["orient"] = bytes([orient])
    (tmp_path / "a.hdr").write_bytes(header.binaryblock)
    (tmp_path / "a.img").write_bytes(VOXELS.astype(f"{order}i2").tobytes(order="F"))
    assert kind_of(tmp_path / "a.hdr") == "analyze" and kind_of(tmp_path / "a.img") == "pair"
    volume = read_volume(tmp_path / "a.hdr")
    assert nibabel.aff2axcodes(volume.affine) == tuple(axes) and "left and right" in volume.note
    assert np.allclose(volume.sizes, (1.1, 0.9, 2.5)) and np.array_equal(volume.voxels, VOXELS)
    assert np.allclose(volume.affine @ [6, 5, 4, 1], [0, 0, 0, 1])  # the middle


def test_analyze_of_spm(tmp_path: Path):
    """Its origin, or its .mat file."""
    nibabel.save(nibabel.Spm99AnalyzeImage(VOXELS, AFFINE), tmp_path / "a.img")
    check(read_volume(tmp_path / "a.hdr"), within=1e-3)
    (tmp_path / "a.mat").unlink()
    upright = np.diag([-1.1, 0.9, 2.5, 1])
    upright[:3, 3] = 2.2, -2.7, -10
    nibabel.save(nibabel.Spm99AnalyzeImage(VOXELS, upright), tmp_path / "b.img")
    (tmp_path / "b.mat").unlink()
    data = bytearray((tmp_path / "b.hdr").read_bytes())
    data[253:259] = np.array([3, 4, 5], "<i2").tobytes()  # the first voxel is 1
    (tmp_path / "b.hdr").write_bytes(data)
    check(read_volume(tmp_path / "b.hdr"), VOXELS, upright, within=1e-3)


def test_real_voxels_of_other_types(tmp_path: Path):
    for dtype in ("u1", "i1", "u2", "<i4", ">f4", "f8", ">u4"):
        nibabel.save(
            nibabel.Nifti1Image((VOXELS % 100).astype(dtype), AFFINE, dtype=np.dtype(dtype)), tmp_path / "a.nii"
        )
        check(read_volume(tmp_path / "a.nii"), VOXELS % 100)


# ---------------------------------------------------------------------------------------------------------------------
# What a file is


def test_what_is_a_volume_and_what_is_not(tmp_path: Path):
    rng = random.Random(0)
    nothing = {
        "a.txt": b"dear reader, " * 99, "a.csv.gz": gzip.compress(b"a,b\n1,2\n" * 99), "a.json": b'{"a": 1}',
        "a.png": b"\x89PNG\r\n\x1a\n" + bytes(99), "empty": b"", "zeros": bytes(2000), "a.npz": b"PK\3\4" + bytes(99),
        "a.mat": b"MATLAB 5.0 MAT-file" + bytes(300), "a.xml": b"<?xml version='1.0'?>", "a.HEAD": b"type = x",
        "a.bval": b"0 1000 1000", "ints": bytes([8, 0] * 500), "a.raw": bytes(range(256)) * 4, "a.gz": b"\x1f\x8b" * 99,
    }  # fmt: skip
    nothing |= {f"random{k}": rng.randbytes(1024) for k in range(300)}
    named = {
        "a.nii": "nifti", "b.nii.gz": "nifti", "b.NII.GZ": "nifti", "f.nii.bz2": "nifti", "b.img.gz": "analyze",
        "g.hdr": "analyze", "a.mgz": "mgh", "a.nrrd": "nrrd", "a.mha": "meta", "x.dcm": "dicom", "x.IMA": "dicom",
        "c+orig.BRIK.gz": "afni", "e.mif": "mrtrix", "a.mnc": "minc", "a.PAR": "par", "d.zip": "archive",
        "a.tar.gz": "archive", "a.7z": "archive",
    }  # fmt: skip
    for name, data in [*nothing.items(), *((n, b"x" * 1000) for n in named), *((f"0{n}", b"") for n in named)]:
        (tmp_path / name).write_bytes(data)
    before = time.perf_counter()
    for name in nothing:
        assert kind_of(tmp_path / name) == "", name
        assert scan_dicom(tmp_path / name) is None
    for name, kind in named.items():
        assert kind_of(tmp_path / name) == kind_of(tmp_path / f"0{name}") == kind, name
        for path in (tmp_path / name, tmp_path / f"0{name}"):
            with pytest.raises(Unusable):
                read_volume(path)
    assert time.perf_counter() - before < 20
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as z:
        z.writestr("a", "b")
    assert kind_of(tmp_path / "d.zip") == "archive"


def test_pipes_sockets_links_and_closed_files(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "link.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.nii").symlink_to(tmp_path / "loop.nii")
    (tmp_path / "folder.nii").mkdir()
    os.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("socket.nii")
        for path in tmp_path.iterdir():
            assert kind_of(path) == "", path
    (tmp_path / "closed.nii").write_bytes(RAW)
    (tmp_path / "closed.nii").chmod(0)
    if os.geteuid():
        with pytest.raises(PermissionError):
            kind_of(tmp_path / "closed.nii")
        with pytest.raises(PermissionError):
            read_volume(tmp_path / "closed.nii")


def damaged(kind: str) -> bytes:
    data = bytearray(RAW)
    if kind == "no orientation":
        data[252:256] = bytes(4)
    elif kind == "zero sizes":
        data[280:328], data[252:254] = bytes(48), b"\0\0"
    elif kind == "not finite":
        data[280:284], data[252:254] = b"\0\0\xc0\x7f", b"\0\0"
    elif kind == "short":
        del data[-9:]
    elif kind == "huge":
        data[42:48] = b"\x30\x75" * 3
    elif kind == "4-D":
        data[40:50] = np.array([4, 13, 11, 3, 3], "<i2").tobytes()
    elif kind == "type":
        data[70:72] = b"\xff\x7f"
    elif kind == "colour":
        data[70:72], data[72:74] = b"\x80\0", b"\x18\0"
    elif kind == "torn":
        return gzip.compress(bytes(data))[:-100]
    elif kind == "checksum":
        data = bytearray(gzip.compress(bytes(data)))
        data[-6] ^= 1
    elif kind == "empty":
        return b""
    return bytes(data)


SAID = {
    "no orientation": "no orientation", "zero sizes": "no orientation", "not finite": "no orientation",
    "short": "truncated", "huge": "larger than", "4-D": "4-D (13x11x3x3)", "type": "damaged", "colour": "colour voxels",
    "torn": "end-of-stream", "checksum": "CRC", "empty": "empty",
}  # fmt: skip


@pytest.mark.parametrize("kind", SAID)
def test_what_is_wrong_with_a_nifti_file_is_said(tmp_path: Path, kind: str):
    (tmp_path / "a.nii.gz").write_bytes(damaged(kind))
    with pytest.raises(Unusable) as e:
        read_volume(tmp_path / "a.nii.gz")
    assert SAID[kind] in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 300


def test_what_misses_its_other_half(tmp_path: Path):
    nibabel.save(nibabel.Nifti1Pair(VOXELS, AFFINE), tmp_path / "a.hdr")
    (tmp_path / "a.img").rename(tmp_path / "b.img")
    assert kind_of(tmp_path / "b.img") == "analyze"
    for name, other in (("a.hdr", ".img is missing"), ("b.img", ".hdr is missing")):
        with pytest.raises(Unusable, match=other):
            read_volume(tmp_path / name)
    (tmp_path / "a.mhd").write_text(
        "ObjectType = Image\nNDims = 3\nDimSize = 13 11 9\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
        "ElementType = MET_SHORT\nElementDataFile = a.raw\n"
    )
    with pytest.raises(Unusable) as e:
        read_volume(tmp_path / "a.mhd")
    assert "0x" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# DICOM


def stored(ds, path: Path, preamble: bool = True, **how) -> Path:
    import pydicom

    if preamble:
        ds.save_as(path, enforce_file_format=True)
        return path
    bare = pydicom.Dataset()
    bare.update({e.tag: e for e in ds})
    with open(path, "wb") as f:
        pydicom.filewriter.dcmwrite(f, bare, **how)
    return path


def base(affine: np.ndarray = AFFINE, **changes):
    """What files of one series share; rows run along the first axis of VOXELS, columns along the second."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = MRImageStorage, ExplicitVRLittleEndian
    ds = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.Modality, ds.PatientID, ds.SeriesNumber = MRImageStorage, "MR", "P1", 4
    ds.SeriesInstanceUID, ds.SeriesDescription, ds.ImageType = "1.2.3.4", "T1 MPRAGE", ["ORIGINAL", "PRIMARY", "M"]
    ds.Rows, ds.Columns = SHAPE[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
    for name, value in changes.items():
        setattr(ds, name, value)
    return ds


def geometry(k: float, affine: np.ndarray = AFFINE) -> tuple[list[str], list[str], list[str]]:
    """(position of slice k, directions, spacing) as DICOM writes them."""
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    sizes = np.linalg.norm(lps[:3, :3], axis=0)
    place, along = lps[:3, 3] + k * lps[:3, 2], [*lps[:3, 1] / sizes[1], *lps[:3, 0] / sizes[0]]
    return [f"{v:.6f}" for v in place], [f"{v:.10f}" for v in along], [f"{sizes[0]:.6f}", f"{sizes[1]:.6f}"]


def classic(folder: Path, preamble: bool = True, how: dict | None = None, affine: np.ndarray = AFFINE, **changes):
    """A file for each slice, with another slope in each, named in another order than they lie."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k in range(SHAPE[2]):
        ds = base(**changes)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{k + 1}"
        ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing = geometry(k, affine)
        slope = 1 + k % 2
        ds.RescaleSlope, ds.RescaleIntercept = str(1 / slope), "-100"
        ds.PixelData = ((VOXELS[:, :, k] + 100) * slope).astype("<u2").tobytes()
        paths.append(stored(ds, folder / f"{k * 5 % SHAPE[2]}.dcm", preamble, **(how or {})))
    return paths


def edit(path: Path, **changes) -> None:
    """Change elements of a file; None deletes."""
    import pydicom

    ds = pydicom.dcmread(path)
    for name, value in changes.items():
        delattr(ds, name) if value is None else setattr(ds, name, value)
    ds.save_as(path)


def packed(path: Path, syntax: str) -> None:
    """Compress the pixels of a file, by gdcm. Only these are taken from it: it writes positions of its own."""
    import gdcm
    import pydicom

    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path.with_suffix(".packed")))
    assert writer.Write()
    ds, other = pydicom.dcmread(path), pydicom.dcmread(path.with_suffix(".packed"))
    ds["PixelData"] = other["PixelData"]
    ds.file_meta.TransferSyntaxUID = other.file_meta.TransferSyntaxUID
    ds.save_as(path)
    path.with_suffix(".packed").unlink()


SYNTAXES = {
    "JPEGLosslessProcess14": "4.57", "JPEGLosslessProcess14_1": "4.70", "JPEGLSLossless": "4.80",
    "JPEGLSNearLossless": "4.81", "JPEG2000Lossless": "4.90", "JPEG2000": "4.91", "RLELossless": "5",
}  # fmt: skip


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_compressed_dicom(tmp_path: Path, syntax: str):
    import pydicom

    paths = classic(tmp_path)
    for path in paths:
        packed(path, syntax)
    assert pydicom.dcmread(paths[0]).file_meta.TransferSyntaxUID == f"1.2.840.10008.1.2.{SYNTAXES[syntax]}"
    check(read_series(paths), within=0 if "Lossless" in syntax else 8)


def test_what_there_is_no_decoder_for(tmp_path: Path):
    import pydicom

    paths = classic(tmp_path)
    for path in paths:
        packed(path, "JPEG2000Lossless")
        ds = pydicom.dcmread(path)
        ds.file_meta.TransferSyntaxUID = pydicom.uid.HTJ2KLossless
        ds.save_as(path)
    with pytest.raises(Unusable, match="High-Throughput JPEG 2000.*no decoder"):
        read_series(paths)


def test_rle_of_pydicom(tmp_path: Path):
    import pydicom

    paths = classic(tmp_path)
    for path in paths:
        ds = pydicom.dcmread(path)
        ds.compress(pydicom.uid.RLELossless)
        ds.save_as(path)
    check(read_series(paths))


def test_plain_dicom_with_and_without_preamble(tmp_path: Path):
    check(read_series(classic(tmp_path / "a")))
    for k, (implicit, little) in enumerate([(True, True), (False, True)]):
        paths = classic(tmp_path / f"{k}", False, {"implicit_vr": implicit, "little_endian": little})
        assert {kind_of(p) for p in paths} == {"dicom"}
        paths = [p.rename(p.with_suffix("")) for p in paths]
        assert {kind_of(p) for p in paths} == {"dicom"}
        assert {scan_dicom(p).series for p in paths} == {"1.2.3.4"}
        check(read_series(paths))
    zipped = classic(tmp_path / "z")
    for path in zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert {kind_of(p) for p in zipped} == {"dicom"}
    check(read_series(zipped))


def test_what_a_dicom_file_says_of_itself(tmp_path: Path):
    import pydicom

    path, other, third, *_ = classic(tmp_path)
    found = scan_dicom(path)
    assert (found.series, found.instance, found.number, found.patient) == ("1.2.3.4", "1.2.3.4.1", "4", "P1")
    assert (found.modality, found.description, found.problem) == ("MR", "T1 MPRAGE", "")
    edit(path, Modality="SR", Rows=None, PixelData=None)
    assert "without an image (SR)" in scan_dicom(path).problem
    edit(other, Modality="SEG")
    assert "without an image (SEG)" in scan_dicom(other).problem
    ds = pydicom.dcmread(third)
    ds.file_meta.MediaStorageSOPClassUID = readers.DICOMDIR
    ds.save_as(third)
    assert "DICOMDIR" in scan_dicom(third).problem
    (tmp_path / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"rubbish" * 9)
    assert scan_dicom(tmp_path / "x.dcm").problem


def enhanced(path: Path, which: list[int], **changes) -> Path:
    """Many frames in one file, in the given order; slope and directions shared, positions in each frame."""
    from pydicom import Dataset

    ds = base(SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1", **changes)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{len(which)}.{which[0]}"
    ds.NumberOfFrames, shared, each = len(which), Dataset(), []
    for name, group in (("PixelMeasures", ("PixelSpacing",)), ("PlaneOrientation", ("ImageOrientationPatient",)),
                        ("PixelValueTransformation", ("RescaleSlope", "RescaleIntercept"))):  # fmt: skip
        item = Dataset()
        for tag in group:
            _, along, spacing = geometry(0)
            values = {"PixelSpacing": spacing, "ImageOrientationPatient": along}
            setattr(item, tag, values.get(tag, {"RescaleSlope": "0.5", "RescaleIntercept": "-10"}.get(tag)))
        setattr(shared, f"{name}Sequence", [item])
    for k in which:
        frame, item = Dataset(), Dataset()
        item.ImagePositionPatient = geometry(k)[0]
        frame.PlanePositionSequence = [item]
        each.append(frame)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], each
    ds.PixelData = b"".join(((VOXELS[:, :, k] + 10) * 2).astype("<u2").tobytes() for k in which)
    return stored(ds, path)


def test_many_frames_in_any_order_in_one_file_or_several(tmp_path: Path):
    order = random.Random(1).sample(range(SHAPE[2]), SHAPE[2])
    path = enhanced(tmp_path / "1.dcm", order)
    check(read_series([path]))
    check(read_volume(path))
    several = [enhanced(tmp_path / f"{k}.dcm", order[3 * k - 6 : 3 * k - 3]) for k in (2, 3, 4)]
    check(read_series(several))
    for syntax in ("JPEG2000Lossless", "JPEGLSLossless", "RLELossless"):
        path = enhanced(tmp_path / "1.dcm", order)
        packed(path, syntax)
        check(read_series([path]))
    twice = enhanced(tmp_path / "5.dcm", [0, 1, 2, 0, 1])
    assert read_series([twice]).voxels.shape[2] == 3
    twice.write_bytes(twice.read_bytes()[:-2] + b"\1\1")
    with pytest.raises(Unusable, match="4-D"):
        read_series([twice])
    edit(path, PerFrameFunctionalGroupsSequence=None)
    with pytest.raises(Unusable, match="many frames"):
        read_series([path])


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


ONE_ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "torn": (torn, "damaged"),
    "half a header": (lambda p: p.write_bytes(p.read_bytes()[:500]), ""),
    "no pixels": (lambda p: edit(p, PixelData=None), "no pixels"),
    "no position": (lambda p: edit(p, ImagePositionPatient=None), "where it is"),
    "empty position": (lambda p: edit(p, ImagePositionPatient=""), "where it is"),
    "other size": (lambda p: edit(p, Rows=11, Columns=13), "another size"),
    "other directions": (lambda p: edit(p, ImageOrientationPatient=["1", "0", "0", "0", "1", "0"]), "another size"),
    "colour": (lambda p: edit(p, PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0), "RGB"),
}


@pytest.mark.parametrize("kind", ONE_ODD)
@pytest.mark.parametrize("pack", [False, True])
def test_one_odd_file_is_named_and_the_rest_is_judged(tmp_path: Path, kind: str, pack: bool):
    """At the end the series goes without it; in the middle there is a gap."""
    spoil, said = ONE_ODD[kind]
    for k in (SHAPE[2] - 1, 4):
        paths = classic(tmp_path / f"{k}")
        spoil(paths[k])
        if pack:
            for path in paths:
                if path != paths[k] or kind not in ("no pixels", "half a header", "torn", "colour"):
                    packed(path, "JPEG2000Lossless")
        name = paths[k].name
        if k != 4:
            volume = read_series(paths)
            check(volume, VOXELS[:, :, :-1])
            assert volume.note.startswith(f"left out {name}") and said in volume.note
        else:
            with pytest.raises(Unusable) as e:
                read_series(paths)
            assert "a slice is missing" in str(e.value) and name in str(e.value) and said in str(e.value)


def test_a_crash_of_the_decoder_takes_one_file_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a child that is killed where it comes to one of the files."""
    script = tmp_path / "child.py"
    script.write_text(
        f"import os, signal, sys; sys.path.insert(0, {str(readers.__file__)!r}[: -len('readers.py')])\n"
        "import readers\nbefore = readers.decode\n"
        "def decode(path):\n    if path.stem == 'crash':\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return before(path)\n"
        "readers.decode = decode\nreaders.serve()\n"
    )
    paths = classic(tmp_path / "a")
    for path in paths:
        packed(path, "JPEGLSLossless")
    paths[-1] = paths[-1].rename(tmp_path / "crash.dcm")
    monkeypatch.setattr(readers, "__file__", str(script))
    volume = read_series(paths[::-1])
    check(volume, VOXELS[:, :, :-1])
    assert "crash.dcm" in volume.note and "crashed" in volume.note


def test_files_that_are_there_twice(tmp_path: Path):
    paths = classic(tmp_path)
    copies = [p.with_suffix(".copy") for p in paths]
    for path, copy in zip(paths, copies):
        copy.write_bytes(path.read_bytes())
    check(read_series(paths + copies))
    for k, copy in enumerate(copies):  # exported again, under new UIDs
        edit(copy, SOPInstanceUID=f"9.9.{k}")
    check(read_series(paths + copies))
    data = bytearray(copies[3].read_bytes())
    data[-5] ^= 1
    copies[3].write_bytes(data)
    with pytest.raises(Unusable, match="one position"):
        read_series(paths + copies)
    for path in paths:  # as a careless anonymizer leaves them
        edit(path, SOPInstanceUID="1.1")
    check(read_series(paths))


def test_what_is_no_volume(tmp_path: Path):
    def refused(paths: list[Path]) -> str:
        with pytest.raises(Unusable) as e:
            read_series(paths)
        return str(e.value)

    paths = classic(tmp_path / "a")
    assert "single slice" in refused(paths[:1])
    gap = refused(paths[:4] + paths[5:])
    lps = [f"{float(v):.5g}" for v in geometry(3)[0]]
    assert "a slice is missing" in gap and f"{paths[3].name} at ({', '.join(lps)})" in gap and paths[5].name in gap
    other = classic(tmp_path / "b", affine=AFFINE[:, [0, 2, 1, 3]])
    assert "localizer" in refused(paths[:4] + other[:4])
    assert "mosaic" in refused(classic(tmp_path / "m", ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"]))
    colour = classic(tmp_path / "c", PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0)
    assert "RGB" in refused(colour) and "and 8 more" in refused(colour)
    for path in paths[:5]:
        torn(path)
    assert "too many files cannot be used" in refused(paths)
    huge = classic(tmp_path / "h", Rows=60000, Columns=60000)
    assert "larger than" in refused(huge)
    many = enhanced(tmp_path / "1.dcm", [0, 1, 2])
    edit(many, NumberOfFrames=10**9)
    assert "many frames" in refused([many])
    shifted = classic(tmp_path / "s")
    edit(shifted[4], ImagePositionPatient=[str(float(a) + 30 * float(b)) for a, b in zip(*geometry(4)[:2])])
    assert f"one line: {shifted[4].name}" in refused(shifted)


def test_white_is_zero(tmp_path: Path):
    paths = classic(tmp_path, PhotometricInterpretation="MONOCHROME1", BitsStored=12, HighBit=11)
    for path in paths:
        edit(path, RescaleSlope="1", RescaleIntercept="0")
    slopes = 1 + np.arange(SHAPE[2]) % 2
    check(read_series(paths), 4095 - (VOXELS + 100) * slopes)


def test_a_tilted_gantry_is_a_shear(tmp_path: Path):
    affine = AFFINE.copy()
    affine[:3, 2] += 0.4 * AFFINE[:3, 1]
    check(read_series(classic(tmp_path, affine=affine)), VOXELS, affine)


def test_one_sentence_of_the_file_system(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_series([tmp_path / "gone.dcm"])
