"""Distil a run into one that draws in 1 to 4 steps: python distil.py --teacher NAME --num-steps 4 --run STUDENT.

The same command again resumes. The student learns the teacher's own way from noise to image in fewer, longer strides:
progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) with whole trajectories of the teacher in the place of
its halved steps (Luhman & Luhman 2021).
"""

from __future__ import annotations

from config import DistilConfig, parse

if __name__ == "__main__":
    cfg = parse(DistilConfig)  # before torch is imported, so that --help answers at once

import math
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from cluster import Ranks, StopSignal, check_same_run, leave_early
from device import (
    allocate_rows,
    compile_networks,
    describe_hardware,
    eval_mode,
    gather_batches,
    pick_amp_dtype,
    pick_device,
    shuffled_batches,
    to_device_if_it_fits,
)
from loop import NonFiniteWatch, RunLog, find_micro_batch, make_ema, optimise, skipped_steps_note
from modules import (
    CosineAnnealingWarmupScheduler,
    NoiseScheduler_Fast_DDPM,
    StableDiffusion,
    UNet,
    make_grid,
    sample,
)
from pictures import add_gif_frame, image_grid, to_uint8
from report import refresh_report
from sampling import load_run
from utils import UserError, derive_seed, generator, git_commit, progress_bar, run_script
from vae import VAE
from weights import file_hash, load_state, save_state, save_weights, write_atomic


class Trajectories:
    """What the teacher makes of noise k of a seed, at the timesteps the student will stop at.

    Public: `states` float16 [N, num_steps + 1, C, h, w], from x_T to the clean latent, and `labels` int64 [N], a tenth
    of which say "no class"; on the device if they fit.
    """

    def __init__(
        self, teacher: StableDiffusion, shape: tuple[int, ...], n: int, seed: int, cfg: DistilConfig, ranks: Ranks,
        what: str,
    ):  # fmt: skip
        grid = make_grid("student", cfg.teacher_steps, teacher.scheduler.abar).tolist()
        every = cfg.teacher_steps // cfg.num_steps
        self.labels = torch.arange(n) % max(1, teacher.num_classes)
        if teacher.num_classes:  # the student can be guided, too
            self.labels[torch.arange(n) % 10 == 9] = teacher.num_classes
        self.states = allocate_rows((n, cfg.num_steps + 1, *shape), torch.float16, Path(cfg.cache))
        batch = 64 if ranks.device.type == "cpu" else 256
        cuts, bar = ranks.cuts(n, batch), progress_bar(n, what=what)
        with eval_mode(teacher), bar:
            for index in torch.arange(cuts[ranks.rank], cuts[ranks.rank + 1]).split(batch):
                if not len(index):  # a rank may be without a share
                    continue
                noise = [torch.randn(shape, generator=generator(seed, k)) for k in index.tolist()]
                x, seen = torch.stack(noise).to(ranks.device), []
                y = self.labels[index].to(ranks.device) if teacher.num_classes else None
                keep = lambda t, x_t, x0, seen=seen: seen.append(x_t)  # noqa: E731
                sample(teacher.denoiser(y), x, teacher.scheduler, grid, callback=keep)
                self.states[index] = torch.stack([x, *seen[every - 1 :: every]], dim=1).cpu().half()
                bar.update(len(index) * ranks.size)
        ranks.complete(self.states, cuts)
        self.states, self.device = to_device_if_it_fits(self.states, ranks.device), ranks.device
        self.labels = self.labels.to(self.states.device)


