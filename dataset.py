"""Slices from folders, split by person, decoded once.

`python dataset.py check DIR` looks a folder over, `python dataset.py slice VOLUMES OUT` makes one (volumes.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import CheckConfig, DataConfig, SliceConfig, check_arguments, parse_dataset

if __name__ == "__main__":
    cfg = parse_dataset()  # before torch is imported, so that --help answers at once

import numpy as np
import torch
from torch import Tensor

from device import gather_batches
from pictures import MAX_PIXELS, import_cv2
from utils import UserError, is_folder_name, progress_bar, read_table, run_script
from weights import write_atomic

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
SPLITS = ("train", "val", "test")
RANGPUR = "/home/groups/comp3710/ADNI/AD_NC"
CACHE_VERSION = 2
CHUNK = 1024  # slices that are decoded, written and checked together


@dataclass(frozen=True, slots=True)
class Slice:
    """One image file: ROOT/<split>/<label>/<name>."""

    path: str  # relative to the root, with forward slashes
    split: str
    label: str
    person: str
    stamp: tuple[int, int]  # bytes, modification time in ns: what the cache watches


class ADNIDataset(torch.utils.data.Dataset):
    """The slices of one split, decoded, in memory or memory-mapped.

    Item i: (float32 [1, S, S] in [-1, 1], class index). `batch` gives many at once, on a device.
    Public: `images` uint8 [N, S, S], `labels` int64 [N] (index into `classes`), `people` and `files` per slice.
    """

    def __init__(self, slices: Sequence[Slice], images: Tensor, rows: Sequence[int], classes: Sequence[str]):
        self.classes = list(classes)
        self.people = [s.person for s in slices]
        self.files = [s.path for s in slices]
        self.labels = torch.tensor([self.classes.index(s.label) for s in slices], dtype=torch.int64)
        contiguous = list(rows) == list(range(rows[0], rows[0] + len(rows))) if rows else False
        self.images = images[rows[0] : rows[0] + len(rows)] if contiguous else images[list(rows)]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.batch(torch.tensor([i]))[0], int(self.labels[i])

    def batches(
        self, size: int, device: torch.device | str = "cpu", share: Callable[[int], slice] | None = None
    ) -> Iterator[Tensor]:
        """All slices in order, or those of a rank's share of the batches: float32 [B, 1, S, S] in [-1, 1]."""
        order = torch.arange(len(self)).split(size)
        for (x,) in gather_batches([self.images], order[share(len(order))] if share else order, torch.device(device)):
            yield to_float(x)

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Slices by index, int64 [B] -> float32 [B, 1, S, S] in [-1, 1] on the device."""
        return to_float(self.images[index.to(self.images.device)].to(device))

    def summary(self) -> str:
        """e.g. "1,600 slices of 50 people (NC 1,600)"."""
        counts = Counter(self.labels.tolist())
        by_class = ", ".join(f"{c} {counts[i]:,}" for i, c in enumerate(self.classes))
        return f"{len(self):,} slices of {len(set(self.people)):,} people ({by_class})"


def to_float(images: Tensor) -> Tensor:
    """uint8 [B, S, S] -> float32 [B, 1, S, S] in [-1, 1]."""
    return images[:, None].float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Files and people


def find_root(data: str, cache: str, image_size: int) -> Path:
    """--data as a folder: the words `phantom` (drawn on first use) and `rangpur`, or a path."""
    if data == "phantom":
        import filelock

        import phantom

        root = Path(cache) / f"phantoms-{image_size}"
        root.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{root}.lock"):
            if not root.exists():
                print(f"drawing synthetic slices (phantoms) into {root}")
                try:
                    phantom.make_dataset(root, size=image_size)
                except phantom.Unusable as e:
                    raise UserError(str(e)) from None
        return root
    root = Path(RANGPUR if data == "rangpur" else data).expanduser()
    if not root.is_dir():
        raise UserError(
            f"there is no data folder {root}: give one that holds train/CLASS/*.png with --data DIR or ADNI_ROOT, "
            "or try --data phantom for synthetic slices"
        )
    return root


def scan(root: Path, subject_regex: str) -> list[Slice]:
    """All images below ROOT/{train,val,test}/CLASS, sorted. UserError on a layout that cannot be used."""
    if not (root / "train").is_dir():
        raise UserError(f"{root} has no train/ folder: slices belong into {root}/train/CLASS/<subject>_<slice>.png")
    try:
        pattern = re.compile(subject_regex)
    except re.error as e:
        raise UserError(f"--subject-regex '{subject_regex}' is not a regular expression: {e}") from None
    if not pattern.groups:
        raise UserError(f"--subject-regex '{subject_regex}' needs one group in parentheses: the person")
    patients = read_patients(root / "subjects.csv")
    slices = []
    for split in SPLITS:
        if not (root / split).is_dir():
            continue
        folders = sorted((d for d in os.scandir(root / split) if d.is_dir()), key=lambda d: d.name)
        if not folders:
            raise UserError(f"{root / split} has no class folders: slices belong into {root / split}/CLASS/")
        for folder in folders:
            if not is_folder_name(folder.name):  # it goes into headers, tables and pictures
                raise UserError(f"the name of class folder {folder.path} is not UTF-8: rename it")
            entries = [e for e in os.scandir(folder) if e.name.lower().endswith(IMAGE_TYPES) and e.is_file()]
            if not entries:
                raise UserError(f"class folder {folder.path} holds no {'/'.join(t[1:] for t in IMAGE_TYPES)} images")
            for e in sorted(entries, key=lambda e: e.name):
                match = pattern.search(os.path.splitext(e.name)[0])
                if not match or not match[1]:
                    raise UserError(
                        f"no person can be read off the name {e.path}: files are <subject>_<slice>.png, "
                        "or say with --subject-regex how to read yours"
                    )
                person = sys.intern(patients.get(match[1], match[1]))  # one string for all slices of a person
                stat = e.stat()
                path = f"{split}/{folder.name}/{e.name}"
                slices.append(Slice(path, split, folder.name, person, (stat.st_size, stat.st_mtime_ns)))
    unseen = {s.label for s in slices} - {s.label for s in slices if s.split == "train"}
    if unseen:
        raise UserError(f"class {sorted(unseen)[0]} is in {root} but not in its train/ folder")
    return slices


def read_patients(path: Path) -> dict[str, str]:
    """ROOT/subjects.csv (scan,patient): which scans belong to one patient. Empty if there is no such file."""
    return {r["scan"]: r["patient"] for r in read_table(path, "scan", "patient")} if path.exists() else {}


def find_overlap(slices: Sequence[Slice]) -> dict[str, tuple[Slice, Slice]]:
    """People who are on two sides of a split, each with one file from either side."""
    first: dict[str, Slice] = {}
    overlap = {}
    for s in slices:
        other = first.setdefault(s.person, s)
        if other.split != s.split:
            overlap.setdefault(s.person, (other, s))
    return overlap


def carve_validation(slices: Sequence[Slice], fraction: float, seed: int) -> set[str]:
    """People of train/ to validate on: seeded, whole people, `fraction` of each class's people, at least one of each.

    A person with slices in two classes counts for the class met first.
    """
    people: dict[str, list[str]] = defaultdict(list)
    for person, label in {s.person: s.label for s in reversed(slices) if s.split == "train"}.items():
        people[label].append(person)
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
# The slice cache


class BadFile(Exception):
    """Why a file cannot be used."""


def read_slice(path: str | Path) -> tuple[np.ndarray, bool]:
    """Decode one file: (grey uint8 [H, W], was it in colour). BadFile says what is wrong with it."""
    cv2 = import_cv2()

    data = np.fromfile(path, np.uint8)
    if not len(data):
        raise BadFile("empty file")
    # OpenCV fills the missing rest of a torn file with grey and says nothing, so its end mark is looked for here.
    head, tail = data[:8].tobytes(), data[-64:].tobytes()
    if (head.startswith(b"\xff\xd8") and b"\xff\xd9" not in tail) or (
        head == b"\x89PNG\r\n\x1a\n" and b"IEND" not in tail
    ):
        raise BadFile("truncated")
    width, height = (int.from_bytes(data[i : i + 4].tobytes(), "big") for i in (16, 20))
    if head == b"\x89PNG\r\n\x1a\n" and width * height > MAX_PIXELS:  # OpenCV takes memory before it looks at its limit
        raise BadFile(f"claims to be {width}x{height} pixels")
    try:
        image = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    except cv2.error:
        image = None
    if image is None:
        raise BadFile("not an image that can be decoded")
    if image.dtype != np.uint8:
        raise BadFile(f"{image.dtype} pixels: convert to 8 bits, with one window for all slices")
    colour = image.ndim == 3
    if colour:
        image = cv2.cvtColor(image, cv2.COLOR_BGRA2GRAY if image.shape[2] == 4 else cv2.COLOR_BGR2GRAY)
    if min(image.shape) < 32 or max(image.shape) > 2 * min(image.shape):
        raise BadFile(
            f"wrong size {image.shape[1]}x{image.shape[0]}: at least 32 pixels, at most twice as long as wide"
        )
    if not image.any():
        raise BadFile("all black")
    return image, colour


def to_square(image: np.ndarray, size: int) -> np.ndarray:
    """Pad with black to a centred square, never stretch, then resize: uint8 [size, size]."""
    cv2 = import_cv2()

    h, w = image.shape
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    image = cv2.copyMakeBorder(image, top, side - h - top, left, side - w - left, cv2.BORDER_CONSTANT, value=0)
    if side == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < side else cv2.INTER_CUBIC)


def fingerprint(slices: Sequence[Slice], times: bool = True) -> str:
    """16 hex digits that change whenever a file is added, removed, renamed, or written.

    Without `times` a rewritten file of the same length goes unnoticed, and so does a copy of the folder elsewhere.
    """
    digest = hashlib.sha256(str(CACHE_VERSION if times else 1).encode())  # runs resume whatever caches look like
    for s in slices:
        digest.update(os.fsencode(f"\n{s.path}\t{s.stamp if times else s.stamp[0]}"))  # names need not be UTF-8
    return digest.hexdigest()[:16]


def seal(notes: dict) -> int:
    """CRC-32 of what the notes say: they are as they were written, or the cache is made again."""
    return zlib.crc32(json.dumps(notes).encode())


def read_cache(pixels: Path, notes_file: Path, shape: tuple[int, int, int], workers: int) -> dict | None:
    """The notes of a cache, None if these or the pixels are not as they were written.

    Pixels pass at 3 GB/s and core, or as fast as the disk gives them; above 4 GB it is 64 pieces, evenly spread.
    """
    try:
        notes = json.loads(notes_file.read_bytes())
        if notes.pop("seal") != seal(notes) or pixels.stat().st_size != np.prod(shape):
            return None
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError, FileNotFoundError):
        return None
    data, crcs = np.memmap(pixels, np.uint8, mode="r", shape=shape), notes["crc"]
    pieces = range(len(crcs)) if data.nbytes < 4e9 else np.linspace(0, len(crcs) - 1, 64, dtype=int)
    with ThreadPoolExecutor(workers) as pool:  # crc32 lets the other threads run
        same = pool.map(lambda i: zlib.crc32(data[CHUNK * i : CHUNK * (i + 1)]) == crcs[i], pieces)
        return notes if all(same) else None


def load_slices(root: Path, slices: Sequence[Slice], image_size: int, cache: Path) -> tuple[Tensor, dict]:
    """Decoded slices uint8 [N, S, S], memory-mapped, and notes {bad: [[path, why]], colour: n, sizes: {WxH: n}, crc}.

    The first call decodes in parallel and writes CACHE/<fingerprint>.u8, the notes last; the next ones check that file
    and map it. Processes that start together wait for the one that decodes.
    """
    cv2 = import_cv2()
    import filelock

    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]
    base = cache / f"slices-{name}-{image_size}-{fingerprint(slices)}"
    pixels, notes_file = base.with_suffix(".u8"), base.with_suffix(".json")
    shape = (len(slices), image_size, image_size)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cache.mkdir(parents=True, exist_ok=True)

    def decode(s: Slice) -> tuple[np.ndarray, str, bool, str]:
        try:
            image, colour = read_slice(root / s.path)
            return to_square(image, image_size), "", colour, f"{image.shape[1]}x{image.shape[0]}"
        except BadFile as e:
            return np.zeros((image_size, image_size), np.uint8), str(e), False, ""

    with filelock.FileLock(cache / f"slices-{name}.lock"):
        notes = read_cache(pixels, notes_file, shape, workers)
        if notes is None:
            if notes_file.exists():
                print(f"{pixels} or its notes are damaged: the slices are decoded again", file=sys.stderr)
            for old in cache.glob(f"slices-{name}-{image_size}-*"):  # the files changed: what was cached is of no use
                old.unlink()
            cv2.setNumThreads(1)  # one image per thread is faster than many threads per image
            bad, colours, sizes, crcs, tmp = [], 0, Counter(), [], base.with_suffix(".tmp")
            bar = progress_bar(len(slices), what="decoding slices")
            try:
                with open(tmp, "wb") as f, ThreadPoolExecutor(workers) as pool, bar:
                    for i in range(0, len(slices), CHUNK):  # in pieces: memory stays small whatever the number of files
                        chunk = slices[i : i + CHUNK]
                        crcs.append(0)
                        for s, (image, why, colour, size) in zip(chunk, pool.map(decode, chunk)):
                            f.write(image)
                            crcs[-1] = zlib.crc32(image, crcs[-1])
                            bad += [[s.path, why]] if why else []
                            colours += colour
                            sizes[size] += not why
                            bar.update()
                    f.flush()
                    os.fsync(f.fileno())
                os.replace(tmp, pixels)
            except OSError as e:
                tmp.unlink(missing_ok=True)
                e.filename = e.filename or str(pixels)
                raise
            notes = {"bad": bad, "colour": colours, "sizes": dict(sizes), "crc": crcs}
            write_atomic(notes_file, json.dumps(notes | {"seal": seal(notes)}).encode())
    # copy-on-write, because torch has no read-only tensors; nobody writes
    return torch.from_numpy(np.memmap(pixels, np.uint8, mode="c", shape=shape)), notes


def load_splits(cfg: DataConfig, image_size: int) -> tuple[dict[str, ADNIDataset], str]:
    """({"train": ..., "val": ..., perhaps "test": ...}, fingerprint of the data), checked, split by person.

    UserError on: no data, an empty class, a person on both sides of a split, bad files (unless skip_bad_files).
    """
    root = find_root(cfg.data, cfg.cache, image_size)
    slices = scan(root, cfg.subject_regex)
    for a, b in find_overlap(slices).values():
        raise UserError(f"person {a.person} is on both sides of a split: {root / a.path} and {root / b.path}")
    images, notes = load_slices(root, slices, image_size, Path(cfg.cache))
    if notes["bad"] and not cfg.skip_bad_files:
        for path, why in notes["bad"][:20]:
            print(f"bad file: {root / path}: {why}", file=sys.stderr)
        n = len(notes["bad"])
        raise UserError(
            f"{n} of {len(slices):,} files in {root} cannot be used: mend them, or go on with --skip-bad-files"
        )
    if notes["colour"]:
        print(f"{notes['colour']:,} colour images in {root} were turned grey")
    if len(notes["sizes"]) > 1:
        print(f"sizes in {root}: " + ", ".join(f"{size} {n:,}" for size, n in notes["sizes"].items() if n))
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
            splits[split] = ADNIDataset([slices[i] for i in rows], images, rows, classes)
    for split in ("train", "val"):
        if split not in splits:
            raise UserError(f"{root} has no usable slices for {split}")
    # A resumed run compares this: a cluster's fresh copy of the folder has other times and is the same data.
    return splits, f"{fingerprint(slices, times=False)}-{len(splits['train'])}-{len(splits['val'])}"


def carved_people(splits: dict[str, ADNIDataset]) -> str:
    """12 hex digits that say which people of train/ were set aside to validate on; "" where the data has a val/ folder.

    Weights carry it: with another choice, people a network was trained on would be taken for unseen ones.
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
        raise UserError(f"the weights do not say how their data was split: {e}: use those of another run") from None


