"""The machinery: whole files, logs that survive, averages, steps, signals, pictures, and errors in one sentence."""

import itertools
import json
import math
import os
import pickle
import resource
import signal
from dataclasses import asdict, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_any
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import cluster
import device
import loop
import pictures
import runlog
import utils
import weights
from cluster import Ranks
from config import PretrainConfig, TrainConfig
from modules import Lookahead
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
maths = settings(deadline=None, derandomize=True, max_examples=40)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def python(code, path=ROOT, cold=False, **env):
    """Run code in an interpreter of its own that finds the project, and `path` before it."""
    env = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", **env}
    return run_any("-c", code, env=env, cold=cold)


class Evil:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def leaves_with(error, capsys):
    def main(cfg):
        raise error

    with pytest.raises(SystemExit) as left:
        utils.run_script(main, TrainConfig())
    return left.value.code, capsys.readouterr().err


def test_what_a_person_can_cause_ends_in_one_sentence(capsys):
    code, err = leaves_with(UserError("the folder is empty: fill it"), capsys)
    assert (code, err) == (2, "error: the folder is empty: fill it\n")
    code, err = leaves_with(OSError(28, "No space left on device", "runs/last.pt"), capsys)
    assert code == 2 and err.startswith("error: runs/last.pt: No space left on device") and err.count("\n") == 1
    code, err = leaves_with(torch.OutOfMemoryError("CUDA out of memory"), capsys)
    assert code == 2 and "--batch-size 8" in err and "--micro-batch auto" in err and err.count("\n") == 1
    code, err = leaves_with(KeyboardInterrupt(), capsys)
    assert code == 130 and "Traceback" not in err


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("no number and no file")])
def test_bugs_are_not_dressed_up(error):
    with pytest.raises(type(error), match=str(error)):
        utils.run_script(lambda cfg: (_ for _ in ()).throw(error), None)


def test_any_name_can_be_printed():
    main = "def main(cfg):\n    print('q\\udce9 é')\n    raise utils.UserError('a\\nb\\udce9')\n"
    code = "import utils\n" + main + "utils.run_script(main, None)"
    done = python(code, PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stdout, done.stderr) == (2, "q\\udce9 \\xe9\n", "error: a b\\udce9\n")


def test_exit_codes_of_a_real_process():
    code = "import utils\ndef main(cfg): raise {}\nutils.run_script(main, None)"
    bad_luck = python(code.format("utils.UserError('put it right')"))
    assert bad_luck.returncode == 2 and bad_luck.stderr == "error: put it right\n"
    bug = python(code.format("ZeroDivisionError('a bug')"))
    assert bug.returncode == 1 and "Traceback" in bug.stderr and "ZeroDivisionError: a bug" in bug.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Device, precision, seeds


@pytest.mark.parametrize("name", ["banana", "cpu:x", "", "cuda:99", "xpu:7"])
def test_devices_that_are_not_there(name):
    with pytest.raises(UserError, match="--device"):
        device.pick_device(name)


def test_devices_that_are_there():
    assert device.pick_device("cpu") == torch.device("cpu")
    assert device.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else device.pick_device("auto").type)
    torch.zeros(1, device=device.pick_device("auto"))  # whatever it chose works


def test_precision():
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="fp16"):
        device.pick_amp_dtype("fp16", cpu)
    assert device.pick_amp_dtype("fp32", cpu) is None
    assert device.pick_amp_dtype("bf16", cpu) == torch.bfloat16
    assert device.pick_amp_dtype("auto", cpu) in (None, torch.bfloat16)
    x, layer = normal(2, 3), nn.Linear(3, 3)
    with device.autocast(x, None):
        assert layer(x).dtype == torch.float32
    with device.autocast(x, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 2**63))
def test_a_stratified_choice_is_spread_over_all_of_it(n: int, count: int, seed: int):
    chosen = utils.stratified(n, count, seed)
    assert len(chosen) == count and 0 <= chosen[0] and chosen[-1] < n and (np.diff(chosen) >= (count <= n)).all()
    # Up to any place there are as many as its share, give or take one.
    for place in (n // 3, n // 2, n):
        assert abs((chosen < place).sum() - place * count / n) <= max(1, count / n) + 1e-9
    assert np.array_equal(chosen, utils.stratified(n, count, seed))


def test_eight_bits_a_weight_lose_one_percent_and_nothing_else(tmp_path: Path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 32, 3), nn.GroupNorm(4, 32), nn.Linear(32, 64))
    with torch.no_grad():
        net[2].weight[3] = 0  # a row of zeros has no scale of its own
        net[0].weight[5] *= 1e4
    net.register_buffer("steps", torch.arange(12).view(3, 4))
    path = tmp_path / "w.safetensors"
    weights.save_weights(path, net, dict(kind="vae"), bits=8)
    found, _ = weights.load_weights(path, "vae")
    assert found.keys() == net.state_dict().keys() and path.stat().st_size < 8000 < 4 * len(net[0].weight.flatten())
    for name, v in net.state_dict().items():
        assert found[name].dtype == v.dtype and found[name].shape == v.shape
        if name in ("0.weight", "2.weight"):
            row = v.flatten(1).abs().amax(1).view(-1, *[1] * (v.dim() - 1))
            assert ((found[name] - v).abs() <= row / 254 * 1.001).all() and not torch.equal(found[name], v)
        else:
            assert torch.equal(found[name], v)
    # Scales that do not belong to their tensor
    tensors = {"a": torch.ones(3, 4, dtype=torch.int8), "a.scale": torch.full((3,), 2.0), "b.scale": torch.ones(3)}
    found = weights.from_eight_bits(tensors)
    assert found.keys() == {"a", "b.scale"} and (found["a"] == 2).all()
    with pytest.raises(ValueError, match="4,. scales"):
        weights.from_eight_bits(tensors | {"a.scale": torch.ones(4)})


