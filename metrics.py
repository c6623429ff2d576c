"""Numbers that mean one thing: functions of tensors, no files. Images are float [B, 1, H, W] in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB with data range 1, per image: [B]. Identical images give inf."""
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity with data range 1, per image: [B] (torchmetrics: 11x11 Gaussian window, sigma 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(a, b, data_range=1.0, sigma=1.5, reduction="none").reshape(-1)


def unit(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped: the range in which PSNR and SSIM are taken."""
    return (x.float().clamp(-1, 1) + 1) / 2


def unpaired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean (PSNR, SSIM) of image i of a against the unrelated image i of b: says how alike two strangers are."""
    return psnr(a, b).mean().item(), ssim(a, b).mean().item()
