"""Show slices as a run thinks they would look otherwise: python edit.py --run R --images FOLDER --set group=AD age=80.

Each slice is encoded, taken back to its noise (`modules.invert`), and generated again with other conditions. Writes
before, after, their difference and the round trip without any change, edits.csv, comparison.png and README.md.
What comes out is what people of the training data with these values look like on average. It is no prognosis.
"""

from __future__ import annotations

from config import EditConfig, parse

if __name__ == "__main__":
    cfg = parse(EditConfig)  # before torch is imported, so that --help answers at once

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conditions import in_words, parse_values
from dataset import IMAGE_TYPES, ADNIDataset, BadFile, Slice, read_attributes, read_slice, to_square
from device import pick_device
from metrics import psnr, unit
from modules import StableDiffusion, invert, make_grid, sample
from people import known_person
from pictures import difference_map, png_bytes, table_of_images, to_uint8
from sampling import load_run, unlikeness
from utils import UserError, csv_text, git_commit, progress_bar, run_script
from vae import VAE
from weights import file_hash, write_atomic

NO_PROGNOSIS = "edited by a generative model: no prognosis, not for diagnosis"


def load_images(where: Path, classes: list[str], side: int) -> tuple[ADNIDataset, list[str]]:
    """The slice of a file, or all slices of a folder at any depth, and sentences about those that cannot be read.

    What is known of them comes from attributes.csv in their folder or up to three above it; the group from the folder
    right above. UserError if nothing can be read.
    """
    if not where.exists() or not str(where):
        raise UserError(
            f"there is no file or folder {str(where)!r}: name a slice, or a folder of slices, with --images"
        )
    files = [where]
    if where.is_dir():
        files = sorted(p for p in where.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
    root = where if where.is_dir() else where.parent

    # Pixels, and who it is: as training data is read
    slices, images, problems = [], [], []
    for path in files:
        try:
            images.append(to_square(read_slice(path)[0], side))
        except BadFile as e:
            problems.append(f"{path}: {e}")
            continue
        scan = path.stem.rpartition("_")[0] or path.stem
        person = known_person(scan) or scan
        slices.append(Slice(path.relative_to(root).as_posix(), "", path.resolve().parent.name, person, (0, 0)))
    if not slices:
        why = problems[0] if problems else f"no {'/'.join(t[1:] for t in IMAGE_TYPES)} file"
        raise UserError(f"{where} holds no slice that can be read: {why}")

    # What is known about them
    above = [p for p in (root, *root.resolve().parents[:3]) if (p / "attributes.csv").exists()]
    known = read_attributes(above[0], slices) if above else None
    names = sorted({*classes, *(s.label for s in slices)})
    pixels = torch.from_numpy(np.stack(images))
    return ADNIDataset(slices, pixels, range(len(slices)), names, known), problems


def plan_steps(cfg: EditConfig, model: StableDiffusion) -> list[int]:
    """The timesteps up and down, ascending. UserError for a student, whose few steps cannot be undone."""
    grid = model.scheduler.config["grid"]
    if grid == "student":
        raise UserError(f"run {cfg.run} was distilled, and its few long steps cannot be undone: take its teacher's run")
    if grid != "full":
        return model.scheduler.fast_timesteps
    try:
        return make_grid("logsnr", cfg.num_steps, model.scheduler.abar).tolist()
    except ValueError as e:
        raise UserError(f"--num-steps {cfg.num_steps}: {e}") from None


@torch.no_grad()
def change(
    model: StableDiffusion, vae: VAE, z: Tensor, before: Tensor, after: Tensor, timesteps: list[int],
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(round trip, edited), images in [-1, 1] [B, 1, S, S], of latents z [B, C, h, w].

    `before` and `after` are conditions [B, A]. Both images come from the same noise, so the network and the decoder
    made both, and their difference is the change alone.
    """
    how: dict[str, Any] = {"timesteps": timesteps, "solver": "ddim"}
    noise, _ = invert(model.denoiser(before), z, model.scheduler, timesteps)
    same = sample(model.denoiser(before), noise, model.scheduler, **how)
    other = sample(model.denoiser(after, guidance, away_from=before), noise, model.scheduler, **how)
    return vae.decode(same), vae.decode(other)


def about(cfg: EditConfig, model: StableDiffusion, meta: dict, timesteps: list[int], checkpoint: str, n: int) -> str:
    """README.md of the folder."""
    return f"""# Edited slices

**The pictures called `before` show the people whose slices were given, and all others derive from them: keep this
folder as private as the slices themselves.** If the slices are synthetic, so are the pictures.

**No prognosis, not for diagnosis.** `after` is what the network makes of a slice when it is told to show
`{" ".join(cfg.set)}`: how people of its training data with these values differ on average. Nothing here says how anybody
will look, or whether anybody is ill.

{n} slices. `_before`: as it was read. `_roundtrip`: to its noise and back without any change, what the method loses.
`_after`: with the change. `_change`: after minus round trip; brighter is orange, darker is blue. edits.csv: what was
known, what was set, PSNR of the round trip and of the VAE alone in dB, largest and mean absolute change (of 255), and
how unlike the training slices a slice is (above 1: more than anybody held out).

| | |
|---|---|
| model | run `{cfg.run}`, weights `{cfg.weights}` ({checkpoint}), trained by code {meta.get("commit", "unknown")} |
| trained on | {meta["data"]} |
| conditioned on | {"; ".join(map(str, model.attributes))} |
| inverted by | DDIM, {len(timesteps)} steps, each undone by fixed-point iteration; generated by the same steps |
| guidance | {cfg.guidance:g} |
| edited by | code {git_commit()} |
"""


def edit(
    cfg: EditConfig, model: StableDiffusion, vae: VAE, x: Tensor, z: Tensor, before: Tensor, after: Tensor,
    timesteps: list[int],
) -> list[tuple[dict[str, np.ndarray], list[str]]]:  # fmt: skip
    """For each image x [B, 1, S, S] with latents z: its pictures by name, and the numbers of edits.csv."""
    same, other = change(model, vae, z, before, after, timesteps, cfg.guidance)
    with torch.no_grad():
        quality = [psnr(unit(image), unit(x)).tolist() for image in (same, vae.decode(z))]
    shown = [to_uint8(image) for image in (x, same, other)]
    change_of = shown[2].astype(int) - shown[1]
    results = []
    for j, change_here in enumerate(change_of):
        pictures = dict(zip(("before", "roundtrip", "after"), (images[j] for images in shown)))
        numbers = (quality[0][j], quality[1][j], np.abs(change_here).max(), np.abs(change_here).mean())
        results.append((pictures | {"change": difference_map(change_here)}, [f"{v:.4g}" for v in numbers]))
    return results


def main(cfg: EditConfig) -> None:
    # The run, what it is to change, and the slices.
    device, out = pick_device(cfg.device), Path(cfg.out)
    model, vae, meta, unet_file = load_run(Path(cfg.checkpoints) / cfg.run, cfg.weights, device, cfg.precision)
    attributes, names = model.attributes, [a.name for a in model.attributes]
    given, known = (parse_values(words, attributes, cfg.run) for words in (cfg.set, cfg.known))
    if not given:
        knows = "; ".join(map(str, attributes)) or "nothing, and cannot edit"
        raise UserError(f"--set says what to change, such as age=80: run {cfg.run} knows {knows}")
    timesteps = plan_steps(cfg, model)
    data, problems = load_images(Path(cfg.images), meta["classes"], vae.config["image_size"])
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is not an empty folder: choose another")
    before = data.conditions(attributes)
    before[:, [names.index(name) for name in known]] = torch.tensor([*known.values()])
    after = before.clone()
    after[:, [names.index(name) for name in given]] = torch.tensor([*given.values()])

    # Edit, a batch at a time, all slices but those that are nothing like the training data.
    lines: list[list[str]] = []
    first: dict[str, dict[str, np.ndarray]] = {}  # the pictures of the first eight
    with progress_bar(len(data)) as bar:
        for index in torch.arange(len(data)).split(cfg.batch_size):
            x = data.batch(index, device)
            with torch.no_grad():
                z = vae.encode(x)[0]
            far = unlikeness(z, meta)
            if far is None and not cfg.unlike:
                raise UserError(f"run {cfg.run} does not know what its training data looked like: add --unlike")
            fits = torch.full((len(x),), True) if far is None or cfg.unlike else far.cpu() <= 1
            for i in index[~fits].tolist():
                problems.append(f"{data.files[i]} is unlike all that the run was trained on (--unlike edits it, too)")
            keep, rows = index[fits], (before[index[fits]].to(device), after[index[fits]].to(device))
            done = edit(cfg, model, vae, x[fits], z[fits], *rows, timesteps) if len(keep) else []
            apart = [""] * len(x) if far is None else [f"{v:.3f}" for v in far.tolist()]
            for i, (pictures, numbers) in zip(keep.tolist(), done):
                name = os.path.splitext(data.files[i])[0].replace("/", "-")
                for kind, image in pictures.items():
                    write_atomic(out / f"{name}_{kind}.png", png_bytes(image), flush=False)
                words = [word for r in (before, after) for word in in_words(attributes, r[i].tolist())]
                lines.append([data.files[i], *words, *numbers, apart[i - int(index[0])]])
                if len(first) < 8:
                    first[name] = pictures
            bar.update(len(index))

    # The table, a picture of the first eight, and what all of it is.
    if lines:
        head = ["file", *(f"{n}_before" for n in names), *(f"{n}_after" for n in names)]
        head += ["psnr_roundtrip", "psnr_vae", "largest_change", "mean_change", "unlikeness"]
        write_atomic(out / "edits.csv", csv_text(head, lines).encode())
        kinds = {"before": "before", "roundtrip": "round trip", "after": " ".join(cfg.set), "change": "change"}
        table = {label: [pictures[kind] for pictures in first.values()] for kind, label in kinds.items()}
        table_of_images(out / "comparison.png", table, [name[-18:] for name in first], NO_PROGNOSIS)
        readme = about(cfg, model, meta, timesteps, file_hash(unet_file), len(lines))
        write_atomic(out / "README.md", readme.encode())
        print(f"{len(lines)} slices edited by {len(timesteps)} steps of DDIM up and down: {out / 'comparison.png'}")
        print("No prognosis: after is how people of the training data with these values differ on average.")
    if problems:
        raise UserError("; ".join(problems[:5]) + f"; and {len(problems) - 5} more" * (len(problems) > 5))


if __name__ == "__main__":
    run_script(main, cfg)
