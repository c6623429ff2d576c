"""The networks, the schedule and the samplers, against NumPy in float64, diffusers and closed forms."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

from config import TrainConfig
from modules import (
    AttentionBlock,
    CategoryEmbedding,
    CosineAnnealingWarmupScheduler,
    Lookahead,
    NoiseScheduler_Fast_DDPM,
    NumberEmbedding,
    ResidualBlock,
    StableDiffusion,
    UNet,
    group_norm,
    load_diffusion,
    make_grid,
    randn,
    sample,
    sample_steps,
    start_noise,
    timestep_embedding,
)
from train import step_randomness, training_loss, vary
from utils import UserError, generator
from vae import VAE
from weights import save_weights

maths = settings(deadline=None, derandomize=True, max_examples=40)

GRIDS = {
    "logsnr": [0, 5, 22, 73, 202, 410, 603, 757, 886, 999],
    "nonuniform": [0, 199, 399, 599, 699, 799, 849, 899, 949, 999],
    "uniform": [0, 111, 222, 333, 444, 555, 666, 777, 888, 999],
    "flow": [30, 72, 124, 185, 256, 335, 422, 521, 649, 999],
}
BETA = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
ABAR = np.exp(np.cumsum(np.log1p(-BETA)))  # float64, in logarithms: another route than the code's product
S = np.array([0.1, 0.18, 0.5, 1.0, 1.5])
# (sampled sd) / s of docs' table for a perfect network: a right sampler returns 1.
TABLE = {
    ("nonuniform", "ddim"): [0.233, 0.292, 0.541, 0.687, 0.730],
    ("uniform", "ddim"): [0.344, 0.461, 0.723, 0.815, 0.838],
    ("logsnr", "ddim"): [0.764, 0.765, 0.765, 0.765, 0.764],
    ("full", "ddim"): [0.983, 0.992, 0.997, 0.998, 0.998],
    ("nonuniform", "dpm++2m"): [0.411, 0.602, 1.183, 1.409, 1.404],
    ("uniform", "dpm++2m"): [0.647, 0.947, 1.385, 1.330, 1.237],
    ("logsnr", "dpm++2m"): [0.997, 1.016, 1.032, 1.036, 1.038],
}


def abar64(t):
    return ABAR[t] if t >= 0 else 1.0


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wake(model, seed=0):
    """Give the layers that start at zero random weights, so that every path carries signal and gradient."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


NAN = math.nan
ROWS = torch.tensor([[0, 0.5], [1, -1], [NAN, NAN]])  # conditions of three images


def tiny_unet(conditions=(2, 0), **how):
    """With a category of two values and a number as its conditions."""
    torch.manual_seed(0)
    size = dict(in_channels=2, resolution=8, channels=(8, 16), blocks=1, attention=(4,), conditions=conditions)
    return wake(UNet(**size | how))


def tiny_diffusion(conditions=(2, 0), prediction="v", grid="logsnr"):
    model = StableDiffusion(tiny_unet(conditions), NoiseScheduler_Fast_DDPM(grid=grid), prediction)
    return model.eval().requires_grad_(False)


def close(got, want, tol=1e-5):
    """Largest error, relative to the largest value where values are above 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tol * max(1.0, np.abs(want).max())


# ---------------------------------------------------------------------------------------------------------------------
# Grids and the schedule


@pytest.mark.parametrize("grid", GRIDS)
def test_ten_step_grids_are_the_documented_ones(grid):
    scheduler = NoiseScheduler_Fast_DDPM(grid=grid)
    assert scheduler.timesteps.tolist() == GRIDS[grid]
    assert scheduler.timesteps.dtype == torch.int64


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_a_students_steps_are_some_of_its_teachers(n):
    student, teacher = (make_grid("student", steps, ABAR) for steps in (n, 16))
    assert student.tolist() == teacher[16 // n - 1 :: 16 // n].tolist()
    assert student[-1] == 999 and len(student) == n and student[0] > 0


def test_full_grid_is_all_timesteps_whatever_the_count():
    assert NoiseScheduler_Fast_DDPM(grid="full", num_steps=7).timesteps.tolist() == list(range(1000))


def test_defaults_are_ten_logsnr_steps():
    assert NoiseScheduler_Fast_DDPM().timesteps.tolist() == GRIDS["logsnr"]
    assert (TrainConfig().grid, TrainConfig().num_steps) == ("logsnr", 10)


@settings(maths, max_examples=120)
@given(grid=st.sampled_from(list(GRIDS)), n=st.integers(2, 1000))
@example(grid="logsnr", n=1000)
@example(grid="nonuniform", n=1000)
@example(grid="uniform", n=1000)
@example(grid="nonuniform", n=2)
def test_grids_of_any_count(grid, n):
    ts = make_grid(grid, n, ABAR)
    assert len(ts) == n and (ts[0] == 0 or grid == "flow") and ts[-1] == 999
    assert (np.diff(ts) > 0).all()  # strictly ascending, so no timestep is visited twice


@maths
@given(n=st.integers(5, 500))
def test_nonuniform_puts_forty_percent_below_699(n):
    below = (make_grid("nonuniform", n, ABAR) < 699).sum()  # up to 500: more than 301 do not fit on 699..999
    assert abs(below - 0.4 * n) <= 0.5


@maths
@given(n=st.integers(2, 40))
def test_logsnr_entries_are_the_nearest_to_equal_steps(n):
    logsnr = np.log(ABAR / (1 - ABAR))
    ts, targets = make_grid("logsnr", n, ABAR), np.linspace(logsnr[0], logsnr[-1], n)
    nearest = [min(range(1000), key=lambda t, x=x: abs(logsnr[t] - x)) for x in targets]
    assume(len(set(nearest)) == n)  # dense grids have to step aside near t = 0
    assert ts.tolist() == nearest


@pytest.mark.parametrize(("grid", "n"), [("cosine", 10), ("logsnr", 1), ("uniform", 0), ("nonuniform", 1001)])
def test_unknown_grids_and_counts_are_refused(grid, n):
    with pytest.raises(ValueError):
        NoiseScheduler_Fast_DDPM(grid=grid, num_steps=n)


def test_alphas_cumprod_against_numpy():
    scheduler = NoiseScheduler_Fast_DDPM()
    np.testing.assert_allclose(scheduler.abar, ABAR, rtol=1e-12)
    np.testing.assert_allclose(scheduler.alphas_cumprod.numpy(), ABAR, rtol=1e-7)
    assert scheduler.alphas_cumprod.dtype == torch.float32


@pytest.mark.parametrize("grid", [*GRIDS, "full"])
def test_sampling_starts_from_what_training_saw(grid):
    scheduler = NoiseScheduler_Fast_DDPM(grid=grid)
    assert scheduler.alphas_cumprod[scheduler.timesteps[-1]] < 1e-3  # N(0, 1) is x_T only if the signal is gone


@maths
@given(t=st.lists(st.integers(0, 999), min_size=1, max_size=5), seed=st.integers(0, 99), scale=st.floats(0.01, 10))
def test_add_noise_against_numpy(t, seed, scale):
    x0, noise = scale * normal(len(t), 2, 3, 3, seed=seed), normal(len(t), 2, 3, 3, seed=seed + 100)
    got = NoiseScheduler_Fast_DDPM().add_noise(x0, noise, torch.tensor(t))
    a = ABAR[t][:, None, None, None]
    close(got, np.sqrt(a) * x0.double().numpy() + np.sqrt(1 - a) * noise.double().numpy())


def test_add_noise_is_float32_whatever_comes_in():
    x = normal(2, 1, 2, 2)
    got = NoiseScheduler_Fast_DDPM().add_noise(x.bfloat16(), x.bfloat16(), torch.tensor([3, 4]))
    assert got.dtype == torch.float32


def step64(eps, t, t_prev, x, eta, noise):
    """DDIM by its distribution: mean through the predicted x0, variance eta^2 of the DDPM posterior's."""
    a, p = abar64(t), abar64(t_prev)
    x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
    var = eta**2 * (1 - p) / (1 - a) * (1 - a / p)
    return np.sqrt(p) * x0 + np.sqrt(1 - p - var) * eps + np.sqrt(var) * noise