def test_seeds_are_the_same_every_time_and_positive():
    assert utils.derive_seed(3, 1, 4) == utils.derive_seed(3, 1, 4)
    g, h = utils.generator(3, 1, 4), utils.generator(3, 1, 4)
    assert torch.equal(torch.randn(5, generator=g), torch.randn(5, generator=h))
    seeds = [utils.derive_seed(a, b) for a in range(40) for b in range(40)]
    assert len(set(seeds)) == 1600 and 0 <= min(seeds) and max(seeds) < 2**63
    assert np.mean([s / 2**63 for s in seeds]) == pytest.approx(0.5, abs=0.03)  # all of the range is used


def test_neighbouring_streams_are_independent():
    rows = torch.stack([torch.randn(2000, generator=utils.generator(0, k)) for k in range(8)])
    off = torch.corrcoef(rows) - torch.eye(8)
    assert off.abs().max() < 0.1  # sd of a correlation is 0.022
    assert abs(rows.mean()) < 0.04 and abs(rows.std() - 1) < 0.04


@maths
@given(a=st.lists(st.integers(0, 3), min_size=1, max_size=4), b=st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_other_numbers_give_another_seed(a, b):
    assert (utils.derive_seed(*a) == utils.derive_seed(*b)) == (a == b)  # (7, 4) and (7, 4, 0) are not the same


@pytest.mark.parametrize(("a", "b"), [((2**32,), (0, 1)), ((2**32 + 5, 7), (5, 1, 7))])
def test_large_numbers_are_not_cut_into_two(a, b):
    assert utils.derive_seed(*a) != utils.derive_seed(*b)


# ---------------------------------------------------------------------------------------------------------------------
# Averages and steps


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_average_against_its_recursion(decay):
    model = nn.Linear(3, 2).double()
    ema, want = loop.EMA(model, decay), None
    for n in range(15):
        with torch.no_grad():
            model.weight.copy_(normal(2, 3, seed=n))
        ema.update(model, torch.tensor(1.0))
        d = min(decay, (1 + n) / (10 + n))
        w = model.weight.detach().numpy()
        want = w.copy() if want is None else d * want + (1 - d) * w  # the first average is the weights
        np.testing.assert_allclose(ema.module.weight, want, rtol=1e-12, atol=1e-12)


def test_average_is_a_frozen_copy():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    ema = loop.EMA(model, 0.9)
    assert not ema.training and not ema.module[1].training and model.training
    assert not any(p.requires_grad for p in ema.parameters()) and all(p.requires_grad for p in model.parameters())
    ema.update(model, torch.tensor(1.0))
    with torch.no_grad():
        model[0].weight += 1
    assert not torch.equal(ema.module[0].weight, model[0].weight)


def parts(scaled=False, lr=1.0):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    return model, torch.optim.SGD(model.parameters(), lr=lr, fused=True), scaler, loop.EMA(model, 0.5)


def clip_and_step(model, optimizer, scaler, ema, clip):
    """What a training does with the gradients that are there; returns their norm."""
    finish = loop.Gradients(None, [model], optimizer, scaler, clip, Ranks(torch.device("cpu")), 1, 1)._finish
    added, norm = finish(torch.zeros(0))
    loop.optimise(model, optimizer, ema, added)
    return norm


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.01, 0.5, 1e6])
def test_a_step_is_clipped_after_unscaling(clip, scaled):
    model, optimizer, scaler, ema = parts(scaled)
    x = normal(5, 4)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(model(x).square().mean(), [*model.parameters()])])
    size, before = gradient.double().norm().item(), flat(model)
    scaler.scale(model(x).square().mean()).backward()
    norm = clip_and_step(model, optimizer, scaler, ema, clip)
    assert norm.item() == pytest.approx(size, rel=1e-5) and not norm.requires_grad  # the norm before clipping
    moved = before - flat(model)  # with a rate of 1, plain SGD moves by the clipped gradient
    assert moved.norm().item() == pytest.approx(min(size, clip or math.inf), rel=1e-4)
    torch.testing.assert_close(moved / moved.norm(), gradient / size, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in model.parameters()) and ema.n_averaged == 1


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_without_finite_gradients_is_not_taken(scaled, wrapped, bad):
    model, _, scaler, ema = parts(scaled)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    optimizer = Lookahead(optimizer) if wrapped else optimizer

    def step(factor):
        scaler.scale(model(normal(5, 4)).square().mean() * factor).backward()
        return clip_and_step(model, optimizer, scaler, ema, 1.0)

    def moments():
        states = getattr(optimizer, "inner", optimizer).state.values()
        return torch.cat([state[k].flatten() for state in states for k in ("exp_avg", "exp_avg_sq", "step")])

    for _ in range(2):
        step(1.0)
    weights, average, before, scale = flat(model), flat(ema.module), moments(), scaler.get_scale()
    assert not step(bad).isfinite() and (scaler.get_scale() < scale) == scaled
    assert torch.equal(flat(model), weights) and torch.equal(moments(), before)
    assert torch.equal(flat(ema.module), average) and ema.n_averaged == 2
    assert step(1.0).isfinite()  # and it goes on
    assert not torch.equal(flat(model), weights) and flat(model).isfinite().all() and flat(ema.module).isfinite().all()


