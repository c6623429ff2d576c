"""Generate new MRIs: python predict.py --run NAME --num-images 16 --class-name AD --seed 7 --out out/.

Writes train/CLASS/<name>.png, a layout that can be trained on, manifest.csv, README.md (the datasheet), grid.png and
denoising.gif. The same command again completes what is missing. Many processes can share one folder (ranks of torchrun
or srun, jobs with --shard); together they write what one would. The way from noise to pixels is in sampling.py.

With --sweep age=55:90:5 it takes one image through the values of an attribute instead.
"""

from __future__ import annotations

from config import PredictConfig, parse

if __name__ == "__main__":
    cfg = parse(PredictConfig)  # before torch is imported, so that --help answers at once

import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from cluster import StopSignal
from conditions import GROUP, draw_rows, in_words, parse_sweep, parse_values, place_of
from device import describe_hardware, fetch_async, pick_device
from metrics import CopyDetector, is_copy
from modules import StableDiffusion
from pictures import (
    difference_map,
    image_grid,
    import_cv2,
    png_bytes,
    save_gif,
    table_of_images,
    visualise_denoising_process,
)
from runlog import RunLog
from sampling import ImageSampler, class_names, copy_detector, group_names, load_run, plan_sampling
from utils import UserError, csv_text, evenly_spaced, git_commit, job_ranks, progress_bar, run_script
from weights import file_hash, flush_disk, write_atomic

if TYPE_CHECKING:
    import filelock

T = TypeVar("T")
ATTEMPTS = 20  # at an image, before a model that generates nothing but copies is given up


def lock(out: Path) -> filelock.BaseFileLock:
    """The lock that processes sharing OUT take before they change its tables."""
    import filelock

    return filelock.FileLock(out / ".lock")


def claim_folder(out: Path, command: dict) -> None:
    """Make the folder OUT and record the command in OUT/command.json.

    UserError if OUT holds anything but the images of this same command.
    """
    record = out / "command.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    # A folder that holds files, but no record of a command, is somebody else's.
    there = {p.name for p in out.iterdir()} if out.exists() else set()  # read once: other processes may be writing
    if there and not there & {record.name, ".lock"}:
        raise UserError(f"{out} is not empty: choose another --out, or empty it")
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        if not record.exists():
            write_atomic(record, json.dumps(command, indent=1).encode())
        # The first process writes the record; the others compare with it.
        try:
            theirs = json.loads(record.read_bytes())
        except (ValueError, RecursionError):
            raise UserError(f"{record} is damaged, and so nothing is added to {out}: choose another --out") from None
        if theirs != command:
            theirs = theirs if isinstance(theirs, dict) else {}
            both = {k: (theirs.get(k), command.get(k)) for k in {**theirs, **command}}
            was = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in both.items() if a != b)[:300]
            raise UserError(f"{out} holds the images of another command ({was}): choose another --out")


def read_manifest(out: Path, valid: Callable[[int, list], bool]) -> dict[int, list]:
    """Valid rows of OUT/manifest.csv by image number. An image without one is generated again."""
    if not (out / "manifest.csv").exists():
        return {}
    # A line that is torn or of another command says nothing; its image is generated again.
    rows = {}
    for line in (out / "manifest.csv").read_text(encoding="utf-8", errors="replace").split("\n")[1:]:
        try:
            ((file, kind, seed, index, *rest),) = csv.reader([line])
            k, row = int(index) % 10**9, [file, kind, seed, int(index), *rest]
            if 0 <= int(index) < ATTEMPTS * 10**9 and valid(k, row):
                rows[k] = row
        except (ValueError, csv.Error):
            continue
    return rows


