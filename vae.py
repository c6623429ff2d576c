"""The VAE, its losses, and the latent contract: the diffusion sees latents of mean 0 and deviation 1 in each channel.

The blocks that both networks are made of are in modules.py; the training is in pre_train.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device import autocast
from metrics import ms_ssim, ssim
from modules import (
    AttentionBlock,
    NoiseScheduler_Fast_DDPM,
    ResidualBlock,
    StableDiffusion,
    UNet,
    Upsample,
    group_norm,
    sample,
)
from utils import UserError, generator
from weights import build_network, load_into, load_weights

LOGVAR_RANGE = (-30.0, 20.0)  # exp(20 / 2) is still finite in float16


# Two classes, because torch.compile counts how often it compiled one function: with nn.Sequential for both, a training
# with a discriminator and uneven micro-batches would reach its limit and go on uncompiled.
class Encoder(nn.Sequential):
    """Images -> mean and log-variance, side by side in the channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Decoder(nn.Sequential):
    """Latents before normalisation -> images [B, 1, S, S]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


BANDS = (1, 3, 9)  # pixels between the three rows and columns of each mean in `bands`


def bands(x: Tensor) -> Tensor:
    """What each smoothing of images [B, 1, S, S] takes away, [B, bands, S, S]: by means of 3 x 3 pixels, 1 apart, then
    of these 3 apart, and 9 (an a trous wavelet transform)."""
    parts = []
    for apart in BANDS:
        kernel = torch.full((1, 1, 3, 3), 1 / 9, device=x.device)
        smooth = F.conv2d(F.pad(x, [apart] * 4, mode="replicate"), kernel, dilation=apart)
        parts.append(x - smooth)
        x = smooth
    return torch.cat(parts, dim=1)


def background(x: Tensor) -> Tensor:
    """Where images [B, 1, S, S] in [-1, 1] are about black: under 12 of 255 grey levels in the mean of 5 x 5 pixels.

    Decoded latents are up to that bright where slices of prepared brains hold 0.
    """
    return F.avg_pool2d(x, 5, 1, 2, count_include_pad=False) < 2 * 12 / 255 - 1


class Texture(StableDiffusion):
    """Draws anew what is small in an image: a Fast-DDPM in pixels, at full resolution, for little noise only.

    Images are float [B, 1, S, S] in [-1, 1]. A decoder trained by L1 and SSIM answers with the mean of all images that
    a latent may stand for, which is smooth, and where a latent of the U-Net is a little wrong, folds are rough. Noise
    of deviation `noise` hides both; taking it away again in `num_steps` steps, as the network learnt on real slices,
    draws what slices show at that size (Meng et al. 2022, arXiv:2108.01073, section 3; SDXL's refiner does the same to
    latents, Podell et al. 2023, section 2.5). Larger structures stay. The VAE has no part in the training.
    `black` says that there is nothing around the brain; the background is then made black. The grid is "student" for a
    texture that was distilled.
    ValueError on sizes that do not divide.
    """

    def __init__(
        self, image_size: int = 256, channels: Sequence[int] = (32, 64, 96, 128), blocks: int = 1, patch: int = 2,
        num_steps: int = 10, noise: float = 1.0, black: bool = True, grid: str = "logsnr",
    ):  # fmt: skip
        unet = UNet(1 + len(BANDS), image_size, channels, blocks, (), norm_group=8, patch=patch)
        # A linear schedule that ends at sigma / alpha = noise: its betas add up to -log(alpha_bar) = log(1 + noise^2).
        beta_end = 2 * math.log1p(noise**2) / 1000 - 1e-4
        scheduler = NoiseScheduler_Fast_DDPM(beta_end=beta_end, num_steps=num_steps, grid=grid)
        # With v, an answer of 0 hands x_t on, which under little noise is nearly right; flow's would have to repeat it.
        super().__init__(unet, scheduler, "v")
        self.config: dict[str, Any] = dict(
            image_size=image_size, channels=list(channels), blocks=blocks, patch=patch, num_steps=num_steps,
            noise=noise, black=black, grid=grid,
        )  # fmt: skip

    def network(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """v for noisy slices x [B, 1, S, S]: an image, and the bands of x, each times an image of gains.

        Where a slice is flat, what is to be taken away is x itself, pixel by pixel. To copy that through its channels a
        U-Net has to learn for long; to say how much of each band is noise, it has not.
        """
        noise = bands(x / self.scheduler.alpha_sigma(t)[1]).clamp(-4, 4)
        v, gains = super().network(torch.cat([x, noise], dim=1), t, None).split([1, len(BANDS)], dim=1)
        return v + (gains * noise).sum(1, keepdim=True)

    def cover(self, image: Tensor, noise: Tensor) -> Tensor:
        """Images under white noise, both [B, 1, S, S]: where `draw` begins."""
        last = torch.full((len(image),), self.scheduler.fast_timesteps[-1], device=image.device)
        return self.scheduler.add_noise(image, noise, last)

    def draw(self, image: Tensor, noise: Tensor) -> Tensor:
        """Images and white noise, both [B, 1, S, S] -> the images that they become, in [-1, 1]."""
        drawn = sample(self.denoiser(), self.cover(image, noise), self.scheduler).clamp(-1, 1)
        return drawn.masked_fill(background(image), -1) if self.config["black"] else drawn


class VAE(nn.Module):
    """Convolutional variational autoencoder (Kingma & Welling 2014; layout after Rombach et al. 2022).

    Images are float [B, 1, S, S] in [-1, 1]; latents [B, C, S/downsample, S/downsample]. `encode` returns and `decode`
    takes normalised latents, (latent_rotation @ posterior sample - latent_mean) / latent_std, so that nobody scales
    latents by hand. The rotation turns the channels to their principal axes. Without it channels are correlated (0.8
    is usual), and the errors of the diffusion, which are equally large in all channels, would be larger than the small
    differences between such channels. Downsampling that the levels do not do is done by a space-to-depth stem, and
    undone at the end of the decoder. `texture` may be set to what draws fine detail on decoded images; it is no part of
    the VAE's weights. ValueError on sizes that do not divide.
    """

    latent_rotation: Tensor
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        image_size: int = 256,
        downsample: int = 8,
        latent_channels: int = 8,
        channels: Sequence[int] = (64, 128, 256),
        blocks: int = 2,
        attention: bool = True,
    ):
        super().__init__()
        self.config: dict[str, Any] = dict(
            image_size=image_size, downsample=downsample, latent_channels=latent_channels, channels=list(channels),
            blocks=blocks, attention=attention,
        )  # fmt: skip
        # What the levels do not halve, the stem does, by folding patch x patch pixels into channels.
        patch, rest = divmod(downsample, 2 ** (len(channels) - 1))
        if rest or patch < 1 or downsample & (downsample - 1):
            raise ValueError(f"{len(channels)} levels cannot give a downsampling of {downsample}")
        if image_size % downsample:
            raise ValueError(f"an image of {image_size} pixels cannot be divided by {downsample}")
        self.amp_dtype: torch.dtype | None = None
        self.texture: Texture | None = None
        # Of the latents of the training set; set once, at the end of pre-training. Until then they do nothing.
        self.register_buffer("latent_rotation", torch.eye(latent_channels))
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

        # Encoder: stem, levels, and the middle that ends in mean and log-variance.
        down: list[nn.Module] = [nn.PixelUnshuffle(patch), nn.Conv2d(patch**2, channels[0], 3, padding=1)]
        width = channels[0]
        for level, c in enumerate(channels):
            if level:
                down.append(nn.Conv2d(width, c, 3, stride=2, padding=1))
                width = c
            for _ in range(blocks):
                down.append(ResidualBlock(width, c))
                width = c
        middle: list[nn.Module] = [AttentionBlock(width)] if attention else []
        down += [*middle, ResidualBlock(width, width), group_norm(width), nn.SiLU()]
        last = nn.Conv2d(width, 2 * latent_channels, 3, padding=1)
        self.encoder = Encoder(*down, last)
        # Start with a posterior of deviation e^-2. At 1 there would be more noise than signal, and the first epochs
        # would learn little.
        assert last.bias is not None
        nn.init.constant_(last.bias[latent_channels:], -4.0)

        # Decoder: the same upside down.
        middle = [AttentionBlock(width)] if attention else []
        up: list[nn.Module] = [nn.Conv2d(latent_channels, width, 3, padding=1), ResidualBlock(width, width), *middle]
        for level, c in reversed(list(enumerate(channels))):
            for _ in range(blocks):
                up.append(ResidualBlock(width, c))
                width = c
            if level:
                up.append(Upsample(width, channels[level - 1]))
                width = channels[level - 1]
        up += [group_norm(width), nn.SiLU(), nn.Conv2d(width, patch**2, 3, padding=1), nn.PixelShuffle(patch)]
        self.decoder = Decoder(*up)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z|x), before normalisation: each float32 [B, C, h, w]."""
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(x, self.amp_dtype):
            mean, logvar = self.encoder(x).float().chunk(2, dim=1)  # one half of the channels each
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def reconstruct(self, z: Tensor) -> Tensor:
        """Latents before normalisation -> images, float32 [B, 1, S, S], not clamped to [-1, 1]."""
        z = z.contiguous(memory_format=torch.channels_last)
        with autocast(z, self.amp_dtype):
            return self.decoder(z).float()

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 1, S, S] and standard normal noise [B, C, h, w] -> (`reconstruct`, mean, log-variance)."""
        mean, logvar = self.posterior(x)
        return self.reconstruct(mean + (0.5 * logvar).exp() * noise), mean, logvar

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> (mean, std) of the normalised latents: mean + std * noise is a sample of the posterior.

        The rotation correlates the channels of the posterior; that is left out, because the posterior is narrow.
        """
        mean, logvar = self.posterior(x)
        m, s = self.latent_mean[:, None, None], self.latent_std[:, None, None]
        variance = rotate(self.latent_rotation.square(), logvar.exp())
        return (rotate(self.latent_rotation, mean) - m) / s, variance.sqrt() / s

    def decode(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """Normalised latents -> images in [-1, 1]: the mean, or with `texture_noise` what the texture makes of it."""
        # The inverse of `encode`; the rotation is orthogonal, so its inverse is its transpose.
        z = z * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        image = self.reconstruct(rotate(self.latent_rotation.T, z)).clamp(-1, 1)
        return image if self.texture is None or noise is None else self.texture.draw(image, noise)

    def texture_noise(self, seed: int, indices: Sequence[int]) -> Tensor | None:
        """What draws the texture of images number `indices` of `seed`: standard normal [B, 1, S, S], on this device.

        None without a texture. Image k depends on (seed, k) alone.
        """
        if self.texture is None:
            return None
        shape = (1, self.config["image_size"], self.config["image_size"])
        noise = torch.stack([torch.randn(shape, generator=generator(seed, 18, k)) for k in indices])
        device = self.latent_mean.device
        return noise.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else noise.to(device)

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """Images of any size in [0, 1], [B, 1, H, W] -> normalised posterior means, float32 [B, C*h*w] on the CPU."""
        side = self.config["image_size"]
        x = x.to(self.latent_mean.device)
        if x.shape[-1] != side:
            x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        return self.encode(2 * x - 1)[0].flatten(1).cpu()

    def latent_hash(self) -> str:
        """12 hex digits of the encoder's weights, to which a diffusion belongs. The decoder may be trained further."""
        return hash_of(self.encoder)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent."""
        side = self.config["image_size"] // self.config["downsample"]
        return self.config["latent_channels"], side, side

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Tensor], add: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """Set rotation, mean and deviation to those of posterior samples of these images [B, 1, S, S], in closed form.

        `add` sums a tensor over the ranks, each of which has its own batches.
        """
        # Sums of all first and second moments at once, by a constant 1 as one more channel.
        c = self.config["latent_channels"]
        sums = torch.zeros(c + 1, c + 1, dtype=torch.float64)  # of (z, 1) (z, 1)^T
        for x in batches:
            # Each [C, B h w]; on the CPU, because MPS has no float64.
            mean, logvar = (v.cpu().double().transpose(0, 1).flatten(1) for v in self.posterior(x))
            z = torch.cat([mean, torch.ones_like(mean[:1])])  # [C + 1, B h w]
            sums += z @ z.T
            sums.diagonal()[:c] += logvar.exp().sum(1)  # E[z^2] = mean^2 + variance
        # Mean and covariance, and the principal axes of the covariance.
        sums = add(sums)
        mean = sums[:c, c] / sums[c, c]
        variance, axes = torch.linalg.eigh(sums[:c, :c] / sums[c, c] - mean[:, None] * mean)
        axes = axes.flip(1).T  # rows are principal axes, the widest first
        axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # their signs are arbitrary: fix them
        self.latent_rotation.copy_(axes)
        self.latent_mean.copy_(axes @ mean)
        self.latent_std.copy_(variance.flip(0).clamp(min=0).sqrt())


def hash_of(*modules: nn.Module) -> str:
    """12 hex digits of the SHA-256 of all weights."""
    digest = hashlib.sha256()
    for module in modules:
        for _, v in sorted(module.state_dict().items()):
            digest.update(v.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:12]


def rotate(matrix: Tensor, z: Tensor) -> Tensor:
    """Multiply the channels of z [B, C, h, w] by a matrix [C, C]."""
    return torch.einsum("dc,bchw->bdhw", matrix, z)


class PatchDiscriminator(nn.Module):
    """Scores how real patches look: images [B, 1, S, S] in [-1, 1] -> [B, 1, S/8, S/8], each from 40 x 40 pixels.

    After Isola et al. 2017, with GroupNorm instead of BatchNorm, so that an image's scores don't depend on its batch.
    It also sees the image less its mean over 3 x 3 pixels, times 8: what a VAE gets wrong is a few grey levels of fine
    detail, and a discriminator that sees grey values alone learns nothing for thousands of images (docs/results.md).
    """

    def __init__(self, channels: Sequence[int] = (32, 64, 128)):
        super().__init__()
        layers: list[nn.Module] = []
        # Three times half the resolution
        for cin, cout in zip((2, *channels), channels):
            layers += [nn.Conv2d(cin, cout, 4, stride=2, padding=1), group_norm(cout, 8), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 3, padding=1))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, 0.2)
        self.amp_dtype: torch.dtype | None = None

    def forward(self, x: Tensor) -> Tensor:
        detail = 8 * (x - F.avg_pool2d(F.pad(x, [1] * 4, mode="replicate"), 3, stride=1))
        with autocast(x, self.amp_dtype):
            return self.net(torch.cat([x, detail], dim=1).contiguous(memory_format=torch.channels_last)).float()


def hinge_loss(of_real: Tensor, of_fake: Tensor) -> Tensor:
    """The discriminator's loss (Lim & Ye 2017), a scalar: 1 if it cannot tell, 0 if all scores are clearly right."""
    return 0.5 * (F.relu(1 - of_real).mean() + F.relu(1 + of_fake).mean())


def adversarial_gradient(
    discriminator: Callable[[Tensor], Tensor], x_hat: Tensor, gradient: Tensor, weight: float | Tensor
) -> Tensor:
    """The gradient at x_hat [B, 1, S, S] that makes the discriminator score it as more real.

    For each image it is scaled to `weight`, a number or [B, 1, 1, 1], times the norm of `gradient`, the reconstruction
    loss's gradient there (Défossez et al. 2022, section 3.4, here per image). So the two keep their balance however
    well the discriminator does.
    """
    # The discriminator's own gradient at the images, and the norms of both gradients per image.
    x = x_hat.detach().requires_grad_()
    (g,) = torch.autograd.grad(-discriminator(x).sum(), x)  # a mean would be too small a gradient for float16
    norm, own = (v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (gradient, g))
    return weight * norm / own.clamp(min=1e-20) * g


def focal_frequency(x_hat: Tensor, x: Tensor) -> Tensor:
    """Squared error of the spectra, each frequency weighted by its error (Jiang et al. 2021, eq. 4-6): a scalar."""
    distance = (torch.fft.fft2(x_hat.float(), norm="ortho") - torch.fft.fft2(x.float(), norm="ortho")).abs()
    # The weight is no variable of the loss: only the distance is pulled down.
    weight = distance.detach()
    weight = weight / weight.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    return (weight * distance.square()).mean()


def reconstruction_loss(x_hat: Tensor, x: Tensor, kind: str) -> Tensor:
    """Mean over the pixels of images [B, 1, S, S] in [-1, 1], a scalar. Where x is black, x_hat may be darker.

    "mse"; "l1"; "l1_ssim" = L1 + 0.5 (1 - SSIM); "l1_ms_ssim", the same at several scales; "l1_ssim_frequency" =
    l1_ssim + focal frequency loss.
    """
    # `decode` clamps, so darker than black is as good as black. Background is half of a slice, and would otherwise be
    # half of the gradient.
    x_hat = torch.where((x_hat < x) & (x <= -1), x, x_hat)
    if kind == "mse":
        return F.mse_loss(x_hat, x)
    loss = F.l1_loss(x_hat, x)
    if kind != "l1":
        similarity = ms_ssim if kind == "l1_ms_ssim" else ssim
        loss = loss + 0.5 * (1 - similarity((x_hat + 1) / 2, (x + 1) / 2, border=False).mean())
    return loss + focal_frequency(x_hat, x) if kind == "l1_ssim_frequency" else loss


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(q(z|x) || N(0, 1)), summed over the latent: float32 [B] (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


def vae_loss(x_hat: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, kind: str, kl_weight: float) -> tuple[Tensor, ...]:
    """(loss, reconstruction term, KL per image pixel), scalars: loss = reconstruction + kl_weight * KL."""
    reconstruction = reconstruction_loss(x_hat, x, kind)
    kl = kl_divergence(mean, logvar).mean() / math.prod(x.shape[1:])
    return reconstruction + kl_weight * kl, reconstruction, kl


def load_vae(path: Path, device: torch.device) -> tuple[VAE, dict]:
    """The VAE of a .safetensors file, ready to encode and decode, and what the header says.

    UserError on a file that is damaged, of another kind, not finished, or that this version cannot build.
    """
    tensors, meta = load_weights(path, "vae")
    if not meta.get("finished"):
        raise UserError(f"{path} is of a VAE still in training: run the same pre_train.py command again")
    # Files of 2026-11-27 could hold a texture as a level of the decoder, which never paid.
    tensors = {name: v for name, v in tensors.items() if not name.startswith("decoder.texture.")}
    if isinstance(meta.get("model"), dict):
        meta["model"].pop("texture", None)
    try:
        vae = build_network(VAE, meta.get("model"), tensors)
    except ValueError as e:
        raise UserError(f"{path} describes a VAE that this version cannot build: {str(e)[:200]}") from None
    tensors.setdefault(
        "latent_rotation", torch.eye(vae.config["latent_channels"])
    )  # weights of older versions have none
    load_into(vae, tensors, path)
    if not bool((vae.latent_std > 0).all()):
        raise UserError(f"{path} holds latents without any spread: train the VAE again")
    return vae.to(memory_format=torch.channels_last).to(device).eval().requires_grad_(False), meta


def load_vae_of_run(folder: Path, device: torch.device) -> tuple[VAE, dict, Path]:
    """(VAE, header, file) of a run, for a training that builds on it. UserError if there is none, and as `load_vae`."""
    path = folder / "vae" / "best.safetensors"
    if not path.exists():
        raise UserError(f"run {folder.name} has no VAE ({path}): train it first with python pre_train.py, same --run")
    return *load_vae(path, device), path


def load_texture(path: Path, vae: VAE, device: torch.device) -> Texture:
    """The texture of a .safetensors file, ready to draw on what this VAE decodes.

    UserError on a file that is damaged, of another kind, for images of another size, or that this version cannot build.
    """
    tensors, meta = load_weights(path, "texture")
    try:
        texture = build_network(Texture, meta.get("model"), tensors)
        # Its timesteps are not among the tensors, and were on the meta device, too.
        texture.scheduler = NoiseScheduler_Fast_DDPM(**texture.scheduler.config)
    except ValueError as e:
        raise UserError(f"{path} describes a texture that this version cannot build: {str(e)[:200]}") from None
    load_into(texture, tensors, path)
    if texture.config["image_size"] != vae.config["image_size"]:
        raise UserError(f"{path} is of images of another size than the VAE's: run texture.py --fresh, or remove it")
    return texture.to(memory_format=torch.channels_last).to(device).eval().requires_grad_(False)