@maths
@given(bad=st.lists(st.booleans(), min_size=1, max_size=80), patience=st.integers(2, 25))
def test_steps_in_a_row_without_finite_gradients_are_counted(bad, patience):
    watch, noticed, run, want = loop.NonFiniteWatch(torch.device("cpu"), patience), 0, 0, 0
    bad = [*bad, *[False] * 20]  # what happens is noticed within twenty steps
    for step, is_bad in enumerate(bad, 1):
        noticed = noticed or watch.stuck_at(torch.tensor(math.nan if is_bad else 1.0), step)
        run = run + 1 if is_bad else 0
        want = want or (step if run == patience else 0)
    assert noticed == want


@pytest.mark.parametrize(("fits", "want"), [(100, 64), (64, 64), (63, 32), (7, 4), (1, 1)])
def test_micro_batch_auto_is_halved_until_it_fits(fits, want):
    model, tried = nn.Linear(2, 2), []

    def trial(n):
        tried.append(n)
        if n > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert loop.find_micro_batch("auto", 64, model, 4, trial) == want and tried[-1] == want
    assert loop.find_micro_batch(None, 64, model, 4, trial) == 64 and loop.find_micro_batch(5, 64, model, 4, trial) == 5
    assert loop.find_micro_batch(500, 64, model, 4, trial) == 64
    with pytest.raises(UserError, match="not even one image"):
        loop.find_micro_batch("auto", 64, model, 4, lambda n: trial(10**6))


