"""The student: its target against a float64 oracle, and the script as people run it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY_UNET, run, run_any, start
from test_modules import ABAR, close, normal, tiny_diffusion
from test_pipeline import same_weights, wait_for
from torch import nn

from config import DistilConfig
from distil import Student, teacher_grid
from modules import NoiseScheduler_Fast_DDPM, make_grid, sample
from utils import UserError, read_jsonl

TINY = "--trajectories 64 --batch-size 16 --lr 1e-3 --precision fp32 --wandb disabled --teacher-steps 8 --teacher t"


class Answer(nn.Module):
    """A network that says what it is told."""

    config = {"conditions": []}

    def __init__(self) -> None:
        super().__init__()
        self.says = torch.zeros(())

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return self.says


@pytest.mark.parametrize("prediction", ["v", "eps", "flow"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_target_makes_one_ddim_step_land_where_the_teacher_did(n: int, prediction: str):
    model = tiny_diffusion((), prediction)
    model.scheduler, model.unet = NoiseScheduler_Fast_DDPM(num_steps=n, grid="student"), Answer()
    ts, states = make_grid("student", n, ABAR), normal(3, n + 1, 2, 8, 8)
    for place in range(n):
        t, s = ts[place], ts[place - 1] if place else -1
        x_t, x_s = (states[:, n - 1 - place + i].double().numpy() for i in (0, 1))
        a_t, a_s = ABAR[t], ABAR[s] if s >= 0 else 1.0
        # DDIM: x_s = sqrt(a_s) x0 + sqrt(1 - a_s) eps with x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps, solved for (x0, eps)
        m = np.array([[np.sqrt(a_t), np.sqrt(1 - a_t)], [np.sqrt(a_s), np.sqrt(1 - a_s)]])
        x0, eps = np.linalg.solve(m, np.stack([x_t.ravel(), x_s.ravel()])).reshape(2, *x_t.shape)
        v = np.sqrt(a_t) * eps - np.sqrt(1 - a_t) * x0
        right = {"v": v, "eps": eps, "flow": eps - x0}[prediction]
        model.unet.says = torch.from_numpy(right).float()
        places = torch.full((3,), place)
        scale = np.square(right).mean()
        assert Student(model)(states, None, places).max() < 1e-5 * max(1.0, scale)
        model.unet.says = model.unet.says + 0.5
        close(Student(model)(states, None, places), np.full(3, 0.25), 1e-2)
        # and the sampler, given this answer, takes that step
        model.unet.says = torch.from_numpy(right).float()
        eps_hat, x0_hat = model.denoiser()(states[:, n - 1 - place], int(t))
        close(model.scheduler.step(eps_hat, int(t), int(s), states[:, n - 1 - place]), x_s, 1e-3)


@pytest.fixture(scope="module")
def teacher(trained: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints folder with run `t`: all 1000 timesteps."""
    home = tmp_path_factory.mktemp("teacher")
    shutil.copytree(trained / "tiny" / "vae", home / "t" / "vae")
    where = ["--data", phantoms, "--checkpoints", home, "--cache", home / "cache", "--run", "t"]
    run("train.py", *where, *TINY_UNET, "--grid", "full", "--epochs", "3", "--sample-every", "3")
    return home


def flags(home: Path, name: str, *more: str) -> list[str | Path]:
    return ["--checkpoints", home, "--cache", home / "cache", "--run", name, *TINY.split(), *more]


@pytest.fixture(scope="module")
def student(teacher: Path) -> Path:
    run("distil.py", *flags(teacher, "s", "--num-steps", "4", "--epochs", "6"))
    return teacher


def test_a_student_comes_closer_to_its_teacher_and_is_drawn_from_as_any_run(student: Path, tmp_path: Path):
    log = read_jsonl(student / "s" / "diffusion" / "metrics.jsonl")
    assert log[-1]["loss/val"] < log[0]["loss/val"] and len(log) == 6
    name = "distance to the teacher (RMS of latents)"
    assert 0 < log[-1][name] < log[0][name]
    assert cv2.imread(str(student / "s" / "diffusion" / "samples.png")).std() > 5
    out = run("predict.py", "--checkpoints", student, "--run", "s", "--num-images", "2", "--out", tmp_path / "out")
    assert "4 steps of ddim" in out.stdout
    assert len(list((tmp_path / "out").glob("train/*/*.png"))) == 2
    for flag in (["--solver", "dpm++2m"], ["--eta", "1"], ["--num-steps", "2"], ["--sampling", "normal"]):
        refused = run_any("predict.py", "--checkpoints", student, "--run", "s", "--out", tmp_path / "no", *flag)
        assert refused.returncode == 2 and "error: " in refused.stderr and not (tmp_path / "no").exists()


