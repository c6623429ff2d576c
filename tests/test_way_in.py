"""What people's folders hold: names of data sets, several studies, links, FreeSurfer, odd slices."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, run, run_any
from PIL import Image
from test_volumes import SHAPE, sampled, table, upright, write_nifti

from config import PretrainConfig
from dataset import BadFile, read_slice
from pictures import in_font
from runlog import RunLog

AFFINE = upright()
FLAGS = ["--spacing", "15"]


def volume(path: Path, seed: int = 0) -> Path:
    """A head with noise in it, another one for every seed."""
    voxels = 10 * sampled(AFFINE, SHAPE, seed)
    noise = np.random.default_rng(seed).normal(0, 15, SHAPE)
    return write_nifti(path, np.where(voxels > 0, voxels + noise, 0).astype(np.float32), AFFINE)


def patients(out: Path) -> dict[str, str]:
    return {r["source"]: r["patient"] for r in table(out) if not r["left_out"]}


def left_out(out: Path) -> dict[str, str]:
    return {r["source"]: r["left_out"] for r in table(out) if r["left_out"]}


def test_people_of_several_studies_and_sessions(tmp_path: Path):
    names = [
        "ds000001/sub-01/anat/sub-01_T1w.nii", "ds000002/sub-01/anat/sub-01_T1w.nii", "ds000002/sub-02/x.nii",
        "mine/sub-02/x.nii", "OASIS2/OAS2_0001_MR1/mpr-1.nii", "OASIS2/OAS2_0001_MR2/mpr-1.nii", "anna/t1.nii",
        "anna/t2.nii", "IXI/IXI002-Guys-0828-T1.nii",
    ]  # fmt: skip
    for seed, name in enumerate(names):
        volume(tmp_path / "in" / name, seed)
    (tmp_path / "in/mine/dataset_description.json").write_text("{}")
    done = run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", *FLAGS)
    assert [patients(tmp_path / "out")[f"in/{name}"] for name in names] == [
        "ds000001-sub-01", "ds000002-sub-01", "ds000002-sub-02", "mine-sub-02", "OAS2_0001", "OAS2_0001", "anna",
        "anna", "IXI002",
    ]  # fmt: skip
    assert "several kinds of images" in done.stdout and "1 .json" in done.stdout


def test_what_is_taken_of_a_folder(tmp_path: Path):
    """By patterns, once under two names, one of FreeSurfer's steps; no label maps."""
    home = tmp_path / "in"
    first = volume(home / "sub-01/anat/sub-01_T1w.nii")
    volume(home / "sub-01/anat/sub-01_T2w.nii", 1)
    volume(home / "derivatives/sub-01/anat/sub-01_T1w.nii", 2)
    (home / "copy").mkdir()
    (home / "copy/sub-01_T1w.nii").write_bytes(first.read_bytes())
    for seed, step in enumerate(("orig", "brain", "T1"), 3):
        volume(home / f"bert/mri/{step}.nii", seed).rename(home / f"bert/mri/{step}.mgz")  # content decides
    labels = np.digitize(sampled(AFFINE, SHAPE), [10, 55, 65, 80]).astype(np.int16)
    write_nifti(home / "sub-01/anat/sub-01_dseg.nii", labels, AFFINE)
    chosen = ["--match", "*T1w*", "bert", "*dseg*", "--skip", "derivatives"]
    done = run("dataset.py", "slice", home, tmp_path / "out", *FLAGS, *chosen)
    taken = {"in/copy/sub-01_T1w.nii", "in/bert/mri/orig.mgz", "in/bert/mri/brain.mgz", "in/bert/mri/T1.mgz"}
    assert patients(tmp_path / "out").keys() == taken  # --match chose all of FreeSurfer's
    why = left_out(tmp_path / "out")
    assert why["in/sub-01/anat/sub-01_T1w.nii"] == "the same volume as in/copy/sub-01_T1w.nii"
    assert "labels" in why["in/sub-01/anat/sub-01_dseg.nii"]
    assert "2 volumes that --match and --skip leave out" in done.stdout
    run("dataset.py", "slice", home / "bert", tmp_path / "two", *FLAGS)
    assert patients(tmp_path / "two").keys() == {"bert/mri/T1.mgz"}
    assert all("FreeSurfer" in reason for reason in left_out(tmp_path / "two").values())
    # One step was chosen by name before: its slices go when another step is taken.
    run("dataset.py", "slice", home / "bert", tmp_path / "three", *FLAGS, "--match", "brain.mgz")
    assert [p.name[:5] for p in (tmp_path / "three").rglob("*_000.png")] == ["mri-b"]
    run("dataset.py", "slice", home / "bert", tmp_path / "three", *FLAGS)
    assert [p.name[:6] for p in (tmp_path / "three").rglob("*_000.png")] == ["mri-T1"]
    page = (tmp_path / "out/slices.html").read_text()
    assert page.count("<li>") == 4 and "This page shows people" in page and "labels" in page