# ---------------------------------------------------------------------------------------------------------------------
# Files that are whole


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def fill_disk_at(limit, call):
    """Run call while no file can grow beyond `limit` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_write_atomic(tmp_path):
    path = tmp_path / "new" / "folder" / "a.bin"
    weights.write_atomic(path, b"one")
    weights.write_atomic(path, b"two")
    assert path.read_bytes() == b"two" and names(path.parent) == ["a.bin"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    weights.write_atomic(path, b"old")
    with pytest.raises(OSError) as failed:
        fill_disk_at(4096, lambda: weights.write_atomic(path, bytes(100_000)))
    assert failed.value.filename == str(path)  # not the temporary file's name, which tells nobody anything
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_a_failed_save_leaves_the_run_resumable(tmp_path):
    path = tmp_path / "last.pt"
    weights.save_state(path, {"step": 1})
    with pytest.raises(OSError):
        fill_disk_at(4096, lambda: weights.save_state(path, {"step": 2, "weights": normal(10_000)}))
    assert weights.load_state(path)["step"] == 1


def test_state_round_trip_keeps_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    assert weights.load_state(path) is None
    model = nn.Linear(2, 2)
    for step in range(3):
        state = dict(step=step, model=model.state_dict(), config=asdict(TrainConfig()), rng=torch.get_rng_state())
        weights.save_state(path, state)
    assert names(tmp_path) == ["last.prev.pt", "last.pt"]
    got = weights.load_state(path)
    assert got["step"] == 2 and got["config"] == asdict(TrainConfig())
    assert torch.equal(got["model"]["weight"], model.weight)
    assert weights.load_state(tmp_path / "last.prev.pt")["step"] == 1


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: bytes(len(b))])
def test_a_torn_state_gives_way_to_the_one_before(tmp_path, capsys, damage):
    path = tmp_path / "last.pt"
    for step in range(2):
        weights.save_state(path, {"step": step, "weights": normal(100)})
    path.write_bytes(damage(path.read_bytes()))
    assert weights.load_state(path)["step"] == 0
    assert "last.pt" in capsys.readouterr().err
    path.with_suffix(".prev.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="--fresh"):
        weights.load_state(path)


def test_a_torn_state_never_pushes_out_the_good_one(tmp_path):
    path = tmp_path / "last.pt"
    for step in range(2):
        weights.save_state(path, {"step": step})
    path.write_bytes(b"torn")
    assert weights.load_state(path)["step"] == 0  # the run resumes from here, and the disk is full when it saves
    with pytest.raises(OSError):
        fill_disk_at(4096, lambda: weights.save_state(path, {"step": 1, "weights": normal(10_000)}))
    assert weights.load_state(path)["step"] == 0


def test_state_without_a_last_file_comes_from_the_one_before(tmp_path):
    path = tmp_path / "last.pt"
    for step in range(2):
        weights.save_state(path, {"step": step})
    path.unlink()
    assert weights.load_state(path)["step"] == 0


def test_state_of_another_version_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    for content in ({"format": weights.STATE_FORMAT + 1}, {"format": 1}, {}, [1, 2]):
        torch.save(content, path)
        with pytest.raises(UserError, match="version"):
            weights.load_state(path)


def test_code_in_a_state_file_is_never_run(tmp_path):
    path, pwned = tmp_path / "last.pt", tmp_path / "pwned"
    torch.save({"format": weights.STATE_FORMAT, "step": Evil(pwned)}, path)
    with pytest.raises(UserError):
        weights.load_state(path)
    path.write_bytes(pickle.dumps(Evil(pwned)))
    with pytest.raises(UserError):
        weights.load_state(path)
    assert not pwned.exists()
    pickle.loads(path.read_bytes()).close()
    assert pwned.exists()  # the file was indeed dangerous


def test_a_state_with_one_wrong_bit_gives_way_to_the_one_before(tmp_path, capsys):
    path, tensor = tmp_path / "last.pt", normal(1000)
    for step in range(2):
        weights.save_state(path, {"step": step, "weights": tensor})
    data = bytearray(path.read_bytes())
    data[data.index(tensor.numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], tensor)  # torch itself believes it
    assert weights.load_state(path)["step"] == 0
    assert "last.pt cannot be read" in capsys.readouterr().err


def test_weights_round_trip(tmp_path):
    path, model = tmp_path / "best.safetensors", nn.BatchNorm2d(3)
    model.half()
    weights.save_weights(path, model, dict(kind="vae", classes=["AD", "é"], model={"a": [1, 2]}))
    tensors, meta = weights.load_weights(path, "vae")
    assert meta["classes"] == ["AD", "é"] and meta["model"] == {"a": [1, 2]}
    assert tensors.keys() == model.state_dict().keys()
    assert tensors["weight"].dtype == torch.float32 and tensors["num_batches_tracked"].dtype == torch.int64
    other = nn.BatchNorm2d(3)
    weights.load_into(other, tensors, path)
    with pytest.raises(UserError, match="another architecture"):
        weights.load_into(nn.BatchNorm2d(4), tensors, path)


def test_weights_of_anything_else_are_refused(tmp_path):
    from safetensors.torch import save_file

    path, pwned = tmp_path / "best.safetensors", tmp_path / "pwned"
    with pytest.raises(UserError, match="no weights"):
        weights.load_weights(path, "vae")
    with pytest.raises(UserError, match="no weights"):
        weights.load_weights(tmp_path, "vae")  # a folder
    weights.save_weights(path, nn.Linear(2, 2), dict(kind="diffusion"))
    with pytest.raises(UserError, match="vae"):
        weights.load_weights(path, "vae")
    weights.save_weights(path, nn.Linear(2, 2), dict(kind="vae", format=weights.FORMAT + 1))
    with pytest.raises(UserError, match="version"):
        weights.load_weights(path, "vae")
    for metadata in (None, {"format": "pt"}, {"meta": "{torn"}, {"meta": "3"}):  # safetensors of other people
        save_file({"weight": normal(2)}, path, metadata)
        with pytest.raises(UserError, match="best.safetensors"):
            weights.load_weights(path, "vae")
    for content in (b"", b"\xff" * 100, pickle.dumps(Evil(pwned))):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a safetensors file"):
            weights.load_weights(path, "vae")
    torch.save(Evil(pwned), path)
    with pytest.raises(UserError):
        weights.load_weights(path, "vae")
    assert not pwned.exists()


def test_weights_carry_a_checksum_of_everything(tmp_path):
    path, model = tmp_path / "best.safetensors", nn.Linear(40, 40)
    weights.save_weights(path, model, dict(kind="vae", classes=["AD"]))
    whole = path.read_bytes()
    places = [whole.index(word) + 1 for word in (b"AD", b"weight", model.weight.detach().numpy().tobytes()[:40])]
    for place in [*places, len(whole) - 3]:  # the header's words, a tensor's name, weights, the last of them
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.raises(UserError, match="does not match its own checksum: copy it again"):
            weights.load_weights(path, "vae")
    older = whole.replace(b'"digest"', b'"number"')
    path.write_bytes(older)
    assert torch.equal(weights.load_weights(path, "vae")[0]["weight"], model.weight)  # older files have none


def test_weights_are_not_the_files_memory(tmp_path):
    path = tmp_path / "best.safetensors"
    weights.save_weights(path, nn.Linear(40, 40), dict(kind="vae"))
    tensors, _ = weights.load_weights(path, "vae")
    before = tensors["weight"].clone()
    with open(path, "r+b") as f:  # written over in place, as some copying does
        f.write(bytes(path.stat().st_size))
    assert torch.equal(tensors["weight"], before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_numbers_are_refused(tmp_path, value):
    path, model = tmp_path / "best.safetensors", nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[2, 1] = value
    weights.save_weights(path, model, dict(kind="vae"))
    with pytest.raises(UserError, match=r"not finite \(weight\)"):
        weights.load_weights(path, "vae")


def test_classes_are_plain_names_of_folders(tmp_path):
    path = tmp_path / "best.safetensors"
    for classes in (["AD", "NC"], ["-AD"], ["NC é 1", "a.b", "..."]):
        weights.save_weights(path, nn.Linear(2, 2), dict(kind="vae", classes=classes))
        assert weights.load_weights(path, "vae")[1]["classes"] == classes
    bad = ["", ".", "..", "a/b", "/tmp", "../up", "a\0b", "a\nb", "\ud800", "x" * 256, 3, None, ["AD"]]
    for classes in (*([name] for name in bad), ["AD", "AD"], "AD", {"AD": 1}, None):
        weights.save_weights(path, nn.Linear(2, 2), dict(kind="vae", classes=classes))
        with pytest.raises(UserError, match="classes that cannot be folders"):
            weights.load_weights(path, "vae")


HUGE_NETWORK = """
import resource, sys, time
from pathlib import Path
import torch, modules, vae, utils, weights
path = Path(sys.argv[1])
net = vae.VAE(16, 4, 2, (8, 8), 1)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for wrong in (dict(channels=[16384, 16384]), dict(blocks=64), dict(channels=[8] * 40, downsample=2), dict(blocks=10**9),
              dict(channels=[10**9]), dict(image_size=10**9), dict(latent_channels=1024), dict(downsample=1024)):
    weights.save_weights(path, net, dict(kind="vae", finished=True, model=net.config | wrong))
    try:
        vae.load_vae(path, torch.device("cpu"))
    except utils.UserError as e:
        print(e)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, time.process_time() - start)
