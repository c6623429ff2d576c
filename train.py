"""Train the Fast-DDPM U-Net on the latents of a run's VAE: python train.py [demo|small|adni] --data DIR --run NAME.

The same command again resumes.
"""

from __future__ import annotations

from config import TrainConfig, parse

if __name__ == "__main__":
    cfg = parse(TrainConfig)  # before torch is imported, so that --help answers at once

import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset import ADNIDataset, carved_people, load_splits
from metrics import psnr, ssim, unit, unpaired
from modules import (
    CosineAnnealingWarmupScheduler,
    Lookahead,
    NoiseScheduler_Fast_DDPM,
    StableDiffusion,
    UNet,
)
from utils import (
    RunLog,
    StopSignal,
    UserError,
    check_same_run,
    compile_networks,
    describe_cost,
    describe_hardware,
    empty_anywhere,
    file_hash,
    fit,
    frozen,
    generator,
    git_commit,
    grow_gif,
    image_grid,
    leave_early,
    load_state,
    make_ema,
    open_run,
    optimise,
    pick_amp_dtype,
    pick_device,
    progress_bar,
    run_script,
    save_state,
    save_weights,
    shuffled,
    to_uint8,
    training_cost,
    visit,
    visualise_denoising_process,
)
from vae import VAE, load_vae


