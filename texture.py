"""Teach a run to draw what is small in its images: python texture.py [demo|small|adni] --data DIR --run NAME.

Called again, it resumes. The network is `Texture` in vae.py, the bookkeeping of the run in loop.py.
"""

from __future__ import annotations

from config import TextureConfig, parse

if __name__ == "__main__":
    cfg = parse(TextureConfig)  # before torch is imported, so that --help answers at once

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster import Ranks, StopSignal
from dataset import ADNIDataset, carved_people, load_splits_by_rules, phantom_drawing, split_rules, to_float
from device import (
    describe_cost,
    eval_mode,
    gather_batches,
    pick_amp_dtype,
    pick_device,
    shuffled_batches,
    to_device_if_it_fits,
    training_cost,
)
from loop import EMA, Gradients, Plan, Run, make_optimizer, make_scaler, optimise, rehearse
from metrics import high_frequencies, psnr, ssim, unit
from modules import CosineAnnealingWarmupScheduler, UNet
from pictures import add_gif_frame, image_grid, to_uint8
from utils import UserError, evenly_spaced, generator, run_script
from vae import BANDS, VAE, Texture, background, load_vae_of_run


def backward(
    network: nn.Module, scaler: torch.amp.GradScaler, weight: float, x: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Add the gradients of the mean loss, times `weight`, of slices x, uint8 [B, S, S].

    `network` is a Texture, perhaps wrapped for DDP. Returns the sum of the losses.
    """
    loss, _ = network(to_float(x), t, noise)
    scaler.scale(weight * loss.mean()).backward()
    return loss.detach().sum()


def step_randomness(texture: Texture, batch: int, g: torch.Generator) -> list[Tensor]:
    """All random numbers of a step: timesteps int64 [B], and noise [B, 1, S, S]."""
    side = texture.config["image_size"]
    t = texture.scheduler.sample_timesteps(batch, g)
    return [t, torch.randn(batch, 1, side, side, generator=g, device=g.device)]


@torch.no_grad()
def reconstruct(vae: VAE, data: ADNIDataset, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(slices, what the VAE makes of them), each uint8 [N, S, S], of up to `count` slices evenly spaced."""
    index = torch.tensor(evenly_spaced(len(data), count))
    made = [vae.decode(vae.encode(data.batch(part, device))[0]) for part in index.split(16)]
    return data.images[index], torch.from_numpy(to_uint8(torch.cat(made)))


def evaluate(
    texture: Texture, val: Tensor, shown: tuple[Tensor, Tensor], cfg: TextureConfig, ranks: Ranks
) -> dict[str, float]:
    """Loss of people held out, always with the same noise; and of `shown`, slices and their reconstructions, drawn with
    texture: PSNR, SSIM and power in the upper half of the frequencies."""
    total, quality = torch.zeros(2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)

    def batches(*tensors: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """(rows of the tensors, each [B, 1, S, S], and random numbers) of this rank's share."""
        order = torch.arange(len(tensors[0])).split(16)
        order = order[ranks.share(len(order))]
        for rows, parts in zip(order, gather_batches(tensors, order, ranks.device)):
            g = generator(cfg.seed, 22, int(rows[0]), device=ranks.device)
            yield [to_float(part) for part in parts], step_randomness(texture, len(rows), g)

    with eval_mode(texture):
        for (x,), (t, noise) in batches(val):
            total += torch.tensor([texture(x, t, noise)[0].sum().item(), len(x)], dtype=torch.float64)
        # Drawing takes a call of the network for each step, so of some slices only.
        for (x, y), (_, noise) in batches(*shown):
            drawn = unit(texture.draw(y, noise))
            values = [f(drawn, unit(x)).sum().item() for f in (psnr, ssim, high_frequencies)]
            quality += torch.tensor([*values, len(x)], dtype=torch.float64)
    (loss, n), (*means, count) = ranks.sum(total).tolist(), ranks.sum(quality).tolist()
    names = ("PSNR/val", "SSIM/val", "high frequencies, dB/val")
    return {"loss/val": loss / n} | {name: value / count for name, value in zip(names, means)}


def show_texture(
    texture: Texture, shown: tuple[Tensor, Tensor], cfg: TextureConfig, folder: Path, epoch: int, last: bool
) -> None:
    """Add a frame to FOLDER/texture.gif: slices of people held out, their reconstructions, and those with texture."""
    index = torch.tensor(evenly_spaced(len(shown[0]), 6))
    x, y = (part[index] for part in shown)
    device = texture.scheduler.timesteps.device
    with eval_mode(texture):
        _, noise = step_randomness(texture, len(x), generator(cfg.seed, 23, device=device))
        drawn = texture.draw(to_float(y.to(device)), noise)
    add_gif_frame(folder, "texture", image_grid(np.concatenate([x, y, to_uint8(drawn)]), columns=len(x)), epoch, last)


def build_texture(cfg: TextureConfig, slices: Tensor) -> Texture:
    """The network for slices like these, uint8 [N, S, S], initialised by the seed. UserError if sizes do not divide."""
    # Is there nothing around the brain? A scanner's air is not 0 everywhere.
    some = slices[torch.tensor(evenly_spaced(len(slices), 64))]
    bright = some[:, None] > 0
    black = (bright & background(to_float(some))).sum() < 0.01 * bright.sum()
    torch.manual_seed(cfg.seed)
    try:
        return Texture(slices.shape[-1], cfg.channels, cfg.blocks, cfg.patch, cfg.num_steps, cfg.noise, bool(black))
    except ValueError as e:
        raise UserError(f"{e}: change --channels or --patch") from None


def print_plan(
    cfg: TextureConfig, texture: Texture, splits: dict[str, ADNIDataset], plan: Plan, device: torch.device
) -> None:
    """Say what a run would do: data, network, cost, and where it writes."""
    # A few steps on black images. On a CPU a few say as much as a batch.
    n, dtype = plan.batch if device.type == "cuda" else min(plan.batch, 4), pick_amp_dtype(cfg.precision, device)
    texture = texture.to(memory_format=torch.channels_last).to(device)
    texture.amp_dtype, scaler, side = dtype, make_scaler(dtype, device), texture.config["image_size"]
    black = torch.zeros(n, side, side, dtype=torch.uint8, device=device)
    tensors = [black, *step_randomness(texture, n, generator(0, device=device))]
    call, optimizer = partial(backward, texture, scaler), make_optimizer(texture.parameters(), cfg)
    seconds = rehearse(cfg, plan, [texture], [texture.unet], call, tensors, optimizer, scaler)
    network, x = UNet(**texture.unet.config).to(device), torch.zeros(1, 1 + len(BANDS), side, side, device=device)
    cost = training_cost(network, x, torch.zeros(1, dtype=torch.int64, device=device), amp_dtype=dtype)
    print(f"train on  {splits['train'].summary()}\nvalidate  {splits['val'].summary()}")
    print(describe_cost("texture", *cost, plan.batch, cfg.epochs, plan.steps, device, dtype, seconds))
    print(f"writes to {Path(cfg.checkpoints) / cfg.run / 'texture'}")


def main(cfg: TextureConfig) -> None:
    # The VAE decides the size of images, and which people are held out.
    stop, device = StopSignal(), pick_device(cfg.device)
    vae, vae_meta, _ = load_vae_of_run(Path(cfg.checkpoints) / cfg.run, device)
    splits, fingerprint = load_splits_by_rules(cfg.data, cfg.cache, vae_meta, vae.config["image_size"])
    train, val, plan = splits["train"], splits["val"], Plan.of(cfg, len(splits["train"]))
    texture = build_texture(cfg, train.images)
    if cfg.dry_run:
        return print_plan(cfg, texture, splits, plan, device)

    with Run(cfg, "texture", plan, stop, device) as run:
        # Network, average, optimiser, schedule.
        ranks, folder = run.ranks, run.folder
        texture = texture.to(memory_format=torch.channels_last).to(device)
        texture.amp_dtype = pick_amp_dtype(cfg.precision, device)
        vae.amp_dtype = texture.amp_dtype
        ema, scaler = EMA(texture, cfg.ema_decay), make_scaler(texture.amp_dtype, device)
        optimizer = make_optimizer(texture.parameters(), cfg)
        schedule = CosineAnnealingWarmupScheduler(optimizer, max(1, round(cfg.warmup * plan.steps)), plan.steps)

        # Resume, or begin.
        run.track(1, model=texture, ema=ema, optimizer=optimizer, schedule=schedule, scaler=scaler)
        run.resume(fingerprint, f"slices than {cfg.data} now holds")
        if run.finished:
            return

        # The VAE has no part in the training. Its reconstructions of people held out are what texture is tried on.
        shown = reconstruct(vae, val, 64, device)
        images, val_images = (to_device_if_it_fits(data.images, device) for data in (train, val))

        # A step of n images whose result is thrown away: it shows what fits the memory and what can be compiled.
        network = ranks.wrap_ddp(texture)
        call = partial(backward, network, scaler)

        def trial(n: int) -> None:
            x = images[:1].expand(n, -1, -1).to(device)
            call(1.0, x, *step_randomness(texture, n, generator(0, device=device)))
            texture.zero_grad()

        meta = {
            "kind": "texture", "model": texture.config, "data": train.summary(),
            "held_out": carved_people(splits), "split": split_rules(vae_meta), **phantom_drawing(cfg.data),
        }  # fmt: skip
        run.begin(meta, texture, [texture.unet], [network], trial)
        gradients = Gradients(
            call, [texture], optimizer, scaler, cfg.grad_clip, ranks, plan.batch, run.micro, [network]
        )  # fmt: skip
        order = shuffled_batches(len(train), plan.batch, run.step, cfg.seed, 24)
        batches = gather_batches([images], (index[run.rows] for index in order), device)

        for epoch in run.epochs():
            for step in run.steps(epoch):
                (x,) = next(batches)
                # Every step has its own random numbers, by (seed, step), so resuming needs no state of a generator.
                g = generator(cfg.seed, 25, step, device=device)
                added, norm = gradients(x, *(r[run.rows] for r in step_randomness(texture, plan.batch, g)))
                optimise(texture, optimizer, ema, added)
                schedule.step()
                run.took(added, norm)

            if not run.evaluates(epoch):
                continue

            # Evaluate the averaged weights, and show what they draw.
            numbers = {"loss/train": run.means()[0] / plan.batch, **evaluate(ema.module, val_images, shown, cfg, ranks)}
            if ranks.is_main:
                show_texture(ema.module, shown, cfg, folder, epoch, run.is_last(epoch))
            run.end_epoch(numbers, ema.module, pictures=["texture.gif"], people=True)

        run.save()
        run.save_final(ema.module)
    print(f"done: {folder / 'final.safetensors'}; slices, reconstructions and texture in {folder / 'texture.png'}")


if __name__ == "__main__":
    run_script(main, cfg)
