"""Distil a run into one that generates in 1 to 4 steps: python distil.py --teacher NAME --num-steps 4 --run STUDENT.

The same command again resumes. The student learns to go the teacher's way from noise to image in fewer, longer steps:
progressive distillation (Salimans & Ho 2022, arXiv 2202.00512), with whole trajectories of the teacher instead of
halved steps (Luhman & Luhman 2021). What is distilled is the U-Net or, with --part texture, the texture. The
bookkeeping of the run is in loop.py.
"""

from __future__ import annotations

from config import DistilConfig, parse

if __name__ == "__main__":
    cfg = parse(DistilConfig)  # before torch is imported, so that --help answers at once

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cluster import Ranks, StopSignal
from conditions import Attribute, draw_rows, to_header
from config import PredictConfig
from dataset import split_rules
from device import allocate_rows, eval_mode, gather_batches, pick_amp_dtype, pick_device, shuffled_batches, to_half
from device import to_device_if_it_fits as to_device
from loop import EMA, Gradients, Plan, Run, make_optimizer, make_scaler, optimise, rehearse
from metrics import high_frequencies, unit
from modules import (
    CosineAnnealingWarmupScheduler,
    NoiseScheduler_Fast_DDPM,
    StableDiffusion,
    UNet,
    make_grid,
    output_map,
    sample,
    sample_steps,
    start_noise,
)
from pictures import add_gif_frame, image_grid, to_uint8
from sampling import load_run, plan_sampling
from utils import UserError, derive_seed, generator, progress_bar, run_script
from vae import Texture, load_texture
from weights import file_hash, read_meta, write_atomic


@dataclass
class Task:
    """What is distilled: a U-Net in latents, or a texture in images."""

    stage: str  # "diffusion" or "texture", the folder of the student's run
    teacher: StableDiffusion
    model: StableDiffusion  # the student, which begins with the teacher's weights
    grid: list[int]  # the timesteps that the teacher takes, ascending; the student's are among them
    shape: tuple[int, ...]  # of what is denoised: latents [C, h, w] or images [1, S, S]
    begin: Callable[[int, list[int], Tensor], Tensor]  # (seed, k, conditions [B, A]) -> x_T [B, *shape]
    to_images: Callable[[Tensor, list[int]], Tensor]  # (where trajectories k end, k) -> images [B, 1, S, S] in [-1, 1]
    attributes: Sequence[Attribute]  # what the columns of conditions mean
    source: Path  # file of the teacher's weights
    made_by: str  # whose weights trajectories are made with, in words, and their hashes
    fingerprint: str
    meta: dict[str, Any]  # header of the student's weights
    batch: int  # trajectories that are made at a time
    held_out: int  # trajectories to validate on
    copies: dict[Path, bytes] = field(default_factory=dict)  # what else the student's run takes from the teacher's


