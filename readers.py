"""Read volumes: files of any of the formats that heads come in, to voxels and where they are in the world.

What is in a file decides, not its name. NIfTI, Analyze and FreeSurfer's MGH are a header and plain voxels, which are
taken from the bytes here. NRRD, MetaImage and compressed DICOM need decoders written in C, which a damaged file can
crash: they run in a child process, which is this file as a script.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import json
import logging
import lzma
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_BYTES = 2**30  # largest volume, unpacked: protects against headers and archives that claim absurd sizes
TOO_LARGE = f"larger than {MAX_BYTES >> 20} MB"


class Unusable(Exception):
    """Raised for a volume that cannot be used; the message says why and goes into volumes.csv."""


@dataclass(frozen=True)
class Volume:
    """voxels: float32 [I, J, K]. affine: [4, 4], from voxel indices to RAS+ millimetres."""

    voxels: np.ndarray
    affine: np.ndarray
    note: str = ""  # what a person should know about how it was read

    @property
    def sizes(self) -> np.ndarray:
        """Side lengths of a voxel in mm: [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def reason(e: Exception) -> str:
    """An exception as one short line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


def sentence(e: Exception) -> str:
    """What is wrong, for a person."""
    return str(e) if isinstance(e, Unusable) else f"damaged ({reason(e)})"


# ---------------------------------------------------------------------------------------------------------------------
# Which format

OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by the first two bytes
ENDINGS = {
    "nifti": ".nii", "analyze": ".hdr .img", "mgh": ".mgh .mgz", "nrrd": ".nrrd .nhdr", "meta": ".mha .mhd",
    "dicom": ".dcm .ima .dicom", "afni": ".brik", "mrtrix": ".mif .mih", "minc": ".mnc", "par": ".par",
    "archive": ".zip .tar .tgz .tbz .tbz2 .txz .7z .rar",
}  # fmt: skip
NOT_READ = {
    "": "not a volume of any format that is known",
    "pair": "the voxels of a pair of files: name its .hdr",
    "archive": "an archive: unpack it",
    "afni": "AFNI's format: convert it to NIfTI (3dAFNItoNIFTI)",
    "mrtrix": "MRtrix's format: convert it to NIfTI (mrconvert)",
    "minc": "MINC: convert it to NIfTI (mnc2nii)",
    "par": "Philips PAR/REC: convert it to NIfTI (dcm2niix)",
}


def kind_of(path: Path) -> str:
    """The format of a file, "" if it is of no interest. PermissionError if it may not be read.

    "nifti", "analyze", "mgh", "nrrd", "meta" and "dicom" can be read; the keys of NOT_READ are named so that they can
    be reported ("pair" is the .img that belongs to a .hdr). The first KB decides. Where it says nothing, as in a
    damaged file, the name does.
    """
    head = b""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return ""
        with open(path, "rb") as f:
            head = f.read(1024)
        if head[:2] == b"\x1f\x8b":
            head = zlib.decompressobj(31).decompress(head, 1024)
    except PermissionError:
        raise
    except (OSError, zlib.error):
        pass
    ending = split_name(path)[1]
    by_name = next((kind for kind, endings in ENDINGS.items() if ending in endings.split()), "")
    if head[128:132] == b"DICM":
        return "dicom"
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:7] in (b"n+2", b"ni2"):
        return "nifti"
    if ending == ".img" and partner(path, ".hdr"):  # before what voxels can look like by chance
        return "pair"
    if head[:4] in (b"\0\0\x01\x5c", b"\x5c\x01\0\0") and len(head) >= 348 and by_name != "nifti":  # 348, its size
        return "analyze"
    if head[:7] == b"NRRD000":
        return "nrrd"
    if re.match(rb"\s*(ObjectType|NDims|Comment)\s*=", head) and b"NDims" in head:
        return "meta"
    if head[:4] == b"\0\0\0\1" and len(head) >= 284 and head[20:24] in [bytes([0, 0, 0, t]) for t in (0, 1, 3, 4, 10)]:
        return "mgh"
    return "dicom" if begins_with_elements(head) else by_name


def split_name(path: Path) -> tuple[str, str]:
    """("x", ".nii") for x.nii.gz; the ending in lower case."""
    stem, dot, ending = re.sub(r"(?i)\.(gz|bz2|xz|zst)$", "", path.name).rpartition(".")
    return stem, (dot + ending).lower()


def partner(path: Path, ending: str) -> Path | None:
    """The file beside it that has the same name but for the ending, such as the .img or .img.gz of a .hdr."""
    names = (split_name(path)[0] + e + z for e in (ending, ending.upper()) for z in ("", ".gz", ".GZ"))
    return next((p for p in map(path.with_name, names) if p.exists()), None)


def begins_with_elements(head: bytes) -> bool:
    """Is it DICOM without a preamble? Then three short elements of group 2 or 8 come first, in ascending order."""
    for order in "<>":
        at, last, good = 0, (0, -1), 0
        while good < 3 and len(head) >= at + 12:
            tag, kind = struct.unpack_from(f"{order}HH", head, at), head[at + 4 : at + 6]
            # where the length is: after the type in one of two ways, or without a type
            skip, form, size = (8, "I", 12) if kind in (b"OB", b"UN", b"SQ", b"UT") else (6, "H", 8)
            skip, form, size = (skip, form, size) if kind.isalpha() and kind.isupper() else (4, "I", 8)
            (length,) = struct.unpack_from(order + form, head, at + skip)
            if tag[0] not in (2, 8) or tag <= last or length % 2 or length > 512:
                break
            at, last, good = at + size + length, tag, good + 1
        if good == 3:
            return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Files that are a volume


def read_volume(path: Path) -> Volume:
    """Read a file that holds a volume (a pair by its .hdr). Unusable says what is wrong with it; else its OSError."""
    kind = kind_of(path)
    try:
        if kind in NOT_READ:
            raise Unusable(NOT_READ[kind])
        if kind == "dicom":
            return read_series([path])
        if kind in ("nrrd", "meta"):
            ((_, voxels, affine),) = in_child([path])
            if isinstance(voxels, Unusable):
                raise voxels
            return Volume(voxels.T.astype(np.float32), checked(affine))
        return read_plain(path, kind)
    except Exception as e:  # a damaged file can make the libraries fail in any way
        if isinstance(e, OSError) and e.errno:  # of the file system; gzip's own have no number
            raise OSError(e.errno, e.strerror, str(path)) from None
        raise Unusable(sentence(e)) from None


def opened(path: Path) -> IO[bytes]:
    """The file, decompressed while it is read."""
    with open(path, "rb") as f:
        start = f.read(2)
    return OPENERS.get(start, open)(path, "rb")


def unpacked(path: Path) -> bytes:
    """All of a file: only at its end does gzip compare the checksum."""
    with opened(path) as f:
        data = f.read(MAX_BYTES + 1)
    if not data or len(data) > MAX_BYTES:
        raise Unusable(TOO_LARGE if data else "an empty file")
    return data


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The three sides of a volume, of the sides in a header."""
    shape = tuple(map(int, shape))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise Unusable(f"{len(shape)}-D ({'x'.join(map(str, shape))}): keep one volume of three dimensions")
    if np.prod(shape, dtype=object) * 4 > MAX_BYTES:  # of Python integers, which do not overflow
        raise Unusable(TOO_LARGE)
    return shape


def read_plain(path: Path, kind: str) -> Volume:
    """Read NIfTI, Analyze or MGH."""
    from nibabel import AnalyzeHeader, Nifti1Header, Nifti2Header, nifti1, nifti2
    from nibabel.freesurfer.mghformat import MGHHeader

    # parse the header. {magic bytes or format: class, size, first byte where voxels can be (0: in another file)}
    classes: dict[bytes | str, tuple[Any, int, int]] = {
        b"n+1": (Nifti1Header, 348, 352), b"ni1": (nifti1.Nifti1PairHeader, 348, 0), "mgh": (MGHHeader, 999, 284),
        b"n+2": (Nifti2Header, 540, 544), b"ni2": (nifti2.Nifti2PairHeader, 540, 0), "analyze": (AnalyzeHeader, 348, 0),
    }  # fmt: skip
    data = unpacked(path)
    if kind == "analyze" and split_name(path)[1] == ".img":
        raise Unusable("an .img file whose .hdr is missing: put it beside")
    found = next((classes[key] for key in (data[344:347], data[4:7], kind) if key in classes), None)
    if found is None or (kind == "analyze" and data[:4] not in (b"\0\0\x01\x5c", b"\x5c\x01\0\0")):
        raise Unusable(f"not a {kind} file, gzipped or plain: it begins with {data[:8]!r}")
    make, size, least = found
    header = make(data[:size], check=False)
    header.check_fix(logger=logging.Logger("quiet", logging.CRITICAL + 1))  # nibabel tells of all that it mends

    # where the voxels are, and where in the world
    affine: np.ndarray | None
    note, slope = "", None
    if kind == "analyze":
        affine = analyze_affine(path, header)
        note = "an Analyze file: left and right are as the format's convention has them"
    elif kind == "mgh":
        affine = header.get_affine() if any(data[28:30]) else None  # a flag says whether it has one
    else:
        affine = nifti_affine(header)
        slope, intercept = header.get_slope_inter()
    if not least:
        if (other := partner(path, ".img")) is None:
            raise Unusable("a .hdr file whose .img is missing: put it beside")
        data = unpacked(other)
    shape, dtype, offset = check_shape(header.get_data_shape()), header.get_data_dtype(), header.get_data_offset()
    if dtype.kind not in "iuf":
        raise Unusable(f"{'colour' if dtype.names else dtype} voxels, not grey")
    count, offset = int(np.prod(shape)), offset or least
    if offset < least or offset + count * dtype.itemsize > len(data):
        raise Unusable("truncated: it is shorter than its header says")

    # Take the voxels from the bytes directly: several volumes are in memory at the same time, and libraries copy them.
    voxels = np.frombuffer(data, dtype, count, offset).reshape(shape, order="F").astype(np.float32)
    if slope is not None and (slope, intercept) != (1.0, 0.0):
        voxels *= slope
        voxels += intercept
    return Volume(voxels, checked(affine), note)


def checked(affine: np.ndarray | None) -> np.ndarray:
    """The affine, if it puts voxels of a possible size into three dimensions."""
    if affine is not None and np.isfinite(affine).all() and np.abs(affine).max() < 1e5:
        sizes = np.linalg.norm(affine[:3, :3], axis=0)
        if sizes.min() > 0.01 and abs(np.linalg.det(affine[:3, :3] / sizes)) > 0.01:
            return affine
    raise Unusable("its header has no orientation that can be used: convert the DICOM files again, or set its sform")


def nifti_affine(header: Any) -> np.ndarray | None:
    """The sform, or the qform where there is no sform that can be used."""
    for get in (header.get_sform, header.get_qform):
        with contextlib.suppress(Exception):  # Unusable, or whatever nibabel says of a bad quaternion
            return checked(get(coded=True)[0])
    return None


# Where i, j and k go, for each value that `orient` has in the Analyze format: transverse, coronal and sagittal, then
# the same with j flipped. OASIS-1 is 2 as it was scanned and 0 as it was registered.
ORIENT = ("LAS", "LSA", "ASL", "LPS", "LIA", "AIL")
LETTERS = {"L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


def analyze_affine(path: Path, header: Any) -> np.ndarray:
    """The affine of an Analyze header. SPM's .mat file beside it is believed, then SPM's origin, then the middle."""
    import nibabel

    if partner(path, ".mat"):
        return nibabel.Spm99AnalyzeImage.from_filename(path).affine
    shape, sizes = np.array(header["dim"][1:4], float), np.abs(header["pixdim"][1:4].astype(float))
    origin = np.frombuffer(header.binaryblock, header["dim"].dtype, 3, 253).astype(float)
    if not origin.any() or (origin < -shape).any() or (origin > 2 * shape).any():
        origin = (shape + 1) / 2
    affine, orient = np.eye(4), header["orient"].tobytes()[0]
    affine[:3, :3] = np.transpose([LETTERS[c] for c in ORIENT[orient if orient < 6 else 0]]) * sizes
    affine[:3, 3] = -affine[:3, :3] @ (origin - 1)  # Matlab counts from 1
    return affine


# ---------------------------------------------------------------------------------------------------------------------
# DICOM

SERIES_TAGS = ["SeriesInstanceUID", "SOPInstanceUID", "SeriesNumber", "PatientID", "Modality", "SeriesDescription"]
IMAGE_TAGS = [
    "SOPInstanceUID", "ImageType", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation",
    "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing",
    "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
NO_IMAGES = {"SR", "PR", "KO", "SEG", "REG", "RTSTRUCT", "RTPLAN", "RTDOSE", "DOC", "PLAN", "RWV", "FID"}  # modalities
DICOMDIR, DEFLATED = "1.2.840.10008.1.3.10", b"1.2.840.10008.1.2.1.99"
NO_IMAGE = "DICOM without an image"
FOUR_D = "several images at one position: 4-D, or two scans in one series"


@dataclass(frozen=True)
class Found:
    """What a DICOM file says it is part of."""

    path: Path
    series: str = ""  # SeriesInstanceUID
    instance: str = ""  # SOPInstanceUID
    number: str = ""  # of the series
    patient: str = ""
    modality: str = ""
    description: str = ""
    problem: str = ""  # why it is no part of a volume


@dataclass(frozen=True)
class Frame:
    """One slice: a whole file, or a frame of it."""

    path: Path
    number: int  # of the frame in the file
    packed: bool  # its pixels are compressed
    size: tuple[int, int]  # rows, columns
    along: np.ndarray  # directions in which columns and rows run, then the distances between rows and columns [8]
    place: np.ndarray  # of its first pixel in DICOM's LPS+ mm [3]
    slope: float
    intercept: float
    mirror: float | None  # MONOCHROME1, where zero is white: stored values become this number minus them

    @property
    def name(self) -> str:
        return self.path.name if not self.number else f"frame {self.number + 1} of {self.path.name}"


def read_dataset(path: Path, tags: list[str], pixels: bool = False) -> Any:
    """Some elements of a DICOM file, as a pydicom Dataset."""
    import pydicom

    with io.BytesIO(unpacked(path)) if pixels else opened(path) as f:
        head = f.read(1024)
        f.seek(0)
        if DEFLATED in head:  # pydicom would unpack it to whatever size
            raise Unusable("deflated DICOM: convert it to NIfTI (dcm2niix)")
        bare = head[128:132] != b"DICM"
        if bare and not begins_with_elements(head):
            raise Unusable("not a DICOM file")
        ds = pydicom.dcmread(f, stop_before_pixels=not pixels, force=bare, specific_tags=[*tags, "PixelData"])
    if "TransferSyntaxUID" not in ds.file_meta:
        implicit, little = ds.original_encoding
        syntax = "1.2.840.10008.1.2" + ("" if implicit else ".1" if little else ".2")
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    return ds


def scan_dicom(path: Path) -> Found | None:
    """What a DICOM file is part of, by its header. None if it is no DICOM file at all. OSError if it cannot be read."""
    if kind_of(path) != "dicom":
        return None
    try:
        ds = read_dataset(path, [*SERIES_TAGS, "Rows", "Columns"])
        found = Found(path, *(str(ds.get(tag) or "") for tag in SERIES_TAGS))
        if ds.file_meta.get("MediaStorageSOPClassUID") == DICOMDIR:
            return replace(found, problem=f"{NO_IMAGE} (a DICOMDIR)")
        if not found.modality and not ds.get("Rows"):
            return replace(found, problem="damaged, or not an image: its header says neither size nor kind")
        if not ds.get("Rows") or not ds.get("Columns") or found.modality in NO_IMAGES:
            return replace(found, problem=f"{NO_IMAGE} ({found.modality})")
        return found
    except Exception as e:
        if isinstance(e, OSError) and e.errno:
            raise
        return Found(path, problem=sentence(e))


def frames_of(path: Path) -> tuple[str, list[Frame]]:
    """The SOP instance UID and the slices of a DICOM file, without their pixels. Any error if it is no grey image."""
    from pydicom import Dataset

    ds = read_dataset(path, IMAGE_TAGS)
    if not ds.get("Rows") or not ds.get("Columns"):
        raise Unusable("DICOM, but not an image")
    if "MOSAIC" in (ds.get("ImageType") or ()):
        raise Unusable("a mosaic of functional MRI")
    colour = ds.get("PhotometricInterpretation")
    if ds.get("SamplesPerPixel", 1) != 1 or colour not in ("MONOCHROME1", "MONOCHROME2"):
        raise Unusable(f"{colour} pixels, not grey")
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    each = ds.get("PerFrameFunctionalGroupsSequence") or [Dataset()]
    if len(each) != int(ds.get("NumberOfFrames") or 1):
        raise Unusable("many frames that do not say where they are: convert it to NIfTI (dcm2niix)")
    size, packed = (int(ds.Rows), int(ds.Columns)), ds.file_meta.TransferSyntaxUID.is_compressed
    check_shape([*size, len(each)])
    mirror = (2.0 ** int(ds.BitsStored) - 1 if ds.PixelRepresentation == 0 else -1.0) if colour[-1] == "1" else None

    def numbers(own: Any, group: str, name: str, count: int, default: float | None = None) -> np.ndarray:
        """A value of one frame: in the frame's own group, in the group that all share, or in the whole file."""
        for where in (*(own.get(group) or ()), *(shared.get(group) or ()), ds):
            if (value := where.get(name)) is not None and value != "":
                values = np.array(value, dtype=float).reshape(-1)
                if len(values) != count or not np.isfinite(values).all():
                    raise Unusable(f"its {name} makes no sense")
                return values
        if default is None:
            raise Unusable("it does not say where it is in space")
        return np.array([default])

    frames = []
    for k, own in enumerate(each):
        place = numbers(own, "PlanePositionSequence", "ImagePositionPatient", 3)
        directions = numbers(own, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        spacing = numbers(own, "PixelMeasuresSequence", "PixelSpacing", 2)
        slope = float(numbers(own, "PixelValueTransformationSequence", "RescaleSlope", 1, 1)[0]) or 1.0
        intercept = float(numbers(own, "PixelValueTransformationSequence", "RescaleIntercept", 1, 0)[0])
        along = np.concatenate([directions, spacing])
        frames.append(Frame(path, k, packed, size, along, place, slope, intercept, mirror))
    return str(ds.get("SOPInstanceUID") or path), frames


def read_series(files: Sequence[Path]) -> Volume:
    """Read the DICOM files of one series, in any order. Files of one SOP instance UID and position count once.

    A few files that cannot be read or do not belong are left out, and named in the note, if the slices of the others
    have no gap.
    """
    # where the slices are
    frames: list[Frame] = []
    seen: set[tuple] = set()
    left: dict[str, str] = {}  # {what is left out: why}
    for path in files:
        try:
            instance, found = frames_of(path)
            identity = instance, *found[0].place, *found[0].along  # some anonymizers give all files one UID
            frames += found if identity not in seen else []
            seen.add(identity)
        except Exception as e:
            if isinstance(e, OSError) and e.errno:
                raise
            left[path.name] = sentence(e)
    if not frames:
        raise Unusable(listed(left) if len(files) > 1 else next(iter(left.values()), "no files"))
    allowed = 1 + (len(frames) + len(left)) // 10

    # those of another size or orientation than most
    size = Counter(f.size for f in frames).most_common(1)[0][0]
    along = np.median([f.along for f in frames], axis=0)
    odd = {f.name for f in frames if f.size != size or np.abs(f.along - along).max() > 2e-3}
    if len(odd) > allowed:
        raise Unusable("slices of several orientations or sizes: a localizer?")
    left |= dict.fromkeys(sorted(odd), "another size or orientation than the rest")

    # sort them by their position along the normal; `index` is where each goes, the same for those at one position
    columns, rows = along[:3], along[3:6]  # directions in which the column index and the row index grow
    normal = np.cross(columns, rows)
    frames = sorted((f for f in frames if f.name not in odd), key=lambda f: float(f.place @ normal))
    gaps = np.diff([f.place @ normal for f in frames])
    if not (gaps > 1e-3).any():
        raise Unusable(FOUR_D if len(frames) > 1 else "a single slice")
    index = np.cumsum([0, *(gaps > max(1e-3, 0.1 * np.median(gaps[gaps > 1e-3])))])
    slices = [frames[i] for i in np.unique(index, return_index=True)[1]]  # one of each position
    check_shape([*size, len(slices)])
    check_spacing(slices, normal, left)

    # read the pixels; each slice can have its own slope and intercept
    voxels, filled = np.empty((len(slices), *size), np.float32), np.zeros(len(slices), bool)
    for i, pixels in decoded(frames):
        f, k = frames[i], index[i]
        if isinstance(pixels, Unusable):
            left[f.name] = str(pixels)
            if len(left) > allowed:
                break
            continue
        values = pixels if f.mirror is None else f.mirror - pixels.astype(np.float32)
        values = (values * f.slope + f.intercept).astype(np.float32)
        if filled[k] and not np.array_equal(voxels[k], values):
            raise Unusable(FOUR_D)
        voxels[k], filled[k] = values, True
    if len(left) > allowed:
        raise Unusable(f"too many files cannot be used: {listed(left)}")
    if not filled.all():
        voxels, slices = voxels[filled], [s for s, there in zip(slices, filled) if there]
        check_spacing(slices, normal, left)

    # the affine; DICOM's world is LPS+, ours RAS+, so x and y change sign
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * along[6], columns * along[7]
    affine[:3, 2] = (slices[-1].place - slices[0].place) / (len(slices) - 1)
    affine[:3, 3] = slices[0].place
    note = f"left out {listed(left)}" if left else ""
    return Volume(voxels.transpose(1, 2, 0), checked(np.diag([-1.0, -1, 1, 1]) @ affine), note)


def listed(left: dict[str, str]) -> str:
    """What was left out, by reason, with the first file of each."""
    words = []
    for why, n in Counter(left.values()).most_common(3):
        first = next(name for name in left if left[name] == why)
        words.append(f"{first}{f' and {n - 1} more' * (n > 1)} ({why})")
    return "; ".join(words)


def check_spacing(slices: Sequence[Frame], normal: np.ndarray, left: dict[str, str]) -> None:
    """Unusable unless the slices, sorted, lie in one line at even distances."""
    blame = f"; left out {listed(left)}" if left else ""
    if len(slices) < 2:
        raise Unusable(f"a single slice{blame}")
    place = np.array([s.place for s in slices])
    gaps = np.diff(place @ normal)
    step, k = np.median(gaps), int(gaps.argmax())
    if gaps[k] > 1.5 * step:
        a, b = (f"{s.name} at ({', '.join(f'{v:.5g}' for v in s.place)})" for s in slices[k : k + 2])
        raise Unusable(f"a slice is missing between {a} and {b}: {gaps[k]:.5g} mm, not {step:.5g}{blame}")
    if gaps.min() < 0.5 * step:
        raise Unusable(f"slices are {gaps.min():.5g} to {gaps.max():.5g} mm apart{blame}")
    line = place[0] + np.linspace(0, 1, len(place))[:, None] * (place[-1] - place[0])
    away = np.linalg.norm(place - line, axis=1)
    if away.max() > max(0.5 * step, 0.1):
        raise Unusable(f"slices do not lie in one line: {slices[away.argmax()].name} is {away.max():.5g} mm off{blame}")


def decoded(frames: Sequence[Frame]) -> Iterator[tuple[int, np.ndarray | Unusable]]:
    """(which frame, its pixels [rows, columns] or what is wrong with them), file by file."""
    those: dict[Path, list[int]] = {}
    for i, f in enumerate(frames):
        those.setdefault(f.path, []).append(i)
    packed = {f.path for f in frames if f.packed}
    here = ((path, *tried(path)) for path in those if path not in packed)
    for path, pixels, _ in itertools.chain(here, in_child([path for path in those if path in packed])):
        for i in those[path]:
            if isinstance(pixels, Unusable):
                yield i, pixels
            elif pixels.shape[1:] != frames[i].size or frames[i].number >= len(pixels):
                yield i, Unusable("its pixels are of another size than its header says")
            else:
                yield i, pixels[frames[i].number]


# ---------------------------------------------------------------------------------------------------------------------
# Decoders, and the child process for those that can crash


def decode(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The voxels of a file as they are stored: the frames of DICOM, or [K, J, I] with the affine of other formats."""
    if kind_of(path) != "dicom":
        return decode_with_simpleitk(path)
    from pydicom.pixels import get_decoder

    ds = read_dataset(path, IMAGE_TAGS, pixels=True)
    if "PixelData" not in ds:
        raise Unusable("it has no pixels")
    syntax = ds.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        raise Unusable(f"{syntax.name}, for which there is no decoder here: convert it to NIfTI (dcm2niix)")
    pixels = ds.pixel_array
    return pixels.reshape(-1, *pixels.shape[-2:]), None


def decode_with_simpleitk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """NRRD and MetaImage."""
    import SimpleITK

    # ITK takes what has no orientation, or is not about a body, for upright
    with open(path, "rb") as f:
        head = f.read(2**16)
    nrrd = kind_of(path) == "nrrd"
    oriented = rb"(?mi)^space: *(left|right|LPS|LAS|RAS)" if nrrd else rb"(?m)^(TransformMatrix|Rotation|Orientation)\b"
    if not re.search(oriented, head):
        raise Unusable("its header has no orientation: convert the DICOM files again")
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    try:
        reader.ReadImageInformation()
        check_shape(reader.GetSize())
        if reader.GetNumberOfComponents() != 1:
            raise Unusable(f"{reader.GetNumberOfComponents()} values a voxel, not grey")
        image = reader.Execute()
    except RuntimeError as e:  # of many lines, of which the last is the cause
        cause = str(e).strip().splitlines()[-1]
        raise Unusable(f"damaged, or its voxels are in a file that is missing ({cause})") from None
    while image.GetDimension() > 3:
        image = image[..., 0]
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image), np.diag([-1.0, -1, 1, 1]) @ affine  # ITK's world is LPS+


def tried(path: Path) -> tuple[Any, np.ndarray | None]:
    """As decode, but Unusable in place of voxels where it fails."""
    try:
        return decode(path)
    except Exception as e:
        return Unusable(sentence(e)), None


def in_child(paths: Sequence[Path]) -> Iterator[tuple[Path, Any, np.ndarray | None]]:
    """(path, *tried(path)) by a child process, which may crash, hang or want too much memory."""
    left = list(paths)
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
    pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    while left:
        with subprocess.Popen([sys.executable, __file__], env=alone, **pipes) as child:  # type: ignore[call-overload]
            try:
                with contextlib.suppress(BrokenPipeError), child.stdin as f:
                    f.write(json.dumps([str(p) for p in left]).encode())
                while left and (line := child.stdout.readline()):
                    told = json.loads(line)
                    voxels: Any = np.empty(told["shape"], told["dtype"])
                    if child.stdout.readinto(voxels.reshape(-1).view(np.uint8)) < voxels.nbytes:
                        break
                    affine = np.array(told["affine"]) if told["affine"] else None
                    yield left.pop(0), Unusable(told["problem"]) if told["problem"] else voxels, affine
                if left:
                    yield left.pop(0), Unusable("damaged: its decoder crashed, hung or wanted too much memory"), None
            finally:
                child.kill()


def serve() -> None:
    """The child: decode the files that stdin lists. Of each, write a line of JSON to stdout, then its voxels."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not everywhere
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (2 * MAX_BYTES, 2 * MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the libraries print must not get in between
    for path in map(Path, json.load(sys.stdin)):
        if hasattr(signal, "setitimer"):  # the process is killed after so many seconds of CPU
            signal.setitimer(signal.ITIMER_PROF, 20 + path.stat().st_size / 1e6)
        voxels, affine = tried(path)
        problem = str(voxels) if isinstance(voxels, Unusable) else ""
        voxels = np.empty(0, np.uint8) if problem else np.ascontiguousarray(voxels)
        told = {"shape": voxels.shape, "dtype": voxels.dtype.str, "affine": affine, "problem": problem}
        out.write(json.dumps(told, default=np.ndarray.tolist).encode() + b"\n")
        out.write(voxels.reshape(-1).view(np.uint8).data)
        out.flush()


if __name__ == "__main__":
    serve()
