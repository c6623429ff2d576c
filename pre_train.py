"""Train the VAE: python pre_train.py [demo|small|adni] --data DIR --run NAME. The same command again resumes.

The network and its losses are in vae.py, the bookkeeping of the run in loop.py.
"""

from __future__ import annotations

from config import PretrainConfig, parse

if __name__ == "__main__":
    cfg = parse(PretrainConfig)  # before torch is imported, so that --help answers at once

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cluster import Ranks, StopSignal
from dataset import SPLIT_RULES, ADNIDataset, carved_people, load_splits, phantom_drawing, to_float
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
from modules import CosineAnnealingWarmupScheduler
from pictures import add_gif_frame, image_grid, to_uint8
from utils import UserError, evenly_spaced, generator, run_script
from vae import VAE, PatchDiscriminator, adversarial_gradient, hinge_loss, load_vae, vae_loss
from weights import load_weights, save_weights


def augments(cfg: PretrainConfig) -> bool:
    """Is there any augmentation?"""
    return bool(cfg.flip or cfg.shift or cfg.rotate or cfg.brightness)


def augment(x: Tensor, u: Tensor, cfg: PretrainConfig) -> Tensor:
    """Mirror, shift, rotate and brighten images [B, 1, S, S] in [-1, 1], each by its row of u [B, 5].

    u is uniform in [-1, 1]; a row holds rotation, mirroring, two shifts and brightness. Background stays black.
    """
    x = x + 1  # black is 0, which is what grid_sample pads with
    if cfg.flip or cfg.shift or cfg.rotate:
        # Rotation, mirroring and shift are one affine map, so that images are interpolated once.
        angle = u[:, 0] * cfg.rotate * torch.pi / 180
        mirror = torch.where(u[:, 1] < 0, -1.0, 1.0) if cfg.flip else torch.ones_like(angle)
        theta = torch.stack(
            [mirror * angle.cos(), -angle.sin(), 2 * cfg.shift * u[:, 2],
             mirror * angle.sin(), angle.cos(), 2 * cfg.shift * u[:, 3]], dim=1,
        ).view(-1, 2, 3)  # fmt: skip
        x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    x = x * (1 + cfg.brightness * u[:, 4].view(-1, 1, 1, 1))
    return x.clamp(0, 2) - 1


def evaluate(vae: VAE, val: ADNIDataset, cfg: PretrainConfig, ranks: Ranks) -> dict[str, float]:
    """Means over the slices of people never trained on, with the posterior's mean as the latent."""
    total = torch.zeros(6, dtype=torch.float64)
    with eval_mode(vae):
        for x in val.batches(cfg.batch_size, ranks.device, ranks.share):
            mean, logvar = vae.posterior(x)
            x_hat = vae.reconstruct(mean)
            loss = torch.stack(vae_loss(x_hat, x, mean, logvar, cfg.reconstruction, cfg.kl_weight)) * len(x)
            quality = [psnr(unit(x_hat), unit(x)).sum(), ssim(unit(x_hat), unit(x)).sum()]
            quality.append(high_frequencies(unit(x_hat), unit(x)).sum())
            total += torch.tensor([*loss, *quality], dtype=torch.float64)
    names = ("loss", "reconstruction", "KL", "PSNR", "SSIM", "high frequencies, dB")
    return {f"{name}/val": value for name, value in zip(names, (ranks.sum(total) / len(val)).tolist())}


def backward(
    network: nn.Module, discriminator: nn.Module, discriminator_ddp: nn.Module | None, scaler: torch.amp.GradScaler,
    cfg: PretrainConfig, weight: float, x: Tensor, u: Tensor, noise: Tensor, strength: Tensor,
) -> Tensor:  # fmt: skip
    """Add the gradients of these slices, uint8 [B, S, S], times `weight`.

    Returns loss, reconstruction, KL and the discriminator's loss, each times B: [4]. u [B, 5] is for `augment`, noise
    [B, C, h, w] for the posterior. `discriminator_ddp` is the discriminator wrapped for DDP, None before the
    adversarial phase; `discriminator` is the same without the wrapper. `strength` [B] is the share of --adversarial
    that counts so far.
    """
    x = to_float(x)
    if augments(cfg):
        x = augment(x, u, cfg)
    x_hat, mean, logvar = network(x, noise)
    loss, reconstruction, kl = vae_loss(x_hat, x, mean, logvar, cfg.reconstruction, cfg.kl_weight)
    if discriminator_ddp is None:
        scaler.scale(weight * loss).backward()
        return torch.stack([loss, reconstruction, kl, torch.zeros_like(kl)]).detach() * len(x)
    # The VAE: its loss, and what makes its images look more real.
    (gradient,) = torch.autograd.grad(reconstruction, x_hat, retain_graph=True)
    share = cfg.adversarial * strength.view(-1, 1, 1, 1)
    adversarial = adversarial_gradient(lambda v: discriminator(v.clamp(-1, 1)), x_hat, gradient, share)
    torch.autograd.backward([scaler.scale(weight * loss), x_hat], [None, scaler.scale(weight * adversarial)])
    # The discriminator: real images against the VAE's.
    hinge = hinge_loss(*discriminator_ddp(torch.cat([x, x_hat.detach().clamp(-1, 1)])).chunk(2))
    scaler.scale(weight * hinge).backward()
    return torch.stack([loss, reconstruction, kl, hinge]).detach() * len(x)


