"""Draw new MRIs: python predict.py --run NAME --num-images 16 --class-name AD --seed 7 --out out/.

Writes CLASS_00000.png ..., grid.png, denoising.gif, denoising.png and manifest.csv. The same command again completes
what is missing.
"""

from __future__ import annotations

from config import PredictConfig, parse

if __name__ == "__main__":
    cfg = parse(PredictConfig)  # before torch is imported, so that --help answers at once

import csv
import io
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from modules import StableDiffusion, load_diffusion, make_grid
from utils import (
    UserError,
    describe_hardware,
    file_hash,
    image_grid,
    pick_amp_dtype,
    pick_device,
    png_bytes,
    progress_bar,
    run_script,
    to_uint8,
    visualise_denoising_process,
    write_atomic,
)
from vae import load_vae


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
        solver, eta = cfg.solver or "dpm++2m", cfg.eta or 0.0
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


def claim_folder(out: Path, command: dict) -> None:
    """Make OUT this command's own: new, empty, or begun by the same command. Anything else is refused."""
    record = out / "command.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if record.exists():
        if json.loads(record.read_text()) != command:
            raise UserError(f"{out} holds the images of another command ({record}): choose another --out")
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: choose another --out, or empty it")
    write_atomic(record, json.dumps(command, indent=1).encode())


def main(cfg: PredictConfig) -> None:
    import cv2

    device = pick_device(cfg.device)
    folder = Path(cfg.checkpoints) / cfg.run
    if cfg.run == "pretrained" and not folder.exists():
        raise UserError(f"there are no pretrained weights in {folder}: train a run and name it with --run")
    unet_file, vae_file = folder / "diffusion" / f"{cfg.weights}.safetensors", folder / "vae" / "best.safetensors"
    model, meta = load_diffusion(unet_file, device)
    vae, _ = load_vae(vae_file, device)
    if file_hash(vae_file) != meta["vae"]:
        raise UserError(f"{unet_file} was trained on the latents of another VAE than {vae_file}: run train.py --fresh")
    # Autocast pays on a GPU; on a CPU sampling is short, and float32 keeps image k the same for every batch size.
    model.amp_dtype = vae.amp_dtype = (
        pick_amp_dtype(cfg.precision, device) if device.type == "cuda" or cfg.precision != "auto" else None
    )
    classes = meta["classes"]
    if cfg.class_name is not None and cfg.class_name not in classes:
        raise UserError(f"there is no class '{cfg.class_name}' in run {cfg.run}: it has {', '.join(classes)}")
    if cfg.class_name is not None and len(classes) > 1 and not model.num_classes:
        raise UserError(f"run {cfg.run} is unconditional and cannot draw one class: leave out --class-name")
    if cfg.guidance != 1.0 and not model.num_classes:
        raise UserError(f"run {cfg.run} is unconditional and has no class to be guided to: leave out --guidance")
    how = plan_sampling(cfg, model)
    out = Path(cfg.out)
    command = {k: v for k, v in asdict(cfg).items() if k not in ("out", "batch_size", "device", "wandb", "checkpoints")}
    checkpoint = file_hash(unet_file)
    claim_folder(out, {**command, **how, "checkpoint": checkpoint})

    # Image k: its class by --class-name or in turn, its noise by (seed, k).
    turn = [classes.index(cfg.class_name)] if cfg.class_name else list(range(len(classes)))
    labels = [turn[k % len(turn)] for k in range(cfg.num_images)]
    kind = [classes[y] if model.num_classes or len(classes) == 1 else "any" for y in labels]
    names = [f"{kind[k]}_{k:05d}.png" for k in range(cfg.num_images)]
    watched = set() if (out / "denoising.gif").exists() else set(range(min(4, cfg.num_images)))
    missing = [k for k in range(cfg.num_images) if k in watched or not (out / names[k]).exists()]
    if not missing and (out / "manifest.csv").exists():
        print(f"{out} is complete: {cfg.num_images} images")
        return

    start, bar = time.time(), progress_bar(cfg.num_images, cfg.num_images - len(missing))
    seen: list[list] = []  # per batch, what became of its watched images at each step
    with bar:
        for i in range(0, len(missing), cfg.batch_size):
            ks = missing[i : i + cfg.batch_size]
            n = sum(k in watched for k in ks)  # they come first
            steps: list = []
            seen += [steps] if n else []
            watch = (lambda t, x, x0, n=n, steps=steps: steps.append((t, x[:n], x0[:n]))) if n else None
            y = torch.tensor([labels[k] for k in ks])
            z = model.generate(vae.latent_shape, cfg.seed, ks, y, cfg.guidance, callback=watch, **how)
            for k, image in zip(ks, to_uint8(vae.decode(z))):
                write_atomic(out / names[k], png_bytes(image))
            bar.update(len(ks))
    seconds = time.time() - start
    if seen:
        joined = [(parts[0][0], *(torch.cat([p[i] for p in parts]) for i in (1, 2))) for parts in zip(*seen)]
        visualise_denoising_process(joined, vae.decode, out)
    shown = range(min(cfg.num_images, 64))
    write_atomic(out / "grid.png", png_bytes(image_grid(np.stack([cv2.imread(str(out / names[k]), 0) for k in shown]))))
    manifest = io.StringIO()
    rows = csv.writer(manifest, lineterminator="\n")
    rows.writerow(["file", "class", "seed", "index", "checkpoint"])
    rows.writerows([names[k], kind[k], cfg.seed, k, checkpoint] for k in range(cfg.num_images))
    write_atomic(out / "manifest.csv", manifest.getvalue().encode())
    print(
        f"{len(missing)} images in {seconds:.1f} s ({len(how['timesteps'])} steps of {how['solver']}, "
        f"{describe_hardware(device)}): {out / 'grid.png'}, {out / 'denoising.gif'}"
    )


if __name__ == "__main__":
    run_script(lambda: main(cfg))
