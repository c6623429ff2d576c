"""What the benchmarks share: flags, timing side by side, the peers' networks matched in size, rows and their table."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", category=FutureWarning)

from config import PRESETS, PretrainConfig, TrainConfig  # noqa: E402
from device import describe_hardware, pick_amp_dtype, pick_device  # noqa: E402
from modules import NoiseScheduler_Fast_DDPM, StableDiffusion, UNet  # noqa: E402
from utils import git_commit  # noqa: E402
from vae import VAE  # noqa: E402
from weights import save_weights, write_atomic  # noqa: E402

# The 128² networks of the comparisons of speed, which the peers' below are matched to; `adni` is the preset's own.
SMALL = (
    dict(image_size=128, downsample=8, latent_channels=8, channels=(48, 96, 160), blocks=1, attention=True),
    dict(channels=(96, 192), blocks=1, patch=1, attention=(8,)),
)
# Widths, residual blocks, groups of GroupNorm and channels of an attention head of the peers' networks: those within
# 5 % of ours in parameters and in FLOPs. `check_match` refuses to compare others.
UNETS = {
    ("small", "diffusers"): dict(channels=(64, 216), blocks=1, groups=8, head=72),
    ("small", "MONAI"): dict(channels=(64, 216), blocks=1, groups=8, head=(64, 72)),
    ("adni", "diffusers"): dict(channels=(96, 256, 544), blocks=2, groups=32, head=32),
    ("adni", "MONAI"): dict(channels=(96, 256, 544), blocks=2, groups=32, head=(32, 64, 68)),
}
VAES = {
    ("small", "diffusers"): dict(channels=(8, 24, 80, 128), blocks=1, groups=8),
    ("small", "MONAI"): dict(channels=(8, 32, 48, 128), blocks=2, groups=8),
    ("adni", "diffusers"): dict(channels=(16, 48, 96, 256), blocks=1, groups=8),
    ("adni", "MONAI"): dict(channels=(16, 48, 104, 232), blocks=2, groups=8),
}


@dataclass(frozen=True)
class BenchConfig:
    """Flags of every benchmark."""

    device: str = "auto"
    """auto, cuda or cpu."""
    preset: str = "auto"
    """Sizes: adni (256², the default on a GPU) or small (128², the default on a CPU)."""
    quick: bool = False
    """Under a minute: fewer and shorter repetitions, no compiling."""
    seconds: float = 90
    """Time for the repetitions of one comparison."""
    json: str = ""
    """File for the rows; docs/results/ keeps the ones that the documentation cites."""


class Bench:
    """Settings, networks and rows of one benchmark."""

    def __init__(self, cfg: BenchConfig):
        self.cfg, self.device, self.rows = cfg, pick_device(cfg.device), []
        self.gpu = self.device.type == "cuda"
        self.preset = cfg.preset if cfg.preset != "auto" else "adni" if self.gpu else "small"
        self.pre, self.tra = (replace(c(), **PRESETS[self.preset].get(c, {})) for c in (PretrainConfig, TrainConfig))
        if self.preset == "small":
            self.pre, self.tra = replace(self.pre, **SMALL[0]), replace(self.tra, **SMALL[1])
        self.amp_dtype = pick_amp_dtype("auto", self.device)
        self.latent = self.vae().latent_shape
        print(f"{self.preset} sizes, {describe_hardware(self.device)}, {self.amp_dtype or torch.float32}")

    def vae(self) -> VAE:
        c = self.pre
        vae = VAE(c.image_size, c.downsample, c.latent_channels, c.channels, c.blocks, c.attention)
        vae.amp_dtype = self.amp_dtype
        return vae.to(self.device, memory_format=torch.channels_last)

    def model(self, conditions: Sequence[int] = (2,)) -> StableDiffusion:
        channels, side, _ = self.latent
        t = self.tra
        model = StableDiffusion(
            UNet(channels, side, t.channels, t.blocks, t.attention, conditions, 0.0, t.norm_group),
            NoiseScheduler_Fast_DDPM(),
            t.prediction,
        ).to(self.device, memory_format=torch.channels_last)
        model.amp_dtype = self.amp_dtype
        return model

    def synchronise(self) -> None:
        if self.gpu:
            torch.cuda.synchronize(self.device)

    def interleave(
        self, calls: dict[str, Callable[[], object]], seconds: float | None = None
    ) -> dict[str, list[float]]:
        """Seconds a call of each contender, in turns, so that a machine that slows down slows all of them."""
        once = {}
        for name, call in calls.items():
            call(), call()
            self.synchronise()
            start = time.perf_counter()
            call()
            self.synchronise()
            once[name] = time.perf_counter() - start
        budget = seconds or (6 if self.cfg.quick else self.cfg.seconds)
        rounds = max(3, min(25, int(budget / (sum(max(t, 0.2) for t in once.values())))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                n = max(1, round(0.2 / once[name]))
                start = time.perf_counter()
                for _ in range(n):
                    call()
                self.synchronise()
                times[name].append((time.perf_counter() - start) / n)
        return times

    def row(
        self, task: str, ours: float, peer: str, theirs: float | None, unit: str, ratio: float | None = None
    ) -> None:
        """Numbers in `unit`; ratio > 1 means that we are ahead. Without a peer theirs and ratio are None."""
        if theirs is not None and ratio is None:
            ratio = theirs / ours if unit in ("s", "ms", "GB") else ours / theirs
        values = {
            "task": task, "device": describe_hardware(self.device), "ours": float(f"{ours:.4g}"), "peer": peer,
            "theirs": None if theirs is None else float(f"{theirs:.4g}"),
            "ratio": None if ratio is None else round(ratio, 3), "unit": unit,
        }  # fmt: skip
        self.rows.append(values)
        other = "" if theirs is None else f"{values['theirs']:>10,.4g}  {peer:<24}{ratio:6.2f} x"
        print(f"{task:<46}{values['ours']:>10,.4g} {unit:<11}{other}", flush=True)
        # All rows so far, so that a benchmark that fails or is cut keeps what it measured.
        if self.cfg.json:
            stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "torch": torch.__version__}
            text = ",\n".join(json.dumps({**r, **stamp}) for r in self.rows)
            write_atomic(Path(self.cfg.json), f"[\n{text}\n]\n".encode())

    def compare(self, task: str, times: dict[str, list[float]], ours: str, peer: str, images: int) -> None:
        """A row of images per second; the ratio is the median of the rounds' ratios."""
        ratio = statistics.median(b / a for a, b in zip(times[ours], times[peer]))
        a, b = (images / statistics.median(times[k]) for k in (ours, peer))
        self.row(task, a, peer, b, "images/s", ratio)