def show_reconstructions(vae: VAE, x: Tensor, folder: Path, epoch: int, last: bool) -> None:
    """Add a frame to FOLDER/reconstructions.gif: inputs above, reconstructions below, error x4 at the bottom."""
    with eval_mode(vae):
        x_hat = vae.reconstruct(vae.posterior(x)[0]).clamp(-1, 1)
    rows = np.concatenate([to_uint8(x), to_uint8(x_hat), to_uint8(4 * (x_hat - x).abs() - 1)])
    add_gif_frame(folder, "reconstructions", image_grid(rows, columns=len(x)), epoch, last)


def freeze_encoder(vae: VAE, average: VAE) -> None:
    """Freeze the encoder at its EMA weights so that latents stay valid: what is learnt now is the decoder's."""
    vae.encoder.load_state_dict(average.encoder.state_dict())
    vae.encoder.requires_grad_(False)


def save_with_latents(
    run: Run, ema: EMA[VAE], splits: dict[str, ADNIDataset], cfg: PretrainConfig, device: torch.device
) -> None:
    """Measure the latents of the training set, and write best and final weights with those statistics.

    If the encoder is still the one of an earlier end of this run, the statistics of then are kept to the last bit,
    because a U-Net may have been trained on them. Prints those of the best weights, which scripts use.
    """
    train, split = splits["train"], {name: getattr(cfg, name) for name in SPLIT_RULES}
    facts = {"data": train.summary(), "held_out": carved_people(splits), "split": split, **phantom_drawing(cfg.data)}
    final_file, ranks = run.folder / "final.safetensors", run.ranks
    earlier = load_vae(final_file, device)[0] if run.resumed and final_file.exists() else None
    # The averaged weights of the best epoch, in a network of their own, beside those of the last epoch
    tensors, header = ranks.rank0_first(lambda: load_weights(run.folder / "best.safetensors", "vae"))
    best = VAE(**ema.module.config).to(memory_format=torch.channels_last).to(device)
    best.load_state_dict(tensors)
    best.amp_dtype = ema.module.amp_dtype
    for vae in (best, ema.module):
        vae.eval().measure_latents(train.batches(cfg.batch_size, device, ranks.share), ranks.sum)
        if earlier and earlier.latent_hash() == vae.latent_hash():
            vae.load_state_dict({k: v for k, v in earlier.state_dict().items() if "latent" in k}, strict=False)
    if ranks.is_main:
        save_weights(run.folder / "best.safetensors", best, {**header, **run.meta, **facts, "finished": True})
    run.save_final(ema.module, **facts, finished=True)
    mean, std = ([round(v, 3) for v in values.tolist()] for values in (best.latent_mean, best.latent_std))
    print(f"latents: mean {mean}, standard deviation {std} per channel")


def build_networks(cfg: PretrainConfig) -> tuple[VAE, PatchDiscriminator]:
    """VAE and discriminator, initialised by the seed. UserError on sizes that do not divide."""
    torch.manual_seed(cfg.seed)
    try:
        vae = VAE(cfg.image_size, cfg.downsample, cfg.latent_channels, cfg.channels, cfg.blocks, cfg.attention)
    except ValueError as e:
        raise UserError(f"{e}: change --image-size, --downsample or --channels") from None
    return vae, PatchDiscriminator()


