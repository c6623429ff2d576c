"""Slices of volumes: NIfTI files and DICOM series, in any orientation, into the layout that dataset.py reads."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from config import SliceConfig
from pictures import import_cv2, png_bytes
from utils import UserError, csv_text, is_folder_name, progress_bar, read_table
from weights import write_atomic

MAX_BYTES = 2**30  # of a volume, unpacked: a header or an archive that claims more is not believed
OTHER_FORMATS = (".mgz", ".mgh", ".img", ".mnc", ".nrrd", ".nhdr", ".mha", ".mhd", ".par")

# World axes are RAS+ millimetres: x to the right, y to the front, z upwards. A plane's image runs along `right` and
# `down`, each a world axis and its sign: what is the patient's right lies on the left, as radiologists look at it.
PLANES = {
    "axial": {"across": 2, "right": (0, -1), "down": (1, -1), "range": (44.0, 75.0)},
    "coronal": {"across": 1, "right": (0, -1), "down": (2, -1), "range": (-16.0, 15.0)},
    "sagittal": {"across": 0, "right": (1, -1), "down": (2, -1), "range": (-16.0, 15.0)},
}


class Unusable(Exception):
    """Why a volume is left out."""


@dataclass(frozen=True)
class Volume:
    """voxels: float32 [I, J, K]; affine: [4, 4], voxel indices to RAS+ millimetres."""

    voxels: np.ndarray
    affine: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Sides of a voxel in mm, [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_nifti(path: Path) -> Volume:
    """A .nii or .nii.gz file. Unusable says what is wrong with it."""
    import nibabel

    with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as f:
        data = f.read(MAX_BYTES + 1)  # to the end, so that an archive's checksum is looked at
    if len(data) > MAX_BYTES:
        raise Unusable(f"larger than {MAX_BYTES >> 20} MB")
    kind = (
        nibabel.Nifti2Image if 540 in (int.from_bytes(data[:4], e) for e in ("little", "big")) else nibabel.Nifti1Image
    )
    image = kind.from_bytes(data)
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise Unusable(f"{len(shape)}-D ({'x'.join(map(str, shape))}): keep one volume of three dimensions")
    if not (image.header["sform_code"] or image.header["qform_code"]):
        raise Unusable("its header says nothing about orientation: set its sform, or convert the DICOM files again")
    if np.prod(shape, dtype=object) * 4 > MAX_BYTES:
        raise Unusable(f"larger than {MAX_BYTES >> 20} MB")
    dtype, offset, count = image.get_data_dtype(), image.dataobj.offset, int(np.prod(shape))
    if dtype.kind not in "iuf":
        raise Unusable(f"{dtype} voxels, not grey")
    if offset + count * dtype.itemsize > len(data):
        raise Unusable("torn: it is shorter than its header says")
    # Not image.dataobj, which copies the bytes once more on the way: several volumes are in memory at a time.
    voxels = np.frombuffer(data, dtype, count, offset).reshape(shape, order="F").astype(np.float32)
    if (image.dataobj.slope, image.dataobj.inter) != (1.0, 0.0):  # the header's own are reset when it is read
        voxels *= image.dataobj.slope
        voxels += image.dataobj.inter
    return Volume(voxels, image.affine)


def read_dicom(files: Sequence[Path]) -> Iterator[tuple[str, str, Volume | Unusable]]:
    """(number of the series, patient, volume or why not) for every series among the files of a folder."""
    import pydicom

    series: dict[str, list] = {}
    for path in files:
        try:
            slice_ = pydicom.dcmread(path, defer_size="1 KB")  # pixels stay in their files until they are needed
            series.setdefault(str(slice_.get("SeriesInstanceUID", "")), []).append(slice_)
        except Exception as e:  # whatever a damaged file makes of its reader
            yield "", "", Unusable(f"{path.name} is no DICOM file that can be read ({_reason(e)})")
    for slices in series.values():
        number, patient = str(slices[0].get("SeriesNumber", "")), str(slices[0].get("PatientID", ""))
        try:
            yield number, patient, stack(slices)
        except Exception as e:
            yield number, patient, e if isinstance(e, Unusable) else Unusable(_reason(e))


def stack(slices: list) -> Volume:
    """One series of DICOM slices -> a volume."""
    if any(int(s.get("NumberOfFrames", 1)) > 1 for s in slices):
        raise Unusable("many frames in one DICOM file: convert it to NIfTI first (dcm2niix)")
    if any(
        "PixelData" not in s or "ImagePositionPatient" not in s or "ImageOrientationPatient" not in s for s in slices
    ):
        raise Unusable("a file without pixels or without its position in space")
    along = np.array([[float(v) for v in s.ImageOrientationPatient] for s in slices])
    if np.abs(along - along[0]).max() > 1e-3 or len({(s.Rows, s.Columns) for s in slices}) > 1:
        raise Unusable("slices of several orientations or sizes: a localizer?")
    if len(slices) < 2:
        raise Unusable("a single slice")
    if slices[0].PhotometricInterpretation != "MONOCHROME2":
        raise Unusable(f"{slices[0].PhotometricInterpretation} pixels, not grey")
    columns, rows = along[0, :3], along[0, 3:]  # directions in which the column and the row index grow
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
    voxels = np.empty((slices[0].Rows, slices[0].Columns, len(slices)), np.float32)
    for k, i in enumerate(order):
        s = slices[i]
        slope, intercept = float(s.get("RescaleSlope") or 1), float(s.get("RescaleIntercept") or 0)
        voxels[:, :, k] = s.pixel_array * slope + intercept
        del s.PixelData
    height, width = (float(v) for v in slices[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = rows * height, columns * width
    affine[:3, 2] = (place[order[-1]] - place[order[0]]) / (len(slices) - 1)
    affine[:3, 3] = place[order[0]]
    return Volume(voxels, np.diag([-1.0, -1, 1, 1]) @ affine)  # DICOM's x and y run the other way


def _reason(e: Exception) -> str:
    return " ".join(f"{type(e).__name__}: {e}".split())[:200]


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


@dataclass(frozen=True)
class Head:
    """Where the head lies, in world mm: its top, its middle [x, y], and the intensities that become black and white."""

    top: float
    middle: np.ndarray
    black: float
    white: float


def find_head(volume: Volume, window: tuple[float, float]) -> Head:
    """The head is what is brighter than Otsu's threshold; from where a plane of it exceeds 2 cm² it counts.

    The window is taken from what is brighter than zero within 50 mm of a point 75 mm below the top: brain, with or
    without a skull around it.
    """
    cv2 = import_cv2()

    voxels = volume.voxels
    stride = [max(1, int(2 / s)) for s in volume.sizes]
    coarse = voxels[:: stride[0], :: stride[1], :: stride[2]]
    peak = np.percentile(coarse, 99.8)
    if not np.isfinite(peak) or peak <= 0:
        raise Unusable("empty: no intensity above zero")
    grey = np.clip(coarse * (255 / peak), 0, 255).astype(np.uint8)
    threshold = cv2.threshold(grey.reshape(-1, 1), 0, 0, cv2.THRESH_OTSU)[0]
    index = np.argwhere(grey > threshold / 2) * stride
    world = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    of_voxel = np.prod(volume.sizes) * np.prod(stride)  # mm³

    def extent(x: np.ndarray, least: float = 200.0) -> tuple[float, float]:
        bins = np.floor(x.round(3) / 2).astype(int)  # rounded, so that a volume and its mirror image agree
        counts = np.bincount(bins - bins.min()) * of_voxel / 2  # mm² of a plane
        filled = np.flatnonzero(counts >= least)
        if not len(filled):
            raise Unusable("no head is seen in it")
        return 2.0 * (filled[0] + bins.min()), 2.0 * (filled[-1] + 1 + bins.min())

    if len(world) * of_voxel < 1e5:
        raise Unusable(f"no head is seen in it: {len(world) * of_voxel / 1000:.0f} cm³ are brighter than the rest")
    top = extent(world[:, 2])[1]
    world = world[world[:, 2] > top - 170]  # neck and shoulders say nothing about the middle
    middle = np.array([np.mean(extent(world[:, axis])) for axis in (0, 1)])
    centre = np.array([*middle, top - 75])
    inside = np.argwhere(coarse > 0) * stride
    near = np.linalg.norm(inside @ volume.affine[:3, :3].T + volume.affine[:3, 3] - centre, axis=1) < 50
    values = coarse[coarse > 0][near]
    if len(values) < 100:
        raise Unusable("no brain is seen within 50 mm of where it should be")
    black, white = np.percentile(values, window)
    if white <= black:
        raise Unusable("all of its brain has one intensity")
    return Head(top, middle, float(black), float(white))


def cut(volume: Volume, cfg: SliceConfig) -> Iterator[tuple[int, np.ndarray]]:
    """(number, grey uint8 [H, W]) of every slice that is not black.

    Linear interpolation; where the volume's own planes are parallel to the cut, the nearest whole plane is taken, for
    half of two neighbours is smoother than either. Pixels larger than voxels are means of finer ones.
    """
    cv2 = import_cv2()
    from scipy.ndimage import map_coordinates

    plane = PLANES[cfg.plane]
    first, last = cfg.range or plane["range"]
    if not (np.isfinite(volume.voxels.min()) and np.isfinite(volume.voxels.max())):  # NaN is the least and the most
        np.nan_to_num(volume.voxels, copy=False, nan=0, posinf=0, neginf=0)
    head = find_head(volume, cfg.window)
    low, high = corners(volume)
    if (high - low).min() < 60:
        raise Unusable("it covers {:.0f} x {:.0f} x {:.0f} mm, less than a head".format(*(high - low)))

    across = plane["across"]
    position = np.arange(first, last + 1e-6, cfg.spacing)
    position = head.top - position if across == 2 else head.middle[across] + position
    finest = float(volume.sizes.min())
    side = cfg.pixel_size or finest
    finer = max(1, round(side / finest))
    step, axes = side / finer, []
    for axis, sign in (plane["down"], plane["right"]):
        n = int((high[axis] - low[axis]) / step + 1e-3) + 1
        axes.append((low if sign > 0 else high)[axis] + sign * step * np.arange(n // finer * finer))
    if min(shape := [len(a) // finer for a in axes]) < 32 or max(shape) > 2 * min(shape):
        raise Unusable(
            f"its slices would have {shape[1]}x{shape[0]} pixels: at least 32, and at most twice as long as wide"
        )
    to_voxel = np.linalg.inv(volume.affine)
    grid = np.empty((3, len(axes[0]), len(axes[1])))
    grid[plane["down"][0]], grid[plane["right"][0]] = axes[0][:, None], axes[1][None]
    own = np.abs(to_voxel[:3, across]).argmax()  # the volume's axis across the planes, and whether it goes straight
    parallel = np.abs(to_voxel[own, across]) > 0.99999 * np.linalg.norm(to_voxel[own, :3])
    for number, mm in enumerate(position):
        if not low[across] - 1e-3 <= mm <= high[across] + 1e-3:
            continue
        grid[across] = mm + 0.01 * parallel  # halfway between two planes is the same side in every orientation
        index = np.einsum("ij,jhw->ihw", to_voxel[:3, :3], grid) + to_voxel[:3, 3, None, None]
        if parallel:
            index[own] = np.round(index[own])
        # Rounded, so that a voxel's centre is that voxel and not all but a trillionth of it.
        image = map_coordinates(volume.voxels, index.round(4), order=1, mode="constant", cval=0.0)
        if finer > 1:
            image = cv2.resize(image, (image.shape[1] // finer, image.shape[0] // finer), interpolation=cv2.INTER_AREA)
        image = np.clip((image - head.black) * (255 / (head.white - head.black)), 0, 255).round().astype(np.uint8)
        if image.any():
            yield number, image


def corners(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest world coordinates of voxel centres, each [3]."""
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in volume.voxels.shape])).reshape(3, -1).T
    world = ends @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return world.min(0), world.max(0)


