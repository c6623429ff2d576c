"""The data contract: layouts, people, splits, the slice cache, bad files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, run, run_any, start
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
import phantom
from config import DataConfig
from dataset import BadFile, Slice, carve_validation, find_overlap, load_splits, read_slice, scan, to_square
from utils import UserError

RNG = np.random.default_rng(0)


def write_image(path: Path, height: int = 48, width: int = 40, level: int = 120) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.clip(RNG.normal(level, 30, (height, width)), 1, 255).astype(np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, image)[1])  # OpenCV itself dies of names that are not UTF-8
    return path


def make_folder(
    root: Path, people: dict[str, list[str]], split: str = "train", slices: int = 2, ext: str = "png"
) -> Path:
    for label, names in people.items():
        for name in names:
            for k in range(slices):
                write_image(root / split / label / f"{name}_{k}.{ext}")
    return root


@pytest.fixture
def cfg(tmp_path: Path) -> DataConfig:
    return DataConfig(data=str(tmp_path / "data"), cache=str(tmp_path / "cache"))


def test_course_layout_carves_validation_people_and_never_touches_test(cfg: DataConfig):
    root = make_folder(
        Path(cfg.data), {"AD": [f"a{i}" for i in range(10)], "NC": [f"n{i}" for i in range(20)]}, ext="jpeg"
    )
    make_folder(root, {"AD": ["x1"], "NC": ["x2"]}, "test")
    splits, _ = load_splits(cfg, 32)
    people = {name: set(part.people) for name, part in splits.items()}
    assert people["test"] == {"x1", "x2"}
    assert not people["train"] & people["val"] and not (people["train"] | people["val"]) & people["test"]
    assert len(people["val"]) == 3  # a tenth of each class's people
    assert sum(p.startswith("a") for p in people["val"]) == 1
    assert splits["train"].classes == ["AD", "NC"]
    assert all((f.split("/")[1] == "NC") == bool(y) for f, y in zip(splits["train"].files, splits["train"].labels))


def test_own_validation_folder_is_used_as_it_is(cfg: DataConfig):
    root = make_folder(Path(cfg.data), {"control": ["p1", "p2"]})
    make_folder(root, {"control": ["p3"]}, "val")
    splits, _ = load_splits(cfg, 32)
    assert set(splits["train"].people) == {"p1", "p2"} and set(splits["val"].people) == {"p3"}
    assert splits["val"].classes == ["control"]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(2, 12), min_size=1, max_size=3),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**31),
)
def test_carving_takes_whole_people_of_every_class_and_leaves_some(counts: list[int], fraction: float, seed: int):
    slices = [
        Slice(f"train/c{c}/p{c}x{i}_{k}.png", "train", f"c{c}", f"p{c}x{i}", (1, 1))
        for c, n in enumerate(counts) for i in range(n) for k in range(3)
    ]  # fmt: skip
    chosen = carve_validation(slices, fraction, seed)
    assert chosen == carve_validation(list(slices), fraction, seed)
    for c, n in enumerate(counts):
        assert 1 <= sum(p.startswith(f"p{c}x") for p in chosen) < n


def test_person_on_both_sides_is_an_error_with_both_files(cfg: DataConfig):
    root = make_folder(Path(cfg.data), {"NC": ["p1", "p2"]})
    make_folder(root, {"NC": ["p2", "p3"]}, "test")
    with pytest.raises(UserError, match=r"person p2 .*train/NC/p2_0.png and .*test/NC/p2_0.png"):
        load_splits(cfg, 32)


def test_subjects_csv_joins_the_scans_of_one_patient(cfg: DataConfig):
    root = make_folder(Path(cfg.data), {"NC": ["scan1", "scan2"]})
    make_folder(root, {"NC": ["scan3"]}, "val")
    assert not find_overlap(scan(root, cfg.subject_regex))
    (root / "subjects.csv").write_text("scan,patient\nscan1,A\nscan3,A\n")
    assert set(find_overlap(scan(root, cfg.subject_regex))) == {"A"}
    (root / "subjects.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="needs the columns scan,patient"):
        scan(root, cfg.subject_regex)


def test_person_is_the_stem_up_to_its_last_underscore_or_what_the_regex_says(tmp_path: Path):
    write_image(tmp_path / "train/NC/sub_01_7.png")
    assert scan(tmp_path, DataConfig.subject_regex)[0].person == "sub_01"
    assert scan(tmp_path, r"^(\w+?)_")[0].person == "sub"
    for regex, why in (
        (r"^(x+)", "no person can be read"),
        ("(", "not a regular expression"),
        ("abc", "needs one group"),
    ):
        with pytest.raises(UserError, match=why):
            scan(tmp_path, regex)


def test_padding_never_stretches():
    image = np.full((240, 256), 200, np.uint8)
    square = to_square(image, 256)
    assert square.shape == (256, 256)
    assert (square[8:248] == 200).all() and not square[:8].any() and not square[248:].any()
    disc = cv2.circle(np.zeros((180, 120), np.uint8), (60, 90), 40, 255, -1)
    small = to_square(disc, 60)  # a circle stays a circle
    ys, xs = np.nonzero(small > 127)
    assert abs(np.ptp(ys) - np.ptp(xs)) <= 1


def test_pixels_arrive_as_they_are_in_the_file(cfg: DataConfig):
    root = make_folder(Path(cfg.data), {"NC": ["p1", "p2"]})
    splits, _ = load_splits(cfg, 48)
    x, y = splits["train"][0]
    raw = cv2.imread(str(root / splits["train"].files[0]), 0)
    assert x.shape == (1, 48, 48) and x.dtype == torch.float32 and y == 0
    assert torch.equal(x[0, :, 4:44], torch.from_numpy(raw).float() / 127.5 - 1)
    assert (x[0, :, :4] == -1).all()
    together = torch.cat(list(splits["train"].batches(3)))
    assert torch.equal(together[0], x) and len(together) == len(splits["train"])


def bad_files(folder: Path) -> dict[str, str]:
    """One file of each kind that cannot be used, and a word of the reason."""
    jpeg = write_image(folder / "good_0.jpg", 200, 200)
    png = write_image(folder / "good_1.png", 200, 200)
    (folder / "torn_0.jpg").write_bytes(jpeg.read_bytes()[:-900])
    (folder / "torn_1.png").write_bytes(png.read_bytes()[:-900])
    (folder / "text_0.png").write_text("this is not a picture")
    (folder / "empty_0.png").write_bytes(b"")
    cv2.imwrite(str(folder / "black_0.png"), np.zeros((48, 48), np.uint8))
    cv2.imwrite(str(folder / "deep_0.png"), np.full((48, 48), 4000, np.uint16))
    write_image(folder / "thin_0.png", 20, 20)
    write_image(folder / "long_0.png", 40, 100)
    jpeg.unlink(), png.unlink()
    return {
        "torn_0.jpg": "truncated", "torn_1.png": "truncated", "text_0.png": "not an image", "empty_0.png": "empty",
        "black_0.png": "all black", "deep_0.png": "uint16", "thin_0.png": "wrong size", "long_0.png": "wrong size",
    }  # fmt: skip


def test_bad_files_are_listed_with_their_reason_before_anything_starts(cfg: DataConfig, capsys: pytest.CaptureFixture):
    root = make_folder(Path(cfg.data), {"NC": ["p1", "p2", "p3"]})
    reasons = bad_files(root / "train" / "NC")
    for name, why in reasons.items():
        with pytest.raises(BadFile, match=why):
            read_slice(root / "train" / "NC" / name)
    with pytest.raises(UserError, match=f"{len(reasons)} of 14 files .* --skip-bad-files"):
        load_splits(cfg, 32)
    listed = capsys.readouterr().err
    assert all(f"{name}: " in listed for name in reasons)
    splits, _ = load_splits(replace(cfg, skip_bad_files=True), 32)
    assert len(splits["train"]) + len(splits["val"]) == 6


def test_colour_is_converted_and_said_once(cfg: DataConfig, capsys: pytest.CaptureFixture):
    root = make_folder(Path(cfg.data), {"NC": ["p1", "p2"]})
    grey = cv2.imread(str(root / "train/NC/p1_0.png"), 0)
    cv2.imwrite(str(root / "train/NC/p1_0.png"), cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR))
    splits, _ = load_splits(cfg, 48)
    out = capsys.readouterr().out
    assert out.count("colour images") == 1 and "1 colour images" in out
    everything = torch.cat([splits["train"].images, splits["val"].images])
    assert any(np.array_equal(image[:, 4:44].numpy(), grey) for image in everything)


def test_cache_decodes_once_and_again_when_a_file_changes(cfg: DataConfig):
    root = make_folder(Path(cfg.data), {"NC": ["p1", "p2"]})
    load_splits(cfg, 32)
    (first,) = Path(cfg.cache).glob("*.u8")
    stamp = first.stat().st_mtime_ns
    load_splits(cfg, 32)
    assert first.stat().st_mtime_ns == stamp  # not written again
    changed = write_image(root / "train/NC/p1_0.png", level=30)
    splits, _ = load_splits(cfg, 48)
    everything = torch.cat([splits["train"].images, splits["val"].images])
    assert any(np.array_equal(i[:, 4:44].numpy(), cv2.imread(str(changed), 0)) for i in everything)
    load_splits(cfg, 32)
    assert not first.exists()  # the stale one is gone


def test_torn_cache_is_rebuilt(cfg: DataConfig):
    make_folder(Path(cfg.data), {"NC": ["p1", "p2"]})
    before = load_splits(cfg, 32)[0]["train"].images.clone()
    (pixels,) = Path(cfg.cache).glob("*.u8")
    pixels.write_bytes(pixels.read_bytes()[:100])
    assert torch.equal(load_splits(cfg, 32)[0]["train"].images, before)


def test_a_run_knows_its_data_whatever_the_version_of_the_cache(monkeypatch: pytest.MonkeyPatch):
    slices = [Slice("train/NC/p1_0.png", "train", "NC", "p1", (7, 123))]
    of_run, of_cache = dataset.fingerprint(slices, times=False), dataset.fingerprint(slices)
    assert of_run == hashlib.sha256(b"1\ntrain/NC/p1_0.png\t7").hexdigest()[:16]  # as runs have it since version 1
    monkeypatch.setattr(dataset, "CACHE_VERSION", dataset.CACHE_VERSION + 1)
    assert dataset.fingerprint(slices, times=False) == of_run and dataset.fingerprint(slices) != of_cache


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("chunk", [1024, 3])  # slices that share a checksum
def test_a_cache_with_one_wrong_bit_is_made_again(
    cfg: DataConfig, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, chunk: int
):
    monkeypatch.setattr(dataset, "CHUNK", chunk)
    root = make_folder(Path(cfg.data), {"NC": ["p1", "p2", "p3", "p4"]})
    (root / "train/NC/p9_0.png").write_text("no picture")
    slices = scan(root, cfg.subject_regex)
    images, notes = dataset.load_slices(root, slices, 32, Path(cfg.cache))
    images = images.clone()
    assert len(notes["crc"]) == -(-9 // chunk) and capsys.readouterr().err == ""
    (pixels,), (written,) = (list(Path(cfg.cache).glob(f"slices-*{ext}")) for ext in (".u8", ".json"))
    for path, at in ((pixels, 0), (pixels, 5000), (pixels, 9 * 32**2 - 1), (written, 12), (written, 30), (written, -3)):
        flip(path, at)
        again, same = dataset.load_slices(root, slices, 32, Path(cfg.cache))
        assert torch.equal(again, images) and same == notes
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "damaged: the slices are decoded again" in said and pixels.name in said
    dataset.load_slices(root, slices, 32, Path(cfg.cache))
    assert capsys.readouterr().err == ""  # and is whole from then on


@pytest.mark.parametrize("notes", ["", "null", "[]", "{}", '"seal"', '{"seal": 0}', "[" * 10**5, "1" * 10**4, "\0"])
def test_notes_of_another_shape_are_made_again(cfg: DataConfig, notes: str):
    root = make_folder(Path(cfg.data), {"NC": ["p1", "p2"]})
    first = load_splits(cfg, 32)[0]["train"].images.clone()
    (written,) = Path(cfg.cache).glob("*.json")
    good = written.read_text()
    written.write_text(notes)
    assert torch.equal(load_splits(cfg, 32)[0]["train"].images, first) and written.read_text() == good
    assert len(list(root.rglob("*.png"))) == 4


def test_two_processes_at_once_build_one_cache(cfg: DataConfig):
    make_folder(Path(cfg.data), {"NC": [f"p{i}" for i in range(30)]}, slices=8)
    both = [start("dataset.py", "check", cfg.data, "--cache", cfg.cache) for _ in range(2)]
    outputs = [p.communicate(timeout=PATIENCE) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len(list(Path(cfg.cache).glob("*.u8"))) == 1 and not list(Path(cfg.cache).glob("*.tmp"))


def test_names_with_spaces_unicode_and_dashes(cfg: DataConfig):
    root = make_folder(Path(cfg.data), {"-AD é": ["-p 1", "pä2"]})
    splits, _ = load_splits(cfg, 32)
    assert splits["train"].classes == ["-AD é"] and {*splits["train"].people, *splits["val"].people} == {"-p 1", "pä2"}
    assert len(scan(root, cfg.subject_regex)) == 4


def test_names_that_are_not_utf8(cfg: DataConfig):
    """An old hospital system's Latin-1, which Python shows as lone surrogates."""
    root = make_folder(Path(cfg.data), {"NC": ["p1", "p2", os.fsdecode(b"p\xe9")]})
    splits, _ = load_splits(cfg, 32)
    assert len(splits["train"]) + len(splits["val"]) == 6
    (root / "train/NC" / os.fsdecode(b"q\xe9_0.png")).write_text("no picture")
    done = run_any("dataset.py", "check", root, "--cache", cfg.cache)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "q\\udce9_0.png: not an image" in done.stdout
    (root / "train/NC").rename(root / "train" / os.fsdecode(b"NC\xe9"))
    with pytest.raises(UserError, match="is not UTF-8: rename it"):  # weights and tables carry the names of classes
        scan(root, cfg.subject_regex)