def test_the_log_measures_the_distance_between_what_both_draw(student: Path):
    from cluster import Ranks
    from distil import Trajectories, unet_task
    from sampling import load_run
    from utils import derive_seed

    cfg = DistilConfig(
        run="new", teacher="t", num_steps=4, teacher_steps=8, checkpoints=str(student), precision="fp32"
    )  # fmt: skip
    of_teacher, vae, _, _ = load_run(student / "t", "best", torch.device("cpu"), "fp32")
    of_student, _, meta, _ = load_run(student / "s", "final", torch.device("cpu"), "fp32")
    seed, ranks = derive_seed(0, 12), Ranks(torch.device("cpu"))
    drawn = Trajectories(unet_task(cfg, torch.device("cpu")), 256, seed, str(student / "cache"), ranks, "")
    grid, y = make_grid("student", 8, ABAR).tolist(), drawn.conditions
    assert torch.equal(y.isnan()[:, 0], torch.arange(256) % 10 == 9)
    assert torch.equal(y.nan_to_num(1)[:, 0], (torch.arange(256) % 2).float())
    teachers = sample(of_teacher.denoiser(y), drawn.states[:, 0].float(), of_teacher.scheduler, grid)
    close(teachers, drawn.states[:, -1].float(), 5e-3)  # half precision
    students = sample(of_student.denoiser(y), drawn.states[:, 0].float(), of_student.scheduler, solver="ddim")
    rms = (students - teachers).square().mean().sqrt().item()
    assert meta["metrics"]["distance to the teacher (RMS of latents)"] == pytest.approx(rms, rel=1e-2)


@pytest.mark.full
def test_a_student_interrupted_resumes_to_the_same_weights(teacher: Path, student: Path):
    more = ["--num-steps", "4", "--epochs", "6", "--save-minutes", "0"]
    process = start("distil.py", *flags(teacher, "again", *more))
    wait_for(teacher / "again" / "diffusion" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    out = run("distil.py", *flags(teacher, "again", *more)).stdout
    assert "resuming" in out
    for name in ("best.safetensors", "final.safetensors"):
        assert same_weights(teacher / "again" / "diffusion" / name, student / "s" / "diffusion" / name)
    assert "is finished" in run("distil.py", *flags(teacher, "again", *more)).stdout


def test_a_signal_while_the_teacher_generates_does_not_wait_for_all_of_it(teacher: Path):
    more = ["--num-steps", "4", "--epochs", "1", "--trajectories", "100000"]  # the later of two flags counts
    process = start("distil.py", *flags(teacher, "early", *more))
    wait_for(teacher / "early" / "vae" / "best.safetensors", process)  # copied before the teacher begins
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=1200)
    assert process.returncode == 75 and "saved at epoch 0.00: the same command goes on" in out
    assert not (teacher / "early" / "diffusion" / "last.pt").exists()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 8, 16])
