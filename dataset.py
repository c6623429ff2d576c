"""The data set: a folder of slices, split by person, decoded once into a cache.

Also a script: `python dataset.py check DIR` reports what is in a data folder and whether it can be trained on;
`python dataset.py slice VOLUMES OUT` cuts volumes into such a folder (volumes.py does the work).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from config import CheckConfig, DataConfig, SliceConfig, check_arguments, parse_dataset

if __name__ == "__main__":
    cfg = parse_dataset()  # before torch is imported, so that --help answers at once

import numpy as np
import torch
from torch import Tensor

from conditions import GROUP, Attribute, encode_rows
from device import gather_batches
from people import known_person
from pictures import MAX_PIXELS, import_cv2
from utils import UserError, evenly_spaced, is_folder_name, progress_bar, read_table, run_script
from weights import write_atomic

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SPLITS = ("train", "val", "test")
RANGPUR = "/home/groups/comp3710/ADNI/AD_NC"  # the course's copy of ADNI, --data rangpur
CACHE_VERSION = 3  # of the cached pixels: raise it when decoding changes, and old caches are made again
CHUNK = 1024  # slices decoded and written at a time; each chunk has its own checksum


@dataclass(frozen=True, slots=True)
class Slice:
    """One image file: ROOT/<split>/<label>/<name>."""

    path: str  # relative to the root, with forward slashes
    split: str  # the folder it lies in: train, val or test
    label: str  # the class folder's name
    person: str
    stamp: tuple[int, int]  # size in bytes, modification time in ns: if either changes, the slice is decoded again


class ADNIDataset(torch.utils.data.Dataset):
    """The decoded slices of one split, in memory or memory-mapped.

    Item i is (float32 [1, S, S] in [-1, 1], class index). `batch` returns many at once, on a device.
    Attributes: `images` uint8 [N, S, S]; `labels` int64 [N], indices into `classes`; `people` and `files`, one string
    per slice; `known`, {name: value in words} for each slice, from attributes.csv.
    """

    def __init__(
        self, slices: Sequence[Slice], images: Tensor, rows: Sequence[int], classes: Sequence[str],
        root: Path | None = None,
    ):  # fmt: skip
        """images: uint8 of all splits; rows: which of them are these slices; root: the data folder."""
        self.slices, self.root = slices, root
        self.classes = list(classes)
        self.people = [s.person for s in slices]
        self.files = [s.path for s in slices]
        self.labels = torch.tensor([self.classes.index(s.label) for s in slices], dtype=torch.int64)
        # Consecutive rows stay a view of the memory-mapped file; others must be copied into memory.
        contiguous = list(rows) == list(range(rows[0], rows[0] + len(rows))) if rows else False
        self.images = images[rows[0] : rows[0] + len(rows)] if contiguous else images[list(rows)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.batch(torch.tensor([i]))[0], int(self.labels[i])

    def batches(
        self, size: int, device: torch.device | str = "cpu", share: Callable[[int], slice] | None = None
    ) -> Iterator[Tensor]:
        """All slices in order, as float32 [B, 1, S, S] in [-1, 1] on the device.

        share(number of batches) -> the batches that this rank takes; None takes all.
        """
        order = torch.arange(len(self)).split(size)
        for (x,) in gather_batches([self.images], order[share(len(order))] if share else order, torch.device(device)):
            yield to_float(x)

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Slices by index, int64 [B] -> float32 [B, 1, S, S] in [-1, 1] on the device."""
        return to_float(self.images[index.to(self.images.device)].to(device))

    @cached_property
    def known(self) -> list[dict[str, str]]:
        """What attributes.csv says of each slice. Read when asked for: a table that is wrong stops nobody else."""
        return (read_attributes(self.root, self.slices) if self.root else None) or [{} for _ in self.slices]

    def class_names(self) -> list[str]:
        """The class folder of each slice."""
        return [self.classes[y] for y in self.labels.tolist()]

    def column(self, name: str) -> list[str]:
        """What is known about each slice under this name, in words; "" where nothing is.

        "group" is the class folder; if there is one only, a column of attributes.csv can take its place. "level" is the
        number at the end of the file's name where attributes.csv does not say it. Outside of a data folder, names of
        files are nothing to go by, and folders only where there is no such column.
        """
        if name == GROUP and len(self.classes) > 1 and self.root:
            return self.class_names()
        texts = [known.get(name, "") for known in self.known]
        if name == GROUP and not self.root:
            return [text or own for text, own in zip(texts, self.class_names())]
        if not any(texts) and name == "level" and self.root:
            found = (re.search(r"(\d+)\.\w+$", file) for file in self.files)
            texts = [match[1] if match else "" for match in found]
        return texts

    def conditions(self, attributes: Sequence[Attribute]) -> Tensor:
        """What a network that knows these attributes takes for each slice, float32 [N, A]."""
        return encode_rows(attributes, {a.name: self.column(a.name) for a in attributes}, len(self))

    def summary(self) -> str:
        """For example "1,600 slices of 50 people (NC 1,600)". Weights store it, to recognise their data."""
        counts = Counter(self.labels.tolist())
        by_class = ", ".join(f"{c} {counts[i]:,}" for i, c in enumerate(self.classes))
        return f"{len(self):,} slices of {len(set(self.people)):,} people ({by_class})"


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, S, S] -> float32 [B, 1, S, S] in [-1, 1]."""
    return images[:, None].float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Files and people


def find_root(data: str, cache: str, image_size: int) -> Path:
    """The data folder that --data means: a path, `rangpur`, `phantom` or `phantom-PEOPLE`. UserError if there is none.

    `phantom` draws the synthetic data set into CACHE/phantoms-v<drawing>-<size>/ on first use and prints a line about
    it; `phantom-1000` draws a thousand people.
    """
    if phantom_drawing(data):
        import filelock

        import phantom

        _, dash, people = data.partition("-")
        root = Path(cache) / f"phantoms-v{phantom.DRAWING}-{image_size}{dash}{people}"
        root.parent.mkdir(parents=True, exist_ok=True)
        # Of several processes that start together, one draws and the others wait.
        with filelock.FileLock(f"{root}.lock"):
            if not root.exists():
                print(f"drawing synthetic slices (phantoms) into {root}")
                try:
                    phantom.make_dataset(root, int(people or 200), size=image_size)
                except phantom.Unusable as e:
                    raise UserError(str(e)) from None
        return root
    root = Path(RANGPUR if data == "rangpur" else data).expanduser()
    if not root.is_dir():
        raise UserError(
            f"there is no data folder {root}: name one that holds train/CLASS/*.png with --data DIR or ADNI_ROOT, "
            "or try --data phantom for synthetic slices"
        )
    return root


def scan(root: Path, subject_regex: str) -> list[Slice]:
    """List all images in ROOT/{train,val,test}/CLASS/, sorted by split, class and name. Opens no image.

    UserError if train/ is missing, a class folder is empty or its name is not UTF-8, a class is not in train/, or
    `subject_regex` finds no person in a file's name.
    """
    # check the folder and the regular expression
    if not (root / "train").is_dir():
        raise UserError(f"{root} has no train/ folder: put slices into {root}/train/CLASS/<subject>_<slice>.png")
    try:
        pattern = re.compile(subject_regex)
    except re.error as error:
        raise UserError(f"--subject-regex '{subject_regex}' is not a regular expression: {error}") from None
    if not pattern.groups:
        raise UserError(f"--subject-regex '{subject_regex}' needs one group in parentheses, which matches the person")

    # list the files of every class folder
    patients = read_patients(root / "subjects.csv")
    slices = []
    for split in SPLITS:
        if not (root / split).is_dir():
            continue
        # What is hidden (.ipynb_checkpoints, macOS's ._x.png) is no data.
        shown = (d for d in os.scandir(root / split) if not d.name.startswith("."))
        folders = sorted((d for d in shown if d.is_dir()), key=lambda d: d.name)
        if not folders:
            raise UserError(f"{root / split} has no class folders: put slices into {root / split}/CLASS/")
        for folder in folders:
            if not is_folder_name(folder.name):  # class names are written into weight headers, tables and pictures
                raise UserError(f"the name of class folder {folder.path} is not UTF-8: rename it")
            shown = (f for f in os.scandir(folder) if not f.name.startswith("."))
            files = [f for f in shown if f.name.lower().endswith(IMAGE_TYPES) and f.is_file()]
            if not files:
                raise UserError(f"class folder {folder.path} holds no {'/'.join(t[1:] for t in IMAGE_TYPES)} images")
            for file in sorted(files, key=lambda f: f.name):
                # the person: by the file's name, then by subjects.csv, else by the names of the usual data sets
                match = pattern.search(os.path.splitext(file.name)[0])
                if not match or not match[1]:
                    raise UserError(
                        f"no person can be read from the file name {file.path}: name files <subject>_<slice>.png, "
                        "or describe your names with --subject-regex"
                    )
                known = known_person(match[1]) if subject_regex == DataConfig.subject_regex else ""
                person = sys.intern(patients.get(match[1], known or match[1]))  # one object for all slices of a person
                stat = file.stat()
                path = f"{split}/{folder.name}/{file.name}"
                slices.append(Slice(path, split, folder.name, person, (stat.st_size, stat.st_mtime_ns)))

    # a class that was never trained on cannot be evaluated
    unseen = {s.label for s in slices} - {s.label for s in slices if s.split == "train"}
    if unseen:
        raise UserError(f"class {sorted(unseen)[0]} is in {root} but not in its train/ folder: add it or remove it")
    return slices


def read_patients(path: Path) -> dict[str, str]:
    """{scan: patient} from ROOT/subjects.csv, which says which scans belong to one patient. Empty without that file."""
    return {r["scan"]: r["patient"] for r in read_table(path, "scan", "patient")} if path.exists() else {}


KEYS = ("file", "scan", "patient", "subject", "person", "participant_id")  # what a row of attributes.csv can be about


def read_attributes(root: Path, slices: Sequence[Slice]) -> list[dict[str, str]] | None:
    """{name: value} of each slice from ROOT/attributes.csv; None without that file. Names are in lower case.

    A row is about a file, a scan (the file's name up to its last `_`) or a person, by the first of its columns KEYS.
    UserError if it has none of them, or if two rows contradict each other.
    """
    path = root / "attributes.csv"
    if not path.exists():
        return None
    # A row that is longer than the head has a list of what is too much, and a shorter one has None.
    rows = [{k.strip().lower(): (v or "").strip() for k, v in row.items() if k} for row in read_table(path)]
    if not rows:
        raise UserError(f"{path} has no rows: fill it in or remove it")
    key = next((k for k in KEYS if k in rows[0]), None)
    if key is None:
        raise UserError(f"{path} needs a column that says what a row is about: {', '.join(KEYS)}")
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        about = row.pop(key)
        if about and table.setdefault(about, row) != row:
            raise UserError(f"{path} has two rows about {about} that contradict each other: remove one")
    found = []
    for s in slices:
        name = s.path.rpartition("/")[2]
        scan = os.path.splitext(name)[0].rpartition("_")[0]
        found.append(next((table[k] for k in (name, s.path, scan, s.person) if k in table), {}))
    return found


def find_overlap(slices: Sequence[Slice]) -> dict[str, tuple[Slice, Slice]]:
    """{person: (a slice in one split, a slice in another)} for each person who is in more than one split."""
    first: dict[str, Slice] = {}
    overlap: dict[str, tuple[Slice, Slice]] = {}
    for s in slices:
        other = first.setdefault(s.person, s)
        if other.split != s.split:
            overlap.setdefault(s.person, (other, s))
    return overlap


def carve_validation(slices: Sequence[Slice], fraction: float, seed: int) -> set[str]:
    """Choose people of train/ for validation: `fraction` of the people of each class, at least one, by the seed.

    Whole people, never single slices. A person with slices in two classes counts for the class that comes first.
    UserError if a class has fewer than two people.
    """
    # group people by class; going backwards, the first class of a person is written last and stays
    people: dict[str, list[str]] = defaultdict(list)
    for person, label in {s.person: s.label for s in reversed(slices) if s.split == "train"}.items():
        people[label].append(person)
    # sorted, so that the choice depends on the names and the seed only
    rng, chosen = np.random.default_rng(seed), set()
    for label in sorted(people):
        names = sorted(people[label])
        if len(names) < 2:
            raise UserError(
                f"class {label} has {len(names)} person in train/, and one more is needed to validate on: "
                "add people, or a val/ folder of other people"
            )
        chosen.update(rng.permutation(names)[: min(len(names) - 1, max(1, round(fraction * len(names))))].tolist())
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# Decoding and the slice cache


class BadFile(Exception):
    """Raised for an image file that cannot be used; the message says why."""


class Notes(TypedDict):
    """What decoding found out about the files: the cache's .json file, besides its own checksum."""

    bad: list[list[str]]  # [path, reason] of each file that cannot be used; its pixels in the cache are black
    colour: int  # how many files were in colour
    sizes: dict[str, int]  # "WIDTHxHEIGHT" of the files -> how many
    crc: list[int]  # CRC-32 of the pixels of each CHUNK of slices


def read_slice(path: str | Path) -> tuple[np.ndarray, bool]:
    """Decode one image file: (grey uint8 [H, W], whether it was in colour). BadFile says why it cannot be used."""
    cv2 = import_cv2()

    data = np.fromfile(path, np.uint8)
    if not len(data):
        raise BadFile("empty file")
    # OpenCV fills the missing part of a truncated file with grey and reports no error. So look for the end marks of
    # JPEG and PNG here.
    head, tail = data[:8].tobytes(), data[-64:].tobytes()
    if (head.startswith(b"\xff\xd8") and b"\xff\xd9" not in tail) or (
        head == b"\x89PNG\r\n\x1a\n" and b"IEND" not in tail
    ):
        raise BadFile("truncated")
    # For a PNG, OpenCV allocates memory for the size in the header before it checks its own limit.
    width, height = (int.from_bytes(data[i : i + 4].tobytes(), "big") for i in (16, 20))
    if head == b"\x89PNG\r\n\x1a\n" and width * height > MAX_PIXELS:
        raise BadFile(f"claims to be {width}x{height} pixels")

    if head[:4] in (b"II*\0", b"MM\0*") and pages(data) > 1:
        raise BadFile(f"a stack of {pages(data)} pages: save each slice as a file of its own")

    # decode
    try:
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise BadFile("not an image that can be decoded")

    # check what came out
    if image.dtype != np.uint8:
        raise BadFile(f"{image.dtype} pixels: convert to 8 bits, with one window for all slices")
    colour = image.ndim == 3
    if colour:
        alpha = image[:, :, 3] if image.shape[2] == 4 else None
        image = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY if alpha is None else cv2.COLOR_BGRA2GRAY)
        if alpha is not None:  # what is transparent becomes black
            image = cv2.multiply(image, alpha, scale=1 / 255)
    if min(image.shape) < 32 or max(image.shape) > 2 * min(image.shape):
        raise BadFile(
            f"wrong size {image.shape[1]}x{image.shape[0]}: at least 32 pixels, at most twice as long as wide"
        )
    if not image.any():
        raise BadFile("all black")
    return image, colour