def make_optimizer_and_schedule(
    cfg: PretrainConfig, vae: VAE, discriminator: nn.Module, plan: Plan
) -> tuple[torch.optim.AdamW, ReduceLROnPlateau | CosineAnnealingWarmupScheduler]:
    """One optimiser for both networks, and the learning-rate schedule that --schedule names."""
    groups: list[dict[str, Any]] = [{"params": [*vae.parameters()]}]
    if cfg.adversarial:  # Adam forgets faster here, because the discriminator's opponent changes
        groups.append({"params": [*discriminator.parameters()], "betas": (0.5, 0.9), "weight_decay": 0.0})
    optimizer = make_optimizer(groups, cfg)
    if cfg.schedule == "plateau":
        return optimizer, ReduceLROnPlateau(optimizer, factor=0.5, patience=cfg.plateau_patience)
    warmup = max(1, round(0.05 * plan.steps))
    return optimizer, CosineAnnealingWarmupScheduler(optimizer, warmup, plan.steps)


def print_plan(
    cfg: PretrainConfig, vae: VAE, discriminator: PatchDiscriminator, splits: dict[str, ADNIDataset], plan: Plan,
    device: torch.device,
) -> None:  # fmt: skip
    """Say what a run would do: data, network, cost, and where it writes."""
    # A few steps on black images, with the discriminator if there is one. On a CPU a few say as much as a batch.
    n, dtype = plan.batch if device.type == "cuda" else min(plan.batch, 4), pick_amp_dtype(cfg.precision, device)
    vae = vae.to(memory_format=torch.channels_last).to(device)
    discriminator = discriminator.to(memory_format=torch.channels_last).to(device)
    vae.amp_dtype, discriminator.amp_dtype, scaler = dtype, dtype, make_scaler(dtype, device)
    optimizer, _ = make_optimizer_and_schedule(cfg, vae, discriminator, plan)
    modules, with_discriminator = ([vae, discriminator], discriminator) if cfg.adversarial else ([vae], None)
    call, side = partial(backward, vae, discriminator, with_discriminator, scaler, cfg), cfg.image_size
    shapes: list[tuple[int, ...]] = [(n, 5), (n, *vae.latent_shape), (n,)]
    tensors = [torch.zeros(n, side, side, dtype=torch.uint8, device=device)]
    tensors += [torch.zeros(*shape, device=device) for shape in shapes]
    seconds = rehearse(cfg, plan, modules, [vae.encoder, vae.decoder], call, tensors, optimizer, scaler)
    network = VAE(**vae.config).to(device)  # one that is not compiled
    x, noise = (torch.zeros(1, *shape, device=device) for shape in ((1, side, side), vae.latent_shape))
    cost = training_cost(network, x, noise, amp_dtype=dtype)
    print(f"train on  {splits['train'].summary()}\nvalidate  {splits['val'].summary()}\nlatent    {vae.latent_shape}")
    print(describe_cost("VAE", *cost, plan.batch, cfg.epochs, plan.steps, device, dtype, seconds))
    print(f"writes to {Path(cfg.checkpoints) / cfg.run / 'vae'}")