# ---------------------------------------------------------------------------------------------------------------------
# A folder of them


@dataclass(frozen=True)
class Source:
    """A NIfTI file, or a folder's DICOM files; `name` is its path from the folder of volumes on."""

    name: str
    files: tuple[Path, ...]
    dicom: bool

    @property
    def below(self) -> str:
        """Its path below the folder of volumes."""
        return self.name.partition("/")[2] or self.name

    @property
    def stamp(self) -> str:
        """Changes when a file does. OSError where one cannot be looked at."""
        stats = [f.stat() for f in self.files]
        facts = [(f.name, s.st_size, s.st_mtime_ns) for f, s in zip(self.files, stats)]
        return digest(repr(facts), 8)


@dataclass
class Row:
    """What became of a volume: a row of OUT/volumes.csv."""

    source: str
    stamp: str = ""
    scan: str = ""
    patient: str = ""
    split: str = ""
    label: str = ""
    slices: int = 0
    left_out: str = ""


def digest(text: str, size: int, key: bytes = b"") -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=size, key=key).hexdigest()


def find_sources(root: Path) -> tuple[list[Source], list[Row]]:
    """Everything below a folder that may be a volume, and rows of what looks like one and cannot be read."""
    sources, rows, above = [], [], root.resolve().parent

    def named(path: Path) -> str:  # as a table in UTF-8 can hold it
        return path.relative_to(above).as_posix().encode("utf-8", "backslashreplace").decode()

    for folder, folders, names in os.walk(root.resolve()):
        folders[:] = sorted(f for f in folders if not f.startswith("."))  # .git/annex would double every volume
        dicom = []
        for name in sorted(n for n in names if not n.startswith(".") and n != "DICOMDIR"):
            path, lower = Path(folder, name), name.lower()
            if lower.endswith((".nii", ".nii.gz", ".dcm", ".ima")) and not path.is_file():
                rows.append(Row(named(path), left_out="no file: a link to nowhere?"))
            elif lower.endswith((".nii", ".nii.gz")):
                sources.append(Source(named(path), (path,), False))
            elif lower.endswith((".dcm", ".ima")) or is_dicom(path):
                dicom.append(path)
            elif lower.endswith(OTHER_FORMATS):
                rows.append(Row(named(path), left_out="a format that is not read: convert it to NIfTI"))
        if dicom:
            sources.append(Source(named(Path(folder)), tuple(dicom), True))
    return sources, rows


