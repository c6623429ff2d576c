"""Read volumes: files of any of the formats that heads come in, to voxels and where they are in the world.

A file's content decides what it is, not its name. Two entrances: `read_volume` for a file, `read_series` for the files
of a DICOM series.
"""

from __future__ import annotations

import bz2
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MGH_HEADER = 284  # bytes
MAX_BYTES = 2**30  # largest volume, unpacked: protects against headers and archives that claim absurd sizes


class Unusable(Exception):
    """Raised for a volume that cannot be used; the message says why and goes into volumes.csv."""


@dataclass(frozen=True)
class Volume:
    """voxels: float32 [I, J, K]. affine: [4, 4], from voxel indices to RAS+ millimetres. note: what is uncertain."""

    voxels: np.ndarray
    affine: np.ndarray
    note: str = ""

    @property
    def sizes(self) -> np.ndarray:
        """Side lengths of a voxel in mm: [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def reason(e: Exception) -> str:
    """An exception as one short line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def check_size(shape: Sequence[int]) -> None:
    """Unusable if float32 voxels of this shape would take more than MAX_BYTES."""
    if np.prod([int(n) for n in shape], dtype=object) * 4 > MAX_BYTES:  # as Python integers, which do not overflow
        raise Unusable(f"larger than {MAX_BYTES >> 20} MB")


# ---------------------------------------------------------------------------------------------------------------------
# What a file is

# By their names, if the content does not tell: damaged volumes, and formats that are not read.
BY_NAME = {
    r"\.nii(\.gz|\.bz2)?": "nifti", r"\.hdr(\.gz)?": "analyze", r"\.img(\.gz)?": "analyze", r"\.mg[hz]": "mgh",
    r"\.n(rrd|hdr)": "nrrd", r"\.mh[ad]": "meta", r"\.(dcm|ima)": "dicom", r"\.(head|brik(\.gz)?)": "AFNI",
    r"\.mif(\.gz)?": "MRtrix", r"\.mnc2?(\.gz)?": "MINC", r"\.par": "PAR/REC",
    r"\.(zip|7z|rar|t?bz2|tgz|tar(\.\w+)?|xz)": "archive",
}  # fmt: skip
ENDINGS = [(re.compile(f".*{pattern}", re.IGNORECASE | re.DOTALL), kind) for pattern, kind in BY_NAME.items()]


def kind_of(path: Path) -> str:
    """nifti, analyze, mgh, nrrd, meta or dicom; "pair" for the voxels of a pair, whose .hdr is the volume; the name of
    another format, or archive, which are not read; "" for what is of no interest. OSError if it cannot be opened."""
    if not path.is_file():  # opening a pipe would block
        return ""
    with open(path, "rb") as f:
        raw = f.read(2048)
    by_name = next((kind for pattern, kind in ENDINGS if pattern.fullmatch(path.name)), "")
    return kind_of_content(unpacked_head(raw), path) or by_name


def unpacked_head(raw: bytes) -> bytes:
    """The beginning of a file, from its first bytes, which may be packed by gzip or bzip2."""
    try:
        if raw.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(31).decompress(raw, 1024)
        if raw.startswith(b"BZh"):  # its blocks are far larger than what was read
            return b""
    except zlib.error:
        pass
    return raw


def kind_of_content(head: bytes, path: Path) -> str:
    """The kind of a file by its first bytes; "" if they do not tell."""
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")}
    if 540 in sizes and head[4:7] in (b"n+2", b"ni2"):
        return "nifti"
    if 348 in sizes and len(head) >= 348:
        return "nifti" if head[344:347] in (b"n+1", b"ni1") else "analyze"
    if re.fullmatch(r".*\.img(\.gz)?", path.name, re.IGNORECASE) and header_of(path):
        return "pair"
    if head[:4] == b"\0\0\0\1" and int.from_bytes(head[20:24], "big") in (0, 1, 3, 4) and any(head[4:8]):
        return "mgh"
    if head.startswith(b"NRRD000"):
        return "nrrd"
    if re.match(rb"(ObjectType|NDims|Comment|ObjectSubType)\s*=", head):
        return "meta"
    if head[128:132] == b"DICM" or is_bare_dicom(head):
        return "dicom"
    if head.startswith((b"PK\3\4", b"7z\xbc\xaf", b"Rar!")) or head[257:262] == b"ustar":
        return "archive"
    return ""