def huge_pictures(folder: Path) -> list[Path]:
    """PNG and TIFF of a side of 32,000 pixels: whole, black and white, 130 kB of file and 1 GB in memory."""
    side = 32_000
    row = bytes([0xAA] * (side // 8))

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    png += chunk(b"IDAT", zlib.compress((b"\0" + row) * side, 1)) + chunk(b"IEND", b"")
    strip = zlib.compress(row * 320, 1)  # a hundred of them, which are all the same one
    where, size = struct.pack("<100I", *[8] * 100), struct.pack("<100I", *[len(strip)] * 100)
    end = 8 + len(strip)
    tags = [(256, 1, side), (257, 1, side), (258, 1, 1), (259, 1, 8), (262, 1, 1), (273, 100, end), (277, 1, 1)]
    tags += [(278, 1, 320), (279, 100, end + 400)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, 4, n, v) for t, n, v in tags) + bytes(4)
    tiff = b"II*\0" + struct.pack("<I", end + 800) + strip + where + size + directory
    for name, data in (("p_0.png", png), ("p_1.tiff", tiff)):
        (folder / name).write_bytes(data)
    return [folder / "p_0.png", folder / "p_1.tiff"]


PEAK = """
import sys
import dataset
dataset.import_cv2()  # counted before, and with the limit that the scripts give it
def most():  # KiB; not ru_maxrss, which begins with what the process of pytest had
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = most()
for path in sys.argv[1:]:
    try:
        print("read", dataset.read_slice(path)[0].shape)
    except dataset.BadFile as e:
        print("refused")
print((most() - before) // 1024)
"""


@pytest.mark.full  # test_fuzz.py has the short form: headers that claim large sides
def test_pictures_too_large_for_memory_are_not_decoded(tmp_path: Path):
    files = huge_pictures(tmp_path)
    lifted = {"OPENCV_IO_MAX_IMAGE_PIXELS": str(2**30)}
    for limit, words in (({}, ["refused", "refused"]), (lifted, ["refused", "read"])):
        env = {k: v for k, v in os.environ.items() if k not in lifted} | {"PYTHONPATH": str(ROOT), **limit}
        done = subprocess.run([sys.executable, "-c", PEAK, *files], capture_output=True, text=True, env=env)
        *said, peak = done.stdout.splitlines()
        assert [line.split()[0] for line in said] == words, done.stderr[-2000:]
        assert (int(peak) < 100) == (not limit), peak  # MiB; the second time, that there was something to fear


def manifest(folder: Path, text: str | bytes) -> Path:
    (folder / "manifest.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_manifests_lead_to_no_file_outside_of_their_folder(tmp_path: Path):
    folder, secret = tmp_path / "out", write_image(tmp_path / "secret.png")
    write_image(folder / "train/NC/a_0.png")
    (folder / "link.png").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    for name in ("../secret.png", str(secret), "link.png", "up/secret.png", "train/../../secret.png"):
        with pytest.raises(UserError, match="outside of its folder: remove that row"):
            dataset.read_images(manifest(folder, f"file,class\ntrain/NC/a_0.png,NC\n{name},NC\n"))
    os.mkfifo(folder / "pipe.png")  # would be waited for
    rows = "file,class\ntrain/NC/a_0.png,NC\npipe.png,NC\nloop.png,NC\n" + "x" * 5000 + ".png,NC\n"
    (folder / "loop.png").symlink_to("loop.png")
    data, problems = dataset.read_images(manifest(folder, rows))
    images, names = data.images, data.class_names()
    assert len(images) == 1 and names == ["NC"] and "3 of 4 files" in problems[0]
    (folder / "manifest.csv").unlink()
    assert len(dataset.read_images(folder)[0]) == 2  # without one, what a person put there counts: the link too


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"file,class\na_0.png,\0\n", "row 1|comma-separated"),
        (b"file,class\n\xff_0.png,NC\n", "UTF-8"),
        (b"file,class\na_0.png\n", "lacks file or class in row 1"),
        (b"file,class\n,NC\n", "row 1"),
        (b"file,klass\na_0.png,NC\n", "needs the columns file,class; it has 'file', 'klass'"),
        (b"", "needs the columns"),
        (b"file,class\n" + b"x" * 200_000 + b",NC\n", "field larger"),
        (b"file,class\n", "holds no images"),
    ],
)
def test_broken_manifests_are_one_sentence(tmp_path: Path, text: bytes, why: str):
    write_image(tmp_path / "a_0.png")
    with pytest.raises(UserError, match=why):
        dataset.read_images(manifest(tmp_path, text))


