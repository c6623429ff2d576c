"""A page to generate slices on: python app.py, then open http://127.0.0.1:7860.

It shows images and how they come about, the nearest training slice beside each, a walk between two seeds, one seed
guided from one class to another or through the values of an attribute, and it changes a slice that is uploaded.
Everything stays on this machine.
"""

from __future__ import annotations

from config import AppConfig, PredictConfig, Solver, parse

if __name__ == "__main__":
    cfg = parse(AppConfig)  # before torch is imported, so that --help answers at once

import inspect
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from conditions import GROUP, Attribute, draw_rows, in_words, parse_values, place_of, set_values
from dataset import BadFile, phantom_drawing, read_slice, to_float, to_square
from device import pick_device
from metrics import CopyDetector
from modules import sample_steps, start_noise
from pictures import denoising_strip, difference_map, png_bytes, to_uint8
from sampling import (
    class_names,
    copy_detector,
    edit_latents,
    group_names,
    load_run,
    plan_inversion,
    plan_sampling,
    unlikeness,
)
from utils import UserError, csv_text, evenly_spaced, run_script
from weights import file_hash

if TYPE_CHECKING:
    import gradio as gr

LIMITS = """
Synthetic images, for research. **Not for diagnosis**: nothing here says anything about a person, and a class is only
the label that the training data had. An image can resemble a training slice; look at its distance before you share it.
"""
CONTENT_SECURITY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; frame-ancestors 'self'"
)
CSS = """
.gradio-container { max-width: 1100px !important; margin: auto }
.shown .image-container { padding-top: 2rem }
.shown button:has(img), .shown .image-frame, .shown img { width: 100% !important; height: 100% !important }
.shown img { object-fit: contain !important }
.grid-wrap { padding-top: 2rem !important }
.min_value, .max_value { color: var(--neutral-600) !important }
button[role=tab][aria-selected=true] { color: var(--primary-700) !important }
.dark button[role=tab][aria-selected=true] { color: var(--primary-300) !important }
.dark .min_value, .dark .max_value { color: var(--neutral-300) !important }
.thumbnail-lg { aspect-ratio: auto !important; height: auto !important; display: block !important }
.thumbnail-lg > img { aspect-ratio: 1; height: auto !important }
.caption-label { position: static !important; max-width: 100% !important; white-space: normal !important }
.caption-label { font-size: 0.8rem !important }
"""
MAX_SEED = 10**9  # of what a visitor may ask for
AS_IT_IS = "as it is"  # the class of a slice that is changed


# ---------------------------------------------------------------------------------------------------------------------
# What the page can do