def is_bare_dicom(head: bytes) -> bool:
    """Do these bytes begin like a DICOM file without preamble: with an element of group 2 or 8, of a small length?"""
    group, element = (int.from_bytes(head[i : i + 2], "little") for i in (0, 2))
    if group not in (2, 8) or element > 0x30 or len(head) < 16:
        return False
    explicit = head[4:6] in (b"UL", b"UI", b"CS", b"SH", b"LO", b"DA", b"TM", b"OB")
    length = int.from_bytes(head[6:8] if explicit else head[4:8], "little")
    return 0 < length <= 64 and (explicit or head[8 : 8 + length].strip(b" \0").isascii())


def header_of(path: Path) -> Path | None:
    """The .hdr beside an .img; None without one."""
    stem = re.sub(r"\.img(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    return next((p for end in (".hdr", ".HDR", ".hdr.gz") if (p := path.with_name(stem + end)).exists()), None)


# ---------------------------------------------------------------------------------------------------------------------
# Files that are volumes


def read_volume(path: Path) -> Volume:
    """Read a file, or a pair of .hdr and .img. Unusable, or an error of the libraries, says what is wrong with it."""
    read: dict[str, Callable[[Path], Volume]] = {
        "nifti": read_nifti, "analyze": read_nifti, "mgh": read_mgh, "nrrd": read_with_itk, "meta": read_with_itk,
    }  # fmt: skip
    return read[kind_of(path)](path)


def unpacked(path: Path) -> bytes:
    """The whole content of a file: only at its end does gzip compare the checksum."""
    with open(path, "rb") as f:
        magic = f.read(3)
    pack: Any = gzip.open if magic.startswith(b"\x1f\x8b") else bz2.open if magic == b"BZh" else open
    with pack(path, "rb") as f:
        data = f.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Unusable(f"larger than {MAX_BYTES >> 20} MB")
    return data


def read_nifti(path: Path) -> Volume:
    """NIfTI-1 or -2 in a file or a pair, or an Analyze pair; packed or not, whatever their names say."""
    import nibabel

    # The header, in either byte order; then which file the voxels are in.
    data = unpacked(path)
    if re.search(r"\.img(\.gz)?$", path.name, re.IGNORECASE) and int.from_bytes(data[:4], "little") != 348:
        raise Unusable("its .hdr file is missing")
    sizes = [int.from_bytes(data[:4], order) for order in ("little", "big")]
    if not {348, 540} & {*sizes}:
        raise Unusable("its header is damaged: it does not begin as NIfTI or Analyze do")
    analyze = 348 in sizes and data[344:347] not in (b"n+1", b"ni1")
    kind: Any = nibabel.AnalyzeHeader if analyze else nibabel.Nifti1Header if 348 in sizes else nibabel.Nifti2Header
    header = kind.from_fileobj(io.BytesIO(data), check=False)
    offset = int(header["vox_offset"])
    if analyze or data[344:347] == b"ni1" or data[4:7] == b"ni2":
        stem = re.sub(r"\.hdr(\.gz)?$", "", path.name, flags=re.IGNORECASE)
        voxels = [path.with_name(stem + end) for end in (".img", ".img.gz", ".IMG")]
        if not (image := next((p for p in voxels if p.exists()), None)):
            raise Unusable("its .img file is missing")
        data = unpacked(image)

    # Three dimensions, grey voxels, as many bytes as it claims
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise Unusable(f"{len(shape)}-D ({'x'.join(map(str, shape))}): keep one volume of three dimensions")
    check_size(shape)
    dtype, count = header.get_data_dtype(), int(np.prod(shape))
    if dtype.kind not in "iuf":
        raise Unusable(f"{dtype} voxels, not grey")
    if offset < 0 or offset + count * dtype.itemsize > len(data):
        raise Unusable("truncated: it is shorter than its header says")

    # Voxels, and where they are
    values = np.frombuffer(data, dtype, count, offset).reshape(shape, order="F").astype(np.float32)
    if analyze:
        note = "an Analyze file: left and right are as that format has them"
        return Volume(values, analyze_affine(ord(header["orient"].tobytes()), header.get_zooms(), shape), note)
    slope, intercept = header.get_slope_inter()
    if slope is not None and (slope, intercept) != (1.0, 0.0):
        values *= slope
        values += intercept or 0.0
    return Volume(values, nifti_affine(header))


def nifti_affine(header: Any) -> np.ndarray:
    """sform if it can be used, else qform. Unusable if neither can."""
    for code, get in (("sform_code", header.get_sform), ("qform_code", header.get_qform)):
        if header[code] > 0:
            try:
                affine = np.asarray(get(), np.float64)
            except Exception:  # a quaternion that is none
                continue
            if np.isfinite(affine).all() and 1e-6 < abs(np.linalg.det(affine[:3, :3])) < 1e9:
                return affine
    raise Unusable("its header has no orientation: set its sform, or convert the DICOM files again")


def analyze_affine(orient: int, zooms: Sequence[float], shape: Sequence[int]) -> np.ndarray:
    """The affine that Analyze 7.5's `orient` stands for, with the middle of the volume in the origin.

    Axes run to the left in all of them; 0 transverse, 1 coronal, 2 sagittal, and 3 to 5 the same with one axis flipped.
    """
    axes = ["LAS", "LSA", "ASL", "LPS", "LIA", "AIL"][orient if 0 <= orient < 6 else 0]
    affine = np.eye(4)
    for i, letter in enumerate(axes):
        world = next(k for k, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        affine[:3, i] = 0
        affine[world, i] = abs(float(zooms[i])) * (1 if letter in "RAS" else -1)
    if not 1e-6 < abs(np.linalg.det(affine[:3, :3])) < 1e9:
        raise Unusable("its header has no sizes of voxels: convert it to NIfTI")
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def read_mgh(path: Path) -> Volume:
    """FreeSurfer's .mgh and .mgz."""
    import nibabel

    data = unpacked(path)
    header = nibabel.freesurfer.mghformat.MGHHeader.from_fileobj(io.BytesIO(data), check=False)
    shape = [int(n) for n in header["dims"]]
    if int(header["version"]) != 1 or min(shape) < 1:
        raise Unusable("its header is damaged")
    if shape[3] > 1:
        raise Unusable(f"4-D ({'x'.join(map(str, shape))}): keep one volume of three dimensions")
    check_size(shape)
    dtype, count = header.get_data_dtype(), int(np.prod(shape))
    if MGH_HEADER + count * dtype.itemsize > len(data):
        raise Unusable("truncated: it is shorter than its header says")
    affine = np.asarray(header.get_affine(), np.float64)
    if not header["goodRASFlag"] or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise Unusable("its header has no orientation: convert it again")
    values = np.frombuffer(data, dtype, count, MGH_HEADER).reshape(shape[:3], order="F")
    return Volume(values.astype(np.float32), affine)


def read_with_itk(path: Path) -> Volume:
    """NRRD and MetaImage, with their voxels in the same file or beside it."""
    import SimpleITK as itk

    # The header first: it may claim anything.
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        shape = reader.GetSize()
        if len(shape) > 3 and all(n == 1 for n in shape[3:]):
            reader.SetExtractSize([*shape[:3], *[0] * (len(shape) - 3)])
        elif len(shape) != 3 or reader.GetNumberOfComponents() > 1:
            raise Unusable(f"{len(shape)}-D, {reader.GetNumberOfComponents()} values a voxel: keep one grey volume")
        check_size(shape)
        if kind_of(path) == "nrrd" and "NRRD_space" not in reader.GetMetaDataKeys():
            raise Unusable("its header has no orientation (space): convert it again")
        image = reader.Execute()
    except RuntimeError as e:
        raise Unusable(f"cannot be read ({str(e).strip().splitlines()[-1].strip()[:150]})") from None

    # ITK's world is LPS+, and its arrays have the last axis first.
    values = np.ascontiguousarray(itk.GetArrayFromImage(image).astype(np.float32).T)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    if not np.isfinite(affine).all() or not 1e-6 < abs(np.linalg.det(affine[:3, :3])) < 1e9:
        raise Unusable("its header has no usable orientation: convert it again")
    return Volume(values, np.diag([-1.0, -1, 1, 1]) @ affine)


# ---------------------------------------------------------------------------------------------------------------------
# DICOM


@dataclass(frozen=True)
class Found:
    """What the header of a DICOM file says; `problem`, if it is not "", why it cannot be used."""

    path: Path
    series: str = ""  # its UID
    instance: str = ""  # the UID of this file
    number: str = ""  # of the series
    patient: str = ""
    problem: str = ""


def scan_dicom(path: Path) -> Found | None:
    """Read a header without its pixels; None if it holds no image (reports, DICOMDIR, segmentations ...)."""
    import pydicom

    tags = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "PatientID", "Modality", "Rows"]
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=[*tags])
        meta = getattr(header, "file_meta", {})
        if "1.2.840.10008.1.3.10" in (str(meta.get("MediaStorageSOPClassUID", "")), str(header.get("SOPClassUID", ""))):
            return None
        text = {tag: str(header.get(tag, "") or "") for tag in tags}
    except Exception as e:  # a damaged file can make pydicom fail in any way
        return Found(path, problem=f"cannot be read as DICOM ({reason(e)})")
    if not text["SOPClassUID"] and not text["SeriesInstanceUID"]:
        return Found(path, problem="cannot be read as DICOM: it is damaged, or something else")
    if text["Modality"] in ("SR", "PR", "KO", "SEG", "DOC", "REG", "RTSTRUCT", "RTDOSE", "RTPLAN") or not text["Rows"]:
        return None
    number = re.sub(r"[^A-Za-z0-9]+", "", text["SeriesNumber"])[:20]
    return Found(path, text["SeriesInstanceUID"], text["SOPInstanceUID"], number, text["PatientID"])


