"""Train the Fast-DDPM U-Net on the latents of a run's VAE: python train.py [demo|small|adni] --data DIR --run NAME.

The same command again resumes.
"""

from __future__ import annotations

from config import TrainConfig, parse

if __name__ == "__main__":
    cfg = parse(TrainConfig)  # before torch is imported, so that --help answers at once

import time
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cluster import Ranks, StopSignal, check_same_run, leave_early
from dataset import ADNIDataset, carved_people, load_splits
from device import (
    allocate_rows,
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
from metrics import psnr, ssim, unit, unpaired
from modules import (
    CosineAnnealingWarmupScheduler,
    Lookahead,
    NoiseScheduler_Fast_DDPM,
    StableDiffusion,
    UNet,
)
from pictures import add_gif_frame, image_grid, to_uint8, visualise_denoising_process
from report import refresh_report
from utils import UserError, derive_seed, generator, git_commit, progress_bar, run_script
from vae import VAE, load_vae
from weights import load_state, save_state, save_weights


class Latents:
    """All slices of a split as posterior mean and std, float16, redrawn at every visit; mirrored ones beside them.

    Public: `moments` [N, 1 or 2 (mirrored), 2 (mean, std), C, h, w] and `labels` int64 [N], on the device if they fit.
    """

    def __init__(self, vae: VAE, data: ADNIDataset, batch: int, ranks: Ranks, cfg: TrainConfig, what: str):
        # Half precision rounds a latent of size 1 by 5e-4, far below the posterior's own std. With all of them at hand
        # a step of training touches no image and no VAE.
        shape = (len(data), 1 + cfg.flip, 2, *vae.latent_shape)
        self.moments = allocate_rows(shape, torch.float16, Path(cfg.cache))
        cuts, bar = ranks.cuts(len(data), batch), progress_bar(len(data), what=what)
        starts = range(cuts[ranks.rank], cuts[ranks.rank + 1], batch)
        with eval_mode(vae), bar:
            for i, x in zip(starts, data.batches(batch, ranks.device, ranks.share)):
                for m in range(1 + cfg.flip):
                    self.moments[i : i + len(x), m] = torch.stack(vae.encode(x.flip(3) if m else x), dim=1).cpu()
                bar.update(len(x) * ranks.size)
        ranks.complete(self.moments, cuts)
        self.moments, self.device = to_device_if_it_fits(self.moments, ranks.device), ranks.device
        self.labels = data.labels.to(self.moments.device)

    def __len__(self) -> int:
        return len(self.labels)

    def gather_batches(self, order: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """(moments, labels) [B, ...] on the device for every index of `order`."""
        return gather_batches([self.moments, self.labels], order, self.device)


def draw(moments: Tensor, which: Tensor, noise: Tensor) -> Tensor:
    """A posterior sample of each slice [B, C, h, w] with this noise; `which` [B] in [0, 1): its upper half mirrors."""
    b, mirrored = moments.shape[:2]
    which = (which * mirrored).long()
    mean, std = moments[torch.arange(b, device=moments.device), which].float().unbind(1)
    return mean + std * noise


def draw_step(
    model: StableDiffusion, batch: int, shape: Sequence[int], cfg: TrainConfig, g: torch.Generator
) -> list[Tensor]:
    """All randomness of a step, a row per image: which mirror image, posterior noise, hidden labels, place in the grid
    of timesteps, noise. Latents have this shape (C, h, w)."""
    u = torch.rand(2, batch, generator=g, device=g.device)
    noise = torch.randn(2, batch, *shape, generator=g, device=g.device)
    places = torch.searchsorted(model.scheduler.timesteps, model.scheduler.sample_timesteps(batch, g))
    return [u[0], noise[0], u[1] < cfg.class_dropout, places, noise[1]]


def loss_by_timestep(
    model: nn.Module, timesteps: Tensor, z: Tensor, y: Tensor, places: Tensor, noise: Tensor, bins: int
) -> tuple[Tensor, Tensor]:
    """Loss per image [B], and [2, bins]: its sum and the number of images, by place in the grid of timesteps.

    `model` is a StableDiffusion, or what `Ranks.wrap` made of one.
    """
    loss, _ = model(z, timesteps[places], noise, y)
    hit = torch.stack([loss.detach(), torch.ones_like(loss)])
    where = (places * bins // len(timesteps)).expand(2, -1)
    return loss, torch.zeros(2, bins, device=z.device).scatter_add_(1, where, hit)


def training_loss(
    network: nn.Module, model: StableDiffusion, moments: Tensor, y: Tensor, draws: Sequence[Tensor], bins: int
) -> tuple[Tensor, Tensor]:
    """What `loss_by_timestep` gives for a visit to these slices, by rows of `draw_step`; the first of it weighted."""
    which, posterior, hidden, places, noise = draws
    z, y, timesteps = draw(moments, which, posterior), model.hide_labels(y, hidden), model.scheduler.timesteps
    loss, counted = loss_by_timestep(network, timesteps, z, y, places, noise, bins)
    return loss * model.weight(timesteps[places]), counted


def losses(model: StableDiffusion, val: Latents, trained: Tensor, cfg: TrainConfig, ranks: Ranks) -> dict[str, float]:
    """Loss in training (its sums [2, bins] by timestep) and on people never trained on, whole and by timestep.

    Validation takes the same noise and timesteps at every call.
    """
    timesteps, bins, shape = model.scheduler.timesteps, trained.shape[1], val.moments.shape[3:]
    sums, order = torch.zeros(2, bins, device=val.device), torch.arange(len(val)).split(64)
    order = order[ranks.share(len(order))]
    with eval_mode(model):
        for index, (moments, y) in zip(order, val.visit(order)):
            g = generator(cfg.seed, 5, int(index[0]), device=val.device)
            which, posterior, _, _, noise = draw_step(model, len(index), shape, cfg, g)
            places = (index.to(val.device) * 7919 + 13) % len(timesteps)  # a prime stride: another place every slice
            sums += loss_by_timestep(model, timesteps, draw(moments, which, posterior), y, places, noise, bins)[1]
    numbers = {}
    for name, (total, count) in (("train", trained), ("val", ranks.sum(sums))):
        numbers[f"loss/{name}"] = (total.sum() / count.sum()).item()
        for i, loss in enumerate((total / count.clamp(min=1)).tolist()):
            numbers[f"loss by timestep, {name}/t={timesteps[-(-i * len(timesteps) // bins)]}"] = loss
    return numbers


def denoising_quality(
    model: StableDiffusion, vae: VAE, latents: Latents, val: ADNIDataset, cfg: TrainConfig, ranks: Ranks
) -> dict[str, float]:
    """PSNR and SSIM of the one-step estimate of x0 against its own image, at up to ten timesteps, on 16 slices."""
    index = torch.linspace(0, len(val) - 1, min(16, len(val))).long()
    x, (moments, y) = unit(val.batch(index, latents.device)), next(latents.visit([index]))
    timesteps = model.scheduler.timesteps
    places = np.unique(np.linspace(0, len(timesteps) - 1, min(10, len(timesteps))).round().astype(int))
    quality = torch.zeros(len(places), 2, device=latents.device)
    with eval_mode(model, vae):
        for i in range(ranks.rank, len(places), ranks.size):
            g = generator(cfg.seed, 6, device=latents.device)
            which, posterior, _, _, noise = draw_step(model, len(index), moments.shape[3:], cfg, g)
            _, x0 = model(draw(moments, which, posterior), timesteps[places[i]].expand(len(index)), noise, y)
            x0 = unit(vae.decode(x0))
            quality[i] = torch.stack([psnr(x0, x).mean(), ssim(x0, x).mean()])
    numbers = {}
    for place, values in zip(places, ranks.sum(quality).tolist()):
        for name, value in zip(("PSNR", "SSIM"), values):
            numbers[f"denoising {name}/t={timesteps[place]}"] = value
    return numbers


def show_samples(
    model: StableDiffusion, vae: VAE, train: ADNIDataset, val: ADNIDataset, cfg: TrainConfig, folder: Path, epoch: int,
    last: bool, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """16 samples of the fixed seed to FOLDER/samples.png and the growing samples.gif, classes in turn.

    Returns their PSNR and SSIM against unrelated validation slices, beside those of training slices: without pairs
    these numbers say only how alike strangers are. Each rank draws its share; the strip of denoising shows rank 0's.
    """
    device, n = model.scheduler.timesteps.device, 16
    y = torch.arange(n) % model.num_classes if model.num_classes else None
    x, mine = torch.zeros(n, 1, *2 * [vae.config["image_size"]], device=device), range(n)[ranks.share(n)]
    steps: list[tuple[int, Tensor, Tensor]] = []
    with eval_mode(model, vae):
        if mine:
            z = model.generate(
                vae.latent_shape, cfg.seed, mine, None if y is None else y[mine.start : mine.stop],
                callback=lambda t, x_t, x0: steps.append((t, x_t[:4], x0[:4])),
            )  # fmt: skip
            x[mine.start : mine.stop] = vae.decode(z)
        ranks.sum(x)
        if ranks.main:
            visualise_denoising_process(steps, vae.decode, folder)
            add_gif_frame(folder, "samples", image_grid(to_uint8(x)), epoch, last)
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
    stop, device = StopSignal(), pick_device(cfg.device)
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
                channels, side, cfg.channels, cfg.blocks, cfg.attention, num_classes, cfg.dropout, cfg.norm_group,
                cfg.patch,
            )  # fmt: skip
            return StableDiffusion(
                unet, NoiseScheduler_Fast_DDPM(num_steps=cfg.num_steps, grid=cfg.grid), cfg.prediction, cfg.loss_weight
            )
        except ValueError as e:
            raise UserError(f"{e}: change --channels, --grid or --num-steps") from None

    amp_dtype = pick_amp_dtype(cfg.precision, device)
    batch = min(cfg.batch_size, len(train))
    steps_per_epoch = len(train) // batch
    total = cfg.epochs * steps_per_epoch
    if cfg.dry_run:
        return print_plan(cfg, vae, build().unet, splits, batch, total, device, amp_dtype)

    ranks = Ranks(device)
    folder = ranks.open(cfg, "diffusion")
    torch.manual_seed(cfg.seed)
    model = build().to(device, memory_format=torch.channels_last)
    model.amp_dtype = amp_dtype
    vae.amp_dtype = amp_dtype if device.type == "cuda" else None
    bins = min(10, len(model.scheduler.timesteps))
    ema = make_ema(model, cfg.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type != "mps"
    )
    if cfg.lookahead:
        optimizer = Lookahead(optimizer)
    schedule = CosineAnnealingWarmupScheduler(optimizer, max(1, round(cfg.warmup * total)), total)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    step, evaluated, best = 0, 0, float("inf")
    # Since the last evaluation, over the steps taken: the loss and the images by place in the grid, the gradient norm,
    # and the number of steps.
    sums = torch.zeros(2 * bins + 2, device=device)
    state = ranks.first(lambda: load_state(folder / "last.pt"))
    if state:
        check_same_run(cfg, fingerprint, state, folder)
        if state["vae"] != vae.latent_hash():
            raise UserError(f"{folder} was started on the latents of another VAE than {vae_file}: use --fresh")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        schedule.total_steps, schedule.warmup_steps = total, max(1, round(cfg.warmup * total))  # --epochs may be new
        step, evaluated, best, sums = state["step"], state["evaluated"], state["best"], state["sums"].to(device)
        if step >= total and (folder / "final.safetensors").exists():
            print(f"{folder} is finished: {cfg.epochs} epochs; more with --epochs, again with --fresh")
            return ranks.close()
        print(f"resuming {folder} at epoch {step / steps_per_epoch:.2f}")
    ranks.check_same(fingerprint, step)

    latents = Latents(vae, train, cfg.batch_size, ranks, cfg, "encoding training slices")
    val_latents = Latents(vae, val, cfg.batch_size, ranks, replace(cfg, flip=False), "encoding validation slices")
    meta = {
        "kind": "diffusion", "model": model.unet.config, "scheduler": model.scheduler.config,
        "prediction": cfg.prediction, "classes": train.classes, "vae": vae.latent_hash(), "config": asdict(cfg),
        "commit": git_commit(), "data": train.summary(), "held_out": carved_people(splits),
        "hardware": describe_hardware(device),
    }  # fmt: skip
    log = RunLog(folder, cfg, "diffusion", step) if ranks.main else None

    share = ranks.rows(batch)

    def trial(n: int) -> None:
        moments, y = next(latents.visit([torch.zeros(n, dtype=torch.int64)]))
        draws = draw_step(model, n, vae.latent_shape, cfg, generator(0, device=device))
        scaler.scale(training_loss(model, model, moments, y, draws, bins)[0].mean()).backward()
        model.zero_grad()

    micro = find_micro_batch(cfg.micro_batch, share.stop - share.start, model, 2 if state else 4, trial)
    compile_networks(cfg.compile, [model.unet], lambda: trial(micro), device)
    network, watch = ranks.wrap(model), NonFiniteWatch(device)

    champion = None  # the best weights since the last save, which writes them: epochs can be seconds long

    def save() -> None:
        nonlocal champion
        if not ranks.main:
            return
        if champion:
            save_weights(folder / "best.safetensors", *champion)
            champion = None
        saved = {name: part.state_dict() for name, part in parts.items()}
        numbers = {"step": step, "evaluated": evaluated, "best": best, "sums": sums.cpu(), "vae": meta["vae"]}
        save_state(folder / "last.pt", {**saved, **numbers, "config": asdict(cfg), "data": fingerprint})

    bar, clock, clock_step, saved_at = progress_bar(total * batch, step * batch), time.time(), step, time.time()
    visits = latents.visit(index[share] for index in shuffled_batches(len(train), batch, step, cfg.seed, 3))
    stop.begin()
    while True:
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 and step > evaluated:
            speed = (step - clock_step) * batch / max(1e-9, time.time() - clock)
            numbers = {"epoch": epoch, "images per s": speed}
            numbers |= losses(ema.module, val_latents, sums[:-2].view(2, bins), cfg, ranks)
            norm, taken = sums[-2:].tolist()
            numbers |= {"gradient norm": norm / max(1.0, taken), "learning rate": schedule.get_last_lr()[0]}
            if taken < step - evaluated:
                numbers["skipped steps"] = step - evaluated - taken
            if device.type == "cuda":
                numbers["GPU memory (GB)"] = torch.cuda.max_memory_allocated(device) / 1e9
            if epoch % cfg.sample_every == 0 or step == total:
                numbers |= denoising_quality(ema.module, vae, val_latents, val, cfg, ranks)
                numbers |= show_samples(ema.module, vae, train, val, cfg, folder, epoch, step == total, ranks)
            if numbers["loss/val"] < best:
                best = numbers["loss/val"]
                champion = (deepcopy(ema.module), {**meta, "epoch": epoch, "metrics": numbers})
            if ranks.main:
                log.log(step, numbers)
                if "unpaired PSNR/generated" in numbers:
                    log.picture(step, "samples", folder / "samples.png")
                    log.picture(step, "denoising", folder / "denoising.gif")
                    log.plot()
                    refresh_report(folder.parent)
            a, b = numbers["loss/train"], numbers["loss/val"]
            bar.write(
                f"epoch {epoch:4d}  train {a:.4f}  val {b:.4f}  {speed:.0f} images/s{skipped_steps_note(numbers)}"
            )
            evaluated, clock, clock_step = step, time.time(), step
            sums.zero_()
        leave = step >= total or ranks.any(stop, step)
        if leave or time.time() - saved_at > 60 * cfg.save_minutes:
            save()
            saved_at = time.time()
        if leave:
            break
        moments, y = next(visits)
        g = generator(cfg.seed, 4, step, device=device)  # a step's randomness is its own: resuming needs no state
        draws = [d[share] for d in draw_step(model, batch, vae.latent_shape, cfg, g)]

        by_place = torch.zeros(2, bins, device=device)
        for rows, weight, passing in ranks.portions(batch, micro, network):
            if cfg.dropout:
                torch.manual_seed(derive_seed(cfg.seed, 9, step, share.start + rows.start))
            with passing:
                loss, counted = training_loss(network, model, moments[rows], y[rows], [d[rows] for d in draws], bins)
                scaler.scale(weight * loss.mean()).backward()
            by_place += counted
        ranks.sum(by_place)
        norm = optimise(model, optimizer, scaler, ema, cfg.grad_clip)
        schedule.step()
        sums += torch.where(
            norm.isfinite(), torch.cat([by_place.flatten(), norm[None], torch.ones_like(norm)[None]]), 0.0
        )
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
    if ranks.main:
        final = {**meta, "epoch": cfg.epochs, "metrics": log.rows[-1]}
        save_weights(folder / "final.safetensors", ema.module, final)
    stop.end()
    if ranks.main:
        log.close()
    print(
        f"done: {folder / 'final.safetensors'}; samples in {folder / 'samples.png'}, curves in {folder / 'curves.png'}"
    )
    ranks.close()


if __name__ == "__main__":
    run_script(main, cfg)
