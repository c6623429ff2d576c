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
import torch
from conftest import PATIENCE, ROOT, TINY_UNET, TINY_VAE, python, run, run_any, start
from PIL import Image
from safetensors.torch import load_file

import phantom
from cluster import Ranks
from config import DataConfig, PredictConfig, TrainConfig
from dataset import SPLIT_RULES, carved_people, load_splits, load_splits_as_trained, read_images
from pictures import image_grid
from sampling import copy_detector, load_run, plan_sampling
from train import Latents
from utils import UserError, read_jsonl
from vae import VAE, load_vae
from weights import file_hash, load_state, read_meta, save_state


def where(checkpoints: Path, phantoms: Path, name: str = "tiny") -> list[str]:
    return ["--data", phantoms, "--checkpoints", checkpoints, "--cache", checkpoints / "cache", "--run", name]


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def images(folder: Path) -> dict[str, np.ndarray]:
    return {p.relative_to(folder).as_posix(): cv2.imread(str(p), 0) for p in sorted(folder.glob("train/*/*.png"))}


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
    files = [p for p in copied.rglob("*") if p.is_file() and "cache" not in p.parts and p.suffix != ".lock"]
    before = {p: p.stat().st_mtime_ns for p in files}
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
    end = time.time() + PATIENCE
    while time.time() < end:
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


ADVERSARIAL = ["--adversarial", "0.3", "--adversarial-start", "0.4", "--schedule", "cosine", "--ema-decay", "0.9"]


@pytest.mark.parametrize(("epochs", "stops"), [(10, (2, 7)), pytest.param(30, (3, 20), marks=pytest.mark.full)])
def test_a_vae_with_a_discriminator_resumes_to_the_same_weights(
    epochs: int, stops: tuple[int, int], phantoms: Path, tmp_path: Path
):
    """Stopped before the discriminator's start and after it; the encoder rests from there on, the decoder goes on."""
    flags = [*TINY_VAE, *ADVERSARIAL, "--epochs", str(epochs)]
    flags += ["--gif-every", "100", "--save-minutes", "0"]
    run("pre_train.py", *where(tmp_path, phantoms, "whole"), *flags)
    parts = tmp_path / "parts" / "vae"
    for rows in stops:
        process = start("pre_train.py", *where(tmp_path, phantoms, "parts"), *flags)
        while len(read_jsonl(parts / "metrics.jsonl") if (parts / "metrics.jsonl").exists() else []) < rows:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 75
    run("pre_train.py", *where(tmp_path, phantoms, "parts"), *flags)
    for name in ("best.safetensors", "final.safetensors"):
        assert same_weights(tmp_path / "whole" / "vae" / name, parts / name)
    log = read_jsonl(tmp_path / "whole" / "vae" / "metrics.jsonl")
    start_at = epochs * 4 // 10
    assert [r["epoch"] for r in log if "discriminator/train" in r] == list(range(start_at + 1, epochs + 1))
    assert 0.05 < log[start_at]["discriminator/train"] < 1.5 and log[-1]["learning rate"] < 1e-5
    # with a discriminator the last weights are the best, whatever the validation loss
    assert same_weights(
        tmp_path / "whole" / "vae" / "best.safetensors", tmp_path / "whole" / "vae" / "final.safetensors"
    )


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.full),
    ],
)
def test_unet_interrupted_anywhere_resumes_to_the_same_weights(
    how: signal.Signals, code: int, copied: Path, phantoms: Path, tmp_path: Path
):
    # Dropout, Lookahead, mirroring and other variants: all that is random or has a memory of its own.
    flags = [*where(copied, phantoms), *TINY_UNET, "--epochs", "10", "--dropout", "0.1", "--lookahead", "--flip"]
    flags += ["--augment", "1", "--augment-every", "3", "--evaluate-every", "4"]
    folder = copied / "tiny" / "diffusion"
    shutil.rmtree(folder)
    process = start("train.py", *flags, "--save-minutes", "0")  # writes last.pt at every step
    wait_for(folder / "last.prev.pt", process)
    process.send_signal(how)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, err
    assert not (folder / "final.safetensors").exists()
    if how != signal.SIGKILL:
        assert "saved at epoch" in out
    assert "resuming" in run("train.py", *flags).stdout
    interrupted = shutil.copy(folder / "final.safetensors", tmp_path / "interrupted.safetensors")
    shutil.rmtree(folder)
    assert "resuming" not in run("train.py", *flags).stdout
    assert same_weights(interrupted, folder / "final.safetensors")
    assert [r["epoch"] for r in read_jsonl(folder / "metrics.jsonl")] == [4, 8, 10]


