"""python app.py in a real browser, and what a request that did not come from the page gets."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import cv2
import numpy as np
import pytest
import torch
from conftest import PATIENCE, ROOT, TINY_UNET, run, run_any

import app
from config import AppConfig
from utils import UserError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(trained: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoints folder with the run of conftest (AD and NC), the weights of this repository, a run `knows` that was
    conditioned on level, age, sex and group, and a run `plain` that knows nothing."""
    home = tmp_path_factory.mktemp("runs")
    (home / "tiny").symlink_to(trained / "tiny")
    for name, asked in (
        ("knows", ["--condition", "level", "age", "sex", "group", "--grid", "full"]),
        ("plain", ["--unconditional"]),
    ):
        shutil.copytree(trained / "tiny" / "vae", home / name / "vae")
        where = ["--data", phantoms, "--checkpoints", home, "--cache", home / "cache", "--run", name]
        run("train.py", *where, *TINY_UNET, *asked, "--epochs", "1")
    (home / "pretrained").symlink_to(ROOT / "checkpoints" / "pretrained")
    return home


@pytest.fixture(scope="module")
def studio(runs: Path) -> app.Studio:
    names = ("tiny", "knows", "plain", "pretrained")
    return app.Studio(AppConfig(run=names, checkpoints=str(runs), device="cpu", max_steps=20))


def drawn(studio: app.Studio, *asked) -> tuple:
    return list(studio.generate(*asked))[-1]


def test_the_same_images_as_predict_draws(studio: app.Studio, runs: Path, tmp_path: Path):
    """The page's ZIP holds, byte for byte, what predict.py writes."""
    # The second's weights know all timesteps; a few of them take a third of the time.
    for name, class_name, steps, flags in (
        ("tiny", "AD", 20, ["--class-name", "AD"]),
        ("pretrained", None, 6, ["--num-steps", "6"]),
    ):
        where = ["--checkpoints", runs, "--device", "cpu", "--num-images", "3", "--seed", "7", "--out", tmp_path / name]
        run("predict.py", "--run", name, *where, *flags)
        _, gallery, words, file = drawn(studio, name, class_name, 3, 7, steps, "dpm++2m", 1)
        assert len(gallery) == 3 and "3 images in" in words
        with zipfile.ZipFile(file.value if isinstance(file.value, str) else file.value["path"]) as z:
            rows = list(csv.DictReader(io.StringIO(z.read("manifest.csv").decode())))
            assert [int(r["index"]) for r in rows] == [0, 1, 2]
            for r in rows:
                (theirs,) = (tmp_path / name).rglob(r["file"])
                assert z.read(r["file"]) == theirs.read_bytes()
                assert r["class"] == theirs.parent.name and r["run"] == name