@dataclass(frozen=True)
class Frame:
    """One slice: of a file of its own, or of a file of many."""

    file: Path
    index: int  # within its file
    position: tuple[float, ...]  # LPS+, of the centre of its first pixel
    along: tuple[float, ...]  # directions in which columns and rows grow: six numbers
    spacing: tuple[float, ...]  # between rows, between columns
    shape: tuple[int, int]
    slope: float
    intercept: float


def frames_of(path: Path, header: Any) -> list[Frame]:
    """The slices of one file. Unusable, or an error of pydicom's, if it has none with a position."""
    if "MOSAIC" in [str(v) for v in header.get("ImageType", [])]:
        raise Unusable("a mosaic of functional MRI")
    kind = str(header.get("PhotometricInterpretation", ""))
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unusable(f"{kind or 'unknown'} pixels, not grey")
    count = int(header.get("NumberOfFrames", 1) or 1)
    shape = int(header.Rows), int(header.Columns)
    check_size((count, *shape))
    groups = header.get("PerFrameFunctionalGroupsSequence") or [header] * count
    if len(groups) != count:
        raise Unusable(f"it has {count} frames, and {len(groups)} descriptions of them")
    shared = (header.get("SharedFunctionalGroupsSequence") or [None])[0]

    def value(group: Any, sequence: str, name: str, default: Any = None) -> Any:
        """From the frame's own description, the one that all share, or the file's header."""
        for place in (group, shared):
            if place is not None and place.get(sequence) and place.get(sequence)[0].get(name) is not None:
                return place.get(sequence)[0].get(name)
        return header.get(name, default)

    frames = []
    for index, group in enumerate(groups):
        position = value(group, "PlanePositionSequence", "ImagePositionPatient")
        along = value(group, "PlaneOrientationSequence", "ImageOrientationPatient")
        spacing = value(group, "PixelMeasuresSequence", "PixelSpacing")
        if position is None or along is None or spacing is None:
            raise Unusable("no position in space, or no size of pixels")
        slope = value(group, "PixelValueTransformationSequence", "RescaleSlope", 1) or 1
        intercept = value(group, "PixelValueTransformationSequence", "RescaleIntercept", 0) or 0
        place, axes, sizes = (tuple(float(v) for v in given) for given in (position, along, spacing))
        if [len(place), len(axes), len(sizes)] != [3, 6, 2] or not np.isfinite([*place, *axes, *sizes]).all():
            raise Unusable("its position in space is damaged")
        frames.append(Frame(path, index, place, axes, sizes, shape, float(slope), float(intercept)))
    return frames