def add_to_manifest(
    out: Path, fresh: dict[int, list], columns: list[str], valid: Callable[[int, list], bool]
) -> dict[int, list]:
    """Merge these rows into OUT/manifest.csv, to which other processes may be adding too; returns all rows.

    Flushes their images to disk first, all at once: the manifest says which images are whole, even after a power cut.
    """
    flush_disk(out)
    with lock(out):
        rows = read_manifest(out, valid) | fresh
        head = ["file", "class", "seed", "index", "checkpoint", *columns]
        write_atomic(out / "manifest.csv", csv_text(head, (rows[k] for k in sorted(rows))).encode())
    return rows


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a grey uint8 [S, S] image as PNG, which `add_to_manifest` flushes to disk."""
    write_atomic(path, png_bytes(image), flush=False)


def read_image(path: Path, side: int) -> np.ndarray:
    """Read what `write_image` wrote: uint8 [side, side]. UserError if it is damaged."""
    cv2 = import_cv2()

    image = cv2.imdecode(np.frombuffer(path.read_bytes() or b"\0", np.uint8), cv2.IMREAD_GRAYSCALE)
    if image is None or image.shape != (side, side):
        raise UserError(f"{path} is damaged: delete it, and the same command generates it again")
    return image


def replace_copies(
    images: np.ndarray,
    indices: list[int],
    ks: list[int],
    detector: CopyDetector,
    generate: Callable[[list[int], list[int]], Callable[[], np.ndarray]],
) -> dict[str, Tensor]:
    """Generate again, in place, every image that is a copy of a training slice; returns the distances of what stays.

    `images` uint8 [B, S, S] are numbers `ks`, made from noise number `indices`, which is changed too. UserError if an
    image is a copy in each of 20 attempts.
    """
    # Whole batches again, because an image's rounding can depend on its place; only the copies among them are replaced.
    distance, _ = detector.distances(torch.from_numpy(images))
    for attempt in range(1, ATTEMPTS + 1):
        again = is_copy(distance).nonzero()[:, 0].tolist()
        if not again:
            break
        if attempt == ATTEMPTS:
            raise UserError(
                f"image {ks[again[0]]} is a copy of a training slice in each of {ATTEMPTS} attempts: the run has "
                "memorised its data, and nothing that it generates should be published"
            )
        for j in again:
            indices[j] = attempt * 10**9 + ks[j]
        images[again] = generate(indices, ks)()[again]
        fresh, _ = detector.distances(torch.from_numpy(images[again]))
        for name, d in fresh.items():
            distance[name][again] = d
    return distance


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield each item after the next one was started, so that a GPU works on that one meanwhile."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last


def how_made(cfg: PredictConfig, model: StableDiffusion, meta: dict, how: dict, checkpoint: str) -> str:
    """The table of a datasheet: which model made the images, and how."""
    net, set_to = meta["model"], f"; set: {' '.join(cfg.set)}" * bool(cfg.set)
    return f"""| | |
|---|---|
| model | run `{cfg.run}`, weights `{cfg.weights}` ({checkpoint}), trained by code {meta.get("commit", "unknown")} |
| network | U-Net {net["channels"]} on latents {net["in_channels"]}x{net["resolution"]}x{net["resolution"]} |
| trained on | {meta["data"]} |
| classes | {", ".join(meta["classes"])} |
| conditioned on | {"; ".join(map(str, model.attributes)) or "nothing"}{set_to} |
| sampling | {len(how["timesteps"])} steps of {how["solver"]}, eta {how["eta"]:g}, guidance {cfg.guidance:g} |
| seed | {cfg.seed} |
| generated by | code {git_commit()} |"""


def datasheet(cfg: PredictConfig, rows: list[list], made: str) -> str:
    """README.md of the folder OUT: what it holds, how it was `made`, and what was done against copies."""
    # Numbers for the text
    counts = {c: sum(r[1] == c for r in rows) for c in sorted({r[1] for r in rows})}
    again = sum(r[3] >= 10**9 for r in rows)
    copies = "No image was compared with the training slices (--reject-copies does): do not publish them as they are."
    if cfg.reject_copies:
        copies = f"""Every image was compared with every training slice; {again:,} were copies and were generated again.
`pixel_distance` and `latent_distance` in manifest.csv are the distances to the nearest training slice, between aligned
thumbnails and between latents. Their unit is how close slices of two training people come (all but 2 % of the slices of
all but 5 % of the people are further apart): below 1 is a copy, and no image here is below 1."""
    return f"""# Synthetic brain MRI slices

{len(rows):,} generated images ({", ".join(f"{c} {n:,}" for c, n in counts.items())}). **Not for diagnosis.**

{made}

## Copies

{copies}

## Files