def peak_gb() -> float:
    """The most memory this process has held, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "linux" else 2**30)


def make_run(b: Bench, folder: Path) -> None:
    """FOLDER/vae and FOLDER/diffusion as a finished run of this preset, with random weights: for timing only."""
    vae, model = b.vae(), b.model()
    config = {"subject_regex": "^(.*)_", "val_fraction": 0.1, "skip_bad_files": False, "seed": 0}
    save_weights(folder / "vae" / "best.safetensors", vae, {"kind": "vae", "model": vae.config, "finished": True})
    meta = {
        "kind": "diffusion", "model": model.unet.config, "scheduler": model.scheduler.config, "prediction": "v",
        "classes": ["AD", "NC"], "vae": vae.latent_hash(), "config": config,
        "data": "nothing", "epoch": 0,
    }  # fmt: skip
    save_weights(folder / "diffusion" / "best.safetensors", model, meta)


def script(*command: str) -> float:
    """Seconds of `python SCRIPT ...` in the repository's folder, from start to exit."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed: {done.stderr[-500:]}")
    return time.perf_counter() - start


def commit() -> str:
    dirty = subprocess.run(["git", "status", "--porcelain", "*.py"], capture_output=True, text=True).stdout.strip()
    return git_commit() + "+" * bool(dirty)


def cost(module: nn.Module, call: Callable[[], object]) -> tuple[int, int]:
    """(parameters, FLOPs of call()); fast on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return sum(p.numel() for p in module.parameters()), counter.get_total_flops()


def check_match(name: str, ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    """Say how large a peer's network is, and refuse one that is not within 5 % in parameters and in FLOPs."""
    p, f = (b / a - 1 for a, b in zip(ours, theirs))
    print(f"{name}: {theirs[0] / 1e6:.2f} M parameters ({p:+.1%}), {theirs[1] / 1e9:.2f} GFLOP forward ({f:+.1%})")
    if max(abs(p), abs(f)) > 0.05:
        sys.exit(f"error: {name} is not matched within 5 %: change its widths in benchmarks/common.py")


