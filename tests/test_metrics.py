"""PSNR and SSIM mean one thing: against NumPy and torchmetrics, data range 1, per image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from metrics import psnr, ssim, unit, unpaired

maths = settings(deadline=None, derandomize=True, max_examples=40)


def pictures(n, side=16, seed=0):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


@maths
@given(n=st.integers(1, 4), seed=st.integers(0, 99), noise=st.floats(1e-3, 1))
def test_psnr_against_numpy(n, seed, noise):
    a = pictures(n, seed=seed)
    b = (a + noise * (pictures(n, seed=seed + 100) - 0.5)).clamp(0, 1)
    mse = ((a.double().numpy() - b.double().numpy()) ** 2).reshape(n, -1).mean(1)
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(1 / mse), rtol=1e-5, atol=1e-3)


def test_psnr_of_known_pairs():
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([a[0] + 0.1, a[0] + 1])
    assert psnr(a, b).tolist() == pytest.approx([20, 0], abs=1e-4)  # errors of a tenth and of the whole range
    assert psnr(a, a).tolist() == [math.inf, math.inf]


def test_psnr_against_torchmetrics():
    a, b = pictures(1), pictures(1, seed=1)
    assert psnr(a, b).item() == pytest.approx(PeakSignalNoiseRatio(data_range=1.0)(a, b).item(), rel=1e-5)


def test_data_range_is_fixed_not_taken_from_the_images():
    a, b = pictures(2), pictures(2, seed=1)
    torch.testing.assert_close(psnr(a / 10, b / 10), psnr(a, b) + 20)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ssim_is_per_image_and_torchmetrics(n):
    a = pictures(n)
    b = (a + 0.2 * pictures(n, seed=1)).clamp(0, 1)
    got = ssim(a, b)
    assert got.shape == (n,)  # also for a batch of one
    for i in range(n):
        class_ = StructuralSimilarityIndexMeasure(data_range=1.0, sigma=1.5, kernel_size=11)
        assert got[i].item() == pytest.approx(class_(a[i : i + 1], b[i : i + 1]).item(), abs=1e-5)


def test_ssim_of_known_pairs():
    a = pictures(2)
    assert ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-5)
    flat = ssim(torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)).item()
    assert flat == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-4)  # luminance alone


@maths
@given(values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20))
def test_unit_maps_and_clamps(values):
    got = unit(torch.tensor(values))
    np.testing.assert_allclose(got, (np.clip(np.array(values), -1, 1) + 1) / 2, atol=1e-6)
    assert got.dtype == torch.float32


def test_unit_returns_float32_and_leaves_its_input():
    x = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.bfloat16)
    assert unit(x).tolist() == [0.0, 0.5, 1.0] and unit(x).dtype == torch.float32
    assert x.tolist() == [-3.0, 0.0, 3.0]


def test_unpaired_is_the_mean_over_pairs_by_index():
    a, b = pictures(4), pictures(4, seed=1)
    got = unpaired(a, b)
    one_by_one = [(psnr(a[i : i + 1], b[i : i + 1]).item(), ssim(a[i : i + 1], b[i : i + 1]).item()) for i in range(4)]
    assert got == pytest.approx(np.mean(one_by_one, axis=0).tolist(), rel=1e-5)
    assert all(isinstance(v, float) for v in got)
    assert unpaired(a, a.flip(0))[0] < unpaired(a, (a + 0.01).clamp(0, 1))[0]  # strangers are less alike
