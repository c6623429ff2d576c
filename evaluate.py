"""Measure generated images: python evaluate.py --run NAME --data DIR, or --images FOLDER for any folder of slices.

Writes report.json {section: {metric: {value, floor, ci_low, ci_high, n}}}, report.md and pictures. For what cannot be
measured there is a sentence; the rest is still measured, and the exit code is then 2. The sections are in evidence.py.
"""

from __future__ import annotations

from config import EvaluateConfig, PredictConfig, parse

if __name__ == "__main__":
    cfg = parse(EvaluateConfig)  # before torch is imported, so that --help answers at once

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster import Ranks
from conditions import GROUP, Attribute, learn_attribute, place_of
from dataset import ADNIDataset, load_splits, load_splits_as_trained, read_images
from device import describe_hardware, pick_device
from evidence import PICTURES, SECTIONS, Evidence, Images
from features import inception
from metrics import TooFew
from modules import StableDiffusion
from pictures import image_grid, png_bytes
from report import refresh_report
from runlog import RunLog
from sampling import ImageSampler, load_run, plan_sampling
from utils import UserError, derive_seed, git_commit, progress_bar, run_script, stratified
from vae import VAE
from weights import file_hash, write_atomic

# What report.md says about each section.
ABOUT = {
    "random_vgg": """Distances from the training slices in 64 features of a VGG-16 with random weights. Less is better
for frechet and kernel, more for the others. Blurred, noised and shuffled are positive controls: held-out slices,
damaged.""",
    "autoencoder": "The same in 64 features of an autoencoder trained on the training people.",
    "inception": "The same in InceptionV3's 2048 features: frechet is FID, kernel is KID.",
    "diversity": """MS-SSIM between pairs of generated images; the floor is that of pairs of training people. Above
the floor, images are more alike than people are.""",
    "unpaired": """Generated against unrelated held-out slices; the floor is training against held-out. They say only
how alike strangers are.""",
    "spectrum": """Mean distance of the radial power spectra from the training slices' in dB, and the signed
difference in the upper half of the frequencies: below 0 is too smooth, above it too noisy.""",
    "two_sample": """A CNN tells generated from training slices, on people and samples it was not trained on: 0.5 is
indistinguishable, 1 is told apart every time. The interval is that of these CNNs and this halving of the people; with
others the value may be outside, as the floor of few people is. auc_of_reconstructed: the same for held-out slices that
went through the run's VAE, and texture if there is one; noised: with noise of the residual's spectrum, which must not
fool it.""",
    "anatomy": """Standardised difference (Cohen's d, generated - training) and earth mover's distance (in standard
deviations of the training slices) of what thresholds measure.""",
    "effects": """How anatomy follows what images were asked to show: coefficients of a linear model on all attributes,
in standard deviations of the training slices; of a number from its lowest value to its highest. The floor is the
training slices' own.""",
    "attributes": """A CNN trained on the training people predicts what an image shows. error: against what was asked
for, in the attribute's unit; slope: of the prediction over what was asked for; accuracy: share predicted as asked for.
The floor is the same CNN on people held out.""",
    "class_difference": "Cohen's d between the first class and the last; the floor is that of the training slices.",
    "class_fidelity": """AUC, on people held out, of a CNN trained on real, on generated, on both; real_to_generated
is the AUC on generated images of the one trained on real. The floor is train_on_real.""",
    "memorisation": """copy_rate is the share of generated images closer to a training slice, in pixels or in latents,
than slices of two training people are, in all but a few people; its floor is the same share of people held out: false
alarms. copy_rate_of_reconstructed is the rate of held-out slices that went through the run's VAE, and its texture if
there is one: what these alone explain. Distances are means, in units of the threshold.""",
    "membership": """AUC, by person, of telling who was trained on by the U-Net's denoising loss, over all of up to ten
timesteps and at each: 0.5 is what should be, 1 would tell everybody. n counts people.""",
    "latent_spread": "Standard deviation of the latents as they were drawn; training latents have 1.",
}
CONTROLS = ("blurred", "noised", "shuffled")


def images_of(data: ADNIDataset, attributes: Sequence[Attribute]) -> Images:
    """A split in the form that the sections of an evaluation take."""
    return Images(torch.as_tensor(data.images), data.labels, np.array(data.people), data.conditions(attributes))


def shared_attributes(train: ADNIDataset, folder: ADNIDataset) -> list[Attribute]:
    """What is known both of the training slices and of a folder's images, as the training slices have it."""
    names = {name for known in folder.known for name in known}
    names &= {name for known in train.known for name in known} if names else set()
    names.discard(GROUP)
    if {*folder.class_names()} <= {*train.classes} and len(train.classes) > 1:
        names.add(GROUP)
    learnt = []
    for name in sorted(names):
        with contextlib.suppress(UserError):  # all the same, or no category
            learnt.append(learn_attribute(name, train.column(name)))
    return learnt


