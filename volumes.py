"""Cut volumes (NIfTI files and DICOM series, in any orientation) into the folder of slices that dataset.py reads.

Three parts: reading a volume, cutting it into slices, and working through a folder of volumes so that the same command
can be repeated after an interruption or when volumes were added.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from config import SliceConfig
from pictures import import_cv2, png_bytes
from readers import Unusable, Volume, read_dicom, read_nifti, reason
from utils import UserError, csv_text, is_folder_name, progress_bar, read_table
from weights import write_atomic

OTHER_FORMATS = (".mgz", ".mgh", ".img", ".mnc", ".nrrd", ".nhdr", ".mha", ".mhd", ".par")  # listed as not supported


@dataclass(frozen=True)
class Plane:
    """How slices of one plane lie in the world: RAS+ millimetres, x to the right, y to the front, z upwards.

    `right` and `down` are the directions in which the columns and the rows of the image run: (world axis, sign).
    """

    across: int  # the world axis that the slices are perpendicular to
    right: tuple[int, int]
    down: tuple[int, int]
    range: tuple[float, float]  # default positions of the first and the last slice in mm, as in SliceConfig.range


# Radiological convention: the patient's right is on the left side of the image (sagittal: the front). Front or top is
# upwards.
PLANES = {
    "axial": Plane(across=2, right=(0, -1), down=(1, -1), range=(44.0, 75.0)),
    "coronal": Plane(across=1, right=(0, -1), down=(2, -1), range=(-16.0, 15.0)),
    "sagittal": Plane(across=0, right=(1, -1), down=(2, -1), range=(-16.0, 15.0)),
}


# ---------------------------------------------------------------------------------------------------------------------
# Cutting


@dataclass(frozen=True)
class Head:
    """Where the head is, in world mm, and which intensities become black and white."""

    top: float  # z
    middle: np.ndarray  # [x, y]
    black: float
    white: float


def find_head(volume: Volume, window: tuple[float, float]) -> Head:
    """Find the head in a volume, with or without a skull. Unusable if there is none.

    The head is what is brighter than half of Otsu's threshold; it begins and ends at the first and last plane (2 mm
    thick) with at least 2 cm² of it. Black and white are percentiles (`window`) of the brain's intensities: of what is
    above zero within 50 mm of a point 75 mm below the top, which is brain whether or not there is a skull around it.
    """
    cv2 = import_cv2()

    # threshold a coarse copy, about 2 mm, which is accurate enough
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
    voxel_volume = np.prod(volume.sizes) * np.prod(stride)  # of the coarse copy, mm³
    if len(world) * voxel_volume < 1e5:
        raise Unusable(f"no head found: only {len(world) * voxel_volume / 1000:.0f} cm³ are brighter than the rest")

    def extent(x: np.ndarray, least: float = 200.0) -> tuple[float, float]:
        """First and last coordinate (mm) along one axis where a plane holds at least `least` mm² of head."""
        # Rounded before binning, so that a volume and its mirror image fall into the same 2 mm bins.
        bins = np.floor(x.round(3) / 2).astype(int)
        areas = np.bincount(bins - bins.min()) * voxel_volume / 2  # mm²
        filled = np.flatnonzero(areas >= least)
        if not len(filled):
            raise Unusable("no head found: no plane has 2 cm² of it")
        return 2.0 * (filled[0] + bins.min()), 2.0 * (filled[-1] + 1 + bins.min())

    # top and middle; neck and shoulders, more than 170 mm below the top, would shift the middle
    top = extent(world[:, 2])[1]
    world = world[world[:, 2] > top - 170]
    middle = np.array([np.mean(extent(world[:, axis])) for axis in (0, 1)])

    # black and white, by the intensities around the brain's centre
    centre = np.array([*middle, top - 75])
    inside = np.argwhere(coarse > 0) * stride
    near = np.linalg.norm(inside @ volume.affine[:3, :3].T + volume.affine[:3, 3] - centre, axis=1) < 50
    values = coarse[coarse > 0][near]
    if len(values) < 100:
        raise Unusable("no brain found within 50 mm of where it should be")
    black, white = np.percentile(values, window)
    if white <= black:
        raise Unusable("all of its brain has one intensity")
    return Head(top, middle, float(black), float(white))


def cut(volume: Volume, cfg: SliceConfig) -> Iterator[tuple[int, np.ndarray]]:
    """(number, grey uint8 [H, W]) of each slice that is not all black. NaN and infinite voxels are set to 0 in place.

    Voxels are interpolated linearly. But if the volume's own planes are parallel to the cut, a slice is the nearest of
    them: the mean of two neighbouring planes would be smoother than either. If pixels are larger than voxels, slices
    are cut with finer pixels and averaged.
    """
    cv2 = import_cv2()
    from scipy.ndimage import map_coordinates

    # find the head
    plane = PLANES[cfg.plane]
    first, last = cfg.range or plane.range
    if not (np.isfinite(volume.voxels.min()) and np.isfinite(volume.voxels.max())):  # a NaN makes both of them NaN
        np.nan_to_num(volume.voxels, copy=False, nan=0, posinf=0, neginf=0)
    head = find_head(volume, cfg.window)
    low, high = corners(volume)
    if (high - low).min() < 60:
        raise Unusable("it covers {:.0f} x {:.0f} x {:.0f} mm, less than a head".format(*(high - low)))

    # positions of the slices: below the top for axial ones, relative to the middle for the others
    across = plane.across
    position = np.arange(first, last + 1e-6, cfg.spacing)
    position = head.top - position if across == 2 else head.middle[across] + position

    # world coordinates of the rows and columns, from one end of the volume to the other
    finest = float(volume.sizes.min())
    side = cfg.pixel_size or finest
    finer = max(1, round(side / finest))  # pixels per final pixel, along each side
    step, axes = side / finer, []
    for axis, sign in (plane.down, plane.right):
        n = int((high[axis] - low[axis]) / step + 1e-3) + 1
        axes.append((low if sign > 0 else high)[axis] + sign * step * np.arange(n // finer * finer))
    if min(shape := [len(a) // finer for a in axes]) < 32 or max(shape) > 2 * min(shape):
        raise Unusable(
            f"its slices would have {shape[1]}x{shape[0]} pixels: at least 32, and at most twice as long as wide"
        )
    grid = np.empty((3, len(axes[0]), len(axes[1])))
    grid[plane.down[0]], grid[plane.right[0]] = axes[0][:, None], axes[1][None]

    # the volume's axis that runs across the slices, and whether its planes are parallel to them
    to_voxel = np.linalg.inv(volume.affine)
    own = np.abs(to_voxel[:3, across]).argmax()
    parallel = np.abs(to_voxel[own, across]) > 0.99999 * np.linalg.norm(to_voxel[own, :3])

    # cut
    for number, mm in enumerate(position):
        if not low[across] - 1e-3 <= mm <= high[across] + 1e-3:
            continue
        # A position halfway between two planes must round to the same plane however the volume is stored: hence 0.01.
        grid[across] = mm + 0.01 * parallel
        index = np.einsum("ij,jhw->ihw", to_voxel[:3, :3], grid) + to_voxel[:3, 3, None, None]
        if parallel:
            index[own] = np.round(index[own])
        # Rounded, so that the centre of a voxel gives exactly that voxel in spite of floating-point errors.
        image = map_coordinates(volume.voxels, index.round(4), order=1, mode="constant", cval=0.0)
        if finer > 1:
            image = cv2.resize(image, (image.shape[1] // finer, image.shape[0] // finer), interpolation=cv2.INTER_AREA)
        image = np.clip((image - head.black) * (255 / (head.white - head.black)), 0, 255).round().astype(np.uint8)
        if image.any():
            yield number, image


def corners(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest world coordinates of the voxel centres in mm, each [3]."""
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in volume.voxels.shape])).reshape(3, -1).T
    world = ends @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    return world.min(0), world.max(0)


