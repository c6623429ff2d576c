"""The VAE, its losses and the latent contract, against torch.distributions, torchmetrics and formulas in float64."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributions
from torchmetrics.functional.image import structural_similarity_index_measure

import metrics
from config import PretrainConfig
from loop import Plan
from pre_train import augment, make_optimizer_and_schedule
from utils import UserError
from vae import (
    LOGVAR_RANGE,
    VAE,
    PatchDiscriminator,
    adversarial_gradient,
    focal_frequency,
    hinge_loss,
    kl_divergence,
    load_vae,
    reconstruction_loss,
    vae_loss,
)
from weights import save_weights

maths = settings(deadline=None, derandomize=True, max_examples=30)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n, side=16, seed=0):
    """Smooth pictures in [-1, 1]."""
    return F.interpolate(normal(n, 1, side // 4, side // 4, seed=seed), size=side, mode="bilinear").tanh()


def tiny_vae(**how):
    """A small VAE whose branches that start at zero are awake, and whose latents are off centre and off scale."""
    torch.manual_seed(0)
    vae = VAE(**dict(image_size=16, downsample=4, latent_channels=2, channels=(8, 16), blocks=1) | how)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in vae.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
        vae.encoder[-1].bias += 1.5
        vae.encoder[-1].weight *= 3
    return vae.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and construction


@pytest.mark.parametrize(
    ("downsample", "levels", "patch"),
    [(1, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 4), (4, 2, 2), (4, 3, 1), (8, 2, 4), (8, 3, 2), (8, 4, 1)],
)
def test_shapes_with_and_without_a_space_to_depth_stem(downsample, levels, patch):
    vae = VAE(16, downsample, 3, (8,) * levels, 1)
    assert vae.encoder[1].in_channels == patch**2
    side = 16 // downsample
    assert vae.latent_shape == (3, side, side)
    x = images(2)
    mean, logvar = vae.posterior(x)
    assert mean.shape == logvar.shape == (2, 3, side, side)
    assert vae.reconstruct(mean).shape == vae.decode(mean).shape == x.shape
    x_hat, *_ = vae(x, torch.zeros_like(mean))
    assert x_hat.shape == x.shape


@pytest.mark.parametrize(
    "how",
    [
        dict(downsample=3),
        dict(downsample=0),
        dict(downsample=6),
        dict(downsample=2, channels=(8, 8, 8)),  # the levels alone already halve twice
        dict(image_size=20, downsample=8),
    ],
)
def test_impossible_configurations_are_refused(how):
    with pytest.raises(ValueError):
        tiny_vae(**how)


def test_attention_can_be_left_out():
    names = {type(m).__name__ for m in tiny_vae(attention=False).modules()}
    assert "AttentionBlock" not in names and "AttentionBlock" in {type(m).__name__ for m in tiny_vae().modules()}


def test_every_parameter_learns():
    vae = tiny_vae(channels=(40, 48))  # widths with several channels in a norm's group
    x, noise = images(3), normal(3, 2, 4, 4)
    vae_loss(*(lambda out: (out[0], x, *out[1:]))(vae(x, noise)), "l1_ssim", 1e-3)[0].backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---------------------------------------------------------------------------------------------------------------------
# The posterior


def test_mean_and_logvar_share_nothing():
    vae, x = tiny_vae(), images(2)
    with torch.no_grad():
        mean, logvar = vae.posterior(x)
        vae.encoder[-1].bias[:2] += 0.5
        moved_mean, same_logvar = vae.posterior(x)
        vae.encoder[-1].bias[2:] += 0.25
        same_mean, moved_logvar = vae.posterior(x)
    torch.testing.assert_close(moved_mean, mean + 0.5)
    torch.testing.assert_close(moved_logvar, logvar + 0.25)
    assert torch.equal(same_logvar, logvar) and torch.equal(same_mean, moved_mean)


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30, -1e30])
def test_a_huge_encoder_output_stays_finite(size):
    vae, x = tiny_vae(), images(2)
    with torch.no_grad():
        vae.encoder[-1].bias[2:] = size
        mean, logvar = vae.posterior(x)
        assert (logvar == LOGVAR_RANGE[size > 0]).all()
        out = (*vae(x, normal(2, 2, 4, 4)), *vae.encode(x), kl_divergence(mean, logvar))
    assert all(v.isfinite().all() for v in out)
    assert (0.5 * logvar).exp().half().isfinite().all()


def test_forward_is_the_reparameterisation():
    vae, x, noise = tiny_vae(), images(2), normal(2, 2, 4, 4)
    x_hat, mean, logvar = vae(x, noise)
    want = vae.reconstruct(distributions.Normal(mean, (0.5 * logvar).exp()).loc + logvar.exp().sqrt() * noise)
    torch.testing.assert_close(x_hat, want)


def test_precision_is_chosen_for_the_network_alone():
    vae, x = tiny_vae(), images(2)
    exact = vae.posterior(x)[0]
    vae.amp_dtype = torch.bfloat16
    mean, logvar = vae.posterior(x)
    assert mean.dtype == logvar.dtype == vae.decode(mean).dtype == torch.float32
    assert not torch.equal(mean, exact) and torch.allclose(mean, exact, atol=0.3)


# ---------------------------------------------------------------------------------------------------------------------
# The latent contract


def test_redraws_have_mean_0_and_deviation_1():
    vae, x = tiny_vae(), images(64)
    raw = vae.posterior(x)[0]
    assert (raw.mean(dim=(0, 2, 3)).abs() > 0.3).any()  # there is something to normalise
    vae.measure_latents([x])
    mean, std = (v.detach().double() for v in vae.encode(x))
    # closed form: E[z] = E[mean], E[z^2] = E[mean^2 + std^2]
    assert mean.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert ((mean.square() + std.square()).mean(dim=(0, 2, 3)) - 1).abs().max() < 1e-4
    z = torch.stack([mean + std * normal(*mean.shape, seed=k) for k in range(32)])
    assert z.mean(dim=(0, 1, 3, 4)).abs().max() < 0.03
    assert (z.std(dim=(0, 1, 3, 4)) - 1).abs().max() < 0.03


def test_measurement_counts_images_not_batches():
    one, many, x = tiny_vae(), tiny_vae(), images(20)
    one.measure_latents([x])
    many.measure_latents(iter([x[:3], x[3:17], x[17:]]))
    torch.testing.assert_close(one.latent_mean, many.latent_mean)
    torch.testing.assert_close(one.latent_std, many.latent_std)


def test_measuring_again_does_not_compound():
    vae, x = tiny_vae(), images(20)
    vae.measure_latents([x])
    mean, std = vae.latent_mean.clone(), vae.latent_std.clone()
    vae.measure_latents([x])
    assert torch.equal(mean, vae.latent_mean) and torch.equal(std, vae.latent_std)


def test_encode_and_decode_are_inverse_scalings():
    vae, x = tiny_vae(), images(4)
    mean, logvar = vae.posterior(x)
    want = vae.reconstruct(mean).clamp(-1, 1)
    assert torch.equal(vae.encode(x)[0], mean)  # before it is measured, normalising does nothing
    torch.testing.assert_close(vae.decode(vae.encode(x)[0]), want)
    vae.measure_latents([x])
    z, std = vae.encode(x)
    assert not torch.allclose(z, mean, atol=0.1)
    torch.testing.assert_close(vae.decode(z), want, rtol=1e-4, atol=1e-5)
    # the deviation of a rotated sample, channel by channel, by drawing many
    z = torch.einsum("dc,kbchw->kbdhw", vae.latent_rotation, (0.5 * logvar).exp() * normal(4000, *mean.shape))
    torch.testing.assert_close(std * vae.latent_std[:, None, None], z.std(0), rtol=0.06, atol=1e-3)


def test_channels_are_uncorrelated_and_in_order():
    vae, x = tiny_vae(latent_channels=4), images(64)
    with torch.no_grad():
        vae.encoder[-1].weight[1] = vae.encoder[-1].weight[0] + 0.1 * vae.encoder[-1].weight[1]  # two nearly agree
    raw = vae.posterior(x)[0].detach().transpose(0, 1).flatten(1).numpy()
    assert np.corrcoef(raw)[0, 1] > 0.8
    vae.measure_latents([x])
    rotation, std = vae.latent_rotation.double(), vae.latent_std
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4).double(), atol=1e-6, rtol=0)
    assert (std[:-1] >= std[1:]).all()
    z = vae.encode(x)[0].detach().double().transpose(0, 1).flatten(1)
    between = z @ z.T / z.shape[1]
    own = torch.einsum("dc,c,ec->de", rotation, (vae.posterior(x)[1].double().exp().mean((0, 2, 3))), rotation)
    between += own / (std[:, None] * std[None])
    torch.testing.assert_close(between, torch.eye(4).double(), atol=2e-3, rtol=0)


def test_weights_from_before_the_rotation_are_read(tmp_path):
    vae, x = tiny_vae(), images(4)
    vae.latent_std.fill_(2.0)
    write(tmp_path / "new.safetensors", vae)
    tensors = load_file(tmp_path / "new.safetensors")
    del tensors["latent_rotation"]
    with safe_open(tmp_path / "new.safetensors", "pt") as f:
        save_file(tensors, tmp_path / "old.safetensors", {"meta": f.metadata()["meta"]})
    old, _ = load_vae(tmp_path / "old.safetensors", torch.device("cpu"))
    torch.testing.assert_close(old.encode(x)[0], vae.posterior(x)[0] / 2)


def test_decode_leaves_its_input_alone_and_stays_in_range():
    vae, x = tiny_vae(), images(20)
    vae.measure_latents([x])
    z = 50 * normal(2, 2, 4, 4)
    before = z.clone()
    out = vae.decode(z)
    assert torch.equal(z, before)  # a sampler may still be running on it
    assert out.min() >= -1 and out.max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Losses


@maths
@given(seed=st.integers(0, 99), scale=st.floats(0, 5), shift=st.floats(-12, 3))
def test_kl_against_torch_distributions(seed, scale, shift):
    mean, logvar = scale * normal(3, 2, 4, 4, seed=seed).double(), normal(3, 2, 4, 4, seed=seed + 100).double() + shift
    q, p = distributions.Normal(mean, (0.5 * logvar).exp()), distributions.Normal(0.0, 1.0)
    want = distributions.kl_divergence(q, p).sum(dim=(1, 2, 3))
    torch.testing.assert_close(kl_divergence(mean, logvar), want)


def test_kl_is_zero_for_the_prior_alone():
    zero = torch.zeros(2, 1, 3, 3)
    assert not kl_divergence(zero, zero).any()
    assert kl_divergence(zero + 0.1, zero).min() > 0 and kl_divergence(zero, zero - 0.1).min() > 0


def interior_ssim(a, b):
    return metrics.ssim(a, b, border=False).mean()


def torchmetrics_ssim(a, b):
    full = structural_similarity_index_measure(a, b, data_range=1.0, sigma=1.5, return_full_image=True)[1]
    return full[..., 5:-5, 5:-5].mean()  # without the border where the window looks at mirrored pixels


@maths
@given(seed=st.integers(0, 99), h=st.integers(11, 24), w=st.integers(11, 24), noise=st.floats(0, 1))
def test_ssim_against_torchmetrics(seed, h, w, noise):
    a = F.interpolate(normal(2, 1, 5, 6, seed=seed), size=(h, w), mode="bilinear").sigmoid()
    b = (a + noise * normal(2, 1, h, w, seed=seed + 100)).clamp(0, 1)
    torch.testing.assert_close(interior_ssim(a, b), torchmetrics_ssim(a, b), rtol=1e-4, atol=1e-4)


def test_ssim_of_known_pairs():
    a = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    assert interior_ssim(a, a) == pytest.approx(1, abs=1e-6)
    flat = interior_ssim(torch.full((1, 1, 12, 12), 0.2).double(), torch.full((1, 1, 12, 12), 0.6).double())
    assert flat == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-5)  # luminance alone


def test_ssim_is_differentiable():
    a, b = (torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1))
    assert torch.autograd.gradcheck(lambda x: interior_ssim(x, b), a.requires_grad_())


def test_reconstruction_losses_against_formulas():
    x, x_hat = images(3, seed=1), images(3, seed=2)
    a, b = x.double().numpy(), x_hat.double().numpy()
    l1, mse = np.abs(a - b).mean(), ((a - b) ** 2).mean()
    similarity = torchmetrics_ssim((x_hat + 1) / 2, (x + 1) / 2).item()
    assert reconstruction_loss(x_hat, x, "mse").item() == pytest.approx(mse, rel=1e-5)
    assert reconstruction_loss(x_hat, x, "l1").item() == pytest.approx(l1, rel=1e-5)
    assert reconstruction_loss(x_hat, x, "l1_ssim").item() == pytest.approx(l1 + 0.5 * (1 - similarity), rel=1e-4)


def test_focal_frequency_against_numpy():
    x, x_hat = images(3, seed=1), images(3, seed=2)
    difference = np.fft.fft2(x_hat.double().numpy(), norm="ortho") - np.fft.fft2(x.double().numpy(), norm="ortho")
    weight = np.abs(difference) / np.abs(difference).max(axis=(2, 3), keepdims=True)
    want = (weight * np.abs(difference) ** 2).mean()
    assert focal_frequency(x_hat, x).item() == pytest.approx(want, rel=1e-5)
    whole, part = (reconstruction_loss(x_hat, x, kind).item() for kind in ("l1_ssim_frequency", "l1_ssim"))
    assert whole - part == pytest.approx(want, rel=1e-4)
    # what every pixel is off by is one frequency, and its weight is 1: (side * offset)^2 over side^2 pixels
    assert focal_frequency(x + 0.5, x).item() == pytest.approx(0.25, rel=1e-5)


def test_ms_ssim_loss_sees_several_scales():
    x = images(2, side=64)
    noisy = x + 0.3 * normal(2, 1, 64, 64)
    one, several = (reconstruction_loss(noisy, x, kind).item() for kind in ("l1_ssim", "l1_ms_ssim"))
    assert several < one  # coarse scales average the noise away
    a = x.clone().requires_grad_()
    reconstruction_loss(a + 0.01, x, "l1_ms_ssim").backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["mse", "l1", "l1_ssim", "l1_ms_ssim", "l1_ssim_frequency"])
def test_darker_than_black_is_black(kind):
    """`decode` clamps, so the loss asks for no more; everything else counts as before."""
    x = images(2, side=32).clamp(-1, 1)
    x[:, :, :16] = -1
    darker = x.clone()
    darker[:, :, :16] = -1.7
    assert reconstruction_loss(darker, x, kind).item() == pytest.approx(0, abs=1e-5)
    a = darker.requires_grad_()
    reconstruction_loss(a, x, kind).backward()
    assert not a.grad[:, :, :16].any()
    assert reconstruction_loss(x + 0.1, x, kind).item() > 0  # brighter than black is wrong
    assert reconstruction_loss(0 * x - 0.5, 0 * x, kind).item() > 0  # and so is darker than grey


# ---------------------------------------------------------------------------------------------------------------------
# The discriminator


def test_no_verdict_hangs_on_the_batch():
    torch.manual_seed(0)
    judge, x = PatchDiscriminator(), images(3, side=32)
    verdict = judge(x)
    assert verdict.shape == (3, 1, 4, 4)
    torch.testing.assert_close(judge(x[1:2]), verdict[1:2], rtol=1e-4, atol=1e-5)


def test_the_discriminator_sees_what_a_vae_leaves_out():
    """Fine detail of a few grey levels, which a VAE averages away, is learnt within 150 steps."""
    torch.manual_seed(0)
    judge = PatchDiscriminator()
    x = F.interpolate(normal(64, 1, 4, 4), size=64, mode="bicubic").tanh()
    detail = 0.02 * normal(64, 1, 64, 64, seed=1)  # 2.5 of 255 grey levels
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-3, betas=(0.5, 0.9), weight_decay=0.0)
    for k in range(150):
        rows = torch.arange(8 * k, 8 * k + 8) % 48
        hinge_loss(*judge(torch.cat([x[rows] + detail[rows], x[rows]])).chunk(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    # Found: 0.001; 0.8 if it sees grey values alone.
    assert hinge_loss(judge(x[48:] + detail[48:]), judge(x[48:])) < 0.2


def test_a_patch_is_judged_by_40_pixels():
    torch.manual_seed(0)
    judge = PatchDiscriminator()
    for m in judge.net:  # norms look at the whole image
        if isinstance(m, torch.nn.GroupNorm):
            m.forward = lambda x: x
    x = images(1, side=96).requires_grad_()
    judge(x)[0, 0, 6, 6].backward()
    seen = x.grad[0, 0].abs().sum(0).nonzero()[:, 0]
    assert seen.max() - seen.min() + 1 == 40


def test_hinge_loss():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert hinge_loss(torch.zeros(4), torch.zeros(4)).item() == 1
    assert hinge_loss(torch.full((4,), 1.5), torch.full((4,), -1.5)).item() == 0


@maths
@given(weight=st.floats(0.01, 10), scale=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
def test_fooling_keeps_its_share_of_each_images_gradient(weight, scale, seed):
    torch.manual_seed(seed)
    judge, x_hat = PatchDiscriminator((8, 8, 8)), images(3, side=16, seed=seed)
    gradient = scale * normal(3, 1, 16, 16, seed=seed)
    for p in judge.net[-1].parameters():
        p.data *= 100  # however loud it is
    g = adversarial_gradient(judge, x_hat, gradient, weight)
    for ours, theirs in zip(g, gradient):
        assert ours.norm().item() == pytest.approx(weight * theirs.norm().item(), rel=1e-4)
    # a step along -g is more real to the judge; the judge itself learns nothing from it
    step = 1e-3 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert judge(x_hat - step).mean() > judge(x_hat).mean()
    assert all(p.grad is None for p in judge.parameters())


@pytest.mark.parametrize("kind", ["mse", "l1", "l1_ssim"])
def test_a_perfect_reconstruction_costs_nothing(kind):
    assert reconstruction_loss(images(2), images(2), kind).item() == pytest.approx(0, abs=1e-5)


@maths
@given(weight=st.floats(0, 10), seed=st.integers(0, 99))
def test_vae_loss_with_mse_is_the_classic(weight, seed):
    x, x_hat = images(3, seed=seed), images(3, seed=seed + 100)
    mean, logvar = normal(3, 2, 4, 4, seed=seed), normal(3, 2, 4, 4, seed=seed + 100)
    m, v = mean.double().numpy(), logvar.double().numpy()
    mse = ((x_hat.double().numpy() - x.double().numpy()) ** 2).mean()
    kl = 0.5 * (m**2 + np.exp(v) - 1 - v).sum() / 3 / 256  # per image, per pixel of the image
    got = [t.item() for t in vae_loss(x_hat, x, mean, logvar, "mse", weight)]
    assert got == pytest.approx([mse + weight * kl, mse, kl], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write(path, vae, **changes):
    save_weights(path, vae, dict(kind="vae", model=vae.config, finished=True) | changes)


def test_load_vae_gives_the_same_model(tmp_path):
    path, vae, x = tmp_path / "best.safetensors", tiny_vae(), images(8)
    vae.measure_latents([x])
    write(path, vae, classes=["AD", "NC"])
    again, meta = load_vae(path, torch.device("cpu"))
    assert meta["classes"] == ["AD", "NC"] and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    for got, want in zip(again.encode(x), vae.encode(x)):  # the latent contract travels with the weights
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(again.decode(vae.encode(x)[0]), vae.decode(vae.encode(x)[0]))


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_load_vae_refuses_other_files(tmp_path):
    path, vae, cpu = tmp_path / "best.safetensors", tiny_vae(), torch.device("cpu")
    with pytest.raises(UserError, match="no weights"):
        load_vae(path, cpu)
    for unfinished in (dict(finished=False), dict(finished=None)):
        write(path, vae, **unfinished)
        with pytest.raises(UserError, match="still in training"):  # its latent scale is not measured yet
            load_vae(path, cpu)
    save_weights(path, vae, dict(kind="vae", model=vae.config))
    with pytest.raises(UserError, match="still in training"):
        load_vae(path, cpu)
    write(path, vae, kind="diffusion")
    with pytest.raises(UserError, match="vae"):
        load_vae(path, cpu)
    for wrong in (vae.config | {"downsample": 3}, vae.config | {"flavour": 1}, vae.config | {"channels": [8, 8]}):
        write(path, vae, model=wrong)
        with pytest.raises(UserError, match="best.safetensors"):
            load_vae(path, cpu)

    write(path, vae)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError):
        load_vae(path, cpu)
    path.write_bytes(pickle.dumps(Evil(str(tmp_path / "pwned"))))
    with pytest.raises(UserError, match="pickle"):
        load_vae(path, cpu)
    assert not (tmp_path / "pwned").exists()


def test_encoder_and_decoder_are_compiled_apart():
    """torch.compile counts how often it compiled a function, whosever method it is, and gives up after eight times."""
    vae = VAE(32, 4, 2, (8, 16), 1)
    assert vae.encoder.forward.__code__ is not vae.decoder.forward.__code__


def test_augmentation_moves_and_brightens_by_as_much_as_asked_for():
    """A quarter turn, a shift by two pixels of eight, half as bright again; the background stays black."""
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 3:5, 3:6] = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    zero = torch.zeros(1, 5)

    def augmented(place: int, **how: float) -> torch.Tensor:
        u = zero.clone()
        u[0, place] = 1
        return (augment(2 * x - 1, u, replace(PretrainConfig(), **how)) + 1) / 2

    torch.testing.assert_close(augmented(0, rotate=90.0), x.rot90(1, (2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(augmented(2, shift=0.25), x.roll(-2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(augmented(3, shift=0.25), x.roll(-2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(augmented(4, brightness=0.5), 1.5 * x, atol=1e-5, rtol=0)
    assert torch.equal(augment(2 * x - 1, zero + 1, PretrainConfig()), 2 * x - 1)  # all off


@pytest.mark.parametrize("patience", [1, 3])
def test_the_plateau_is_waited_for_as_long_as_asked_for(patience: int):
    cfg = replace(PretrainConfig(), plateau_patience=patience, schedule="plateau")
    optimizer, schedule = make_optimizer_and_schedule(cfg, tiny_vae(), torch.nn.Linear(1, 1), Plan(1, 1, 1))
    rates = []
    for _ in range(patience + 2):
        schedule.step(1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[-2:] == [cfg.lr, cfg.lr / 2]
