"""Train the VAE: python pre_train.py [demo|small|adni] --data DIR --run NAME. The same command again resumes."""

from __future__ import annotations

from config import PretrainConfig, parse

if __name__ == "__main__":
    cfg = parse(PretrainConfig)  # before torch is imported, so that --help answers at once

import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from cluster import Ranks, StopSignal, check_same_run, leave_early
from dataset import ADNIDataset, carved_people, load_splits, to_float
from device import (
    compile_networks,
    describe_cost,
    describe_hardware,
    eval_mode,
    gather_batches,
    pick_amp_dtype,
    pick_device,
    shuffled_batches,
    to_device_if_it_fits,
    training_cost,
)
from loop import NonFiniteWatch, RunLog, find_micro_batch, make_ema, optimise, skipped_steps_note
from metrics import psnr, ssim, unit
from modules import CosineAnnealingWarmupScheduler
from pictures import add_gif_frame, image_grid, to_uint8
from report import refresh_report
from utils import UserError, generator, git_commit, progress_bar, run_script
from vae import VAE, PatchDiscriminator, adversarial_gradient, hinge_loss, load_vae, vae_loss
from weights import load_state, load_weights, save_state, save_weights


def augment(x: Tensor, u: Tensor, cfg: PretrainConfig) -> Tensor:
    """Mirror, shift, rotate, brighten: each image [B, 1, S, S] in [-1, 1] by its row of u [B, 5], uniform in [-1, 1].

    Background stays black.
    """
    x = x + 1  # black is 0, which is what grid_sample pads with
    if cfg.flip or cfg.shift or cfg.rotate:
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
    """Validation numbers with the posterior's mean as latent: mean over slices of people never trained on."""
    total = torch.zeros(5, dtype=torch.float64)
    with eval_mode(vae):
        for x in val.batches(cfg.batch_size, ranks.device, ranks.share):
            mean, logvar = vae.posterior(x)
            x_hat = vae.reconstruct(mean)
            loss = torch.stack(vae_loss(x_hat, x, mean, logvar, cfg.reconstruction, cfg.kl_weight)) * len(x)
            quality = torch.stack([psnr(unit(x_hat), unit(x)).sum(), ssim(unit(x_hat), unit(x)).sum()])
            total += torch.cat([loss, quality]).cpu().double()
    loss, reconstruction, kl, p, s = (ranks.sum(total) / len(val)).tolist()
    return {"loss/val": loss, "reconstruction/val": reconstruction, "KL/val": kl, "PSNR/val": p, "SSIM/val": s}


def backward(
    network: nn.Module, judge: nn.Module, rival: nn.Module | None, x: Tensor, noise: Tensor, weight: float,
    scaler: torch.amp.GradScaler, cfg: PretrainConfig, strength: float = 1.0,
) -> Tensor:  # fmt: skip
    """Add the gradients of these images: loss, reconstruction, KL and the discriminator's loss, [4].

    `rival` is the discriminator where it learns and is fooled, with this share of its weight, and None before that;
    `judge` is the same without its ranks.
    """
    x_hat, mean, logvar = network(x, noise)
    loss, reconstruction, kl = vae_loss(x_hat, x, mean, logvar, cfg.reconstruction, cfg.kl_weight)
    if rival is None:
        scaler.scale(weight * loss).backward()
        return torch.stack([loss, reconstruction, kl, torch.zeros_like(kl)]).detach()
    (gradient,) = torch.autograd.grad(reconstruction, x_hat, retain_graph=True)
    fooling = adversarial_gradient(judge, x_hat, gradient, strength * cfg.adversarial)
    torch.autograd.backward([scaler.scale(weight * loss), x_hat], [None, scaler.scale(weight * fooling)])
    hinge = hinge_loss(*rival(torch.cat([x, x_hat.detach()])).chunk(2))
    scaler.scale(weight * hinge).backward()
    return torch.stack([loss, reconstruction, kl, hinge]).detach()