def test_ten_steps_are_shown_as_they_are_taken(studio: app.Studio):
    updates = list(studio.generate("knows", "NC", 2, 3, 20, "dpm++2m", 1, None, 70.0, "M"))
    strips = [strip for strip, *_ in updates if isinstance(strip, np.ndarray)]
    assert [s.shape[1] // 32 for s in strips] == [*range(1, 11), 10]  # pictures of 32 pixels side by side
    assert np.array_equal(strips[-1], strips[-2]) and strips[0].std() > 5
    assert updates[-2][2] == "Step 20 of 20" and "2 images in" in updates[-1][2]


def test_walks_end_where_they_should(studio: app.Studio):
    """Place 0 and 1 are the two seeds' own images, and so are the two classes at 0 and 1."""
    how = (10, "dpm++2m", 1)
    ends = [drawn(studio, "pretrained", None, 1, seed, *how)[1][0][0] for seed in (3, 8)]
    between = [studio.walk("pretrained", None, 3, 8, place, *how)[0] for place in (0, 0.5, 1)]
    apart = [[np.abs(image.astype(int) - end).max() for end in ends] for image in between]
    assert apart[0][0] <= 1 and apart[2][1] <= 1 and min(apart[1]) > 20
    noise = [studio.runs["pretrained"].noise(seed, [0])[0] for seed in (3, 8)]
    assert app.slerp(*noise, 0.5).std() == pytest.approx(1, abs=0.06)  # not 0.7, as the mean of two has
    own = {c: drawn(studio, "tiny", c, 1, 5, *how)[1][0][0] for c in ("AD", "NC")}
    for place, same in ((0, "NC"), (1, "AD")):
        before, after, _, words = studio.between_classes("tiny", "NC", "AD", 5, place, 10, "dpm++2m")
        assert np.abs(before.astype(int) - own["NC"]).max() <= 1
        assert np.abs(after.astype(int) - own[same]).max() <= 1
        assert f"{place:.0%}" in words
    image = app.difference_map(np.array([[0, 120, -120]]))[0]
    assert image[0].tolist() == [255, 255, 255] and image[1, 0] > image[1, 2] and image[2, 2] > image[2, 0]


def test_values_are_what_predict_takes(studio: app.Studio, runs: Path, tmp_path: Path):
    controls = [(name, a.name) for name, a in studio.controls]
    assert controls == [(name, n) for name in ("knows", "pretrained") for n in ("level", "age", "sex")]
    where = ["--checkpoints", runs, "--device", "cpu", "--num-images", "2", "--seed", "3", "--run", "knows"]
    run("predict.py", *where, "--class-name", "NC", "--set", "age=70", "sex=M", "--out", tmp_path / "out")
    _, gallery, _, file = drawn(studio, "knows", "NC", 2, 3, 20, "dpm++2m", 1, None, 70.0, "M")
    assert "age 70, sex M" in gallery[0][1]
    with zipfile.ZipFile(file.value if isinstance(file.value, str) else file.value["path"]) as z:
        rows = list(csv.DictReader(io.StringIO(z.read("manifest.csv").decode())))
        theirs = list(csv.DictReader((tmp_path / "out" / "manifest.csv").read_text().splitlines()))
        for mine, other in zip(rows, theirs, strict=True):
            assert [mine[k] for k in ("level", "age", "sex")] == [other[k] for k in ("level", "age", "sex")]
            assert z.read(mine["file"]) == (tmp_path / "out" / other["file"]).read_bytes()
    for asked, word in ((("x", None, None), "level=x"), ((None, 400, None), "age=400"), ((None, None, "Z"), "sex=Z")):
        with pytest.raises(UserError, match=word):
            drawn(studio, "knows", "NC", 1, 3, 10, "dpm++2m", 1, *asked)


def test_a_sweep_ends_at_the_lowest_and_the_highest_value(studio: app.Studio):
    age = next(a for _, a in studio.controls if a.name == "age")
    for place, value in ((0, age.quantiles[0]), (1, age.quantiles[-1])):
        lowest, here, change, words = studio.sweep("knows", "AD", "age", place, 5, 10, "dpm++2m", 1, 0.5, None, "F")
        want = drawn(studio, "knows", "AD", 1, 5, 10, "dpm++2m", 1, 0.5, value, "F")[1][0][0]
        assert np.abs(here.astype(int) - want).max() <= 1 and change.shape == (*here.shape, 3)
        assert f"age {age.decode(2 * place - 1)} years" in words and (here == lowest).all() == (place == 0)
    for what in ("sex", "weight", None):
        with pytest.raises(UserError, match="no number"):
            studio.sweep("knows", "AD", what, 0.5, 5, 10, "dpm++2m", 1)


def test_a_slice_is_changed_and_the_file_deleted(studio: app.Studio, phantoms: Path):
    own = sorted((phantoms / "val" / "NC").glob("*.png"))[0]
    with pytest.raises(UserError, match="Choose a slice"):  # not a file of somebody else
        studio.change("knows", "AD", str(own), "", None, None, None)
    uploads = studio.folder / "pictures"
    uploads.mkdir(exist_ok=True)
    mine = Path(shutil.copy(own, uploads / "mine.png"))
    with pytest.raises(UserError, match="is not among"):  # a slip leaves the file there
        studio.change("knows", "AD", str(mine), "age=620", None, 80.0, None)
    before, after, change, words, _ = studio.change("knows", "AD", str(mine), "age=62 sex=M", None, 80.0, None)
    assert before.shape == after.shape and "age 80, sex M, group AD" in words and "No prognosis" in words
    assert not mine.exists() and own.exists()
    with pytest.raises(UserError, match="choose it again"):
        studio.change("knows", "AD", str(mine), "", None, None, None)
    again = shutil.copy(own, uploads / "again.png")
    words = studio.change("knows", app.AS_IT_IS, again, "group=NC", None, 80.0, None)[3]
    assert "age 80, sex unknown, group NC" in words  # what is not set stays
    (uploads / "text.png").write_text("no picture")
    cv2.imwrite(str(uploads / "noise.png"), np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    for file, word in (
        (uploads / "text.png", "cannot be used"),
        (uploads / "noise.png", "unlike all"),
        (None, "Choose"),
    ):
        with pytest.raises(UserError, match=word):
            studio.change("knows", "AD", file and str(file), "", None, None, None)
        assert file is None or not file.exists()
    with pytest.raises(UserError, match="knows no attributes"):
        studio.change("plain", None, None, "")


def test_distances_are_those_of_the_copy_detector(studio: app.Studio, monkeypatch: pytest.MonkeyPatch):
    from metrics import CopyDetector

    some = studio.runs["tiny"]
    copy = torch.from_numpy(drawn(studio, "tiny", "AD", 1, 4, 10, "dpm++2m", 1)[1][0][0])
    g = torch.Generator().manual_seed(0)
    others = torch.randint(0, 255, (160, *copy.shape), generator=g, dtype=torch.uint8)
    train = torch.cat([others, copy[None]])
    monkeypatch.setattr(some, "detector", CopyDetector(train, np.arange(len(train)) % 40))
    monkeypatch.setattr(some, "training", train)
    _, gallery, words, file = drawn(studio, "tiny", "AD", 2, 4, 10, "dpm++2m", 1)
    assert (
        len(gallery) == 4
        and "(a copy?)" in gallery[1][1]
        and "(a copy?)" not in gallery[3][1]
        and np.array_equal(gallery[1][0], copy.numpy())
    )
    assert "compared" not in words and "two people" in words
    with zipfile.ZipFile(file.value if isinstance(file.value, str) else file.value["path"]) as z:
        assert float(next(csv.DictReader(io.StringIO(z.read("manifest.csv").decode())))["distance"]) < 1
        assert len([n for n in z.namelist() if n.endswith(".png")]) == 2  # training slices stay here


WRONG = [
    ("run", ("nowhere", "AD", 1, 0, 10, "dpm++2m", 1)), ("run", ("../tiny", "AD", 1, 0, 10, "dpm++2m", 1)),
    ("Class", ("tiny", "XX", 1, 0, 10, "dpm++2m", 1)), ("Images", ("tiny", "AD", 17, 0, 10, "dpm++2m", 1)),
    ("Images", ("tiny", "AD", 0, 0, 10, "dpm++2m", 1)), ("Seed", ("tiny", "AD", 1, 1.5, 10, "dpm++2m", 1)),
    ("Seed", ("tiny", "AD", 1, None, 10, "dpm++2m", 1)), ("Seed", ("tiny", "AD", 1, float("inf"), 10, "dpm++2m", 1)),
    ("Steps", ("pretrained", None, 1, 0, 1000, "dpm++2m", 1)), ("Guidance", ("tiny", "AD", 1, 0, 10, "dpm++2m", "x")),
    ("Guidance", ("tiny", "AD", 1, 0, 10, "dpm++2m", float("nan"))),
]  # fmt: skip


def test_more_than_a_visitor_may_ask_for_is_refused(studio: app.Studio):
    for word, asked in WRONG:
        with pytest.raises(UserError, match=word):
            list(studio.generate(*asked))
    with pytest.raises(UserError, match="Sampler"):
        list(studio.generate("pretrained", None, 1, 0, 10, "euler", 1))


def test_the_page_offers_as_many_steps_as_can_be_asked_for(studio: app.Studio, runs: Path):
    cfg = AppConfig(run=("pretrained", "tiny"), checkpoints=str(runs), device="cpu", max_steps=30)
    page = app.build(app.Studio(cfg))
    (steps,) = (c["props"] for c in page.get_config_file()["components"] if c["props"].get("label") == "Steps")
    assert (steps["minimum"], steps["maximum"], steps["value"]) == (2, 30, 20)
    with pytest.raises(UserError, match="Steps must be a whole number from 2 to 20"):
        list(studio.generate("pretrained", None, 1, 0, 1, "dpm++2m", 1))
    assert len(list(studio.generate("pretrained", None, 1, 0, 2, "dpm++2m", 1))) >= 1


def test_a_run_whose_data_is_still_being_read_says_so(runs: Path):
    """Also the second run, while the copy detector of the first one is being made."""
    for data, words in (("somewhere", "Still reading"), ("", "not known")):
        run_ = app.Run(AppConfig(checkpoints=str(runs), device="cpu", data=data), "tiny")
        assert words in run_.why_none and run_.detector is None


def test_who_leaves_ends_the_work(studio: app.Studio):
    import threading

    before = threading.active_count()
    drawing = studio.generate("pretrained", None, 16, 0, 20, "dpm++2m", 1)
    next(drawing)
    drawing.close()
    end = time.time() + PATIENCE
    while threading.active_count() > before and time.time() < end:
        time.sleep(0.05)
    assert threading.active_count() <= before


VISITED: set[str] = set()  # pages on which a browser has generated images


@pytest.fixture(scope="module")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page that is up."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log"
    words = ["--run", "tiny", "pretrained", "knows", "--checkpoints", runs, "--device", "cpu", "--port", port]
    # As people start it, without TMPDIR: then what visitors see and upload is kept in memory.
    home = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    (home / "slices-999999999-old/pictures").mkdir(parents=True, exist_ok=True)  # of a process that was killed
    env = {k: v for k, v in os.environ.items() if k != "TMPDIR"}
    nowhere = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # a cluster's proxy, away
    with log.open("w") as f:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), *map(str, words)], stdout=f, stderr=f,
            env={**env, **nowhere},
        )  # fmt: skip
    end = time.time() + PATIENCE
    while "open http" not in log.read_text() and process.poll() is None and time.time() < end:
        time.sleep(0.1)
    assert "open http" in log.read_text(), log.read_text()
    assert not list(home.glob("slices-999999999-*"))
    yield f"http://127.0.0.1:{port}"
    assert f"http://127.0.0.1:{port}" not in VISITED or list(home.glob(f"slices-{process.pid}-*/**/*.png"))
    process.send_signal(signal.SIGHUP)  # the terminal was closed
    assert process.wait(PATIENCE) == 129
    assert not list(home.glob(f"slices-{process.pid}-*"))  # pictures, slices of people among them, do not stay
    assert "Traceback" not in log.read_text()


