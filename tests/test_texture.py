"""Texture: what is drawn on decoded images, and texture.py as people run it."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY_TEXTURE, run, run_any, start
from hypothesis import given
from hypothesis import strategies as st
from test_distil import flags as distil_flags
from test_pipeline import images, same_weights, where
from test_vae import normal, tiny_vae

from cluster import Ranks
from config import DistilConfig, TextureConfig
from distil import Student, Trajectories, texture_task
from modules import sample
from sampling import load_run
from texture import build_texture
from utils import read_jsonl
from vae import Texture
from weights import read_meta, save_weights


def tiny_texture(side: int = 16) -> Texture:
    """A texture that was not trained, but whose output is not 0 either."""
    torch.manual_seed(3)
    texture = Texture(side, (8, 16), num_steps=3, noise=0.5).eval().requires_grad_(False)
    torch.nn.init.normal_(texture.unet.out.weight, std=0.1)
    return texture


def test_the_loss_is_the_error_of_v_of_slices():
    """x_t = alpha x + sigma eps and the target alpha eps - sigma x, in float64, bands and gains, too."""
    texture, x, noise = tiny_texture(), normal(4, 1, 16, 16) / 3, normal(4, 1, 16, 16, seed=1)
    t = texture.scheduler.timesteps[[0, 1, 2, 2]]
    loss, estimate = texture(x, t, noise)
    abar = texture.scheduler.abar[t.numpy()][:, None, None, None]
    alpha, sigma, x, eps = np.sqrt(abar), np.sqrt(1 - abar), x.double().numpy(), noise.double().numpy()
    x_t = alpha * x + sigma * eps
    rows, noise_bands = x_t / sigma, []
    for d in (1, 3, 9):
        around = np.pad(rows, [(0, 0), (0, 0), (d, d), (d, d)], mode="edge")
        smooth = sum(around[:, :, i : i + 16, j : j + 16] for i in (0, d, 2 * d) for j in (0, d, 2 * d)) / 9
        noise_bands.append((rows - smooth).clip(-4, 4))
        rows = smooth
    parts = texture.unet(torch.tensor(np.concatenate([x_t, *noise_bands], axis=1), dtype=torch.float32), t)
    v, *gains = parts.double().numpy().transpose(1, 0, 2, 3)[:, :, None]
    out = v + sum(g * b for g, b in zip(gains, noise_bands))
    np.testing.assert_allclose(loss, ((out - (alpha * eps - sigma * x)) ** 2).mean((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(estimate, alpha * x_t - sigma * out, atol=1e-4)


@given(st.floats(0.25, 2))
def test_the_schedule_ends_at_the_noise_that_was_asked_for(noise: float):
    scheduler = Texture(16, (8,), noise=noise).scheduler
    abar = scheduler.abar[scheduler.fast_timesteps]
    np.testing.assert_allclose(np.sqrt((1 - abar) / abar)[[0, -1]], [0.01, noise], rtol=0.01)


def test_a_network_that_knows_the_slice_draws_it():
    """It begins with noise on the image at hand, and whatever that is, it ends at the slice itself."""
    texture, x, y = tiny_texture(), *(normal(2, 1, 16, 16, seed=k).clamp(-3, 3) / 4 for k in (1, 2))
    noise, seen = normal(2, 1, 16, 16, seed=3), []

    def knows(both: torch.Tensor, t: torch.Tensor, _: None) -> torch.Tensor:
        alpha, sigma = texture.scheduler.alpha_sigma(t)
        x_t = both[:, :1]
        seen.append((x_t, alpha, sigma))
        return torch.cat([alpha * (x_t - alpha * x) / sigma - sigma * x, torch.zeros(2, 3, 16, 16)], dim=1)

    texture.unet.forward = knows
    torch.testing.assert_close(texture.draw(y, noise), x, atol=1e-4, rtol=0)
    x_t, alpha, sigma = seen[0]
    torch.testing.assert_close(x_t, alpha * (y + 0.5 * noise), atol=1e-3, rtol=0)
    torch.testing.assert_close(sigma / alpha, torch.full_like(alpha, 0.5), atol=1e-3, rtol=0)
    assert len(seen) == 3


def test_texture_is_of_the_image_and_off_where_nobody_asks_for_it():
    """Noise by (seed, k) alone; the background is black; the decoder's mean does not depend on it."""
    vae, z = tiny_vae(), normal(3, 2, 4, 4)
    plain = vae.decode(z)
    assert vae.texture_noise(5, [0]) is None
    vae.texture = tiny_texture(vae.config["image_size"])
    noise = vae.texture_noise(5, [0, 1, 7])
    assert noise.shape == plain.shape and torch.equal(noise[2:], vae.texture_noise(5, [7]))
    assert not torch.equal(noise[0], vae.texture_noise(6, [0])[0])
    assert torch.equal(vae.decode(z), plain)
    drawn = vae.decode(z, noise)
    assert (drawn - plain).abs().mean() > 1e-3 and drawn.abs().max() <= 1
    torch.testing.assert_close(vae.decode(z[1:2], noise[1:2]), drawn[1:2])
    # About black around what is bright, as decoders leave it
    image = torch.full_like(plain, -0.95)
    image[:, :, 4:12, 4:12] = 0.5
    drawn = vae.texture.draw(image, noise)
    assert (drawn[:, :, :2] == -1).all() and not (drawn[:, :, 3:13, 3:13] == -1).all()
    vae.texture.config["black"] = False
    assert not (vae.texture.draw(image, noise)[:, :, :2] == -1).all()