# ---------------------------------------------------------------------------------------------------------------------
# What is in a folder of volumes


@dataclass(frozen=True)
class Source:
    """One thing to read: a NIfTI file, or all DICOM files of a folder (which may hold several series)."""

    name: str  # path of the file or folder, beginning with the name of the folder of volumes
    files: tuple[Path, ...]
    dicom: bool

    @property
    def below(self) -> str:
        """Its path relative to the folder of volumes."""
        return self.name.partition("/")[2] or self.name

    @property
    def stamp(self) -> str:
        """Hex digits that change when a file changes (name, size or modification time). OSError if one is gone."""
        stats = [f.stat() for f in self.files]
        facts = [(f.name, s.st_size, s.st_mtime_ns) for f, s in zip(self.files, stats)]
        return digest(repr(facts), 8)


@dataclass
class Row:
    """A row of OUT/volumes.csv: one volume, and how it went."""

    source: str  # Source.name
    stamp: str = ""  # Source.stamp when it was read
    scan: str = ""  # slices are named <scan>_<number>.png
    patient: str = ""
    split: str = ""
    label: str = ""  # the class
    slices: int = 0  # how many were written
    left_out: str = ""  # why there are none; "" if it was cut

    @classmethod
    def from_table(cls, r: dict[str, str]) -> Row:
        """From a row of the CSV file, in which cells may be missing."""
        row = cls(r["source"])
        for name in ("stamp", "scan", "patient", "split", "label", "left_out"):
            setattr(row, name, r.get(name) or "")
        row.slices = int(r.get("slices") or 0)
        return row


