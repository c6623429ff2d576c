"""Cut a folder of volumes into the folder of slices that dataset.py reads, so that the command can be repeated.

What is in the folder and what of it is taken; whose it is, by people.py; then, volume by volume, reading (readers.py),
preparing (prepare.py) and cutting (cutting.py). OUT/volumes.csv says what became of each, OUT/slices.html shows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch

from config import SliceConfig
from cutting import cut, plan_cut, size_of_slices, why_not_mri
from people import IMAGE_NUMBER, Table, known_person, plain_person
from pictures import png_bytes
from readers import NO_IMAGE, NOT_READ, Found, Unusable, Volume, kind_of, read_series, read_volume, reason, scan_dicom
from slicepage import write_page
from utils import UserError, csv_text, is_folder_name, progress_bar, read_table
from weights import write_atomic

# What FreeSurfer leaves in a subject's mri/ folder of one scan: the first of these that is there is taken.
FREESURFER = ("T1", "orig", "nu", "norm", "brain", "brainmask", "rawavg", "001")
ENDING = re.compile(r"(\.(nii|gz|bz2|mgz|mgh|nrrd|nhdr|mha|mhd|hdr|img|dcm|ima))+$", re.IGNORECASE)
SEQUENCE = re.compile(
    r"(?<![A-Za-z0-9])(T1w|T2w|PDw|FLAIR|T1|T2|PD|MRA|DWI|SWI|ADC|T2star)(?![A-Za-z0-9])", re.IGNORECASE
)


def digest(text: str, size: int, key: bytes = b"") -> str:
    """BLAKE2 hash as 2 * size hex digits. With a key, only who has the key can compute it."""
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=size, key=key).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# What is in a folder of volumes


@dataclass(frozen=True)
class Source:
    """One volume to read: a file, or all files of one DICOM series."""

    name: str  # path of the file, or folder:number of the series, beginning with the name of the folder of volumes
    files: tuple[Path, ...]
    dicom: bool = False
    patient_id: str = ""  # as DICOM has it

    @property
    def below(self) -> str:
        """Its path relative to the folder of volumes, without ending; of a DICOM series, that of its folder."""
        path = self.name.rpartition(":")[0] if self.dicom else ENDING.sub("", self.name)
        return path.partition("/")[2] or path

    @property
    def stamp(self) -> str:
        """Hex digits that change when a file changes (name, size or modification time). OSError if one is gone."""
        stats = [f.stat() for f in self.files]
        facts = [(f.name, s.st_size, s.st_mtime_ns) for f, s in zip(self.files, stats)]
        return digest(repr(facts), 8)

    def read(self) -> Volume:
        """Its voxels; what is not finite becomes 0. Unusable, or an OSError, says why not."""
        volume = read_series(self.files) if self.dicom else read_volume(self.files[0])
        if not (np.isfinite(volume.voxels.min()) and np.isfinite(volume.voxels.max())):  # a NaN makes both of them NaN
            np.nan_to_num(volume.voxels, copy=False, nan=0, posinf=0, neginf=0)
        return volume


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
    note: str = ""  # what else is to be known
    content: str = ""  # hash of its voxels: the same volume under two names is used once
    brain_ml: str = ""  # with --strip or --register
    similarity: str = ""  # with the template, after --register
    window: str = ""  # what became black and white

    @classmethod
    def from_table(cls, r: dict[str, str]) -> Row:
        """From a row of the CSV file, in which cells may be missing."""
        slices = r.get("slices") or "0"
        row = cls(r["source"], slices=int(slices) if slices.isdecimal() else 0)  # whatever else is there was edited
        for f in fields(cls):
            if f.name not in ("source", "slices"):
                setattr(row, f.name, r.get(f.name) or "")
        return row


@dataclass
class Inventory:
    """What is in a folder of volumes."""

    sources: list[Source] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)  # of what looks like a volume but cannot be read
    ignored: Counter[str] = field(default_factory=Counter)  # {kind: how many} of no interest
    not_chosen: int = 0  # volumes that --match and --skip leave out
    studies: set[str] = field(default_factory=set)  # folders (as in Source.name) that are data sets of their own


def is_chosen(below: str, cfg: SliceConfig) -> bool:
    """Do --match and --skip let this path through? A pattern may fit the whole path or one part of it."""
    names = [below, *below.split("/")]

    def fits(patterns: Sequence[str]) -> bool:
        return any(fnmatch(name, p) for p in patterns for name in names)

    return (not cfg.match or fits(cfg.match)) and not fits(cfg.skip)


def take_inventory(root: Path, cfg: SliceConfig) -> Inventory:
    """Look at every file below a folder: links are followed, and what cannot be opened gets a row."""
    found, above = Inventory(), root.resolve().parent
    dicom: list[Path] = []

    def named(path: Path) -> str:
        """Path from the folder of volumes on; bytes that are not UTF-8 are escaped, so that the table can hold it."""
        return path.relative_to(above).as_posix().encode("utf-8", "backslashreplace").decode()

    def refused(e: OSError) -> None:
        found.rows.append(Row(named(Path(e.filename)), left_out=f"cannot be opened: {e.strerror}"))

    # Every file, by its content. A link may lead back up: no real folder is visited twice.
    visited = set()
    for folder, folders, names in os.walk(root.resolve(), onerror=refused, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))  # .git/annex would double every volume
        if {"dataset_description.json", "participants.tsv"} & {*names}:
            found.studies.add(named(Path(folder)))
        for name in sorted(names):
            path = Path(folder, name)
            below = named(path).partition("/")[2]
            if name.startswith("."):
                found.ignored["hidden"] += 1
                continue
            try:
                kind = kind_of(path)
            except OSError as e:
                found.rows.append(Row(named(path), left_out=f"cannot be opened: {e.strerror}"))
                continue
            if kind == "" and not path.exists():
                found.rows.append(Row(named(path), left_out="a link that leads nowhere"))
            elif kind == "pair":
                continue  # its header is the volume
            elif kind == "":
                found.ignored[path.suffix.lower() or "without ending"] += 1
            elif not is_chosen(below, cfg):
                found.not_chosen += 1
            elif kind == "dicom":
                dicom.append(path)
            elif kind in ("nifti", "analyze", "mgh", "nrrd", "meta"):
                found.sources.append(Source(named(path), (path,)))
            else:
                found.rows.append(Row(named(path), left_out=NOT_READ[kind]))
    one_of_freesurfer(found, cfg)
    gather_series(found, dicom, named)
    found.sources.sort(key=lambda s: s.name)
    return found


def one_of_freesurfer(found: Inventory, cfg: SliceConfig) -> None:
    """Of the steps of FreeSurfer on one scan, SUBJECT/mri/*.mgz, keep one, unless --match chooses."""
    folders: dict[str, dict[str, Source]] = defaultdict(dict)
    for source in found.sources:
        parts = source.below.split("/")
        if len(parts) > 1 and "mri" in parts[-3:-1] and source.name.lower().endswith((".mgz", ".mgh")):
            folders[source.name.rpartition("/mri/")[0]][parts[-1]] = source
    for steps in folders.values():
        best = next((steps[name] for name in FREESURFER if name in steps), None)
        if best is None or cfg.match:
            continue
        for source in steps.values():
            if source is not best:
                found.sources.remove(source)
                taken = best.name.rpartition("/")[2]
                why = f"a step of FreeSurfer's; of this scan {taken} is taken, unless --match chooses"
                found.rows.append(Row(source.name, left_out=why))


def header_of(path: Path) -> Found:
    """What a DICOM file says it is part of; an error of the disk is its `problem`."""
    try:
        return scan_dicom(path) or Found(path, problem="it changed while it was read")
    except OSError as e:
        return Found(path, problem=f"cannot be opened: {e.strerror}")


def gather_series(found: Inventory, files: Sequence[Path], named: Callable[[Path], str]) -> None:
    """Make a source of each DICOM series, whose files may lie in several folders. Each file is listed once."""
    series: dict[tuple[str, str], list[Found]] = defaultdict(list)
    seen: set[tuple[tuple[str, str], str]] = set()
    damaged: dict[tuple[str, str], list[Path]] = defaultdict(list)
    with ThreadPoolExecutor() as pool, progress_bar(len(files), what="reading DICOM headers", unit=" files") as bar:
        for path, header in zip(files, pool.map(header_of, files)):
            bar.update()
            if header.problem.startswith(NO_IMAGE):
                found.ignored[NO_IMAGE] += 1
                continue
            if header.problem:
                damaged[named(path.parent), header.problem].append(path)
                continue
            of = header.series or named(path.parent), header.patient
            if header.instance and (of, header.instance) in seen:
                found.ignored["DICOM, doubled"] += 1
            else:
                seen.add((of, header.instance))
                series[of].append(header)
    for (folder, problem), paths in damaged.items():
        names = f"{paths[0].name} and {len(paths) - 1:,} more" if len(paths) > 1 else paths[0].name
        found.rows.append(Row(f"{folder}/{paths[0].name}", left_out=f"{names}: {problem}"))
    alike = Counter((named(headers[0].path.parent), headers[0].number) for headers in series.values())
    for uid, headers in series.items():
        folder, number = named(headers[0].path.parent), headers[0].number
        name = f"{folder}:{number}" + f"-{digest(repr(uid), 2)}" * (alike[folder, number] > 1)
        found.sources.append(Source(name, tuple(h.path for h in headers), True, headers[0].patient))


# ---------------------------------------------------------------------------------------------------------------------
# Whose it is


class Subjects:
    """Finds out which patient and which class a volume belongs to: by a table if there is one, else by its path.

    UserError if the table cannot be read, or if --groups names a group that is not in it.
    """

    def __init__(self, cfg: SliceConfig, key: bytes):
        """key: secret for hashing patient IDs."""
        self.cfg, self.key = cfg, key
        self.table = Table(Path(cfg.table), cfg.group_column, cfg.attributes) if cfg.table else None
        groups = self.table.groups if self.table else set()
        if unknown := set(cfg.groups) - groups:
            raise UserError(
                f"--groups: no row of {cfg.table or 'a --table'} has the group {sorted(unknown)[0]}; there are "
                f"{', '.join(sorted(groups)) or 'none'}"
            )
        self.studies: set[str] = set()
        self.several: set[str] = set()  # people of the same name in several studies

    def learn(self, names: Iterable[str], studies: set[str]) -> None:
        """Find people who have the same name in several studies, among the sources of these names."""
        self.studies = studies
        seen: dict[str, set[str]] = defaultdict(set)
        for name in names:
            if person := known_person(name):
                seen[person].add(self.study(name))
        self.several = {person for person, of in seen.items() if len(of) > 1 and person.startswith("sub-")}

    def study(self, name: str) -> str:
        """The data set that a source is in: the nearest folder that says so, or has a name of OpenNeuro's."""
        folders = name.split("/")[:-1]
        for n in range(len(folders), 0, -1):
            if re.fullmatch(r"ds\d{6}", folders[n - 1]) or "/".join(folders[:n]) in self.studies:
                if "derivatives" not in folders[:n]:
                    return folders[n - 1]
        return ""

    def identify(self, source: Source) -> tuple[str, str, str, Mapping[str, str]]:
        """(scan, patient, class, attributes) of a source. Unusable if the table leaves it out."""
        # Scan: LONI's image number if the path has one, else the path with odd characters replaced
        image = IMAGE_NUMBER.findall(source.below)
        scan = f"I{image[-1]}" if image else re.sub(r"[^A-Za-z0-9_.+-]+", "-", source.below).strip("-.") or "volume"
        if len(scan) > 120:  # file names can have 255 bytes
            scan = f"{scan[:100]}-{digest(scan, 6)}"

        # Patient: by the names of the usual data sets, else DICOM's patient ID, else by the names of files and folders
        patient = known_person(source.name)
        if patient in self.several:
            patient = f"{self.study(source.name)}-{patient}".strip("-")
        if not patient and source.patient_id:  # it may be a hospital number, which must not be in the data set: hash it
            patient = "p" + digest(source.patient_id, 5, self.key)
        patient = patient or re.sub(r"[^A-Za-z0-9_.+-]+", "-", plain_person(source.below)).strip("-.") or scan
        if not self.table:
            return scan, patient, self.cfg.class_name, {}

        # With a table: its row decides.
        try:
            entry = self.table.look_up(source.below)
        except LookupError as e:
            raise Unusable(str(e.args[0])) from None
        if entry.subject and known_person(entry.subject) not in self.several:
            patient = entry.subject
        label = entry.group if self.table.has_groups else self.cfg.class_name
        if not label:
            raise Unusable(f"row {entry.line:,} of the table, its own, has no group")
        if self.cfg.groups and label not in self.cfg.groups:
            raise Unusable(f"of the group {label}, which --groups leaves out")
        return scan, patient, label, entry.attributes


# ---------------------------------------------------------------------------------------------------------------------
# Cutting a folder of volumes


class Slicer:
    """Cuts sources, several at a time in threads, and keeps the records in OUT.

    OUT/subjects.csv always names the patient of every slice in OUT, even after a kill: a row is written before the
    slices are. OUT/volumes.csv lists what was done, so that a repeated command does only the rest, and
    OUT/attributes.csv what is known of each slice. Both are written every few seconds: after a kill, the volumes of the
    last seconds are cut again, into the same slices.
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
        # {source: its row of volumes.csv}, {file: what attributes.csv says of it}
        path = self.out / "volumes.csv"
        self.rows = {r["source"]: Row.from_table(r) for r in (read_table(path, "source") if path.exists() else [])}
        path = self.out / "attributes.csv"
        self.attributes = {r.pop("file"): r for r in (read_table(path, "file") if path.exists() else [])}

        self.scans: dict[str, str] = {}  # {source: scan}, for what this command cuts
        self.source_of = {r.scan: r.source for r in self.rows.values() if r.slices}  # {scan: source}
        self.same_as = {r.content: r.source for r in self.rows.values() if r.slices and r.content}  # {content: source}

    def check_settings(self, root: Path) -> tuple[bytes, bool]:
        """Compare the settings with those that OUT was made with: (new content of OUT/slices.json, `moved`).

        moved: OUT holds volumes of a folder with the name of `root`, but from another place. UserError if a setting
        differs, the file is damaged, or OUT holds files that are not from this command.
        """
        # Only the settings that change slices. Another command may add other people, another class or another split.
        names = ("plane", "range", "spacing", "frame", "pixel_size", "window", "strip", "bias", "register")
        settings = {k: getattr(self.cfg, k) for k in names}
        settings = json.loads(json.dumps(settings))  # with lists for tuples, as they will be read again
        roots: dict[str, str] = {}  # {name of a folder of volumes: hash of its path}
        place = digest(str(root.resolve()), 8)
        made_with, contents = self.out / "slices.json", [p for p in self.out.iterdir() if p.name[0] != "."]
        if made_with.exists():
            try:
                before = json.loads(made_with.read_bytes())
                if "plane" in before and "frame" not in before:
                    raise UserError(
                        f"{self.out} was made by an older version, whose slices have another scale: name another folder"
                    )
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

    def plan(self, found: Inventory) -> list[Source]:
        """The sources that must be cut, each with a scan name; writes OUT/slices.json.

        That is, new or changed volumes, volumes whose class or split changed, and those with missing slices. Volumes
        that are no longer in the folder keep their slices and rows. UserError if one of them seems to be another volume
        of the same name, from a folder elsewhere: its slices would replace the old ones.
        """
        self.subjects.learn([*self.rows, *(s.name for s in found.sources)], found.studies)
        left = [source for source in found.sources if not self.is_done(source)]
        if self.moved and (same := [s.name for s in left if s.name in self.rows]):
            raise UserError(
                f"{self.out} already holds {same[0]}, cut from another folder named {self.root} (or from this one, "
                "before it was moved and changed): rename the folder of volumes"
            )
        write_atomic(self.out / "slices.json", self.settings)
        cut_anew = {source.name for source in left}
        self.same_as = {content: name for content, name in self.same_as.items() if name not in cut_anew}
        for source in left:
            try:
                scan = self.subjects.identify(source)[0]
            except Unusable:
                continue
            # Several series of a folder get their number added. Two files can come to the same name, too. LONI's image
            # numbers are unique: there it is the same scan twice.
            for more in (source.name.rpartition(":")[2] * source.dicom, digest(source.name, 3)):
                if self.source_of.get(scan, source.name) != source.name and not re.fullmatch(r"I\d+", scan) and more:
                    scan = f"{scan}-{more}"
            self.scans[source.name] = scan
            self.source_of.setdefault(scan, source.name)
        # What the table says now of slices that are there already
        for source in found.sources:
            row = self.rows.get(source.name)
            if row and row.slices and source.name not in cut_anew and self.cfg.attributes:
                for path in self.on_disk.get(row.scan, []):
                    self.attributes.setdefault(path.name, {}).update(self.subjects.identify(source)[3])
        return left

    def is_done(self, source: Source) -> bool:
        """Was the source cut before, and nothing has changed since: its file, class, split, patient and slices?"""
        row = self.rows.get(source.name)
        if row is None:
            return False
        try:
            if row.stamp != source.stamp:
                return False
            _, patient, label, _ = self.subjects.identify(source)
        except OSError:
            return False
        except Unusable as e:  # the table leaves it out: done if it did so before, for the same reason
            return row.left_out == str(e)
        if (row.split, row.label) != (self.cfg.split, label):
            return False
        if (self.cfg.table or known_person(source.name) in self.subjects.several) and row.patient != patient:
            return False
        in_place = [p for p in self.on_disk.get(row.scan, []) if p.parent.parts[-2:] == (row.split, row.label)]
        return bool(row.left_out) or len(in_place) == row.slices

    def leave_out(self, rows: Sequence[Row]) -> None:
        """Record what this command does not read. What an earlier one cut of it goes."""
        for row in rows:
            before = self.rows.get(row.source)
            if before and before.slices:
                self.remove_slices(before.scan)
            self.rows[row.source] = row

    def cut_source(self, source: Source) -> None:
        """Read a source, write its slices, and record it. Runs in several threads at a time.

        Anything wrong with the volume ends in its row. OSError is raised only if OUT cannot be written.
        """
        row = Row(source.name, split=self.cfg.split)
        try:
            row.stamp = source.stamp
            _, row.patient, row.label, attributes = self.subjects.identify(source)
            row.scan = self.scans[source.name]
            if not is_folder_name(row.label):
                raise Unusable(f"its class {row.label!r} cannot be the name of a folder")
            self.cut_volume(source, row, attributes)
        except Exception as e:  # a damaged volume can fail in any way, and must not stop the others
            if isinstance(e, OSError) and self.is_about_out(e):
                raise
            row.left_out = str(e) if isinstance(e, Unusable) else reason(e)
            row.slices = 0
            # Without a stamp, the next command tries again: what the machine lacked may be there by then.
            if isinstance(e, (OSError, MemoryError, torch.OutOfMemoryError)):
                row.stamp = ""

        with self.lock:
            # The same volume under a smaller name may have come while this one was worked on.
            if row.slices and (other := self.same_as[row.content]) != row.source:
                self.remove_slices(row.scan)
                row.slices, row.left_out = 0, f"the same volume as {other}"
            # remove the slices of a scan that it no longer is
            before = self.rows.get(source.name)
            if before and before.slices and (before.scan != row.scan or not row.slices):
                self.remove_slices(before.scan)
            self.rows[source.name] = row
            # The whole table is written each time. After every volume, that would take time quadratic in their number.
            if time.time() - self.saved_at > 5:
                self.save()

    def cut_volume(self, source: Source, row: Row, attributes: Mapping[str, str]) -> None:
        """Write the slices of a source's volume, and fill in the rest of its row."""
        cfg, volume = self.cfg, source.read()
        row.note = volume.note
        if why := why_not_mri(volume):
            raise Unusable(why)
        row.content = content_hash(volume)
        self.claim(row)
        if cfg.strip or cfg.bias or cfg.register != "off":
            from device import pick_device
            from prepare import prepare

            done = prepare(
                volume, cfg.strip, cfg.bias, cfg.register, Path(cfg.cache), row.content, pick_device(cfg.device)
            )
            volume = done.volume
            row.brain_ml, row.similarity = (
                shown(done.facts.get(k), form) for k, form in (("brain_ml", ".0f"), ("similarity", ".3f"))
            )

        # Cut, then write: first the patient, then remove old slices, then write the new ones.
        what = plan_cut(volume, cfg)
        row.window = f"{what.head.black:.4g} to {what.head.white:.4g}"
        row.note = "; ".join(filter(None, (row.note, what.missing)))
        files, known = {}, {}
        for number, level, image in cut(volume, cfg, what):
            name = f"{row.scan}_{number:03d}.png"
            files[name], known[name] = png_bytes(image), {"level": f"{level:g}", **attributes}
        if not files:
            raise Unusable("no slices: all positions of --range are black or outside of the volume")
        self.register_patient(row)
        paths = [self.out / row.split / row.label / name for name in files]
        self.remove_slices(row.scan, keep=paths)
        with self.lock:
            self.attributes |= known
            self.on_disk[row.scan] = paths
        for path in paths:
            write_atomic(path, files[path.name])
        row.slices = len(files)

    def claim(self, row: Row) -> None:
        """Unusable if this content belongs to a source with a smaller name; else takes it from one with a larger."""
        with self.lock:
            other = self.same_as.setdefault(row.content, row.source)
            if other < row.source:
                raise Unusable(f"the same volume as {other}")
            self.same_as[row.content] = row.source
            if other > row.source and other in self.rows:
                self.remove_slices(self.rows[other].scan)
                self.rows[other] = replace(self.rows[other], slices=0, left_out=f"the same volume as {row.source}")

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
            person = known_person(row.source)
            if self.cfg.table or known is None or (known == person and person in self.subjects.several):
                self.patients[row.scan] = row.patient
            row.patient = self.patients[row.scan]
            if row.patient == known:
                return
            write_csv(self.out / "subjects.csv", ["scan", "patient"], sorted(self.patients.items()))

    def remove_slices(self, scan: str, keep: Sequence[Path] = ()) -> None:
        """Delete the slices that a scan has in OUT, except `keep`, and what is known of them."""
        kept = {path.name for path in keep}
        for path in set(self.on_disk.get(scan, [])) - set(keep):
            path.unlink(missing_ok=True)
            if path.name not in kept:
                self.attributes.pop(path.name, None)

    def save(self) -> None:
        """Write OUT/volumes.csv and OUT/attributes.csv."""
        rows = [list(asdict(self.rows[name]).values()) for name in sorted(self.rows)]
        write_csv(self.out / "volumes.csv", [f.name for f in fields(Row)], rows)
        head = ["level", *sorted({k for known in self.attributes.values() for k in known} - {"level"})]
        lines = [[name, *(self.attributes[name].get(k, "") for k in head)] for name in sorted(self.attributes)]
        write_csv(self.out / "attributes.csv", ["file", *head], lines)
        self.saved_at = time.time()


def shown(value: object, form: str) -> str:
    """A number as it goes into a table; "" if there is none."""
    return format(value, form) if isinstance(value, (int, float)) else ""


def content_hash(volume: Volume) -> str:
    """16 hex digits of the voxels, in whatever order of axes they are stored: dcm2niix turns what it converts."""
    from nibabel.orientations import apply_orientation, io_orientation

    upright = np.ascontiguousarray(apply_orientation(volume.voxels, io_orientation(volume.affine)))
    sizes = np.sort(volume.sizes).round(2).tolist()
    return hashlib.blake2b(upright.data.cast("B"), digest_size=8, key=repr((upright.shape, sizes)).encode()).hexdigest()


def write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Write a table atomically, in UTF-8."""
    write_atomic(path, csv_text(head, rows).encode("utf-8", "backslashreplace"))


def slice_volumes(cfg: SliceConfig) -> None:
    """`python dataset.py slice VOLUMES OUT`: write slices, tables about them and slices.html, and print a summary.

    UserError if the settings make no sense, there are no volumes, not one slice could be cut, or another process is
    writing to OUT.
    """
    from filelock import FileLock, Timeout

    # check the settings
    if cfg.prepare == "all":
        cfg = replace(cfg, strip=True, bias=True, register="affine")
    root, out = Path(cfg.volumes).expanduser(), Path(cfg.out)
    if not root.is_dir():
        raise UserError(f"there is no folder of volumes {root}: name one that exists")
    if not cfg.window[0] < cfg.window[1]:
        raise UserError("--window needs two percentiles, the smaller one first, e.g. 0.5 99.5")
    if cfg.range and not cfg.range[0] <= cfg.range[1]:
        raise UserError("--range needs two positions in mm, the smaller one first, e.g. 44 75")
    if not 32 <= (count := size_of_slices(cfg)[2]) <= 4096:
        raise UserError(f"slices of {count} pixels along each side: take another --frame or --pixel-size")
    if not is_folder_name(cfg.class_name):
        raise UserError(f"--class-name {cfg.class_name!r} cannot be the name of a folder: choose another")
    for flag in ("groups", "group_column", "attributes"):
        if getattr(cfg, flag) and not cfg.table:
            raise UserError(f"--{flag.replace('_', '-')} needs a table: name one with --table FILE.csv")
    if out.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{out} lies inside of the folder of volumes: name a folder elsewhere")

    out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # the readers warn about every odd header; what matters is in volumes.csv
    try:
        with FileLock(out / ".lock", timeout=0):
            slicer = Slicer(cfg, root)
            found = take_inventory(root, cfg)
            if not found.sources and not found.rows:
                raise UserError(
                    f"{root} holds no volumes{' that --match and --skip let through' * bool(found.not_chosen)}"
                )
            left = slicer.plan(found)
            slicer.leave_out(found.rows)
            cut_all(slicer, left, len(found.sources))
            ignored = [f"{n:,} {kind}" for kind, n in found.ignored.most_common()]
            ignored = [f"files that are no volumes: {', '.join(ignored)}"] if ignored else []
            ignored += [f"{found.not_chosen:,} volumes that --match and --skip leave out"] * bool(found.not_chosen)
            rows = [slicer.rows[name] for name in sorted(slicer.rows)]
            write_page(out, rows, slicer.on_disk, ignored)
            print_summary(slicer, rows, ignored)
            if not any(slicer.rows[s.name].slices for s in found.sources if s.name in slicer.rows):
                raise UserError(f"no slice could be cut from {root}: see the reasons above")
            print(f"look at {out / 'slices.html'}; it shows people. next: python dataset.py check {out}, then")
            print(f"python pre_train.py adni --data {out}")
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


def print_summary(slicer: Slicer, rows: Sequence[Row], ignored: Sequence[str]) -> None:
    """Print the counts per class, why volumes were left out, and whether there are scans of unknown patients."""
    cfg, out = slicer.cfg, slicer.out
    good, bad = [r for r in rows if not r.left_out], [r for r in rows if r.left_out]

    # what was cut
    people = len({r.patient for r in good})
    print(f"{out}: {sum(r.slices for r in good):,} {cfg.plane} slices of {len(good):,} scans of {people:,} people")
    for label in sorted({r.label for r in good}):
        in_class = [r for r in good if r.label == label]
        patients = {r.patient for r in in_class}
        print(f"  {label:8} {sum(r.slices for r in in_class):8,} slices {len(patients):6,} people")

    # what was left out, or is to be known: the 20 most frequent reasons, with an example each
    print(f"left out: {len(bad):,} of {len(rows):,} volumes" + f" (all of them in {out / 'volumes.csv'})" * bool(bad))
    for what, column in ((bad, "left_out"), (good, "note")):
        for why, n in Counter(getattr(r, column) for r in what).most_common(20):
            example = next(r.source for r in what if getattr(r, column) == why)
            if why:
                print(f"  {example}{f' and {n - 1:,} more' * (n > 1)}: {why}")
    for sentence in ignored:
        print(f"not looked at: {sentence}")
    kinds = Counter(m[-1] for r in good if (m := SEQUENCE.findall(r.source)))
    if len(kinds) > 1:
        seen = ", ".join(f"{kind} ({n:,})" for kind, n in kinds.most_common())
        print(
            f'several kinds of images are in one data set: {seen}; to take one: --match "*{kinds.most_common()[0][0]}*"'
        )

    # scans whose patient is a guess
    hashed = re.compile(r"p[0-9a-f]{10}")
    guessed = [r for r in good if not (cfg.table or known_person(r.source) or hashed.fullmatch(r.patient))]
    if guessed:
        print(f"{len(guessed):,} scans follow no known convention of names: the patient is taken from file and folder,")
        print(f"e.g. {guessed[0].patient} for {guessed[0].source}. If one person has two names there, correct")
        print(f"{out / 'subjects.csv'}, or splits will mix people.")