"""


def test_headers_that_ask_for_huge_networks_cost_nothing(tmp_path):
    code = HUGE_NETWORK.replace("sys.argv[1]", repr(str(tmp_path / "best.safetensors")))
    done = python(code, cold=True)
    *said, spent = done.stdout.splitlines()
    assert len(said) == 8 and all("best.safetensors" in line for line in said), done.stdout + done.stderr
    mib, seconds = map(float, spent.split())
    assert mib < 100 and seconds < 10, spent


def test_file_hash(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert weights.file_hash(tmp_path / "a") == "ba7816bf8f01"  # SHA-256's own test vector


# ---------------------------------------------------------------------------------------------------------------------
# A run


def test_open_run_and_fresh(tmp_path, capsys):
    cfg = PretrainConfig(checkpoints=str(tmp_path), run="r")
    folder = loop.open_run(cfg, "vae")
    assert folder == tmp_path / "r" / "vae"
    (folder / "last.pt").write_bytes(b"hours of work")
    assert loop.open_run(cfg, "vae") == folder and names(folder) == ["last.pt"]  # as it was, to resume
    (tmp_path / "r" / "diffusion").mkdir()
    assert loop.open_run(replace(cfg, fresh=True), "vae") == folder
    assert names(folder) == []
    (old,) = (tmp_path / "r").glob("old-*")
    assert (old / "vae" / "last.pt").read_bytes() == b"hours of work"
    assert str(old) in capsys.readouterr().out and (tmp_path / "r" / "diffusion").is_dir()


def test_fresh_without_an_older_run(tmp_path):
    assert loop.open_run(PretrainConfig(checkpoints=str(tmp_path), fresh=True), "vae").is_dir()


def test_check_same_run(tmp_path):
    cfg = TrainConfig(run="r")
    state = dict(config=asdict(cfg), data="abc")
    path = tmp_path / "last.pt"
    weights.save_state(path, state)
    state = weights.load_state(path)  # as resuming sees it: tuples must still equal tuples
    loop.check_same_run(cfg, "abc", "slices than data now holds", state, tmp_path)
    loop.check_same_run(
        replace(cfg, epochs=7, device="cpu", wandb="disabled", dry_run=True),
        "abc",
        "slices than data now holds",
        state,
        tmp_path,
    )
    with pytest.raises(UserError, match=r"lr 0.0001 -> 0.5.*--fresh"):
        loop.check_same_run(replace(cfg, lr=0.5), "abc", "slices than data now holds", state, tmp_path)
    with pytest.raises(UserError, match="channels"):
        loop.check_same_run(replace(cfg, channels=(8,)), "abc", "slices than data now holds", state, tmp_path)
    loop.check_same_run(replace(cfg, compile="on"), "abc", "slices than data now holds", state, tmp_path)
    with pytest.raises(UserError, match="other slices"):
        loop.check_same_run(cfg, "abd", "slices than data now holds", state, tmp_path)


def test_a_flag_that_is_newer_than_a_run_does_not_end_it(tmp_path):
    """The run counts as started with the flag's default."""
    cfg, state = TrainConfig(run="r"), {"data": "abc"}
    before = {name: value for name, value in asdict(cfg).items() if name != "patch"}
    loop.check_same_run(cfg, "abc", "slices", {**state, "config": before}, tmp_path)
    with pytest.raises(UserError, match="patch 1 -> 2"):
        loop.check_same_run(replace(cfg, patch=2), "abc", "slices", {**state, "config": before}, tmp_path)