def test_links_and_what_cannot_be_opened(tmp_path: Path):
    volume(tmp_path / "disk2/sub-02/t1.nii", 2)
    volume(tmp_path / "in/sub-01/t1.nii", 1)
    (tmp_path / "in/sub-02").symlink_to(tmp_path / "disk2/sub-02")
    (tmp_path / "in/sub-01/up").symlink_to(tmp_path / "in")  # leads back
    (tmp_path / "in/gone.nii").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/x.zip").write_bytes(b"PK\3\4")
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", *FLAGS)
    assert sorted(patients(tmp_path / "out").values()) == ["sub-01", "sub-02"]
    assert {*left_out(tmp_path / "out").values()} == {"a link that leads nowhere", "an archive: unpack it"}


def test_attributes_and_levels(tmp_path: Path):
    for n in (1, 2):
        volume(tmp_path / f"in/sub-0{n}/t1.nii", n)
    (tmp_path / "t.tsv").write_text("participant_id\tAge\tgender\tgroup\nsub-01\t70.5\tf\tAD\nsub-02\tn/a\tm\t\n")
    flags = ["--table", tmp_path / "t.tsv", "--attributes", "age", "sex", *FLAGS]
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", *flags)
    assert "has no group" in left_out(tmp_path / "out")["in/sub-02/t1.nii"]
    rows = [*csv.DictReader((tmp_path / "out/attributes.csv").open())]
    assert [(r["file"], r["level"], r["age"], r["sex"]) for r in rows] == [
        (f"sub-01-t1_00{k}.png", f"{-44 - 15 * k}", "70.5", "F") for k in range(3)
    ]
    # A corrected table corrects what is there, without cutting anything again.
    before = (tmp_path / "out/train/AD/sub-01-t1_000.png").stat().st_mtime_ns
    (tmp_path / "t.tsv").write_text("participant_id\tAge\tgender\tgroup\nsub-01\t71\tf\tAD\nsub-02\t60\tm\tNC\n")
    run("dataset.py", "slice", tmp_path / "in", tmp_path / "out", *flags)
    rows = [*csv.DictReader((tmp_path / "out/attributes.csv").open())]
    assert {(r["file"][:6], r["age"]) for r in rows} == {("sub-01", "71"), ("sub-02", "60")} and len(rows) == 6
    assert (tmp_path / "out/train/AD/sub-01-t1_000.png").stat().st_mtime_ns == before
    refused = run_any("dataset.py", "slice", tmp_path / "in", tmp_path / "o", *flags[:2], "--attributes", "shoe size")
    assert refused.returncode == 2 and "no column shoe size" in refused.stderr


def test_check_finds_people_twice_within_train_and_ignores_what_is_hidden(tmp_path: Path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "d/train/AD"
    (tmp_path / "d/train/.ipynb_checkpoints").mkdir(parents=True)
    folder.mkdir()
    images = {f"s{n}_0": rng.integers(30, 255, (40, 48)).astype(np.uint8) for n in range(4)}
    images["OAS1_0001_MR1_mpr-1_9"], images["OAS1_0001_MR2_mpr-4_9"] = images["s0_0"], images["s0_0"]
    for name, image in images.items():
        cv2.imwrite(str(folder / f"{name}.png"), image)
        cv2.imwrite(str(tmp_path / f"d/train/.ipynb_checkpoints/{name}.png"), image)
    (folder / "._s0_0.png").write_bytes(b"\0\5\x16\7" + bytes(60))
    report = run("dataset.py", "check", tmp_path / "d", "--cache", tmp_path / "c").stdout
    assert "6 slices of 5 people, classes AD" in report  # OASIS's two sessions are of one person
    assert "look like one of another person (correlation > 0.96): 2" in report
    assert "fit for training, if those are different people" in report


def test_alpha_and_stacks(tmp_path: Path):
    image = np.full((64, 64, 4), 200, np.uint8)
    image[:32, :, 3] = 0
    cv2.imwrite(str(tmp_path / "a.png"), image)
    grey, colour = read_slice(tmp_path / "a.png")
    assert colour and grey[:32].max() == 0 and grey[32:].min() > 140
    pages = [Image.fromarray(np.full((64, 64), 50 * k, np.uint8)) for k in (1, 2, 3)]
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(BadFile, match="a stack of 3 pages"):
        read_slice(tmp_path / "b.tif")
    pages[0].save(tmp_path / "c.tif")
    assert read_slice(tmp_path / "c.tif")[0].shape == (64, 64)


def test_wandb_does_not_wait_for_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    log = RunLog(tmp_path / "r", PretrainConfig(wandb="online"), "vae")
    log.close()
    assert "nobody is logged in to wandb" in capsys.readouterr().err


def test_letters_that_the_font_lacks():
    assert in_font("AD, é\n") == "AD, é\n" and in_font("健") == "U+5065 "


def test_small_messages(tmp_path: Path):
    """A reader that has seen enough, and Ctrl-C while torch is imported: no traceback."""
    command = f"{sys.executable} {ROOT / 'dataset.py'} check {tmp_path}/none | head -c 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT)
    assert "Traceback" not in done.stderr and "Broken pipe" not in done.stderr
    code = "import os, signal, config, sys; sys.argv = ['train.py']; config.parse(config.TrainConfig); "
    code += "os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 130 and done.stderr == ""
