"""What only a GPU can show: half precision trains, no step waits, the GPU draws the CPU's images, as a graph too."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_UNET, TINY_VAE, run
from test_pipeline import images

from cluster import Ranks
from config import TrainConfig
from device import compile_networks, gather_batches, pick_device, shuffled_batches, to_device_if_it_fits
from loop import EMA, Gradients, NonFiniteWatch, find_micro_batch, make_optimizer, make_scaler, optimise
from modules import NoiseScheduler_Fast_DDPM, StableDiffusion, UNet
from sampling import ImageSampler
from train import backward, step_randomness
from utils import generator, read_jsonl
from vae import VAE, Texture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_the_scripts_set_it_up():
    pick_device("cuda")  # float32 means float32, not TF32


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_training_in_half_precision_follows_float32(precision: str, phantoms: Path, tmp_path: Path):
    losses = {}
    for name in ("fp32", precision):
        where = ["--data", phantoms, "--checkpoints", tmp_path, "--cache", tmp_path / "cache", "--run", name]
        flags = ["--epochs", "4", "--device", "cuda", "--precision", name]
        run("pre_train.py", *where, *TINY_VAE, *flags)
        run("train.py", *where, *TINY_UNET, *flags)
        losses[name] = [read_jsonl(tmp_path / name / part / "metrics.jsonl")[-1] for part in ("vae", "diffusion")]
    for full, half in zip(*losses.values()):
        assert half["loss/val"] == pytest.approx(full["loss/val"], rel=0.1)
        assert half["GPU memory (GB)"] > 0


def test_gpu_and_cpu_draw_the_same_images(trained: Path, tmp_path: Path):
    made = []
    for device in ("cuda", "cpu"):
        flags = ["--device", device, "--precision", "fp32", "--num-images", "4", "--out", tmp_path / device]
        run("predict.py", "--checkpoints", trained, "--run", "tiny", *flags)
        made.append(images(tmp_path / device))
    for name in made[0]:
        assert np.abs(made[0][name].astype(int) - made[1][name]).max() <= 2


def networks() -> tuple[StableDiffusion, VAE]:
    torch.manual_seed(0)
    vae = VAE(64, 4, 4, (32, 64), 1)
    model = StableDiffusion(UNet(4, 16, (32, 64), 1, (8,), (2, 0)), NoiseScheduler_Fast_DDPM())
    vae.texture = Texture(64, (16, 32), num_steps=2)
    for p in [*vae.parameters(), *model.parameters()]:
        p.data += 0.05 * torch.randn(p.shape)
    return tuple(m.cuda().to(memory_format=torch.channels_last) for m in (model, vae))


def gradients_of(model: StableDiffusion, batch: int, micro: int) -> tuple[Gradients, torch.optim.Optimizer]:
    """What train.py takes for its steps."""
    optimizer, scaler = make_optimizer(model.parameters(), TrainConfig()), make_scaler(model.amp_dtype, DEVICE)
    call = partial(backward, model, model, scaler, 10)
    return Gradients(call, [model], optimizer, scaler, 1.0, Ranks(DEVICE), batch, micro), optimizer


@pytest.mark.parametrize("on_the_host", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_no_step_waits_for_the_gpu(dtype: torch.dtype | None, on_the_host: bool):
    model, _ = networks()
    model.amp_dtype = dtype
    gradients, optimizer = gradients_of(model, 16, 16)
    ema, watch = EMA(model, 0.9), NonFiniteWatch(DEVICE)
    moments, conditions = torch.rand(64, 1, 2, 4, 16, 16).half(), torch.zeros(64, 2)
    if not on_the_host:
        moments, conditions = to_device_if_it_fits(moments, DEVICE), conditions.to(DEVICE)
    batches = gather_batches([moments, conditions], shuffled_batches(64, 16, 0, 0), DEVICE)
    try:
        for step in range(12):
            torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
            z, y = next(batches)
            randomness = step_randomness(model, len(y), z.shape[3:], TrainConfig(), generator(0, step, device=DEVICE))
            added, norm = gradients(z, y, *randomness)
            optimise(model, optimizer, ema, added)
            watch.stuck_at(norm, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gradients.replay is not None and all(p.isfinite().all() for p in ema.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 2e-2)])
def test_a_step_as_a_graph_has_the_gradients_of_its_micro_batches(dtype: torch.dtype | None, tolerance: float):
    found = []
    for micro in (16, 8):
        model, _ = networks()  # the same every time
        model.amp_dtype = dtype
        gradients, _ = gradients_of(model, 16, micro)
        for step in range(3):  # a replay does not remember the one before
            g = generator(0, step, device=DEVICE)
            z, y = (
                torch.rand(16, 1, 2, 4, 16, 16, generator=g, device=DEVICE).half(),
                torch.rand(16, 2, generator=g, device=DEVICE).round(),
            )
            added, norm = gradients(z, y, *step_randomness(model, 16, (4, 16, 16), TrainConfig(), g))
            flat = torch.cat([p.grad.flatten() for p in model.parameters()])
            found.append((flat, added.clone(), norm.clone()))
            model.zero_grad()
        assert (gradients.replay is not None) == (micro == 16)
    for graph, eager in zip(found[:3], found[3:]):
        for a, b in zip(graph, eager):
            assert ((a - b).norm() / b.norm()).item() < tolerance


@pytest.mark.parametrize("how", [{}, {"solver": "dpm++2m", "eta": 1.0}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 1e-2)])
def test_the_graph_draws_what_the_loop_draws(dtype: torch.dtype | None, tolerance: float, how: dict):
    model, vae = (m.eval().requires_grad_(False) for m in networks())
    model.amp_dtype = vae.amp_dtype = dtype
    graph = ImageSampler(model, vae, 8, 1.5, **how)
    assert graph.replay is not None
    y = torch.tensor([[0, 0.3], [1, -1], [0, math.nan], [1, 1], [math.nan, 0.5]])
    for first in (0, 100):  # a replay does not remember the one before
        indices = range(first, first + 5)
        want = model.generate(vae.latent_shape, 3, indices, y, 1.5, **how)
        pixels, z = graph(3, indices, y)
        assert ((z - want).norm() / want.norm()).item() < tolerance and pixels.shape == (5, 64, 64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 3e-2)])  # gradients: 1.4e-2 on an H100
def test_compiled_on_the_gpu_is_eager(dtype: torch.dtype | None, tolerance: float):
    model, _ = networks()
    model.amp_dtype = dtype
    z, noise = torch.randn(2, 8, 4, 16, 16, device="cuda")
    t, y = torch.arange(0, 800, 100, device="cuda"), torch.zeros(8, 2, device="cuda")

    def both() -> list[torch.Tensor]:
        loss, x0 = model(z, t, noise, y)
        return [x0, torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), model.unet.parameters())])]

    eager = both()
    assert compile_networks("auto", [model.unet], both, torch.device("cuda"))
    for a, b in zip(both(), eager):
        assert ((a - b).norm() / b.norm()).item() < tolerance


def test_micro_batch_auto_finds_what_fits():
    model, _ = networks()
    torch.cuda.empty_cache()
    asked, room = [], torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 300e6) / room)

    def trial(n: int) -> None:
        asked.append(n)
        z, t = torch.randn(n, 4, 16, 16, device="cuda"), torch.full((n,), 73, device="cuda")
        model(z, t, torch.randn_like(z), torch.zeros(n, 2, device="cuda"))[0].mean().backward()
        model.zero_grad()

    try:
        n = find_micro_batch("auto", 4096, model, 4, trial)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= n < 4096 and asked == [4096 // 2**i for i in range(len(asked))] and asked[-1] == n
