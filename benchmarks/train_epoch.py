"""A whole iteration of training the U-Net, data included, beside MONAI's 2D latent diffusion and the origin's loop.

    python benchmarks/train_epoch.py [--batch 16] [--data DIR] [--json FILE]

Ours reads the posterior's moments that were computed once; MONAI's LatentDiffusionInferer encodes in every step; the
origin's loop encodes, asks the U-Net once more and decodes, to log PSNR. All of them start from decoded slices in
memory. With --data, train.py itself is run on that folder, for two lengths: the difference is what an epoch takes, with
validation, samples and checkpoints in it.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from common import Bench, BenchConfig, PeerUNet, PeerVAE, peer_step, script
from torch.utils.data import DataLoader, TensorDataset

from cluster import Ranks
from device import gather_batches, shuffled_batches, to_device_if_it_fits
from loop import EMA, Gradients, make_scaler, optimise
from metrics import psnr, unit
from train import backward, step_randomness
from utils import generator
from weights import load_weights


@dataclass(frozen=True)
class EpochConfig(BenchConfig):
    """A whole iteration of training the U-Net, beside the peers'."""

    batch: int = 0
    """Images in a step. Default: 256 on a GPU, 16 on a CPU."""
    slices: int = 4096
    """Slices in memory."""
    data: str = ""
    """Folder of slices to run train.py on, with a VAE that is trained for one epoch first."""


def our_iteration(b: Bench, batch: int, slices: int) -> Callable[[], None]:
    """The iteration of train.py."""
    model, shape = b.model(), b.latent
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
    ema, scaler = EMA(model, 0.999), make_scaler(b.amp_dtype, b.device)
    call, ranks = partial(backward, model, model, scaler, 10), Ranks(b.device)
    gradients = Gradients(call, [model], optimizer, scaler, 1.0, ranks, batch, batch)
    moments = to_device_if_it_fits(torch.rand(slices, 1, 2, *shape).half(), b.device)
    conditions = torch.zeros(slices, 1, device=moments.device)
    visits = gather_batches([moments, conditions], shuffled_batches(slices, batch, 0, 0, 3), b.device)
    count = 0

    def iteration() -> None:
        nonlocal count
        count += 1
        z, y = next(visits)
        randomness = step_randomness(model, batch, shape, b.tra, generator(0, count, device=b.device))
        optimise(model, optimizer, ema, gradients(z, y, *randomness)[0])

    if b.gpu and not b.cfg.quick:
        model.unet.forward = torch.compile(model.unet.forward, dynamic=False)
    return iteration