class Latents:
    """All slices of a split as posterior mean and std, float16, redrawn at every visit; mirrored ones beside them.

    Public: `moments` [N, 1 or 2 (mirrored), 2 (mean, std), C, h, w] and `labels` int64 [N], on the device if they fit.
    """

    def __init__(self, vae: VAE, data: ADNIDataset, batch: int, device: torch.device, cfg: TrainConfig, what: str):
        # Half precision rounds a latent of size 1 by 5e-4, far below the posterior's own std. With all of them at hand
        # a step of training touches no image and no VAE.
        shape = (len(data), 1 + cfg.flip, 2, *vae.latent_shape)
        self.moments = empty_anywhere(shape, torch.float16, Path(cfg.cache))
        bar = progress_bar(len(data), what=what)
        with frozen(vae), bar:
            for i, x in zip(range(0, len(data), batch), data.batches(batch, device)):
                for m in range(1 + cfg.flip):
                    self.moments[i : i + len(x), m] = torch.stack(vae.encode(x.flip(3) if m else x), dim=1).cpu()
                bar.update(len(x))
        self.moments, self.device = fit(self.moments, device), device
        self.labels = data.labels.to(self.moments.device)

    def __len__(self) -> int:
        return len(self.labels)

    def visit(self, order: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """(moments, labels) [B, ...] on the device for every index of `order`."""
        return visit([self.moments, self.labels], order, self.device)


def draw(moments: Tensor, g: torch.Generator) -> Tensor:
    """A posterior sample of each slice [B, C, h, w], of its mirror image half of the time if there are any."""
    b, mirrored = moments.shape[:2]
    which = torch.randint(mirrored, (b,), generator=g, device=moments.device)
    mean, std = moments[torch.arange(b, device=moments.device), which].float().unbind(1)
    return mean + std * torch.randn(mean.shape, generator=g, device=moments.device)


def loss_by_timestep(
    model: StableDiffusion, z: Tensor, y: Tensor, places: Tensor, bins: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Loss per image [B], and [2, bins]: its sum and the number of images, by place in the grid of timesteps."""
    timesteps = model.scheduler.timesteps
    noise = torch.randn(z.shape, generator=g, device=z.device)
    loss, _ = model(z, timesteps[places], noise, y)
    hit = torch.stack([loss.detach(), torch.ones_like(loss)])
    where = (places * bins // len(timesteps)).expand(2, -1)
    return loss, torch.zeros(2, bins, device=z.device).scatter_add_(1, where, hit)


def training_loss(
    model: StableDiffusion, moments: Tensor, y: Tensor, cfg: TrainConfig, bins: int, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What `loss_by_timestep` gives for a visit to these slices: posterior, labels, timesteps and noise drawn by g."""
    z, y = draw(moments, g), model.drop_labels(y, cfg.class_dropout, g)
    places = torch.searchsorted(model.scheduler.timesteps, model.scheduler.sample_timesteps(len(z), g))
    return loss_by_timestep(model, z, y, places, bins, g)


def losses(model: StableDiffusion, val: Latents, trained: Tensor, cfg: TrainConfig) -> dict[str, float]:
    """Loss in training (its sums [2, bins] by timestep) and on people never trained on, whole and by timestep.

    Validation takes the same noise and timesteps at every call.
    """
    timesteps, bins = model.scheduler.timesteps, trained.shape[1]
    sums, order = torch.zeros(2, bins, device=val.device), torch.arange(len(val)).split(64)
    with frozen(model):
        for index, (moments, y) in zip(order, val.visit(order)):
            g = generator(cfg.seed, 5, int(index[0]), device=val.device)
            places = (index.to(val.device) * 7919 + 13) % len(timesteps)  # a prime stride: another place every slice
            sums += loss_by_timestep(model, draw(moments, g), y, places, bins, g)[1]
    numbers = {}
    for name, (total, count) in (("train", trained), ("val", sums)):
        numbers[f"loss/{name}"] = (total.sum() / count.sum()).item()
        for i, loss in enumerate((total / count.clamp(min=1)).tolist()):
            numbers[f"loss by timestep, {name}/t={timesteps[-(-i * len(timesteps) // bins)]}"] = loss
    return numbers


def denoising_quality(
    model: StableDiffusion, vae: VAE, latents: Latents, val: ADNIDataset, cfg: TrainConfig
) -> dict[str, float]:
    """PSNR and SSIM of the one-step estimate of x0 against its own image, at up to ten timesteps, on 16 slices."""
    index = torch.linspace(0, len(val) - 1, min(16, len(val))).long()
    x, (moments, y) = unit(val.batch(index, latents.device)), next(latents.visit([index]))
    timesteps, numbers = model.scheduler.timesteps, {}
    with frozen(model, vae):
        for place in np.unique(np.linspace(0, len(timesteps) - 1, min(10, len(timesteps))).round().astype(int)):
            g = generator(cfg.seed, 6, device=latents.device)
            z, t = draw(moments, g), timesteps[place].expand(len(index))
            _, x0 = model(z, t, torch.randn(z.shape, generator=g, device=z.device), y)
            x0 = unit(vae.decode(x0))
            numbers[f"denoising PSNR/t={timesteps[place]}"] = psnr(x0, x).mean().item()
            numbers[f"denoising SSIM/t={timesteps[place]}"] = ssim(x0, x).mean().item()
    return numbers


def show_samples(
    model: StableDiffusion,
    vae: VAE,
    train: ADNIDataset,
    val: ADNIDataset,
    cfg: TrainConfig,
    folder: Path,
    epoch: int,
    last: bool,
) -> dict[str, float]:
    """16 samples of the fixed seed to FOLDER/samples.png and the growing samples.gif, classes in turn.

    Returns their PSNR and SSIM against unrelated validation slices, beside those of training slices: without pairs
    these numbers say only how alike strangers are.
    """
    device, n = model.scheduler.timesteps.device, 16
    y = torch.arange(n) % model.num_classes if model.num_classes else None
    steps: list[tuple[int, Tensor, Tensor]] = []
    with frozen(model, vae):
        z = model.generate(
            vae.latent_shape, cfg.seed, range(n), y, callback=lambda t, x_t, x0: steps.append((t, x_t[:4], x0[:4]))
        )
        x = vae.decode(z)
        visualise_denoising_process(steps, vae.decode, folder)
    grow_gif(folder, "samples", image_grid(to_uint8(x)), epoch, last)
    g = generator(cfg.seed, 7)
    strangers, real = (unit(d.batch(torch.randint(len(d), (n,), generator=g), device)) for d in (val, train))
    (p, s), (p_real, s_real) = unpaired(unit(x), strangers), unpaired(real, strangers)
    return {
        "unpaired PSNR/generated": p, "unpaired PSNR/real": p_real,
        "unpaired SSIM/generated": s, "unpaired SSIM/real": s_real,
    }  # fmt: skip


def print_plan(
    cfg: TrainConfig, vae: VAE, unet: UNet, splits: dict[str, ADNIDataset], batch: int, steps: int,
    device: torch.device, amp_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """What a run would do."""
    train, labels = splits["train"], torch.empty(1, dtype=torch.int64, device="meta")
    z = torch.empty(1, *vae.latent_shape, device="meta")
    cost = training_cost(unet.to("meta"), z, labels, labels if unet.label is not None else None)
    print(f"train on  {train.summary()}\nvalidate  {splits['val'].summary()}\nlatent    {vae.latent_shape}")
    print(f"classes   {', '.join(train.classes)}; {'un' * (unet.label is None)}conditional")
    print(describe_cost("U-Net", *cost, batch, cfg.epochs, steps, device, amp_dtype))
    print(f"writes to {Path(cfg.checkpoints) / cfg.run / 'diffusion'}")


def main(cfg: TrainConfig) -> None:
    device = pick_device(cfg.device)
    vae_file = Path(cfg.checkpoints) / cfg.run / "vae" / "best.safetensors"
    if not vae_file.exists():
        raise UserError(
            f"run {cfg.run} has no VAE ({vae_file} is not there): train it first with python pre_train.py, same --run"
        )
    vae, vae_meta = load_vae(vae_file, device)
    splits, fingerprint = load_splits(cfg, vae.config["image_size"])
    train, val = splits["train"], splits["val"]
    if vae_meta.get("held_out", carved_people(splits)) != carved_people(splits):
        raise UserError(
            f"{vae_file} was trained with other people held out: take the --data, --seed, --val-fraction and "
            "--subject-regex of its training, or train it again with pre_train.py --fresh"
        )
    num_classes = 0 if cfg.unconditional or len(train.classes) == 1 else len(train.classes)

    def build() -> StableDiffusion:
        try:
            channels, side, _ = vae.latent_shape
            unet = UNet(
                channels, side, cfg.channels, cfg.blocks, cfg.attention, num_classes, cfg.dropout, cfg.norm_group
            )
            return StableDiffusion(
                unet, NoiseScheduler_Fast_DDPM(num_steps=cfg.num_steps, grid=cfg.grid), cfg.prediction
            )
        except ValueError as e:
            raise UserError(f"{e}: change --channels, --grid or --num-steps") from None

    amp_dtype = pick_amp_dtype(cfg.precision, device)
    batch = min(cfg.batch_size, len(train))
    steps_per_epoch = len(train) // batch
    total = cfg.epochs * steps_per_epoch
    if cfg.dry_run:
        return print_plan(cfg, vae, build().unet, splits, batch, total, device, amp_dtype)

    folder = open_run(cfg, "diffusion")
    torch.manual_seed(cfg.seed)
    model = build().to(device, memory_format=torch.channels_last)
    model.amp_dtype = amp_dtype
    vae.amp_dtype = amp_dtype if device.type == "cuda" else None
    bins = min(10, len(model.scheduler.timesteps))
    ema = make_ema(model, cfg.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type in ("cuda", "cpu")
    )
    if cfg.lookahead:
        optimizer = Lookahead(optimizer)
    schedule = CosineAnnealingWarmupScheduler(optimizer, max(1, round(cfg.warmup * total)), total)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    step, evaluated, best = 0, 0, float("inf")
    # Since the last evaluation: row 0 the loss and row 1 the images by place in the grid, then the gradient norm.
    sums = torch.zeros(2 * bins + 1, device=device)
    state = load_state(folder / "last.pt")
    if state:
        check_same_run(cfg, fingerprint, state, folder)
        if state["vae"] != file_hash(vae_file):
            raise UserError(f"{folder} was started on the latents of another VAE than {vae_file}: use --fresh")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        schedule.total_steps, schedule.warmup_steps = total, max(1, round(cfg.warmup * total))  # --epochs may be new
        step, evaluated, best, sums = state["step"], state["evaluated"], state["best"], state["sums"].to(device)
        if step >= total and (folder / "final.safetensors").exists():
            print(f"{folder} is finished: {cfg.epochs} epochs; more with --epochs, again with --fresh")
            return
        print(f"resuming {folder} at epoch {step / steps_per_epoch:.2f}")

    latents = Latents(vae, train, cfg.batch_size, device, cfg, "encoding training slices")
    val_latents = Latents(vae, val, cfg.batch_size, device, replace(cfg, flip=False), "encoding validation slices")
    meta = {
        "kind": "diffusion", "model": model.unet.config, "scheduler": model.scheduler.config,
        "prediction": cfg.prediction, "classes": train.classes, "vae": file_hash(vae_file), "config": asdict(cfg),
        "commit": git_commit(), "data": train.summary(), "held_out": carved_people(splits),
        "hardware": describe_hardware(device),
    }  # fmt: skip
    log, stop = RunLog(folder, cfg, "diffusion", step), StopSignal()

    def trial() -> None:
        moments, y = next(latents.visit([torch.zeros(batch, dtype=torch.int64)]))
        loss, _ = training_loss(model, moments, y, cfg, bins, generator(0, device=device))
        scaler.scale(loss.mean()).backward()
        model.zero_grad()

    compile_networks(cfg.compile, [model.unet], trial, device)

    champion = None  # the best weights since the last save, which writes them: epochs can be seconds long

    def save() -> None:
        nonlocal champion
        if champion:
            save_weights(folder / "best.safetensors", *champion)
            champion = None
        saved = {name: part.state_dict() for name, part in parts.items()}
        numbers = {"step": step, "evaluated": evaluated, "best": best, "sums": sums.cpu(), "vae": meta["vae"]}
        save_state(folder / "last.pt", {**saved, **numbers, "config": asdict(cfg), "data": fingerprint})

    bar, clock, clock_step, saved_at = progress_bar(total * batch, step * batch), time.time(), step, time.time()
    visits = latents.visit(shuffled(len(train), batch, step, cfg.seed, 3))
    while True:
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 and step > evaluated:
            speed = (step - clock_step) * batch / max(1e-9, time.time() - clock)
            numbers = {"epoch": epoch, "images per s": speed}
            numbers |= losses(ema.module, val_latents, sums[:-1].view(2, bins), cfg)
            numbers |= {
                "gradient norm": sums[-1].item() / (step - evaluated),
                "learning rate": schedule.get_last_lr()[0],
            }
            if device.type == "cuda":
                numbers["GPU memory (GB)"] = torch.cuda.max_memory_allocated(device) / 1e9
            if epoch % cfg.sample_every == 0 or step == total:
                numbers |= denoising_quality(ema.module, vae, val_latents, val, cfg)
                numbers |= show_samples(ema.module, vae, train, val, cfg, folder, epoch, step == total)
                log.picture(step, "samples", folder / "samples.png")
                log.picture(step, "denoising", folder / "denoising.gif")
            log.log(step, numbers)
            if "unpaired PSNR/generated" in numbers:
                log.plot()
            if numbers["loss/val"] < best:
                best = numbers["loss/val"]
                champion = (deepcopy(ema.module), {**meta, "epoch": epoch, "metrics": numbers})
            a, b = numbers["loss/train"], numbers["loss/val"]
            bar.write(f"epoch {epoch:4d}  train {a:.4f}  val {b:.4f}  {speed:.0f} images/s")
            evaluated, clock, clock_step = step, time.time(), step
            sums.zero_()
        if step >= total or stop or time.time() - saved_at > 60 * cfg.save_minutes:
            save()
            saved_at = time.time()
        if step >= total or stop:
            break
        moments, y = next(visits)
        g = generator(cfg.seed, 4, step, device=device)  # a step's randomness is its own: resuming needs no state
        if cfg.dropout:
            torch.manual_seed(g.initial_seed())
        loss, by_place = training_loss(model, moments, y, cfg, bins, g)
        norm = optimise(loss.mean(), model, optimizer, scaler, ema, cfg.grad_clip)
        schedule.step()
        sums += torch.cat([by_place.flatten(), norm[None]])
        step += 1
        bar.update(batch)
    bar.close()
    log.close()
    if step < total:
        leave_early(stop, step / steps_per_epoch)
    save_weights(folder / "final.safetensors", ema.module, {**meta, "epoch": cfg.epochs, "metrics": log.rows[-1]})
    print(
        f"done: {folder / 'final.safetensors'}; samples in {folder / 'samples.png'}, curves in {folder / 'curves.png'}"
    )


if __name__ == "__main__":
    run_script(lambda: main(cfg))
