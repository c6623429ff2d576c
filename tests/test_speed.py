"""What is done for speed changes nothing: rows fetched ahead, compiled networks, drawing in batches, attention."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import PATIENCE, ROOT, TINY_UNET, run, run_any
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pictures
from device import allocate_rows, compile_networks, gather_batches, read_ahead, shuffled_batches
from modules import NoiseScheduler_Fast_DDPM, StableDiffusion, UNet, attend, group_norm
from predict import one_ahead
from sampling import ImageSampler
from utils import generator, read_jsonl
from vae import VAE

cpu = torch.device("cpu")


def awake(module: nn.Module) -> nn.Module:
    """Layers that start at zero get weights: else half of a network says nothing."""
    g = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return module


@pytest.fixture
def pair() -> tuple[StableDiffusion, VAE]:
    torch.manual_seed(0)
    vae = awake(VAE(32, 4, 2, (8, 16), 1)).eval().requires_grad_(False)
    vae.latent_std.fill_(2.0)
    unet = awake(UNet(2, 8, (8, 16), 1, (4,), (2,)))
    return StableDiffusion(unet, NoiseScheduler_Fast_DDPM()).eval().requires_grad_(False), vae


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 50), st.integers(0, 9))
def test_the_order_is_a_permutation_an_epoch_and_can_be_entered_anywhere(n: int, batch: int, step: int, seed: int):
    batch = min(n, batch)
    steps = n // batch
    whole = list(islice(shuffled_batches(n, batch, 0, seed, 3), step + 3 * steps))
    for epoch in range(3):
        seen = torch.cat(whole[epoch * steps : (epoch + 1) * steps])
        assert len(seen.unique()) == len(seen) == steps * batch and 0 <= seen.min() and seen.max() < n
    for a, b in zip(whole[step:], islice(shuffled_batches(n, batch, step, seed, 3), 3 * steps)):
        assert torch.equal(a, b)


def test_orders_differ_between_epochs_seeds_and_purposes():
    first, second = islice(shuffled_batches(50, 50, 0, 0, 3), 2)
    others = [next(shuffled_batches(50, 50, 0, *seed)) for seed in ((1, 3), (0, 1))]
    for a, b in ((first, second), (first, others[0]), (first, others[1])):
        assert not torch.equal(a, b)


def test_visits_are_rows_of_every_tensor():
    x, y = torch.randn(20, 3, 2), torch.arange(20)
    order = list(islice(shuffled_batches(20, 6, 0, 5), 7))
    for index, (a, b) in zip(order, gather_batches([x, y], order, cpu), strict=True):
        assert torch.equal(a, x[index]) and torch.equal(b, index)


def test_reading_ahead_keeps_the_order_stays_close_and_passes_errors_on():
    made, taken, lock = [], [], threading.Lock()

    def make(i: int) -> int:
        with lock:
            made.append(i)
        if i == 30:
            raise OSError("the disk is gone")
        return i * i

    def endless():
        i = 0
        while True:
            yield i
            i += 1

    with pytest.raises(OSError, match="the disk is gone"):
        for value in read_ahead(make, endless(), depth=3):
            taken.append(value)
            with lock:
                assert len(made) <= len(taken) + 3
    assert taken == [i * i for i in range(30)]
    assert list(read_ahead(str, range(2), depth=5)) == ["0", "1"] and list(read_ahead(str, [])) == []


def test_memory_beyond_half_of_the_machine_is_a_nameless_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = allocate_rows((4, 3), torch.float16, tmp_path)
    assert small.shape == (4, 3) and small.dtype == torch.float16
    monkeypatch.setattr(os, "sysconf", lambda name: 8)  # a machine of 64 bytes
    big = allocate_rows((500, 3, 4), torch.float16, tmp_path)
    values = torch.randn(500, 3, 4).half()
    big[:] = values
    assert torch.equal(big[torch.tensor([7, 3])], values[[7, 3]]) and list(tmp_path.iterdir()) == []
    assert any(
        "(deleted)" in line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    )


# ---------------------------------------------------------------------------------------------------------------------
# Networks


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 4, 16, 64, 256]), st.sampled_from([4, 16, 64]))
def test_attention_by_hand_is_the_fused_one(b: int, heads: int, n: int, d: int):
    q, k, v = torch.randn(3, b, heads, n, d, generator=torch.Generator().manual_seed(n + d)).double()
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "least", "groups"), [(96, 24, 4), (96, 1, 32), (64, 24, 2), (8, 24, 1), (1024, 24, 32), (160, 24, 5)]
)
def test_groups_have_at_least_so_many_channels(channels: int, least: int, groups: int):
    assert group_norm(channels, least).num_groups == groups


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-4), (torch.bfloat16, 1e-2)])
def test_compiled_networks_give_the_eager_values_and_gradients(dtype: torch.dtype | None, tolerance: float):
    torch.manual_seed(0)  # one level: every kind of layer, and few to compile
    vae = awake(VAE(32, 4, 2, (8,), 1)).eval()
    model = StableDiffusion(awake(UNet(2, 8, (8,), 1, (8,), (2, 0))), NoiseScheduler_Fast_DDPM()).eval()
    z, y = (
        torch.randn(4, 2, 8, 8, generator=generator(1)),
        torch.tensor([[0, 0.5], [1, -1], [math.nan, 0], [0, math.nan]]),
    )
    t, noise = torch.tensor([0, 22, 410, 999]), torch.randn(4, 2, 8, 8, generator=generator(2))
    networks = [model.unet, vae.decoder]

    def everything(amp_dtype: torch.dtype | None = dtype) -> list[torch.Tensor]:
        model.amp_dtype = vae.amp_dtype = amp_dtype
        (loss, x0), image = model(z, t, noise, y), vae.reconstruct(z)
        grads = torch.autograd.grad(loss.mean() + image.square().mean(), [p for n in networks for p in n.parameters()])
        return [loss, x0, image, torch.cat([g.flatten() for g in grads])]

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return ((a - b).norm() / b.norm()).item()

    eager, exact = everything(), everything(None)
    assert compile_networks("on", networks, everything, cpu)
    assert all("forward" in vars(n) for n in networks)
    for a, b, c in zip(everything(), eager, exact):  # fused, a chain of layers is rounded less often
        assert error(a, b) < tolerance or error(a, c) < error(b, c)


def test_a_network_that_cannot_be_compiled_stays_as_it_is(capsys: pytest.CaptureFixture):
    """The short form of the test below."""
    layer = nn.Linear(8, 8)

    def fail() -> None:
        raise RuntimeError("no compiler")

    assert not compile_networks("on", [layer], fail, cpu) and "forward" not in vars(layer)
    assert "torch.compile cannot be used here, going on without" in capsys.readouterr().err


def test_compiling_is_for_gpus_unless_asked_for(pair):
    called = []
    for choice in ("off", "auto"):
        assert not compile_networks(choice, [pair[0].unet], lambda: called.append(1), cpu)
    assert not called and "forward" not in vars(pair[0].unet)


@pytest.mark.full
def test_without_a_compiler_training_goes_on_and_says_so(trained: Path, phantoms: Path, tmp_path: Path):
    shutil.copytree(trained / "tiny" / "vae", tmp_path / "c" / "tiny" / "vae")
    where = ["--data", phantoms, "--checkpoints", tmp_path / "c", "--cache", tmp_path / "cache", "--run", "tiny"]
    env = {**os.environ, "CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = run(
        "train.py", *where, *TINY_UNET, "--epochs", "2", "--sample-every", "2", "--compile", "on", env=env, cold=True
    )
    assert done.stderr.count("torch.compile cannot be used here, going on without") == 1
    of = read_jsonl(trained / "tiny" / "diffusion" / "metrics.jsonl")[-1]
    again = read_jsonl(tmp_path / "c" / "tiny" / "diffusion" / "metrics.jsonl")[-1]
    assert again["loss/val"] == of["loss/val"] and again["loss/train"] == of["loss/train"]  # the trial left no trace


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


@pytest.mark.parametrize("how", [{}, {"solver": "ddim", "eta": 1.0}, {"solver": "dpm++2m", "eta": 1.0}])
def test_drawing_is_generating_and_decoding(pair, how: dict):
    model, vae = pair
    drawer, y = ImageSampler(model, vae, 4, 1.5, **how), torch.tensor([[1.0], [0], [1]])
    pixels, z = drawer(7, [5, 0, 10**9 + 2], y)
    want = model.generate(vae.latent_shape, 7, [5, 0, 10**9 + 2], y, 1.5, **how)
    torch.testing.assert_close(z, want)
    assert pixels.dtype == torch.uint8 and np.array_equal(pixels.numpy(), pictures.to_uint8(vae.decode(want)))


def test_one_ahead_makes_the_next_before_it_hands_out_one():
    log = []

    def make():
        for i in range(3):
            log.append(f"made {i}")
            yield i

    for i in one_ahead(make()):
        log.append(f"got {i}")
    assert log == ["made 0", "made 1", "got 0", "made 2", "got 1", "got 2"]
    assert list(one_ahead([])) == []


def test_a_file_that_cannot_be_written_stops_drawing_in_one_sentence(trained: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    flags = ["--checkpoints", trained, "--run", "tiny", "--num-images", "4", "--out", tmp_path / "out" / "o"]
    run("predict.py", *flags)
    folder = tmp_path / "out" / "o" / "train" / "AD"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("in the way")
    done = run_any("predict.py", *flags)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.full
@pytest.mark.parametrize("preset", ["small", "adni"])
@pytest.mark.parametrize("peer", ["diffusers", "MONAI"])
def test_peers_are_matched_in_size(preset: str, peer: str):
    python = ROOT / ".venv-bench" / "bin" / "python"  # make bench-env
    if not python.exists():
        pytest.importorskip(peer.lower())
        python = sys.executable
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); from common import *\n"
        f"b = Bench(BenchConfig(device='cpu', preset='{preset}')); PeerUNet(b, '{peer}'); PeerVAE(b, '{peer}')"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=PATIENCE, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count("M parameters") == 2


@pytest.mark.parametrize(
    "name",
    ["train_step", "train_epoch", "sample", "data", "scale", "profile_step", "evidence", "quality", "peers", "ship"],
)
def test_benchmarks_explain_themselves(name: str):
    done = run_any(f"benchmarks/{name}.py", "--help")
    assert done.returncode == 0 and ("--json" in done.stdout or "--out" in done.stdout)