@maths
@given(t=st.integers(0, 999), back=st.integers(1, 1000), eta=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
@example(t=999, back=1000, eta=1.0, seed=0)
@example(t=0, back=1, eta=1.0, seed=0)
def test_step_against_numpy(t, back, eta, seed):
    t_prev = max(-1, t - back)
    x, eps, noise = (normal(2, 1, 3, 3, seed=seed + k) for k in (0, 100, 200))
    got = NoiseScheduler_Fast_DDPM().step(eps, t, t_prev, x, eta, noise)
    close(got, step64(eps.double().numpy(), t, t_prev, x.double().numpy(), eta, noise.double().numpy()))


def diffusers_ddim(t, t_prev):
    """diffusers' scheduler, made to go from t to t_prev in one step (it only knows t minus a constant)."""
    ddim = DDIMScheduler(beta_start=1e-4, beta_end=0.02, set_alpha_to_one=True, clip_sample=False)
    ddim.num_inference_steps = 1
    ddim.register_to_config(num_train_timesteps=t - t_prev)
    return ddim


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_step_against_diffusers(grid, eta):
    scheduler, ts = NoiseScheduler_Fast_DDPM(grid=grid), GRIDS[grid]
    for t, t_prev in zip(ts, [-1, *ts]):
        x, eps, noise = normal(1, 2, 4, 4, seed=1), normal(1, 2, 4, 4, seed=2), normal(1, 2, 4, 4, seed=3)
        got = scheduler.step(eps, t, t_prev, x, eta, noise)
        want = diffusers_ddim(t, t_prev).step(eps, t, x, eta=eta, variance_noise=noise).prev_sample
        close(got, want)


@maths
@given(t=st.integers(0, 999), seed=st.integers(0, 99))
def test_step_to_the_clean_image_is_x0(t, seed):
    x0, eps = normal(1, 1, 3, 3, seed=seed), normal(1, 1, 3, 3, seed=seed + 100)
    scheduler = NoiseScheduler_Fast_DDPM()
    x = math.sqrt(ABAR[t]) * x0.double() + math.sqrt(1 - ABAR[t]) * eps.double()
    close(scheduler.step(eps.double(), t, -1, x, eta=1.0), x0)  # nor does eta leave noise in it


@pytest.mark.parametrize("grid", [*GRIDS, "full"])
@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_sample_timesteps_are_antithetic_pairs_of_the_grid(grid, batch):
    scheduler = NoiseScheduler_Fast_DDPM(grid=grid)
    t = scheduler.sample_timesteps(batch, torch.Generator().manual_seed(batch))
    assert t.shape == (batch,) and t.dtype == torch.int64
    place = {v: i for i, v in enumerate(scheduler.timesteps.tolist())}
    i = [place[v] for v in t.tolist()]  # KeyError: a timestep off the grid, which sampling never visits
    half = (batch + 1) // 2
    assert all(a + b == len(place) - 1 for a, b in zip(i[:half], i[half:]))


def test_sample_timesteps_are_uniform_and_seeded():
    scheduler = NoiseScheduler_Fast_DDPM()
    t = scheduler.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.searchsorted(scheduler.timesteps, t), minlength=10)
    assert ((counts - 2000).abs() < 250).all()  # sd of a pair of places is 80 at most
    assert torch.equal(t, scheduler.sample_timesteps(20_000, torch.Generator().manual_seed(0)))
    assert not torch.equal(t, scheduler.sample_timesteps(20_000, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("grid", ["logsnr", "full"])
def test_timesteps_are_drawn_where_log_snr_is_asked_for(grid):
    scheduler = NoiseScheduler_Fast_DDPM(grid=grid)
    scheduler.concentrate(1.0, 3.0)
    t = scheduler.sample_timesteps(200_000, torch.Generator().manual_seed(0)).numpy()
    ts, logsnr = scheduler.timesteps.numpy(), np.log(ABAR / (1 - ABAR))
    # In the middle between two places of ten one stretch ends and the next begins; of the full grid, any stretches.
    edges = (logsnr[ts][1:-1] + logsnr[ts][:-2]) / 2 if grid == "logsnr" else np.arange(7.5, -8, -2.0)
    found, uniform_part = (np.histogram(logsnr[x], edges[::-1])[0] / len(x) for x in (t, ts))
    normal_part = np.diff([0.5 * math.erfc((1.0 - e) / 3 / math.sqrt(2)) for e in edges[::-1]])
    assert np.abs(found - 0.9 * normal_part - 0.1 * uniform_part).max() < 0.015
    assert {0, 999} <= set(t)  # where sampling begins and ends, however rarely
    with pytest.raises(ValueError, match="-900"):
        scheduler.concentrate(-900.0, 0.5)
    with pytest.raises(ValueError, match="no timestep"):
        scheduler.concentrate(0.0, 0.0)


@pytest.mark.parametrize("grid", ["logsnr", "full"])
@pytest.mark.parametrize(("prediction", "log_snr"), [("v", None), ("eps", None), ("flow", (0, 2)), ("v", (1, 2))])
def test_timesteps_drawn_by_their_weight_leave_the_mean_loss_as_it_is(grid, prediction, log_snr):
    """Over the chances of timesteps the mean is what it was; many draws have it, with less variance than before."""
    scheduler = NoiseScheduler_Fast_DDPM(grid=grid)
    if log_snr:
        scheduler.concentrate(*log_snr)
    model = StableDiffusion(UNet(2, 8, (8,), 1, ()), scheduler, prediction, "min_snr")
    ts, loss = scheduler.timesteps, 0.3 + torch.rand(1000, generator=torch.Generator().manual_seed(0))  # any, by t

    def drawn() -> torch.Tensor:
        t = scheduler.sample_timesteps(200_000, torch.Generator().manual_seed(1))
        return model.weight(t) * loss[t]

    before, mean = drawn(), float((torch.tensor(scheduler.chance) * model.weight(ts) * loss[ts]).sum())
    scheduler.draw_by(model.weight(ts))
    assert float((torch.tensor(scheduler.chance) * model.weight(ts) * loss[ts]).sum()) == pytest.approx(mean, rel=1e-6)
    assert float(drawn().mean()) == pytest.approx(mean, rel=0.02) and drawn().std() < before.std()


def test_weights_that_are_all_alike_change_no_draw():
    scheduler = NoiseScheduler_Fast_DDPM(grid="full")
    before = scheduler.cumulative.clone()
    scheduler.draw_by(torch.ones(1000))
    assert torch.equal(scheduler.cumulative, before) and bool((scheduler.rarity == 1).all())


def test_randn_row_comes_from_its_own_generator():
    gens = [torch.Generator().manual_seed(k) for k in range(3)]
    x = randn((3, 2, 4), gens)
    for k in range(3):
        assert torch.equal(x[k], torch.randn(2, 4, generator=torch.Generator().manual_seed(k)))


# ---------------------------------------------------------------------------------------------------------------------
# Samplers


def toy(x, t):
    """A fixed, nonlinear "network": (eps, x0) that belong together."""
    eps = torch.tanh(1.3 * x + 0.2 * math.sin(t)) * (0.6 + 0.3 * math.cos(t / 300))
    return eps, (x - math.sqrt(1 - ABAR[t]) * eps) / math.sqrt(ABAR[t])


@pytest.mark.parametrize("grid", GRIDS)
def test_ddim_sampler_against_diffusers(grid):
    ts, x = GRIDS[grid], normal(2, 1, 4, 4).double()
    got = sample(toy, x, NoiseScheduler_Fast_DDPM(grid=grid), solver="ddim")
    for t, t_prev in zip(ts[::-1], [*ts[-2::-1], -1]):
        ddim = diffusers_ddim(t, t_prev)
        ddim.alphas_cumprod = torch.tensor(ABAR)  # float64, so that ten steps do not add up rounding
        ddim.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
        x = ddim.step(toy(x, t)[0], t, x).prev_sample
    close(got, x)


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_dpm_sampler_against_diffusers(grid, eta):
    ts, x, noise = GRIDS[grid], normal(2, 1, 4, 4).double(), normal(9, 2, 1, 4, 4, seed=5)
    got = sample(toy, x, NoiseScheduler_Fast_DDPM(grid=grid), solver="dpm++2m", eta=eta, noise=iter(noise))
    dpm = DPMSolverMultistepScheduler(
        beta_start=1e-4, beta_end=0.02, algorithm_type="sde-dpmsolver++" if eta else "dpmsolver++", solver_order=2,
        solver_type="midpoint", final_sigmas_type="zero",
    )  # fmt: skip
    dpm.set_timesteps(timesteps=ts[::-1])
    sigmas = np.sqrt((1 - ABAR[ts[::-1]]) / ABAR[ts[::-1]])
    np.testing.assert_allclose(dpm.sigmas[:-1], sigmas, rtol=1e-3)
    dpm.sigmas = torch.tensor([*sigmas, 0.0])  # the same numbers without float32's rounding
    for t, new in zip(dpm.timesteps, [*noise, noise[0]]):
        x = dpm.step(toy(x, int(t))[0], t, x, variance_noise=new).prev_sample
    close(got, x)


def flow_time(t):
    """s of rectified flow, and the size of x_t beside the point of the straight line there."""
    a, b = (np.sqrt(abar64(t)), np.sqrt(1 - abar64(t)))
    return b / (a + b), a + b


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_rectified_flow_against_diffusers(solver):
    """Euler's method is our DDIM, and Heun's our heun, on the line from the image to the noise."""
    ts, x = GRIDS["flow"][::-1], normal(2, 1, 4, 4)
    scheduler = NoiseScheduler_Fast_DDPM(grid="flow")
    got = [x for _, x, _ in sample_steps(toy, x, scheduler, solver=solver)][-1]
    times = [flow_time(t)[0] for t in ts]
    theirs = FlowMatchHeunDiscreteScheduler() if solver == "heun" else FlowMatchEulerDiscreteScheduler()
    twice = [times[0], *np.repeat(times[1:], 2)] if solver == "heun" else times
    theirs.set_timesteps(10)
    theirs.sigmas = torch.tensor([*twice, 0.0])
    theirs.timesteps, theirs._step_index = theirs.sigmas[:-1] * 1000, 0
    line = x / flow_time(ts[0])[1]
    for s, t in zip(theirs.timesteps, [ts[0], *np.repeat(ts[1:], 2)] if solver == "heun" else ts):
        eps, x0 = toy(line.double() * flow_time(t)[1], t)
        line = theirs.step(eps - x0, s, line).prev_sample
    close(got, line, 1e-4)


def test_heun_is_of_second_order_and_straight_lines_need_one_step():
    # Latents of deviation 0.3: the right denoiser, and what the exact solution makes of x_T = 1.
    def denoise(x, t):
        a, b = math.sqrt(ABAR[t]), math.sqrt(1 - ABAR[t])
        x0 = a * 0.09 * x / (a**2 * 0.09 + b**2)
        return (x - a * x0) / b, x0

    def error(solver, n):
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        end = sample(denoise, x, NoiseScheduler_Fast_DDPM(), make_grid("flow", n, ABAR), solver=solver)
        return abs(end.item() - 0.3 / math.sqrt(ABAR[999] * 0.09 + 1 - ABAR[999]))

    assert error("heun", 40) < error("heun", 20) / 3 and error("heun", 20) < error("ddim", 40) / 3
    # noise and image that don't change along the way
    scheduler = NoiseScheduler_Fast_DDPM()
    x0, eps = normal(2, 1, 4, 4, seed=1).double(), normal(2, 1, 4, 4, seed=2).double()
    x_t = math.sqrt(ABAR[999]) * x0 + math.sqrt(1 - ABAR[999]) * eps
    for grid in ([999], [300, 999]):
        close(sample(lambda x, t: (eps, x0), x_t, scheduler, grid, solver="heun"), x0)


def spread64(grid, solver, s):
    """What one unit of x_T becomes under the exact denoiser of N(0, s^2): every step is a multiplication."""
    r, last, lam_last = 1.0, None, None
    for t, t_prev in zip(grid[::-1], [*grid[-2::-1], -1]):
        a, b, p, q = *np.sqrt([ABAR[t], 1 - ABAR[t]]), *np.sqrt([abar64(t_prev), 1 - abar64(t_prev)])
        x0 = a * s**2 * r / (a**2 * s**2 + b**2)
        lam = np.log(a / b)
        if solver == "ddim" or t_prev < 0:
            r = p * x0 + q * (r - a * x0) / b
        else:
            h = np.log(p / q) - lam
            d = x0 if last is None else x0 + (x0 - last) * h / (2 * (lam - lam_last))
            r = q / b * r + p * (1 - np.exp(-h)) * d
        last, lam_last = x0, lam
    return r / s


def spread_of_sampler(scheduler, **how):
    s = torch.tensor(S, dtype=torch.float32)[:, None, None, None]

    def denoise(x, t):
        a, b = math.sqrt(ABAR[t]), math.sqrt(1 - ABAR[t])
        x0 = a * s**2 * x / (a**2 * s**2 + b**2)
        return (x - a * x0) / b, x0

    return sample(denoise, torch.ones(len(S), 1, 1, 1), scheduler, **how).flatten().double().numpy() / S


@pytest.mark.parametrize("solver", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("grid", [*GRIDS, "full"])
def test_spread_follows_the_closed_form(grid, solver):
    ts = GRIDS.get(grid, list(range(1000)))
    got = spread_of_sampler(NoiseScheduler_Fast_DDPM(grid=grid), timesteps=ts, solver=solver)
    np.testing.assert_allclose(got, [spread64(ts, solver, s) for s in S], rtol=0.01)
    if (grid, solver) in TABLE:
        np.testing.assert_allclose(got, TABLE[grid, solver], rtol=0.01)


def test_default_grid_and_solver_keep_the_spread():
    np.testing.assert_allclose(spread_of_sampler(NoiseScheduler_Fast_DDPM()), 1, atol=0.05)


def test_weights_of_the_full_grid_are_sampled_in_ten_steps_by_default():
    got = spread_of_sampler(NoiseScheduler_Fast_DDPM(grid="full"))
    np.testing.assert_allclose(got, TABLE["logsnr", "dpm++2m"], rtol=0.01)


@pytest.mark.parametrize("solver, steps, eta", [("ddim", 1000, 1), ("dpm++2m", 20, 1), ("dpm++2m", 20, 0.5)])
def test_new_noise_keeps_the_spread(solver, steps, eta):
    s, scheduler = torch.tensor([0.5, 1.5])[:, None, None, None], NoiseScheduler_Fast_DDPM(grid="full")

    def denoise(x, t):
        a, b = math.sqrt(ABAR[t]), math.sqrt(1 - ABAR[t])
        x0 = a * s**2 * x / (a**2 * s**2 + b**2)
        return (x - a * x0) / b, x0

    x, noise = start_noise(0, [0, 1], (1, 64, 64))
    x = sample(denoise, x, scheduler, make_grid("logsnr", steps, ABAR), solver=solver, eta=eta, noise=noise)
    sd = x.flatten(1).std(dim=1) / s.flatten()
    assert ((sd - 1).abs() < 0.05).all()  # 4096 scalars: sd of the estimate is 1.1 %


def test_every_step_can_be_looked_at():
    x = normal(1, 1, 4, 4).double()
    end = sample(toy, x, NoiseScheduler_Fast_DDPM())
    seen = list(sample_steps(toy, x, NoiseScheduler_Fast_DDPM()))
    assert [t for t, _, _ in seen] == [*GRIDS["logsnr"][-2::-1], -1]
    assert torch.equal(seen[-1][1], end)
    close(seen[0][2], toy(x, 999)[1])  # x0 is the estimate that the step was made from


def test_one_network_call_per_step():
    for solver in ("ddim", "dpm++2m"):
        calls = []
        sample(lambda x, t, c=calls: (c.append(t), toy(x, t))[1], normal(1, 1, 2, 2), NoiseScheduler_Fast_DDPM(),
               solver=solver)  # fmt: skip
        assert calls == GRIDS["logsnr"][::-1]


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="euler"):
        sample(toy, normal(1, 1, 2, 2), NoiseScheduler_Fast_DDPM(), solver="euler")


# ---------------------------------------------------------------------------------------------------------------------
# StableDiffusion


class Oracle(nn.Module):
    """A network that knows the answer."""

    config = {"conditions": []}

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, t, y):
        return self.answer


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
def test_the_right_answer_has_no_loss_and_gives_back_the_image(prediction):
    t = torch.tensor(GRIDS["logsnr"])
    z, noise = normal(10, 2, 8, 8, seed=1), normal(10, 2, 8, 8, seed=2)
    a = torch.tensor(ABAR)[t][:, None, None, None]
    v = a.sqrt() * noise.double() - (1 - a).sqrt() * z.double()  # the derivative of x_t in the angle
    right = {"v": v, "eps": noise, "flow": noise - z}[prediction].float()
    model = tiny_diffusion((), prediction)
    model.unet = Oracle(right)
    loss, x0 = model(z, t, noise)
    assert loss.shape == (10,) and loss.max() < 1e-9
    close(x0, z, 2e-4)  # eps: rounding comes back 158 times larger at t = 999

    x_t = (a.sqrt() * z.double() + (1 - a).sqrt() * noise.double()).float()
    for k, step in enumerate(t.tolist()):
        model.unet.answer = right[k : k + 1]
        eps, x0 = model.denoiser()(x_t[k : k + 1], step)
        close(eps, noise[k : k + 1])
        close(x0, z[k : k + 1], 2e-4)


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
def test_loss_is_the_mean_square_per_image(prediction):
    model, t = tiny_diffusion((), prediction), torch.tensor([0, 410, 999])
    z, noise = normal(3, 2, 8, 8, seed=1), normal(3, 2, 8, 8, seed=2)
    model.unet = Oracle(torch.zeros(3, 2, 8, 8))
    a = ABAR[t][:, None, None, None]
    v = np.sqrt(a) * noise.double().numpy() - np.sqrt(1 - a) * z.double().numpy()
    target = {"v": v, "eps": noise.double().numpy(), "flow": (noise - z).double().numpy()}[prediction]
    close(model(z, t, noise)[0], (target**2).mean(axis=(1, 2, 3)))


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
def test_min_snr_weights_against_numpy(prediction):
    model, t = StableDiffusion(tiny_unet(()), NoiseScheduler_Fast_DDPM(), prediction, "min_snr"), torch.arange(1000)
    snr = ABAR / (1 - ABAR)
    over = {"v": snr + 1, "eps": snr, "flow": (1 + np.sqrt(snr)) ** 2}[prediction]
    close(model.weight(t), np.minimum(snr, 5) / over, 1e-4)
    assert (tiny_diffusion((), prediction).weight(t) == 1).all()


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
def test_denoiser_splits_x_into_signal_and_noise(prediction):
    denoise, x = tiny_diffusion((), prediction).denoiser(), normal(2, 2, 8, 8)
    for t in GRIDS["logsnr"]:
        eps, x0 = denoise(x, t)
        close(math.sqrt(ABAR[t]) * x0 + math.sqrt(1 - ABAR[t]) * eps, x)


def test_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="x0"):
        StableDiffusion(tiny_unet(), NoiseScheduler_Fast_DDPM(), "x0")


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
@pytest.mark.parametrize("w", [-1.0, 0.0, 0.5, 1.0, 3.0])
def test_guidance_is_linear_between_no_class_and_class(prediction, w):
    model, x = tiny_diffusion((2, 0), prediction), normal(3, 2, 8, 8)
    y, none = torch.tensor([[0, 0.5], [1, -1], [1, NAN]]), torch.full((3, 2), NAN)
    batches = []
    model.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    got = model.denoiser(y, guidance=w)(x, 410)
    assert batches == [3 if w == 1 else 6]  # both halves in one call, and no second half when it would not count
    with_y, without = model.denoiser(y)(x, 410), model.denoiser(none)(x, 410)
    assert not torch.allclose(with_y[0], without[0], atol=1e-3)
    for g, c, n in zip(got, with_y, without):  # eps and x0 are both affine in the output
        close(g, n + w * (c - n))