@pytest.fixture
def handlers():
    """Put the process's own signal handlers back."""
    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(s) for s in kinds]
    yield
    for s, handler in zip(kinds, before):
        signal.signal(s, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_are_remembered_and_do_not_kill(handlers, capsys, number, code):
    stop = cluster.StopSignal()
    stop.begin()
    assert not stop
    os.kill(os.getpid(), number)
    assert stop and stop.name == number.name
    with pytest.raises(SystemExit) as left:
        cluster.leave_early(stop, 1.5)
    assert left.value.code == code  # nothing failed when Slurm stops a job
    assert number.name in capsys.readouterr().out


def test_a_second_ctrl_c_leaves_at_once(handlers):
    stop = cluster.StopSignal()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # nothing has begun that could be saved
    stop.begin()
    signal.raise_signal(signal.SIGINT)
    assert stop
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_no_signal_changes_the_exit_code_once_all_is_saved():
    code = "import cluster, os, signal, sys\nstop = cluster.StopSignal()\nstop.begin()\nstop.end()\n"
    code += "for s in stop.NUMBERS: os.kill(os.getpid(), s)\nassert not stop\nsys.exit(75)"
    assert python(code).returncode == 75


def rows_of(log):
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_log_rows_and_curves(tmp_path):
    log = runlog.RunLog(tmp_path, PretrainConfig(wandb="disabled"), "vae")
    log.plot()  # nothing yet: no picture, no error
    assert names(tmp_path) == ["metrics.jsonl"]
    for step in (1, 2, 3):
        log.log(step, {"epoch": step / 2, "loss/train": torch.tensor(1 / step), "loss/val": 2 / step, "lr": 1e-4})
    log.log(4, {"epoch": 2.0, "psnr": 30})  # rows need not have the same columns
    log.picture(4, "samples", tmp_path / "none.png")
    log.plot()
    log.close()
    assert [r["step"] for r in rows_of(log)] == [1, 2, 3, 4]
    assert rows_of(log)[0] == {"step": 1, "epoch": 0.5, "loss/train": 1.0, "loss/val": 2.0, "lr": 1e-4}
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture.std() > 5  # a picture, and not an empty one


def test_log_resumes_where_the_state_was_saved(tmp_path):
    cfg = PretrainConfig(wandb="disabled")
    log = runlog.RunLog(tmp_path, cfg, "vae")
    for step in (1, 2, 3):
        log.log(step, {"epoch": step})
    with open(log.path, "a") as f:
        f.write('{"step": 4, "epo')  # the job died while it wrote
    log = runlog.RunLog(tmp_path, cfg, "vae", step=2)  # and had last saved at step 2
    log.log(3, {"epoch": 30})
    assert [(r["step"], r["epoch"]) for r in rows_of(log)] == [(1, 1), (2, 2), (3, 30)]
    assert utils.read_jsonl(log.path) == log.rows
    assert rows_of(runlog.RunLog(tmp_path, cfg, "vae")) == []  # a run that starts over starts its log over


def test_damaged_lines_of_a_log_are_left_out_and_no_others(tmp_path):
    log = runlog.RunLog(tmp_path, PretrainConfig(wandb="disabled"), "vae")
    for step in (1, 2):
        log.log(step, {"epoch": step, "loss/train": 0.5})
    first, second = log.path.read_bytes().splitlines()
    for line in (
        b"\xff\xfe", b"null", b"[1]", b"3", b'{"epoch": 1}', b'{"step": "1"}', b'{"step": 1.5}', b"[" * 10**5, b"\0",
        b'{"step": 1, "epoch": "x"}', b'{"step": 1, "epoch": [1]}', b'{"step": 1, "epoch": null}',
        b'{"step": 1, "epoch": 1' + b"0" * 5000 + b"}",
    ):  # fmt: skip
        log.path.write_bytes(b"\n".join([first, line, second, b""]))
        assert [r["step"] for r in utils.read_jsonl(log.path)] == [1, 2], line
        runlog.RunLog(tmp_path, PretrainConfig(wandb="disabled"), "vae", step=2).plot()
    log.path.write_bytes(first.replace(b"epoch", b"epoxy") + b"\n" + second + b"\n")
    runlog.RunLog(tmp_path, PretrainConfig(wandb="disabled"), "vae", step=2).plot()  # a row that is nowhere on the axis


def test_a_damaged_wandb_id_does_not_stop_a_run(tmp_path, capsys):
    (tmp_path / "wandb_id").write_bytes(b"\xff../x")
    log = runlog.RunLog(tmp_path, PretrainConfig(wandb="offline"), "vae")
    log.log(1, {"epoch": 1})
    assert log.wandb is None and "wandb is off for the rest of this run" in capsys.readouterr().err


def test_log_survives_numbers_that_are_not_numbers(tmp_path):
    log = runlog.RunLog(tmp_path, PretrainConfig(wandb="disabled"), "vae")
    log.log(1, {"epoch": 1, "loss/train": float("nan"), "loss/val": float("inf")})
    log.plot()
    assert math.isnan(utils.read_jsonl(log.path)[0]["loss/train"])


FAKE_WANDB = """
import os, time
fail = os.environ["FAIL"]
Settings = dict
def broken(*args, **kwargs):
    raise RuntimeError("the network is down\\nsecond line")
class Run:
    log = broken if fail == "log" else staticmethod(lambda row, step: None)
    finish = broken if fail != "hang" else staticmethod(lambda: time.sleep(600))
def init(**how):
    return broken() if fail == "init" or (fail, how["mode"]) == ("online", "online") else Run()
if fail == "import":
    broken()
"""

USE_WANDB = """
import sys
from pathlib import Path
import runlog
import utils
from config import PretrainConfig
for fail in ("disabled", "import", "init", "log", "finish"):
    import os
    os.environ["FAIL"] = fail
    folder = Path({folder!r}) / fail
    log = runlog.RunLog(folder, PretrainConfig(wandb="disabled" if fail == "disabled" else "offline"), "vae")
    assert fail != "disabled" or "wandb" not in sys.modules
    for step in (1, 2):
        log.log(step, {{"epoch": step}})
    log.close()
    assert [r["step"] for r in utils.read_jsonl(log.path)] == [1, 2], fail
    assert log.wandb is None, fail
    sys.modules.pop("wandb", None)
"""


WANDB_FAR_AWAY = """
import os, sys
from pathlib import Path
import runlog
from config import PretrainConfig
os.environ["FAIL"], os.environ["WANDB_API_KEY"] = sys.argv[1], "of somebody"
runlog.RunLog.PATIENCE = 0.5
log = runlog.RunLog(Path(sys.argv[2]), PretrainConfig(wandb="online"), "vae")
log.log(1, {"epoch": 1})
assert log.wandb is not None
log.close()
"""


@pytest.mark.parametrize(
    ("fail", "sentence"), [("online", "logs offline: run wandb sync later"), ("hang", "does not finish")]
)
def test_a_wandb_that_cannot_be_reached_is_not_waited_for(tmp_path, fail, sentence):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_WANDB)
    code = f"import sys; sys.argv = ['', {fail!r}, {str(tmp_path / 'run')!r}]\n{WANDB_FAR_AWAY}"
    done = python(code, path=tmp_path / "fake")
    assert done.returncode == 0 and sentence in done.stderr, done.stderr