def is_dicom(path: Path) -> bool:
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with open(path, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


class Subjects:
    """Who a volume is of, and which class: by a table as LONI exports it, else by names."""

    def __init__(self, cfg: SliceConfig, key: bytes):
        self.cfg, self.key = cfg, key
        rows = read_table(Path(cfg.table), "Subject", "Group", "Image Data ID") if cfg.table else []
        self.by_image = {r["Image Data ID"].strip().lstrip("I"): (r["Subject"], r["Group"]) for r in rows}
        self.groups: dict[str, set[str]] = {}
        for r in rows:
            self.groups.setdefault(r["Subject"], set()).add(r["Group"])
        if unknown := set(cfg.groups) - {r["Group"] for r in rows}:
            raise UserError(f"--groups: no row of {cfg.table or 'a --table'} has the Group {sorted(unknown)[0]}")
        names = "|".join(re.escape(s) for s in sorted(self.groups, key=len, reverse=True))
        self.subject = re.compile(rf"(?<![A-Za-z0-9])({names})(?![A-Za-z0-9])") if names else None

    def of(self, source: Source, patient_id: str = "") -> tuple[str, str, str]:
        """(scan, patient, class); Unusable where the table leaves it out."""
        image = re.findall(r"(?<![A-Za-z0-9])I(\d{3,})(?![A-Za-z0-9])", source.below)
        stem = re.sub(r"\.nii(\.gz)?$", "", source.below, flags=re.IGNORECASE)
        scan = f"I{image[-1]}" if image else re.sub(r"[^A-Za-z0-9_.+-]+", "-", stem).strip("-.") or "volume"
        if len(scan) > 120:
            scan = f"{scan[:100]}-{digest(scan, 6)}"
        patient = re.search(r"\d{3}_S_\d{4,}|sub-[A-Za-z0-9]+", source.below)
        if patient:
            patient = patient[0]
        elif patient_id:  # may be a hospital's number: it does not belong into a data set
            patient = "p" + digest(patient_id, 5, self.key)
        else:
            patient = scan
        if not self.cfg.table:
            return scan, patient, self.cfg.class_name
        if image:
            if image[-1] not in self.by_image:
                raise Unusable(f"the table has no row for the Image Data ID I{image[-1]}")
            patient, label = self.by_image[image[-1]]
        else:
            found = {part for part in stem.split("/") if part in self.groups}
            found = found or set(self.subject.findall(stem) if self.subject else [])
            if not found:
                raise Unusable("the table has no row for it: neither its Image Data ID nor its Subject is in its path")
            if len(found) > 1:
                raise Unusable(f"its path names several Subjects of the table: {', '.join(sorted(found))[:100]}")
            (patient,) = found
            if len(self.groups[patient]) > 1:
                raise Unusable(f"{patient} has several groups in the table, and no Image Data ID is in its path")
            (label,) = self.groups[patient]
        if self.cfg.groups and label not in self.cfg.groups:
            raise Unusable(f"of the group {label}, which --groups leaves out")
        return scan, patient, label


class Slicer:
    """Cuts sources, several at a time, and keeps OUT's records whole at any moment."""

    def __init__(self, cfg: SliceConfig, root: Path):
        self.cfg, self.out = cfg, Path(cfg.out)
        self.lock, self.saved_at = threading.Lock(), time.time()
        # Of a slice, not of a command: another command may add other people, another class or another side.
        settings = {k: getattr(cfg, k) for k in ("plane", "range", "spacing", "pixel_size", "window")}
        settings = json.loads(json.dumps(settings))
        roots, self.root, place = {}, root.resolve().name, digest(str(root.resolve()), 8)
        made_with, contents = self.out / "slices.json", [p for p in self.out.iterdir() if p.name[0] != "."]
        if made_with.exists():
            try:
                before = json.loads(made_with.read_bytes())
                other, roots = [k for k in settings if before[k] != settings[k]], dict(before["roots"])
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{made_with} is damaged: delete {self.out}, or name another folder") from None
            if other:
                flag = other[0].replace("_", "-")
                raise UserError(f"{self.out} was made with another --{flag}: name another folder, or delete that one")
        elif contents:
            raise UserError(f"{self.out} holds other files, such as {contents[0].name}: name a new folder")
        self.moved = roots.get(self.root, place) != place  # or another folder of the same name
        settings["roots"] = roots | {self.root: place}
        self.settings = json.dumps(settings, indent=1).encode()
        if not (self.out / ".key").exists():  # without it, anybody could try all numbers that a hospital may have
            write_atomic(self.out / ".key", os.urandom(16))
        self.subjects = Subjects(cfg, (self.out / ".key").read_bytes())

        subjects = self.out / "subjects.csv"
        rows = read_table(subjects, "scan", "patient") if subjects.exists() else []
        self.patients = {r["scan"]: r["patient"] for r in rows}  # also what was put there by hand
        self.there: dict[str, list[Path]] = {}  # slices by scan, wherever they lie
        for path in self.out.glob("*/*/*.png"):
            self.there.setdefault(path.stem.rpartition("_")[0], []).append(path)
        self.rows: dict[str, list[Row]] = {}  # by source
        path = self.out / "volumes.csv"
        for r in read_table(path, "source") if path.exists() else []:
            row = Row(**{f.name: r.get(f.name) or "" for f in fields(Row)})
            row.slices = int(row.slices or 0)
            self.rows.setdefault(row.source, []).append(row)
        self.scans: dict[str, str] = {}  # of each source that is cut
        self.taken = {r.scan: r.source for rows in self.rows.values() for r in rows if r.slices}

    def plan(self, sources: Sequence[Source]) -> list[Source]:
        """What is not done: new or changed volumes, another class by now, slices missing. Each gets its name.

        Volumes that are no longer there keep their slices, and their rows with them.
        """
        left = [source for source in sources if not self.settled(source)]
        if self.moved and (same := [s.name for s in left if s.name in self.rows]):
            raise UserError(
                f"{self.out} has {same[0]} from another folder named {self.root}, or one changed and moved: rename it"
            )
        write_atomic(self.out / "slices.json", self.settings)
        for source in left:
            try:
                scan, _, _ = self.subjects.of(source)
            except Unusable:
                continue
            if self.taken.get(scan, source.name) != source.name and not re.fullmatch(r"I\d+", scan):
                scan = f"{scan}-{digest(source.name, 3)}"  # two files of one name
            self.scans[source.name] = scan
            self.taken.setdefault(scan, source.name)
        return left

    def settled(self, source: Source) -> bool:
        """Is there nothing to do, because neither the files nor what is said of them changed?"""
        rows = self.rows.get(source.name, [])
        try:
            if not rows or rows[0].stamp != source.stamp:
                return False
            _, patient, label = self.subjects.of(source)
        except OSError:
            return False
        except Unusable as e:
            return all(r.left_out == str(e) for r in rows)
        for r in rows:
            if (r.split, r.label) != (self.cfg.split, label) or (self.cfg.table and r.patient != patient):
                return False
            if r.left_out.startswith(("OSError", "PermissionError", "TimeoutError", "MemoryError")):
                return False  # the machine's fault, perhaps, and not the volume's
            where = [p for p in self.there.get(r.scan, []) if p.parent.parts[-2:] == (r.split, r.label)]
            if not r.left_out and len(where) != r.slices:
                return False
        return True

    def do(self, source: Source) -> None:
        """Cut one source and put it on record."""
        rows: list[Row] = []
        try:
            stamp = source.stamp
            self.subjects.of(source)  # before anything is read
            for series, patient_id, volume in read(source):
                rows.append(
                    self.cut(source, Row(source.name, stamp), [r.scan for r in rows], series, patient_id, volume)
                )
        except (OSError, Unusable) as e:
            if isinstance(e, OSError) and e.filename and str(self.out) in str(e.filename):
                raise  # a full disk is not the volume's fault
            stamp = stamp if isinstance(e, Unusable) else ""
            rows.append(Row(source.name, stamp, left_out=str(e) if isinstance(e, Unusable) else _reason(e)))
        for old in self.rows.get(source.name, []):
            if old.slices and old.scan not in {r.scan for r in rows if r.slices}:
                self.forget(old.scan)
        with self.lock:
            self.rows[source.name] = rows
            if time.time() - self.saved_at > 5:  # all of it is written: for every volume it would grow with the square
                self.save()

    def cut(
        self, source: Source, row: Row, before: list[str], series: str, patient_id: str, volume: Volume | Unusable
    ) -> Row:
        """Cut one volume of a source; the row says how it went. `before`: scans of this source so far."""
        try:
            _, row.patient, row.label = self.subjects.of(source, patient_id)
            row.split = self.cfg.split
            row.scan = self.scans[source.name]
            if row.scan in before:
                row.scan += f"-{re.sub(r'[^A-Za-z0-9]+', '', series)[:20] or len(before)}"
            if row.scan in before:
                row.scan += f"-{len(before)}"
            if not is_folder_name(row.label):
                raise Unusable(f"its class {row.label!r} cannot be the name of a folder")
            if isinstance(volume, Unusable):
                raise volume
            files = {f"{row.scan}_{k:03d}.png": png_bytes(image) for k, image in cut(volume, self.cfg)}
            if not files:
                raise Unusable("all black, or outside of the volume, where --range cuts")
            self.claim(row)
            self.forget(row.scan, [self.out / row.split / row.label / name for name in files])
            for name, data in files.items():
                write_atomic(self.out / row.split / row.label / name, data)
            row.slices = len(files)
        except Exception as e:  # whatever a damaged volume brings about, the others go on
            if isinstance(e, OSError) and e.filename and str(self.out) in str(e.filename):
                raise
            row.left_out = str(e) if isinstance(e, Unusable) else _reason(e)
        return row

    def claim(self, row: Row) -> None:
        """Whose slices these are goes to disk before they do: no split may ever see one without its patient."""
        with self.lock:
            if (other := self.taken.setdefault(row.scan, row.source)) != row.source:
                raise Unusable(f"{other} is the same scan {row.scan}")
            known = self.patients.get(row.scan)
            if self.cfg.table or known is None:  # else what was put there by hand stays
                self.patients[row.scan] = row.patient
            row.patient = self.patients[row.scan]
            if row.patient == known:
                return
            write_csv(self.out / "subjects.csv", ["scan", "patient"], sorted(self.patients.items()))

    def forget(self, scan: str, keep: Sequence[Path] = ()) -> None:
        """Remove the slices that a scan had: it may have fewer now, or another class."""
        for path in set(self.there.get(scan, [])) - set(keep):
            path.unlink(missing_ok=True)

    def save(self) -> None:
        rows = [list(asdict(r).values()) for name in sorted(self.rows) for r in self.rows[name]]
        write_csv(self.out / "volumes.csv", [f.name for f in fields(Row)], rows)
        self.saved_at = time.time()


def read(source: Source) -> Iterator[tuple[str, str, Volume | Unusable]]:
    """The volumes of a source as `read_dicom` gives them."""
    if source.dicom:
        yield from read_dicom(source.files)
        return
    try:
        yield "", "", read_nifti(source.files[0])
    except Exception as e:  # nibabel, gzip and zlib have many ways to refuse a damaged file
        yield "", "", e if isinstance(e, Unusable) else Unusable(_reason(e))


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence]) -> None:
    write_atomic(path, csv_text(head, rows).encode("utf-8", "backslashreplace"))