def test_guidance_away_from_other_conditions():
    model, x = tiny_diffusion(), normal(2, 2, 8, 8)
    y, other = torch.tensor([[0, 0.5], [1, -1]]), torch.tensor([[1, 0.5], [1, 1]])
    for w, end in ((0.0, other), (1.0, y)):
        close(model.denoiser(y, w, away_from=other)(x, 410)[0], model.denoiser(end)(x, 410)[0])


def test_no_conditions_mean_unknown():
    model, x = tiny_diffusion(), normal(2, 2, 8, 8)
    close(model.denoiser(None, guidance=3.0)(x, 73)[0], model.denoiser(torch.full((2, 2), NAN))(x, 73)[0])


def test_unconditional_network_takes_rows_without_conditions():
    model, x = tiny_diffusion(()), normal(2, 2, 8, 8)
    a, b = model.denoiser(torch.zeros(2, 0), guidance=4.0)(x, 73), model.denoiser()(x, 73)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_conditions_are_hidden_together_and_one_by_one():
    n, g = 20_000, torch.Generator().manual_seed(0)
    one, two = (
        step_randomness(tiny_diffusion(c), n, (2, 8, 8), TrainConfig(class_dropout=0.1), g)[2] for c in ((2,), (2, 0))
    )
    rate = 4 * math.sqrt(0.09 / n)
    assert one.shape == (n, 1) and abs(one.float().mean() - 0.1) < rate
    # Both of two: a tenth together, and besides a hundredth of the rest by chance; each alone: 0.9 x 0.1 x 0.9.
    for hidden, share in ((two.all(1), 0.1 + 0.9 * 0.01), (two[:, 0] & ~two[:, 1], 0.081), (~two.any(1), 0.729)):
        assert abs(hidden.float().mean() - share) < 1.5 * rate