def test_a_broken_wandb_does_not_stop_a_run(tmp_path):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKE_WANDB)
    done = python(USE_WANDB.format(folder=str(tmp_path / "runs")), path=tmp_path / "fake")
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if line.startswith("wandb is off")]
    assert len(complaints) == 4 and all("the network is down" in line for line in complaints)  # once for each
    ids = [(tmp_path / "runs" / f / "wandb_id").exists() for f in ("disabled", "init", "log")]
    assert ids == [False, True, True]


SHOW_PICTURES = """
import sys, types
from pathlib import Path
import runlog
from config import PretrainConfig
sent = []
run = types.SimpleNamespace(log=lambda row, step: sent.extend(row), finish=lambda: None)
fake = dict(Settings=dict, init=lambda **how: run, Image=str, Video=str)
sys.modules["wandb"] = types.SimpleNamespace(**fake)
for mode in ("auto", "offline"):
    log = runlog.RunLog(Path(sys.argv[1]) / mode, PretrainConfig(wandb=mode), "vae")
    log.picture(1, f"{mode}, generated", Path("a.png"))
    log.picture(1, f"{mode}, people", Path("b.gif"), people=True)
assert sent == ["auto, generated", "offline, generated", "offline, people"], sent
"""


def test_pictures_of_people_go_to_wandb_only_if_it_was_asked_for(tmp_path):
    done = python(f"import sys; sys.argv = ['', {str(tmp_path)!r}]\n{SHOW_PICTURES}")
    assert done.returncode == 0, done.stderr


def test_logged_in_to_wandb(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    assert not runlog.logged_in_to_wandb()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert runlog.logged_in_to_wandb()
    (tmp_path / ".netrc").write_text("machine")
    assert not runlog.logged_in_to_wandb()  # a damaged file is no login, and no crash
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert runlog.logged_in_to_wandb()


def test_progress_bar_starts_where_the_run_resumes():
    with utils.progress_bar(100, 40) as bar:
        bar.update(10)
        assert (bar.n, bar.total) == (50, 100)


# ---------------------------------------------------------------------------------------------------------------------
# Cost and modes


def test_training_cost_of_a_linear_layer():
    layer, x = nn.Linear(30, 20, device="meta"), torch.empty(1, 7, 30, device="meta")
    parameters, gflop, mb = device.training_cost(layer, x)
    assert parameters == 30 * 20 + 20
    assert gflop == pytest.approx(2 * 7 * 30 * 20 / 1e9)
    assert mb == pytest.approx(7 * 30 * 4 / 1e6)  # backward needs the input; the weight is there anyway


def test_training_cost_of_two_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 5, 3, stride=2, padding=1)).to("meta")
    parameters, gflop, mb = device.training_cost(net, torch.empty(1, 3, 16, 16, device="meta"))
    assert parameters == 3 * 8 * 9 + 8 + 8 * 5 * 9 + 5
    assert gflop == pytest.approx(2 * 9 * (3 * 8 * 16 * 16 + 8 * 5 * 8 * 8) / 1e9)
    # the input, what goes into the SiLU, and what comes out of it
    assert mb == pytest.approx(4 * 16 * 16 * (3 + 8 + 8) / 1e6)


def test_training_cost_counts_the_types_that_autocast_gives():
    """Half precision for convolutions, but not for the norm between them; and no copies of weights."""
    norm = nn.GroupNorm(2, 8)
    norm.forward = lambda x: nn.functional.group_norm(x.float(), 2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 5, 3, padding=1))
    *_, mb = device.training_cost(net, torch.zeros(1, 3, 16, 16), amp_dtype=torch.bfloat16)
    half, single = 2 * 16 * 16 * (3 + 8), 4 * 16 * 16 * 8 + 4 * 2 * 2  # and the norm's mean and deviation of two groups
    assert mb == pytest.approx((half + single) / 1e6)


