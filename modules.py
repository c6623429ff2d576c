"""The networks of the diffusion and what trains them: U-Net, Fast-DDPM, samplers, learning-rate schedule, Lookahead.

The VAE is in vae.py, and the way from a trained run to images is in sampling.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from conditions import MOST, Attribute, from_header
from config import check_arguments
from device import autocast
from utils import UserError, generator
from weights import build_network, load_into, load_weights

# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def group_norm(channels: int, least: int = 1) -> nn.GroupNorm:
    """GroupNorm with the most groups that divide the channels: up to 32, each of at least `least` channels."""
    fits = (g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= least))
    return nn.GroupNorm(max(fits), channels, eps=1e-6)


def zero_init(layer: nn.Module) -> nn.Module:
    """Set all parameters of the layer to zero and return it: a residual branch that ends in it starts as the identity
    (Ho et al. 2020)."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep: int64 [B] -> float32 [B, dim] (Vaswani et al. 2017, section 3.5)."""
    # dim / 2 frequencies from 1 down to 1 / 10,000, equally spaced in the logarithm.
    freqs = torch.exp(-math.log(10_000) / (dim // 2) * torch.arange(dim // 2, device=t.device, dtype=torch.float32))
    args = t.float()[:, None] * freqs[None]  # [B, dim/2]
    return torch.cat([args.cos(), args.sin()], dim=1)


class CategoryEmbedding(nn.Embedding):
    """Index of one of n categories, float32 [B] -> [B, dim]. NaN (unknown) has a row of its own, the last."""

    def __init__(self, n: int, dim: int):
        # N(0, 1), the default. It is sampled here because on the meta device nn.Embedding's own initialisation makes
        # torch import packages for 4 s.
        super().__init__(n + 1, dim, _weight=torch.randn(n + 1, dim))

    def forward(self, value: Tensor) -> Tensor:
        return super().forward(torch.where(value.isnan(), self.num_embeddings - 1, value).long())


class NumberEmbedding(nn.Module):
    """A number, usually in [-1, 1], float32 [B] -> [B, dim]. NaN (unknown) has a vector of its own.

    Fourier features (Tancik et al. 2020, arXiv:2006.10739) of a quarter to two cycles per unit, and an MLP: enough to
    tell seventy levels of a brain apart, and too few to single out a person by the year of birth.
    """

    FREQUENCIES = (0.25, 0.5, 1.0, 2.0)

    def __init__(self, dim: int, hidden: int = 64):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * len(self.FREQUENCIES) + 1, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )  # fmt: skip
        self.unknown = nn.Parameter(torch.zeros(dim))

    def forward(self, value: Tensor) -> Tensor:
        v = value.nan_to_num()[:, None]
        phases = [2 * math.pi * f * v for f in self.FREQUENCIES]
        features = torch.cat([v, *(p.sin() for p in phases), *(p.cos() for p in phases)], dim=1)  # [B, 9]
        return torch.where(value.isnan()[:, None], self.unknown, self.mlp(features))


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, around a skip: [B, cin, H, W] -> [B, cout, H, W].

    The embedding [B, emb_dim] enters by scale and shift (Dhariwal & Nichol 2021). `emb_dim` 0 is a block without one.
    """

    def __init__(self, cin: int, cout: int, emb_dim: int = 0, dropout: float = 0.0, norm_group: int = 1):
        super().__init__()
        self.norm1, self.conv1 = group_norm(cin, norm_group), nn.Conv2d(cin, cout, 3, padding=1)
        self.emb = nn.Linear(emb_dim, 2 * cout) if emb_dim else None
        self.norm2, self.conv2 = group_norm(cout, norm_group), zero_init(nn.Conv2d(cout, cout, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))  # [B, cout, H, W]
        # What depends on timestep and class acts on every channel as a whole.
        if self.emb is not None:
            scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)  # each [B, cout, 1, 1]
            h = torch.addcmul(shift, h, 1 + scale)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Multi-head self-attention over the H·W positions, around a skip: [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, norm_group: int = 1, head_dim: int = 64):
        super().__init__()
        # As many heads of about head_dim channels as divide the channels.
        self.heads = max(h for h in range(1, max(1, channels // head_dim) + 1) if channels % h == 0)
        self.norm, self.qkv = group_norm(channels, norm_group), nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        # [B, 3C, H, W] -> three of [B, heads, H*W, C/heads]
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(3, 4).unbind(1)
        return x + self.proj(attend(q, k, v).transpose(2, 3).reshape(b, c, h, w))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, each [B, heads, N, d]."""
    if q.device.type != "cpu" or q.shape[2] > 256:
        return F.scaled_dot_product_attention(q, k, v)
    # PyTorch's fused kernel for CPUs takes four times as long for a few positions in bfloat16 (docs/speed.md).
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(-1) @ v


class Upsample(nn.Module):
    """Double the resolution by nearest neighbour, then a convolution: [B, cin, H, W] -> [B, cout, 2H, 2W]."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Denoising U-Net on latents.

    x float [B, C, H, W] of unit variance, t int64 [B] in 0..999, y float32 [B, A] -> [B, C, H, W]. y holds a column
    for each of the `conditions` (conditions.py says of what kind); NaN is "unknown". An entry of `conditions` is the
    number of categories, or 0 for a number; without any, y is not looked at. `config` rebuilds the network.
    `patch` latent pixels along each side are folded into channels (space to depth); 2 makes it four times cheaper.
    ValueError on widths or resolutions that do not divide.
    """

    def __init__(
        self,
        in_channels: int,
        resolution: int,
        channels: Sequence[int] = (128, 256, 512),
        blocks: int = 2,
        attention: Sequence[int] = (16, 8),
        conditions: Sequence[int] = (),
        dropout: float = 0.0,
        norm_group: int = 1,
        patch: int = 1,
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            in_channels=in_channels, resolution=resolution, channels=list(channels), blocks=blocks,
            attention=list(attention), conditions=list(conditions), dropout=dropout, norm_group=norm_group, patch=patch,
        )  # fmt: skip
        if len(conditions) > MOST:
            raise ValueError(f"{len(conditions)} conditions are more than {MOST}")
        # What does not divide would fail inside the first forward pass, with a message about tensors.
        if channels[0] % 2:
            raise ValueError(f"the first width must be even, not {channels[0]}")
        if resolution % patch:
            raise ValueError(f"{resolution}x{resolution} cannot be cut into patches of {patch}")
        resolution //= patch
        if resolution % 2 ** (len(channels) - 1):
            raise ValueError(f"{resolution}x{resolution} cannot be halved {len(channels) - 1} times")
        self.patch = patch
        emb = 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], emb), nn.SiLU(), nn.Linear(emb, emb))
        self.conditions = nn.ModuleList(CategoryEmbedding(n, emb) if n else NumberEmbedding(emb) for n in conditions)

        def block(cin: int, cout: int, side: int) -> nn.ModuleList:
            attn = AttentionBlock(cout, norm_group) if side in attention else nn.Identity()
            return nn.ModuleList([ResidualBlock(cin, cout, emb, dropout, norm_group), attn])

        # Down: each level but the first halves the resolution; every output is kept as a skip for the way up.
        self.stem = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, width, side = [channels[0]], channels[0], resolution
        for level, c in enumerate(channels):
            if level:
                self.down.append(nn.Conv2d(width, c, 3, stride=2, padding=1))
                skips.append(c)
                width, side = c, side // 2
            for _ in range(blocks):
                self.down.append(block(width, c, side))
                skips.append(c)
                width = c
        # The lowest resolution, and up again: each block takes one skip.
        self.mid = nn.ModuleList([block(width, width, side), ResidualBlock(width, width, emb, dropout, norm_group)])
        for level, c in reversed(list(enumerate(channels))):
            for _ in range(blocks + 1):
                self.up.append(block(width + skips.pop(), c, side))
                width = c
            if level:
                self.up.append(Upsample(width, channels[level - 1]))
                width, side = channels[level - 1], side * 2
        self.norm = group_norm(width, norm_group)
        self.out = zero_init(nn.Conv2d(width, in_channels * patch**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        # One embedding of the timestep and all conditions, which all blocks get.
        emb = self.time(timestep_embedding(t, self.config["channels"][0]))  # [B, E]
        for i, condition in enumerate(self.conditions):
            assert y is not None
            emb = emb + condition(y[:, i])
        emb = F.silu(emb)
        h = self.stem(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)  # [B, c0, H/patch, W/patch]
        skips = [h]
        for layer in self.down:  # a ModuleList is (residual, attention); anything else halves the resolution
            h = layer[1](layer[0](h, emb)) if isinstance(layer, nn.ModuleList) else layer(h)
            skips.append(h)
        middle: Any = self.mid  # [[residual, attention], residual]
        h = middle[1](middle[0][1](middle[0][0](h, emb)), emb)  # [B, c_last, H/2^levels, W/2^levels]
        for layer in self.up:  # a ModuleList takes its skip; anything else doubles the resolution
            if isinstance(layer, nn.ModuleList):
                h = layer[1](layer[0](torch.cat([h, skips.pop()], dim=1), emb))
            else:
                h = layer(h)
        h = self.out(F.silu(self.norm(h)))  # [B, C patch^2, H/patch, W/patch]
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h  # [B, C, H, W]


# ---------------------------------------------------------------------------------------------------------------------
# Fast-DDPM


def make_grid(grid: str, num_steps: int, alphas_cumprod: np.ndarray) -> np.ndarray:
    """The subset of timesteps that is trained and sampled on: ascending int64 [S].

    logsnr: the timesteps nearest to equal steps in log-SNR, both ends included.
    flow: nearest to equal steps of s = sigma / (alpha + sigma), the time of rectified flow, from noise down to, but
    without, the clean image.
    fine: the same, with shorter steps near the clean image (Esser et al. 2024, eq. 23, with a shift of 1/2).
    nonuniform: as published for Fast-DDPM (arXiv 2405.14802, section 3.2).
    uniform: evenly spaced, both ends included.
    full: all timesteps, whatever num_steps says.
    student: what a distilled network takes: equal steps in log-SNR without the clean end, so one step is possible.
    ValueError on an unknown name or an impossible count.
    """
    # Grids that take any count
    last = len(alphas_cumprod) - 1
    if grid == "full":
        return np.arange(last + 1)
    if grid == "student":
        return make_grid("logsnr", num_steps + 1, alphas_cumprod)[1:]
    if not 2 <= num_steps <= last + 1:
        raise ValueError(f"a grid has 2 to {last + 1} steps, not {num_steps}")
    # Grids of 2 to 1000 timesteps
    if grid == "uniform":
        return np.rint(np.linspace(0, last, num_steps)).astype(np.int64)
    if grid == "nonuniform":
        # The paper's ten are given as they were published; other counts follow their pattern, 40 % below 699.
        if num_steps == 10 and last == 999:
            return np.array([0, 199, 399, 599, 699, 799, 849, 899, 949, 999])
        low, knee = max(1, round(0.4 * num_steps)), round(0.7 * last)
        ts = np.concatenate([np.linspace(0, knee, low + 1)[:-1], np.linspace(last, knee, num_steps - low)[::-1]])
        ts = np.rint(ts).astype(np.int64)
    elif grid == "logsnr":
        logsnr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)  # falls with t
        ts = np.abs(logsnr[None] - np.linspace(logsnr[0], logsnr[-1], num_steps)[:, None]).argmin(1)
    elif grid in ("flow", "fine"):
        s = 1 / (1 + np.sqrt(alphas_cumprod / (1 - alphas_cumprod)))  # grows with t
        wanted = np.linspace(0, s[-1], num_steps + 1)[1:, None]
        ts = np.abs(s[None] - (wanted if grid == "flow" else wanted / (2 - wanted))).argmin(1)
    else:
        raise ValueError(f"there is no grid '{grid}': take logsnr, flow, nonuniform, uniform or full")
    # Near t = 0 a step of log-SNR can be smaller than a timestep, and neighbours then round to the same one: move the
    # later one up, so that no timestep comes twice.
    for i in range(1, num_steps):
        ts[i] = max(ts[i], ts[i - 1] + 1)
    return np.minimum(ts, last - np.arange(num_steps)[::-1])


def randn(shape: Sequence[int], generators: Sequence[torch.Generator] | torch.Generator | None) -> Tensor:
    """Standard normal noise, float32 of this shape [B, ...].

    With one generator a row, row i comes from generators[i] alone and so does not depend on the batch.
    """
    if isinstance(generators, Sequence):
        return torch.stack([torch.randn(tuple(shape[1:]), generator=g) for g in generators])
    device = generators.device if generators is not None else None
    return torch.randn(tuple(shape), generator=generators, device=device)


class NoiseScheduler_Fast_DDPM(nn.Module):
    """The 1000-step linear-beta schedule, trained and sampled on the same few timesteps (Fast-DDPM, arXiv 2405.14802).

    `timesteps` int64 [S] ascending; `alphas_cumprod` float32 [T], and `abar`, the same in float64 NumPy. A previous
    timestep of -1 stands for the clean image (alpha_bar = 1). Latents are never clamped. `chance` float64 NumPy [S]:
    how often each timestep is drawn for training; `cumulative` float32 [S]: how often it or an earlier one is. `rarity`
    float32 [T]: by what losses are multiplied because of `draw_by`, 1 without it.
    """

    alphas_cumprod: Tensor
    timesteps: Tensor
    cumulative: Tensor
    rarity: Tensor

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        num_steps: int = 10,
        grid: str = "logsnr",
    ):
        super().__init__()
        self.config: dict[str, Any] = {
            "num_train_timesteps": num_train_timesteps, "beta_start": beta_start, "beta_end": beta_end,
            "num_steps": num_steps, "grid": grid,
        }  # fmt: skip
        # In float64: a product of a thousand factors, whose last value, 4e-5, decides how noisy the start is.
        self.abar = np.cumprod(1 - np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float64))
        if not 1e-8 < self.abar[-1] < self.abar[0] < 1:
            raise ValueError(f"noise from {beta_start:g} to {beta_end:g} leaves nothing of an image, or all of it")
        self.register_buffer("alphas_cumprod", torch.tensor(self.abar, dtype=torch.float32), persistent=False)
        own = make_grid(grid, num_steps, self.abar)
        self.register_buffer("timesteps", torch.tensor(own), persistent=False)
        self.register_buffer("cumulative", torch.zeros(len(own)), persistent=False)
        self.register_buffer("rarity", torch.ones(num_train_timesteps), persistent=False)
        self._draw(np.full(len(own), 1 / len(own)))
        # A list, because reading the buffer would wait for a GPU.
        self.fast_timesteps: list[int] = (make_grid("logsnr", 10, self.abar) if grid == "full" else own).tolist()

    @property
    def default_solver(self) -> str:
        """The solver that sampling uses by default. A student learnt to take steps of DDIM, and no others."""
        return "ddim" if self.config["grid"] == "student" else "dpm++2m"

    def alpha_sigma(self, t: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) at t [B], each float32 [B, 1, ...]."""
        abar = self.alphas_cumprod[t].view(-1, *[1] * (ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def concentrate(self, mean: float, sd: float) -> None:
        """Draw timesteps for training where log-SNR is about `mean`, normally distributed with deviation `sd`.

        As EDM draws noise levels (Karras et al. 2022, section 5); 0 and 2 are the logit-normal times of rectified flow
        (Esser et al. 2024, section 3.1). ValueError if that is far from all timesteps.
        """
        abar = self.abar[self.timesteps.cpu()]
        logsnr = np.log(abar) - np.log1p(-abar)
        # A timestep stands for the stretch of log-SNR around it, so grids with gaps and dense ones draw alike.
        density = np.exp(-0.5 * ((logsnr - mean) / max(sd, 1e-9)) ** 2) * -np.gradient(logsnr)
        if not density.sum() > 0:
            raise ValueError(f"no timestep has a log-SNR near {mean:g}, give or take {sd:g}")
        # One draw in ten stays uniform, because sampling visits each timestep of a grid of ten.
        self._draw(0.9 * density / density.sum() + 0.1 / len(density))

    def draw_by(self, weight: Tensor) -> None:
        """Draw timesteps for training in proportion to the weights of their losses, float32 [S].

        Losses times `rarity` have the same mean as before. Only their variance falls: where the weight is small, a
        timestep teaches hardly anything, and now it is drawn rarely. This is importance sampling; Nichol & Dhariwal
        2021 (section 3.3) draw in proportion to measured losses. One draw in ten stays as it was.
        """
        before, w = self.chance, weight.double().cpu().numpy()
        self._draw(before * (0.9 * w / (before * w).sum() + 0.1))
        self.rarity[self.timesteps] = torch.tensor(before / self.chance).to(self.rarity)

    def _draw(self, chance: np.ndarray) -> None:
        self.chance = chance
        self.cumulative.copy_(torch.tensor(chance.cumsum()))

    def sample_timesteps(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Random timesteps of the grid, int64 [B], in antithetic pairs (Fast-DDPM): place u comes with place 1 - u."""
        # Pairs of a clean and a noisy timestep make the mean loss of a batch vary less.
        device = self.timesteps.device
        draw_on = generator.device if generator is not None else device
        u = torch.rand((batch + 1) // 2, generator=generator, device=draw_on).to(device)
        i = torch.searchsorted(self.cumulative, torch.cat([u, 1 - u])[:batch], right=True)
        return self.timesteps[i.clamp(max=len(self.timesteps) - 1)]

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise (Ho et al. 2020, eq. 4), float32."""
        alpha, sigma = self.alpha_sigma(t, x0.ndim)
        return alpha * x0.float() + sigma * noise.float()

    def step(
        self,
        eps: Tensor,
        t: int,
        t_prev: int,
        x: Tensor,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """One DDIM update of x [B, C, H, W] from t to t_prev (Song et al. 2021, eq. 12).

        eta 0 is deterministic, 1 is ancestral DDPM; eta > 0 adds `noise`, standard normal and shaped as x.
        """
        # The estimate of the clean image, then a step back to the noise level of t_prev, with the same noise or new.
        abar_t, abar_p = self.abar[t], self.abar[t_prev] if t_prev >= 0 else 1.0
        x0 = (x - math.sqrt(1 - abar_t) * eps) / math.sqrt(abar_t)
        noise_sd = eta * math.sqrt((1 - abar_p) / (1 - abar_t) * (1 - abar_t / abar_p))  # eq. 16
        x_prev = math.sqrt(abar_p) * x0 + math.sqrt(max(0.0, 1 - abar_p - noise_sd**2)) * eps
        return x_prev if noise is None else x_prev + noise_sd * noise


Denoiser = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@torch.no_grad()
def sample_steps(
    denoise: Denoiser,
    x: Tensor,
    scheduler: NoiseScheduler_Fast_DDPM,
    timesteps: Sequence[int] | None = None,
    solver: str | None = None,
    eta: float = 0.0,
    noise: Iterator[Tensor] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """From noise x_T ~ N(0, 1) [B, C, H, W] down the grid to the clean image, one network call a step.

    After every step it yields (t, x_t, x0): the timestep that was reached, -1 at the end, the latents there, and the
    estimate of the clean latents that led there. `denoise(x_t, t)` returns the estimates (eps, x0). `timesteps` and
    `solver` default to the scheduler's own. Solver "ddim" is `scheduler.step`; with eta 0 that is also Euler's step of
    rectified flow. "dpm++2m" is DPM-Solver++(2M), and with eta 1 SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv
    2211.01095, algorithm 2 and section 4.3). "heun" is Heun's method for rectified flow, at two network calls a step
    but the last; it has no eta. Every step of eta > 0 but the last takes the next tensor of `noise`, as `start_noise`
    makes them. ValueError on another solver, or where eta has no noise.
    """
    if eta and noise is None:
        raise ValueError("eta above 0 adds noise, and there is none")
    solver = solver or scheduler.default_solver
    ts = [int(t) for t in (scheduler.fast_timesteps if timesteps is None else timesteps)][::-1]  # descending
    abar = scheduler.abar
    # dpm++2m extrapolates from the two latest estimates of the clean image.
    x0_last: Tensor | None = None
    h_last = 0.0
    for t, t_prev in zip(ts, [*ts[1:], -1]):
        eps, x0 = denoise(x, t)
        new = next(noise).to(x) if eta and noise is not None and t_prev >= 0 else None
        if solver == "ddim":
            x = scheduler.step(eps, t, t_prev, x, eta, new)
        elif solver == "heun":
            # Rectified flow (Liu et al. 2023) runs from x0 at s = 0 to eps at s = 1 on a straight line with the slope
            # eps - x0. Divided by alpha + sigma, x_t is the point of that line at s = sigma / (alpha + sigma).
            (size, s), (size_prev, s_prev) = (
                (math.sqrt(a) + math.sqrt(1 - a), math.sqrt(1 - a) / (math.sqrt(a) + math.sqrt(1 - a)))
                for a in (abar[t], abar[t_prev] if t_prev >= 0 else 1.0)
            )
            slope, start = eps - x0, x / size
            x = size_prev * (start + (s_prev - s) * slope)
            if t_prev >= 0:
                eps, x0 = denoise(x, t_prev)
                x = size_prev * (start + (s_prev - s) * (slope + eps - x0) / 2)
        elif solver != "dpm++2m":
            raise ValueError(f"there is no solver '{solver}': take dpm++2m, ddim or heun")
        elif t_prev < 0:
            x = x0  # the last step has no finite log-SNR to extrapolate to
        else:
            # h is the step in lambda = log(alpha / sigma)
            h = 0.5 * (math.log(abar[t_prev] / (1 - abar[t_prev])) - math.log(abar[t] / (1 - abar[t])))
            ratio = 0.0 if x0_last is None else h / (2 * h_last)
            d = x0 if x0_last is None else (1 + ratio) * x0 - ratio * x0_last
            # With eta > 0 the step takes away more noise than it has to, and puts as much new noise back.
            kept = math.sqrt((1 - abar[t_prev]) / (1 - abar[t])) * math.exp(-eta * h)
            x = kept * x - math.sqrt(abar[t_prev]) * math.expm1(-(1 + eta) * h) * d
            if new is not None:
                x = x + math.sqrt((abar[t_prev] - 1) * math.expm1(-2 * eta * h)) * new
            x0_last, h_last = x0, h
        yield t_prev, x, x0


def sample(
    denoise: Denoiser,
    x: Tensor,
    scheduler: NoiseScheduler_Fast_DDPM,
    timesteps: Sequence[int] | None = None,
    **how: Any,
) -> Tensor:
    """The clean latents [B, C, H, W] at the end of `sample_steps`, which takes the same arguments."""
    for _, x_t, _ in sample_steps(denoise, x, scheduler, timesteps, **how):  # noqa: B007 - the last one is what is wanted
        pass
    return x_t


@torch.no_grad()
def invert(
    denoise: Denoiser, z: Tensor, scheduler: NoiseScheduler_Fast_DDPM, timesteps: Sequence[int],
    tolerance: float = 1e-3, most: int = 30,
) -> tuple[Tensor, int]:  # fmt: skip
    """(x_T, network calls): the noise from which DDIM with eta 0 comes to the clean latents z [B, C, h, w].

    A step of DDIM is x_prev = a x + b eps(x, t). From the clean end upwards each is undone by iterating
    x <- (x_prev - b eps(x, t)) / a until no latent moves by more than `tolerance`, or `most` times (Pan et al. 2023,
    arXiv 2309.04907). That converges where steps are short: it shrinks errors by about 1 - exp(-h) for a step of h in
    log(alpha / sigma).
    """
    x, calls = z, 0
    for t, t_prev in zip(timesteps, [-1, *timesteps]):
        abar_t, abar_p = scheduler.abar[t], scheduler.abar[t_prev] if t_prev >= 0 else 1.0
        a = math.sqrt(abar_p / abar_t)
        b = math.sqrt(1 - abar_p) - a * math.sqrt(1 - abar_t)
        target = x
        for _ in range(most):
            before, x = x, (target - b * denoise(x, t)[0]) / a
            calls += 1
            if (x - before).abs().max() < tolerance:
                break
    return x, calls


def start_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> tuple[Tensor, Iterator[Tensor]]:
    """Noise x_T [B, *shape] of images number `indices` of `seed`, on the CPU, and more of it, for the steps of eta > 0.

    Image k depends on (seed, k) alone, whatever the batch.
    """
    generators, shape = [generator(seed, k) for k in indices], (len(indices), *shape)
    return randn(shape, generators), (randn(shape, generators) for _ in count())


def output_map(prediction: str, alpha: Any, sigma: Any) -> tuple[Any, Any, Any, Any]:
    """(a, b, c, d) with x0 = a x_t + b out and eps = c x_t + d out; alpha and sigma are numbers or tensors.

    What the network's output stands for: "v" = alpha eps - sigma x0 (Salimans & Ho 2022, eq. 11), "eps", or "flow" =
    eps - x0, the velocity of rectified flow (Liu et al. 2023, eq. 1). ValueError on another name.
    """
    if prediction == "v":
        return alpha, -sigma, sigma, alpha
    if prediction == "eps":
        return 1 / alpha, -sigma / alpha, 0.0, 1.0
    if prediction == "flow":
        size = alpha + sigma
        return 1 / size, -sigma / size, 1 / size, alpha / size
    raise ValueError(f"prediction is v, eps or flow, not '{prediction}'")


class StableDiffusion(nn.Module):
    """U-Net and noise schedule: the training loss and the denoiser. Only the network runs in `amp_dtype`, the rest is
    float32.

    `attributes` say what the U-Net's conditions mean: one for each of them, or none where nobody has to know.
    """

    def __init__(
        self, unet: UNet, scheduler: NoiseScheduler_Fast_DDPM, prediction: str = "v", loss_weight: str = "uniform",
        attributes: Sequence[Attribute] = (),
    ):  # fmt: skip
        super().__init__()
        output_map(prediction, 1.0, 0.0)  # ValueError on a name that is not known
        self.unet, self.scheduler, self.prediction, self.loss_weight = unet, scheduler, prediction, loss_weight
        self.attributes = list(attributes)
        self.amp_dtype: torch.dtype | None = None

    @property
    def conditional(self) -> bool:
        """Does the network know any condition? Only then there is something to be guided to."""
        return bool(self.unet.config["conditions"])

    def network(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The raw output of the U-Net, float32."""
        with autocast(x, self.amp_dtype):
            return self.unet(x.contiguous(memory_format=torch.channels_last), t, y).float()

    def forward(self, z: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the squared error of the prediction, averaged per image, float32 [B], and the estimate of z.

        z are clean latents, t int64 [B], noise like z, y as the U-Net takes it.
        """
        # Noisy latents, the prediction, and what it should have been; then the clean latents that it implies.
        alpha, sigma = self.scheduler.alpha_sigma(t)
        x_t = self.scheduler.add_noise(z, noise, t)
        out = self.network(x_t, t, y)
        targets = {"v": lambda: alpha * noise - sigma * z, "eps": lambda: noise, "flow": lambda: noise - z}
        a, b, _, _ = output_map(self.prediction, alpha, sigma)
        return (out - targets[self.prediction]()).square().mean(dim=(1, 2, 3)), (a * x_t + b * out).detach()

    def weight(self, t: Tensor) -> Tensor:
        """Weight of the loss at t, float32 [B]: 1, or Min-SNR with gamma 5 (Hang et al. 2023, section 3.4); times the
        scheduler's `rarity`."""
        if self.loss_weight == "uniform":
            return self.scheduler.rarity[t]
        # min(SNR, 5) times the squared error of x0, as a weight of the squared error of the output.
        alpha, sigma = self.scheduler.alpha_sigma(t, ndim=1)
        _, b, _, _ = output_map(self.prediction, alpha, sigma)
        return (alpha / sigma).square().clamp(max=5) * b**2 * self.scheduler.rarity[t]

    def denoiser(self, y: Tensor | None = None, guidance: float = 1.0, away_from: Tensor | None = None) -> Denoiser:
        """Return denoise(x_t, t) -> (eps, x0), float32, for `sample`; y float32 [B, A], None where nothing is known.

        Guidance w (Ho & Salimans 2022): out = out_unknown + w (out_y - out_unknown), both in one batch; w = 1 needs y
        alone. Conditions `away_from` [B, A] take the place of "unknown": w from 0 to 1 then leads from them to y.
        """
        count = len(self.unet.config["conditions"])

        def denoise(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
            unknown = torch.full((len(x), count), math.nan, device=x.device)
            ts = torch.full((len(x),), t, device=x.device)
            # The network's output, guided or not, and from it the estimates of noise and clean latents.
            if y is not None and count and guidance != 1.0:
                other = unknown if away_from is None else away_from
                both = self.network(x.repeat(2, 1, 1, 1), ts.repeat(2), torch.cat([y, other]))
                with_y, without = both.chunk(2)
                out = without + guidance * (with_y - without)
            else:
                out = self.network(x, ts, unknown if y is None else y)
            alpha, sigma = math.sqrt(self.scheduler.abar[t]), math.sqrt(1 - self.scheduler.abar[t])
            a, b, c, d = output_map(self.prediction, alpha, sigma)
            return c * x + d * out, a * x + b * out

        return denoise

    def generate(
        self,
        shape: Sequence[int],
        seed: int,
        indices: Sequence[int],
        y: Tensor | None = None,
        guidance: float = 1.0,
        **how: Any,
    ) -> Tensor:
        """Latents [B, *shape] number `indices` of `seed`, as `start_noise` counts them. `how` goes to `sample`."""
        device = self.scheduler.timesteps.device
        x, noise = start_noise(seed, indices, shape)
        y = None if y is None else y.to(device)
        return sample(self.denoiser(y, guidance), x.to(device), self.scheduler, noise=noise, **how)


def load_diffusion(path: Path, device: torch.device) -> tuple[StableDiffusion, dict]:
    """The diffusion model of a .safetensors file, ready to sample from, and what the header says.

    UserError on a file that is damaged, of another kind, or describes a network that this version cannot build.
    """
    tensors, meta = load_weights(path, "diffusion")
    net = meta.get("model")
    if isinstance(net, dict) and "num_classes" in net:  # of before there were other conditions than the class
        classes = net.pop("num_classes")
        net["conditions"] = [classes] if classes else []
        tensors = {name.replace("unet.label.", "unet.conditions.0."): v for name, v in tensors.items()}
    try:
        scheduler = NoiseScheduler_Fast_DDPM(**check_arguments(NoiseScheduler_Fast_DDPM, meta.get("scheduler")))
        # On the meta device: weights are put in below, and a header that asks for a huge network costs nothing.
        unet = build_network(UNet, meta.get("model"), tensors)
        if not meta.get("classes"):
            raise ValueError("its classes have no names")
        attributes = from_header(meta, unet.config["conditions"])
        model = StableDiffusion(unet, scheduler, str(meta.get("prediction")), attributes=attributes)
    except ValueError as e:
        raise UserError(f"{path} describes a U-Net that this version cannot build: {str(e)[:200]}") from None
    load_into(model, tensors, path)
    return model.to(memory_format=torch.channels_last).to(device).eval().requires_grad_(False), meta


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


class CosineAnnealingWarmupScheduler(LRScheduler):
    """Call once a step: linear from base/warmup to base over `warmup_steps`, then half a cosine to min_lr at the end.

    After `load_state_dict` the schedule keeps the length that it was made with: a run may be continued with another
    number of epochs.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, total_steps: int, min_lr: float = 0.0):
        self.warmup_steps, self.total_steps, self.min_lr = warmup_steps, total_steps, min_lr
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        if self.last_epoch < self.warmup_steps:
            return [base * (self.last_epoch + 1) / self.warmup_steps for base in self.base_lrs]
        done = min(1.0, (self.last_epoch - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return [self.min_lr + (base - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done)) for base in self.base_lrs]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "warmup_steps": self.warmup_steps, "total_steps": self.total_steps})


class Lookahead(Optimizer):
    """After every k steps of the inner optimiser, move slow weights a share alpha of the way and restart from there.

    Zhang et al. 2019, arXiv 1907.08610, algorithm 1.
    """

    def __init__(self, inner: Optimizer, k: int = 5, alpha: float = 0.5):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.k, self.alpha, self.count = inner, k, alpha, 0  # count: steps so far
        self.param_groups = inner.param_groups  # the same list: the LR schedule writes it, the inner optimiser reads it
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            torch._foreach_lerp_(self.slow, fast, self.alpha)
            torch._foreach_copy_(fast, self.slow)
        return loss

    def state_dict(self) -> dict:
        return {"inner": self.inner.state_dict(), "slow": self.slow, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.inner.load_state_dict(state["inner"])
        self.param_groups = self.inner.param_groups  # loading made a new list
        torch._foreach_copy_(self.slow, state["slow"])
        self.count = state["count"]