def test_variants_are_drawn_anew_every_few_epochs(trained: Path, phantoms: Path, tmp_path: Path):
    """By a thread, from the end of the first epoch on; in an epoch they are the same for a run that begins there."""
    vae, _ = load_vae(trained / "tiny" / "vae" / "best.safetensors", torch.device("cpu"))
    data = load_splits(DataConfig(data=str(phantoms), cache=str(tmp_path)), 32)[0]["train"]
    cfg = TrainConfig(augment=2, augment_every=3, flip=True, epochs=7, cache=str(tmp_path))

    def latents(epoch: int) -> Latents:
        return Latents(vae, data, torch.zeros(len(data), 0), 16, Ranks(torch.device("cpu")), cfg, "encoding", epoch)

    with latents(1) as found:
        first = found.moments.clone()
        for epoch in range(1, 8):
            before = found.moments.clone()
            assert found.redraw(epoch) == (epoch in (4, 7))
            assert torch.equal(found.moments, before) == (epoch not in (4, 7))
            with latents(epoch) as fresh:
                assert torch.equal(found.moments, fresh.moments), epoch
            found.begin_next_draw(epoch)
            assert (found.coming is None) == (epoch == 7), "nobody would see the draw after the last"
        assert torch.equal(found.moments[:, :2], first[:, :2])  # the slices themselves, and mirrored
        for v in range(2, 6):
            assert not torch.equal(found.moments[:, v], first[:, v])


def test_a_draw_of_variants_that_fails_ends_the_training_and_one_that_is_not_needed_ends_with_it(
    trained: Path, phantoms: Path, tmp_path: Path
):
    vae, _ = load_vae(trained / "tiny" / "vae" / "best.safetensors", torch.device("cpu"))
    data = load_splits(DataConfig(data=str(phantoms), cache=str(tmp_path / "cache")), 32)[0]["train"]
    cfg = TrainConfig(augment=1, augment_every=1, cache=str(tmp_path))
    with Latents(vae, data, torch.zeros(len(data), 0), 4, Ranks(torch.device("cpu")), cfg, "encoding") as latents:
        latents.begin_next_draw(1)
    assert latents.coming.done()  # leaving waits for a batch at most
    latents = Latents(vae, data, torch.zeros(len(data), 0), 4, Ranks(torch.device("cpu")), cfg, "encoding")
    vae.encoder[0] = torch.nn.Identity()
    latents.begin_next_draw(1)
    with latents, pytest.raises(RuntimeError):
        latents.redraw(2)