def digest(text: str, size: int, key: bytes = b"") -> str:
    """BLAKE2 hash as 2 * size hex digits. With a key, only who has the key can compute it."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=size, key=key).hexdigest()


def find_sources(root: Path) -> tuple[list[Source], list[Row]]:
    """Everything below a folder that may be a volume, and rows for files that look like volumes but cannot be read."""
    sources, rows, above = [], [], root.resolve().parent

    def named(path: Path) -> str:
        """Path from the folder of volumes on; bytes that are not UTF-8 are escaped, so that the table can hold it."""
        return path.relative_to(above).as_posix().encode("utf-8", "backslashreplace").decode()

    for folder, folders, names in os.walk(root.resolve()):
        folders[:] = sorted(f for f in folders if not f.startswith("."))  # .git/annex would double every volume
        dicom = []
        for name in sorted(n for n in names if not n.startswith(".") and n != "DICOMDIR"):
            path, lower = Path(folder, name), name.lower()
            if lower.endswith((".nii", ".nii.gz", ".dcm", ".ima")) and not path.is_file():
                rows.append(Row(named(path), left_out="not a file, or a broken link"))
            elif lower.endswith((".nii", ".nii.gz")):
                sources.append(Source(named(path), (path,), False))
            elif lower.endswith((".dcm", ".ima")) or is_dicom(path):
                dicom.append(path)
            elif lower.endswith(OTHER_FORMATS):
                rows.append(Row(named(path), left_out="this format is not supported: convert it to NIfTI"))
        if dicom:
            sources.append(Source(named(Path(folder)), tuple(dicom), True))
    return sources, rows


def is_dicom(path: Path) -> bool:
    """Does the file have DICOM's magic bytes? False also for what is no file or cannot be read."""
    try:
        if not path.is_file():  # opening a pipe would block
            return False
        with open(path, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read(source: Source) -> Iterator[tuple[str, str, Volume | Unusable]]:
    """(series number, patient ID, volume or why it cannot be used) for each volume of a source; "" if not known."""
    if source.dicom:
        yield from read_dicom(source.files)
        return
    try:
        yield "", "", read_nifti(source.files[0])
    except Exception as e:  # nibabel, gzip and zlib can fail on a damaged file in many ways
        yield "", "", e if isinstance(e, Unusable) else Unusable(reason(e))


class Subjects:
    """Finds out which patient and which class a volume belongs to: by LONI's table if there is one, else by its path.

    UserError if the table cannot be read, or if --groups names a group that is not in it.
    """

    def __init__(self, cfg: SliceConfig, key: bytes):
        """key: secret for hashing patient IDs."""
        self.cfg, self.key = cfg, key
        # read the table: {image number without its I: (subject, group)}, {subject: groups}
        rows = read_table(Path(cfg.table), "Subject", "Group", "Image Data ID") if cfg.table else []
        self.by_image = {r["Image Data ID"].strip().lstrip("I"): (r["Subject"], r["Group"]) for r in rows}
        self.groups: dict[str, set[str]] = {}
        for r in rows:
            self.groups.setdefault(r["Subject"], set()).add(r["Group"])
        if unknown := set(cfg.groups) - {r["Group"] for r in rows}:
            raise UserError(f"--groups: no row of {cfg.table or 'a --table'} has the Group {sorted(unknown)[0]}")
        # a pattern for all subjects as whole words; the longest first, because one may begin with another
        names = "|".join(re.escape(s) for s in sorted(self.groups, key=len, reverse=True))
        self.subject = re.compile(rf"(?<![A-Za-z0-9])({names})(?![A-Za-z0-9])") if names else None

    def identify(self, source: Source, patient_id: str = "") -> tuple[str, str, str]:
        """(scan, patient, class) of a source; patient_id as DICOM has it. Unusable if the table leaves it out."""
        # scan: ADNI's image number if the path has one, else the path with odd characters replaced
        image = re.findall(r"(?<![A-Za-z0-9])I(\d{3,})(?![A-Za-z0-9])", source.below)
        stem = re.sub(r"\.nii(\.gz)?$", "", source.below, flags=re.IGNORECASE)
        scan = f"I{image[-1]}" if image else re.sub(r"[^A-Za-z0-9_.+-]+", "-", stem).strip("-.") or "volume"
        if len(scan) > 120:  # file names can have 255 bytes
            scan = f"{scan[:100]}-{digest(scan, 6)}"

        # patient: an ADNI or BIDS subject in the path, else DICOM's patient ID, else every scan is its own patient
        in_path = re.search(r"\d{3}_S_\d{4,}|sub-[A-Za-z0-9]+", source.below)
        if in_path:
            patient = in_path[0]
        elif patient_id:  # it may be a hospital number, which must not be in the data set: hash it
            patient = "p" + digest(patient_id, 5, self.key)
        else:
            patient = scan
        if not self.cfg.table:
            return scan, patient, self.cfg.class_name

        # with a table: look up the image number, or else the one subject that the path names
        if image:
            if image[-1] not in self.by_image:
                raise Unusable(f"the table has no row for the Image Data ID I{image[-1]}")
            patient, label = self.by_image[image[-1]]
        else:
            # A whole folder or file name that is a subject decides; else subjects inside of names are looked for.
            found = {part for part in stem.split("/") if part in self.groups}
            found = found or set(self.subject.findall(stem) if self.subject else [])
            if not found:
                raise Unusable("the table has no row for it: neither its Image Data ID nor its Subject is in its path")
            if len(found) > 1:
                raise Unusable(f"its path names several Subjects of the table: {', '.join(sorted(found))[:100]}")
            (patient,) = found
            if len(self.groups[patient]) > 1:  # the diagnosis changed between visits
                raise Unusable(f"{patient} has several groups in the table, and no Image Data ID is in its path")
            (label,) = self.groups[patient]
        if self.cfg.groups and label not in self.cfg.groups:
            raise Unusable(f"of the group {label}, which --groups leaves out")
        return scan, patient, label


# ---------------------------------------------------------------------------------------------------------------------
# Cutting a folder of volumes


class Slicer:
    """Cuts sources, several at a time in threads, and keeps the records in OUT.

    OUT/subjects.csv always names the patient of every slice in OUT, even after a kill: a row is written before the
    slices are. OUT/volumes.csv lists what was done, so that a repeated command does only the rest. It is written every
    few seconds: after a kill, the volumes of the last seconds are cut again, into the same slices.
    """

    def __init__(self, cfg: SliceConfig, root: Path):
        """Reads the records in OUT. UserError if they are damaged, or if OUT was made with other settings."""
        self.cfg, self.out = cfg, Path(cfg.out)
        self.lock, self.saved_at = threading.Lock(), time.time()
        self.root = root.resolve().name
        self.settings, self.moved = self.check_settings(root)

        # A secret key for hashing patient IDs. Without it, anybody could hash all possible hospital numbers.
        if not (self.out / ".key").exists():
            write_atomic(self.out / ".key", os.urandom(16))
        self.subjects = Subjects(cfg, (self.out / ".key").read_bytes())

        # {scan: patient}, with whatever the user changed in the file
        subjects = self.out / "subjects.csv"
        patients = read_table(subjects, "scan", "patient") if subjects.exists() else []
        self.patients = {r["scan"]: r["patient"] for r in patients}
        # {scan: its slices on disk, in whatever split and class}
        self.on_disk: dict[str, list[Path]] = {}
        for path in self.out.glob("*/*/*.png"):
            self.on_disk.setdefault(path.stem.rpartition("_")[0], []).append(path)
        # {source: its rows of volumes.csv}
        self.rows: dict[str, list[Row]] = {}
        path = self.out / "volumes.csv"
        for r in read_table(path, "source") if path.exists() else []:
            row = Row.from_table(r)
            self.rows.setdefault(row.source, []).append(row)

        self.scans: dict[str, str] = {}  # {source: scan}, for what this command cuts
        self.source_of = {r.scan: r.source for rows in self.rows.values() for r in rows if r.slices}  # {scan: source}

    def check_settings(self, root: Path) -> tuple[bytes, bool]:
        """Compare the settings with those that OUT was made with: (new content of OUT/slices.json, `moved`).

        moved: OUT holds volumes of a folder with the name of `root`, but from another place. UserError if a setting
        differs, the file is damaged, or OUT holds files that are not from this command.
        """
        # Only the settings that change slices. Another command may add other people, another class or another split.
        settings = {k: getattr(self.cfg, k) for k in ("plane", "range", "spacing", "pixel_size", "window")}
        settings = json.loads(json.dumps(settings))  # with lists for tuples, as they will be read again
        roots: dict[str, str] = {}  # {name of a folder of volumes: hash of its path}
        place = digest(str(root.resolve()), 8)
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
        settings["roots"] = roots | {self.root: place}
        return json.dumps(settings, indent=1).encode(), roots.get(self.root, place) != place

    def plan(self, sources: Sequence[Source]) -> list[Source]:
        """The sources that must be cut, each with a scan name; writes OUT/slices.json.

        That is, new or changed volumes, volumes whose class or split changed, and those with missing slices. Volumes
        that are no longer in the folder keep their slices and rows. UserError if one of them seems to be another volume
        of the same name, from a folder elsewhere: its slices would replace the old ones.
        """
        left = [source for source in sources if not self.is_done(source)]
        if self.moved and (same := [s.name for s in left if s.name in self.rows]):
            raise UserError(
                f"{self.out} already holds {same[0]}, cut from another folder named {self.root} (or from this one, "
                "before it was moved and changed): rename the folder of volumes"
            )
        write_atomic(self.out / "slices.json", self.settings)
        for source in left:
            try:
                scan, _, _ = self.subjects.identify(source)
            except Unusable:
                continue
            # Two files can come to the same name. ADNI's image numbers are unique: there it is the same scan twice.
            if self.source_of.get(scan, source.name) != source.name and not re.fullmatch(r"I\d+", scan):
                scan = f"{scan}-{digest(source.name, 3)}"
            self.scans[source.name] = scan
            self.source_of.setdefault(scan, source.name)
        return left

    def is_done(self, source: Source) -> bool:
        """Was the source cut before, and nothing has changed since: its files, class, split, patient and slices?"""
        rows = self.rows.get(source.name, [])
        try:
            if not rows or rows[0].stamp != source.stamp:
                return False
            _, patient, label = self.subjects.identify(source)
        except OSError:
            return False
        except Unusable as e:  # the table leaves it out: done if it did so before, for the same reason
            return all(r.left_out == str(e) for r in rows)
        for r in rows:
            if (r.split, r.label) != (self.cfg.split, label) or (self.cfg.table and r.patient != patient):
                return False
            # These may be the fault of the machine and not of the volume: try again.
            if r.left_out.startswith(("OSError", "PermissionError", "TimeoutError", "MemoryError")):
                return False
            in_place = [p for p in self.on_disk.get(r.scan, []) if p.parent.parts[-2:] == (r.split, r.label)]
            if not r.left_out and len(in_place) != r.slices:
                return False
        return True

    def cut_source(self, source: Source) -> None:
        """Read one source, write the slices of all its volumes, and record them. Runs in several threads at a time.

        Anything wrong with the volume ends in its row. OSError is raised only if OUT cannot be written.
        """
        rows: list[Row] = []
        stamp = ""
        try:
            stamp = source.stamp
            self.subjects.identify(source)  # a source that the table leaves out need not be read
            for series, patient_id, volume in read(source):
                scans = [r.scan for r in rows]
                rows.append(self.cut_volume(source, Row(source.name, stamp), scans, series, patient_id, volume))
        except (OSError, Unusable) as e:
            if self.is_about_out(e):
                raise
            # Without a stamp, the next command tries again: an OSError may be gone by then.
            stamp = stamp if isinstance(e, Unusable) else ""
            rows.append(Row(source.name, stamp, left_out=str(e) if isinstance(e, Unusable) else reason(e)))

        # remove the slices of scans that this source no longer has
        for old in self.rows.get(source.name, []):
            if old.slices and old.scan not in {r.scan for r in rows if r.slices}:
                self.remove_slices(old.scan)

        with self.lock:
            self.rows[source.name] = rows
            # The whole table is written each time. After every volume, that would take time quadratic in their number.
            if time.time() - self.saved_at > 5:
                self.save()

    def cut_volume(
        self, source: Source, row: Row, before: list[str], series: str, patient_id: str, volume: Volume | Unusable
    ) -> Row:
        """Write the slices of one volume of a source, and return its row, filled in.

        before: scan names of the volumes of this source so far. OSError is raised only if OUT cannot be written.
        """
        try:
            # fill in the row; further series of a folder get their number added to the scan name
            _, row.patient, row.label = self.subjects.identify(source, patient_id)
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

            # cut, then write: first the patient, then remove old slices, then write the new ones
            files = {f"{row.scan}_{k:03d}.png": png_bytes(image) for k, image in cut(volume, self.cfg)}
            if not files:
                raise Unusable("no slices: all positions of --range are black or outside of the volume")
            self.register_patient(row)
            self.remove_slices(row.scan, keep=[self.out / row.split / row.label / name for name in files])
            for name, data in files.items():
                write_atomic(self.out / row.split / row.label / name, data)
            row.slices = len(files)
        except Exception as e:  # a damaged volume can fail in any way, and must not stop the others
            if self.is_about_out(e):
                raise
            row.left_out = str(e) if isinstance(e, Unusable) else reason(e)
        return row

    def is_about_out(self, e: Exception) -> bool:
        """Is it an OSError about a file in OUT, such as a full disk? Then it is not the volume's fault."""
        return isinstance(e, OSError) and bool(e.filename) and str(self.out) in str(e.filename)

    def register_patient(self, row: Row) -> None:
        """Write the patient of a scan to OUT/subjects.csv, before its slices exist: no split may ever see them without.

        Without a table, a patient that is already in the file stays, for the user may have put it there; the row gets
        that one. Unusable if another source has the same scan.
        """
        with self.lock:
            if (other := self.source_of.setdefault(row.scan, row.source)) != row.source:
                raise Unusable(f"{other} is the same scan {row.scan}")
            known = self.patients.get(row.scan)
            if self.cfg.table or known is None:
                self.patients[row.scan] = row.patient
            row.patient = self.patients[row.scan]
            if row.patient == known:
                return
            write_csv(self.out / "subjects.csv", ["scan", "patient"], sorted(self.patients.items()))

    def remove_slices(self, scan: str, keep: Sequence[Path] = ()) -> None:
        """Delete the slices that a scan had when the command started, except `keep`."""
        for path in set(self.on_disk.get(scan, [])) - set(keep):
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Write OUT/volumes.csv."""
        rows = [list(asdict(r).values()) for name in sorted(self.rows) for r in self.rows[name]]
        write_csv(self.out / "volumes.csv", [f.name for f in fields(Row)], rows)
        self.saved_at = time.time()


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Write a table atomically, in UTF-8."""
    write_atomic(path, csv_text(head, rows).encode("utf-8", "backslashreplace"))


def slice_volumes(cfg: SliceConfig) -> None:
    """`python dataset.py slice VOLUMES OUT`: write slices, subjects.csv and volumes.csv, and print a summary.

    UserError if the settings make no sense, there are no volumes, not one slice could be cut, or another process is
    writing to OUT.
    """
    from filelock import FileLock, Timeout

    # check the settings
    root, out = Path(cfg.volumes).expanduser(), Path(cfg.out)
    if not root.is_dir():
        raise UserError(f"there is no folder of volumes {root}: name one that exists")
    if not cfg.window[0] < cfg.window[1]:
        raise UserError("--window needs two percentiles, the smaller one first, e.g. 0.5 99.5")
    if cfg.range and not cfg.range[0] <= cfg.range[1]:
        raise UserError("--range needs two positions in mm, the smaller one first, e.g. 44 75")
    if not is_folder_name(cfg.class_name):
        raise UserError(f"--class-name {cfg.class_name!r} cannot be the name of a folder: choose another")
    if cfg.groups and not cfg.table:
        raise UserError("--groups needs a table: name one with --table FILE.csv")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out} lies inside of the folder of volumes: name a folder elsewhere")

    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # the readers warn about every odd header; what matters is in volumes.csv
    try:
        with FileLock(out / ".lock", timeout=0):
            sources, unsupported = find_sources(root)
            if not sources and not unsupported:
                raise UserError(f"{root} holds no volumes: no .nii, no .nii.gz, no DICOM files at any depth")
            slicer = Slicer(cfg, root)
            left = slicer.plan(sources)
            slicer.rows |= {r.source: [r] for r in unsupported}
            cut_all(slicer, left, len(sources))
            print_summary(slicer)
            if not any(r.slices for name in {s.name for s in sources} for r in slicer.rows.get(name, [])):
                raise UserError(f"no slice could be cut from {root}: see the reasons above")
            print(f"next: python dataset.py check {out}, then python pre_train.py adni --data {out}")
    except Timeout:
        raise UserError(f"another command is writing to {out}: wait for it, or name another folder") from None