`train/CLASS/s<seed>i<index>_0.png`: every image counts as a person of its own, and the folder can be given to `--data`.
`manifest.csv`: file, class, seed, index (the noise of an image depends on seed and index alone), checkpoint, what else
the image was asked to show (in attributes.csv, too, for training), distances.
An index of attempt x 1,000,000,000 + k is image k generated again.
"""


def check_request(cfg: PredictConfig, model: StableDiffusion, classes: list[str]) -> None:
    """UserError for a shard, class, guidance or condition that this run cannot have."""
    given = parse_values(cfg.set, model.attributes, cfg.run)
    if cfg.sweep:
        place, _ = parse_sweep(cfg.sweep, model.attributes, cfg.run)
        if (name := model.attributes[place].name) in given:
            raise UserError(f"--sweep goes through the values of {name}: leave it out of --set")
    if cfg.shard >= cfg.shards:
        raise UserError(f"--shard {cfg.shard} of --shards {cfg.shards} does not exist: they are counted from 0")
    for name in cfg.class_name:
        if name not in classes:
            raise UserError(f"there is no class '{name}' in run {cfg.run}: it has {', '.join(classes)}")
    if cfg.class_name and len(classes) > 1 and place_of(model.attributes, GROUP) is None:
        raise UserError(f"run {cfg.run} does not know the classes and cannot generate one: leave out --class-name")
    if cfg.class_name and any(word.startswith(f"{GROUP}=") for word in cfg.set):
        raise UserError(f"--class-name and --set {GROUP}=... say the same thing: leave out one")
    if cfg.guidance != 1.0 and not model.conditional:
        raise UserError(f"run {cfg.run} is unconditional and has nothing to be guided to: leave out --guidance")
    if cfg.sweep and (cfg.reject_copies or cfg.shards > 1 or cfg.class_name):
        raise UserError(f"--sweep is one image: leave out --reject-copies and --shards, and take --set {GROUP}=NAME")


class Request:
    """What one command asks for: of every image its class, its file, and the row of the manifest that it must have.

    Image k has its class in turn, its other conditions and its noise by (seed, k); the noise by (seed, attempt * 10^9 +
    k) when it is generated again. Public, by k: `conditions` float32 [N, A], `kinds` (names of classes), `files`; and
    `columns`, names of what the manifest says beside that.
    """

    def __init__(
        self, cfg: PredictConfig, model: StableDiffusion, classes: list[str], checkpoint: str, spaces: list[str]
    ):
        self.cfg, self.checkpoint, self.out = cfg, checkpoint, Path(cfg.out)
        attributes, place = model.attributes, place_of(model.attributes, GROUP)
        given = parse_values(cfg.set, attributes, cfg.run)
        self.conditions = draw_rows(attributes, given, cfg.seed, range(cfg.num_images))
        if cfg.class_name and place is not None:
            turn = torch.tensor([attributes[place].encode(name) for name in cfg.class_name])
            self.conditions[:, place] = turn[torch.arange(cfg.num_images) % len(turn)]
        self.kinds = class_names(attributes, self.conditions, classes)
        self.files = [f"train/{self.kinds[k]}/s{cfg.seed}i{k:05d}_0.png" for k in range(cfg.num_images)]
        # What the manifest says besides, in words: the class is there already.
        shown = [i for i in range(len(attributes)) if i != place]
        self.names = [attributes[i].name for i in shown]
        self.words = [[attributes[i].decode(row[i]) for i in shown] for row in self.conditions.tolist()]
        self.columns = [*self.names, *(f"{name}_distance" for name in spaces)]

    def row(self, k: int, index: int, distance: Mapping[str, Tensor], place: int) -> list:
        """The row of the manifest for image k, made from noise `index`; its distances are at `place` of the batch's."""
        own = [f"{d[place]:.4f}" for d in distance.values()]
        return [self.files[k], self.kinds[k], self.cfg.seed, index, self.checkpoint, *self.words[k], *own]

    def is_valid(self, k: int, row: list) -> bool:
        """Is this a row that this command would write about image k?"""
        if k >= self.cfg.num_images or len(row) != 5 + len(self.columns):
            return False
        own = [self.files[k], self.kinds[k], str(self.cfg.seed), self.checkpoint, *self.words[k]]
        return [*row[:3], *row[4 : 5 + len(self.names)]] == own

    def missing(self, rows: dict[int, list]) -> set[int]:
        """Numbers of the images that are not there yet, or that the manifest does not know."""
        return {k for k in range(self.cfg.num_images) if k not in rows or not (self.out / self.files[k]).exists()}

    def blocks(self, batch: int, missing: set[int], rank: int, ranks: int) -> list[list[int]]:
        """This process's share: the whole batches in which an image is missing.

        An image has the same place in the same batch whichever process generates it, because the rounding of a network
        can depend on that.
        """
        mine = range(self.cfg.shard * ranks + rank, -(-self.cfg.num_images // batch), self.cfg.shards * ranks)
        blocks = [list(range(b * batch, min((b + 1) * batch, self.cfg.num_images))) for b in mine]
        return [ks for ks in blocks if missing.intersection(ks)]


def finish_folder(request: Request, rows: dict[int, list], sampler: ImageSampler, made: str) -> None:
    """Write the pictures and the datasheet of a folder that is full, and show the pictures in wandb."""
    cfg, out, side = request.cfg, request.out, sampler.vae.config["image_size"]
    with lock(out):
        # The denoising pictures are of the first two images, of whichever attempt was kept. Their many decoded latents
        # take a CPU as long as a dozen more images.
        if not (out / "denoising.gif").exists():
            first = range(min(2, cfg.num_images))
            indices = [rows[k][3] for k in first]
            steps = sampler.steps(cfg.seed, indices, request.conditions[first])
            visualise_denoising_process(list(steps), sampler.vae.decode, out)  # texture would double their time
        for torn in out.rglob(".*.tmp"):  # left by processes that were killed while they wrote
            torn.unlink(missing_ok=True)
        shown = [read_image(out / request.files[k], side) for k in range(min(cfg.num_images, 64))]
        write_atomic(out / "grid.png", png_bytes(image_grid(np.stack(shown))))
        if request.names:
            lines = [[Path(file).name, *words] for file, words in zip(request.files, request.words)]
            write_atomic(out / "attributes.csv", csv_text(["file", *request.names], lines).encode())
        # The datasheet comes last: a folder that has one is complete.
        write_atomic(out / "README.md", datasheet(cfg, list(rows.values()), made).encode())
    if cfg.wandb != "disabled":
        log = RunLog(out, cfg, "predict")
        log.picture(0, "generated", out / "grid.png")
        log.picture(0, "denoising", out / "denoising.gif")
        log.close()


def sweep(cfg: PredictConfig, sampler: ImageSampler, classes: list[str], checkpoint: str, made: str) -> None:
    """Take image 0 of the seed through the values of one attribute, all else held, into the folder OUT.

    Writes an image for each value, manifest.csv, strip.png (at most twelve of them, and how they differ from the
    first), sweep.gif and README.md.
    """
    attributes, out = sampler.model.attributes, Path(cfg.out)
    if (out / "README.md").exists():
        print(f"{out} is complete")
        return
    # The conditions of every image: those of image 0, but for the attribute that is swept.
    place, codes = parse_sweep(cfg.sweep, attributes, cfg.run)
    rows = draw_rows(attributes, parse_values(cfg.set, attributes, cfg.run), cfg.seed, [0]).repeat(len(codes), 1)
    rows[:, place] = torch.tensor(codes)
    words = [in_words(attributes, row) for row in rows.tolist()]

    # The same noise for all of them
    parts, bar = [], progress_bar(len(rows))
    with bar:
        for part in rows.split(sampler.batch):
            parts.append(sampler(cfg.seed, [0] * len(part), part)[0].cpu().numpy())
            bar.update(len(part))
    images = np.concatenate(parts)

    # Files: images, pictures of them all, and what they are; the datasheet comes last.
    name = attributes[place].name
    files = [f"{name}_{i:04d}.png" for i in range(len(images))]
    for file, image in zip(files, images):
        write_image(out / file, image)
    others = [i for i, a in enumerate(attributes) if a.name != GROUP]
    kinds = class_names(attributes, rows, classes)
    lines = [[f, kind, cfg.seed, 0, checkpoint, *(own[i] for i in others)] for f, kind, own in zip(files, kinds, words)]
    head = ["file", "class", "seed", "index", "checkpoint", *(attributes[i].name for i in others)]
    write_atomic(out / "manifest.csv", csv_text(head, lines).encode())
    chosen = evenly_spaced(len(images), 12)
    change = images[chosen].astype(int) - images[0]
    held = ", ".join(f"{a.name} {words[0][i] or 'unknown'}" for i, a in enumerate(attributes) if i != place)
    shown = {"generated": [*images[chosen]], "minus the first": [*difference_map(change)]}
    title = f"{attributes[place]} ({held})" if held else str(attributes[place])
    table_of_images(out / "strip.png", shown, [words[i][place] for i in chosen], title)
    save_gif(out / "sweep.gif", [*images])
    about = f"""# One synthetic brain MRI slice through the values of {name}

{len(images)} generated images of one noise: `{name}` goes from {words[0][place]} to {words[-1][place]}, and all else is
held ({held or "there is nothing else"}).
They show what the network learnt about `{name}` from the people it was trained on, and nothing about any one person.
**Not for diagnosis.** No image was compared with the training slices.

{made}
"""
    write_atomic(out / "README.md", about.encode())
    print(f"{out / 'strip.png'}, {out / 'sweep.gif'}, {out / 'README.md'}")


def main(cfg: PredictConfig) -> None:
    # The run, and whether it can do what is asked for.
    stop, device = StopSignal(), pick_device(cfg.device)
    rank, ranks, _ = job_ranks()
    folder, out = Path(cfg.checkpoints) / cfg.run, Path(cfg.out)
    if cfg.run == "pretrained" and not folder.exists():
        raise UserError(
            f"there are no pretrained weights in {folder}: go to the folder of this repository, "
            "or name another run with --run"
        )
    model, vae, meta, unet_file = load_run(folder, cfg.weights, device, cfg.precision)
    classes = group_names(model, meta)
    check_request(cfg, model, classes)
    how, checkpoint = plan_sampling(cfg, model), file_hash(unet_file)
    detector = copy_detector(cfg.data, cfg.cache, vae, meta)[0] if cfg.reject_copies else None

    # What decides about the pixels goes on record, and other commands cannot add to the folder. Precision is recorded
    # as it was resolved, because `auto` depends on the device.
    free = ("out", "compile", "device", "wandb", "checkpoints", "data", "cache", "shard", "shards")
    batch = min(cfg.batch_size or (64 if device.type == "cuda" else 16), cfg.num_images)
    command = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(cfg).items() if k not in free}
    precision = str(model.amp_dtype or torch.float32).removeprefix("torch.")
    command |= {"batch_size": batch, "precision": precision}
    for key in ("set", "sweep"):  # as folders have it that were begun before there were these flags
        if not command[key]:
            del command[key]
    if vae.texture is not None:
        command["texture"] = file_hash(folder / "texture" / "best.safetensors")
    claim_folder(out, {**command, **how, "checkpoint": checkpoint})
    made = how_made(cfg, model, meta, how, checkpoint)
    if cfg.sweep:
        return sweep(cfg, ImageSampler(model, vae, batch, cfg.guidance, "off", **how), classes, checkpoint, made)

    # Which images are missing, and which of them are this process's.
    request = Request(cfg, model, classes, checkpoint, list(detector.spaces) if detector else [])
    rows = read_manifest(out, request.is_valid)
    if not (missing := request.missing(rows)) and (out / "README.md").exists():
        print(f"{out} is complete: {cfg.num_images} images")
        return
    blocks = request.blocks(batch, missing, rank, ranks)
    missing &= {k for ks in blocks for k in ks}
    choice = "off" if cfg.compile == "auto" and len(missing) < 2000 else cfg.compile
    sampler = ImageSampler(model, vae, batch, cfg.guidance, choice, **how)

    def generate(indices: list[int], ks: list[int]) -> Callable[[], np.ndarray]:
        """Start to generate images from noise `indices`, of the classes of images ks; the call waits for them."""
        return fetch_async(sampler(cfg.seed, indices, request.conditions[ks])[0])

    # Generate. Files of a batch are written while the next one is generated, and its rows enter the manifest once the
    # files are there. The manifest is written every half minute.
    start, saved_at, bar = time.time(), time.time(), progress_bar(len(missing))
    writing: list[Future[None]] = []
    written: dict[int, list] = {}
    stop.begin()
    with ThreadPoolExecutor(8) as pool, bar:
        for ks, started in one_ahead((ks, generate(ks, ks)) for ks in blocks):
            images, indices = started(), list(ks)
            distance = replace_copies(images, indices, ks, detector, generate) if detector else {}
            for job in writing:
                job.result()
            rows |= written
            fresh = [(j, k) for j, k in enumerate(ks) if k in missing]
            writing = [pool.submit(write_image, out / request.files[k], images[j]) for j, k in fresh]
            written = {k: request.row(k, indices[j], distance, j) for j, k in fresh}
            bar.update(len(fresh))
            if time.time() - saved_at > 30:
                rows, saved_at = add_to_manifest(out, rows, request.columns, request.is_valid), time.time()
            if stop:
                break
        for job in writing:
            job.result()
    rows = add_to_manifest(out, rows | written, request.columns, request.is_valid)

    # Leave after a signal, or when others still have images to generate; the last process finishes the folder.
    seconds, left = time.time() - start, request.missing(rows)
    stop.end()  # all images are saved; a signal that is repeated must not change the exit code
    if stop and left:
        print(f"stopped by {stop.name} with {cfg.num_images - len(left)} images in {out}: the same command goes on")
        sys.exit(130 if stop.name == "SIGINT" else 75)
    print(
        f"{len(missing)} images in {seconds:.1f} s ({len(how['timesteps'])} steps of {how['solver']}, "
        f"{describe_hardware(device)})" + f": {len(left)} are left to others" * bool(left)
    )
    if not left:
        finish_folder(request, rows, sampler, made)
        print(f"{out / 'grid.png'}, {out / 'denoising.gif'}, {out / 'README.md'}")


if __name__ == "__main__":
    run_script(main, cfg)