def teacher_grid(teacher_steps: int, num_steps: int) -> list[int]:
    """The teacher's timesteps, ascending: every (teacher_steps / num_steps)-th from the noisy end is the student's.

    UserError if the counts do not divide, or if the teacher's steps are so many that near the clean image they are
    finer than timesteps: those are then moved apart (`make_grid`), and no longer are at the student's timesteps.
    """
    if teacher_steps % num_steps:
        raise UserError(f"--teacher-steps {teacher_steps} is no multiple of --num-steps {num_steps}")
    # Both grids come from the same rule, so it is enough to compare them.
    abar = NoiseScheduler_Fast_DDPM().abar

    def meets_student(steps: int) -> bool:
        own = make_grid("student", steps, abar)[::-1]
        return bool((own[:: steps // num_steps] == make_grid("student", num_steps, abar)[::-1]).all())

    if not meets_student(teacher_steps):
        most = max(steps for steps in range(num_steps, teacher_steps, num_steps) if meets_student(steps))
        raise UserError(
            f"--teacher-steps {teacher_steps} are too many for --num-steps {num_steps}: they would not stop at the "
            f"student's timesteps; take {most}"
        )
    return make_grid("student", teacher_steps, abar).tolist()


def vae_of_teacher(cfg: DistilConfig) -> tuple[Path, bytes]:
    """The file that the student's run needs as its VAE, and what it must hold: the teacher's VAE.

    UserError if the student's run has another VAE already.
    """
    theirs, own = (Path(cfg.checkpoints) / run / "vae" / "best.safetensors" for run in (cfg.teacher, cfg.run))
    # The student's latents are the teacher's, so another VAE would decode them to something else.
    data = theirs.read_bytes()
    if own.exists() and own.read_bytes() != data:
        raise UserError(f"run {cfg.run} has a VAE of its own ({own}): give the student another --run")
    return own, data


def unet_task(cfg: DistilConfig, device: torch.device) -> Task:
    """A student of the teacher's U-Net, in a run that takes the teacher's VAE and texture."""
    # The teacher, and what the student's run takes from it as it is.
    home = Path(cfg.checkpoints) / cfg.teacher
    teacher, vae, header, source = load_run(home, "best", device)
    if teacher.scheduler.config["grid"] != "full":
        raise UserError(f"run {cfg.teacher} knows only its own few timesteps: a teacher is trained with --grid full")
    grid = teacher_grid(cfg.teacher_steps, cfg.num_steps)
    vae_file, vae_bytes = vae_of_teacher(cfg)
    copies = {vae_file: vae_bytes}
    texture, own = (Path(cfg.checkpoints) / run / "texture" / "best.safetensors" for run in (cfg.teacher, cfg.run))
    if texture.exists() and not own.with_name("last.pt").exists():  # unless the student has one that was distilled
        copies[own] = texture.read_bytes()
    # The student, and what its weights say of themselves.
    scheduler = NoiseScheduler_Fast_DDPM(num_steps=cfg.num_steps, grid="student")
    model = StableDiffusion(UNet(**teacher.unet.config), scheduler, header["prediction"], attributes=teacher.attributes)
    model.load_state_dict(teacher.state_dict())
    teacher.amp_dtype = model.amp_dtype = vae.amp_dtype = pick_amp_dtype(cfg.precision, device)
    inherited = ("kind", "prediction", "classes", "vae", "data", "held_out", "phantoms", "typical")
    meta = {k: header[k] for k in inherited if k in header} | {
        "model": model.unet.config, "scheduler": scheduler.config, "split": split_rules(header),
        "attributes": to_header(teacher.attributes),
    }  # fmt: skip

    def begin(seed: int, k: list[int], y: Tensor) -> Tensor:
        return start_noise(seed, k, vae.latent_shape)[0].to(device)

    def to_images(z: Tensor, k: list[int]) -> Tensor:
        return vae.decode(z, vae.texture_noise(0, k))

    return Task(
        "diffusion", teacher, model, grid, vae.latent_shape, begin, to_images, teacher.attributes, source,
        "the teacher", file_hash(source), meta, batch=64 if device.type == "cpu" else 256, held_out=256, copies=copies,
    )  # fmt: skip


def texture_task(cfg: DistilConfig, device: torch.device) -> Task:
    """A student of the teacher's texture, which learns on images of the run that it is for."""
    home, own = (Path(cfg.checkpoints) / run for run in (cfg.teacher, cfg.run))
    source = home / "texture" / "best.safetensors"
    if not source.exists():
        raise UserError(f"run {cfg.teacher} has no texture ({source}): train it first with python texture.py")
    if not (own / "diffusion" / "best.safetensors").exists():
        raise UserError(
            f"run {cfg.run} has no U-Net, whose images texture is learnt on: distil it first, without --part texture"
        )
    # The student's run, which makes the images, and the teacher's texture, which draws on them.
    unet, vae, _, unet_file = load_run(own, "best", device)
    teacher, header = load_texture(source, vae, device), read_meta(source)
    if teacher.scheduler.config["grid"] == "student":
        raise UserError(f"the texture of run {cfg.teacher} was distilled itself: take its teacher's")
    # The student goes from one of the teacher's timesteps to another, in steps of as many each.
    grid, strides = teacher.scheduler.fast_timesteps, len(teacher.scheduler.timesteps) - 1
    if strides % cfg.num_steps:
        fit = ", ".join(str(n) for n in range(1, strides + 1) if strides % n == 0)
        raise UserError(f"--num-steps {cfg.num_steps} does not fit the {strides + 1} steps of this texture: take {fit}")
    model = Texture(**{**teacher.config, "num_steps": cfg.num_steps, "grid": "student"})
    model.load_state_dict(teacher.state_dict())
    # Images are made as predict.py makes them. A texture has to be there, because it says how much noise is drawn.
    vae.texture, how = model, plan_sampling(PredictConfig(run=cfg.run), unet)
    teacher.amp_dtype = model.amp_dtype = vae.amp_dtype = unet.amp_dtype = pick_amp_dtype(cfg.precision, device)
    to_half(unet.unet, unet.amp_dtype)
    to_half(vae.decoder, vae.amp_dtype)
    inherited = ("kind", "data", "held_out", "phantoms")
    meta = {k: header[k] for k in inherited if k in header} | {
        "model": model.config, "split": split_rules(header), "unet": file_hash(unet_file),
    }  # fmt: skip

    def begin(seed: int, k: list[int], y: Tensor) -> Tensor:
        image = vae.decode(unet.generate(vae.latent_shape, seed, k, y, **how))
        noise = vae.texture_noise(seed, k)
        assert noise is not None
        return teacher.cover(image, noise)

    def to_images(x: Tensor, k: list[int]) -> Tensor:
        return x.clamp(-1, 1)

    side = vae.config["image_size"]
    return Task(
        "texture", teacher, model, grid, (1, side, side), begin, to_images, unet.attributes, source,
        f"the teacher, or of the U-Net of run {cfg.run},", f"{file_hash(source)} {meta['unet']}", meta,
        batch=16, held_out=64,
    )  # fmt: skip


class Trajectories:
    """What the teacher makes of noise k of a seed, at the timesteps where the student stops.

    Public: `states` float16 [N, num_steps + 1, *shape], from x_T to the clean end, and `conditions` float32
    [N, A], drawn as they were in the teacher's training, a tenth of them unknown; both on the device if they fit.
    After a signal (`stop` is true) they are left unfinished.
    """

    def __init__(
        self, task: Task, n: int, seed: int, cache: str, ranks: Ranks, what: str, stop: StopSignal | None = None
    ):
        self.conditions = draw_rows(task.attributes, {}, seed, range(n))
        self.conditions[9::10] = math.nan  # so that the student can be guided, too
        if len(task.attributes) > 1:  # and so that each of them may be left open
            hide = torch.rand(self.conditions.shape, generator=generator(seed, 17)) < 0.1
            self.conditions[hide] = math.nan
        # After a step the teacher is at the timestep t: one from which the student steps on, or -1, the clean end.
        stops = {*task.model.scheduler.fast_timesteps, -1}
        self.states = allocate_rows((n, len(stops), *task.shape), torch.float16, Path(cache))
        bounds, bar = ranks.row_bounds(n, task.batch), progress_bar(n, what=what)
        with eval_mode(task.teacher), bar:
            for index in torch.arange(bounds[ranks.rank], bounds[ranks.rank + 1]).split(task.batch):
                if not len(index):  # a rank may have no share
                    continue
                if stop:
                    break
                y = self.conditions[index].to(ranks.device)
                x = task.begin(seed, index.tolist(), y)
                steps = sample_steps(task.teacher.denoiser(y), x, task.teacher.scheduler, task.grid)
                states = [x, *(x_t for t, x_t, _ in steps if t in stops)]
                self.states[index] = torch.stack([x_t.cpu() for x_t in states], dim=1).half()
                bar.update(len(index) * ranks.size)
        ranks.all_gather_rows(self.states, bounds)
        self.states, self.device = to_device(self.states, ranks.device), ranks.device
        self.conditions = self.conditions.to(self.states.device)


class Student(nn.Module):
    """The student's loss as the forward pass of one module, which is what DDP wraps."""

    def __init__(self, model: StableDiffusion):
        super().__init__()
        self.model = model

    def forward(self, states: Tensor, y: Tensor, entries: Tensor) -> Tensor:
        """Squared error of the output, a mean per image [B], of the step that starts at these entries of the grid [B].

        `states` [B, num_steps + 1, C, h, w] run from noise to image, entries from the grid's cleanest timestep up. The
        estimate of the clean image that makes one DDIM step land where the teacher did is (x_s - r x_t) / (a_s - r a_t)
        with r = sigma_s / sigma_t (Salimans & Ho 2022, appendix G).
        """
        model, scheduler = self.model, self.model.scheduler
        # Signal and noise at the timestep t where the step starts and s where it ends; in the end all is signal
        t = scheduler.timesteps[entries]
        alpha_t, sigma_t = scheduler.alpha_sigma(t)
        alpha_s, sigma_s = scheduler.alpha_sigma(scheduler.timesteps[(entries - 1).clamp(min=0)])
        clean = (entries == 0).view(-1, 1, 1, 1)
        alpha_s, sigma_s = alpha_s.masked_fill(clean, 1.0), sigma_s.masked_fill(clean, 0.0)
        # The teacher's latents there, and the estimate that leads from one to the other
        rows, start = torch.arange(len(states), device=states.device), len(scheduler.timesteps) - 1 - entries
        x_t, x_s = states[rows, start].float(), states[rows, start + 1].float()
        r = sigma_s / sigma_t
        x0 = (x_s - r * x_t) / (alpha_s - r * alpha_t)
        a, b, _, _ = output_map(model.prediction, alpha_t, sigma_t)
        target = (x0 - a * x_t) / b
        out = model.network(x_t, t, y)
        return (out - target).square().mean((1, 2, 3))


def backward(
    network: nn.Module, scaler: torch.amp.GradScaler, weight: float, states: Tensor, y: Tensor, entries: Tensor
) -> Tensor:
    """Add the gradients of the mean loss of a `Student` (perhaps wrapped for DDP), times `weight`; returns the sum of
    the losses."""
    loss = network(states, y, entries)
    scaler.scale(weight * loss.mean()).backward()
    return loss.detach().sum()


def evaluate(task: Task, model: StableDiffusion, data: Trajectories, ranks: Ranks) -> dict[str, float]:
    """Loss on trajectories never trained on, and how far what the student makes is from what the teacher makes."""
    student, steps, total = Student(model), len(model.scheduler.timesteps), torch.zeros(4, dtype=torch.float64)
    order = torch.arange(len(data.states)).split(task.batch)
    order = order[ranks.share(len(order))]
    with eval_mode(model):
        for index, (states, y) in zip(order, gather_batches([data.states, data.conditions], order, data.device)):
            # The loss of every step of the student, then its own way from noise to image.
            for entry in range(steps):
                entries = torch.full((len(index),), entry, device=data.device)
                total[0] += student(states, y, entries).sum().item() / steps
            x0, target = sample(model.denoiser(y), states[:, 0].float(), model.scheduler), states[:, -1].float()
            total[1] += (x0 - target).square().mean((1, 2, 3)).sum().item()
            total[2] += len(index)
            if task.stage == "texture":
                total[3] += high_frequencies(unit(x0.clamp(-1, 1)), unit(target.clamp(-1, 1))).sum().item()
    loss, square, n, power = ranks.sum(total)
    what, numbers = ("images" if task.stage == "texture" else "latents"), {"loss/val": (loss / n).item()}
    numbers[f"distance to the teacher (RMS of {what})"] = (square / n).sqrt().item()
    if task.stage == "texture":  # power in the upper half of the frequencies, of which a mean of images has too little
        numbers["high frequencies against the teacher, dB/val"] = (power / n).item()
    return numbers


def show_samples(task: Task, model: StableDiffusion, data: Trajectories, folder: Path, epoch: int, last: bool) -> None:
    """Add a frame to FOLDER/samples.gif: the teacher's images above, the student's of the same noise below."""
    # Eight trajectories of the validation set, always the same
    states, y = next(gather_batches([data.states, data.conditions], [torch.arange(8)], data.device))
    with eval_mode(model):
        x = sample(model.denoiser(y), states[:, 0].float(), model.scheduler)
        images = to_uint8(task.to_images(torch.cat([states[:, -1].float(), x]), [*range(8)] * 2))
    add_gif_frame(folder, "samples", image_grid(images, columns=8), epoch, last)


def print_plan(cfg: DistilConfig, task: Task, plan: Plan, device: torch.device) -> None:
    """Say what a run would do: teacher, steps, time, and where it writes."""
    # A few steps on states that are all zero. On a CPU a few images say as much as a batch.
    n, model = plan.batch if device.type == "cuda" else min(plan.batch, 4), task.model
    model, scaler = model.to(memory_format=torch.channels_last).to(device), make_scaler(model.amp_dtype, device)
    states = torch.zeros(n, cfg.num_steps + 1, *task.shape, device=device)
    y, entries = torch.zeros(n, len(task.attributes), device=device), torch.zeros(n, dtype=torch.int64, device=device)
    call, optimizer = partial(backward, Student(model), scaler), make_optimizer(model.parameters(), cfg)
    seconds = rehearse(cfg, plan, [model], [model.unet], call, [states, y, entries], optimizer, scaler)
    print(f"teacher   {task.source}, {len(task.grid)} steps; student {cfg.num_steps} steps")
    print(f"learns    {cfg.trajectories:,} trajectories, {plan.steps:,} steps of {plan.batch}")
    print(f"time      about {plan.steps * seconds / 60:.0f} min, trajectories and evaluation not counted")
    print(f"writes to {Path(cfg.checkpoints) / cfg.run}")


def main(cfg: DistilConfig) -> None:
    # The teacher, and the student that begins with its weights.
    stop, device = StopSignal(), pick_device(cfg.device)
    plan = Plan.of(cfg, cfg.trajectories)
    # The folder to be written to may be the teacher's by its name, or by a link.
    stage = "texture" if cfg.part == "texture" else "diffusion"
    theirs, own = (Path(cfg.checkpoints) / name / stage for name in (cfg.teacher, cfg.run))
    if theirs.resolve() == own.resolve():
        raise UserError(f"--run {cfg.run} is the teacher, or {own} a link to the teacher's: give it another --run")
    task = (texture_task if cfg.part == "texture" else unet_task)(cfg, device)
    teacher, model = task.teacher, task.model
    if cfg.dry_run:
        return print_plan(cfg, task, plan, device)

    with Run(cfg, task.stage, plan, stop, device) as run:
        # Network, average, optimiser, schedule.
        ranks, folder = run.ranks, run.folder
        for file, data in task.copies.items():
            ranks.run_on_rank0(partial(write_atomic, file, data))
        model = model.to(memory_format=torch.channels_last).to(device)
        to_half(teacher.unet, teacher.amp_dtype)  # the student has begun with its weights
        student, ema = Student(model), EMA(model, cfg.ema_decay)
        optimizer = make_optimizer(model.parameters(), cfg)
        schedule = CosineAnnealingWarmupScheduler(optimizer, max(1, round(cfg.warmup * plan.steps)), plan.steps)
        scaler = make_scaler(model.amp_dtype, device)

        # Resume, or begin.
        run.track(1, model=model, ema=ema, optimizer=optimizer, schedule=schedule, scaler=scaler)
        run.resume(task.fingerprint, f"weights of {task.made_by} than there are now")
        if run.finished:
            return

        # Let the teacher make all trajectories once.
        def generate(n: int, purpose: int, what: str) -> Trajectories:
            made = Trajectories(task, n, derive_seed(cfg.seed, purpose), cfg.cache, ranks, what, stop)
            if ranks.any_rank(stop, 0):
                run.leave()  # nothing is lost but these: they are made anew
            return made

        train = generate(cfg.trajectories, 11, "generating trajectories")
        val = generate(task.held_out, 12, "generating others to validate on")

        # A step of n images whose result is thrown away: it shows what fits the memory and what can be compiled.
        network = ranks.wrap_ddp(student)
        call = partial(backward, network, scaler)

        def trial(n: int) -> None:
            call(
                1.0,
                train.states[:n].to(device),
                train.conditions[:n].to(device),
                torch.zeros(n, dtype=torch.int64, device=device),
            )
            model.zero_grad()

        meta = {**task.meta, "teacher": file_hash(task.source)}
        log_name = "distil" if cfg.part == "unet" else "distil-texture"
        run.begin(meta, model, [model.unet], [network], trial, log_name)
        gradients = Gradients(
            call, [model], optimizer, scaler, cfg.grad_clip, ranks, plan.batch, run.micro, [network]
        )  # fmt: skip
        order = shuffled_batches(cfg.trajectories, plan.batch, run.step, cfg.seed, 13)
        batches = gather_batches([train.states, train.conditions], (index[run.rows] for index in order), device)

        for epoch in run.epochs():
            for step in run.steps(epoch):
                states, y = next(batches)
                # Every step has its own random numbers, by (seed, step), so resuming needs no state of a generator.
                g = generator(cfg.seed, 14, step, device=device)
                entries = torch.randint(cfg.num_steps, (plan.batch,), generator=g, device=device)[run.rows]
                seed = (cfg.seed, 15, step) if model.unet.config["dropout"] else ()
                added, norm = gradients(states, y, entries, seed=seed)
                optimise(model, optimizer, ema, added)
                schedule.step()
                run.took(added, norm)

            if not run.evaluates(epoch):
                continue

            # Evaluate the averaged weights, and now and then show teacher and student.
            numbers = {"loss/train": run.means()[0] / plan.batch, **evaluate(task, ema.module, val, ranks)}
            shown = epoch % 5 == 0 or run.is_last(epoch)
            if shown and ranks.is_main:
                show_samples(task, ema.module, val, folder, epoch, run.is_last(epoch))
            run.end_epoch(numbers, ema.module, pictures=["samples.png"] * shown)

        run.save()
        run.save_final(ema.module)
    print(f"done: {folder / 'final.safetensors'}; the teacher's images and the student's in {folder / 'samples.png'}")


if __name__ == "__main__":
    run_script(main, cfg)
