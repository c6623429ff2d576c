"""What people get wrong: one clear sentence, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import PATIENCE, ROOT, TINY_UNET, TINY_VAE, run, run_any
from safetensors.torch import load_file

from dataset import read_images


def refused(script: str, *args: str | Path) -> str:
    """The sentence of a script that is expected to refuse."""
    done = run_any(script, *args)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


def pre_train(data: Path, tmp_path: Path, *flags: str | Path) -> str:
    where = ["--data", data, "--checkpoints", tmp_path / "runs", "--cache", tmp_path / "cache"]
    return refused("pre_train.py", *where, *TINY_VAE, "--epochs", "1", *flags)


def test_no_data(tmp_path: Path):
    sentence = pre_train(tmp_path / "nothing", tmp_path)
    assert "there is no data folder" in sentence and "--data" in sentence and "phantom" in sentence


def test_bad_files_stop_the_run_before_it_starts(phantoms: Path, tmp_path: Path):
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    (data / "train" / "AD" / "Q1_0.png").write_text("text")
    ok, jpeg = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8))
    (data / "train" / "NC" / "Q2_0.jpg").write_bytes(jpeg.tobytes()[:-100])
    assert "2 of 98 files" in pre_train(data, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_one_person_on_both_sides(phantoms: Path, tmp_path: Path):
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    file = next((data / "train" / "AD").glob("*.png"))
    shutil.copy(file, data / "val" / "AD" / file.name)
    sentence = pre_train(data, tmp_path)
    assert "is in two splits" in sentence and f"val/AD/{file.name}" in sentence and "train/AD/" in sentence


def test_image_size_the_model_cannot_take(phantoms: Path, tmp_path: Path):
    assert "cannot be divided by 4" in pre_train(phantoms, tmp_path, "--image-size", "30")
    assert "cannot give a downsampling of 3" in pre_train(phantoms, tmp_path, "--downsample", "3")


def test_unet_before_its_vae_and_latents_it_cannot_halve(trained: Path, phantoms: Path, tmp_path: Path):
    base = ["--data", phantoms, "--cache", tmp_path, *TINY_UNET]
    assert "has no VAE" in refused("train.py", *base, "--checkpoints", tmp_path, "--run", "x")
    sentence = refused(
        "train.py", *base, "--checkpoints", trained, "--run", "tiny", "--channels", "8", "8", "8", "8", "8"
    )
    assert "8x8 cannot be halved 4 times" in sentence


def test_settings_of_a_started_run_cannot_change_silently(copied: Path, phantoms: Path, tmp_path: Path):
    where = ["--data", phantoms, "--checkpoints", copied, "--cache", tmp_path, "--run", "tiny"]
    sentence = refused("train.py", *where, *TINY_UNET, "--epochs", "3", "--sample-every", "2", "--dropout", "0.5")
    assert "dropout 0.0 -> 0.5" in sentence and "--fresh" in sentence
    file = next((phantoms / "train" / "AD").glob("*.png"))
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    (data / "train" / "AD" / file.name).unlink()
    where[1] = data
    assert "other slices" in refused("train.py", *where, *TINY_UNET, "--epochs", "3", "--sample-every", "2")


def test_checkpoints_that_are_not_what_they_seem(copied: Path, tmp_path: Path):
    predict = ["predict.py", "--checkpoints", copied, "--run", "tiny", "--out", tmp_path / "out"]
    unet, vae = (copied / "tiny" / part / "best.safetensors" for part in ("diffusion", "vae"))
    whole = unet.read_bytes()

    shutil.copy(vae, unet)
    assert "does not hold diffusion weights" in refused(*predict)

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    unet.write_bytes(pickle.dumps(Trap()))
    assert "not a safetensors file" in refused(*predict)
    assert not (tmp_path / "executed").exists()

    unet.write_bytes(whole[: len(whole) // 2])
    assert "not a safetensors file" in refused(*predict)

    changed = whole.replace(b'\\"blocks\\": 1', b'\\"blocks\\": 2')  # a header that describes another network
    unet.write_bytes(changed)
    assert "its own checksum: copy it again" in refused(*predict)
    unet.write_bytes(changed.replace(b'"digest"', b'"number"'))  # older files have none
    assert "another architecture" in refused(*predict)

    unet.unlink()
    assert "there are no weights" in refused(*predict)
    assert not (tmp_path / "out").exists()


def test_weights_that_name_folders_elsewhere_write_nothing(copied: Path, tmp_path: Path):
    unet = copied / "tiny" / "diffusion" / "best.safetensors"
    whole = unet.read_bytes().replace(b'"digest"', b'"number"')
    unet.write_bytes(whole.replace(b'\\"AD\\", \\"NC\\"', b'\\"..\\", \\"NC\\"'))
    before = sorted(tmp_path.rglob("*"))
    predict = ["predict.py", "--checkpoints", copied, "--run", "tiny", "--out", tmp_path / "out"]
    assert "names classes that cannot be folders" in refused(*predict)
    assert sorted(tmp_path.rglob("*")) == before


def test_classes_of_any_name_go_all_the_way(phantoms: Path, tmp_path: Path):
    data = Path(shutil.copytree(phantoms, tmp_path / "dä ta"))
    for split in ("train", "val"):
        (data / split / "AD").rename(data / split / "-AD")
        (data / split / "NC").rename(data / split / "NC é 1")
    terminal = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}  # cannot show them
    where = ["--data", data, "--checkpoints", tmp_path / "c", "--cache", tmp_path / "cache", "--run=-r é"]
    run("pre_train.py", *where, *TINY_VAE, "--epochs", "1", env=terminal)
    run("train.py", *where, *TINY_UNET, "--epochs", "1", "--sample-every", "9", env=terminal)
    assert "classes   -AD, NC " in run("train.py", *where, *TINY_UNET, "--dry-run", env=terminal).stdout
    draw = ["predict.py", *where[2:4], "--run=-r é", "--num-images", "3"]
    run(*draw, "--out", tmp_path / "both", env=terminal)
    run(*draw, "--out", tmp_path / "one", "--class-name=-AD", env=terminal)
    assert {p.parent.name for p in (tmp_path / "one").glob("train/*/*.png")} == {"-AD"}
    data, problems = read_images(tmp_path / "both")
    images, names = data.images, data.class_names()
    assert len(images) == 3 and names == ["-AD", "NC é 1", "-AD"] and not problems
    assert "is complete" in run(*draw, "--out", tmp_path / "both", env=terminal).stdout


def test_no_secret_is_written_down(phantoms: Path, tmp_path: Path):
    secret = "5ec4e75ec4e75ec4e75ec4e75ec4e75ec4e7abcd"
    where = ["--data", phantoms, "--checkpoints", tmp_path / "runs", "--cache", tmp_path / "cache", *TINY_VAE]
    done = run(
        "pre_train.py", *where, "--epochs", "1", "--wandb", "offline",
        env={**os.environ, "WANDB_API_KEY": secret}, cwd=tmp_path,
    )  # fmt: skip
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files), done.stderr  # wandb took part
    assert secret not in done.stdout + done.stderr
    assert not [p for p in files if secret.encode() in p.read_bytes()]


def test_sampling_that_the_weights_cannot_do(trained: Path, tmp_path: Path):
    predict = ["predict.py", "--checkpoints", trained, "--run", "tiny", "--out", tmp_path / "out"]
    sentence = refused(*predict, "--class-name", "MCI")
    assert "no class 'MCI'" in sentence and "AD, NC" in sentence
    sentence = refused(*predict, "--sampling", "normal")
    assert "trained on 10 (logsnr)" in sentence and "--grid full" in sentence
    assert "no others" in refused(*predict, "--grid", "uniform")
    assert "no others" in refused(*predict, "--num-steps", "20")
    assert "deterministic" in refused(*predict, "--solver", "heun", "--eta", "1")
    assert not (tmp_path / "out").exists()


def test_output_folders_that_are_not_ours(trained: Path, tmp_path: Path):
    predict = ["predict.py", "--checkpoints", trained, "--run", "tiny", "--num-images", "1", "--out"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    assert "is not empty" in refused(*predict, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(*predict, tmp_path / "file")
    assert "/proc/nowhere" in refused(*predict, "/proc/nowhere/out")  # cannot be written, not even by root


def test_flags_and_presets_that_do_not_exist():
    done = run_any("train.py", "--epoch", "3", "--data", "x")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "--epoch" in done.stderr
    assert "no preset 'tiny'" in refused("train.py", "tiny")
    assert run_any("predict.py", "--num-images", "many").returncode == 2
    for script, flag, value in (
        ("predict.py", "--num-images", "0"), ("train.py", "--epochs", "0"), ("train.py", "--lr", "nan"),
        ("pre_train.py", "--seed", "-1"), ("pre_train.py", "--batch-size", "0"), ("train.py", "--num-steps", "1"),
    ):  # fmt: skip
        assert f"{flag} {value} is not between" in refused(script, flag, value)


def test_device_that_is_not_there(phantoms: Path, tmp_path: Path):
    assert "--device cuda:77 is not available" in pre_train(phantoms, tmp_path, "--device", "cuda:77")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(
    trained: Path, phantoms: Path, tmp_path: Path, small_disk: Path
):
    cache = tmp_path / "cache"
    flags = [
        "--data",
        phantoms,
        "--checkpoints",
        small_disk,
        "--run",
        "r",
        "--cache",
        cache,
        *TINY_VAE,
        "--gif-every",
        "9",
    ]
    run("pre_train.py", *flags, "--epochs", "1")
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as f:  # fill it to the last block
        try:
            while f.write(b"x" * 4096):
                pass
        except OSError:
            pass
    before = (small_disk / "r" / "vae" / "last.pt").read_bytes()
    sentence = refused("pre_train.py", *flags, "--epochs", "3")
    assert "No space left on device" in sentence and str(small_disk) in sentence
    assert (small_disk / "r" / "vae" / "last.pt").read_bytes() == before
    assert not list((small_disk / "r" / "vae").glob("*.tmp"))
    filler.unlink()
    run("pre_train.py", *flags, "--epochs", "3")

    whole = ["--data", phantoms, "--checkpoints", tmp_path / "c", "--run", "r", "--cache", cache, *TINY_VAE]
    run("pre_train.py", *whole, "--gif-every", "9", "--epochs", "3")
    a, b = (load_file(c / "r" / "vae" / "final.safetensors") for c in (small_disk, tmp_path / "c"))
    assert all((a[k] == b[k]).all() for k in b)


def test_full_disk_under_the_cache_and_the_images(trained: Path, phantoms: Path, tmp_path: Path, small_disk: Path):
    where = ["--data", phantoms, "--checkpoints", tmp_path, *TINY_VAE, "--epochs", "1", "--image-size", "256"]
    assert "No space left" in refused("pre_train.py", *where, "--cache", small_disk)  # 96 slices of 64 KiB
    assert not list(small_disk.glob("*.u8")) and not list(small_disk.glob("*.tmp"))
    (small_disk / "filler").write_bytes(b"x" * 2_060_000)
    predict = [
        "predict.py",
        "--checkpoints",
        trained,
        "--run",
        "tiny",
        "--num-images",
        "60",
        "--out",
        small_disk / "out",
    ]
    assert "No space left" in refused(*predict)
    (small_disk / "filler").unlink()
    assert "images in" in run(*predict).stdout  # the same command completes what is missing
    assert len(list((small_disk / "out").glob("train/*/*.png"))) == 60


@pytest.mark.parametrize("words", ["train.py", "dataset.py slice"])
def test_help_may_be_cut_short(words: str):
    command = f"{sys.executable} {ROOT}/{words} --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.startswith("usage: ") and done.stderr == ""
