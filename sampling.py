"""From a trained run to images: the one way from (seed, k) to noise, latents and pixels.

predict.py, evaluate.py, tsne.py, app.py and distil.py generate with what is here; the samplers are in modules.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conditions import GROUP, Attribute, place_of
from config import PredictConfig
from dataset import load_splits_as_trained
from device import Replay, compile_networks, pick_amp_dtype, to_half
from metrics import CopyDetector, TooFew
from modules import StableDiffusion, invert, load_diffusion, make_grid, sample, sample_steps, start_noise
from pictures import to_pixels
from utils import UserError, progress_bar
from vae import VAE, load_texture, load_vae
from weights import file_hash


def load_run(
    folder: Path, weights: str, device: torch.device, precision: str = "auto"
) -> tuple[StableDiffusion, VAE, dict[str, Any], Path]:
    """(diffusion, VAE, header of the diffusion's file, that file) of a run; `weights` is "best" or "final".

    The VAE has the run's texture, if there is one.
    UserError if the two do not belong together. Precision "auto" is half precision on a GPU and float32 on a CPU, where
    image k then is the same for every batch size.
    """
    unet_file, vae_file = folder / "diffusion" / f"{weights}.safetensors", folder / "vae" / "best.safetensors"
    model, meta = load_diffusion(unet_file, device)
    vae, _ = load_vae(vae_file, device)
    if not belongs_to(model, meta, vae, vae_file):
        raise UserError(f"{unet_file} was trained on the latents of another VAE than {vae_file}: run train.py --fresh")
    model.amp_dtype = vae.amp_dtype = sampling_dtype(precision, device)
    if (texture_file := folder / "texture" / "best.safetensors").exists():
        vae.texture = load_texture(texture_file, vae, device)
        vae.texture.amp_dtype = vae.amp_dtype
    return model, vae, meta, unet_file


def belongs_to(model: StableDiffusion, meta: dict[str, Any], vae: VAE, vae_file: Path) -> bool:
    """Was this diffusion trained on the latents of this VAE? Headers of older versions name the VAE by its file."""
    net = model.unet.config
    same_shape = (net["in_channels"], net["resolution"], net["resolution"]) == vae.latent_shape
    return same_shape and meta.get("vae") in (vae.latent_hash(), file_hash(vae_file))


def sampling_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Autocast's dtype for generating images. "auto" on a CPU is float32 (None), as `load_run` says."""
    return pick_amp_dtype("fp32" if precision == "auto" and device.type == "cpu" else precision, device)


def plan_sampling(cfg: PredictConfig, model: StableDiffusion) -> dict[str, Any]:
    """timesteps, solver and eta for `sample`. UserError where the weights were not trained on those timesteps."""
    own, scheduler = model.scheduler.config, model.scheduler
    grid: str
    solver: str
    full, student = own["grid"] == "full", own["grid"] == "student"
    if cfg.sampling == "normal":
        if not full:
            raise UserError(
                f"normal sampling takes all 1000 timesteps, and run {cfg.run} was trained on {own['num_steps']} "
                f"({own['grid']}): take --sampling fast, or train with --grid full"
            )
        if cfg.grid not in (None, "full") or cfg.num_steps is not None:
            raise UserError("--sampling normal takes all 1000 timesteps: leave out --grid and --num-steps")
        grid, solver = "full", cfg.solver or "ddim"
        eta = float(solver != "heun") if cfg.eta is None else cfg.eta
    else:
        # Weights of the full grid know every timestep. Their default is the grid that keeps the spread of the images.
        grid = cfg.grid or ("logsnr" if full else own["grid"])
        solver = cfg.solver or scheduler.default_solver
        # New noise in every step makes good what the steps before got wrong (docs/results.md, "Which sampler").
        eta = float(full and solver == "dpm++2m") if cfg.eta is None else cfg.eta
    if student and (solver, eta) != ("ddim", 0.0):
        raise UserError(f"run {cfg.run} was distilled and takes its own steps only: leave out --solver and --eta")
    num_steps = cfg.num_steps or (20 if full else own["num_steps"])
    if not full and (grid, num_steps) != (own["grid"], own["num_steps"]):
        raise UserError(
            f"run {cfg.run} was trained on {own['num_steps']} {own['grid']} timesteps and can be sampled on no others: "
            "leave out --grid and --num-steps, or train with --grid full"
        )
    if solver == "heun" and cfg.eta:
        raise UserError(f"--eta {cfg.eta} belongs to --solver dpm++2m and ddim: {solver} is deterministic")
    try:
        timesteps = make_grid(grid, num_steps, scheduler.abar)
    except ValueError as e:
        raise UserError(f"--num-steps {num_steps}: {e}") from None
    return {"timesteps": timesteps.tolist(), "solver": solver, "eta": eta}


class ImageSampler:
    """Generates images by (seed, index) in batches of a fixed size: noise, sampler, decoder; on a GPU as a CUDA graph.

    `how` goes to `sample`: timesteps, solver, eta; without it the weights' own defaults count. The noise of eta > 0 is
    drawn on the CPU, for a graph all of it in advance; for hundreds of steps that is too much, and there is no graph.
    The weights of U-Net and decoder become half precision where the networks run in it.
    """

    def __init__(
        self, model: StableDiffusion, vae: VAE, batch: int, guidance: float = 1.0, compile: str = "off", **how: Any
    ):
        self.model, self.vae, self.batch, self.guidance, self.how = model, vae, batch, guidance, how
        self.device = vae.latent_mean.device
        self.replay: Replay | None = None
        x = torch.zeros(batch, *vae.latent_shape, device=self.device)
        y = torch.zeros(batch, len(model.unet.config["conditions"]), device=self.device)
        texture, (_, noise) = vae.texture_noise(0, [0] * batch), start_noise(0, [0] * batch, vae.latent_shape)
        # How often noise is added, which a graph has to be given.
        self.added = len(how.get("timesteps") or model.scheduler.fast_timesteps) - 1 if how.get("eta") else 0
        to_half(model.unet, model.amp_dtype)
        to_half(vae.decoder, vae.amp_dtype)
        networks = [model.unet, vae.decoder]
        if vae.texture is not None:
            to_half(vae.texture.unet, vae.amp_dtype)
            networks.append(vae.texture.unet)
        compile_networks(compile, networks, lambda: self._images(x, y, noise, texture), self.device)
        if self.device.type == "cuda" and self.added < 100:
            try:
                added = torch.zeros(self.added, *x.shape, device=self.device)
                self.replay = Replay(self._images, x, y, added, *([] if texture is None else [texture]))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                print(f"no CUDA graph can be recorded here, going on without ({str(e).splitlines()[0]})")

    @torch.no_grad()
    def _images(
        self, x: Tensor, y: Tensor, noise: Iterable[Tensor], texture: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_T [B, C, h, w], conditions [B, A], more noise like x_T, and `texture_noise` -> (uint8 [B, S, S], latents
        [B, C, h, w])."""
        z = sample(self.model.denoiser(y, self.guidance), x, self.model.scheduler, noise=iter(noise), **self.how)
        return to_pixels(self.vae.decode(z, texture)), z

    def __call__(self, seed: int, indices: Sequence[int], y: Tensor) -> tuple[Tensor, Tensor]:
        """(uint8 [B, S, S], latents [B, C, h, w]) for up to `batch` indices and their conditions y [B, A] on the CPU.

        Returns before a GPU is done with them.
        """
        # Always a whole batch, because networks round smaller ones differently.
        n, missing = len(indices), self.batch - len(indices)
        whole = [*indices, *[0] * missing]
        x, noise = start_noise(seed, whole, self.vae.latent_shape)
        y, texture = F.pad(y, (0, 0, 0, missing)), self.vae.texture_noise(seed, whole)
        if self.replay is None:
            pixels, z = self._images(x.to(self.device), y.to(self.device), noise, texture)
            return pixels[:n], z[:n]
        added = torch.empty(self.added, *x.shape, pin_memory=True)
        for row, new in zip(added, noise):
            row.copy_(new)
        inputs = [x.pin_memory(), y.pin_memory(), added, *([] if texture is None else [texture])]
        pixels, z = self.replay(*inputs)
        return pixels[:n].clone(), z[:n].clone()

    def steps(self, seed: int, indices: Sequence[int], y: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Any number of images step by step: (t, x_t, x0) as `sample_steps` yields them, latents [B, C, h, w]."""
        x, noise = start_noise(seed, indices, self.vae.latent_shape)
        denoise = self.model.denoiser(y.to(self.device), self.guidance)
        return sample_steps(denoise, x.to(self.device), self.model.scheduler, noise=noise, **self.how)


def group_names(model: StableDiffusion, meta: dict[str, Any]) -> list[str]:
    """What classes a run can be asked for: the groups that it knows, else the class folders of its data."""
    place = place_of(model.attributes, GROUP)
    return list(meta["classes"] if place is None else model.attributes[place].values)


def class_names(attributes: Sequence[Attribute], rows: Tensor, classes: Sequence[str]) -> list[str]:
    """The class of an image of each of these conditions [N, A]: its group, else the only class, else "any"."""
    place = place_of(attributes, GROUP)
    other = classes[0] if len(classes) == 1 else "any"
    if place is None:
        return [other] * len(rows)
    return [attributes[place].decode(code) or other for code in rows[:, place].tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# The same slice with other conditions


def plan_inversion(model: StableDiffusion, num_steps: int, run: str) -> list[int]:
    """The timesteps of an edit, up to the noise and down again, ascending: so many, or the run's own few.

    UserError for a student, whose few long steps cannot be undone, and for an impossible number.
    """
    grid = model.scheduler.config["grid"]
    if grid == "student":
        raise UserError(f"run {run} was distilled, and its few long steps cannot be undone: take its teacher's run")
    if grid != "full":
        return model.scheduler.fast_timesteps
    try:
        return make_grid("logsnr", num_steps, model.scheduler.abar).tolist()
    except ValueError as e:
        raise UserError(f"--num-steps {num_steps}: {e}") from None


@torch.no_grad()
def edit_latents(
    model: StableDiffusion, vae: VAE, z: Tensor, before: Tensor, after: Tensor, timesteps: list[int],
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(round trip, edited), images in [-1, 1] [B, 1, S, S], of latents z [B, C, h, w].

    `before` and `after` are conditions [B, A]. Both images come from the same noise, and network and decoder made both,
    so their difference is the change alone; neither has texture. Guidance 0 is no change, and more than 1 goes beyond
    `after`.
    """
    how: dict[str, Any] = {"timesteps": timesteps, "solver": "ddim"}
    noise, _ = invert(model.denoiser(before), z, model.scheduler, timesteps)
    same = sample(model.denoiser(before), noise, model.scheduler, **how)
    other = sample(model.denoiser(after, guidance, away_from=before), noise, model.scheduler, **how)
    return vae.decode(same), vae.decode(other)


# What slices of the training data look like to the VAE, in few numbers: to notice images that are nothing of the kind.


def summarise(z: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> their means over 4 x 4 regions [B, 16 C]."""
    return F.adaptive_avg_pool2d(z.float(), 4).flatten(1)


def typical_latents(train: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of the training slices' summaries, and how far people held out are from them at most.

    Both are latents [N, C, h, w]. The header of the weights holds what comes back.
    """
    own, others = (torch.cat([summarise(z).cpu() for z in part.split(1024)]) for part in (train, held_out))
    mean, sd = own.mean(0), own.std(0).clamp(min=1e-3)
    distance = ((others - mean) / sd).square().mean(1).sqrt()
    rounded = {k: [float(f"{x:.4g}") for x in v.tolist()] for k, v in (("mean", mean), ("sd", sd))}
    return {**rounded, "limit": float(f"{1.1 * distance.max():.4g}")}


def unlikeness(z: Tensor, meta: dict[str, Any]) -> Tensor | None:
    """How far latents [B, C, h, w] are from the training slices, [B]: above 1 no slice of people held out was.

    None for weights that do not know: those of before this was measured.
    """
    typical: Any = meta.get("typical")
    try:
        mean, sd = (torch.tensor([float(x) for x in typical[k]], device=z.device) for k in ("mean", "sd"))
        return ((summarise(z) - mean) / sd).square().mean(1).sqrt() / float(typical["limit"])
    except (TypeError, KeyError, ValueError, OverflowError, RuntimeError):
        return None


def copy_detector(data: str, cache: str, vae: VAE, meta: dict[str, Any]) -> tuple[CopyDetector, Tensor]:
    """The detector of copies of a run's training slices, and those slices, uint8 [N, S, S].

    It has learnt how close the slices of two training people come to each other. UserError if there are too few people
    for that, or if `data` is not what the run was trained on.
    """
    train = load_splits_as_trained(data, cache, meta, vae.config["image_size"])["train"]
    bar = progress_bar(len(train), what="measuring distances between people")
    try:
        with bar:
            return CopyDetector(train.images, train.people, vae.embed, on_batch=bar.update), train.images
    except TooFew as e:
        raise UserError(f"copies (--reject-copies) cannot be told from other images on {data}: {e}") from None
