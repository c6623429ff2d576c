"""Train the Fast-DDPM U-Net on the latents of a run's VAE: python train.py [demo|small|adni] --data DIR --run NAME.

The same command again resumes. The network and the samplers are in modules.py, the bookkeeping of the run in loop.py.
"""

from __future__ import annotations

from config import PredictConfig, TrainConfig, parse

if __name__ == "__main__":
    cfg = parse(TrainConfig)  # before torch is imported, so that --help answers at once

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster import Ranks, StopSignal
from conditions import GROUP, Attribute, category, draw_rows, learn_attribute, network_conditions, to_header
from dataset import ADNIDataset, carved_people, load_splits_by_rules, phantom_drawing, split_rules
from device import (
    allocate_rows,
    describe_cost,
    eval_mode,
    gather_batches,
    pick_amp_dtype,
    pick_device,
    shuffled_batches,
    side_stream,
    to_device_if_it_fits,
    training_cost,
)
from loop import EMA, Gradients, Plan, Run, make_optimizer, make_scaler, optimise, rehearse
from metrics import psnr, ssim, unit, unpaired
from modules import (
    CosineAnnealingWarmupScheduler,
    Lookahead,
    NoiseScheduler_Fast_DDPM,
    StableDiffusion,
    UNet,
    sample_steps,
    start_noise,
)
from pictures import add_gif_frame, image_grid, to_uint8, visualise_denoising_process
from sampling import plan_sampling, typical_latents
from utils import UserError, evenly_spaced, generator, progress_bar, run_script
from vae import VAE, load_vae_of_run