def test_frozen_puts_each_modules_own_mode_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    net[1].eval()  # someone froze one part on purpose
    other, modes = nn.Dropout().eval(), [m.training for m in net.modules()]
    with pytest.raises(ZeroDivisionError), device.eval_mode(net, other):
        assert not any(m.training for m in net.modules()) and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [m.training for m in net.modules()] == modes and not other.training
    assert torch.is_grad_enabled() and net[0].weight.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@maths
@given(values=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30))
def test_to_uint8_against_numpy(values):
    x = torch.tensor(values).reshape(-1, 1, 1, 1)
    got = pictures.to_uint8(x)
    assert got.dtype == np.uint8 and got.shape == (len(values), 1, 1)
    exact = (np.clip(np.array(values), -1, 1) + 1) * 127.5
    assert np.abs(got[:, 0, 0] - exact).max() <= 0.5 + 1e-4  # rounded, not cut off, and never wrapped around


def test_to_uint8_is_the_inverse_of_reading():
    grey = np.arange(256, dtype=np.uint8)
    x = torch.from_numpy(grey).float() / 127.5 - 1
    assert (pictures.to_uint8(x.reshape(1, 1, 16, 16).requires_grad_()).flatten() == grey).all()


@maths
@given(n=st.integers(1, 12), columns=st.integers(1, 6), gap=st.integers(0, 3))
def test_image_grid_layout(n, columns, gap):
    images = np.random.default_rng(n).integers(100, 256, (n, 3, 5), dtype=np.uint8)
    grid = pictures.image_grid(images, columns, gap)
    rows = math.ceil(n / columns)
    assert grid.shape == (rows * 3 + (rows - 1) * gap, columns * 5 + (columns - 1) * gap)
    background = np.ones(grid.shape, bool)
    for k, (y, x) in enumerate(itertools.islice(itertools.product(range(rows), range(columns)), n)):
        place = np.s_[y * (3 + gap) : y * (3 + gap) + 3, x * (5 + gap) : x * (5 + gap) + 5]
        assert (grid[place] == images[k]).all()
        background[place] = False
    assert (grid[background] == 64).all()


def test_image_grid_is_about_square_by_itself():
    assert pictures.image_grid(np.zeros((16, 4, 4), np.uint8)).shape == (22, 22)
    assert pictures.image_grid(np.zeros((5, 4, 4), np.uint8)).shape == (10, 16)


def test_png_bytes_are_lossless():
    image = np.random.default_rng(0).integers(0, 256, (9, 7), dtype=np.uint8)
    again = cv2.imdecode(np.frombuffer(pictures.png_bytes(image), np.uint8), cv2.IMREAD_UNCHANGED)
    assert again.shape == (9, 7) and (again == image).all()


def frames_of(path):
    with Image.open(path) as gif:
        frames, durations = [], []
        for k in range(gif.n_frames):
            gif.seek(k)
            frames.append(np.array(gif.convert("L")))
            durations.append(gif.info["duration"])
        return np.stack(frames), durations, gif.info.get("loop")


@pytest.mark.parametrize("n", [1, 2, 5])
def test_save_gif(tmp_path, n):
    frames = np.random.default_rng(0).integers(0, 256, (n, 8, 12), dtype=np.uint8)
    pictures.save_gif(tmp_path / "a.gif", list(frames), seconds=0.1)
    got, durations, loop = frames_of(tmp_path / "a.gif")
    assert (got == frames).all() and names(tmp_path) == ["a.gif"]
    if n > 1:
        assert durations == [100] * (n - 1) + [2000] and loop == 0  # rests on the last frame, then again


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_visualise_denoising_process(tmp_path, steps):
    # latents whose decoded value says which step, which image and which of x_t and x0 it is
    def decode(z):
        return F.interpolate(z[:, :1], scale_factor=4)

    seen = []
    for k in range(steps):
        x_t = (torch.arange(3.0) / 3 + k / (4 * steps)).reshape(3, 1, 1, 1).expand(3, 2, 2, 2)
        seen.append((steps - 2 - k, x_t, -x_t))
    pictures.visualise_denoising_process(seen, decode, tmp_path)
    assert names(tmp_path) == ["denoising.gif", "denoising.png"]
    frames, *_ = frames_of(tmp_path / "denoising.gif")
    assert len(frames) == steps and frames.shape[1:] == (18, 18)
    tile = [pictures.to_uint8(decode(x_t)) for _, x_t, _ in seen]
    assert (frames[-1][:8, :8] == tile[-1][0]).all() and (frames[0][:8, 10:18] == tile[0][1]).all()

    columns = min(10, steps)
    strip = cv2.imread(str(tmp_path / "denoising.png"), cv2.IMREAD_UNCHANGED)
    assert strip.shape == (6 * 10 - 2, columns * 10 - 2)
    for i in range(3):  # x_t above, x0 below; the first step on the left, the last on the right
        for step, x in ((0, 0), (-1, 10 * (columns - 1))):
            assert (strip[20 * i : 20 * i + 8, x : x + 8] == pictures.to_uint8(decode(seen[step][1]))[i]).all()
            assert (strip[20 * i + 10 : 20 * i + 18, x : x + 8] == pictures.to_uint8(decode(seen[step][2]))[i]).all()