def pages(data: np.ndarray) -> int:
    """How many pages a TIFF file has; 0 if it is damaged."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data.tobytes())) as image:
            return int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged file can make it fail in any way; OpenCV then refuses it, too
        return 0


def to_square(image: np.ndarray, size: int) -> np.ndarray:
    """Pad grey uint8 [H, W] with black to a centred square (never stretch), then resize: uint8 [size, size]."""
    cv2 = import_cv2()

    h, w = image.shape
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    image = cv2.copyMakeBorder(image, top, side - h - top, left, side - w - left, cv2.BORDER_CONSTANT, value=0)
    if side == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_CUBIC)


def fingerprint(slices: Sequence[Slice], times: bool = True) -> str:
    """16 hex digits that change whenever a file is added, removed, renamed or modified.

    Without `times` they ignore modification times: a copy of the folder elsewhere then has the same fingerprint, but a
    file replaced by another of the same length is not noticed.
    """
    # Caches depend on the version. Runs do not: they must stay resumable when only the cache format changes.
    digest = hashlib.sha256(str(CACHE_VERSION if times else 1).encode())
    for s in slices:
        digest.update(os.fsencode(f"\n{s.path}\t{s.stamp if times else s.stamp[0]}"))  # file names need not be UTF-8
    return digest.hexdigest()[:16]


def notes_checksum(notes: Notes) -> int:
    """CRC-32 of the notes, stored with them as "seal": if it does not match, the cache is damaged and made again."""
    return zlib.crc32(json.dumps(notes).encode())


def read_cache(pixels: Path, notes_file: Path, shape: tuple[int, int, int], workers: int) -> Notes | None:
    """Read and verify a cache: its notes, or None if a file is missing or does not match its checksum.

    Checksums run at 3 GB/s per core, or at the speed of the disk. Above 4 GB only 64 evenly spaced chunks are checked.
    """
    # the notes; a damaged file can hold any JSON or none, hence the many exceptions
    try:
        content = json.loads(notes_file.read_bytes())
        if content.pop("seal") != notes_checksum(content) or pixels.stat().st_size != np.prod(shape):
            return None
        notes: Notes = content
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError, FileNotFoundError):
        return None
    # the pixels
    data, checksums = np.memmap(pixels, np.uint8, mode="r", shape=shape), notes["crc"]
    count = len(checksums)
    chunks = range(count) if data.nbytes < 4e9 else np.linspace(0, count - 1, 64, dtype=int).tolist()
    with ThreadPoolExecutor(workers) as pool:  # threads help because crc32 releases the GIL
        same = pool.map(lambda i: zlib.crc32(data[CHUNK * i : CHUNK * (i + 1)].data) == checksums[i], chunks)
        return notes if all(same) else None


def write_cache(root: Path, slices: Sequence[Slice], image_size: int, pixels: Path, workers: int) -> Notes:
    """Decode all slices in parallel, write their pixels to the file `pixels`, and return the notes about them.

    The pixels first go to a temporary file beside it, which is removed if writing fails (OSError).
    """
    cv2 = import_cv2()

    def decode(s: Slice) -> tuple[np.ndarray, str, bool, str]:
        """(pixels, why the file is bad or "", whether it was in colour, "WIDTHxHEIGHT")."""
        try:
            image, colour = read_slice(root / s.path)
            return to_square(image, image_size), "", colour, f"{image.shape[1]}x{image.shape[0]}"
        except BadFile as e:
            return np.zeros((image_size, image_size), np.uint8), str(e), False, ""

    cv2.setNumThreads(1)  # one image per thread is faster than many threads per image
    bad: list[list[str]] = []
    colours, sizes, checksums = 0, Counter[str](), list[int]()
    tmp, bar = pixels.with_suffix(".tmp"), progress_bar(len(slices), what="decoding slices")
    try:
        with open(tmp, "wb") as f, ThreadPoolExecutor(workers) as pool, bar:
            for i in range(0, len(slices), CHUNK):  # in chunks, so that memory stays small for any number of files
                chunk = slices[i : i + CHUNK]
                checksums.append(0)
                for s, (image, why, colour, size) in zip(chunk, pool.map(decode, chunk)):
                    f.write(image.data)
                    checksums[-1] = zlib.crc32(image.data, checksums[-1])
                    bad += [[s.path, why]] if why else []
                    colours += colour
                    sizes[size] += not why
                    bar.update()
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, pixels)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        e.filename = e.filename or str(pixels)  # a full disk names no file
        raise
    return {"bad": bad, "colour": colours, "sizes": dict(sizes), "crc": checksums}


def load_slices(root: Path, slices: Sequence[Slice], image_size: int, cache: Path) -> tuple[Tensor, Notes]:
    """Decoded slices, uint8 [N, S, S], memory-mapped from the cache, and the notes about their files.

    The first call decodes them into CACHE/slices-<root>-<size>-<fingerprint>.u8 and .json, and removes older caches of
    this folder and size. Later calls verify those files and map them. If several processes start together, one decodes
    and the others wait. Bad files do not raise an error here: they are in the notes.
    """
    import filelock

    # name the files: by the folder, the size, and the state of all files in it
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    base = cache / f"slices-{name}-{image_size}-{fingerprint(slices)}"
    pixels, notes_file = base.with_suffix(".u8"), base.with_suffix(".json")
    shape = (len(slices), image_size, image_size)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cache.mkdir(parents=True, exist_ok=True)

    with filelock.FileLock(cache / f"slices-{name}.lock"):
        notes = read_cache(pixels, notes_file, shape, workers)
        if notes is None:
            if notes_file.exists():
                print(f"{pixels} or its .json file is damaged: the slices are decoded again", file=sys.stderr)
            for old in cache.glob(f"slices-{name}-{image_size}-*"):  # made from earlier versions of the files
                old.unlink()
            notes = write_cache(root, slices, image_size, pixels, workers)
            # The notes come last: a cache with notes is complete.
            write_atomic(notes_file, json.dumps({**notes, "seal": notes_checksum(notes)}).encode())
    # Mapped copy-on-write because torch has no read-only tensors. Nobody writes to it.
    return torch.from_numpy(np.memmap(pixels, np.uint8, mode="c", shape=shape)), notes


# ---------------------------------------------------------------------------------------------------------------------
# The splits of a data set


def load_splits(cfg: DataConfig, image_size: int) -> tuple[dict[str, ADNIDataset], str]:
    """Scan, check, decode and split a data folder.

    Returns ({"train": ..., "val": ..., and "test" if there is such a folder}, fingerprint of the data). Without a val/
    folder, validation people are set aside from train/. Prints what is unusual about the files (colour, sizes).
    UserError if there is no data, a class is empty, a person is in more than one split, or files are bad (unless
    cfg.skip_bad_files).
    """
    # list the files and check the people
    root = find_root(cfg.data, cfg.cache, image_size)
    slices = scan(root, cfg.subject_regex)
    for a, b in find_overlap(slices).values():
        raise UserError(
            f"person {a.person} is in two splits, with {root / a.path} and {root / b.path}: move all files of a person "
            "into one split"
        )

    # decode, and stop at bad files
    images, notes = load_slices(root, slices, image_size, Path(cfg.cache))
    if notes["bad"] and not cfg.skip_bad_files:
        for path, why in notes["bad"][:20]:
            print(f"bad file: {root / path}: {why}", file=sys.stderr)
        n = len(notes["bad"])
        raise UserError(
            f"{n} of {len(slices):,} files in {root} cannot be used: replace or remove them, or leave them out with "
            "--skip-bad-files"
        )
    if notes["colour"]:
        print(f"{notes['colour']:,} colour images in {root} were converted to grey")
    if len(notes["sizes"]) > 1:
        print(f"sizes in {root}: " + ", ".join(f"{size} {n:,}" for size, n in notes["sizes"].items() if n))

    # split: by folder, except that validation people may come from train/
    bad = {path for path, _ in notes["bad"]}
    has_val = any(s.split == "val" for s in slices)
    validation = set() if has_val else carve_validation(slices, cfg.val_fraction, cfg.seed)
    classes, splits = sorted({s.label for s in slices}), {}
    for split in SPLITS:
        rows = [
            i for i, s in enumerate(slices)
            if s.path not in bad and split == ("val" if s.split == "train" and s.person in validation else s.split)
        ]  # fmt: skip
        if rows:
            splits[split] = ADNIDataset([slices[i] for i in rows], images, rows, classes, root)
    for split in ("train", "val"):
        if split not in splits:
            raise UserError(f"{root} has no usable slices for {split}: python dataset.py check lists bad files")
    # A run compares this when it resumes. File times are left out: another copy of the folder is the same data.
    return splits, f"{fingerprint(slices, times=False)}-{len(splits['train'])}-{len(splits['val'])}"


def carved_people(splits: dict[str, ADNIDataset]) -> str:
    """12 hex digits that identify the people of train/ set aside for validation; "" if the data has a val/ folder.

    The header of the weights stores it. If other people were chosen later, an evaluation would take people that the
    network was trained on for unseen ones.
    """
    val = splits["val"]
    if not val.files[0].startswith("train/"):
        return ""
    return hashlib.sha256(os.fsencode("\n".join(sorted(set(val.people))))).hexdigest()[:12]


SPLIT_RULES = ("subject_regex", "val_fraction", "skip_bad_files", "seed")


def split_rules(meta: dict[str, Any]) -> dict[str, Any]:
    """The settings that decided which people a run was trained on: SPLIT_RULES, read from the header of its weights.

    Headers of older versions hold them among all settings, under "config". UserError where there are none.
    """
    rules = meta.get("split", meta.get("config"))
    try:
        return check_arguments(DataConfig, {k: rules[k] for k in SPLIT_RULES} if isinstance(rules, dict) else None)
    except (KeyError, ValueError) as e:
        raise UserError(f"the weights do not say how their data was split ({e}): use another run's weights") from None


def phantom_drawing(data: str) -> dict[str, int]:
    """What the header of a run's weights says about its phantoms: which drawing they are of. Empty for other data."""
    if not re.fullmatch(r"phantom(-\d{1,6})?", data):
        return {}
    import phantom

    return {"phantoms": phantom.DRAWING}


