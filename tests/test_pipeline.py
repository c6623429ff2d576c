"""The scripts as people run them: train, stop, resume, sample, map. Real processes on real files."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT, TINY_UNET, TINY_VAE, run, run_any, start
from PIL import Image
from safetensors.torch import load_file

from utils import read_jsonl


def where(checkpoints: Path, phantoms: Path, name: str = "tiny") -> list[str]:
    return ["--data", phantoms, "--checkpoints", checkpoints, "--cache", checkpoints / "cache", "--run", name]


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def images(folder: Path) -> dict[str, np.ndarray]:
    return {p.name: cv2.imread(str(p), 0) for p in sorted(folder.glob("*_*.png"))}


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run's checkpoints folder, to be changed by one test."""
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_training_leaves_everything_it_promises(trained: Path):
    vae, diffusion = trained / "tiny" / "vae", trained / "tiny" / "diffusion"
    for folder, pictures in ((vae, ["reconstructions"]), (diffusion, ["samples", "denoising"])):
        assert {"last.pt", "best.safetensors", "final.safetensors", "metrics.jsonl"} <= {
            p.name for p in folder.iterdir()
        }
        for name in [*pictures, "curves"]:
            assert cv2.imread(str(folder / f"{name}.png")).std() > 5, f"{name}.png shows nothing"
        for name in pictures:
            assert Image.open(folder / f"{name}.gif").format == "GIF"
    assert Image.open(vae / "reconstructions.gif").n_frames == 2  # it grows by one each epoch
    rows = read_jsonl(diffusion / "metrics.jsonl")
    assert [r["epoch"] for r in rows] == [1, 2]
    logged = set(rows[-1])
    assert {"loss/train", "loss/val", "learning rate", "gradient norm", "images per s"} <= logged
    assert {"unpaired PSNR/generated", "unpaired PSNR/real", "unpaired SSIM/generated", "unpaired SSIM/real"} <= logged
    assert {"denoising PSNR/t=0", "denoising SSIM/t=999", "loss by timestep, val/t=202"} <= logged
    # an almost clean latent is denoised better than pure noise
    assert rows[-1]["denoising PSNR/t=0"] > rows[-1]["denoising PSNR/t=999"]


def test_latents_in_the_checkpoint_are_normalised(trained: Path):
    tensors = load_file(trained / "tiny" / "vae" / "best.safetensors")
    assert tensors["latent_std"].shape == (2,) and (tensors["latent_std"] != 1).all()
    assert (tensors["latent_mean"] != 0).all()


def test_finished_runs_say_so_and_change_nothing(copied: Path, phantoms: Path):
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file() and "cache" not in p.parts}
    out = run("pre_train.py", *where(copied, phantoms), *TINY_VAE, "--epochs", "2", "--gif-every", "1").stdout
    assert "is finished" in out
    out = run("train.py", *where(copied, phantoms), *TINY_UNET, "--epochs", "2", "--sample-every", "2").stdout
    assert "is finished" in out
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_fresh_moves_the_old_run_aside(copied: Path, phantoms: Path):
    old = (copied / "tiny" / "vae" / "final.safetensors").read_bytes()
    run("pre_train.py", *where(copied, phantoms), *TINY_VAE, "--epochs", "1", "--fresh", "--seed", "1")
    (aside,) = (copied / "tiny").glob("old-*/vae/final.safetensors")
    assert aside.read_bytes() == old
    # and the U-Net of the old VAE is not sampled through the new one
    refused = run_any("predict.py", "--checkpoints", copied, "--run", "tiny", "--out", copied / "out")
    assert refused.returncode == 2 and "another VAE" in refused.stderr