def test_a_hidden_condition_is_not_seen():
    model, (z, noise) = tiny_diffusion(), normal(2, 4, 2, 8, 8)
    shown = torch.tensor([[0, 0.5], [1, -1], [0, 0], [1, 1]])
    losses = []
    for hide in ([[True, True]] * 4, [[True, False]] * 4):
        for y in (shown, shown.roll(1, 0)):
            entries, mirror = torch.arange(4), torch.zeros(4)
            moments = torch.stack([z, torch.zeros_like(z)], 1)[:, None]
            rows = [mirror, torch.zeros_like(z), torch.tensor(hide), entries, noise]
            losses.append(training_loss(model, model, moments, y, rows, 1)[0])
    assert torch.equal(losses[0], losses[1]) and not torch.allclose(losses[2], losses[3], atol=1e-4)


def test_variants_are_of_people_who_differ_a_little():
    """A disc stays a disc of about the same size and place, black stays black, and a generator says which variant."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 64)] * 2, indexing="ij")
    disc = torch.where((x / 0.6) ** 2 + (y / 0.8) ** 2 < 1, 0.3 + 0.2 * (12 * x).sin(), -1.0).expand(16, 1, 64, 64)
    varied = vary(disc, generator(0, 19, 1, 0))
    assert torch.equal(varied, vary(disc, generator(0, 19, 1, 0))) and varied.min() == -1 and varied.max() <= 1
    assert (varied - disc).abs().mean(dim=(1, 2, 3)).min() > 0.01
    assert torch.equal(varied[..., :3, :], torch.full_like(varied[..., :3, :], -1))

    def of(image: torch.Tensor) -> torch.Tensor:  # area, and centre on each axis
        mass = (image > -0.4).float()
        area = mass.mean(dim=(1, 2, 3))
        return torch.stack([area, *((mass * v).mean(dim=(1, 2, 3)) / area for v in (x, y))])

    area, *centre = of(varied)
    assert (area / of(disc)[0] - 1).abs().max() < 0.1 and torch.stack(centre).abs().max() < 0.04
    assert area.std() > 0.005  # not all alike


@pytest.mark.parametrize("v", [-1.3, -1.0, 0.0, 0.31, 1.0])
def test_number_embedding_against_numpy(v):
    layer = NumberEmbedding(6).double()
    phases = 2 * np.pi * np.array(NumberEmbedding.FREQUENCIES) * v
    features = np.concatenate([[v], np.sin(phases), np.cos(phases)])
    w1, b1, w2, b2 = (p.detach().numpy() for p in layer.mlp.parameters())
    h = w1 @ features + b1
    got = layer(torch.tensor([v, NAN], dtype=torch.float64)).detach()
    close(got[0], w2 @ (h / (1 + np.exp(-h))) + b2, 1e-6)
    assert torch.equal(got[1], layer.unknown)


def test_category_embedding_has_a_row_for_each_value_and_one_for_unknown():
    layer = CategoryEmbedding(3, 4)
    got = layer(torch.tensor([2.0, 0.0, NAN]))
    assert layer.weight.shape == (4, 4) and torch.equal(got, layer.weight[[2, 0, 3]])


@pytest.mark.parametrize("how", [dict(solver="ddim", eta=1.0), dict(solver="dpm++2m")])
def test_image_k_is_the_same_in_any_batch(how):
    model, y = tiny_diffusion(), torch.stack([torch.arange(16) % 2, torch.linspace(-1, 1, 16)], 1)
    batches = {}
    for size in (1, 3, 16):
        parts = [torch.arange(16)[i : i + size] for i in range(0, 16, size)]
        batches[size] = torch.cat([model.generate((2, 8, 8), 7, p.tolist(), y[p], guidance=2.0, **how) for p in parts])
    assert batches[16].shape == (16, 2, 8, 8) and batches[16].std() > 0.1
    assert torch.allclose(batches[1], batches[16], atol=1e-4)
    assert torch.allclose(batches[3], batches[16], atol=1e-4)
    assert not torch.allclose(batches[16][0], batches[16][2], atol=0.1)  # and image k is not image j
    other = model.generate((2, 8, 8), 8, [0], y[:1], guidance=2.0, **how)
    assert not torch.allclose(batches[16][:1], other, atol=0.1)  # nor another seed's


def test_arithmetic_is_float32_when_the_network_is_not():
    model = tiny_diffusion()
    model.amp_dtype = torch.bfloat16
    kinds = []
    model.unet.out.register_forward_hook(lambda m, i, out: kinds.append(out.dtype))
    loss, x0 = model(normal(2, 2, 8, 8), torch.tensor([0, 999]), normal(2, 2, 8, 8, seed=1), ROWS[:2])
    eps, _ = model.denoiser(ROWS[:2], 2.0)(normal(2, 2, 8, 8), 22)
    assert set(kinds) == {torch.bfloat16}  # the cast did take place
    assert loss.dtype == x0.dtype == eps.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# The U-Net


@pytest.mark.parametrize(
    "how",
    [{}, dict(conditions=()), dict(channels=(8, 8, 16), blocks=2, attention=(8, 2)), dict(patch=2, attention=(2,))],
)
def test_unet_shape_and_rebuilding_from_its_config(how):
    net = tiny_unet(**how).eval()
    again = UNet(**net.config).eval()
    again.load_state_dict(net.state_dict())
    x, t, y = normal(3, 2, 8, 8), torch.tensor([0, 500, 999]), ROWS
    out = net(x, t, y)
    assert out.shape == x.shape and out.abs().min() > 0
    assert torch.equal(out, again(x, t, y))


def test_unet_starts_as_zero():
    assert not UNet(1, 8, (8, 8), 1, ())(normal(1, 1, 8, 8), torch.tensor([3])).any()


def test_every_parameter_of_the_unet_learns():
    net = tiny_unet(channels=(40, 48))  # widths with several channels in a norm's group
    net(normal(3, 2, 8, 8), torch.tensor([0, 500, 999]), ROWS).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_unet_depends_on_time_and_every_condition():
    net, x = tiny_unet().eval(), normal(1, 2, 8, 8)
    a = net(x, torch.tensor([10]), torch.tensor([[0, 0.5]]))
    for t, row in ((900, [0, 0.5]), (10, [1, 0.5]), (10, [0, -0.5]), (10, [NAN, 0.5]), (10, [0, NAN])):
        assert not torch.allclose(a, net(x, torch.tensor([t]), torch.tensor([row])), atol=1e-3), (t, row)


@pytest.mark.parametrize(("attention", "count"), [((), 0), ((8,), 3), ((4,), 4), ((16, 4), 7)])
def test_attention_only_at_the_named_resolutions(attention, count):
    net, sides = UNet(1, 16, (8, 8, 8), 1, attention), []
    for m in net.modules():
        if isinstance(m, AttentionBlock):
            m.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1]))
    net(normal(1, 1, 16, 16), torch.tensor([5]))
    assert set(sides) == set(attention) and len(sides) == count


def test_unet_refuses_a_resolution_that_cannot_be_halved():
    with pytest.raises(ValueError, match="12x12"):
        UNet(1, 12, (8, 8, 8, 8))


def test_a_patched_unet_is_the_unet_of_rearranged_pixels():
    patched, plain = tiny_unet(patch=2, attention=(2,)), tiny_unet(in_channels=8, resolution=4, attention=(2,))
    plain.load_state_dict(patched.state_dict())
    x, t, y = normal(3, 2, 8, 8), torch.tensor([0, 500, 999]), ROWS
    # row i, column j of every 2 x 2 patch are channels of their own, channel by channel
    rows = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=2).flatten(1, 2)
    out, want = patched(x, t, y), plain(rows, t, y).unflatten(1, (2, 4))
    for k in range(4):
        torch.testing.assert_close(out[:, :, k // 2 :: 2, k % 2 :: 2], want[:, :, k])


def test_unet_refuses_patches_that_do_not_fit():
    with pytest.raises(ValueError, match="patches of 3"):
        UNet(1, 8, (8, 8), patch=3)


@pytest.mark.parametrize("channels", [8, 96, 128])
def test_attention_against_numpy(channels):
    block, x = wake(AttentionBlock(channels)), normal(2, channels, 3, 2)
    heads = max(1, channels // 64)
    qkv = block.qkv(block.norm(x)).detach().double().numpy().reshape(2, 3, heads, channels // heads, 6)
    q, k, v = qkv[:, 0], qkv[:, 1], qkv[:, 2]  # [B, heads, c, HW]
    score = np.einsum("bhci,bhcj->bhij", q, k) / np.sqrt(channels // heads)
    score = np.exp(score - score.max(-1, keepdims=True))
    out = np.einsum("bhij,bhcj->bhci", score / score.sum(-1, keepdims=True), v).reshape(2, channels, 3, 2)
    w = block.proj.weight.detach().double().numpy()[:, :, 0, 0]
    want = x + np.einsum("oc,bcij->boij", w, out) + block.proj.bias.detach().double().numpy()[:, None, None]
    close(block(x).detach(), want, 1e-4)


def test_attention_takes_every_width():
    x = normal(1, 224, 2, 2)
    assert AttentionBlock(224)(x).shape == x.shape  # 224 is not a multiple of 3 heads


@pytest.mark.parametrize("channels", [1, 6, 32, 40, 96, 128])
def test_group_norm_divides_the_channels(channels):
    groups = group_norm(channels).num_groups
    assert channels % groups == 0 and groups <= 32
    assert not any(channels % g == 0 for g in range(groups + 1, 33))


def test_residual_block_starts_as_the_identity():
    x = normal(2, 8, 4, 4)
    assert torch.equal(ResidualBlock(8, 8, 4)(x, normal(2, 4)), x)
    assert torch.equal(ResidualBlock(8, 8)(x), x)


@maths
@given(t=st.lists(st.integers(0, 999), min_size=1, max_size=4), half=st.integers(1, 64))
def test_timestep_embedding_against_numpy(t, half):
    got = timestep_embedding(torch.tensor(t), 2 * half)
    angle = np.array(t)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    close(got, np.concatenate([np.cos(angle), np.sin(angle)], axis=1), 2e-4)  # float32 of an angle near 1000


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate and Lookahead


def cosine(base, warmup, total, low, k):
    if k < warmup:
        return base * (k + 1) / warmup
    return low + (base - low) * math.cos(0.5 * math.pi * min(1, (k - warmup) / max(1, total - warmup))) ** 2


@maths
@given(warmup=st.integers(0, 15), total=st.integers(1, 40), base=st.floats(1e-5, 1), low=st.sampled_from([0, 1e-6]))
def test_learning_rate_against_its_closed_form(warmup, total, base, low):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": b} for b in (base, 3 * base)], lr=1.0)
    scheduler = CosineAnnealingWarmupScheduler(optimizer, warmup, total, low)
    for k in range(45):
        want = [cosine(b, warmup, total, low, k) for b in (base, 3 * base)]
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(want, rel=1e-6, abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_learning_rate_resumes():
    def make():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, CosineAnnealingWarmupScheduler(optimizer, 4, 20)

    (a, sa), (b, sb) = make(), make()
    for _ in range(7):
        a.step(), sa.step()
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    sb.load_state_dict(copy.deepcopy(sa.state_dict()))
    for k in range(7, 20):
        assert a.param_groups[0]["lr"] == b.param_groups[0]["lr"] == pytest.approx(cosine(0.1, 4, 20, 0, k))
        a.step(), sa.step(), b.step(), sb.step()


INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
}


def descend(params, optimizer, steps, first=0):
    """Noisy gradients of a bowl, the same for the same step number."""
    for k in range(first, first + steps):
        for i, p in enumerate(params):
            p.grad = p.detach() + 0.3 * normal(*p.shape, seed=10 * k + i).to(p)
        optimizer.step()


@pytest.mark.parametrize("inner", INNER)
def test_lookahead_against_algorithm_1(inner):
    params = [nn.Parameter(normal(3).double()), nn.Parameter(normal(2, 2, seed=1).double())]
    fast = [nn.Parameter(p.detach().clone()) for p in params]
    slow = [p.detach().clone().numpy() for p in params]
    ahead, plain = Lookahead(INNER[inner](params), k=5, alpha=0.3), INNER[inner](fast)
    for k in range(12):
        descend(params, ahead, 1, k)
        descend(fast, plain, 1, k)
        if k % 5 == 4:
            slow = [s + 0.3 * (f.detach().numpy() - s) for s, f in zip(slow, fast)]
            for f, s in zip(fast, slow):
                f.data.copy_(torch.from_numpy(s))
        for p, f in zip(params, fast):
            close(p.detach(), f.detach(), 1e-12)


@pytest.mark.parametrize("inner", INNER)
def test_lookahead_resumes(inner):
    def make():
        params = [nn.Parameter(normal(3))]
        return params, Lookahead(INNER[inner](params))

    straight, a = make()
    descend(straight, a, 13)
    first, b = make()
    descend(first, b, 7)
    state, weights = copy.deepcopy(b.state_dict()), first[0].detach().clone()
    second, c = make()
    second[0].data.copy_(weights)
    c.load_state_dict(state)
    descend(second, c, 6, 7)
    assert torch.equal(second[0], straight[0])


def test_learning_rate_reaches_the_optimiser_inside_lookahead():
    params = [nn.Parameter(torch.zeros(2))]
    ahead = Lookahead(torch.optim.SGD(params, lr=1.0))
    for _ in range(2):  # as made, and after loading, which replaces the inner optimiser's groups
        before = params[0].detach().clone()
        CosineAnnealingWarmupScheduler(ahead, 10, 20)  # first step at a tenth of the rate
        params[0].grad = torch.ones(2)
        ahead.step()
        torch.testing.assert_close(params[0].detach(), before - 0.1)
        state = copy.deepcopy(ahead.state_dict())
        state["inner"]["param_groups"][0].update(lr=1.0, initial_lr=1.0)
        ahead.load_state_dict(state)


def test_lookahead_clears_gradients():
    p = nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    Lookahead(torch.optim.SGD([p], lr=1.0)).zero_grad()
    assert p.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_diffusion(path, net, **changes):
    meta = dict(kind="diffusion", model=net.unet.config, scheduler=net.scheduler.config, prediction="v")
    save_weights(path, net, meta | changes)


def test_load_diffusion_gives_the_same_model(tmp_path):
    path, model = tmp_path / "best.safetensors", tiny_diffusion((2,), grid="uniform")
    write_diffusion(path, model, classes=["AD", "NC"])
    again, meta = load_diffusion(path, torch.device("cpu"))
    assert meta["classes"] == ["AD", "NC"]
    assert again.scheduler.timesteps.tolist() == GRIDS["uniform"]
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    how = dict(shape=(2, 8, 8), seed=3, indices=[0, 1], y=ROWS[:2])
    assert torch.allclose(again.generate(**how), model.generate(**how), atol=1e-6)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_load_diffusion_refuses_other_files(tmp_path):
    path, model = tmp_path / "best.safetensors", tiny_diffusion(())
    with pytest.raises(UserError, match="no weights"):
        load_diffusion(path, torch.device("cpu"))

    vae = VAE(16, 4, 2, (8, 8), 1)
    save_weights(path, vae, dict(kind="vae", model=vae.config, finished=True))
    with pytest.raises(UserError, match="diffusion"):
        load_diffusion(path, torch.device("cpu"))

    path.write_bytes(pickle.dumps(Evil(str(tmp_path / "pwned"))))
    with pytest.raises(UserError, match="pickle"):
        load_diffusion(path, torch.device("cpu"))
    assert not (tmp_path / "pwned").exists()  # opened, never executed

    write_diffusion(path, model)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            load_diffusion(path, torch.device("cpu"))


def test_load_diffusion_refuses_what_it_cannot_build(tmp_path):
    path, model = tmp_path / "best.safetensors", tiny_diffusion(())
    for wrong in (
        dict(model=model.unet.config | {"flavour": 1}),
        dict(model=None),
        dict(model=model.unet.config | {"channels": [8, 8]}),  # builds, but the weights are of another width
        dict(scheduler=dict(grid="cosine")),
        dict(prediction="x0"),
        dict(format=0),
    ):
        write_diffusion(path, model, **wrong)
        with pytest.raises(UserError, match="best.safetensors"):
            load_diffusion(path, torch.device("cpu"))