def load_splits_by_rules(
    data: str, cache: str, meta: dict[str, Any], image_size: int
) -> tuple[dict[str, ADNIDataset], str]:
    """What `load_splits` returns, with people split by the rules of the run whose weights carry this header.

    UserError if other people are held out than in that run, because `data` is not what it was trained on, or if its
    phantoms were drawn otherwise.
    """
    if (drawing := phantom_drawing(data).get("phantoms")) and meta.get("phantoms", 1) != drawing:
        raise UserError(
            f"the run was trained on phantoms of drawing {meta.get('phantoms', 1)}, and this version of the code makes "
            f"drawing {drawing}: train it again with --fresh, or name the folder of its phantoms with --data"
        )
    splits, fingerprint = load_splits(DataConfig(data=data, cache=cache, **split_rules(meta)), image_size)
    own = carved_people(splits)
    if meta.get("held_out", own) != own:
        raise _other_data(data, splits, meta)
    return splits, fingerprint


def _other_data(data: str, splits: dict[str, ADNIDataset], meta: dict[str, Any]) -> UserError:
    return UserError(
        f"{data} holds {splits['train'].summary()}, but the run was trained on {repr(meta.get('data'))[:200]} "
        "or validated on other people: name the folder that the run was trained on with --data"
    )


def load_splits_as_trained(data: str, cache: str, meta: dict[str, Any], image_size: int) -> dict[str, ADNIDataset]:
    """The splits of the run whose weights carry this header, so that the people held out are the run's own.

    Otherwise some of them would be people the run was trained on, and every floor would be wrong. UserError if `data`
    is not what the run was trained on.
    """
    splits, _ = load_splits_by_rules(data, cache, meta, image_size)
    if splits["train"].summary() != meta.get("data"):
        raise _other_data(data, splits, meta)
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# Generated images


