"""The weights that come with the repository, and how they are made ready: they load, and draw what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, run, run_any
from safetensors import safe_open

import anatomy
import metrics
from conditions import draw_rows
from modules import make_grid
from sampling import load_run

PRETRAINED = ROOT / "checkpoints" / "pretrained"


def images(folder: Path) -> dict[str, np.ndarray]:
    """uint8 [N, S, S] by class."""
    return {
        c.name: np.stack([cv2.imread(str(p), 0) for p in sorted(c.iterdir())])
        for c in sorted((folder / "train").iterdir())
    }


def test_plain_predict_draws_brains_from_the_repository_alone(tmp_path: Path):
    run("predict.py", "--num-images", "6", "--out", tmp_path / "out")
    (drawn,) = images(tmp_path / "out").values()
    assert drawn.shape == (6, 256, 256)
    found = anatomy.measure(drawn)
    # the training slices cover 0.34 to 0.56 of the picture
    assert (found["brain_area"] > 0.31).all() and (found["brain_area"] < 0.6).all()
    assert drawn[:, :4].mean() < 3 and drawn.std() > 40  # dark around, bright inside
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 5  # and not one and the same


def test_phantoms_follow_their_class(tmp_path: Path):
    """The short form of the test below."""
    flags = ["--run", "pretrained/phantoms", "--num-images", "16", "--guidance", "2.5", "--out", tmp_path / "out"]
    run("predict.py", *flags)
    by_class = {name: anatomy.measure(x)["ventricle_fraction"] for name, x in images(tmp_path / "out").items()}
    assert list(by_class) == ["AD", "NC"] and by_class["AD"].mean() - by_class["NC"].mean() > 0.003


def test_phantoms_follow_their_age_and_sex(tmp_path: Path):
    found = {}
    for words in ("age=58 sex=F", "age=88 sex=F", "age=58 sex=M"):
        out = tmp_path / words.replace(" ", "-")
        flags = ["--run", "pretrained/phantoms", "--num-images", "6", "--class-name", "NC", "--out", out]
        run("predict.py", *flags, "--set", *words.split())
        found[words] = anatomy.measure(images(out)["NC"])
    young, old, man = found.values()
    assert (old["ventricle_fraction"] > young["ventricle_fraction"]).mean() > 0.8
    assert (man["brain_area"] > young["brain_area"]).mean() > 0.8


@pytest.mark.full
def test_phantoms_follow_their_class_and_more_so_with_guidance(tmp_path: Path):
    difference = []
    for guidance in ("1", "2.5"):
        out = tmp_path / guidance
        flags = ["--run", "pretrained/phantoms", "--num-images", "32", "--guidance", guidance, "--out", out]
        run("predict.py", *flags)
        by_class = {name: anatomy.measure(x)["ventricle_fraction"] for name, x in images(out).items()}
        assert list(by_class) == ["AD", "NC"]
        difference.append(by_class["AD"].mean() - by_class["NC"].mean())
    assert 0.003 < difference[0] < difference[1]


@pytest.mark.parametrize("folder", ["", "phantoms", "student", "student-2"])
def test_every_weight_says_what_it_was_trained_on(folder: Path):
    home = PRETRAINED / folder
    if not home.exists():
        pytest.skip(f"{home} is not shipped")
    card = (home / "README.md").read_text()
    for words in (
        "Not for diagnosis",
        "trained on",
        "licence",
        "people",
        "steps of",
        "hardware",
        "copy_rate",
        "## Limits",
    ):
        assert words in card, words
    for part in ("vae", "diffusion"):
        with safe_open(home / part / "best.safetensors", "pt") as f:
            meta = json.loads(f.metadata()["meta"])
        assert "people" in meta["data"] and meta["commit"] and meta["hardware"]
        assert not any("/" in str(meta["config"][key]) for key in ("data", "cache", "checkpoints"))  # nobody's folders


@pytest.mark.parametrize(("folder", "steps"), [("student", 4), ("student-2", 2)])
def test_students_end_where_their_teacher_does_in_sixteen_steps(folder: str, steps: int):
    model, vae, _, _ = load_run(PRETRAINED / folder, "best", torch.device("cpu"))
    teacher = load_run(PRETRAINED, "best", torch.device("cpu"))[0]
    y = draw_rows(model.attributes, {}, 5, [0, 1])
    assert len(model.scheduler.timesteps) == steps
    own = model.generate(vae.latent_shape, 5, [0, 1], y)

    def away(n: int) -> float:
        """How far the teacher ends from it in n steps (RMS of latents of deviation 1)."""
        grid = make_grid("student", n, teacher.scheduler.abar).tolist()
        theirs = teacher.generate(vae.latent_shape, 5, [0, 1], y, timesteps=grid, solver="ddim")
        return (own - theirs).square().mean().sqrt().item()

    assert away(16) < 0.25 < away(steps), (away(16), away(steps))


def test_the_students_texture_draws_in_three_steps_what_its_teachers_draws_in_ten():
    model, vae, _, _ = load_run(PRETRAINED / "student", "best", torch.device("cpu"))
    own, teachers = vae.texture, load_run(PRETRAINED, "best", torch.device("cpu"))[1].texture
    assert [len(texture.scheduler.timesteps) for texture in (own, teachers)] == [3, 10]
    y = draw_rows(model.attributes, {}, 5, [0])
    image, noise = vae.decode(model.generate(vae.latent_shape, 5, [0], y)), vae.texture_noise(5, [0])
    drawn = [metrics.unit(x) for x in (own.draw(image, noise), teachers.draw(image, noise), image)]
    assert metrics.psnr(drawn[0], drawn[1]) > 42 > metrics.psnr(drawn[1], drawn[2]) + 10


def test_all_weights_together_are_small():
    """100 MB; they are 91.7 MB."""
    assert sum(p.stat().st_size for p in PRETRAINED.rglob("*.safetensors")) <= 100e6


def test_a_shipped_run_draws_what_the_run_draws(trained: Path, phantoms: Path, tmp_path: Path):
    trained = Path(shutil.copytree(trained, tmp_path / "trained"))
    shutil.rmtree(trained / "tiny" / "report", ignore_errors=True)  # of another test
    where = ["--checkpoints", trained, "--run", "tiny"]
    ship = [
        "benchmarks/ship.py", "--checkpoints", trained, "--run", "tiny", "--out", tmp_path / "runs" / "shipped",
        "--data", "Phantoms, procedural (licence: none needed).", "--notes", "A test.",
    ]  # fmt: skip
    refused = run_any(*ship)
    assert refused.returncode == 2 and "evaluate.py" in refused.stderr
    (trained / "tiny" / "report").mkdir()
    numbers = {"value": 0.01, "floor": 0.02, "ci_low": 0.0, "ci_high": 0.03, "n": 100}
    (trained / "tiny" / "report" / "report.json").write_text(json.dumps({"memorisation": {"copy_rate": numbers}}))
    run(*ship)
    home = tmp_path / "runs" / "shipped"
    sizes = [sum(p.stat().st_size for p in f.glob("*/best.safetensors")) for f in (home, trained / "tiny")]
    assert sizes[0] < 0.7 * sizes[1]
    drawn = []
    for flags in (where, ["--checkpoints", tmp_path / "runs", "--run", "shipped"]):
        out = tmp_path / f"out{len(drawn)}"
        run("predict.py", *flags, "--num-images", "4", "--out", out)
        drawn.append(np.concatenate(list(images(out).values())).astype(int))
    assert np.abs(drawn[0] - drawn[1]).mean() < 1
    card = (home / "README.md").read_text()
    assert "| copy_rate | 0.01 | 0 … 0.03 | 0.02 | 100 |" in card and "A test." in card and "minutes" in card