def read_series(files: Sequence[Path]) -> Volume:
    """Stack the slices of one DICOM series, of files with one slice or many, in any order.

    A few files (a tenth at most) that cannot be read, or do not fit the others, are left out and named in the note, if
    what is left is whole; otherwise Unusable names the first of them.
    """
    import pydicom

    # The slices of every file. Doubled files have the same UID.
    frames: list[Frame] = []
    wrong: list[tuple[str, str]] = []  # (file, why)
    headers: dict[Path, Any] = {}
    seen: set[str] = set()
    for path in files:
        try:
            header = pydicom.dcmread(path, force=True, defer_size="1 KB")
            if "TransferSyntaxUID" not in header.file_meta:  # without a preamble nothing says it
                plain = pydicom.uid.ImplicitVRLittleEndian, pydicom.uid.ExplicitVRLittleEndian
                header.file_meta.TransferSyntaxUID = plain[not header.original_encoding[0]]
            own = frames_of(path, header)
            uid = str(header.get("SOPInstanceUID", "")) or str(path)
            if "PixelData" not in header:
                raise Unusable("it has no pixels")
        except Exception as e:  # a damaged file can make pydicom fail in any way
            wrong.append((path.name, str(e) if isinstance(e, Unusable) else f"cannot be read ({reason(e)})"))
            continue
        if uid not in seen:
            seen.add(uid)
            frames += own
            headers[path] = header
    if frames:
        # What most agree about; a few others are in the wrong place.
        usual = Counter((f.shape, tuple(round(v, 2) for v in f.along)) for f in frames).most_common(1)[0][0]
        fits = [(f.shape, tuple(round(v, 2) for v in f.along)) == usual for f in frames]
        wrong += [(f.file.name, "of another size or orientation") for f, fit in zip(frames, fits) if not fit]
        frames = [f for f, fit in zip(frames, fits) if fit]
    if frames and sum(not fit for fit in fits) > 0.1 * len(fits):
        raise Unusable("slices of several orientations or sizes: a localizer?")
    if not frames or len(wrong) > 0.1 * (len(frames) + len(wrong)):
        several = f" and {len(wrong) - 1:,} more" * (len(wrong) > 1)
        raise Unusable(f"{wrong[0][0]}{several}: {wrong[0][1]}")
    if len(frames) < 2:
        raise Unusable("a single slice")
    check_size((len(frames), *frames[0].shape))

    # The pixels; then slices by their position along the normal
    pixels, frames = decode(frames, headers, wrong)
    columns, rows = np.array(frames[0].along[:3]), np.array(frames[0].along[3:])
    if abs(np.dot(columns, rows)) > 0.01 or not 0.98 < np.linalg.norm(columns) * np.linalg.norm(rows) < 1.02:
        raise Unusable("its orientation in space is damaged")
    place = np.array([f.position for f in frames])
    depth = place @ np.cross(columns, rows)
    order = np.argsort(depth, kind="stable")
    order = without_doubles(order, depth, pixels)
    if len(order) < 2:
        raise Unusable("a single slice")
    gaps = np.diff(depth[order])
    middle = float(np.median(gaps))
    if gaps.min() < 0.5 * middle or gaps.max() > 1.5 * middle:
        at = depth[order][int(gaps.argmax())]
        named = f" ({wrong[0][0]}: {wrong[0][1]})" if wrong else ""
        raise Unusable(
            f"slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart: one is missing after {at:.1f} mm{named}"
        )

    # DICOM's world is LPS+, ours RAS+, so x and y change sign.
    height, width = frames[0].spacing
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * height, columns * width
    affine[:3, 2] = (place[order[-1]] - place[order[0]]) / (len(order) - 1)
    affine[:3, 3] = place[order[0]]
    if not 1e-6 < abs(np.linalg.det(affine[:3, :3])) < 1e9:
        raise Unusable("its positions in space are damaged")
    voxels = np.ascontiguousarray(np.moveaxis(pixels[order], 0, 2))
    note = "; ".join(f"left out {name}: {why}" for name, why in wrong[:3])
    return Volume(voxels, np.diag([-1.0, -1, 1, 1]) @ affine, note)