def read_images(where: Path, side: int = 0, classes: Sequence[str] = ()) -> tuple[ADNIDataset, list[str]]:
    """Read a folder of generated images, or of slices outside of any data folder, or one file.

    Returns (the images, their classes being `classes` and whatever else the folders are called; sentences about what
    was left out). If the folder has a manifest.csv (predict.py writes one), it says which files count and their
    classes. Otherwise all images at any depth count, and the folder right above a file is its class. What else is known
    is read from attributes.csv there or up to three folders above. Files that cannot be used are left out. All are
    brought to `side` pixels; without it, files of another size than most are left out, too. UserError if there is no
    folder, no usable image, or a bad manifest.
    """
    if not where.exists() or str(where) == ".":
        raise UserError(f"there is no file or folder {where}: name one that holds images")
    folder = where if where.is_dir() else where.parent

    # list the files
    manifest = folder / "manifest.csv"
    if where.is_dir() and manifest.exists():
        files = [(folder / r["file"], r["class"]) for r in read_table(manifest, "file", "class")]
        home = os.path.realpath(folder)
        for path, _ in files:
            # A manifest may come from anyone. It must not reach other files by "..", an absolute path or a link.
            if not Path(os.path.realpath(path)).is_relative_to(home):
                raise UserError(f"{manifest} names {repr(str(path))[:200]}, outside of its folder: remove that row")
    else:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
        files = [(p, Path(os.path.abspath(p)).parent.name) for p in (found if where.is_dir() else [where])]
    if not files:
        raise UserError(f"{folder} holds no images: name a folder of {'/'.join(t[1:] for t in IMAGE_TYPES)} slices")

    # decode them
    def read(path: Path) -> np.ndarray | str:
        """The image, padded to a square, or a sentence saying why there is none."""
        if not os.path.isfile(path):  # also false for a pipe, which would block
            return f"{str(path)[:200]}: there is no such file"
        try:
            image = read_slice(path)[0]
            return to_square(image, side or max(image.shape))
        except (BadFile, OSError) as e:
            return f"{path}: {e}"

    with ThreadPoolExecutor() as pool, progress_bar(len(files), what="reading images") as bar:
        images: list[np.ndarray | str] = []
        for image in pool.map(read, [p for p, _ in files]):
            images.append(image)
            bar.update()

    # leave out what cannot be used, and all sizes but the most common one
    problems, bad = [], [i for i in images if isinstance(i, str)]
    if bad:
        problems.append(f"{len(bad)} of {len(files)} files cannot be used and were left out, first {bad[0]}")
    sides = Counter(len(i) for i in images if not isinstance(i, str))
    if not sides:
        raise UserError(f"{where} holds no image that can be used: {bad[0]}")
    most = sides.most_common(1)[0][0]
    if len(sides) > 1:
        sizes = ", ".join(f"{n} of {s}x{s}" for s, n in sides.most_common())
        problems.append(f"{folder} holds images of several sizes ({sizes}): only those of {most}x{most} count")
    kept = [(i, image) for i, image in enumerate(images) if not isinstance(image, str) and len(image) == most]

    # whose they are, and what is known of them
    slices = []
    for i, _ in kept:
        path, label = files[i]
        scan = path.stem.rpartition("_")[0] or path.stem
        slices.append(Slice(os.path.relpath(path, folder), "", label, known_person(scan) or scan, (0, 0)))
    names = sorted({*classes, *(s.label for s in slices)})
    pixels = torch.from_numpy(np.stack([image for _, image in kept]))
    data = ADNIDataset(slices, pixels, range(len(slices)), names)
    tables = [p for p in (folder, *folder.resolve().parents[:3]) if (p / "attributes.csv").exists()]
    with contextlib.suppress(UserError):  # a table about something else
        data.known = (read_attributes(tables[0], slices) if tables else None) or data.known
    return data, problems