class Student(nn.Module):
    """The student's loss as one call, so that ranks can share it."""

    def __init__(self, model: StableDiffusion):
        super().__init__()
        self.model = model

    def forward(self, states: Tensor, y: Tensor, places: Tensor) -> Tensor:
        """Squared error in v or eps, a mean per image [B], of the stride that starts at these places of the grid [B].

        `states` [B, num_steps + 1, C, h, w] run from noise to image, places from the grid's cleanest timestep up. The
        estimate of the clean image that makes one DDIM step land where the teacher did is (x_s - r x_t) / (a_s - r a_t)
        with r = sigma_s / sigma_t (Salimans & Ho 2022, appendix G).
        """
        model, scheduler, rows = self.model, self.model.scheduler, torch.arange(len(states), device=states.device)
        t = scheduler.timesteps[places]
        alpha_t, sigma_t = scheduler.alpha_sigma(t)
        alpha_s, sigma_s = scheduler.alpha_sigma(scheduler.timesteps[(places - 1).clamp(min=0)])
        clean = (places == 0).view(-1, 1, 1, 1)
        alpha_s, sigma_s = alpha_s.masked_fill(clean, 1.0), sigma_s.masked_fill(clean, 0.0)
        start = len(scheduler.timesteps) - 1 - places
        x_t, x_s = states[rows, start].float(), states[rows, start + 1].float()
        r = sigma_s / sigma_t
        x0 = (x_s - r * x_t) / (alpha_s - r * alpha_t)
        target = (alpha_t * x_t - x0 if model.prediction == "v" else x_t - alpha_t * x0) / sigma_t
        out = model.network(x_t, t, y if model.num_classes else None)
        return (out - target).square().mean((1, 2, 3))


def evaluate(student: Student, data: Trajectories, ranks: Ranks) -> dict[str, float]:
    """Loss on trajectories never trained on, and how far the student's own images are from the teacher's."""
    model, total, order = student.model, torch.zeros(3, dtype=torch.float64), torch.arange(len(data.labels)).split(64)
    how = {"timesteps": model.scheduler.timesteps.tolist(), "solver": "ddim"}
    with eval_mode(model):
        order = order[ranks.share(len(order))]
        for index, (states, y) in zip(order, gather_batches([data.states, data.labels], order, data.device)):
            for place in range(len(model.scheduler.timesteps)):
                places = torch.full((len(index),), place, device=data.device)
                total[0] += student(states, y, places).sum().item() / len(how["timesteps"])
            x0 = sample(model.denoiser(y), states[:, 0].float(), model.scheduler, **how)
            total[1] += (x0 - states[:, -1].float()).square().mean((1, 2, 3)).sum().item()
            total[2] += len(index)
    loss, away, n = ranks.sum(total).tolist()
    return {"loss/val": loss / n, "distance to the teacher (RMS of latents)": math.sqrt(away / n)}


def show(model: StableDiffusion, vae: VAE, data: Trajectories, folder: Path, epoch: int, last: bool) -> None:
    """One more frame of FOLDER/samples.gif: the teacher's images above, the student's of the same noise below."""
    states, y = next(gather_batches([data.states, data.labels], [torch.arange(8)], data.device))
    with eval_mode(model, vae):
        z = sample(model.denoiser(y), states[:, 0].float(), model.scheduler, solver="ddim")
        images = to_uint8(vae.decode(torch.cat([states[:, -1].float(), z])))
    add_gif_frame(folder, "samples", image_grid(images, columns=8), epoch, last)


