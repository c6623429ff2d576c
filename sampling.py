"""From a trained run to images: what predict.py, evaluate.py, distil.py and app.py draw with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import PredictConfig
from dataset import load_splits_as_trained
from device import Replay, compile_networks, pick_amp_dtype  # fmt: skip
from metrics import CopyDetector, TooFew
from modules import StableDiffusion, load_diffusion, make_grid, randn, sample
from pictures import to_pixels  # fmt: skip
from utils import UserError, generator, progress_bar  # fmt: skip
from vae import VAE, load_vae
from weights import file_hash  # fmt: skip


def load_run(
    folder: Path, weights: str, device: torch.device, precision: str = "auto"
) -> tuple[StableDiffusion, VAE, dict, Path]:
    """(diffusion, VAE, meta of the diffusion, its file) of a run, `weights` "best" or "final"; they must be a pair.

    `auto` is half precision on a GPU alone: on a CPU float32 keeps image k the same for every batch size.
    """
    unet_file, vae_file = folder / "diffusion" / f"{weights}.safetensors", folder / "vae" / "best.safetensors"
    model, meta = load_diffusion(unet_file, device)
    vae, _ = load_vae(vae_file, device)
    net = model.unet.config
    same = meta.get("vae") in (vae.latent_hash(), file_hash(vae_file))  # the file's hash: of weights of older versions
    if not same or (net["in_channels"], *2 * [net["resolution"]]) != vae.latent_shape:
        raise UserError(f"{unet_file} was trained on the latents of another VAE than {vae_file}: run train.py --fresh")
    if device.type == "cpu" and precision == "auto":
        precision = "fp32"
    model.amp_dtype = vae.amp_dtype = pick_amp_dtype(precision, device)
    return model, vae, meta, unet_file


def plan_sampling(cfg: PredictConfig, model: StableDiffusion) -> dict:
    """timesteps, solver and eta for `sample`; UserError where the weights never saw those timesteps."""
    own = model.scheduler.config
    if cfg.sampling == "normal":
        if own["grid"] != "full":
            raise UserError(
                f"normal sampling takes all 1000 timesteps, and run {cfg.run} was trained on {own['num_steps']} "
                f"({own['grid']}): take --sampling fast, or train with --grid full"
            )
        if cfg.grid not in (None, "full") or cfg.num_steps is not None:
            raise UserError("--sampling normal takes all 1000 timesteps: leave out --grid and --num-steps")
        grid, solver, eta = "full", cfg.solver or "ddim", 1.0 if cfg.eta is None else cfg.eta
    else:
        # Weights of the full grid know every timestep; their ten-step default is the grid that keeps the spread.
        grid = cfg.grid or ("logsnr" if own["grid"] == "full" else own["grid"])
        solver, eta = cfg.solver or ("ddim" if grid == "student" else "dpm++2m"), cfg.eta or 0.0
    if own["grid"] == "student" and (solver, eta) != ("ddim", 0.0):
        raise UserError(f"run {cfg.run} was distilled and takes its own steps only: leave out --solver and --eta")
    num_steps = cfg.num_steps or (10 if own["grid"] == "full" else own["num_steps"])
    if own["grid"] != "full" and (grid, num_steps) != (own["grid"], own["num_steps"]):
        raise UserError(
            f"run {cfg.run} was trained on {own['num_steps']} {own['grid']} timesteps and can be sampled on no others: "
            "leave out --grid and --num-steps, or train with --grid full"
        )
    if solver != "ddim" and cfg.eta:
        raise UserError(f"--eta {cfg.eta} belongs to --solver ddim: {solver} is deterministic")
    try:
        timesteps = make_grid(grid, num_steps, model.scheduler.abar)
    except ValueError as e:
        raise UserError(f"--num-steps {num_steps}: {e}") from None
    return {"timesteps": timesteps.tolist(), "solver": solver, "eta": eta}


class Drawer:
    """Images of a model by (seed, index), in batches of a fixed size: noise, sampler, decoder; on a GPU a CUDA graph.

    `how` goes to `sample`: timesteps, solver, eta. What eta puts back is drawn on the CPU, so only eta = 0 is recorded.
    """

    def __init__(
        self, model: StableDiffusion, vae: VAE, batch: int, guidance: float = 1.0, compile: str = "off", **how: Any
    ):
        self.model, self.vae, self.batch, self.guidance, self.how = model, vae, batch, guidance, how
        self.device, self.replay = vae.latent_mean.device, None
        x = torch.zeros(batch, *vae.latent_shape, device=self.device)
        y = torch.zeros(batch, dtype=torch.int64, device=self.device)
        noise = [generator(0)] * batch
        compile_networks(compile, [model.unet, vae.decoder], lambda: self.draw(x, y, noise), self.device)
        if self.device.type == "cuda" and not how.get("eta"):
            try:
                self.replay = Replay(self.draw, x, y)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                print(f"no CUDA graph can be recorded here, going on without ({str(e).splitlines()[0]})")

    @torch.no_grad()
    def draw(self, x: Tensor, y: Tensor, noise: Sequence[torch.Generator] | None = None) -> tuple[Tensor, Tensor]:
        """x_T and labels on the device -> (uint8 [B, S, S], latents [B, C, h, w])."""
        denoise = self.model.denoiser(y, self.guidance)
        z = sample(denoise, x, self.model.scheduler, generator=noise, **self.how)
        return to_pixels(self.vae.decode(z)), z

    def __call__(self, seed: int, indices: Sequence[int], y: Tensor) -> tuple[Tensor, Tensor]:
        """What `draw` gives for up to `batch` indices and their classes; a GPU may still be at work on it."""
        n = len(indices)
        # Always a whole batch: other shapes are rounded otherwise. One stream per image, x_T first, then eta's noise.
        noise = [generator(seed, k) for k in [*indices, *[0] * (self.batch - n)]]
        x, y = randn((self.batch, *self.vae.latent_shape), noise), F.pad(y, (0, self.batch - n))
        if self.replay is None:
            return tuple(part[:n] for part in self.draw(x.to(self.device), y.to(self.device), noise))
        return tuple(part[:n].clone() for part in self.replay(x.pin_memory(), y.pin_memory()))


def copy_detector(cfg: PredictConfig, vae: VAE, meta: dict) -> tuple[CopyDetector, Tensor]:
    """What knows the run's training slices and how close people held out come to them; and the slices, [N, S, S]."""
    splits = load_splits_as_trained(cfg.data, cfg.cache, meta, vae.config["image_size"])
    held_out = splits.get("test", splits["val"])
    bar = progress_bar(len(splits["train"]) + len(held_out), what="learning what copies are")
    try:
        with bar:
            train = splits["train"].images
            return CopyDetector(train, held_out.images, vae.embed, on_batch=bar.update), train
    except TooFew as e:
        raise UserError(f"copies (--reject-copies) cannot be told from others on {cfg.data}: {e}") from None