# ---------------------------------------------------------------------------------------------------------------------
# python dataset.py check DIR


def near_identical(
    a: np.ndarray, b: np.ndarray, threshold: float, people: np.ndarray | None = None
) -> list[tuple[float, int, int]]:
    """Find slices of b that look the same as a slice of a: [(correlation, i, j)], the highest correlation first.

    a, b: uint8 thumbnails [N, S, S] and [M, S, S]. Each b[j] is compared with all of a, and its best match a[i] is
    listed if the correlation of their grey values exceeds the threshold. Pixels that are background in the mean image
    are ignored, because all slices agree there. `people` [N], if b is a: slices of one person are not compared.
    """
    inside = np.concatenate([a, b]).mean(0) > 8

    def standardise(x: np.ndarray) -> np.ndarray:
        """Rows of mean 0 and length 1, so that products of rows are correlations."""
        x = x[:, inside].astype(np.float32)
        x -= x.mean(1, keepdims=True)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)

    a, pairs = standardise(a), []
    for start in range(0, len(b), 256):  # 256 rows at a time, to limit memory
        r = standardise(b[start : start + 256]) @ a.T
        if people is not None:
            r[people[start : start + 256, None] == people[None]] = -1
        best = r.argmax(1)
        pairs += [(float(r[k, i]), int(i), start + k) for k, i in enumerate(best) if r[k, i] > threshold]
    return sorted(pairs, reverse=True)