@pytest.mark.parametrize(
    "text", [b"", b"scan\np1\n", b"scan,patient\np1\n", b"scan,patient\np1,\n", b"scan,patient\n\xff,A\n"]
)
def test_broken_subjects_are_one_sentence(tmp_path: Path, text: bytes):
    make_folder(tmp_path, {"NC": ["p1"]})
    (tmp_path / "subjects.csv").write_bytes(text)
    with pytest.raises(UserError, match="subjects.csv"):
        scan(tmp_path, DataConfig.subject_regex)


def test_tables_as_spreadsheets_write_them(tmp_path: Path):
    make_folder(tmp_path, {"NC": ["p1", "p2"]})
    (tmp_path / "subjects.csv").write_bytes('\ufeffscan,patient\r\np1,"Ö, 1"\r\np2,"Ö, 1"\r\n'.encode())
    assert {s.person for s in scan(tmp_path, DataConfig.subject_regex)} == {"Ö, 1"}


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda root: None, "there is no data folder"),
        (lambda root: root.mkdir(), "has no train/ folder"),
        (lambda root: (root / "train").mkdir(parents=True), "has no class folders"),
        (lambda root: (root / "train" / "NC").mkdir(parents=True), "class folder .* holds no"),
        (lambda root: make_folder(root, {"NC": ["p1"]}), "one more is needed to validate on"),
        (
            lambda root: make_folder(make_folder(root, {"NC": ["p1"]}), {"AD": ["p9"]}, "val"),
            "not in its train/ folder",
        ),
    ],
)
def test_unusable_folders_say_what_is_wrong(cfg: DataConfig, build, why: str):
    build(Path(cfg.data))
    with pytest.raises(UserError, match=why):
        load_splits(cfg, 32)