def main(cfg: DistilConfig) -> None:
    stop, device = StopSignal(), pick_device(cfg.device)
    home, folder = Path(cfg.checkpoints) / cfg.teacher, Path(cfg.checkpoints) / cfg.run
    teacher, vae, meta, teacher_file = load_run(home, "best", device)
    if teacher.scheduler.config["grid"] != "full":
        raise UserError(f"run {cfg.teacher} knows its own few timesteps only: a teacher is trained with --grid full")
    if cfg.teacher_steps % cfg.num_steps:
        raise UserError(f"--teacher-steps {cfg.teacher_steps} is no multiple of --num-steps {cfg.num_steps}")
    if home.resolve() == folder.resolve():
        raise UserError(f"--run {cfg.run} is the teacher: name the student otherwise")
    teacher.amp_dtype = amp_dtype = pick_amp_dtype(cfg.precision, device)
    batch = min(cfg.batch_size, cfg.trajectories)
    steps_per_epoch = cfg.trajectories // batch
    total = cfg.epochs * steps_per_epoch
    scheduler = NoiseScheduler_Fast_DDPM(num_steps=cfg.num_steps, grid="student")
    model = StableDiffusion(UNet(**teacher.unet.config), scheduler, meta["prediction"])
    if cfg.dry_run:
        print(f"teacher   {teacher_file}, {cfg.teacher_steps} steps; student {cfg.num_steps} steps")
        print(f"learns    {cfg.trajectories:,} trajectories, {total:,} steps of {batch}\nwrites to {folder}")
        return

    ranks = Ranks(device)
    vae_file, vae_bytes = folder / "vae" / "best.safetensors", (home / "vae" / "best.safetensors").read_bytes()
    if vae_file.exists() and vae_file.read_bytes() != vae_bytes:
        raise UserError(f"run {cfg.run} has a VAE of its own ({vae_file}): name the student otherwise")
    folder = ranks.open(cfg, "diffusion")
    ranks.alone(lambda: write_atomic(vae_file, vae_bytes))
    model = model.to(device, memory_format=torch.channels_last)
    model.load_state_dict(teacher.state_dict())
    model.amp_dtype = amp_dtype
    ema = make_ema(model, cfg.ema_decay)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, fused=device.type != "mps"
    )
    schedule = CosineAnnealingWarmupScheduler(optimizer, max(1, round(cfg.warmup * total)), total)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    step, evaluated, best, fingerprint = 0, 0, float("inf"), file_hash(teacher_file)
    sums = torch.zeros(3, device=device)  # since the last evaluation: loss, gradient norm, steps taken
    state = ranks.first(lambda: load_state(folder / "last.pt"))
    if state:
        check_same_run(cfg, fingerprint, state, folder)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        schedule.total_steps, schedule.warmup_steps = total, max(1, round(cfg.warmup * total))  # --epochs may be new
        step, evaluated, best, sums = state["step"], state["evaluated"], state["best"], state["sums"].to(device)
        if step >= total and (folder / "final.safetensors").exists():
            print(f"{folder} is finished: {cfg.epochs} epochs; more with --epochs, again with --fresh")
            return ranks.close()
        print(f"resuming {folder} at epoch {step / steps_per_epoch:.2f}")
    ranks.check_same(fingerprint, step)

    shape = vae.latent_shape
    train = Trajectories(
        teacher, shape, cfg.trajectories, derive_seed(cfg.seed, 11), cfg, ranks, "drawing trajectories"
    )
    val = Trajectories(teacher, shape, 256, derive_seed(cfg.seed, 12), cfg, ranks, "drawing others to validate on")
    rules = {k: meta["config"][k] for k in ("subject_regex", "val_fraction", "skip_bad_files", "seed")}  # of the split
    meta = {k: meta[k] for k in ("kind", "prediction", "classes", "vae", "data", "held_out") if k in meta} | {
        "model": model.unet.config, "scheduler": model.scheduler.config, "config": {**asdict(cfg), **rules},
        "commit": git_commit(), "hardware": describe_hardware(device), "teacher": fingerprint,
    }  # fmt: skip
    log = RunLog(folder, cfg, "distil", step) if ranks.main else None
    share, student = ranks.rows(batch), Student(model)

    def trial(n: int) -> None:
        states, y = train.states[:n].to(device), train.labels[:n].to(device)
        scaler.scale(student(states, y, torch.zeros(n, dtype=torch.int64, device=device)).mean()).backward()
        model.zero_grad()

    micro = find_micro_batch(cfg.micro_batch, share.stop - share.start, model, 2 if state else 4, trial)
    compile_networks(cfg.compile, [model.unet], lambda: trial(micro), device)
    network, watch = ranks.wrap(student), NonFiniteWatch(device)

    champion = None  # the best weights since the last save, which writes them

    def save() -> None:
        nonlocal champion
        if not ranks.main:
            return
        if champion:
            save_weights(folder / "best.safetensors", *champion)
            champion = None
        saved = {name: part.state_dict() for name, part in parts.items()}
        numbers = {"step": step, "evaluated": evaluated, "best": best, "sums": sums.cpu()}
        save_state(folder / "last.pt", {**saved, **numbers, "config": asdict(cfg), "data": fingerprint})

    bar, clock, clock_step, saved_at = progress_bar(total * batch, step * batch), time.time(), step, time.time()
    order = (index[share] for index in shuffled_batches(cfg.trajectories, batch, step, cfg.seed, 13))
    visits = gather_batches([train.states, train.labels], order, device)
    stop.begin()
    while True:
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 and step > evaluated:
            speed = (step - clock_step) * batch / max(1e-9, time.time() - clock)
            numbers = {"epoch": epoch, "images per s": speed, **evaluate(Student(ema.module), val, ranks)}
            loss, norm, taken = sums.tolist()
            numbers |= {"loss/train": loss / max(1.0, taken), "gradient norm": norm / max(1.0, taken)}
            numbers |= {"learning rate": schedule.get_last_lr()[0]}
            if taken < step - evaluated:
                numbers["skipped steps"] = step - evaluated - taken
            if numbers["loss/val"] < best:
                best = numbers["loss/val"]
                champion = (deepcopy(ema.module), {**meta, "epoch": epoch, "metrics": numbers})
            if ranks.main:
                log.log(step, numbers)
                if epoch % 5 == 0 or step == total:
                    show(ema.module, vae, val, folder, epoch, step == total)
                    log.picture(step, "samples", folder / "samples.png")
                    log.plot()
                    refresh_report(folder.parent)
            bar.write(
                f"epoch {epoch:4d}  train {numbers['loss/train']:.4f}  val {numbers['loss/val']:.4f}  "
                f"{speed:.0f} images/s{skipped_steps_note(numbers)}"
            )
            evaluated, clock, clock_step = step, time.time(), step
            sums.zero_()
        leave = step >= total or ranks.any(stop, step)
        if leave or time.time() - saved_at > 60 * cfg.save_minutes:
            save()
            saved_at = time.time()
        if leave:
            break
        states, y = next(visits)
        g = generator(cfg.seed, 14, step, device=device)  # a step's randomness is its own: resuming needs no state
        places = torch.randint(cfg.num_steps, (batch,), generator=g, device=device)[share]
        mean = torch.zeros(1, device=device)
        for rows, weight, passing in ranks.portions(batch, micro, network):
            if model.unet.config["dropout"]:
                torch.manual_seed(derive_seed(cfg.seed, 15, step, share.start + rows.start))
            with passing:
                loss = network(states[rows], y[rows], places[rows])
                scaler.scale(weight * loss.mean()).backward()
            mean += loss.detach().sum() / batch
        ranks.sum(mean)
        norm = optimise(model, optimizer, scaler, ema, cfg.grad_clip)
        schedule.step()
        sums += torch.where(norm.isfinite(), torch.cat([mean, norm[None], torch.ones_like(norm)[None]]), 0.0)
        step += 1
        bar.update(batch)
        if bad := watch.hopeless(norm, step):
            save()
            ranks.fail(watch.sentence(bad, bad / steps_per_epoch, folder))
    bar.close()
    if ranks.main and step >= total:
        save_weights(folder / "final.safetensors", ema.module, {**meta, "epoch": cfg.epochs, "metrics": log.rows[-1]})
    stop.end()
    if ranks.main:
        log.close()
    ranks.close()
    if step < total:
        leave_early(stop, step / steps_per_epoch)
    print(f"done: {folder / 'final.safetensors'}; the teacher's images and the student's in {folder / 'samples.png'}")


if __name__ == "__main__":
    run_script(main, cfg)