def cut_all(slicer: Slicer, left: Sequence[Source], total: int) -> None:
    """Cut the sources that are left of `total`, in threads, with a progress bar. Whatever happens, save the records."""
    bar = progress_bar(total, total - len(left), unit=" volumes")
    workers = slicer.cfg.workers or min(8, os.cpu_count() or 1)
    with bar, ThreadPoolExecutor(workers) as pool:
        running: set[Future[None]] = set()

        def finish_one() -> None:
            """Wait until at least one source is done; raise its error if it had one."""
            nonlocal running
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for job in done:
                job.result()
                bar.update()

        try:
            # Never more jobs than threads, so that an error or Ctrl-C need not wait for a long queue.
            for source in left:
                while len(running) >= workers:
                    finish_one()
                running.add(pool.submit(slicer.cut_source, source))
            while running:
                finish_one()
        finally:
            pool.shutdown(cancel_futures=True)
            slicer.save()


def print_summary(slicer: Slicer) -> None:
    """Print the counts per class, why volumes were left out, and whether there are scans of unknown patients."""
    cfg, out = slicer.cfg, slicer.out
    rows = [r for name in sorted(slicer.rows) for r in slicer.rows[name]]
    good, bad = [r for r in rows if not r.left_out], [r for r in rows if r.left_out]

    # what was cut
    people = len({r.patient for r in good})
    print(f"{out}: {sum(r.slices for r in good):,} {cfg.plane} slices of {len(good):,} scans of {people:,} people")
    for label in sorted({r.label for r in good}):
        in_class = [r for r in good if r.label == label]
        patients = {r.patient for r in in_class}
        print(f"  {label:8} {sum(r.slices for r in in_class):8,} slices {len(patients):6,} people")

    # what was left out: the 20 most frequent reasons, with an example each
    print(f"left out: {len(bad):,} of {len(rows):,} volumes" + f" (all of them in {out / 'volumes.csv'})" * bool(bad))
    for why, n in Counter(r.left_out for r in bad).most_common(20):
        example = next(r.source for r in bad if r.left_out == why)
        print(f"  {example}{f' and {n - 1:,} more' * (n > 1)}: {why}")

    # scans that count as their own patient, because nothing says whose they are
    if unnamed := sum(r.patient == r.scan for r in good if not cfg.table):
        print(f"{unnamed:,} scans have no patient in their path or header, so each counts as one person. If one person")
        print(f"has several of them, give these the same patient in {out / 'subjects.csv'}, or splits will mix people.")
