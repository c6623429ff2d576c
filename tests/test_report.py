"""RUN/report.html: written by the trainings, complete, self-contained, and free of people where that is asked for."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
from conftest import run, run_any


class Page(HTMLParser):
    """Tags that are open, pictures with their words, and every address on a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.pictures, self.addresses, self.words = [], [], [], ""
        self.feed(path.read_text())
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        attrs = dict(attrs)
        if tag not in ("meta", "img", "input", "br", "!doctype"):
            self.open.append(tag)
        self.addresses += [v for k, v in attrs.items() if k in ("src", "href", "action")]
        if tag == "img":
            self.pictures.append((attrs["alt"], attrs["src"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def decoded(uri: str) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8), cv2.IMREAD_UNCHANGED)


def test_trainings_leave_a_page_that_needs_nothing_else(trained: Path):
    page = Page(trained / "tiny" / "report.html")
    assert all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert "http" not in page.words and "url(" not in page.words
    assert all(decoded(uri) is not None for _, uri in page.pictures)
    alts = [alt for alt, _ in page.pictures]
    for what in ("Curves of the VAE", "Curves of the U-Net", "Loss by timestep", "epoch 1", "epoch 2", "Denoising"):
        assert any(alt.startswith(what) for alt in alts), (what, alts)
    last = json.loads((trained / "tiny/diffusion/metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['loss/val']:.4g}" in page.words
    assert "not for diagnosis" in page.words and '"latent_channels": 2' in page.words


def test_a_page_to_publish_shows_no_slice_of_the_data(trained: Path, tmp_path: Path):
    run("report.py", "--run", "tiny", "--checkpoints", trained, "--no-training-pictures", "--out", tmp_path / "p.html")
    frames = {p.read_bytes() for p in (trained / "tiny/vae/frames").glob("*.png")}
    shown = [{base64.b64decode(uri.partition(",")[2]) for _, uri in Page(p).pictures} for p in
             (tmp_path / "p.html", trained / "tiny" / "report.html")]  # fmt: skip
    assert frames and not frames & shown[0] and frames & shown[1]
    assert "No slice of the training data" in Page(tmp_path / "p.html").words


def test_evidence_and_odd_names_are_on_the_page(trained: Path, tmp_path: Path):
    home = tmp_path / "c" / "<b>run & co"
    shutil.copytree(trained / "tiny", home)
    found = {"random_vgg": {"frechet": {"value": 1.5, "floor": 2.5, "ci_low": 1.0, "ci_high": 2.0, "n": 9}}}
    (home / "report").mkdir(exist_ok=True)
    (home / "report" / "report.json").write_text(json.dumps(found))
    run("report.py", "--run", home.name, "--checkpoints", tmp_path / "c")
    page = Page(home / "report.html")
    assert "Run <b>run & co" in page.words and "<b>" not in re.sub("<script.*", "", (home / "report.html").read_text())
    assert "frechet, random vgg" in page.words and "[1, 2]" in page.words


def test_a_damaged_file_beside_a_run_does_not_end_a_training(trained: Path, tmp_path: Path, capsys):
    from report import refresh_report

    home = tmp_path / "run"
    shutil.copytree(trained / "tiny", home)
    (home / "report").mkdir(exist_ok=True)
    for damage in ('{"a":', "[1]", '{"x": {"y": {"value": 1.0, "ci_low": 1}}}'):
        (home / "report" / "report.json").write_text(damage)
        refresh_report(home)
        assert "was not updated" in capsys.readouterr().err


def test_a_run_without_numbers_is_a_sentence(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name, words in (("nobody", "there is no run"), ("empty", "no numbers yet")):
        done = run_any("report.py", "--run", name, "--checkpoints", tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