def import_gradio() -> ModuleType:
    """gradio, told before its first import to send nothing anywhere and to ask for nothing from anywhere."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio

    # A request can name an address in place of an uploaded file, and gradio would fetch it.
    processing: Any = gradio.processing_utils
    processing.async_ssrf_protected_get = fetch_nothing
    return gradio


async def fetch_nothing(url: str) -> None:
    raise UserError("This page takes files, and no addresses")


class Run:
    """One trained run, ready to generate with. Its copy detector is made in the background, if its data is there."""

    def __init__(self, cfg: AppConfig, name: str):
        self.name, self.device, self.cfg = name, pick_device(cfg.device), cfg
        folder = Path(cfg.checkpoints) / name
        self.model, self.vae, self.meta, file = load_run(folder, cfg.weights, self.device, cfg.precision)
        self.checkpoint, self.classes = file_hash(file), group_names(self.model, self.meta)
        # What the page lets a visitor choose: a class, and steps and sampler if the weights know every timestep.
        self.group = place_of(self.model.attributes, GROUP)
        self.has_classes = self.group is not None
        self.free = self.model.scheduler.config["grid"] == "full"  # any number of steps, either solver
        self.default_steps = len(self.how(None, None)["timesteps"])
        trained_on = str(self.meta.get("config", {}).get("data"))
        self.phantom = bool(phantom_drawing(trained_on))
        self.detector: CopyDetector | None = None
        self.training: Tensor | None = None
        self.data = trained_on if self.phantom else cfg.data
        self.why_none = "The run's data is not known (--data), so nothing is compared with the training slices."
        if self.data:
            self.why_none = "Still reading the training slices; generate again in a moment to compare with them."

    def learn_copies(self) -> None:
        """Make the copy detector. That takes minutes with much data, so it runs while the page is in use already."""
        if not self.data:
            return
        try:
            detector, self.training = copy_detector(self.data, self.cfg.cache, self.vae, self.meta)
            self.detector = detector  # set last: whoever sees it also finds `training`
        except Exception as e:  # the page goes on without it
            self.why_none = f"Nothing is compared with the training slices: {e}"

    def how(self, steps: int | None, solver: Any) -> dict[str, Any]:
        """timesteps, solver and eta for `sample`."""
        base = PredictConfig(run=self.name)
        return plan_sampling(replace(base, num_steps=steps, solver=solver) if self.free else base, self.model)

    def noise(self, seed: int, indices: list[int]) -> tuple[Tensor, Iterator[Tensor]]:
        """x_T of these images, the same as predict.py's, and the noise of the steps."""
        return start_noise(seed, indices, self.vae.latent_shape)

    def steps(
        self, x: Tensor, noise: Iterator[Tensor], y: Tensor, how: dict, guidance: float = 1.0,
        away_from: Tensor | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
        """(t, x_t, x0) after every step from this x_T under conditions y [B, A], as `sample_steps` yields them."""
        away_from = None if away_from is None else away_from.to(self.device)
        denoise = self.model.denoiser(y.to(self.device), guidance, away_from)
        return sample_steps(denoise, x.to(self.device), self.model.scheduler, noise=noise, **how)

    @torch.no_grad()
    def images(self, latents: Tensor, seed: int, indices: Sequence[int]) -> np.ndarray:
        """Latents [N, C, h, w] -> images, uint8 [N, S, S], with the texture of images number `indices` of the seed."""
        return to_uint8(self.vae.decode(latents, self.vae.texture_noise(seed, indices)))

    def generate(self, seed: int, *args: Any, **kwargs: Any) -> np.ndarray:
        """The images at the end of `steps`, which takes the further arguments, all with the texture of image 0."""
        *_, (_, latents, _) = self.steps(*args, **kwargs)
        return self.images(latents, seed, [0] * len(latents))

    @torch.no_grad()
    def look(self, x_t: Tensor, x0: Tensor) -> np.ndarray:
        """Latents [1, C, h, w] of one step, noisy and estimated, -> both as images, uint8 [2, 1, S, S]."""
        return to_uint8(self.vae.decode(torch.cat([x_t, x0])))[:, None]  # texture would not be seen at this size


class Studio:
    """What the page's buttons do. Every method checks its arguments, because a request need not come from the page."""

    def __init__(self, cfg: AppConfig):
        self.cfg = cfg
        self.runs = {name: Run(cfg, name) for name in cfg.run}
        # The attributes that the page has a control for, besides the class: of all runs, the chosen run's are shown.
        self.controls = [(r.name, a) for r in self.runs.values() for a in r.model.attributes if a.name != GROUP]
        # Downloads, and the pictures that gradio keeps (uploads and training slices among them), lie in a folder that
        # only this user can read and that goes with the process. Remove the folders of processes that were killed.
        for old in Path(tempfile.gettempdir()).glob("slices-[0-9]*-*"):
            if old.stat().st_uid == os.getuid() and not is_alive(int(old.name.split("-")[1])):
                shutil.rmtree(old, ignore_errors=True)
        self.holder = tempfile.TemporaryDirectory(prefix=f"slices-{os.getpid()}-")
        self.folder = Path(self.holder.name)
        os.environ["GRADIO_TEMP_DIR"] = str(self.folder / "pictures")

    def learn_copies(self) -> None:
        """Make the copy detectors of all runs, one after the other."""
        for run in self.runs.values():
            run.learn_copies()

    def run(self, name: str) -> Run:
        if name not in self.runs:
            raise UserError(f"there is no run {name!r} on this page")
        return self.runs[name]

    def number(self, value: Any, what: str, low: float, high: float, kind: type = int) -> Any:
        """Return the value as a number. UserError if it is none, or not between low and high."""
        try:
            # 1.5 images are refused, not rounded; NaN fails every comparison.
            number = kind(value)
            if number != float(value) or not low <= number <= high:
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            shown = "nothing" if value is None else repr(value)[:30]
            whole = "a whole number" if kind is int else "a number"
            raise UserError(f"{what} must be {whole} from {low:,} to {high:,}, not {shown}") from None
        return number

    def asked(self, name: str, steps: Any, solver: str, guidance: Any) -> tuple[Run, dict, float]:
        run = self.run(name)
        steps = self.number(steps, "Steps", 2, self.cfg.max_steps) if run.free else run.default_steps
        if solver not in get_args(Solver):
            raise UserError(f"Sampler must be one of {', '.join(get_args(Solver))}")
        guidance = self.number(guidance, "Guidance", 0, 10, float) if run.model.conditional else 1.0
        return run, run.how(steps, solver), guidance

    def given(self, run: Run, class_name: str | None, asked: Sequence[Any] = ()) -> dict[str, float]:
        """{attribute: code} of what a visitor set: the class, and of the page's controls those of this run.

        `asked` are the values of all controls, in the order of `self.controls`; None and "" are "any".
        """
        attributes, given = run.model.attributes, {}
        if run.group is not None and class_name != AS_IT_IS:
            if class_name not in run.classes:
                raise UserError(f"Class must be one of {', '.join(run.classes)}")
            given[GROUP] = attributes[run.group].encode(str(class_name))
        for (name, attribute), value in zip(self.controls, asked):
            if name == run.name and value is not None and str(value).strip():
                given[attribute.name] = attribute.encode(str(value).strip()[:40])
        return given

    def conditions(
        self, run: Run, class_name: str | None, seed: int, count: int = 1, asked: Sequence[Any] = ()
    ) -> Tensor:
        """Conditions [count, A] of images of this seed: what was asked for, and the others drawn."""
        return draw_rows(run.model.attributes, self.given(run, class_name, asked), seed, range(count))

    def generate(
        self, name: str, class_name: str, count: Any, seed: Any, steps: Any, solver: str, guidance: Any, *asked: Any
    ) -> Iterator[tuple]:
        """Generate images, and yield (denoising strip, gallery, words, file to download) as they come about."""
        gr = import_gradio()
        run, how, guidance = self.asked(name, steps, solver, guidance)
        count = self.number(count, "Images", 1, self.cfg.max_images)
        seed = self.number(seed, "Seed", 0, MAX_SEED)
        y = self.conditions(run, class_name, seed, count, asked)
        start, total = time.time(), len(how["timesteps"])

        # While the steps are taken, show image 0 at up to ten of them. Decoding takes longer than a step, so only these
        # are decoded, and each of them once.
        x, noise = run.noise(seed, list(range(count)))
        kept, seen, shown = evenly_spaced(total, 10), [], 0.0
        for done, (_, latents, x0) in enumerate(run.steps(x, noise, y, how, guidance), 1):
            strip, pictured = gr.skip(), done - 1 in kept
            if pictured:
                seen.append(run.look(latents[:1], x0[:1]))
                strip = denoising_strip(*np.stack(seen, axis=1))
            if pictured or time.time() - shown > 0.25:
                yield strip, gr.skip(), f"Step {done} of {total}", gr.skip()
                shown = time.time()
        images = run.images(latents, seed, range(count))
        seconds = time.time() - start

        # The gallery: each image, and beside it the training slice nearest to it.
        kind, gallery = class_names(run.model.attributes, y, run.classes)[0], []
        rows = [[f"s{seed}i{k:05d}_0.png", kind, seed, k] for k in range(count)]
        others = [i for i in range(len(run.model.attributes)) if i != run.group]
        words_of = [[in_words(run.model.attributes, row)[i] for i in others] for row in y.tolist()]
        words = f"{count} image{'s' * (count > 1)} in {seconds:.1f} s ({total} steps of {how['solver']})."
        detector = run.detector  # read once: it may be set meanwhile
        distance, closest = detector.distances(torch.from_numpy(images)) if detector else ({}, None)
        for k, image in enumerate(images):
            shows = ", ".join(f"{run.model.attributes[i].name} {word or '?'}" for i, word in zip(others, words_of[k]))
            gallery.append((image, f"{kind}, seed {seed}, image {k}{'; ' * bool(shows)}{shows}"))
            rows[k] += words_of[k]
            if closest is not None and run.training is not None:
                near = min(d[k].item() for d in distance.values())
                rows[k].append(f"{near:.4f}")
                slice_ = run.training[closest[k]].numpy()
                gallery.append((slice_, f"nearest training slice: {near:.2f}{' (a copy?)' * (near < 1)}"))
        words += " Distances: two people hardly ever come below 1." if detector else f" {run.why_none}"
        file = gr.DownloadButton(value=self.archive(run, images, rows, how, guidance), interactive=True)
        yield strip, gallery, words, file

    def archive(self, run: Run, images: np.ndarray, rows: list[list], how: dict, guidance: float) -> str:
        """Write a ZIP of the images as PNG with a manifest and a note, without training slices; returns its path."""
        # The table has a column of distances only if they were measured.
        names = [a.name for a in run.model.attributes if a.name != GROUP]
        measured = len(rows[0]) > 4 + len(names)
        head = ["file", "class", "seed", "index", *names, *["distance"] * measured, "run", "checkpoint"]
        table = csv_text(head, ([*r, run.name, run.checkpoint] for r in rows))
        note = (
            f"Synthetic slices of the run {run.name} (weights {run.checkpoint}), {len(how['timesteps'])} steps of "
            f"{how['solver']}, guidance {guidance:g}. Not for diagnosis.\n"
            "distance: to the nearest training slice. Slices of two people hardly ever come closer than 1; less "
            "is a copy. Without that column nothing was compared: do not publish the images as they are.\n"
        )
        path = self.folder / f"slices-{time.time_ns()}.zip"
        with zipfile.ZipFile(path, "w") as z:
            for (file, *_), image in zip(rows, images):
                z.writestr(file, png_bytes(image))
            z.writestr("manifest.csv", table)
            z.writestr("README.txt", note)
        # The last fifty can still be downloaded.
        for old in sorted(self.folder.glob("*.zip"))[:-50]:
            old.unlink(missing_ok=True)
        return str(path)

    def walk(
        self, name: str, class_name: str, seed_a: Any, seed_b: Any, place: Any, steps: Any, solver: str, guidance: Any,
        *asked: Any,
    ) -> tuple[np.ndarray, str]:  # fmt: skip
        """(image, words) between two seeds: their noise is mixed on the sphere on which both lie, and so are numbers
        that each of them draws; categories change half way."""
        run, how, guidance = self.asked(name, steps, solver, guidance)
        a, b = (self.number(s, "Seed", 0, MAX_SEED) for s in (seed_a, seed_b))
        place = self.number(place, "Place", 0, 1, float)
        (x_a, more_a), (x_b, more_b) = run.noise(a, [0]), run.noise(b, [0])
        noise = (slerp(*pair, place) for pair in zip(more_a, more_b))
        y_a, y_b = (self.conditions(run, class_name, s, asked=asked) for s in (a, b))
        numbers = torch.tensor([not attribute.values for attribute in run.model.attributes], dtype=torch.bool)
        y = torch.where(numbers, torch.lerp(y_a, y_b, place), y_a if place < 0.5 else y_b)
        image = run.generate(a if place < 0.5 else b, slerp(x_a, x_b, place), noise, y, how, guidance)[0]
        return image, f"{1 - place:.0%} of seed {a}, {place:.0%} of seed {b}"

    def sweep(
        self, name: str, class_name: str, what: str, place: Any, seed: Any, steps: Any, solver: str, guidance: Any,
        *asked: Any,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:  # fmt: skip
        """(image at the lowest value of an attribute, image here, their difference, words): one noise, all else held.

        `place` is the share of the way from the lowest value of the training data to the highest.
        """
        run, how, guidance = self.asked(name, steps, solver, guidance)
        column = place_of(run.model.attributes, what or "")
        if column is None or run.model.attributes[column].values:
            raise UserError(f"The run {name} has no number {what!r} to go through")
        seed, place = self.number(seed, "Seed", 0, MAX_SEED), self.number(place, "Place", 0, 1, float)
        y = self.conditions(run, class_name, seed, 1, asked).repeat(2, 1)
        y[:, column] = torch.tensor([-1.0, 2 * place - 1])
        images = run.generate(seed, *run.noise(seed, [0, 0]), y, how, guidance)
        attribute = run.model.attributes[column]
        words = f"{what} {attribute.decode(2 * place - 1)} {attribute.unit}, beside {attribute.decode(-1.0)}"
        return images[0], images[1], difference_map(images[1].astype(int) - images[0]), words

    def change(
        self, name: str, class_name: str, file: str | None, known: str, *asked: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str, None]:
        """(slice as it was read, changed, the change, words, None) of an uploaded file, which is deleted at once.

        It is changed to what a visitor set; `known` says in words what it is, as in age=62 sex=M. The None empties the
        field of the file.
        """
        run = self.run(name)
        if not run.model.conditional:
            raise UserError(f"The run {name} knows no attributes and cannot change a slice")
        # Only what was uploaded: a request that does not come from the page could name any file of this machine.
        if not file or not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(self.folder)):
            raise UserError("Choose a slice first: a PNG, JPEG or TIFF file")
        # The conditions before, as far as they are known, and after. What is wrong here leaves the file there.
        attributes = run.model.attributes
        try:
            said = parse_values(shlex.split(str(known or "")[:200]), attributes, name)
        except ValueError as e:  # a quotation mark that is not closed
            raise UserError(f"What is known of the slice cannot be read: {e}") from None
        before = set_values(torch.full((1, len(attributes)), math.nan), attributes, said)
        after = set_values(before, attributes, self.given(run, class_name, asked))
        before, after = before.to(run.device), after.to(run.device)
        try:
            x = to_square(read_slice(file)[0], run.vae.config["image_size"])
        except (BadFile, OSError) as e:
            raise UserError(f"This file cannot be used, choose it again or another: {e}") from None
        finally:
            Path(file).unlink(missing_ok=True)
        timesteps = plan_inversion(run.model, min(30, self.cfg.max_steps), name)
        with torch.no_grad():
            z = run.vae.encode(to_float(torch.from_numpy(x)[None]).to(run.device))[0]
        far = unlikeness(z, run.meta)
        if far is None:
            raise UserError(
                f"The run {name} does not know what its training data looked like, and so it changes nothing"
            )
        if not far.item() <= 1:
            raise UserError("This image is unlike all slices that the run was trained on, and so it is not changed")
        same, other = (to_uint8(image)[0] for image in edit_latents(run.model, run.vae, z, before, after, timesteps))
        change = other.astype(int) - same
        shown = ", ".join(
            f"{a.name} {w or 'unknown'}" for a, w in zip(attributes, in_words(attributes, after[0].tolist()))
        )
        words = (
            f"Now: {shown}. Mean change {np.abs(change).mean():.1f} of 255. **No prognosis**: on average, people of "
            "the training data with these values differ so."
        )
        return x, other, difference_map(change), words, None

    def between_classes(
        self, name: str, start: str, end: str, seed: Any, place: Any, steps: Any, solver: str, *asked: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """(image of the first class, image, their difference, words): one noise, guided from one class to another."""
        run, how, _ = self.asked(name, steps, solver, 1.0)
        if not run.has_classes:
            raise UserError(f"the run {name} knows one class only: choose one with classes")
        seed, place = self.number(seed, "Seed", 0, MAX_SEED), self.number(place, "Place", 0, 2, float)
        y0, y1 = (self.conditions(run, class_name, seed, asked=asked) for class_name in (start, end))
        # The same noise twice: guided all to the first class (w = 0), and on the way to the second.
        images = []
        for w in (0.0, place):
            x, noise = run.noise(seed, [0])
            images.append(run.generate(seed, x, noise, y1, how, w, away_from=y0)[0])
        change = images[1].astype(int) - images[0]
        words = f"{place:.0%} of the way from {start} to {end}; largest change {np.abs(change).max()} of 255"
        return images[0], images[1], difference_map(change), words


def is_alive(pid: int) -> bool:
    """Is there a process of this number, whoever's it is?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def slerp(a: Tensor, b: Tensor, place: float) -> Tensor:
    """The point at `place` in [0, 1] on the great circle from a to b, so that its norm is that of noise."""
    angle = torch.arccos((a.flatten() @ b.flatten() / (a.norm() * b.norm())).clamp(-1, 1))
    if angle < 1e-4:
        return a
    return (torch.sin((1 - place) * angle) * a + torch.sin(place * angle) * b) / torch.sin(angle)


def answered(f: Callable) -> Callable:
    """f, but its errors become a sentence on the page, and the next request is served as usual."""
    gr = import_gradio()

    def sentence(e: Exception) -> Exception:
        if not isinstance(e, UserError):
            traceback.print_exception(e)
        text = str(e) if isinstance(e, UserError) else "This request failed; the terminal that runs app.py says why."
        return gr.Error(text[0].upper() + text[1:], duration=10, print_exception=False)

    def call(*args: Any) -> Any:
        try:
            return f(*args)
        except Exception as e:
            raise sentence(e) from None

    def stream(*args: Any) -> Iterator:
        try:
            yield from f(*args)
        except Exception as e:
            raise sentence(e) from None

    return stream if inspect.isgeneratorfunction(f) else call


# ---------------------------------------------------------------------------------------------------------------------
# The page

# What all pictures have in common: they can be downloaded, and nothing can be uploaded in their place.
PICTURE: dict[str, Any] = {"format": "png", "interactive": False, "buttons": ["download"], "elem_classes": "shown"}


def run_steps(cfg: AppConfig, run: Run) -> tuple[int, int, int]:
    """(fewest, most, default) steps that the page offers. A student has its own number, which may be 1."""
    n = run.default_steps
    return (2, cfg.max_steps, min(n, cfg.max_steps)) if run.free else (1, max(2, n), n)


def describe_run(run: Run) -> str:
    """The line below the choice of runs."""
    side, data = run.vae.config["image_size"], run.meta.get("data", "unknown data")
    data = f"phantoms, which are no people: {data}" if run.phantom else data
    return f"Trained on {data}; {side}x{side} pixels; weights {run.checkpoint}"


def settings_part(cfg: AppConfig, studio: Studio, first: Run) -> dict[str, Any]:
    """Run and class, and, folded away, how images are generated; its components by name."""
    gr = import_gradio()
    with gr.Row():
        name = gr.Radio(list(studio.runs), value=first.name, label="Run", info="Which weights generate")
        class_name = gr.Radio(
            first.classes, value=first.classes[0], label="Class", visible=first.has_classes,
            info="A label of the training data, no finding",
        )  # fmt: skip
    facts = gr.Markdown(describe_run(first))
    with gr.Row():
        controls = [attribute_control(attribute, owner == first.name) for owner, attribute in studio.controls]
    with gr.Accordion("How it is generated", open=False), gr.Row():
        steps = gr.Slider(
            *run_steps(cfg, first), step=1, label="Steps", interactive=first.free, info="Twenty suffice"
        )  # fmt: skip
        solver = gr.Radio(list(get_args(Solver)), value="dpm++2m", label="Sampler", interactive=first.free)
        guidance = gr.Slider(
            0, 5, 1, step=0.25, label="Guidance", visible=first.model.conditional,
            info="1: none; more follows class and values more",
        )  # fmt: skip
    return {
        "name": name, "class_name": class_name, "facts": facts, "steps": steps, "solver": solver, "guidance": guidance,
        "controls": controls,
    }  # fmt: skip


def attribute_control(attribute: Attribute, visible: bool) -> gr.Component:
    """What a visitor sets an attribute with; "" is "any": drawn as it was in training."""
    gr = import_gradio()
    label = f"{attribute.name}{f' ({attribute.unit})' * bool(attribute.unit)}"
    if attribute.values:
        choices = [("any", ""), *((value, value) for value in attribute.values)]
        return gr.Radio(choices, value="", label=label, visible=visible)
    low, high = attribute.quantiles[0], attribute.quantiles[-1]
    # No gr.Number: it shows and sends 0 where nothing was put in.
    return gr.Textbox("", label=label, info=f"{low:g} to {high:g}; empty: any", visible=visible, max_lines=1)


def numbers_of(run: Run) -> list[str]:
    """The attributes of a run that a sweep can go through."""
    return [a.name for a in run.model.attributes if not a.values]


def sweep_tab(first: Run, visible: bool) -> dict[str, Any]:
    """The tab that takes one seed through the values of a number; its components by name."""
    gr = import_gradio()
    sized, names = {**PICTURE, "height": 360}, numbers_of(first)
    with gr.Tab("Sweep", visible=visible) as tab:
        gr.Markdown("One seed, all else held: the same noise through the values of one attribute.")
        with gr.Row():
            what = gr.Radio(names, value=names[0] if names else None, label="Attribute")
            seed = gr.Number(0, label="Seed of the sweep")
        place = gr.Slider(0, 1, 0.5, step=0.05, label="From the lowest value to the highest")
        words = gr.Markdown("", elem_id="swept")
        with gr.Row():
            lowest = gr.Image(label="Lowest value", alt_text="The slice at the lowest value", **sized)
            here = gr.Image(label="Here", alt_text="The same noise at the value chosen", **sized)
            change = gr.Image(label="Darker here: blue; brighter: orange", alt_text="Their difference", **sized)
    return {
        "tab": tab, "what": what, "seed": seed, "place": place, "words": words, "lowest": lowest, "here": here,
        "change": change,
    }  # fmt: skip


def change_tab(first: Run, visible: bool) -> dict[str, Any]:
    """The tab that changes a slice that a visitor has; its components by name."""
    gr = import_gradio()
    sized = {**PICTURE, "height": 360}
    with gr.Tab("Change a slice", visible=visible) as tab:
        gr.Markdown(
            "Choose a slice, and what it is to show: a class here, values above. What is left at *any* stays as it is. "
            "The file does not leave this machine and is deleted once it was read. **What comes out is no prognosis.**"
        )
        class_name = gr.Radio(
            [AS_IT_IS, *first.classes], value=AS_IT_IS, label="Class to show", visible=first.has_classes
        )
        with gr.Row():
            file = gr.File(label="Slice (PNG, JPEG or TIFF)", file_types=["image"], height=120)
            known = gr.Textbox(label="What is known of it", info="For example: age=62 sex=M; empty: nothing")
        go = gr.Button("Change it", variant="primary")
        words = gr.Markdown("", elem_id="changed")
        with gr.Row():
            before = gr.Image(label="As it is", alt_text="The slice that was chosen", **sized)
            after = gr.Image(label="Changed", alt_text="The slice with the values set above", **sized)
            change = gr.Image(label="Darker now: blue; brighter: orange", alt_text="The change", **sized)
    return {
        "tab": tab, "class_name": class_name, "file": file, "known": known, "go": go, "words": words,
        "before": before, "after": after, "change": change,
    }  # fmt: skip


def generate_tab(cfg: AppConfig) -> dict[str, Any]:
    """The tab that generates images of one seed; its components by name."""
    gr = import_gradio()
    with gr.Tab("Generate"):
        with gr.Row():
            count = gr.Slider(1, cfg.max_images, min(4, cfg.max_images), step=1, label="Images")
            seed = gr.Number(0, label="Seed", info="The same seed gives the same images")
        with gr.Row():
            go = gr.Button("Generate", variant="primary")
            stop = gr.Button("Stop")
        words = gr.Markdown("", elem_id="words")
        gallery = gr.Gallery(
            label="Images, and the nearest training slice of each where the data is known", columns=4,
            object_fit="contain", height="auto", format="png", interactive=False, buttons=["download", "fullscreen"],
        )  # fmt: skip
        file = gr.DownloadButton("Download all as ZIP, with manifest", interactive=False)
        strip = gr.Image(
            label="How image 0 comes about: noisy above, its estimate below", height=270,
            alt_text="Two rows of one slice, from noise on the left to the finished image on the right", **PICTURE,
        )  # fmt: skip
    return {
        "count": count, "seed": seed, "go": go, "stop": stop, "words": words, "gallery": gallery, "file": file,
        "strip": strip,
    }  # fmt: skip


def walk_tab() -> dict[str, Any]:
    """The tab that walks from the image of one seed to that of another; its components by name."""
    gr = import_gradio()
    with gr.Tab("Walk between two seeds") as tab:
        with gr.Row():
            seed_a, seed_b = gr.Number(0, label="From seed"), gr.Number(1, label="To seed")
        place = gr.Slider(0, 1, 0, step=0.05, label="Place between them")
        words = gr.Markdown("", elem_id="walked")
        image = gr.Image(
            label="Between the two seeds", height=420, alt_text="A slice between those of the two seeds", **PICTURE
        )  # fmt: skip
    return {"tab": tab, "seed_a": seed_a, "seed_b": seed_b, "place": place, "words": words, "image": image}


def class_tab(first: Run, visible: bool) -> dict[str, Any]:
    """The tab that guides one seed from one class to another; its components by name."""
    gr = import_gradio()
    sized = {**PICTURE, "height": 360}
    with gr.Tab("From one class to another", visible=visible) as tab:
        gr.Markdown("One seed, all else held: the same noise, guided from one class to the other.")
        with gr.Row():
            start = gr.Radio(first.classes, value=first.classes[-1], label="From class")
            end = gr.Radio(first.classes, value=first.classes[0], label="To class")
            seed = gr.Number(0, label="Seed of the image")
        far = gr.Slider(0, 2, 1, step=0.1, label="How far", info="0: the first class; 1: the second; more: beyond it")
        words = gr.Markdown("", elem_id="carried")
        with gr.Row():
            before = gr.Image(label="First class", alt_text="Slice of the first class", **sized)
            after = gr.Image(label="On the way", alt_text="The same noise, on the way", **sized)
            change = gr.Image(label="Darker: blue; brighter: orange", alt_text="Their difference", **sized)
    return {
        "tab": tab, "start": start, "end": end, "seed": seed, "far": far, "words": words, "before": before,
        "after": after, "change": change,
    }  # fmt: skip


def build(studio: Studio) -> gr.Blocks:
    """The page: its parts, and what their events call."""
    gr = import_gradio()
    cfg, first = studio.cfg, next(iter(studio.runs.values()))
    with gr.Blocks(title="Synthetic brain MRI slices", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        # The parts, from top to bottom: settings, and a tab for each thing that can be done.
        gr.Markdown(f"# Synthetic brain MRI slices\n{LIMITS}")
        s = settings_part(cfg, studio, first)
        g, w = generate_tab(cfg), walk_tab()
        c = class_tab(first, visible=any(run.has_classes for run in studio.runs.values()))
        v = sweep_tab(first, visible=any(numbers_of(run) for run in studio.runs.values()))
        e = change_tab(first, visible=any(run.model.conditional for run in studio.runs.values()))
        how, asked = [s["steps"], s["solver"], s["guidance"]], s["controls"]

        # One request after the other, whoever asks, because they share one machine.
        work: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "generating", "concurrency_limit": 1}
        live = {**work, "trigger_mode": "always_last", "show_progress": "minimal"}

        # Another run: its classes and settings, and nothing is left of the images of the run before.
        outputs = [
            g["words"], g["gallery"], g["strip"], w["image"], w["words"], c["before"], c["after"], c["change"],
            c["words"], v["lowest"], v["here"], v["change"], v["words"], e["before"], e["after"], e["change"],
            e["words"],
        ]  # fmt: skip

        def choose(which: str) -> list:
            run = studio.run(which)
            fewest, most, default = run_steps(cfg, run)
            return [
                gr.update(value=run.classes[0], choices=run.classes, visible=run.has_classes),
                describe_run(run),
                gr.update(minimum=fewest, maximum=most, value=default, interactive=run.free),
                gr.update(value=run.how(run.default_steps, "dpm++2m")["solver"], interactive=run.free),
                gr.update(value=1, visible=run.model.conditional),
                gr.update(value=run.classes[-1], choices=run.classes),
                gr.update(value=run.classes[0], choices=run.classes),
                gr.update(value=next(iter(numbers_of(run)), None), choices=numbers_of(run)),
                gr.update(value=AS_IT_IS, choices=[AS_IT_IS, *run.classes], visible=run.has_classes),
                *(gr.update(value="", visible=owner == which) for owner, _ in studio.controls),
                gr.update(interactive=False),
                *[None] * len(outputs),
            ]

        chosen = [
            s["class_name"],
            s["facts"],
            *how,
            c["start"],
            c["end"],
            v["what"],
            e["class_name"],
            *asked,
            g["file"],
            *outputs,
        ]
        s["name"].change(answered(choose), s["name"], chosen, queue=False, api_visibility="private")

        # Generate, until it is done or stopped.
        generating = g["go"].click(
            answered(studio.generate), [s["name"], s["class_name"], g["count"], g["seed"], *how, *asked],
            [g["strip"], g["gallery"], g["words"], g["file"]], show_progress="minimal", **work,
        )  # fmt: skip
        g["stop"].click(None, cancels=[generating], api_visibility="private")

        # Walk and change the class whenever something is moved there; of several changes only the last one counts.
        walking = [s["name"], s["class_name"], w["seed_a"], w["seed_b"], w["place"], *how, *asked]
        for event in (w["seed_a"].input, w["seed_b"].input, w["place"].input, w["tab"].select):
            event(answered(studio.walk), walking, [w["image"], w["words"]], **live)
        sweeping = [s["name"], s["class_name"], v["what"], v["place"], v["seed"], *how, *asked]
        swept = [v["lowest"], v["here"], v["change"], v["words"]]
        for event in (v["what"].input, v["place"].input, v["seed"].input, v["tab"].select):
            event(answered(studio.sweep), sweeping, swept, **live)
        between = [s["name"], c["start"], c["end"], c["seed"], c["far"], s["steps"], s["solver"], *asked]
        shown = [c["before"], c["after"], c["change"], c["words"]]
        for event in (c["start"].input, c["end"].input, c["seed"].input, c["far"].input, c["tab"].select):
            event(answered(studio.between_classes), between, shown, **live)

        # Change a slice that was uploaded.
        changed = [e["before"], e["after"], e["change"], e["words"], e["file"]]
        changing = [s["name"], e["class_name"], e["file"], e["known"], *asked]
        e["go"].click(answered(studio.change), changing, changed, show_progress="minimal", **work)
    return page.queue(max_size=cfg.queue, api_open=False)


class ContentSecurity:
    """Adds a header that forbids the browser to ask any other machine for anything, whatever a library wants."""

    def __init__(self, app: Callable):
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_header(message: dict) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", CONTENT_SECURITY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_header)


def main(cfg: AppConfig) -> None:
    gr = import_gradio()
    from starlette.middleware import Middleware

    # The runs
    if cfg.run == AppConfig.run:  # the default: those of the shipped weights that are there
        cfg = replace(cfg, run=tuple(r for r in cfg.run if (Path(cfg.checkpoints) / r).is_dir()))
    if not cfg.run:
        raise UserError(
            f"there are no pretrained weights in {cfg.checkpoints}: go to the folder of this repository, "
            "or name another run with --run"
        )
    for number in (signal.SIGTERM, signal.SIGHUP):  # leave by sys.exit, so that the private folder is removed
        signal.signal(number, lambda got, _: sys.exit(128 + got))
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own address whether it is up
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost", cfg.host]))
    # Uploads and pictures are kept in memory, unless somebody says where. gradio must know that place: it hands out no
    # file that lies outside of the folder for temporary files.
    if "TMPDIR" not in os.environ and os.access("/dev/shm", os.W_OK):
        tempfile.tempdir = "/dev/shm"
    # Load them now, so that an error shows before the page opens; copies are learnt about while it is in use.
    studio = Studio(cfg)
    threading.Thread(target=studio.learn_copies, daemon=True).start()
    fonts = {
        "font": ["system-ui", "sans-serif"],
        "font_mono": ["ui-monospace", "monospace"],
    }  # fonts that are on every machine: none is fetched
    # The default grey and orange are hard to read on white.
    theme = gr.themes.Default(primary_hue="blue", **fonts).set(
        block_info_text_color="*neutral_600", block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
    )  # fmt: skip
    # Listen on this machine only (unless --host says otherwise), and take no uploads larger than a slice.
    try:
        build(studio).launch(
            server_name=cfg.host, server_port=cfg.port, theme=theme, css=CSS, quiet=True,
            share=False, ssr_mode=False, pwa=False, footer_links=[], run_history=False, prevent_thread_lock=True,
            enable_monitoring=False, max_file_size="4mb", app_kwargs={"middleware": [Middleware(ContentSecurity)]},
        )  # fmt: skip
    except OSError as e:
        raise UserError(f"port {cfg.port} of {cfg.host} cannot be listened on ({e}): name another --port") from None
    print(f"open http://{cfg.host}:{cfg.port} in a browser; Ctrl-C ends it", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    run_script(main, cfg)