def test_words_for_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = dataset.find_root("phantom", str(tmp_path), 32)
    assert len(list((root / "train" / "AD").glob("*.png"))) > 100 and (root / "anatomy.csv").exists()
    assert dataset.find_root("phantom", str(tmp_path), 32) == root  # drawn once
    # The folder's name says which drawing it holds, and make demo measures that folder.
    assert root.name == f"phantoms-v{phantom.DRAWING}-32"
    assert f"cache/phantoms-v{phantom.DRAWING}-64/train" in (ROOT / "Makefile").read_text()
    with pytest.raises(UserError, match="/home/groups/comp3710/ADNI/AD_NC"):
        dataset.find_root("rangpur", str(tmp_path), 32)
    monkeypatch.setenv("ADNI_ROOT", "/somewhere")
    assert DataConfig().data == "/somewhere"


def test_check_command_reports_what_a_person_wants_to_know(tmp_path: Path):
    root = make_folder(tmp_path / "data", {"AD": ["a1", "a2"], "NC": ["n1"]})
    make_folder(root, {"AD": ["a3"], "NC": ["n2"]}, "val")
    good = run("dataset.py", "check", root, "--cache", tmp_path / "cache").stdout
    assert "10 slices of 5 people, classes AD, NC" in good and "fit for training" in good
    assert "bad files: 0" in good and "40x48 (10)" in good and "people in more than one split: 0" in good
    assert "correlation > 0.96): 0" in good

    # a repeat visit: the same slice, a little noisier, under another scan's number
    twin = cv2.imread(str(root / "train/AD/a1_0.png"), 0).astype(float) + RNG.normal(0, 2, (48, 40))
    cv2.imwrite(str(root / "val/AD/a9_0.png"), np.clip(twin, 0, 255).astype(np.uint8))
    report = run("dataset.py", "check", root, "--cache", tmp_path / "cache").stdout
    assert "correlation > 0.96): 1" in report and "a1_0.png" in report and "a9_0.png" in report
    strict = run("dataset.py", "check", root, "--cache", tmp_path / "cache", "--near-identical", "1").stdout
    assert "correlation > 1.0): 0" in strict
    # Another idea of whose slice it is: the letter that a name begins with
    letters = run_any("dataset.py", "check", root, "--cache", tmp_path / "cache", "--subject-regex", "^([a-z])").stdout
    assert "11 slices of 2 people" in letters and "people in more than one split: 2" in letters

    shutil.copy(root / "train/AD/a1_0.png", root / "val/AD/a1_7.png")
    (root / "train/NC/n1_9.png").write_text("no")
    worse = run_any("dataset.py", "check", root, "--cache", tmp_path / "cache")
    assert worse.returncode == 2 and worse.stderr.startswith("error: ") and "Traceback" not in worse.stderr
    assert "bad files: 1" in worse.stdout and "people in more than one split: 1" in worse.stdout


REAL = ROOT.parent / "shared" / "data" / "ds002748"


@pytest.mark.skipif(not REAL.exists(), reason="the real slices are not beside this checkout")
def test_real_slices_load_as_they_are_described(tmp_path: Path):
    splits, _ = load_splits(DataConfig(data=str(REAL), cache=str(tmp_path)), 128)
    assert splits["train"].summary() == "1,600 slices of 50 people (NC 1,600)"
    assert splits["val"].summary() == "320 slices of 10 people (NC 320)"
    notes = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert notes["bad"] == [] and notes["colour"] == 0 and notes["sizes"] == {"256x256": 1920}
    x = splits["train"].batch(torch.arange(64))
    assert x.min() == -1 and (x[:, :, :8, :8] == -1).all() and x.std() > 0.3  # skull-stripped: dark corners