def test_vae_two_and_two_epochs_are_four(phantoms: Path, tmp_path: Path):
    for name in ("whole", "parts"):
        for epochs in {"whole": "4", "parts": "24"}[name]:
            run(
                "pre_train.py",
                *where(tmp_path, phantoms, name),
                *TINY_VAE,
                "--epochs",
                epochs,
                "--flip",
                "--shift",
                "0.1",
            )
    a, b = tmp_path / "whole" / "vae", tmp_path / "parts" / "vae"
    assert same_weights(a / "final.safetensors", b / "final.safetensors")
    drop = ("images per s",)
    numbers = [[{k: v for k, v in r.items() if k not in drop} for r in read_jsonl(f / "metrics.jsonl")] for f in (a, b)]
    assert numbers[0] == numbers[1]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 75), (signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_unet_interrupted_anywhere_resumes_to_the_same_weights(
    how: signal.Signals, code: int, copied: Path, phantoms: Path, tmp_path: Path
):
    # Dropout, Lookahead and mirroring: all that is random or has a memory of its own.
    flags = [*where(copied, phantoms), *TINY_UNET, "--epochs", "20", "--dropout", "0.1", "--lookahead", "--flip"]
    folder = copied / "tiny" / "diffusion"
    shutil.rmtree(folder)
    process = start("train.py", *flags, "--save-minutes", "0")  # writes last.pt at every step
    wait_for(folder / "last.prev.pt", process)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert not (folder / "final.safetensors").exists()
    if how != signal.SIGKILL:
        assert "saved at epoch" in out
    assert "resuming" in run("train.py", *flags).stdout
    interrupted = shutil.copy(folder / "final.safetensors", tmp_path / "interrupted.safetensors")
    shutil.rmtree(folder)
    assert "resuming" not in run("train.py", *flags).stdout
    assert same_weights(interrupted, folder / "final.safetensors")


def test_torn_last_file_falls_back_to_the_one_before(copied: Path, phantoms: Path):
    folder = copied / "tiny" / "vae"
    flags = [*where(copied, phantoms), *TINY_VAE, "--gif-every", "1", "--epochs"]
    run("pre_train.py", *flags, "3")  # now last.prev.pt is of epoch 2
    last = folder / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    done = run("pre_train.py", *flags, "4")
    assert "cannot be read" in done.stderr and "resuming" in done.stdout and "epoch 2.00" in done.stdout
    assert [r["epoch"] for r in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_single_class_and_unconditional_train_without_labels(copied: Path, phantoms: Path, tmp_path: Path):
    one = tmp_path / "one"
    for split in ("train", "val"):
        shutil.copytree(phantoms / split / "NC", one / split / "NC")
    shutil.rmtree(copied / "tiny" / "diffusion")
    base = ["--checkpoints", copied, "--cache", copied / "cache", "--run", "tiny", *TINY_UNET, "--epochs", "1"]
    plan = run("train.py", "--data", one, *base, "--dry-run").stdout
    assert "unconditional" in plan
    run("train.py", "--data", phantoms, *base, "--unconditional")
    assert not any("label" in k for k in load_file(copied / "tiny" / "diffusion" / "final.safetensors"))
    run("predict.py", "--checkpoints", copied, "--run", "tiny", "--num-images", "2", "--out", tmp_path / "out")
    assert sorted(images(tmp_path / "out")) == ["any_00000.png", "any_00001.png"]
    refused = run_any(
        "predict.py", "--checkpoints", copied, "--run", "tiny", "--class-name", "AD", "--out", tmp_path / "x"
    )
    assert refused.returncode == 2 and "unconditional" in refused.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.fixture(scope="session")
def six(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("six") / "out"
    run("predict.py", "--checkpoints", trained, "--run", "tiny", "--num-images", "6", "--seed", "7", "--out", out)
    return out


def predict(trained: Path, out: Path, *flags: str) -> dict[str, np.ndarray]:
    run("predict.py", "--checkpoints", trained, "--run", "tiny", "--seed", "7", "--out", out, *flags)
    return images(out)


def test_predict_writes_images_grid_gif_and_manifest(six: Path):
    made = images(six)
    assert list(made) == [f"{'AD' if k % 2 == 0 else 'NC'}_{k:05d}.png" for k in (0, 2, 4)] + [
        f"NC_{k:05d}.png" for k in (1, 3, 5)
    ]
    assert all(image.shape == (32, 32) for image in made.values())
    rows = list(csv.DictReader((six / "manifest.csv").open()))
    assert [r["file"] for r in rows] == [f"{'AN'[k % 2]}{'DC'[k % 2]}_{k:05d}.png" for k in range(6)]
    assert all(r["seed"] == "7" and r["index"] == str(k) and len(r["checkpoint"]) == 12 for k, r in enumerate(rows))
    assert Image.open(six / "denoising.gif").n_frames == 10
    assert cv2.imread(str(six / "grid.png"), 0).shape == (2 * 34 - 2, 3 * 34 - 2)
    assert cv2.imread(str(six / "denoising.png"), 0).shape == (8 * 34 - 2, 10 * 34 - 2)


@pytest.mark.parametrize("batch", ["1", "4"])
def test_image_k_is_the_same_for_every_batch_size(six: Path, trained: Path, tmp_path: Path, batch: str):
    again = predict(trained, tmp_path / "out", "--num-images", "6", "--batch-size", batch)
    for name, image in images(six).items():
        assert np.abs(again[name].astype(int) - image).max() <= 1  # float rounding at the edge of two grey levels


def test_seed_class_and_guidance_change_the_images(six: Path, trained: Path, tmp_path: Path):
    first = images(six)
    assert not np.array_equal(first["AD_00000.png"], first["AD_00002.png"])
    ad = predict(trained, tmp_path / "ad", "--num-images", "2", "--class-name", "AD")
    nc = predict(trained, tmp_path / "nc", "--num-images", "2", "--class-name", "NC")
    guided = predict(trained, tmp_path / "guided", "--num-images", "2", "--class-name", "AD", "--guidance", "6")
    assert np.abs(ad["AD_00000.png"].astype(int) - first["AD_00000.png"]).max() <= 1
    assert not np.array_equal(ad["AD_00000.png"], nc["NC_00000.png"])
    assert not np.array_equal(ad["AD_00000.png"], guided["AD_00000.png"])


def test_interrupted_sampling_is_completed_by_the_same_command(six: Path, trained: Path, tmp_path: Path):
    out = Path(shutil.copytree(six, tmp_path / "out"))
    for name in ("NC_00001.png", "AD_00004.png", "manifest.csv", "grid.png", "denoising.gif"):
        (out / name).unlink()
    untouched = (out / "NC_00005.png").stat().st_mtime_ns
    predict(trained, out, "--num-images", "6")
    assert (out / "NC_00005.png").stat().st_mtime_ns == untouched
    for name, image in images(six).items():
        assert np.abs(images(out)[name].astype(int) - image).max() <= 1
    assert (out / "manifest.csv").read_text() == (six / "manifest.csv").read_text()
    assert (out / "denoising.gif").exists()
    done = run(
        "predict.py", "--checkpoints", trained, "--run", "tiny", "--seed", "7", "--out", out, "--num-images", "6"
    )
    assert "is complete" in done.stdout
    other = run_any("predict.py", "--checkpoints", trained, "--run", "tiny", "--seed", "8", "--out", out)
    assert other.returncode == 2 and "another command" in other.stderr


def test_full_grid_weights_take_normal_and_every_fast_sampling(copied: Path, phantoms: Path, tmp_path: Path):
    shutil.rmtree(copied / "tiny" / "diffusion")
    run("train.py", *where(copied, phantoms), *TINY_UNET, "--epochs", "1", "--grid", "full", "--prediction", "eps")
    normal = predict(copied, tmp_path / "normal", "--num-images", "1", "--sampling", "normal")
    record = json.loads((tmp_path / "normal" / "command.json").read_text())
    assert len(record["timesteps"]) == 1000 and (record["solver"], record["eta"]) == ("ddim", 1.0)
    assert len(normal) == 1
    predict(copied, tmp_path / "fast", "--num-images", "1")
    record = json.loads((tmp_path / "fast" / "command.json").read_text())
    assert record["timesteps"] == [0, 5, 22, 73, 202, 410, 603, 757, 886, 999] and record["solver"] == "dpm++2m"
    predict(copied, tmp_path / "five", "--num-images", "1", "--grid", "uniform", "--num-steps", "5", "--solver", "ddim")
    record = json.loads((tmp_path / "five" / "command.json").read_text())
    assert record["timesteps"] == [0, 250, 500, 749, 999] and record["eta"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# t-SNE, command lines


def test_tsne_draws_a_map_and_measures_the_separation_by_person(
    trained: Path, six: Path, phantoms: Path, tmp_path: Path
):
    base = ["--checkpoints", trained, "--cache", tmp_path, "--run", "tiny", "--wandb", "disabled", "--perplexity", "10"]
    run("tsne.py", "--data", phantoms, *base, "--out", tmp_path / "map")
    result = json.loads((tmp_path / "map" / "tsne.json").read_text())
    assert result["generated"] == 128 and result["slices"] == 80
    s = result["separation"]
    assert 0 <= s["auc"] <= 1 and s["chance"] == 0.5 and s["people"] == 20
    assert cv2.imread(str(tmp_path / "map" / "tsne.png")).std() > 10
    run("tsne.py", "--data", phantoms, *base, "--out", tmp_path / "map2", "--generated", six)
    assert json.loads((tmp_path / "map2" / "tsne.json").read_text())["generated"] == 6


def test_separation_recognises_classes_and_not_people():
    from tsne import separation

    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(40), 8)
    labels = people % 2
    own = rng.normal(size=(40, 30))[people] * 3 + rng.normal(size=(320, 30))  # each person unmistakable, no class
    nothing = separation(own, labels, people)
    assert 0.2 < nothing["auc"] < 0.8  # by slice it would be 1
    own[:, 0] += 12 * labels
    assert separation(own, labels, people)["auc"] > 0.95


@pytest.mark.parametrize("script", ["pre_train.py", "train.py", "predict.py", "tsne.py", "dataset.py"])
def test_help_answers_without_torch(script: str):
    code = (
        f"import sys, runpy; sys.argv = ['{script}', *{['check'] if script == 'dataset.py' else []}, '--help']\n"
        f"try: runpy.run_path('{ROOT / script}', run_name='__main__')\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout and "--" in done.stdout


def test_presets_defaults_and_flags():
    from config import PRESETS, PretrainConfig, TrainConfig, parse

    assert parse(TrainConfig, []) == parse(TrainConfig, ["adni"])
    adni = parse(TrainConfig, ["adni"])
    assert (adni.batch_size, adni.epochs, adni.lr, adni.warmup) == (16, 500, 1e-4, 0.1)
    assert parse(PretrainConfig, []).image_size == 256
    assert parse(PretrainConfig, ["small"]).image_size == 128
    assert parse(PretrainConfig, ["demo"]).data == "phantom"
    assert parse(TrainConfig, ["demo", "--run", "x", "--epochs", "3", "--channels", "8", "16"]).channels == (8, 16)
    for preset in PRESETS:
        assert parse(TrainConfig, [preset, "--grid", "full"]).grid == "full"


def test_dry_run_prints_the_plan_and_writes_nothing(trained: Path, phantoms: Path, tmp_path: Path):
    flags = ["--data", phantoms, "--checkpoints", tmp_path / "none", "--cache", tmp_path / "cache", "--dry-run"]
    plan = run("pre_train.py", "small", *flags).stdout
    for word in ("80 slices of 20 people", "M parameters", "steps of 8", "memory", "writes to", "GFLOP"):
        assert word in plan, word
    assert not (tmp_path / "none").exists()
    before = sorted(trained.rglob("*"))
    plan = run("train.py", *where(trained, phantoms), *TINY_UNET, "--dry-run").stdout
    for word in ("80 slices of 20 people", "M parameters", "steps of 16", "memory", "writes to", "conditional"):
        assert word in plan, word
    assert [p for p in sorted(trained.rglob("*")) if "cache" not in p.parts] == before