def generate_images(
    cfg: EvaluateConfig, model: StableDiffusion, vae: VAE, y: Tensor, how: dict[str, Any], ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """(uint8 [N, S, S], latents [N, C, h, w]): image k from (seed, k), as predict.py makes it; each rank a share.

    y are conditions [N, A]; `how` is what `plan_sampling` returns.
    """
    sampler = ImageSampler(model, vae, cfg.batch_size, cfg.guidance, **how)
    side, n = vae.config["image_size"], len(y)
    images, latents = torch.empty(n, side, side, dtype=torch.uint8), torch.empty(n, *vae.latent_shape)
    bounds, bar = ranks.row_bounds(n, cfg.batch_size), progress_bar(n, what="generating")
    with bar:
        for k in torch.arange(bounds[ranks.rank], bounds[ranks.rank + 1]).split(cfg.batch_size):
            if len(k):  # a rank may have no share
                images[k], latents[k] = (part.cpu() for part in sampler(cfg.seed, k.tolist(), y[k]))
            bar.update(len(k) * ranks.size)
    ranks.all_gather_rows(images, bounds)
    ranks.all_gather_rows(latents, bounds)
    return images, latents


def gather(cfg: EvaluateConfig, ranks: Ranks) -> Evidence:
    """Load the data, split as the run split it, and generate images with the run or read them from a folder."""
    device, run = ranks.device, cfg.run
    out = Path(cfg.out or (Path(cfg.checkpoints) / run / "report" if run and not cfg.images else "report"))
    loaded = load_run(Path(cfg.checkpoints) / run, cfg.weights, device, cfg.precision) if run else None
    if loaded and cfg.guidance != 1.0 and not cfg.images and not loaded[0].conditional:
        raise UserError(f"run {run} is unconditional and has nothing to be guided to: leave out --guidance")

    # A folder's images decide the size at which everything is measured; they are read first.
    problems: list[str] = []
    if cfg.images:
        folder, problems = read_images(Path(cfg.images))
        pixels, side = folder.images, folder.images.shape[-1]
    else:
        assert loaded is not None  # main names a run where no folder is named
        side = loaded[1].config["image_size"]
    splits = load_splits_as_trained(cfg.data, cfg.cache, loaded[2], side) if loaded else load_splits(cfg, side)[0]
    if cfg.held_out == "test" and "test" not in splits:
        raise UserError(f"{cfg.data} has no test/ folder: take --held-out val")
    held_out = splits["val"] if cfg.held_out == "val" else splits.get("test", splits["val"])
    for name, data in (("train on", splits["train"]), ("hold out", held_out)):
        if len(set(data.people)) < 2:
            raise UserError(f"{cfg.data} has one person to {name}: floors and intervals need at least two")
    classes = splits["train"].classes
    attributes = loaded[0].attributes if loaded else shared_attributes(splits["train"], folder)
    train = images_of(splits["train"], attributes)
    assert train.conditions is not None
    for i, attribute in enumerate(attributes):
        if train.conditions[:, i].isnan().all():
            problems.append(
                f"{cfg.data} no longer says the {attribute.name} of its slices, on which the run was trained"
            )

    # The generated images and their labels, -1 where the class is unknown.
    latents = None
    if cfg.images or loaded is None:
        index = [classes.index(name) if name in classes else -1 for name in folder.class_names()]
        labels = torch.zeros(len(index), dtype=torch.int64) if len(classes) == 1 else torch.tensor(index)
        y = folder.conditions(attributes)
        source = f"the folder {Path(cfg.images or '').name}"
    else:
        model, vae, meta, file = loaded
        # What training slices have, so that conditions are distributed, and go together, as in the data; spread over
        # all of them, because an accidental surplus of high levels would count as a distance from people.
        chosen = torch.from_numpy(stratified(len(train), cfg.num_images, derive_seed(cfg.seed, 8)))
        labels, y = train.labels[chosen], train.conditions[chosen]
        sampling = PredictConfig(run=str(run), num_steps=cfg.num_steps, solver=cfg.solver, eta=cfg.eta)
        how = plan_sampling(sampling, model)
        pixels, latents = generate_images(cfg, model, vae, y, how, ranks)
        if len(classes) > 1 and place_of(model.attributes, GROUP) is None:
            labels = torch.full_like(labels, -1)
        drawn = file_hash(file.parent.parent / "texture" / "best.safetensors") if vae.texture else "none"
        dtype = str(model.amp_dtype or torch.float32).removeprefix("torch.")
        source = (
            f"run {run}, {cfg.weights} weights ({file_hash(file)}, epoch {meta.get('epoch')}, code "
            f"{meta.get('commit')}), {len(how['timesteps'])} steps of {how['solver']}, eta {how['eta']:g}, guidance "
            f"{cfg.guidance:g}, texture {drawn}, {dtype}, seed {cfg.seed}"
        )
    generated = Images(pixels, labels, np.arange(len(labels)).astype(str), y)
    model_of, vae_of = loaded[:2] if loaded else (None, None)
    return Evidence(
        train, images_of(held_out, attributes), generated, classes, cfg, device, out, model_of, vae_of, latents,
        attributes, source, problems=problems,
    )  # fmt: skip


def rows_of(report: dict) -> dict[str, list[list[str]]]:
    """{section: rows of [metric, value, interval, floor, n, blurred, noised, shuffled]}, controls beside what they
    control."""
    sections: dict[str, list[list[str]]] = {}
    for section, metrics in report.items():
        if section.rpartition("_")[2] in CONTROLS:
            continue
        for metric, r in metrics.items():
            beside = [report[f"{section}_{c}"][metric]["value"] for c in CONTROLS if f"{section}_{c}" in report]
            ends = f"{r['ci_low']:.4g} … {r['ci_high']:.4g}"
            cells = [metric, f"{r['value']:.4g}", ends, f"{r['floor']:.4g}", f"{r['n']:g}"]
            sections.setdefault(section, []).append(cells + [f"{v:.4g}" for v in beside])
    return sections


def table(report: dict) -> str:
    """The report for the screen."""
    lines = []
    for section, rows in rows_of(report).items():
        head = [section, "value", "95 % interval", "floor", "n", *CONTROLS][: len(rows[0])]
        lines += [f"{a:<28}{b:>10}{c:>22}" + "".join(f"{x:>10}" for x in rest) for a, b, c, *rest in (head, *rows)]
        lines.append("")
    return "\n".join(lines)


def markdown(e: Evidence, facts: dict) -> str:
    """report.md."""
    lines = [
        "# Evaluation",
        "",
        f"Images of {e.source}.",
        "",
        f"{facts['generated']} against {facts['train']} to train on and {facts['held out']} held out, {facts['size']}. "
        f"{facts['date']}, {facts['hardware']}, code {facts['commit']}, {facts['seconds']:.0f} s.",
        "",
        "The **floor** is the same number with the people held out in the place of the generated images. Intervals "
        f"(95 %) are by bootstrap over people, {e.cfg.resamples} resamples. More: docs/evaluation.md.",
    ]
    lines += [f"\n> {p}" for p in e.problems + e.notes]
    for section, rows in rows_of(e.report).items():
        head = ["", "value", "95 % interval", "floor", "n", *CONTROLS][: len(rows[0])]
        lines += ["", f"## {section}", "", *([ABOUT[section], ""] if section in ABOUT else [])]
        lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", *(f"![{name}]({name})" for name in PICTURES if (e.out / name).exists())]
    return "\n".join(lines) + "\n"


def main(cfg: EvaluateConfig) -> None:
    start = time.time()
    if cfg.run is None and not cfg.images:
        cfg = replace(cfg, run="adni")
    if cfg.images and (cfg.num_steps, cfg.eta, cfg.guidance) != (None, None, 1.0):
        raise UserError("--num-steps, --eta and --guidance are for generating: leave them out, or leave out --images")
    if cfg.inception_weights:
        inception(cfg.inception_weights, pick_device(cfg.device))  # a wrong file is refused before any work
    ranks = Ranks(pick_device(cfg.device))
    e = gather(cfg, ranks)
    ranks.close()
    if not ranks.is_main:  # the ranks generated together; rank 0 measures
        return

    # Measure, section by section.
    for name in PICTURES:  # an earlier report may have had more
        (e.out / name).unlink(missing_ok=True)
    for section in SECTIONS:
        try:
            section(e)
        except TooFew as problem:
            e.problems.append(str(problem))

    # Write the report and its pictures, and log them.
    write_atomic(e.out / "generated.png", png_bytes(image_grid(e.generated.sample(36, cfg.seed).pixels.numpy())))
    side = e.train.pixels.shape[-1]
    facts = {
        "generated": f"{len(e.generated):,} generated images", "size": f"{side}x{side}",
        "train": f"{len(e.train):,} slices of {len(set(e.train.people)):,} people",
        "held out": f"{len(e.held_out):,} slices of {len(set(e.held_out.people)):,} people",
        "date": time.strftime("%Y-%m-%d"), "hardware": describe_hardware(e.device), "commit": git_commit(),
        "seconds": time.time() - start,
    }  # fmt: skip
    write_atomic(e.out / "report.json", json.dumps(e.report, indent=1).encode())
    write_atomic(e.out / "report.md", markdown(e, facts).encode(errors="backslashreplace"))
    log = RunLog(e.out, replace(cfg, run=cfg.run or Path(cfg.images or "").name), "evaluate")
    log.log(0, {f"{s}/{m}": r["value"] for s, rows in e.report.items() for m, r in rows.items()})
    for name in PICTURES:
        if (e.out / name).exists():
            log.picture(0, name.removesuffix(".png"), e.out / name, people=name == "closest_pairs.png")
    log.close()
    print(table(e.report), *e.notes, sep="\n")
    if cfg.run:
        refresh_report(Path(cfg.checkpoints) / cfg.run)
    print(f"done in {facts['seconds']:.0f} s: {e.out / 'report.md'}, {e.out / 'report.json'}")
    if e.problems:
        raise UserError("; ".join(e.problems))


if __name__ == "__main__":
    run_script(main, cfg)
