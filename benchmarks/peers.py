"""Ours, MONAI's and diffusers' latent diffusion on the same slices against the clock, scored by the same judge.

python benchmarks/peers.py --data DIR: rows to docs/results/quality-peers-128.json, 16 images of each beside them, and
the curves as quality-peers-128.png. Needs .venv-bench (make bench-env). Ours runs first, by its own scripts: the
seconds of its VAE, start of Python included, the peers may take, too; then each trains its U-Net until --minutes are
over. Every five minutes the weights are kept, and afterwards images are drawn from each. Rows that are there are not
measured again, and --only MONAI is a process for one of the three.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from quality import ROOT, Judge, Table, draw, script  # before the project's own: it puts them on the path
from torch import Tensor, nn

from config import DataConfig
from dataset import ADNIDataset, load_splits
from device import autocast, describe_hardware, pick_amp_dtype, pick_device
from evaluate import images_of
from evidence import Images
from loop import EMA
from modules import make_grid
from pictures import image_grid, png_bytes, to_pixels
from sampling import ImageSampler, load_run
from utils import git_commit
from weights import write_atomic

SIDE = 128
OUR_VAE = ["--image-size", SIDE, "--downsample", 4, "--latent-channels", 4, "--channels", 128, "--blocks", 2]
OUR_VAE += ["--no-attention"]
OUR_BATCH = 16
OUR_UNET = ["--channels", 64, 128, "--attention", 16, "--batch-size", OUR_BATCH, "--ema-decay", "0.998"]
OUR_UNET += ["--prediction", "flow", "--log-snr", 0, 2, "--loss-weight", "uniform"]
# Until it is interrupted: of so many epochs the learning rate rises for 200 steps and then hardly falls. The peers
# do not evaluate at all.
OUR_UNET += ["--epochs", 10000, "--sample-every", 10000, "--evaluate-every", 5, "--warmup", "1e-4"]


@dataclass(frozen=True)
class PeersConfig:
    """Train three projects for the same time and score what they draw."""

    data: str = os.environ.get("ADNI_ROOT", "data")
    """Folder of slices; people of val/ are the judges."""
    cache: str = "cache"
    """Folder for decoded slices."""
    checkpoints: str = "checkpoints/study"
    """Folder for the runs."""
    only: tuple[Literal["ours", "MONAI", "diffusers"], ...] = ("ours", "MONAI", "diffusers")
    """Which of them; the peers need the rows of ours."""
    vae_epochs: int = 2
    """Epochs of our VAE."""
    minutes: float = 60
    """What each may take, VAE and U-Net together."""
    every: float = 5
    """Minutes between weights that are scored."""
    num_images: int = 160
    """Images of each set in a score."""
    device: str = "auto"
    """auto, cuda or cpu."""
    out: str = "docs/results"
    """Folder of the rows."""


class Peer:
    """A peer's networks, training losses and samplers, by its own parts, as its examples put them together.

    U-Nets within 6 % of ours in parameters and FLOPs; VAEs with 8 to 12 % more FLOPs and two thirds of the parameters
    (their first levels are at full resolution, where ours has a space-to-depth stem).

    Beyond the examples, in the peers' favour: our learning rate (1e-4, theirs, learns little in minutes), the latent's
    scale measured over 256 slices, bf16, channels last, and a U-Net that sees no mirrored brains, as ours does not.
    """

    def __init__(self, name: str, device: torch.device):
        self.name, self.device, self.amp_dtype = name, device, pick_amp_dtype("auto", device)
        self.judge = None
        if name == "MONAI":  # tutorials/generation/2d_ldm
            from monai.losses import PatchAdversarialLoss
            from monai.networks.nets import AutoencoderKL, DiffusionModelUNet, PatchDiscriminator
            from monai.networks.schedulers import DDIMScheduler, DDPMScheduler

            self.vae = AutoencoderKL(
                spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=(1,) * 3, channels=(16, 32, 96),
                attention_levels=(False,) * 3, latent_channels=4, norm_num_groups=8,
            )  # fmt: skip
            self.judge = PatchDiscriminator(spatial_dims=2, num_layers_d=3, channels=32, in_channels=1, out_channels=1)
            self.adversarial = PatchAdversarialLoss(criterion="least_squares")
            self.unet = DiffusionModelUNet(
                spatial_dims=2, in_channels=4, out_channels=4, num_res_blocks=1, channels=(40, 144),
                attention_levels=(False, True), norm_num_groups=8, num_head_channels=(0, 16),
            )  # fmt: skip
            betas = dict(schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195)
            self.scheduler = DDPMScheduler(num_train_timesteps=1000, **betas)
            self.solvers = {"DDIM": DDIMScheduler(num_train_timesteps=1000, clip_sample=False, **betas)}
            self.ema_decay = 0.0
        else:  # examples/unconditional_image_generation with --use_ema, on the latents of its AutoencoderKL
            from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

            self.vae = AutoencoderKL(
                in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 24, 96), layers_per_block=1,
                latent_channels=4, norm_num_groups=8,
            )  # fmt: skip
            self.unet = UNet2DModel(
                sample_size=SIDE // 4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(40, 144),
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=16, norm_num_groups=8,
            )  # fmt: skip
            self.scheduler = DDPMScheduler(num_train_timesteps=1000)
            self.solvers = {
                "DPM-Solver++(2M)": DPMSolverMultistepScheduler(num_train_timesteps=1000, timestep_spacing="linspace"),
                "DDIM": DDIMScheduler(num_train_timesteps=1000, clip_sample=False),
            }
            self.ema_decay = 0.999
        for m in (self.vae, self.unet, self.judge):
            if m is not None:
                m.to(device, memory_format=torch.channels_last)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation."""
        if self.name == "MONAI":
            return self.vae.encode(x)
        d = self.vae.encode(x).latent_dist
        return d.mean, d.std

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z) if self.name == "MONAI" else self.vae.decode(z).sample

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        with autocast(x, self.amp_dtype):
            return (self.unet(x, t) if self.name == "MONAI" else self.unet(x, t).sample).float()

    def train_vae(self, batches: Iterator[Tensor], seconds: float, lr: float) -> int:
        """Images seen in that time."""
        optimizer, seen, start = torch.optim.Adam(self.vae.parameters(), lr), 0, time.time()
        rival = torch.optim.Adam(self.judge.parameters(), 5e-4) if self.judge else None
        while (gone := time.time() - start) < seconds:
            x = next(batches)
            with autocast(x, self.amp_dtype):
                mean, sd = self.posterior(x)
                x_hat = self.decode(mean + sd * torch.randn_like(sd)).float()
            kl = 0.5 * (mean.float() ** 2 + sd.float() ** 2 - (sd.float() ** 2).log() - 1).sum((1, 2, 3)).mean()
            rec = F.l1_loss(x_hat, x) if self.name == "MONAI" else F.mse_loss(x_hat, x)
            loss, fooling = rec + 1e-6 * kl, self.judge is not None and gone > seconds / 2
            if fooling:
                verdict = self.judge(x_hat.contiguous())[-1]
                loss = loss + 0.01 * self.adversarial(verdict, target_is_real=True, for_discriminator=False)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if fooling:
                rival.zero_grad(set_to_none=True)
                of_fake, of_real = self.judge(x_hat.detach().contiguous())[-1], self.judge(x.contiguous())[-1]
                told = [self.adversarial(v, r, for_discriminator=True) for v, r in ((of_fake, False), (of_real, True))]
                (0.5 * sum(told)).backward()
                rival.step()
            seen += len(x)
        return seen

    def train_unet(self, latents: Callable[[], Tensor], marks: list[float], lr: float) -> list[tuple[int, dict]]:
        """(images seen, weights) after so many seconds each; averaged weights, where the peer averages."""
        optimizer, seen, start, kept = torch.optim.AdamW(self.unet.parameters(), lr), 0, time.time(), []
        # With a warm-up, as diffusers' own has: a plain 0.999 would still hold the first, random weights after minutes.
        ema = EMA(self.unet, self.ema_decay) if self.ema_decay else None
        while len(kept) < len(marks):
            z = latents()
            noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),), device=z.device)
            x_t = self.scheduler.add_noise(original_samples=z, noise=noise, timesteps=t)
            loss = F.mse_loss(self.denoise(x_t, t), noise)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
            optimizer.step()
            if ema:
                ema.update(self.unet, torch.tensor(1.0))
            seen += len(z)
            if time.time() - start >= marks[len(kept)]:
                kept.append((seen, deepcopy((ema.module if ema else self.unet).state_dict())))
        return kept

    @torch.no_grad()
    def draw(self, n: int, steps: int, solver: str, scale: float) -> tuple[Images, float]:
        """(n images, images/s)."""
        self.unet.eval(), self.vae.eval()
        scheduler, pixels, start = self.solvers[solver], [], time.time()
        g = torch.Generator().manual_seed(0)
        for k in torch.arange(n).split(32):
            scheduler.set_timesteps(steps)
            x = torch.randn(len(k), 4, SIDE // 4, SIDE // 4, generator=g).to(self.device)
            for t in scheduler.timesteps:
                out = self.denoise(x, torch.full((len(k),), int(t), device=self.device))
                done = scheduler.step(out, t, x)
                x = done[0] if isinstance(done, tuple) else done.prev_sample
            with autocast(x, self.amp_dtype):
                pixels.append(to_pixels(self.decode(x / scale).float()).cpu())
        speed = n / (time.time() - start)
        return Images(torch.cat(pixels), torch.zeros(n), np.arange(n).astype(str)), speed


def theirs(images: Images, judge: Judge) -> dict[str, float]:
    """MONAI's own metrics: its FID on the judge's VGG features, and its MS-SSIM between pairs (diversity)."""
    from monai.metrics import FIDMetric, MultiScaleSSIMMetric

    fid = FIDMetric()(judge.embed("vgg", images.sample(judge.n, 2).pixels), judge.real["vgg"])
    x = images.pixels[:, None].float() / 255
    half = len(x) // 2
    similar = MultiScaleSSIMMetric(spatial_dims=2, data_range=1.0, kernel_size=7, weights=(0.1, 0.3, 0.6))
    return {
        "MONAI_FID": round(fid.item(), 4),
        "MONAI_MS_SSIM": round(similar(x[:half], x[half : 2 * half]).mean().item(), 4),
    }


def ours(cfg: PeersConfig, home: Path, device: torch.device, put: Callable) -> None:
    """Train ours by its scripts, until the minutes are over, and score the weights of every five minutes."""
    run, kept = home / "peer-ours", home / "peer-ours" / "kept"
    where = ["--data", cfg.data, "--cache", cfg.cache, "--checkpoints", home, "--run", run.name]
    where += ["--wandb", "disabled", "--device", cfg.device]
    if not (run / "seconds").exists():
        seconds = script("pre_train.py", "small", *where, *OUR_VAE, "--epochs", cfg.vae_epochs)
        write_atomic(run / "seconds", str(round(seconds)).encode())
    vae_seconds = int((run / "seconds").read_text())
    if not kept.exists():
        # last.pt is written every half minute, so what is kept is up to that much older than it may be. The folder gets
        # its name once it is whole.
        begun = kept.with_name("kept-begun")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir()
        command = [sys.executable, "train.py", "small", *where, *OUR_UNET, "--fresh", "--save-minutes", 0.5]
        start, last = time.time(), run / "diffusion" / "last.pt"
        training = subprocess.Popen([*map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the training never outlives this process
        try:
            for mark in marks_after(cfg, vae_seconds):
                time.sleep(max(0.0, start + mark - time.time()))
                if last.exists():
                    shutil.copy(last, begun / f"{round((mark + vae_seconds) / 60)}.pt")
        finally:
            training.send_signal(signal.SIGTERM)
            training.wait()
        begun.rename(kept)
    model, vae, _, _ = load_run(run, "best", device)
    model.amp_dtype = vae.amp_dtype = pick_amp_dtype("auto", device)
    for file in sorted(kept.glob("*.pt"), key=lambda p: int(p.stem)):
        state = torch.load(file, weights_only=True)
        model.load_state_dict({k.removeprefix("module."): v for k, v in state["ema"].items() if k != "n_averaged"})
        facts = {"minutes": int(file.stem), "vae_seconds": vae_seconds, "seen": state["step"] * OUR_BATCH}
        # The second is what predict.py takes by default; sets of many steps are drawn every twenty minutes only.
        for steps, eta in ((10, 0.0), (20, 1.0))[: 1 + (int(file.stem) % 20 == 0)]:
            timesteps = make_grid("logsnr", steps, model.scheduler.abar).tolist()
            images, _, speed = draw(ImageSampler(model, vae, 32, timesteps=timesteps, eta=eta), cfg.num_images)
            put(f"ours-{steps}-{file.stem}", images, **facts, eta=eta, images_per_s=round(speed, 2))


def marks_after(cfg: PeersConfig, vae_seconds: int) -> list[float]:
    """Seconds of the U-Net's training at whose end weights are kept."""
    every, end = 60 * cfg.every, 60 * cfg.minutes
    return [mark - vae_seconds for mark in np.arange(every, end + 1, every) if mark - vae_seconds > every / 2]


def train_peer(
    peer: Peer, train: ADNIDataset, val: ADNIDataset, vae_seconds: int, marks: list[float], device: torch.device
) -> dict[str, Any]:
    """Train a peer, its VAE for as many seconds as ours took: {"vae": weights, "unets": (images seen, weights) after so
    many seconds each, "scale" of the latents, "PSNR" of people held out}."""

    def batches(size: int = 8) -> Iterator[Tensor]:
        while True:
            x = train.batch(torch.randint(len(train), (size,)), device)
            yield torch.where(torch.rand(size, 1, 1, 1, device=device) < 0.5, x.flip(3), x)

    peer.train_vae(batches(), vae_seconds, 6e-4)
    with torch.no_grad():
        rec = [(peer.decode(peer.posterior(x)[0]).float(), x) for x in val.batches(32, device)]
        error = torch.cat([((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)) for a, b in rec])
        posteriors = [peer.posterior(x) for x in train.batches(32, device)]
    # Latents are encoded once and not mirrored, as ours are, and their scale is that of the first 256 slices.
    moments = [torch.cat([p[i] for p in posteriors]).float() for i in (0, 1)]
    scale = 1 / (moments[0][:256] + moments[1][:256] * torch.randn_like(moments[1][:256])).std().item()

    def latents() -> Tensor:
        i = torch.randint(len(moments[0]), (OUR_BATCH,), device=device)
        return scale * (moments[0][i] + moments[1][i] * torch.randn_like(moments[1][i]))

    unets, psnr = peer.train_unet(latents, marks, 7e-4), round(-10 * error.log10().mean().item(), 2)
    return {"vae": peer.vae.state_dict(), "unets": unets, "scale": scale, "PSNR": psnr}


def theirs_against_the_clock(
    cfg: PeersConfig, name: str, home: Path, train: ADNIDataset, val: ADNIDataset, device: torch.device, put: Callable
) -> None:
    """Train a peer for as long as ours and score the weights of every five minutes."""
    torch.manual_seed(0)
    vae_seconds = int((home / "peer-ours" / "seconds").read_text())
    peer, kept, marks = Peer(name, device), home / f"peer-{name}.pt", marks_after(cfg, vae_seconds)
    if not kept.exists():
        buffer = io.BytesIO()
        torch.save(train_peer(peer, train, val, vae_seconds, marks, device), buffer)
        write_atomic(kept, buffer.getvalue())
    trained = torch.load(kept, map_location=device, weights_only=True)
    peer.vae.load_state_dict(trained["vae"])
    for mark, (seen, weights) in zip(marks, trained["unets"]):
        peer.unet.load_state_dict(weights)
        minutes = round((mark + vae_seconds) / 60)
        facts = {"minutes": minutes, "vae_seconds": vae_seconds, "seen": seen, "PSNR": trained["PSNR"]}
        for steps, solver in ((10, next(iter(peer.solvers))), (50, "DDIM"))[: 1 + (minutes % 20 == 0)]:
            images, speed = peer.draw(cfg.num_images, steps, solver, trained["scale"])
            put(f"{name}-{steps}-{minutes}", images, **facts, solver=solver, images_per_s=round(speed, 2))


def curves(rows: list[dict], path: Path) -> None:
    """Fréchet distance against minutes in both features: a colour for each project, dashed where it takes more steps
    than ten."""
    from matplotlib.figure import Figure

    figure = Figure((9, 4.2), layout="constrained")
    floor = next(r for r in rows if r["name"] == "floor")
    for ax, kind, title in zip(figure.subplots(1, 2), ("vgg", "ae"), ("random VGG-16", "autoencoder")):
        for i, who in enumerate(("ours", "MONAI", "diffusers")):
            mine = [(r["name"].split("-")[1], r) for r in rows if r["name"].startswith(f"{who}-")]
            for steps in sorted({steps for steps, _ in mine}, key=int):
                line = sorted((r["minutes"], r[f"frechet_{kind}"]) for s, r in mine if s == steps)
                ax.plot(
                    *zip(*line), f"C{i}", linestyle="-" if steps == "10" else "--", marker="o", markersize=3,
                    label=f"{who}, {steps} steps",
                )  # fmt: skip
        ax.axhline(floor[f"frechet_{kind}"], color="black", linestyle=":", label="people held out")
        ax.set(xlabel="minutes of training, one core", ylabel="Fréchet distance", yscale="log", title=title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(cfg: PeersConfig) -> None:
    device, home = pick_device(cfg.device), Path(cfg.checkpoints)
    splits, _ = load_splits(DataConfig(data=cfg.data, cache=cfg.cache), SIDE)
    train, val = splits["train"], splits["val"]
    judge = Judge(images_of(train, []), images_of(val, []), cfg.num_images, device)
    table = Table(Path(cfg.out) / "quality-peers-128.json")
    stamp = {
        "date": time.strftime("%Y-%m-%d"), "device": describe_hardware(device), "commit": git_commit(),
        "data": Path(cfg.data).name, "side": SIDE, "n": cfg.num_images,
    }  # fmt: skip
    if not table.has("floor"):
        table.add({"name": "floor", **judge.floor(), **theirs(judge.held_out, judge), **stamp})

    def put(name: str, images: Images, **facts: object) -> None:
        if not table.has(name):
            grid = png_bytes(image_grid(images.pixels[:16].numpy(), columns=8))
            write_atomic(Path(cfg.out) / "quality-peers-128" / f"{name}.png", grid)
            numbers = {**judge.score(images, two_sample=False), **theirs(images, judge)}
            table.add({"name": name, **facts, **numbers, **stamp})

    if "ours" in cfg.only:
        ours(cfg, home, device, put)
    for name in cfg.only:
        if name != "ours":
            theirs_against_the_clock(cfg, name, home, train, val, device, put)
    curves(table.rows(), Path(cfg.out) / "quality-peers-128.png")


if __name__ == "__main__":
    main(tyro.cli(PeersConfig, description=__doc__))
