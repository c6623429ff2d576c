"""Read volumes: files of any of the formats that heads come in, to voxels and where they are in the world."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_BYTES = 2**30  # largest volume, unpacked: protects against headers and archives that claim absurd sizes


class Unusable(Exception):
    """Raised for a volume that cannot be used; the message says why and goes into volumes.csv."""


@dataclass(frozen=True)
class Volume:
    """voxels: float32 [I, J, K]. affine: [4, 4], from voxel indices to RAS+ millimetres."""

    voxels: np.ndarray
    affine: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Side lengths of a voxel in mm: [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_nifti(path: Path) -> Volume:
    """Read a .nii or .nii.gz file. Unusable, or an error of the libraries, says what is wrong with it."""
    import nibabel
    from nibabel.arrayproxy import ArrayProxy

    # read the whole file: only at its end does gzip compare the checksum
    with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as f:
        data = f.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Unusable(f"larger than {MAX_BYTES >> 20} MB")

    # parse the header; NIfTI-2 is recognised by its header size of 540 bytes, in either byte order
    kind = (
        nibabel.Nifti2Image if 540 in (int.from_bytes(data[:4], e) for e in ("little", "big")) else nibabel.Nifti1Image
    )
    image = kind.from_bytes(data)
    proxy = image.dataobj
    assert isinstance(proxy, ArrayProxy)  # it describes where the voxels are in the bytes

    # check the header: three dimensions, an orientation, grey voxels, as many bytes as it claims
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise Unusable(f"{len(shape)}-D ({'x'.join(map(str, shape))}): keep one volume of three dimensions")
    if not (image.header["sform_code"] or image.header["qform_code"]):
        raise Unusable("its header has no orientation: set its sform, or convert the DICOM files again")
    if np.prod(shape, dtype=object) * 4 > MAX_BYTES:  # as Python integers, which do not overflow
        raise Unusable(f"larger than {MAX_BYTES >> 20} MB")
    dtype, offset, count = image.get_data_dtype(), proxy.offset, int(np.prod(shape))
    if dtype.kind not in "iuf":
        raise Unusable(f"{dtype} voxels, not grey")
    if offset + count * dtype.itemsize > len(data):
        raise Unusable("truncated: it is shorter than its header says")

    # Take the voxels from the bytes directly. np.asarray(proxy) would make one more copy of them, and several volumes
    # are in memory at the same time. Slope and intercept are on the proxy; the header's are reset when it is read.
    voxels = np.frombuffer(data, dtype, count, offset).reshape(shape, order="F").astype(np.float32)
    if (proxy.slope, proxy.inter) != (1.0, 0.0):
        voxels *= proxy.slope
        voxels += proxy.inter
    return Volume(voxels, image.affine)


def read_dicom(files: Sequence[Path]) -> Iterator[tuple[str, str, Volume | Unusable]]:
    """Read the DICOM files of a folder: (series number, patient ID, volume or why it cannot be used) for each series.

    A file that cannot be read is reported on its own, as ("", "", Unusable).
    """
    import pydicom

    # group the files into series
    series: dict[str, list] = {}
    for path in files:
        try:
            dicom = pydicom.dcmread(path, defer_size="1 KB")  # the pixels are read later, when they are used
            series.setdefault(str(dicom.get("SeriesInstanceUID", "")), []).append(dicom)
        except Exception as e:  # a damaged file can make pydicom fail in any way
            yield "", "", Unusable(f"{path.name} cannot be read as DICOM ({reason(e)})")
    # build the volumes
    for slices in series.values():
        number, patient = str(slices[0].get("SeriesNumber", "")), str(slices[0].get("PatientID", ""))
        try:
            yield number, patient, stack(slices)
        except Exception as e:
            yield number, patient, e if isinstance(e, Unusable) else Unusable(reason(e))


def stack(slices: list) -> Volume:
    """Stack the slices of one DICOM series (pydicom datasets, in any order). Their pixels are freed on the way."""
    # check that the files are parallel grey slices of one size
    if any(int(s.get("NumberOfFrames", 1)) > 1 for s in slices):
        raise Unusable("many frames in one DICOM file: convert it to NIfTI first (dcm2niix)")
    if any(
        "PixelData" not in s or "ImagePositionPatient" not in s or "ImageOrientationPatient" not in s for s in slices
    ):
        raise Unusable("a file has no pixels, or no position in space")
    along = np.array([[float(v) for v in s.ImageOrientationPatient] for s in slices])
    if np.abs(along - along[0]).max() > 1e-3 or len({(s.Rows, s.Columns) for s in slices}) > 1:
        raise Unusable("slices of several orientations or sizes: a localizer?")
    if len(slices) < 2:
        raise Unusable("a single slice")
    if slices[0].PhotometricInterpretation != "MONOCHROME2":
        raise Unusable(f"{slices[0].PhotometricInterpretation} pixels, not grey")

    # sort them by their position along the normal, and check that they are evenly spaced
    columns, rows = along[0, :3], along[0, 3:]  # directions in which the column index and the row index grow
    place = np.array([[float(v) for v in s.ImagePositionPatient] for s in slices])
    depth = place @ np.cross(columns, rows)
    order = np.argsort(depth)
    gaps = np.diff(depth[order])
    if gaps.min() < max(1e-3, 0.1 * np.median(gaps)):
        raise Unusable("several images at one position: 4-D, or two scans in one series")
    if gaps.max() > 1.5 * np.median(gaps):
        raise Unusable(f"slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart: one is missing")
    if len(slices) * int(slices[0].Rows) * int(slices[0].Columns) * 4 > MAX_BYTES:
        raise Unusable(f"larger than {MAX_BYTES >> 20} MB")

    # read the pixels; each slice can have its own slope and intercept
    voxels = np.empty((slices[0].Rows, slices[0].Columns, len(slices)), np.float32)
    for k, i in enumerate(order):
        s = slices[i]
        slope, intercept = float(s.get("RescaleSlope") or 1), float(s.get("RescaleIntercept") or 0)
        voxels[:, :, k] = s.pixel_array * slope + intercept
        del s.PixelData

    # the affine; DICOM's world is LPS+, ours RAS+, so x and y change sign
    height, width = (float(v) for v in slices[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * height, columns * width
    affine[:3, 2] = (place[order[-1]] - place[order[0]]) / (len(slices) - 1)
    affine[:3, 3] = place[order[0]]
    return Volume(voxels, np.diag([-1.0, -1, 1, 1]) @ affine)


def reason(e: Exception) -> str:
    """An exception as one short line."""
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]