def load_splits_by_rules(
    data: str, cache: str, meta: dict[str, Any], image_size: int
) -> tuple[dict[str, ADNIDataset], str]:
    """What `load_splits` returns, with people split by the rules of the run whose weights carry this header.

    UserError if other people are held out than in that run, because `data` is not what it was trained on.
    """
    splits, fingerprint = load_splits(DataConfig(data=data, cache=cache, **split_rules(meta)), image_size)
    own = carved_people(splits)
    if meta.get("held_out", own) != own:
        raise _other_data(data, splits, meta)
    return splits, fingerprint


def _other_data(data: str, splits: dict[str, ADNIDataset], meta: dict[str, Any]) -> UserError:
    return UserError(
        f"{data} holds {splits['train'].summary()}, and the run was trained on {repr(meta.get('data'))[:200]} or with "
        "other people held out: give the run's own --data"
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


def read_images(folder: Path) -> tuple[Tensor, list[str], list[str]]:
    """Generated images of a folder: (uint8 [N, S, S], class names, sentences about what was left out).

    predict.py's manifest.csv says which files count and of which class they are; without one all images below the
    folder do, and the folder right above a file names its class.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name one that holds generated images")
    manifest = folder / "manifest.csv"
    if manifest.exists():
        files = [(folder / r["file"], r["class"]) for r in read_table(manifest, "file", "class")]
        home = os.path.realpath(folder)
        for path, _ in files:
            if not Path(os.path.realpath(path)).is_relative_to(home):  # by .., from the root, or by a link
                raise UserError(f"{manifest} names {repr(str(path))[:200]}, outside of its folder: remove that row")
    else:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
        files = [(p, p.parent.name) for p in found]
    if not files:
        raise UserError(f"{folder} holds no images: name a folder of {'/'.join(t[1:] for t in IMAGE_TYPES)} slices")

    def read(path: Path) -> np.ndarray | str:
        if not os.path.isfile(path):  # nor is a pipe, which would be waited for
            return f"{str(path)[:200]}: it is not there"
        try:
            image = read_slice(path)[0]
            return to_square(image, max(image.shape))
        except (BadFile, OSError) as e:
            return f"{path}: {e}"

    with ThreadPoolExecutor() as pool, progress_bar(len(files), what="reading images") as bar:
        images = []
        for image in pool.map(read, [p for p, _ in files]):
            images.append(image)
            bar.update()
    problems, bad = [], [i for i in images if isinstance(i, str)]
    if bad:
        problems.append(f"{len(bad)} of {len(files)} files cannot be used and were left out, first {bad[0]}")
    sides = Counter(len(i) for i in images if not isinstance(i, str))
    if not sides:
        raise UserError(f"{folder} holds no image that can be used: {bad[0]}")
    side = sides.most_common(1)[0][0]
    if len(sides) > 1:
        sizes = ", ".join(f"{n} of {s}x{s}" for s, n in sides.most_common())
        problems.append(f"{folder} holds images of several sizes ({sizes}): only those of {side}x{side} count")
    kept = [i for i, image in enumerate(images) if not isinstance(image, str) and len(image) == side]
    return torch.from_numpy(np.stack([images[i] for i in kept])), [files[i][1] for i in kept], problems


# ---------------------------------------------------------------------------------------------------------------------
# python dataset.py check DIR


def near_identical(a: np.ndarray, b: np.ndarray, threshold: float) -> list[tuple[float, int, int]]:
    """Pairs (correlation, i, j) of slices a[i], b[j] that look the same: each b's best match, if above the threshold.

    uint8 [N, S, S] thumbnails; correlation of grey values over the pixels where the mean image is not background.
    """
    inside = np.concatenate([a, b]).mean(0) > 8

    def standardise(x: np.ndarray) -> np.ndarray:
        x = x[:, inside].astype(np.float32)
        x -= x.mean(1, keepdims=True)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)

    a, pairs = standardise(a), []
    for start in range(0, len(b), 256):  # in pieces: N x 256 correlations at a time
        r = standardise(b[start : start + 256]) @ a.T
        best = r.argmax(1)
        pairs += [(float(r[k, i]), int(i), start + k) for k, i in enumerate(best) if r[k, i] > threshold]
    return sorted(pairs, reverse=True)


def check(cfg: CheckConfig) -> None:
    """Print what a folder holds, and exit with 2 if training on it would be refused."""
    root = find_root(cfg.folder, cfg.cache, 64)
    slices = scan(root, cfg.subject_regex)
    images, notes = load_slices(root, slices, 64, Path(cfg.cache))
    classes = sorted({s.label for s in slices})
    print(f"{root}: {len(slices):,} slices of {len({s.person for s in slices}):,} people, classes {', '.join(classes)}")
    for split in SPLITS:
        of = [s for s in slices if s.split == split]
        for label in classes if of else []:
            mine = [s for s in of if s.label == label]
            print(f"  {split:5} {label:8} {len(mine):8,} slices {len({s.person for s in mine}):6,} people")
    if not any(s.split == "val" for s in slices):
        print("  no val/: validation people will be carved from train/, whole people, a share of each class")
    print("sizes: " + ", ".join(f"{size} ({n:,})" for size, n in notes["sizes"].items() if n))
    if notes["colour"]:
        print(f"colour images, turned grey: {notes['colour']:,}")
    print(f"bad files: {len(notes['bad'])}")
    for path, why in notes["bad"]:
        print(f"  {root / path}: {why}")
    overlap = find_overlap(slices)
    print(f"people on both sides of a split: {len(overlap)}")
    for person, (a, b) in overlap.items():
        print(f"  {person}: {root / a.path} and {root / b.path}")
    bad = {path for path, _ in notes["bad"]}
    sides = {split: [i for i, s in enumerate(slices) if s.split == split and s.path not in bad] for split in SPLITS}
    for held_out in ("val", "test"):
        if not sides[held_out] or not sides["train"]:
            continue
        pairs = near_identical(images[sides["train"]].numpy(), images[sides[held_out]].numpy(), cfg.near_identical)
        print(f"{held_out} slices that look like a training slice (correlation > {cfg.near_identical}): {len(pairs)}")
        for r, i, j in pairs[:20]:
            a, b = slices[sides["train"][i]], slices[sides[held_out][j]]
            print(f"  {r:.4f}  {root / a.path}  {root / b.path}")
        if pairs:
            print("  perhaps one patient under two scan numbers: list them in subjects.csv (scan,patient)")
    if notes["bad"] or overlap:
        raise UserError(f"{root} is not fit for training as it is: see the bad files and overlaps above")
    print("fit for training")


def main(cfg: CheckConfig | SliceConfig) -> None:
    if isinstance(cfg, CheckConfig):
        return check(cfg)
    from volumes import slice_volumes

    slice_volumes(cfg)


if __name__ == "__main__":
    run_script(main, cfg)