def check(cfg: CheckConfig) -> None:
    """Print what a data folder holds: people and slices per class, sizes, bad files, overlaps, look-alikes.

    UserError if training on it would be refused. The slices are decoded into the cache, at 64 pixels.
    """
    root = find_root(cfg.folder, cfg.cache, 64)
    slices = scan(root, cfg.subject_regex)
    images, notes = load_slices(root, slices, 64, Path(cfg.cache))

    # counts per split and class
    classes = sorted({s.label for s in slices})
    print(f"{root}: {len(slices):,} slices of {len({s.person for s in slices}):,} people, classes {', '.join(classes)}")
    for split in SPLITS:
        in_split = [s for s in slices if s.split == split]
        for label in classes if in_split else []:
            in_class = [s for s in in_split if s.label == label]
            people = {s.person for s in in_class}
            print(f"  {split:5} {label:8} {len(in_class):8,} slices {len(people):6,} people")
    if not any(s.split == "val" for s in slices):
        print("  no val/ folder: training will set people of train/ aside for validation, a share of each class")

    # the files: sizes, colour, bad ones
    print("sizes: " + ", ".join(f"{size} ({n:,})" for size, n in notes["sizes"].items() if n))
    if notes["colour"]:
        print(f"colour images, converted to grey: {notes['colour']:,}")
    print(f"bad files: {len(notes['bad'])}")
    for path, why in notes["bad"]:
        print(f"  {root / path}: {why}")

    # people in more than one split
    overlap = find_overlap(slices)
    print(f"people in more than one split: {len(overlap)}")
    for person, (a, b) in overlap.items():
        print(f"  {person}: {root / a.path} and {root / b.path}")

    # Look-alikes: slices of two people that look the same are perhaps of one person under two names. Between splits,
    # and within train/, from which people are set aside. 20,000 slices take a minute.
    bad = {path for path, _ in notes["bad"]}
    rows = {split: [i for i, s in enumerate(slices) if s.split == split and s.path not in bad] for split in SPLITS}
    train = [rows["train"][i] for i in evenly_spaced(len(rows["train"]), 20_000)]
    alike = 0
    for split in SPLITS if train else ():
        if not rows[split]:
            continue
        if split == "train":
            whose_slice = np.unique([slices[i].person for i in train], return_inverse=True)[1]
            thumbnails = images[train].numpy()
            pairs = near_identical(thumbnails, thumbnails, cfg.near_identical, whose_slice)
            pairs = [*{frozenset(pair[1:]): pair for pair in pairs}.values()]  # two slices are alike both ways
            whose = "one of another person"
        else:
            pairs = near_identical(images[train].numpy(), images[rows[split]].numpy(), cfg.near_identical)
            whose = "a training slice"
        print(f"{split} slices that look like {whose} (correlation > {cfg.near_identical}): {len(pairs)}")
        alike += len(pairs)
        for r, i, j in pairs[:20]:
            a, b = slices[train[i]], slices[(train if split == "train" else rows[split])[j]]
            print(f"  {r:.4f}  {root / a.path}  {root / b.path}")
    if alike:
        print("  perhaps one patient under two names: list them in subjects.csv (scan,patient)")

    # Whether training would refuse
    if notes["bad"] or overlap:
        raise UserError(f"{root} cannot be trained on as it is: fix the bad files and overlaps listed above")
    if not rows["val"]:
        carve_validation(slices, DataConfig.val_fraction, 0)
    print("fit for training" + ", if those are different people" * bool(alike))


def main(cfg: CheckConfig | SliceConfig) -> None:
    if isinstance(cfg, CheckConfig):
        return check(cfg)
    from volumes import slice_volumes

    slice_volumes(cfg)


if __name__ == "__main__":
    run_script(main, cfg)