def test_the_teacher_stops_at_the_students_timesteps(num_steps: int):
    accepted = []
    for teacher_steps in range(num_steps, 400, num_steps):
        try:
            grid = teacher_grid(teacher_steps, num_steps)
        except UserError as e:
            assert f"take {max(accepted)}" in str(e)
            continue
        accepted.append(teacher_steps)
        assert grid == make_grid("student", teacher_steps, ABAR).tolist()
        assert grid[::-1][:: teacher_steps // num_steps] == make_grid("student", num_steps, ABAR)[::-1].tolist()
    assert 16 // num_steps * num_steps in accepted and (teacher_steps in accepted) == (num_steps < 3)


def test_a_student_is_generated_from_in_its_own_steps_by_every_script(student: Path, phantoms: Path, tmp_path: Path):
    """A solver that extrapolates between steps, as dpm++2m does, is not what a student learnt."""
    from cluster import Ranks
    from config import EvaluateConfig, PredictConfig
    from evaluate import generate_images
    from sampling import load_run, plan_sampling

    run("predict.py", "--checkpoints", student, "--run", "s", "--num-images", "4", "--out", tmp_path / "out")
    files = [tmp_path / "out" / "train" / ("AD", "NC")[k % 2] / f"s0i{k:05d}_0.png" for k in range(4)]
    predicted = np.stack([cv2.imread(str(f), 0) for f in files])
    model, vae, _, _ = load_run(student / "s", "best", torch.device("cpu"))
    cfg, y = EvaluateConfig(batch_size=4), (torch.arange(4.0) % 2)[:, None]
    how = plan_sampling(PredictConfig(), model)
    evaluated, latents = generate_images(cfg, model, vae, y, how, Ranks(torch.device("cpu")))
    assert np.array_equal(evaluated.numpy(), predicted)
    close(model.generate(vae.latent_shape, 0, range(4), y), latents)  # as tsne.py does
    x = model.generate(vae.latent_shape, 0, range(4), y, solver="dpm++2m")
    assert (x - latents).abs().max() > 0.01


def test_a_teacher_that_was_trained_further_ends_its_unfinished_students(teacher: Path, phantoms: Path, tmp_path: Path):
    home = shutil.copytree(teacher, tmp_path / "home")
    more = flags(home, "u", "--num-steps", "4", "--epochs", "6", "--save-minutes", "0")
    process = start("distil.py", *more)
    wait_for(home / "u" / "diffusion" / "last.pt", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    where = ["--data", phantoms, "--checkpoints", home, "--cache", home / "cache", "--run", "t"]
    run("train.py", *where, *TINY_UNET, "--grid", "full", "--epochs", "6", "--sample-every", "3")
    refused = run_any("distil.py", *more)
    assert refused.returncode == 2 and "other weights of the teacher" in refused.stderr
    assert refused.stderr.strip().count("\n") == 0


def test_the_vae_computes_in_the_precision_that_was_asked_for(teacher: Path, tmp_path: Path):
    from cluster import Ranks
    from distil import Trajectories, unet_task
    from pictures import to_uint8
    from sampling import load_run
    from utils import derive_seed

    more = ["--num-steps", "2", "--epochs", "1", "--precision", "bf16"]
    run("distil.py", *flags(teacher, "half", *more))
    shown = cv2.imread(str(teacher / "half" / "diffusion" / "samples.png"), 0)[:32, :32]  # the teacher's first image
    cfg = DistilConfig(num_steps=2, teacher_steps=8, teacher="t", checkpoints=str(teacher), run="new", precision="bf16")
    task = unet_task(cfg, torch.device("cpu"))
    task.teacher.amp_dtype, (_, vae, _, _) = (
        torch.bfloat16,
        load_run(teacher / "t", "best", torch.device("cpu"), "bf16"),
    )
    drawn = Trajectories(task, 256, derive_seed(0, 12), str(tmp_path), Ranks(torch.device("cpu")), "")
    with torch.no_grad():
        want = to_uint8(vae.decode(drawn.states[:8, -1].float()))[0]
        vae.amp_dtype = None
        other = to_uint8(vae.decode(drawn.states[:8, -1].float()))[0]
    assert np.array_equal(shown, want) and not np.array_equal(shown, other)


def test_what_cannot_be_distilled(trained: Path, teacher: Path, student: Path):
    def refused(*args: str | Path) -> str:
        done = run_any("distil.py", *args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "--grid full" in refused(*flags(trained, "no"), "--teacher", "tiny")
    assert "no multiple" in refused(*flags(teacher, "no", "--num-steps", "3"))
    assert "is the teacher" in refused(*flags(teacher, "t"))
    (teacher / "own" / "vae").mkdir(parents=True)
    (teacher / "own" / "vae" / "best.safetensors").write_bytes(b"another")
    assert "a VAE of its own" in refused(*flags(teacher, "own"))
    assert (teacher / "own" / "vae" / "best.safetensors").read_bytes() == b"another"
    assert "no weights" in refused(*flags(teacher, "no"), "--teacher", "nobody")
    assert "other settings" in refused(*flags(teacher, "s", "--num-steps", "2", "--epochs", "6"))
    assert not (trained / "no").exists() and not (teacher / "no").exists()
    plan = run("distil.py", *flags(teacher, "no", "--dry-run")).stdout
    assert "64 trajectories" in plan and not (teacher / "no").exists()