def test_torn_last_file_falls_back_to_the_one_before(copied: Path, phantoms: Path):
    folder = copied / "tiny" / "vae"
    flags = [*where(copied, phantoms), *TINY_VAE, "--gif-every", "1", "--epochs"]
    run("pre_train.py", *flags, "3")  # now last.prev.pt is of epoch 2
    last = folder / "last.pt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    done = run("pre_train.py", *flags, "4")
    assert "cannot be read" in done.stderr and "resuming" in done.stdout and "epoch 2.00" in done.stdout
    assert [r["epoch"] for r in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_decoder_trained_further_keeps_its_latents_and_its_unet(phantoms: Path, tmp_path: Path):
    home, vae = where(tmp_path, phantoms), tmp_path / "tiny" / "vae" / "best.safetensors"
    run("pre_train.py", *home, *TINY_VAE, *ADVERSARIAL, "--epochs", "5")
    run("train.py", *home, *TINY_UNET, "--epochs", "1", "--sample-every", "1")
    before, x = load_file(vae), ["--checkpoints", tmp_path, "--run", "tiny", "--num-images", "1", "--out"]
    run("predict.py", *x, tmp_path / "before")
    sharper = ["--epochs", "15", "--adversarial", "2"]  # 0.4 of them is beyond what was done, and the encoder rests on
    run("pre_train.py", *home, *TINY_VAE, *ADVERSARIAL, *sharper)
    after = load_file(vae)
    for name in before:
        if not name.startswith("decoder"):
            assert (before[name] == after[name]).all(), name
    assert any((before[name] != after[name]).any() for name in before if name.startswith("decoder"))
    run("predict.py", *x, tmp_path / "after")  # the U-Net is still a pair with it
    a, b = (next(iter(images(tmp_path / name).values())) for name in ("before", "after"))
    assert not np.array_equal(a, b)
    refused = run_any("pre_train.py", *home, *TINY_VAE, *ADVERSARIAL, "--epochs", "16", "--adversarial", "0")
    assert refused.returncode == 2 and "started with a discriminator" in refused.stderr


def test_single_class_and_unconditional_train_without_labels(copied: Path, phantoms: Path, tmp_path: Path):
    one = tmp_path / "one"
    for split in ("train", "val"):
        shutil.copytree(phantoms / split / "NC", one / split / "NC")
    shutil.rmtree(copied / "tiny" / "diffusion")
    base = ["--checkpoints", copied, "--cache", copied / "cache", "--run", "tiny", *TINY_UNET, "--epochs", "1"]
    plan = run("train.py", "--data", one, *base, "--dry-run").stdout
    assert "unconditional" in plan  # one class is no condition
    run("train.py", "--data", phantoms, *base, "--unconditional")
    assert not any("condition" in k for k in load_file(copied / "tiny" / "diffusion" / "final.safetensors"))
    run("predict.py", "--checkpoints", copied, "--run", "tiny", "--num-images", "2", "--out", tmp_path / "out")
    assert sorted(images(tmp_path / "out")) == ["train/any/s0i00000_0.png", "train/any/s0i00001_0.png"]
    refused = run_any(
        "predict.py", "--checkpoints", copied, "--run", "tiny", "--class-name", "AD", "--out", tmp_path / "x"
    )
    assert refused.returncode == 2 and "does not know the classes" in refused.stderr


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


NAMES = [f"train/{('AD', 'NC')[k % 2]}/s7i{k:05d}_0.png" for k in range(6)]


def test_predict_writes_images_grid_gif_manifest_and_datasheet(six: Path):
    made = images(six)
    assert sorted(made) == sorted(NAMES)
    assert all(image.shape == (32, 32) for image in made.values())
    rows = list(csv.DictReader((six / "manifest.csv").open()))
    assert [r["file"] for r in rows] == NAMES
    assert all(r["seed"] == "7" and r["index"] == str(k) and len(r["checkpoint"]) == 12 for k, r in enumerate(rows))
    assert Image.open(six / "denoising.gif").n_frames == 10
    assert cv2.imread(str(six / "grid.png"), 0).shape == (2 * 34 - 2, 3 * 34 - 2)
    assert cv2.imread(str(six / "denoising.png"), 0).shape == (4 * 34 - 2, 10 * 34 - 2)
    sheet = (six / "README.md").read_text()
    for word in ("AD 3, NC 3", "80 slices of 20 people", rows[0]["checkpoint"], "seed | 7", "No image was compared"):
        assert word in sheet, word


@pytest.mark.parametrize("batch", ["1", "4"])
def test_image_k_is_the_same_for_every_batch_size(six: Path, trained: Path, tmp_path: Path, batch: str):
    again = predict(trained, tmp_path / "out", "--num-images", "6", "--batch-size", batch)
    for name, image in images(six).items():
        assert np.abs(again[name].astype(int) - image).max() <= 1  # float rounding at the edge of two grey levels


def test_seed_class_and_guidance_change_the_images(six: Path, trained: Path, tmp_path: Path):
    first = images(six)
    assert not np.array_equal(first[NAMES[0]], first[NAMES[2]])
    ad = predict(trained, tmp_path / "ad", "--num-images", "2", "--class-name", "AD")
    nc = predict(trained, tmp_path / "nc", "--num-images", "2", "--class-name", "NC")
    guided = predict(trained, tmp_path / "guided", "--num-images", "2", "--class-name", "AD", "--guidance", "6")
    assert np.abs(ad[NAMES[0]].astype(int) - first[NAMES[0]]).max() <= 1
    assert not np.array_equal(ad[NAMES[0]], nc["train/NC/s7i00000_0.png"])
    assert not np.array_equal(ad[NAMES[0]], guided[NAMES[0]])


def test_interrupted_sampling_is_completed_by_the_same_command(six: Path, trained: Path, tmp_path: Path):
    out = Path(shutil.copytree(six, tmp_path / "out"))
    rows = (out / "manifest.csv").read_text().splitlines()
    (out / "manifest.csv").write_text("\n".join(rows[:5]) + "\n")  # images 4 and 5 never got their rows
    for name in (NAMES[1], NAMES[4], "grid.png", "denoising.gif", "README.md"):
        (out / name).unlink()
    untouched = (out / NAMES[3]).stat().st_mtime_ns
    predict(trained, out, "--num-images", "6")
    assert (out / NAMES[3]).stat().st_mtime_ns == untouched
    for name, image in images(six).items():
        assert np.abs(images(out)[name].astype(int) - image).max() <= 1
    assert (out / "manifest.csv").read_text() == (six / "manifest.csv").read_text()
    assert (out / "README.md").read_text() == (six / "README.md").read_text()
    done = run(
        "predict.py", "--checkpoints", trained, "--run", "tiny", "--seed", "7", "--out", out, "--num-images", "6"
    )
    assert "is complete" in done.stdout
    other = run_any("predict.py", "--checkpoints", trained, "--run", "tiny", "--seed", "8", "--out", out)
    assert other.returncode == 2 and "another command" in other.stderr


def test_a_generated_folder_can_be_trained_on(six: Path, tmp_path: Path):
    """Every image is a person of its own, so that validation people can be set aside."""
    where = ["--data", six, "--checkpoints", tmp_path, "--cache", tmp_path / "cache", "--run", "second"]
    run("pre_train.py", *where, *TINY_VAE, "--epochs", "1", "--batch-size", "2")
    assert "4 slices of 4 people (AD 2, NC 2)" in run("pre_train.py", *where, *TINY_VAE, "--dry-run").stdout


def test_predict_goes_to_wandb_where_it_is_asked_to(trained: Path, tmp_path: Path):
    where = ["--checkpoints", trained, "--run", "tiny", "--num-images", "2"]
    for mode in ("disabled", "offline"):
        run("predict.py", *where, "--out", tmp_path / mode, "--wandb", mode)
    shown = {p.name.rpartition("_")[0].partition("_")[0] for p in (tmp_path / "offline").rglob("media/*/*")}
    assert shown == {"generated", "denoising"} and not (tmp_path / "disabled" / "wandb").exists()


def test_copies_are_drawn_again(six: Path, trained: Path, phantoms: Path, tmp_path: Path):
    """Two of the training slices are replaced by what the model is about to draw: it then draws others."""
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    flags = ["--num-images", "6", "--reject-copies", "--data", data, "--cache", tmp_path / "cache"]
    slices = sorted((data / "train").rglob("*.png"))
    for k in (1, 4):
        image = cv2.imread(str(six / NAMES[k]), 0)
        cv2.imwrite(str(slices[10 * k]), image)
    predict(trained, tmp_path / "out", *flags)
    rows = list(csv.DictReader((tmp_path / "out" / "manifest.csv").open()))
    index = [int(r["index"]) for r in rows]
    for k in (1, 4):
        assert index[k] >= 10**9 and index[k] % 10**9 == k
        assert not np.array_equal(images(tmp_path / "out")[NAMES[k]], images(six)[NAMES[k]])
    assert min(float(r[f"{space}_distance"]) for r in rows for space in ("pixel", "latent")) >= 1
    assert f"{sum(i >= 10**9 for i in index)} were copies" in (tmp_path / "out" / "README.md").read_text()
    with Image.open(tmp_path / "out" / "denoising.gif") as gif:  # shows the draws that were kept, not the copies
        gif.seek(gif.n_frames - 1)
        last = np.asarray(gif.convert("L")).astype(int)
    kept = image_grid(np.stack([images(tmp_path / "out")[NAMES[k]] for k in range(2)]))
    assert np.abs(last - kept).max() <= 1
    # whoever draws the image: one at a time, the same
    predict(trained, tmp_path / "single", *flags, "--batch-size", "1")
    again = list(csv.DictReader((tmp_path / "single" / "manifest.csv").open()))
    assert [r["index"] for r in again] == [r["index"] for r in rows]


def test_reject_copies_needs_people(tmp_path: Path):
    few = phantom.make_dataset(tmp_path / "few", people=10, slices=4, size=32, progress=False)
    splits, _ = load_splits(DataConfig(data=str(few), cache=str(tmp_path / "cache")), 32)
    vae = VAE(32, 4, 2, (8,), 1, attention=False)
    with pytest.raises(UserError, match="--reject-copies.* needs 40 slices of 4 people, not 32 of 8"):
        rules = {name: getattr(DataConfig(), name) for name in SPLIT_RULES}
        copy_detector(str(few), str(tmp_path / "cache"), vae, {"data": splits["train"].summary(), "split": rules})


def test_reject_copies_needs_the_data_of_the_run(trained: Path, tmp_path: Path):
    other = phantom.make_dataset(tmp_path / "other", people=20, slices=4, size=64, progress=False)
    flags = ["--checkpoints", trained, "--run", "tiny", "--out", tmp_path / "out", "--reject-copies"]
    refused = run_any("predict.py", *flags, "--data", other, "--cache", tmp_path / "cache")
    assert refused.returncode == 2 and "80 slices of 20 people" in refused.stderr
    assert not (tmp_path / "out").exists()
    refused = run_any("predict.py", *flags, "--data", tmp_path / "none")
    assert refused.returncode == 2 and "there is no data folder" in refused.stderr


def test_full_grid_weights_take_normal_and_every_fast_sampling(copied: Path, phantoms: Path, tmp_path: Path):
    shutil.rmtree(copied / "tiny" / "diffusion")
    run("train.py", *where(copied, phantoms), *TINY_UNET, "--epochs", "1", "--grid", "full", "--prediction", "eps")
    normal = predict(copied, tmp_path / "normal", "--num-images", "1", "--sampling", "normal")
    record = json.loads((tmp_path / "normal" / "command.json").read_text())
    assert len(record["timesteps"]) == 1000 and (record["solver"], record["eta"]) == ("ddim", 1.0)
    assert len(normal) == 1
    model = load_run(copied / "tiny", "best", torch.device("cpu"))[0]
    assert plan_sampling(PredictConfig(sampling="normal", solver="heun"), model)["eta"] == 0  # it adds no noise
    predict(copied, tmp_path / "fast", "--num-images", "1")
    record = json.loads((tmp_path / "fast" / "command.json").read_text())
    assert len(record["timesteps"]) == 20 and (record["solver"], record["eta"]) == ("dpm++2m", 1.0)
    predict(copied, tmp_path / "ten", "--num-images", "1", "--num-steps", "10", "--eta", "0")
    record = json.loads((tmp_path / "ten" / "command.json").read_text())
    assert record["timesteps"] == [0, 5, 22, 73, 202, 410, 603, 757, 886, 999] and record["eta"] == 0
    predict(copied, tmp_path / "heun", "--num-images", "1", "--grid", "flow", "--num-steps", "5", "--solver", "heun")
    record = json.loads((tmp_path / "heun" / "command.json").read_text())
    assert record["timesteps"] == [72, 185, 335, 521, 999] and record["solver"] == "heun"
    predict(copied, tmp_path / "five", "--num-images", "1", "--grid", "uniform", "--num-steps", "5", "--solver", "ddim")
    record = json.loads((tmp_path / "five" / "command.json").read_text())
    assert record["timesteps"] == [0, 250, 500, 749, 999] and record["eta"] == 0


def test_rectified_flow_trains_and_draws(copied: Path, phantoms: Path, tmp_path: Path):
    shutil.rmtree(copied / "tiny" / "diffusion")
    flow = ["--grid", "full", "--prediction", "flow", "--log-snr", "0", "2", "--epochs", "2"]
    run("train.py", *where(copied, phantoms), *TINY_UNET, *flow)
    losses = [r["loss/val"] for r in read_jsonl(copied / "tiny" / "diffusion" / "metrics.jsonl")]
    assert losses[1] < losses[0]
    assert read_meta(copied / "tiny" / "diffusion" / "best.safetensors")["prediction"] == "flow"
    predict(copied, tmp_path / "out", "--num-images", "1", "--grid", "flow", "--solver", "ddim")
    refused = run_any(
        "train.py", *where(copied, phantoms, "tiny"), *TINY_UNET, *flow, "--log-snr", "900", "1", "--fresh"
    )
    assert refused.returncode == 2 and "no timestep has a log-SNR near 900" in refused.stderr


def test_timesteps_drawn_by_their_weight_teach_about_the_same(copied: Path, phantoms: Path):
    train = ["train.py", *where(copied, phantoms), *TINY_UNET, "--grid", "full", "--loss-weight", "min_snr"]
    losses = {}
    for flag in ("--no-draw-by-weight", "--draw-by-weight"):
        run(*train, "--epochs", "2", "--fresh", flag)
        losses[flag] = read_jsonl(copied / "tiny" / "diffusion" / "metrics.jsonl")[-1]["loss/val"]
    weighted, drawn = losses.values()
    assert weighted != drawn == pytest.approx(weighted, rel=0.1)


def test_the_vae_says_who_is_held_out_whatever_the_seed_of_the_training(phantoms: Path, tmp_path: Path):
    """Without val/, people are set aside by seed: another choice would validate on people the VAE was trained on."""
    data = tmp_path / "data"
    shutil.copytree(phantoms / "train", data / "train")
    run("pre_train.py", *where(tmp_path, data, "r"), *TINY_VAE, "--epochs", "1", "--val-fraction", "0.2")
    run("train.py", *where(tmp_path, data, "r"), *TINY_UNET, "--epochs", "1", "--seed", "1")
    vae, unet = (read_meta(tmp_path / "r" / part / "best.safetensors") for part in ("vae", "diffusion"))
    assert unet["held_out"] == vae["held_out"] and unet["data"] == vae["data"] and unet["config"]["seed"] == 1
    assert unet["split"] == vae["split"] and unet["split"]["seed"] == 0 and unet["split"]["val_fraction"] == 0.2
    # And scripts that look at the run follow: evaluate.py, tsne.py and copy detectors split by the header's rules.
    splits = load_splits_as_trained(str(data), str(tmp_path / "cache"), unet, 32)
    assert carved_people(splits) == vae["held_out"]
    # Data of other people than the VAE's is refused.
    first = sorted((data / "train" / "AD").iterdir())[0].name.rpartition("_")[0]
    for file in (data / "train" / "AD").glob(f"{first}_*"):
        file.unlink()
    refused = run_any("train.py", *where(tmp_path, data, "r"), *TINY_UNET, "--epochs", "2", "--seed", "1")
    assert refused.returncode == 2 and "or validated on other people" in refused.stderr


def test_a_u_net_of_another_vae_is_left_out_of_the_map(copied: Path, phantoms: Path):
    run("pre_train.py", *where(copied, phantoms), *TINY_VAE, "--epochs", "1", "--seed", "5", "--fresh")
    done = run("tsne.py", *where(copied, phantoms), "--wandb", "disabled", "--perplexity", "10")
    assert "latents of another VAE" in done.stdout
    assert json.loads((copied / "tiny" / "tsne" / "tsne.json").read_text())["generated"] == 0


def test_precision_is_on_record_as_it_was_resolved(trained: Path, tmp_path: Path):
    """`auto` follows the device, and so two devices could share a folder, half of its images in float32 each."""
    predict(trained, tmp_path / "out", "--num-images", "2")
    assert json.loads((tmp_path / "out" / "command.json").read_text())["precision"] == "float32"
    again = ["--checkpoints", trained, "--run", "tiny", "--seed", "7", "--out", tmp_path / "out", "--num-images", "2"]
    assert "is complete" in run("predict.py", *again, "--precision", "fp32").stdout
    refused = run_any("predict.py", *again, "--precision", "bf16")
    assert refused.returncode == 2 and "precision float32 -> bfloat16" in refused.stderr


def test_best_or_final_weights_as_asked_for(trained: Path, phantoms: Path, tmp_path: Path):
    """By what predict.py and evaluate.py say of the file that they took."""
    hashes = {name: file_hash(trained / "tiny" / "diffusion" / f"{name}.safetensors") for name in ("best", "final")}
    assert hashes["best"] != hashes["final"]
    base = ["--checkpoints", trained, "--run", "tiny", "--num-images", "10", "--wandb", "disabled"]
    for name, number in hashes.items():
        run("predict.py", *base, "--weights", name, "--out", tmp_path / name)
        assert number in (tmp_path / name / "manifest.csv").read_text()
        report = [*base, "--data", phantoms, "--cache", tmp_path, "--resamples", "10", "--out", tmp_path / "report"]
        run_any("evaluate.py", *report, "--weights", name, "--solver", "ddim")  # ten images are too few for some of it
        assert f"{name} weights ({number}" in (tmp_path / "report" / "report.md").read_text()
        assert "10 steps of ddim" in (tmp_path / "report" / "report.md").read_text()


def test_the_statistics_that_pre_train_prints_are_of_the_weights_that_scripts_use(phantoms: Path, tmp_path: Path):
    run("pre_train.py", *where(tmp_path, phantoms), *TINY_VAE, "--epochs", "1")
    file = tmp_path / "tiny" / "vae" / "last.pt"
    save_state(file, {**load_state(file), "best": 0.0})  # so that no later epoch is better than the first
    done = run("pre_train.py", *where(tmp_path, phantoms), *TINY_VAE, "--epochs", "2")
    vae, vae_of_final = (
        load_vae(tmp_path / "tiny" / "vae" / f"{name}.safetensors", torch.device("cpu"))[0]
        for name in ("best", "final")
    )
    shown = [[round(v, 3) for v in x.latent_std.tolist()] for x in (vae, vae_of_final)]
    assert f"standard deviation {shown[0]}" in done.stdout and shown[0] != shown[1]


# ---------------------------------------------------------------------------------------------------------------------
# t-SNE, command lines


@pytest.mark.parametrize("generated", [6, 128])
def test_tsne_draws_a_map_and_measures_the_separation_by_person(
    generated: int, trained: Path, six: Path, phantoms: Path, tmp_path: Path
):
    """With the images of a folder, or with 128 that it draws itself."""
    base = ["--checkpoints", trained, "--cache", tmp_path, "--run", "tiny", "--wandb", "disabled", "--perplexity", "10"]
    given = ["--generated", six] if generated == 6 else []
    run("tsne.py", "--data", phantoms, *base, "--max-slices", "60", "--out", tmp_path / "map", *given)
    result = json.loads((tmp_path / "map" / "tsne.json").read_text())
    assert result["generated"] == generated and result["slices"] == 60
    s = result["separation"]
    assert 0 <= s["ci_low"] < s["knn_auc"] < s["ci_high"] <= 1 and s["people"] == 20
    assert cv2.imread(str(tmp_path / "map" / "tsne.png")).std() > 10


@pytest.mark.parametrize(
    "script", ["pre_train.py", "train.py", "distil.py", "predict.py", "evaluate.py", "tsne.py", "dataset.py"]
)
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
    from config import (
        PRESETS,
        AppConfig,
        DistilConfig,
        EvaluateConfig,
        PredictConfig,
        PretrainConfig,
        ReportConfig,
        TextureConfig,
        TrainConfig,
        TsneConfig,
        parse,
    )

    assert parse(TrainConfig, []) == parse(TrainConfig, ["adni"])
    adni = parse(TrainConfig, ["adni"])
    assert (adni.batch_size, adni.grid, adni.prediction, adni.log_snr) == (64, "full", "v", None)
    assert (adni.loss_weight, adni.draw_by_weight) == ("min_snr", True)
    origin = parse(TrainConfig, ["origin"])
    assert (origin.batch_size, origin.epochs, origin.lr, origin.warmup) == (16, 500, 1e-4, 0.1)
    assert (origin.grid, origin.num_steps, origin.prediction) == ("nonuniform", 10, "eps")
    assert parse(EvaluateConfig, ["origin"]).solver == parse(PredictConfig, ["origin"]).solver == "ddim"
    assert parse(PretrainConfig, []).image_size == 256
    assert parse(PretrainConfig, ["small"]).image_size == 128
    assert parse(PretrainConfig, ["demo"]).data == "phantom"
    assert parse(TrainConfig, ["demo", "--run", "x", "--epochs", "3", "--channels", "8", "16"]).channels == (8, 16)
    for preset in PRESETS:
        assert parse(TrainConfig, [preset, "--grid", "full"]).grid == "full"
        # A preset that is named is the run's name, for whichever script.
        for config in (PretrainConfig, TextureConfig, PredictConfig, EvaluateConfig, TsneConfig, ReportConfig):
            assert parse(config, [preset]).run == preset
        assert parse(AppConfig, [preset]).run == (preset,)
        student = parse(DistilConfig, [preset])
        assert (student.teacher, student.run) == (preset, "student")
    assert parse(PredictConfig, []).run == "pretrained"


def test_dry_run_prints_the_plan_and_writes_nothing(trained: Path, phantoms: Path, tmp_path: Path):
    flags = ["--data", phantoms, "--checkpoints", tmp_path / "none", "--cache", tmp_path / "cache", "--dry-run"]
    plan = run("pre_train.py", "small", *flags).stdout
    for word in (
        "80 slices of 20 people",
        "M parameters",
        "steps of 8",
        "memory",
        "writes to",
        "GFLOP",
        "time ",
        "images/s",
    ):
        assert word in plan, word
    assert not (tmp_path / "none").exists()
    before = sorted(trained.rglob("*"))
    plan = run("train.py", *where(trained, phantoms), *TINY_UNET, "--dry-run").stdout
    for word in (
        "80 slices of 20 people",
        "M parameters",
        "steps of 16",
        "memory",
        "writes to",
        "given     group AD, NC",
        "images/s",
    ):
        assert word in plan, word
    assert [p for p in sorted(trained.rglob("*")) if "cache" not in p.parts] == before


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_report_of_a_run_that_is_too_small_for_some_metrics(trained: Path, phantoms: Path, tmp_path: Path):
    done = run_any(
        "evaluate.py", "--checkpoints", trained, "--run", "tiny", "--data", phantoms, "--cache", tmp_path, "--wandb",
        "disabled", "--num-images", "24", "--resamples", "20", "--no-training-pictures",
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for sentence in ("distances between sets need at least 20", "diversity.ms_ssim needs images of at least 48 pixels"):
        assert sentence in done.stderr, sentence
    numbers = json.loads((trained / "tiny" / "report" / "report.json").read_text())
    assert numbers["latent_spread"].keys() == {"channel_0", "channel_1"} and {"spectrum", "memorisation"} <= {*numbers}
    assert not (trained / "tiny" / "report" / "closest_pairs.png").exists()
    shutil.rmtree(trained / "tiny" / "report")


def test_predicted_folder_is_read_by_its_manifest(six: Path):
    data, problems = read_images(six)
    pixels, names = data.images, data.class_names()
    assert len(pixels) == 6 and not problems  # grid.png and denoising.png are not samples
    assert names == ["AD", "NC"] * 3


def test_images_are_flushed_to_disk_together(trained: Path, tmp_path: Path):
    code = """
import os, sys
flushed, fsync = [], os.fsync
os.fsync = lambda number: (flushed.append(number), fsync(number))
from config import PredictConfig, parse
import predict
predict.main(parse(PredictConfig, sys.argv[1:]))
print("flushed", len(flushed))
"""
    flags, counts = ["--checkpoints", trained, "--run", "tiny", "--device", "cpu"], []
    for n in ("2", "24"):
        done = python(code, *flags, "--num-images", n, "--batch-size", "2", "--out", tmp_path / n)
        assert done.returncode == 0, done.stderr
        counts.append(int(done.stdout.split()[-1]))
    assert counts[0] == counts[1] < 24  # of tables and pictures, none of them an image's


def test_a_disk_that_fails_to_flush_ends_predict_without_rows(trained: Path, tmp_path: Path):
    code = """
import ctypes, os, sys
import predict, weights
from config import PredictConfig, parse
from utils import run_script

class Disk:
    def syncfs(self, number):
        ctypes.set_errno(5)
        return -1

ctypes.CDLL = lambda *args, **how: Disk()
run_script(predict.main, parse(PredictConfig, sys.argv[1:]))
"""
    out = tmp_path / "out"
    flags = ["--checkpoints", trained, "--run", "tiny", "--device", "cpu", "--num-images", "3", "--out", out]
    done = python(code, *flags, cold=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and str(out) in done.stderr
    assert not (out / "manifest.csv").exists()
    run("predict.py", *flags)  # goes on
    assert len(images(out)) == 3