class PeerUNet(nn.Module):
    """diffusers' UNet2DModel or MONAI's DiffusionModelUNet behind one call (x, t, y), of our size; y as ours [B, 1]."""

    def __init__(self, b: Bench, peer: str):
        super().__init__()
        size, (c, side, _) = UNETS[b.preset, peer], b.latent
        here = [side // 2**i in b.tra.attention for i in range(len(size["channels"]))]
        if peer == "diffusers":
            from diffusers import UNet2DModel

            self.net = UNet2DModel(
                sample_size=side, in_channels=c, out_channels=c, layers_per_block=size["blocks"],
                block_out_channels=size["channels"], norm_num_groups=size["groups"], num_class_embeds=3,
                attention_head_dim=size["head"],
                down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in here),
                up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in here[::-1]),
            )  # fmt: skip
            self.call = lambda x, t, y: self.net(x, t, y).sample
        else:
            from monai.networks.nets import DiffusionModelUNet

            self.net = DiffusionModelUNet(
                spatial_dims=2, in_channels=c, out_channels=c, num_res_blocks=size["blocks"], channels=size["channels"],
                attention_levels=here, norm_num_groups=size["groups"], num_head_channels=size["head"],
                num_class_embeds=3,
            )  # fmt: skip
            self.call = lambda x, t, y: self.net(x, t, None, y)
        with torch.device("meta"):
            ours = UNet(c, side, b.tra.channels, b.tra.blocks, b.tra.attention, (2,))
            x, t = torch.randn(1, c, side, side), torch.zeros(1, dtype=torch.int64)
        real, self.net = self.net, deepcopy(self.net).to("meta")
        check_match(
            f"{peer} U-Net",
            cost(ours, lambda: ours(x, t, t[:, None].float())),
            cost(self.net, lambda: self.call(x, t, t)),
        )
        self.net = real.to(b.device)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.call(x, t, y[:, 0].long())


class PeerVAE(nn.Module):
    """diffusers' or MONAI's AutoencoderKL behind `encode` (a posterior sample) and `decode`, of our size."""

    def __init__(self, b: Bench, peer: str):
        super().__init__()
        size, n, latent = VAES[b.preset, peer], len(VAES[b.preset, peer]["channels"]), b.pre.latent_channels
        if peer == "diffusers":
            from diffusers import AutoencoderKL

            self.net = AutoencoderKL(
                in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * n,
                up_block_types=("UpDecoderBlock2D",) * n, block_out_channels=size["channels"],
                layers_per_block=size["blocks"], latent_channels=latent, norm_num_groups=size["groups"],
            )  # fmt: skip
            self.encode = lambda x: self.net.encode(x).latent_dist.sample()
            self.decode = lambda z: self.net.decode(z).sample
        else:
            from monai.networks.nets import AutoencoderKL

            self.net = AutoencoderKL(
                spatial_dims=2, in_channels=1, out_channels=1, num_res_blocks=(size["blocks"],) * n,
                channels=size["channels"], attention_levels=(False,) * n, latent_channels=latent,
                norm_num_groups=size["groups"],
            )  # fmt: skip
            self.encode = lambda x: self.net.encode_stage_2_inputs(x)
            self.decode = lambda z: self.net.decode_stage_2_outputs(z)
        ours, real, self.net = b.vae().to("meta"), self.net, deepcopy(self.net).to("meta")
        ours.amp_dtype = None
        with torch.device("meta"):
            x, z = torch.randn(1, 1, *2 * [b.pre.image_size]), torch.randn(1, *ours.latent_shape)
        check_match(
            f"{peer} VAE", cost(ours, lambda: (ours.posterior(x), ours.reconstruct(z))),
            cost(self.net, lambda: (self.net.encode(x), self.net.decode(z))),
        )  # fmt: skip
        self.net = real.to(b.device)


def peer_step(b: Bench, unet: nn.Module, peer: str) -> Callable[[Tensor, Tensor], None]:
    """One training step on clean latents [B, C, h, w] and their classes [B, 1], with the parts of the peer's script."""
    if peer == "diffusers":  # examples/unconditional_image_generation/train_unconditional.py, with --use_ema
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        scheduler, ema = DDPMScheduler(num_train_timesteps=1000), EMAModel(unet.parameters(), use_ema_warmup=True)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    else:  # MONAI's tutorial 2d_ldm: Adam, no average, no clipping
        from monai.networks.schedulers import DDPMScheduler

        scheduler = DDPMScheduler(num_train_timesteps=1000, schedule="linear_beta", beta_start=0.0015, beta_end=0.0195)
        optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler(b.device.type, enabled=b.amp_dtype == torch.float16)

    def step(z: Tensor, y: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        noise = torch.randn_like(z)
        t = torch.randint(0, 1000, (len(z),), device=z.device)
        with torch.autocast(b.device.type, b.amp_dtype, enabled=b.amp_dtype is not None):
            out = unet(scheduler.add_noise(original_samples=z, noise=noise, timesteps=t), t, y)
            loss = F.mse_loss(out.float(), noise)
        scaler.scale(loss).backward()
        if peer == "diffusers":
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        if peer == "diffusers":
            ema.step(unet.parameters())

    return step