def monai_iteration(b: Bench, images: torch.Tensor, batch: int) -> Callable[[], None]:
    """As in MONAI's tutorial 2d_ldm: a DataLoader, and LatentDiffusionInferer, which encodes."""
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.schedulers import DDPMScheduler

    vae, unet = PeerVAE(b, "MONAI").eval(), PeerUNet(b, "MONAI")
    scheduler = DDPMScheduler(num_train_timesteps=1000, schedule="linear_beta", beta_start=0.0015, beta_end=0.0195)
    inferer, optimizer = LatentDiffusionInferer(scheduler, scale_factor=1.0), torch.optim.Adam(unet.parameters(), 1e-4)
    loader = DataLoader(TensorDataset(images), batch, shuffle=True, drop_last=True, pin_memory=b.gpu)

    def endless():
        while True:
            yield from loader

    batches = endless()
    scaler = torch.amp.GradScaler(b.device.type, enabled=b.amp_dtype == torch.float16)

    def iteration() -> None:
        (x,) = next(batches)
        x = x.to(b.device, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(b.device.type, b.amp_dtype, enabled=b.amp_dtype is not None):
            noise = torch.randn(len(x), *b.latent, device=x.device)
            t = torch.randint(0, 1000, (len(x),), device=x.device)
            y = torch.randint(0, 2, (len(x), 1), device=x.device).float()
            out = inferer(
                inputs=x, autoencoder_model=vae.net, diffusion_model=lambda x, timesteps, **_: unet(x, timesteps, y),
                noise=noise, timesteps=t,
            )  # fmt: skip
            loss = torch.nn.functional.mse_loss(out.float(), noise)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return iteration


def origin_iteration(b: Bench, images: torch.Tensor, batch: int) -> Callable[[], None]:
    """The origin's loop on networks of the same size: encode, step, one more U-Net pass, decode, PSNR by .item()."""
    vae, model = b.vae().eval().requires_grad_(False), b.model()
    step = peer_step(b, model.unet, "MONAI")
    loader = iter(lambda: images[torch.randint(len(images), (batch,))].to(b.device), None)

    def iteration() -> None:
        x = next(loader)
        with torch.no_grad():
            mean, std = vae.encode(x)
            z = mean + std * torch.randn_like(std)
        y = torch.randint(0, 2, (batch, 1), device=b.device).float()
        step(z, y)
        with torch.no_grad():
            t, noise = torch.randint(0, 1000, (batch,), device=b.device), torch.randn_like(z)
            _, z0 = model(z, t, noise, y)
            psnr(unit(vae.decode(z0)), unit(x)).mean().item()

    return iteration


def run_of_train(b: Bench, data: str, batch: int) -> None:
    """Seconds of an epoch of train.py, everything included, and what 500 epochs of the origin's 21,520 slices take."""
    with tempfile.TemporaryDirectory() as folder:
        common = [b.preset, "--data", data, "--checkpoints", folder, "--run", "r", "--device", str(b.device)]
        common += ["--wandb", "disabled", "--cache", f"{folder}/cache"]
        common += ["--compile", "off"]
        script("pre_train.py", *common, "--epochs", "1")
        _, meta = load_weights(Path(folder) / "r" / "vae" / "best.safetensors", "vae")
        slices = int(meta["data"].split()[0].replace(",", ""))  # "1,600 slices of 50 people (NC 1,600)"
        # On a GPU about 60,000 images more in the second run: half a minute.
        times, lengths = [], (2, 4) if b.cfg.quick or not b.gpu else (2, 4 + 60_000 // slices)
        for epochs in lengths:
            flags = ["--epochs", str(epochs), "--batch-size", str(batch), "--fresh", "--sample-every", str(10)]
            times.append(script("train.py", *common, *flags))
        # What an epoch takes beside its steps does not grow with the slices, so a small folder gives too long a time.
        epoch = (times[1] - times[0]) / (lengths[1] - lengths[0])
        b.row("train.py, everything included", slices / epoch, "", None, "images/s")
        b.row(
            f"500 epochs over 21,520 slices, at most (from {slices:,})",
            500 * 21520 * epoch / slices / 60,
            "",
            None,
            "min",
        )


def main(cfg: EpochConfig) -> None:
    b = Bench(cfg)
    batch, side = cfg.batch or (256 if b.gpu else 16), b.pre.image_size
    if b.gpu:  # before anything else is on it
        iteration = our_iteration(b, 16, cfg.slices)
        for _ in range(5):
            iteration()
        b.row("peak memory, batch 16", torch.cuda.max_memory_allocated(b.device) / 1e9, "", None, "GB")
        del iteration
    images = torch.rand(min(cfg.slices, 64 * batch), 1, side, side) * 2 - 1
    times = b.interleave({
        "ours": our_iteration(b, batch, cfg.slices), "MONAI": monai_iteration(b, images, batch),
        "origin": origin_iteration(b, images, batch),
    })  # fmt: skip
    b.compare("whole iteration", times, "ours", "MONAI", batch)
    b.compare("whole iteration", times, "ours", "origin", batch)
    print(f"one iteration of ours: {1e3 * statistics.median(times['ours']):.1f} ms")
    if cfg.data:
        run_of_train(b, cfg.data, batch)


if __name__ == "__main__":
    main(tyro.cli(EpochConfig, description=__doc__))