def test_the_page_fetches_no_address():
    import asyncio

    app.import_gradio()
    from gradio import processing_utils

    with pytest.raises(UserError, match="no addresses"):
        asyncio.run(processing_utils.async_ssrf_protected_download("http://127.0.0.1:9/x.png", "nowhere"))


def test_nothing_larger_than_a_slice_can_be_uploaded(address: str):
    import httpx

    files = {"files": b"x" * 5_000_000}
    answer = httpx.post(f"{address}/gradio_api/upload", files=files, trust_env=False, timeout=PATIENCE)
    assert answer.status_code == 413


@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium (apt install chromium)")
def test_a_visitor_in_a_browser(address: str, phantoms: Path, tmp_path: Path):
    """Generate, download, a wrong value, walk, another run, from class to class; no request leaves the machine."""
    VISITED.add(address)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else [], timeout=1000 * PATIENCE
        )
        page = browser.new_page(viewport={"width": 1200, "height": 1300})
        page.set_default_timeout(1000 * PATIENCE)
        page.set_default_navigation_timeout(1000 * PATIENCE)
        asked, errors = [], []
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(address)
        draw = page.get_by_role("button", name="Generate", exact=True)
        draw.wait_for()
        assert "Not for diagnosis" in page.inner_text("body")
        page.get_by_role("radio", name="NC", exact=True).first.click()
        page.get_by_label("Seed", exact=True).fill("3")
        draw.click()
        page.locator("#words").get_by_text("4 images in").wait_for()
        assert "not known" in page.locator("#words").inner_text()  # and so nothing was compared
        with page.expect_download() as download:
            page.get_by_role("button", name="Download all as ZIP").click()
        download.value.save_as(tmp_path / "slices.zip")
        with zipfile.ZipFile(tmp_path / "slices.zip") as z:
            rows = list(csv.DictReader(io.StringIO(z.read("manifest.csv").decode())))
            assert [(r["class"], r["seed"]) for r in rows] == [("NC", "3")] * 4
            image = cv2.imdecode(np.frombuffer(z.read(rows[0]["file"]), np.uint8), cv2.IMREAD_UNCHANGED)
            assert image.shape == (32, 32)

        page.get_by_label("Seed", exact=True).fill("1.5")
        draw.click()
        page.get_by_text("Seed must be a whole number").first.wait_for()
        page.get_by_label("Seed", exact=True).fill("4")
        draw.click()  # and it goes on
        page.locator("#words").get_by_text("4 images in").wait_for()

        page.get_by_role("tab", name="From one class to another").click()
        page.locator("#carried").get_by_text("100% of the way from NC to AD").wait_for()
        page.get_by_label("range slider for How far").press("ArrowLeft")
        page.locator("#carried").get_by_text("90% of the way").wait_for()  # by keyboard

        page.get_by_role("radio", name="pretrained", exact=True).click()
        page.get_by_text("256x256 pixels").wait_for()
        assert not page.get_by_role("radio", name="AD", exact=True).first.is_visible()
        page.get_by_role("tab", name="Walk between two seeds").click()
        page.locator("#walked").get_by_text("100% of seed 0").wait_for()
        page.get_by_label("To seed").fill("9")
        page.locator("#walked").get_by_text("of seed 9").wait_for()
        page.get_by_role("tab", name="Generate").click()
        draw.click()
        page.locator("#words").get_by_text("4 images in").wait_for()
        page.screenshot(path=tmp_path / "page.png")
        assert len(cv2.imread(str(tmp_path / "page.png")).reshape(-1, 3)) == 1200 * 1300

        page.get_by_role("radio", name="knows", exact=True).click()
        page.get_by_text("32x32 pixels").wait_for()  # until then the fields are those of the run before
        age = page.get_by_label("age (years)").locator("visible=true")
        assert age.input_value() == ""  # any
        age.fill("70")
        page.get_by_role("tab", name="Sweep").click()
        page.locator("#swept").get_by_text("level").wait_for()
        page.get_by_label("range slider for From the lowest").press("ArrowRight")  # by keyboard
        page.get_by_role("radio", name="age", exact=True).click()
        page.locator("#swept").get_by_text("age").wait_for()
        page.screenshot(path=tmp_path / "sweep.png")
        page.get_by_role("tab", name="Change a slice").click()
        page.locator("input[type=file]").first.set_input_files(sorted((phantoms / "val" / "NC").glob("*.png"))[0])
        page.get_by_label("What is known of it").fill("sex=M")
        page.get_by_role("button", name="Change it").press("Enter")  # by keyboard
        page.locator("#changed").get_by_text("age 70, sex M").wait_for()
        page.locator("input[type=file]").first.set_input_files(sorted((phantoms / "val" / "NC").glob("*.png"))[1])
        page.get_by_role("radio", name="F", exact=True).click()
        page.get_by_role("button", name="Change it").click()  # again, otherwise
        page.locator("#changed").get_by_text("age 70, sex F").wait_for()
        page.screenshot(path=tmp_path / "change.png", full_page=True)

        hosts = {urlparse(url).netloc for url in asked if urlparse(url).scheme in ("http", "https", "ws", "wss")}
        assert hosts == {urlparse(address).netloc}
        assert not errors
        assert page.get_by_text("knows one class only").count() == 0
        assert "connect-src 'self'" in page.request.get(address).headers["content-security-policy"]
        browser.close()


def test_wrong_commands_end_in_one_sentence(runs: Path, tmp_path: Path):
    where = ["--checkpoints", runs, "--device", "cpu"]
    for sentence, words in {
        "there are no weights at": ["--run", "nobody", *where],
        "there are no pretrained weights": ["--checkpoints", tmp_path],
        "--port 0": ["--port", "0"],
        "--max-images 0": ["--max-images", "0"],
    }.items():
        done = run_any("app.py", *words)
        assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr, (sentence, done)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        done = run_any("app.py", "--run", "tiny", *where, "--port", s.getsockname()[1])
    assert done.returncode == 2 and "cannot be listened on" in done.stderr and "Traceback" not in done.stderr