@pytest.mark.parametrize(("air", "black"), [(0, True), (5, False)])
def test_the_background_is_that_of_the_slices(air: int, black: bool):
    slices = torch.poisson(torch.full((8, 16, 16), float(air)), torch.Generator().manual_seed(0)).to(torch.uint8)
    slices[:, 4:12, 4:12] = 150
    assert build_texture(TextureConfig(channels=(8,)), slices).config["black"] == black


@pytest.fixture(scope="module")
def textured(trained: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints folder of the finished run `tiny`, which has learnt texture for six epochs."""
    home = Path(shutil.copytree(trained, tmp_path_factory.mktemp("textured") / "checkpoints"))
    run("texture.py", *where(home, phantoms), *TINY_TEXTURE, "--epochs", "6")
    return home


def test_texture_is_learnt_and_all_else_stays(textured: Path, trained: Path, tmp_path: Path):
    """VAE and U-Net are the files of before; images of the same seed are other ones, always the same."""
    for stage in ("vae", "diffusion"):
        files = [home / "tiny" / stage / "best.safetensors" for home in (trained, textured)]
        assert files[0].read_bytes() == files[1].read_bytes()
    folder = textured / "tiny" / "texture"
    log = read_jsonl(folder / "metrics.jsonl")
    assert [row["epoch"] for row in log] == [*range(1, 7)]
    # Most of the loss is noise that nobody could see under so little of it: about 1 at the cleanest timesteps.
    # A network that answers 0 has a loss of 1 to 2.
    assert log[-1]["loss/val"] < log[0]["loss/val"] < 2 and log[-1]["loss/train"] < 0.9 * log[0]["loss/train"]
    # At first what is drawn is mostly noise.
    assert log[0]["PSNR/val"] < log[-1]["PSNR/val"] and log[0]["SSIM/val"] < log[-1]["SSIM/val"]
    assert all(abs(row["high frequencies, dB/val"]) < 10 for row in log)
    shown = cv2.imread(str(folder / "texture.png"), 0)
    assert shown.std() > 5
    generate = ["--checkpoints", textured, "--run", "tiny", "--num-images", "6", "--seed", "7"]
    for out in ("once", "again"):
        run("predict.py", *generate, "--out", tmp_path / out)
    run("predict.py", "--checkpoints", trained, *generate[2:], "--out", tmp_path / "without")
    made, same, without = (images(tmp_path / name) for name in ("once", "again", "without"))
    assert made.keys() == same.keys() == without.keys() and len(made) == 6
    for name in made:
        assert np.array_equal(made[name], same[name]) and not np.array_equal(made[name], without[name])
    # A folder that was begun without texture is not filled up with it.
    mixed = run_any("predict.py", *generate, "--num-images", "8", "--out", tmp_path / "without")
    assert mixed.returncode == 2 and "holds the images of another command" in mixed.stderr


def test_an_interrupted_training_resumes_to_the_same_weights(textured: Path, phantoms: Path, tmp_path: Path):
    home = Path(shutil.copytree(textured, tmp_path / "checkpoints"))
    shutil.rmtree(home / "tiny" / "texture")
    command = [*where(home, phantoms), *TINY_TEXTURE, "--epochs", "6", "--save-minutes", "0"]
    process = start("texture.py", *command)
    log = home / "tiny" / "texture" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 1):
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 75
    assert "resuming" in run("texture.py", *command).stdout
    for name in ("best.safetensors", "final.safetensors"):
        assert same_weights(home / "tiny" / "texture" / name, textured / "tiny" / "texture" / name)
    assert "is finished" in run("texture.py", *command).stdout


@pytest.fixture(scope="module")
def distilled(textured: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints folder of run `t`, textured and trained on all timesteps, and of its student `s`."""
    home = Path(shutil.copytree(textured, tmp_path_factory.mktemp("distilled") / "checkpoints"))
    shutil.rmtree(home / "tiny" / "diffusion")
    full = "--channels 8 --blocks 1 --attention --grid full --epochs 1 --precision fp32 --compile off".split()
    run("train.py", *where(home, phantoms), *full, "--wandb", "disabled", "--sample-every", "9")
    shutil.move(home / "tiny", home / "t")
    run("distil.py", *distil_flags(home, "s"))
    return home


def test_a_student_has_its_teachers_texture_until_it_has_one_of_fewer_steps(distilled: Path, tmp_path: Path):
    home = Path(shutil.copytree(distilled, tmp_path / "checkpoints"))
    own = home / "s" / "texture" / "best.safetensors"
    assert own.read_bytes() == (home / "t" / "texture" / "best.safetensors").read_bytes()
    fewer = [*distil_flags(home, "s"), "--part", "texture", "--num-steps", "1", "--epochs", "8"]
    run("distil.py", *fewer)
    log = read_jsonl(own.parent / "metrics.jsonl")
    name = "distance to the teacher (RMS of images)"
    assert log[-1]["loss/val"] < 0.9 * log[0]["loss/val"] and log[-1][name] < 0.9 * log[0][name]
    assert cv2.imread(str(own.parent / "samples.png"), 0).std() > 5
    texture = load_run(home / "s", "best", torch.device("cpu"))[1].texture
    assert len(texture.scheduler.fast_timesteps) == 1 and texture.scheduler.default_solver == "ddim"
    run("predict.py", "--checkpoints", home, "--run", "s", "--num-images", "2", "--out", tmp_path / "out")
    # Both commands again: the U-Net's does not put the teacher's texture back.
    kept = own.read_bytes()
    for command in (distil_flags(home, "s"), fewer):
        assert "is finished" in run("distil.py", *command).stdout
    assert own.read_bytes() == kept
    # Its pictures are of nobody, so they are on the page that may be published, too.
    run("report.py", "--checkpoints", home, "--run", "s", "--no-training-pictures")
    assert "The same seeds by the teacher" in (home / "s" / "report-without-people.html").read_text()


def test_a_textures_trajectories_end_where_it_draws(distilled: Path, tmp_path: Path):
    """They begin with the images of the student's run under noise, and stop where the student does."""
    cfg = DistilConfig(
        run="s", teacher="t", part="texture", num_steps=1, checkpoints=str(distilled), precision="fp32"
    )  # fmt: skip
    device = torch.device("cpu")
    task, (unet, vae, _, _) = texture_task(cfg, device), load_run(distilled / "s", "best", device)
    made = Trajectories(task, 3, 5, str(tmp_path), Ranks(device), "")
    z = unet.generate(vae.latent_shape, 5, range(3), made.conditions)  # 4 steps of DDIM
    image, noise = vae.decode(z), vae.texture_noise(5, range(3))
    drawn = vae.texture.draw(image, noise)
    assert made.states.shape == (3, 2, *image.shape[1:])
    mask = drawn > -1  # the background was made black, and what was darker than black, too
    torch.testing.assert_close(made.states[:, 1].float().clamp(-1, 1)[mask], drawn[mask], atol=2e-3, rtol=0)
    torch.testing.assert_close(made.states[:, 0].float(), task.model.cover(image, noise), atol=5e-3, rtol=0)
    # An answer that is right in every step makes the student draw the same.
    x_t, x_s = made.states.float().unbind(1)
    alpha, sigma = task.model.scheduler.alpha_sigma(task.model.scheduler.timesteps)
    task.model.network = lambda x, t, y: (alpha * x - x_s) / sigma  # type: ignore[method-assign]
    assert Student(task.model)(made.states, made.conditions, torch.zeros(3, dtype=torch.int64)).max() < 1e-8
    torch.testing.assert_close(sample(task.model.denoiser(), x_t, task.model.scheduler), x_s, atol=1e-4, rtol=0)


def test_the_students_timesteps_are_among_those_of_ten_steps():
    own = [Texture(16, (8,), num_steps=n, grid="student").scheduler.fast_timesteps for n in (1, 3, 9)]
    ten = Texture(16, (8,)).scheduler.fast_timesteps
    assert own == [ten[9:], ten[3::3], ten[1:]]


def test_textures_that_cannot_be_distilled(distilled: Path, textured: Path, tmp_path: Path):
    def refused(home: Path, name: str, *args: str) -> str:
        done = run_any("distil.py", *distil_flags(home, name), "--part", "texture", "--num-steps", "1", *args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "does not fit the 4 steps of this texture: take 1, 3" in refused(distilled, "s", "--num-steps", "2")
    assert "is the teacher" in refused(distilled, "t")
    assert "run new has no U-Net" in refused(distilled, "new")
    (distilled / "linked").mkdir()
    (distilled / "linked" / "texture").symlink_to("../t/texture")
    assert "a link to the teacher's" in refused(distilled, "linked")
    home = Path(shutil.copytree(distilled, tmp_path / "checkpoints"))
    own = home / "s" / "texture" / "best.safetensors"
    texture = load_run(home / "s", "best", torch.device("cpu"))[1].texture
    meta = read_meta(own)
    save_weights(own, texture, {**meta, "model": {**meta["model"], "num_steps": 1, "grid": "student"}})
    assert "was distilled itself" in refused(home, "t", "--teacher", "s")
    shutil.rmtree(home / "t" / "texture")
    assert "run t has no texture" in refused(home, "s")


def test_what_cannot_be_done_is_said(textured: Path, phantoms: Path, tmp_path: Path):
    def refused(script: str, *args: str | Path) -> str:
        done = run_any(script, *args)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    home = Path(shutil.copytree(textured, tmp_path / "checkpoints"))
    flags = [*TINY_TEXTURE, "--epochs", "6"]
    assert "run nobody has no VAE" in refused("texture.py", *where(home, phantoms, "nobody"), *flags)
    assert "change --channels or --patch" in refused("texture.py", *where(home, phantoms), *flags, "--patch", "3")
    assert "--num-steps 1 is not between" in refused("texture.py", *where(home, phantoms), *flags, "--num-steps", "1")
    assert "other settings (num_steps 4 -> 5)" in refused(
        "texture.py", *where(home, phantoms), *flags, "--num-steps", "5"
    )
    # Texture of images of another size
    own = home / "tiny" / "texture" / "best.safetensors"
    texture, kept = load_run(home / "tiny", "best", torch.device("cpu"))[1].texture, own.read_bytes()
    meta = read_meta(own)
    save_weights(own, texture, {**meta, "model": {**meta["model"], "image_size": 16}})
    words = ["--checkpoints", home, "--run", "tiny", "--out", tmp_path / "out"]
    assert "is of images of another size than the VAE's" in refused("predict.py", *words)
    # A damaged file
    own.write_bytes(kept[:-7])
    assert "is not a safetensors file of this project" in refused("predict.py", *words)


def test_a_dry_run_says_what_it_would_do(textured: Path, phantoms: Path):
    out = run("texture.py", *where(textured, phantoms, "tiny"), *TINY_TEXTURE, "--dry-run").stdout
    assert "texture   0.0 M parameters" in out and "writes to" in out and "about" in out