def vary(x: Tensor, generator: torch.Generator) -> Tensor:
    """Slices [B, 1, S, S] in [-1, 1] as of people who differ a little from these.

    Turned by up to 3 degrees, scaled by up to 3 % and shifted by up to 1 %; bent smoothly, by 0.5 % of the side
    (standard deviation at 6 x 6 points); and brightness to the power of 0.87 to 1.15.
    """
    b, _, side, _ = x.shape
    u = (torch.rand(b, 5, generator=generator) * 2 - 1).to(x.device)
    points = torch.randn(b, 2, 6, 6, generator=generator).to(x.device)
    # Where each pixel comes from: an affine map and a smooth displacement, in one interpolation. The side is 2 there.
    angle, size, shift = u[:, 0] * math.radians(3), 1 + 0.03 * u[:, 1], 0.02 * u[:, 2:4]
    cos, sin = size * angle.cos(), size * angle.sin()
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(b, 2, 3)
    bend = F.interpolate(0.01 * points, (side, side), mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(theta, [b, 1, side, side], align_corners=False) + bend
    # Bicubic, because bilinear interpolation blurs; it overshoots a little. Black is 0, which is also what is outside.
    x = F.grid_sample(x + 1, grid, mode="bicubic", align_corners=False).clamp(0, 2)
    return 2 * (x / 2) ** (0.14 * u[:, 4]).exp().view(-1, 1, 1, 1) - 1


class Latents:
    """All slices of a split as mean and std of their posteriors, float16, so that every visit samples them anew.

    Public: `moments` [N, V, 2 (mean, std), C, h, w] and `conditions` float32 [N, A], both on the device if they fit. V
    counts the variants of a slice: itself, mirrored, and those of --augment. These are drawn anew every
    --augment-every epochs, at first for `epoch`. Used as a context manager, it ends the thread that encodes them.
    """

    def __init__(
        self, vae: VAE, data: ADNIDataset, conditions: Tensor, batch: int, ranks: Ranks, cfg: TrainConfig, what: str,
        epoch: int = 1,
    ):  # fmt: skip
        # Half precision rounds a latent of size 1 by 5e-4, far less than the posterior's std. With all of them in
        # memory, a training step needs neither images nor VAE.
        self.vae, self.data, self.batch, self.ranks, self.cfg = vae, data, batch, ranks, cfg
        self.bounds, self.plain = ranks.row_bounds(len(data), batch), 1 + cfg.flip  # plain: the slice itself, mirrored
        self.draw, self.ended = self.draw_of(epoch), False
        self.coming: Future[Tensor] | None = None
        self.pool = ThreadPoolExecutor(1)
        with progress_bar(len(data), what=what) as bar:
            self.moments = self._encode(range(self.plain * (1 + cfg.augment)), self.draw, bar.update)
        ranks.all_gather_rows(self.moments, self.bounds)
        self.moments, self.device = to_device_if_it_fits(self.moments, ranks.device), ranks.device
        self.conditions = conditions.to(self.moments.device)

    def __enter__(self) -> Latents:
        return self

    def __exit__(self, *error: object) -> None:
        self.ended = True
        self.pool.shutdown()

    def _encode(self, variants: range, draw: int, encoded: Callable[[int], object]) -> Tensor:
        """[N, len(variants), 2, C, h, w] on the host, of which this rank's rows are filled."""
        rows = allocate_rows(
            (len(self.data), len(variants), 2, *self.vae.latent_shape), torch.float16, Path(self.cfg.cache)
        )
        starts = range(self.bounds[self.ranks.rank], self.bounds[self.ranks.rank + 1], self.batch)
        with eval_mode(self.vae):
            for i, x in zip(starts, self.data.batches(self.batch, self.ranks.device, self.ranks.share)):
                for place, v in enumerate(variants):
                    # The first draw has the numbers of before there were others.
                    g = generator(self.cfg.seed, 19, v, i, *([draw] if draw else []))
                    other = vary(x, g) if v >= self.plain else x
                    other = other.flip(3) if v % self.plain else other
                    rows[i : i + len(x), place] = torch.stack(self.vae.encode(other), dim=1).cpu()
                if self.ended:
                    break
                encoded(len(x) * self.ranks.size)
        return rows

    def draw_of(self, epoch: int) -> int:
        """Which draw of variants belongs to an epoch, counted from 0."""
        every = self.cfg.augment_every if self.cfg.augment else 0
        return (epoch - 1) // every if every else 0

    def begin_next_draw(self, epoch: int) -> None:
        """At the end of an epoch: let a thread encode the variants of the next draw, if the training will see one."""
        following = self.draw + 1
        if self.coming or not any(self.draw_of(e) == following for e in range(epoch + 1, self.cfg.epochs + 1)):
            return

        def encode() -> Tensor:
            with side_stream(self.device):
                return self._encode(range(self.plain, self.moments.shape[1]), following, lambda n: None)

        self.coming = self.pool.submit(encode)

    def redraw(self, epoch: int) -> bool:
        """Put the variants in place that belong to this epoch; returns whether they are other ones than before."""
        if self.draw_of(epoch) == self.draw:
            return False
        self.begin_next_draw(epoch - 1)
        assert self.coming
        rows = self.coming.result()
        self.ranks.all_gather_rows(rows, self.bounds)
        self.moments[:, self.plain :] = rows.to(self.moments.device)
        self.draw, self.coming = self.draw + 1, None
        return True

    def __len__(self) -> int:
        return len(self.moments)

    def batches(self, order: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """(moments, conditions) [B, ...] on the device, for every int64 index [B] of `order`."""
        return gather_batches([self.moments, self.conditions], order, self.device)


def sample_posterior(moments: Tensor, variant: Tensor, noise: Tensor) -> Tensor:
    """Latents [B, C, h, w] from rows of `Latents.moments` and standard normal noise [B, C, h, w].

    `variant` [B] is uniform in [0, 1) and chooses one of the V variants of each slice.
    """
    b, variants = moments.shape[:2]
    which = (variant * variants).long()
    mean, std = moments[torch.arange(b, device=moments.device), which].float().unbind(1)
    return mean + std * noise


def step_randomness(
    model: StableDiffusion, batch: int, shape: Sequence[int], cfg: TrainConfig, g: torch.Generator
) -> list[Tensor]:
    """All random numbers of a step, one row per image; latents have this shape (C, h, w).

    Returns: uniform [B] for the variant, posterior noise [B, C, h, w], which conditions to hide (bool [B, A]), entries
    of the grid of timesteps (int64 [B]), diffusion noise [B, C, h, w].
    """
    # Always all of them in this order, whether this run uses them or not: a step then has the same numbers with and
    # without mirroring or conditions.
    u = torch.rand(2, batch, generator=g, device=g.device)
    noise = torch.randn(2, batch, *shape, generator=g, device=g.device)
    entries = torch.searchsorted(model.scheduler.timesteps, model.scheduler.sample_timesteps(batch, g))
    # All conditions of an image are hidden together, which guidance needs; and each of several by itself.
    count = len(model.unet.config["conditions"])
    hide = (u[1] < cfg.class_dropout)[:, None].expand(-1, count)
    if count > 1:
        hide = hide | (torch.rand(batch, count, generator=g, device=g.device) < cfg.class_dropout)
    return [u[0], noise[0], hide, entries, noise[1]]


def loss_by_timestep(
    network: nn.Module, timesteps: Tensor, z: Tensor, y: Tensor, entries: Tensor, noise: Tensor, bins: int
) -> tuple[Tensor, Tensor]:
    """Loss per image [B]; and [2, bins]: the sum of the losses and the number of images, by timestep.

    `network` is a StableDiffusion, perhaps wrapped for DDP. `entries` int64 [B] are places in the grid of timesteps.
    """
    loss, _ = network(z, timesteps[entries], noise, y)
    # Timesteps are put into `bins` bins of neighbours; scatter_add_ needs no wait for the GPU.
    counted = torch.stack([loss.detach(), torch.ones_like(loss)])
    bin_of = (entries * bins // len(timesteps)).expand(2, -1)
    return loss, torch.zeros(2, bins, device=z.device).scatter_add_(1, bin_of, counted)


def training_loss(
    network: nn.Module, model: StableDiffusion, moments: Tensor, y: Tensor, randomness: Sequence[Tensor], bins: int
) -> tuple[Tensor, Tensor]:
    """Weighted loss per image [B], and unweighted sums by timestep [2, bins], with rows of `step_randomness`."""
    variant, posterior_noise, hide, entries, noise = randomness
    z, timesteps = sample_posterior(moments, variant, posterior_noise), model.scheduler.timesteps
    y = y.masked_fill(hide, math.nan)
    loss, by_timestep = loss_by_timestep(network, timesteps, z, y, entries, noise, bins)
    return loss * model.weight(timesteps[entries]), by_timestep


def backward(
    network: nn.Module, model: StableDiffusion, scaler: torch.amp.GradScaler, bins: int,
    weight: float, moments: Tensor, y: Tensor, *randomness: Tensor,
) -> Tensor:  # fmt: skip
    """Add the gradients of the mean loss, times `weight`, of the images that `training_loss` takes; returns its sums by
    timestep."""
    loss, by_timestep = training_loss(network, model, moments, y, randomness, bins)
    scaler.scale(weight * loss.mean()).backward()
    return by_timestep


def evaluation_losses(
    model: StableDiffusion, val: Latents, trained: Tensor, cfg: TrainConfig, ranks: Ranks
) -> dict[str, float]:
    """Unweighted loss in training, from its sums by timestep [2, bins], and of people held out, whole and by timestep.

    Validation uses the same noise and timesteps at every call.
    """
    timesteps, bins, shape = model.scheduler.timesteps, trained.shape[1], val.moments.shape[3:]
    # Validation, each rank its share of the batches
    sums, order = torch.zeros(2, bins, device=val.device), torch.arange(len(val)).split(64)
    order = order[ranks.share(len(order))]
    with eval_mode(model):
        for index, (moments, y) in zip(order, val.batches(order)):
            g = generator(cfg.seed, 5, int(index[0]), device=val.device)
            variant, posterior_noise, _, _, noise = step_randomness(model, len(index), shape, cfg, g)
            z = sample_posterior(moments, variant, posterior_noise)
            entries = (index.to(val.device) * 7919 + 13) % len(timesteps)  # a prime stride spreads slices over the grid
            sums += loss_by_timestep(model, timesteps, z, y, entries, noise, bins)[1]
    # The mean over all timesteps, and one number for each bin, named by the first timestep in it
    numbers = {}
    for name, (total, count) in (("train", trained), ("val", ranks.sum(sums))):
        numbers[f"loss/{name}"] = (total.sum() / count.sum()).item()
        for i, loss in enumerate((total / count.clamp(min=1)).tolist()):
            numbers[f"loss by timestep, {name}/t={timesteps[-(-i * len(timesteps) // bins)]}"] = loss
    return numbers


def denoising_quality(
    model: StableDiffusion, vae: VAE, latents: Latents, val: ADNIDataset, cfg: TrainConfig, ranks: Ranks
) -> dict[str, float]:
    """PSNR and SSIM of the one-step estimate of 16 validation slices against the slices, at up to ten timesteps."""
    index = torch.tensor(evenly_spaced(len(val), 16))
    x, (moments, y) = unit(val.batch(index, latents.device)), next(latents.batches([index]))
    timesteps = model.scheduler.timesteps
    entries = evenly_spaced(len(timesteps), 10)
    quality = torch.zeros(len(entries), 2, device=latents.device)
    with eval_mode(model, vae):
        for i in range(ranks.rank, len(entries), ranks.size):
            g = generator(cfg.seed, 6, device=latents.device)
            variant, posterior_noise, _, _, noise = step_randomness(model, len(index), moments.shape[3:], cfg, g)
            z, t = sample_posterior(moments, variant, posterior_noise), timesteps[entries[i]].expand(len(index))
            x0 = unit(vae.decode(model(z, t, noise, y)[1]))
            quality[i] = torch.stack([psnr(x0, x).mean(), ssim(x0, x).mean()])
    numbers = {}
    for entry, values in zip(entries, ranks.sum(quality).tolist()):
        for name, value in zip(("PSNR", "SSIM"), values):
            numbers[f"denoising {name}/t={timesteps[entry]}"] = value
    return numbers


def show_samples(
    model: StableDiffusion, vae: VAE, train: ADNIDataset, val: ADNIDataset, cfg: TrainConfig, folder: Path, epoch: int,
    last: bool, ranks: Ranks,
) -> dict[str, float]:  # fmt: skip
    """Generate 16 images of the run's seed: FOLDER/samples.png, the growing samples.gif, denoising.png and .gif.

    Groups take turns, other conditions are drawn. Returns PSNR and SSIM of the images against unrelated validation
    slices, and of training slices against the same: images that do not belong together, so these numbers say only how
    alike strangers are. Each rank generates its share; the denoising pictures show images of rank 0.
    """
    device, n = model.scheduler.timesteps.device, 16
    images = torch.zeros(n, 1, vae.config["image_size"], vae.config["image_size"], device=device)
    mine = range(n)[ranks.share(n)]
    with eval_mode(model, vae):
        if mine:
            x, noise = start_noise(cfg.seed, mine, vae.latent_shape)
            y = draw_rows(model.attributes, {}, cfg.seed, mine).to(device)
            how = plan_sampling(PredictConfig(run=cfg.run), model)  # predict.py's defaults
            steps = list(sample_steps(model.denoiser(y), x.to(device), model.scheduler, noise=noise, **how))
            images[mine.start : mine.stop] = vae.decode(steps[-1][1])
        ranks.sum(images)
        if ranks.is_main:
            visualise_denoising_process([(t, x_t[:4], x0[:4]) for t, x_t, x0 in steps], vae.decode, folder)
            add_gif_frame(folder, "samples", image_grid(to_uint8(images)), epoch, last)
    # Slices to compare with, the same at every call
    g = generator(cfg.seed, 7)
    strangers, real = (unit(d.batch(torch.randint(len(d), (n,), generator=g), device)) for d in (val, train))
    (p, s), (p_real, s_real) = unpaired(unit(images), strangers), unpaired(real, strangers)
    return {
        "unpaired PSNR/generated": p, "unpaired PSNR/real": p_real,
        "unpaired SSIM/generated": s, "unpaired SSIM/real": s_real,
    }  # fmt: skip


def learn_attributes(cfg: TrainConfig, data: ADNIDataset) -> list[Attribute]:
    """The attributes that --condition names, as the training slices have them; the group only where there are several.

    Where there is one class folder, a column `group` of attributes.csv takes its place, if other attributes are named.
    UserError if the slices have no such attribute, or all the same.
    """
    found = []
    for name in () if cfg.unconditional else dict.fromkeys(name.lower() for name in cfg.condition):
        if name == GROUP and len(data.classes) > 1:
            found.append(category(GROUP, data.class_names()))
            continue
        if name == GROUP and (len(cfg.condition) == 1 or len({*data.column(GROUP)} - {""}) < 2):
            continue  # one class, and no table was asked for, or it does not tell groups apart
        if not any(data.column(name)):
            there = sorted({GROUP, "level"}.union(*data.known))
            raise UserError(
                f"--condition {name}: nothing says the {name} of the slices in {cfg.data}, only {', '.join(there)}"
            )
        found.append(learn_attribute(name, data.column(name)))
    return found


def build_model(cfg: TrainConfig, vae: VAE, attributes: Sequence[Attribute]) -> StableDiffusion:
    """The U-Net for the latents of this VAE and its noise schedule, initialised by the seed. UserError on bad sizes."""
    channels, side, _ = vae.latent_shape
    torch.manual_seed(cfg.seed)
    try:
        unet = UNet(
            channels, side, cfg.channels, cfg.blocks, cfg.attention, network_conditions(attributes), cfg.dropout,
            cfg.norm_group, cfg.patch,
        )  # fmt: skip
        scheduler = NoiseScheduler_Fast_DDPM(num_steps=cfg.num_steps, grid=cfg.grid)
        if cfg.log_snr:
            scheduler.concentrate(*cfg.log_snr)
    except ValueError as e:
        raise UserError(f"{e}: change --channels, --grid, --num-steps or --log-snr") from None
    model = StableDiffusion(unet, scheduler, cfg.prediction, cfg.loss_weight, attributes)
    if cfg.draw_by_weight:
        scheduler.draw_by(model.weight(scheduler.timesteps))
    return model


def print_plan(
    cfg: TrainConfig, vae: VAE, model: StableDiffusion, splits: dict[str, ADNIDataset], plan: Plan, device: torch.device
) -> None:
    """Say what a run would do: data, network, cost, and where it writes."""
    # A few steps on latents that are all zero. On a CPU a few images say as much as a batch.
    n, dtype = plan.batch if device.type == "cuda" else min(plan.batch, 4), pick_amp_dtype(cfg.precision, device)
    model = model.to(memory_format=torch.channels_last).to(device)
    model.amp_dtype, scaler = dtype, make_scaler(dtype, device)
    moments = torch.zeros(n, 1, 2, *vae.latent_shape, device=device)
    y = torch.zeros(n, len(model.attributes), device=device)
    tensors = [moments, y, *step_randomness(model, n, vae.latent_shape, cfg, generator(0, device=device))]
    call, optimizer = partial(backward, model, model, scaler, 1), make_optimizer(model.parameters(), cfg)
    seconds = rehearse(cfg, plan, [model], [model.unet], call, tensors, optimizer, scaler)
    train, unet = splits["train"], UNet(**model.unet.config).to(device)  # one that is not compiled
    cost = training_cost(
        unet, moments[:1, 0, 0], torch.zeros(1, dtype=torch.int64, device=device), y[:1], amp_dtype=dtype
    )
    print(f"train on  {train.summary()}\nvalidate  {splits['val'].summary()}\nlatent    {vae.latent_shape}")
    print(f"classes   {', '.join(train.classes)}")
    print(f"given     {'; '.join(map(str, model.attributes)) or 'nothing (unconditional)'}")
    print(describe_cost("U-Net", *cost, plan.batch, cfg.epochs, plan.steps, device, dtype, seconds))
    print(f"writes to {Path(cfg.checkpoints) / cfg.run / 'diffusion'}")


def main(cfg: TrainConfig) -> None:
    # The VAE decides what the latents are and which people are held out.
    stop, device = StopSignal(), pick_device(cfg.device)
    vae, vae_meta, vae_file = load_vae_of_run(Path(cfg.checkpoints) / cfg.run, device)
    splits, fingerprint = load_splits_by_rules(cfg.data, cfg.cache, vae_meta, vae.config["image_size"])
    train, val, plan = splits["train"], splits["val"], Plan.of(cfg, len(splits["train"]))
    attributes = learn_attributes(cfg, train)
    conditions = {name: data.conditions(attributes) for name, data in splits.items()}
    model = build_model(cfg, vae, attributes)
    if cfg.dry_run:
        return print_plan(cfg, vae, model, splits, plan, device)

    with Run(cfg, "diffusion", plan, stop, device) as run, ExitStack() as stack:
        # Network, average, optimiser, schedule.
        ranks, folder, timesteps = run.ranks, run.folder, model.scheduler.timesteps
        model = model.to(memory_format=torch.channels_last).to(device)
        model.amp_dtype = pick_amp_dtype(cfg.precision, device)
        vae.amp_dtype = model.amp_dtype if device.type == "cuda" else None
        ema = EMA(model, cfg.ema_decay)
        optimizer: torch.optim.Optimizer = make_optimizer(model.parameters(), cfg)
        if cfg.lookahead:
            optimizer = Lookahead(optimizer)
        schedule = CosineAnnealingWarmupScheduler(optimizer, max(1, round(cfg.warmup * plan.steps)), plan.steps)
        scaler = make_scaler(model.amp_dtype, device)
        bins = min(10, len(timesteps))

        # Resume, or begin.
        run.track(2 * bins, model=model, ema=ema, optimizer=optimizer, schedule=schedule, scaler=scaler)
        run.extra = {"vae": vae.latent_hash()}
        if [a.name for a in attributes] not in ([], [GROUP]) or len(train.classes) == 1 and attributes:
            # Then the slices' names alone do not say all.
            fingerprint += "-" + hashlib.sha256(conditions["train"].numpy().tobytes()).hexdigest()[:8]
        state = run.resume(fingerprint, f"slices or attributes than {cfg.data} now holds")
        if state and state["vae"] != vae.latent_hash():
            raise UserError(f"{folder} was started on the latents of another VAE than {vae_file}: use --fresh")
        if run.finished:
            return

        # Encode all slices once. Validation slices have no variants.
        def encode(name: str, cfg: TrainConfig, what: str) -> Latents:
            epoch = next(run.epochs(), cfg.epochs)
            return stack.enter_context(
                Latents(vae, splits[name], conditions[name], cfg.batch_size, ranks, cfg, what, epoch)
            )

        latents = encode("train", cfg, "encoding training slices")
        val_latents = encode("val", replace(cfg, flip=False, augment=0), "encoding validation slices")

        # A step of n images whose result is thrown away: it shows what fits the memory and what can be compiled.
        network = ranks.wrap_ddp(model)
        call = partial(backward, network, model, scaler, bins)

        def trial(n: int) -> None:
            moments, y = next(latents.batches([torch.zeros(n, dtype=torch.int64)]))
            call(1.0, moments, y, *step_randomness(model, n, vae.latent_shape, cfg, generator(0, device=device)))
            model.zero_grad()

        meta = {
            "kind": "diffusion", "model": model.unet.config, "scheduler": model.scheduler.config,
            "prediction": cfg.prediction, "classes": train.classes, "attributes": to_header(attributes),
            "vae": vae.latent_hash(), "data": train.summary(),
            "typical": typical_latents(latents.moments[:, 0, 0], val_latents.moments[:, 0, 0]),
            "held_out": carved_people(splits), "split": split_rules(vae_meta), **phantom_drawing(cfg.data),
        }  # fmt: skip
        run.begin(meta, model, [model.unet], [network], trial)
        gradients = Gradients(
            call, [model], optimizer, scaler, cfg.grad_clip, ranks, plan.batch, run.micro, [network]
        )  # fmt: skip

        def visit() -> Iterator[list[Tensor]]:
            order = shuffled_batches(len(train), plan.batch, run.step, cfg.seed, 3)
            return latents.batches(index[run.rows] for index in order)

        batches = visit()
        for epoch in run.epochs():
            if latents.redraw(epoch):
                batches = visit()  # because the old ones may have been read ahead
            for step in run.steps(epoch):
                moments, y = next(batches)
                # Every step has its own random numbers, by (seed, step), so resuming needs no state of a generator.
                g = generator(cfg.seed, 4, step, device=device)
                randomness = [r[run.rows] for r in step_randomness(model, plan.batch, vae.latent_shape, cfg, g)]
                added, norm = gradients(moments, y, *randomness, seed=(cfg.seed, 9, step) if cfg.dropout else ())
                optimise(model, optimizer, ema, added)
                schedule.step()
                run.took(added, norm)
            latents.begin_next_draw(epoch)

            if not run.evaluates(epoch):
                continue

            # Evaluate the averaged weights, and now and then generate with them.
            numbers = evaluation_losses(ema.module, val_latents, run.sums[:-2].view(2, bins), cfg, ranks)
            pictures: tuple[str, ...] = ()
            if epoch % cfg.sample_every == 0 or run.is_last(epoch):
                numbers |= denoising_quality(ema.module, vae, val_latents, val, cfg, ranks)
                numbers |= show_samples(ema.module, vae, train, val, cfg, folder, epoch, run.is_last(epoch), ranks)
                pictures = ("samples.png", "denoising.gif")
            run.end_epoch(numbers, ema.module, pictures=pictures)

        run.save()
        run.save_final(ema.module)
    print(
        f"done: {folder / 'final.safetensors'}; images in {folder / 'samples.png'}, curves in {folder / 'curves.png'}"
    )


if __name__ == "__main__":
    run_script(main, cfg)