def show_reconstructions(vae: VAE, x: Tensor, folder: Path, epoch: int, last: bool) -> None:
    """One more frame of FOLDER/reconstructions.gif: inputs above, reconstructions below, error x4 at the bottom."""
    with eval_mode(vae):
        x_hat = vae.reconstruct(vae.posterior(x)[0]).clamp(-1, 1)
    rows = np.concatenate([to_uint8(x), to_uint8(x_hat), to_uint8(4 * (x_hat - x).abs() - 1)])
    add_gif_frame(folder, "reconstructions", image_grid(rows, columns=len(x)), epoch, last)


def main(cfg: PretrainConfig) -> None:
    try:
        vae = VAE(cfg.image_size, cfg.downsample, cfg.latent_channels, cfg.channels, cfg.blocks, cfg.attention)
    except ValueError as e:
        raise UserError(f"{e}: change --image-size, --downsample or --channels") from None
    stop, device = StopSignal(), pick_device(cfg.device)
    splits, fingerprint = load_splits(cfg, cfg.image_size)
    train, val = splits["train"], splits["val"]
    batch = min(cfg.batch_size, len(train))
    steps_per_epoch = len(train) // batch
    total = cfg.epochs * steps_per_epoch
    if cfg.dry_run:
        with torch.device("meta"):
            twin = VAE(**vae.config)
            cost = training_cost(twin, torch.empty(1, 1, *2 * [cfg.image_size]), torch.empty(1, *vae.latent_shape))
        print(f"train on  {train.summary()}\nvalidate  {val.summary()}\nlatent    {vae.latent_shape}")
        print(describe_cost("VAE", *cost, batch, cfg.epochs, total, device, pick_amp_dtype(cfg.precision, device)))
        print(f"writes to {Path(cfg.checkpoints) / cfg.run / 'vae'}")
        return

    ranks = Ranks(device)
    folder = ranks.open(cfg, "vae")
    torch.manual_seed(cfg.seed)
    vae = VAE(**vae.config).to(device, memory_format=torch.channels_last)  # again: initialised by the seed
    vae.amp_dtype = pick_amp_dtype(cfg.precision, device)
    ema = make_ema(vae, cfg.ema_decay)
    judge = PatchDiscriminator().to(device, memory_format=torch.channels_last)
    judge.amp_dtype = vae.amp_dtype
    groups = [{"params": [*vae.parameters()]}]
    if cfg.adversarial:  # Adam's memory of an opponent that changes is kept short
        groups.append({"params": [*judge.parameters()], "betas": (0.5, 0.9), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type != "mps")
    if cfg.schedule == "plateau":
        schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=cfg.plateau_patience)
    else:
        schedule = CosineAnnealingWarmupScheduler(optimizer, max(1, round(0.05 * total)), total)
    scaler = torch.amp.GradScaler(device.type, enabled=vae.amp_dtype == torch.float16)
    parts = {"model": vae, "ema": ema, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    parts |= {"judge": judge} if cfg.adversarial else {}
    fooling_from = round(cfg.adversarial_start * total) if cfg.adversarial else total
    step, evaluated, best = 0, 0, float("inf")
    # Over the steps since the last evaluation: loss, reconstruction, KL, the discriminator's loss, gradient norm; and
    # how many steps they were.
    sums = torch.zeros(6, device=device)
    state = ranks.first(lambda: load_state(folder / "last.pt"))
    if state:
        check_same_run(cfg, fingerprint, state, folder)
        if bool(cfg.adversarial) != ("judge" in state):
            how = "with" if "judge" in state else "without"
            raise UserError(f"{folder} was started {how} a discriminator: go on with it so, or start over with --fresh")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if cfg.schedule == "cosine":  # --epochs may be new
            schedule.total_steps, schedule.warmup_steps = total, max(1, round(0.05 * total))
        step, evaluated, best, sums = state["step"], state["evaluated"], state["best"], state["sums"].to(device)
        if step > state.get("fooling_from", step):  # an encoder that rests goes on resting, whatever --epochs is now
            fooling_from = state["fooling_from"]
        if step >= total and (folder / "final.safetensors").exists():
            print(f"{folder} is finished: {cfg.epochs} epochs; more with --epochs, again with --fresh")
            return ranks.close()
        print(f"resuming {folder} at epoch {step / steps_per_epoch:.2f}")
    ranks.check_same(fingerprint, step)
    # Where a finished run goes on: its latents, which a resting encoder does not change.
    done_before = state is not None and (folder / "final.safetensors").exists()
    measured = load_vae(folder / "final.safetensors", device)[0] if done_before else None

    train.images, val.images = to_device_if_it_fits(train.images, device), to_device_if_it_fits(val.images, device)
    meta = {"kind": "vae", "model": vae.config, "classes": train.classes, "config": asdict(cfg), "commit": git_commit()}
    shown = val.batch(torch.linspace(0, len(val) - 1, min(8, len(val))).long(), device)
    log = RunLog(folder, cfg, "vae", step) if ranks.main else None

    share = ranks.rows(batch)

    def trial(n: int) -> None:
        x, noise = train.batch(torch.zeros(n, dtype=torch.int64), device), torch.zeros(n, *vae.latent_shape)
        backward(vae, judge, judge if cfg.adversarial else None, x, noise.to(device), 1.0, scaler, cfg)
        vae.zero_grad(), judge.zero_grad()

    micro = find_micro_batch(cfg.micro_batch, share.stop - share.start, vae, 2 if state else 4, trial)
    compile_networks(cfg.compile, [vae.encoder, vae.decoder], lambda: trial(micro), device)
    networks, watch = [ranks.wrap(vae), *([ranks.wrap(judge)] if cfg.adversarial else [])], NonFiniteWatch(device)

    champion = None  # the best weights since the last save, which writes them: epochs can be seconds long

    def save() -> None:
        nonlocal champion
        if not ranks.main:
            return
        if champion:
            save_weights(folder / "best.safetensors", *champion)
            champion = None
        saved = {name: part.state_dict() for name, part in parts.items()}
        numbers = {"step": step, "evaluated": evaluated, "best": best, "sums": sums.cpu(), "fooling_from": fooling_from}
        save_state(folder / "last.pt", {**saved, **numbers, "config": asdict(cfg), "data": fingerprint})

    bar, clock, clock_step, saved_at = progress_bar(total * batch, step * batch), time.time(), step, time.time()
    visits = gather_batches(
        [train.images], (index[share] for index in shuffled_batches(len(train), batch, step, cfg.seed, 1)), device
    )
    stop.begin()
    while True:
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 and step > evaluated:
            speed = (step - clock_step) * batch / max(1e-9, time.time() - clock)
            numbers = evaluate(ema.module, val, cfg, ranks)
            fooled = step > fooling_from
            if cfg.schedule == "plateau" and not fooled:  # the discriminator raises the loss, and that is no stall
                schedule.step(numbers["loss/val"])
            *means, taken = sums.tolist()
            loss, reconstruction, kl, hinge, norm = (value / max(1.0, taken) for value in means)
            numbers |= {"loss/train": loss, "reconstruction/train": reconstruction, "KL/train": kl, "epoch": epoch}
            numbers |= {"discriminator/train": hinge} if fooled else {}
            numbers |= {"gradient norm": norm, "learning rate": optimizer.param_groups[0]["lr"], "images per s": speed}
            if taken < step - evaluated:
                numbers["skipped steps"] = step - evaluated - taken
            if device.type == "cuda":
                numbers["GPU memory (GB)"] = torch.cuda.max_memory_allocated(device) / 1e9
            # The validation loss cannot see texture: once a discriminator makes some, the latest weights are the best.
            if fooled or numbers["loss/val"] < best:
                best = min(best, numbers["loss/val"])
                champion = (deepcopy(ema.module), {**meta, "epoch": epoch, "metrics": numbers})
            if ranks.main:
                log.log(step, numbers)
                if epoch % cfg.gif_every == 0 or step == total:
                    show_reconstructions(ema.module, shown, folder, epoch, step == total)
                    log.picture(step, "reconstructions", folder / "reconstructions.gif", people=True)
                    log.plot()
                    refresh_report(folder.parent)
            bar.write(
                f"epoch {epoch:4d}  train {loss:.4f}  val {numbers['loss/val']:.4f}  "
                f"PSNR {numbers['PSNR/val']:.2f} dB  SSIM {numbers['SSIM/val']:.4f}{skipped_steps_note(numbers)}"
            )
            evaluated = step
            sums.zero_()
            clock, clock_step = time.time(), step
        leave = step >= total or ranks.any(stop, step)
        if leave or time.time() - saved_at > 60 * cfg.save_minutes:
            save()
            saved_at = time.time()
        if leave:
            break
        x = to_float(next(visits)[0])
        g = generator(cfg.seed, 2, step, device=device)  # a step's randomness is its own: resuming needs no state
        if cfg.flip or cfg.shift or cfg.rotate or cfg.brightness:
            x = augment(x, (torch.rand(batch, 5, generator=g, device=device) * 2 - 1)[share], cfg)
        noise = torch.randn((batch, *vae.latent_shape), generator=g, device=device)[share]

        means, rival, strength = torch.zeros(4, device=device), None, 0.0
        if step >= fooling_from:
            # The encoder rests, at its average: texture is the decoder's work, and latents stay what they are. And as a
            # discriminator that knows nothing yet would do harm, its weight grows over a tenth of the training.
            if vae.encoder[-1].weight.requires_grad:
                vae.encoder.load_state_dict(ema.module.encoder.state_dict())
                vae.encoder.requires_grad_(False)
                networks[0] = ranks.wrap(vae)
            rival, strength = networks[1], min(1.0, (step - fooling_from) / (0.1 * total))
        for rows, weight, passing in ranks.portions(batch, micro, *networks):
            with passing:
                part = backward(networks[0], judge, rival, x[rows], noise[rows], weight, scaler, cfg, strength)
            means += part * (rows.stop - rows.start) / batch
        ranks.sum(means)
        norm = optimise(vae, optimizer, scaler, ema, cfg.grad_clip, judge if rival else None)
        if cfg.schedule == "cosine":
            schedule.step()
        sums += torch.where(norm.isfinite(), torch.cat([means, norm[None], torch.ones_like(norm)[None]]), 0.0)
        step += 1
        bar.update(batch)
        if bad := watch.hopeless(norm, step):
            save()
            ranks.fail(watch.sentence(bad, bad / steps_per_epoch, folder))
    bar.close()
    if step < total:
        stop.end()
        if ranks.main:
            log.close()
        ranks.close()
        leave_early(stop, step / steps_per_epoch)
    meta |= {"finished": True, "data": train.summary(), "held_out": carved_people(splits)}
    meta |= {"hardware": describe_hardware(device)}
    tensors, of_best = ranks.first(lambda: load_weights(folder / "best.safetensors", "vae"))
    final = {**meta, "epoch": cfg.epochs, "metrics": log.rows[-1]} if ranks.main else {}
    for name, module, facts in (("best", vae, {**of_best, **meta}), ("final", ema.module, final)):
        if name == "best":
            module.load_state_dict(tensors)
        module.eval().measure_latents(train.batches(cfg.batch_size, device, ranks.share), ranks.sum)
        if measured and measured.latent_hash() == module.latent_hash():  # to the last bit what a U-Net was trained on
            module.load_state_dict({k: v for k, v in measured.state_dict().items() if "latent" in k}, strict=False)
        if ranks.main:
            save_weights(folder / f"{name}.safetensors", module, facts)
    print(f"latents: mean {rounded(module.latent_mean)}, deviation {rounded(module.latent_std)} per channel")
    print(f"done: {folder / 'final.safetensors'}; reconstructions in {folder / 'reconstructions.png'}")
    stop.end()
    if ranks.main:
        log.close()
    ranks.close()


def rounded(x: Tensor) -> list[float]:
    return [round(v, 3) for v in x.tolist()]


if __name__ == "__main__":
    run_script(main, cfg)