def decode(
    frames: list[Frame], headers: dict[Path, Any], wrong: list[tuple[str, str]]
) -> tuple[np.ndarray, list[Frame]]:
    """(float32 [N, rows, columns], the frames that they are of). Files that cannot be decoded go into `wrong`."""
    values = np.empty((len(frames), *frames[0].shape), np.float32)
    kept: list[Frame] = []
    by_file: dict[Path, list[Frame]] = {}
    for frame in frames:
        by_file.setdefault(frame.file, []).append(frame)
    for path, own in by_file.items():
        header = headers.pop(path)
        try:
            stored = header.pixel_array
            stored = stored[None] if stored.ndim == 2 else stored
            if stored.ndim != 3 or stored.shape[1:] != own[0].shape or len(stored) <= own[-1].index:
                raise Unusable("its pixels are not as many as its header says")
        except Exception as e:  # so can a decoder
            wrong.append((path.name, str(e) if isinstance(e, Unusable) else f"cannot be decoded ({reason(e)})"))
            if len(wrong) > 0.1 * len(frames):
                raise Unusable(f"{wrong[-1][0]}: {wrong[-1][1]}") from None
            continue
        for frame in own:
            values[len(kept)] = stored[frame.index]
            if header.PhotometricInterpretation == "MONOCHROME1":  # where small is bright
                values[len(kept)] = float(stored.max()) - values[len(kept)]
            values[len(kept)] *= frame.slope
            values[len(kept)] += frame.intercept
            kept.append(frame)
        del header.PixelData
    return values[: len(kept)], kept


def without_doubles(order: np.ndarray, depth: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The order without slices that lie on another and are equal to it. Unusable if they differ."""
    usual = float(np.median(np.diff(depth[order])[np.diff(depth[order]) > 1e-3] if len(order) > 1 else [1.0]))
    kept = [order[0]]
    for i in order[1:]:
        if depth[i] - depth[kept[-1]] > max(1e-3, 0.1 * usual):
            kept.append(i)
        elif not np.array_equal(pixels[i], pixels[kept[-1]]):
            raise Unusable("several images at one position: 4-D, or two scans in one series")
    return np.array(kept)