def main(cfg: PretrainConfig) -> None:
    vae, discriminator = build_networks(cfg)
    stop, device = StopSignal(), pick_device(cfg.device)
    splits, fingerprint = load_splits(cfg, cfg.image_size)
    train, val, plan = splits["train"], splits["val"], Plan.of(cfg, len(splits["train"]))
    if cfg.dry_run:
        return print_plan(cfg, vae, discriminator, splits, plan, device)

    with Run(cfg, "vae", plan, stop, device) as run:
        # Average, optimiser, schedule.
        ranks, folder = run.ranks, run.folder
        vae = vae.to(memory_format=torch.channels_last).to(device)
        discriminator = discriminator.to(memory_format=torch.channels_last).to(device)
        vae.amp_dtype = discriminator.amp_dtype = pick_amp_dtype(cfg.precision, device)
        ema, scaler = EMA(vae, cfg.ema_decay), make_scaler(vae.amp_dtype, device)
        optimizer, schedule = make_optimizer_and_schedule(cfg, vae, discriminator, plan)

        # Resume, or begin. A frozen encoder stays frozen, whatever --epochs and so the start of that phase is now.
        parts = {"discriminator": discriminator} if cfg.adversarial else {}
        run.track(4, model=vae, ema=ema, optimizer=optimizer, schedule=schedule, scaler=scaler, **parts)
        adversarial_from = round(cfg.adversarial_start * plan.steps) if cfg.adversarial else plan.steps
        state = run.resume(fingerprint, f"slices than {cfg.data} now holds")
        if run.finished:
            return
        if state and run.step > state.get("fooling_from", run.step):
            adversarial_from = state["fooling_from"]
        run.extra = {"fooling_from": adversarial_from}

        train.images, val.images = (to_device_if_it_fits(d.images, device) for d in (train, val))
        shown = val.batch(torch.tensor(evenly_spaced(len(val), 8)), device)

        # A step of n images whose result is thrown away: it shows what fits the memory and what can be compiled.
        network, discriminator_ddp = ranks.wrap_ddp(vae), ranks.wrap_ddp(discriminator) if cfg.adversarial else None

        def trial(n: int) -> None:
            x, noise = train.images[:1].expand(n, -1, -1).to(device), torch.zeros(n, *vae.latent_shape, device=device)
            u, with_discriminator = torch.zeros(n, 5, device=device), discriminator if cfg.adversarial else None
            backward(network, discriminator, with_discriminator, scaler, cfg, 1.0, x, u, noise, u[:, 0])
            vae.zero_grad()
            discriminator.zero_grad()

        run.begin(
            {"kind": "vae", "model": vae.config, "classes": train.classes}, vae, [vae.encoder, vae.decoder], [network],
            trial,
        )  # fmt: skip

        def make_gradients(network: nn.Module, discriminator_ddp: nn.Module | None) -> Gradients:
            """For the phase before the adversarial one, without a discriminator, or for that one."""
            ddp = [network] if discriminator_ddp is None else [network, discriminator_ddp]
            call = partial(backward, network, discriminator, discriminator_ddp, scaler, cfg)
            modules = [vae, discriminator][: len(ddp)]
            return Gradients(call, modules, optimizer, scaler, cfg.grad_clip, ranks, plan.batch, run.micro, ddp)

        gradients = make_gradients(network, None)
        order = shuffled_batches(len(train), plan.batch, run.step, cfg.seed, 1)
        batches = gather_batches([train.images], (index[run.rows] for index in order), device)
        u, strength = (torch.zeros(run.rows.stop - run.rows.start, *more, device=device) for more in ((5,), ()))

        for epoch in run.epochs():
            for step in run.steps(epoch):
                (x,) = next(batches)
                # Every step has its own random numbers, by (seed, step), so resuming needs no state of a generator.
                g, shape = generator(cfg.seed, 2, step, device=device), (plan.batch, *vae.latent_shape)
                if augments(cfg):
                    u = (torch.rand(plan.batch, 5, generator=g, device=device) * 2 - 1)[run.rows]
                noise = torch.randn(shape, generator=g, device=device)[run.rows]

                # The adversarial phase. The weight of a discriminator that knows nothing yet would do harm, so it
                # grows over a tenth of the training.
                if step >= adversarial_from:
                    strength.fill_(min(1.0, (step - adversarial_from) / (0.1 * plan.steps)))
                    if any(p.requires_grad for p in vae.encoder.parameters()):
                        freeze_encoder(vae, ema.module)
                        gradients = make_gradients(ranks.wrap_ddp(vae), discriminator_ddp)

                added, norm = gradients(x, u, noise, strength)
                optimise(vae, optimizer, ema, added)
                if isinstance(schedule, CosineAnnealingWarmupScheduler):
                    schedule.step()
                run.took(added, norm)

            if not run.evaluates(epoch):
                continue

            # Evaluate the averaged weights. The validation loss does not see texture, so with a discriminator the
            # latest weights count as the best, and a loss that rises is no plateau.
            numbers, adversarial = evaluate(ema.module, val, cfg, ranks), run.step > adversarial_from
            names = ("loss/train", "reconstruction/train", "KL/train", "discriminator/train")
            numbers |= {name: value / plan.batch for name, value in zip(names[: 3 + adversarial], run.means())}
            if isinstance(schedule, ReduceLROnPlateau) and not adversarial:
                schedule.step(numbers["loss/val"])
            pictures = ["reconstructions.gif"] * (epoch % cfg.gif_every == 0 or run.is_last(epoch))
            if pictures and ranks.is_main:
                show_reconstructions(ema.module, shown, folder, epoch, run.is_last(epoch))
            run.end_epoch(numbers, ema.module, adversarial, pictures, people=True)

        # The end: write the state, then measure the latents, without which no U-Net can be trained.
        run.save()
        save_with_latents(run, ema, splits, cfg, device)
    print(f"done: {folder / 'final.safetensors'}; reconstructions in {folder / 'reconstructions.png'}")


if __name__ == "__main__":
    run_script(main, cfg)