def slice_volumes(cfg: SliceConfig) -> None:
    """`python dataset.py slice VOLUMES OUT`: slices, subjects.csv, volumes.csv, and a summary on the screen."""
    from filelock import FileLock, Timeout

    root, out = Path(cfg.volumes).expanduser(), Path(cfg.out)
    if not root.is_dir():
        raise UserError(f"there is no folder of volumes {root}")
    if not cfg.window[0] < cfg.window[1]:
        raise UserError("--window needs two percentiles, the smaller one first, e.g. 0.5 99.5")
    if cfg.range and not cfg.range[0] <= cfg.range[1]:
        raise UserError("--range needs two positions in mm, the smaller one first, e.g. 44 75")
    if not is_folder_name(cfg.class_name):
        raise UserError(f"--class-name {cfg.class_name!r} cannot be the name of a folder")
    if cfg.groups and not cfg.table:
        raise UserError("--groups are of a table: give one with --table FILE.csv")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out} lies inside of the folder of volumes: name a folder elsewhere")
    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # of the readers, about each odd header: what matters is in the table
    try:
        with FileLock(out / ".lock", timeout=0):
            _slice_all(cfg, root, out)
    except Timeout:
        raise UserError(f"another command is writing to {out}: wait for it, or name another folder") from None


def _slice_all(cfg: SliceConfig, root: Path, out: Path) -> None:
    sources, foreign = find_sources(root)
    if not sources and not foreign:
        raise UserError(f"{root} holds no volumes: no .nii, no .nii.gz, no DICOM files at any depth")
    slicer = Slicer(cfg, root)
    left = slicer.plan(sources)
    slicer.rows |= {r.source: [r] for r in foreign}
    bar = progress_bar(len(sources), len(sources) - len(left), unit=" volumes")
    workers = cfg.workers or min(8, os.cpu_count() or 1)
    with bar, ThreadPoolExecutor(workers) as pool:
        waiting = set()
        try:
            for source in [*left, None]:
                while waiting and (source is None or len(waiting) >= workers):
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for job in done:
                        job.result()
                        bar.update()
                if source:
                    waiting.add(pool.submit(slicer.do, source))
        finally:
            pool.shutdown(cancel_futures=True)
            slicer.save()
    rows = [r for name in sorted(slicer.rows) for r in slicer.rows[name]]
    good, bad = [r for r in rows if not r.left_out], [r for r in rows if r.left_out]
    people = len({r.patient for r in good})
    print(f"{out}: {sum(r.slices for r in good):,} {cfg.plane} slices of {len(good):,} scans of {people:,} people")
    for label in sorted({r.label for r in good}):
        mine = [r for r in good if r.label == label]
        print(f"  {label:8} {sum(r.slices for r in mine):8,} slices {len({r.patient for r in mine}):6,} people")
    print(f"left out: {len(bad):,} of {len(rows):,} volumes" + f" (all of them in {out / 'volumes.csv'})" * bool(bad))
    for reason, n in Counter(r.left_out for r in bad).most_common(20):
        example = next(r.source for r in bad if r.left_out == reason)
        print(f"  {example}{f' and {n - 1:,} more' * (n > 1)}: {reason}")
    if unnamed := sum(r.patient == r.scan for r in good if not cfg.table):
        print(f"{unnamed:,} scans do not say whose they are, and each counts as a person of its own: where one person")
        print(f"has several, give them one patient in {out / 'subjects.csv'}, or no split is by person")
    if not any(r.slices for name in {s.name for s in sources} for r in slicer.rows.get(name, [])):
        raise UserError(f"no slice came out of {root}: see the reasons above")
    print(f"next: python dataset.py check {out}, then python pre_train.py adni --data {out}")
