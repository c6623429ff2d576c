"""The house rules (CONTRIBUTING.md): imports run one way and do nothing else, and what the pages name is there."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, ROOT, made_once, python

FILES = sorted(p.stem for p in ROOT.glob("*.py"))
SCRIPTS = {"pre_train", "train", "texture", "distil", "predict", "edit", "evaluate", "tsne", "app"}
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    + [p for folder in ("docs", "benchmarks", "checkpoints", "visualisations") for p in (ROOT / folder).rglob("*.md")]
)


# ---------------------------------------------------------------------------------------------------------------------
# Imports


def imported_by(name: str) -> set[str]:
    """The project's own files that this one imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found & {*FILES}


def test_imports_go_round_in_no_circle():
    left = {name: imported_by(name) for name in FILES}
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, {name: sorted(needs & left.keys()) for name, needs in left.items()}
        left = {name: needs for name, needs in left.items() if name not in free}


def test_imports_run_down_the_table_of_contributing():
    rows = [line.split("|")[1] for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if line[:3] == "| `"]
    level = {name: i for i, row in enumerate(rows) for name in re.findall(r"`(\w+)\.py`", row)}
    assert {*level} == {*FILES}
    for name in FILES:
        assert not [other for other in imported_by(name) if level[other] < level[name]], name


@pytest.mark.parametrize("name", FILES)
def test_no_file_imports_a_script(name: str):
    assert not imported_by(name) & SCRIPTS


# Other people's libraries come first, so that only what our file itself does is seen; then a process for each file.
IMPORT = """
import json, os, sys
import cv2, filelock, gradio, torch, tqdm, tyro
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)

def state():
    files = [name for place in (".", folder) for name in sorted(os.listdir(place))]
    return {**os.environ, "sys.stdout": (id(sys.stdout), sys.stdout.errors), "files": files}

for name in names:
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(write, 1), os.dup2(write, 2)
        before = state()
        __import__(name)
        after = state()
        changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
        print(changed + ["CUDA"] * torch.cuda.is_initialized() + ["wandb"] * ("wandb" in sys.modules), flush=True)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        print(json.dumps([name, said.read()]))
    os.wait()
"""


@pytest.fixture(scope="module")
def said_by_imports() -> dict[str, str]:
    def try_all(folder: Path) -> None:
        (folder / "empty").mkdir(parents=True)
        done = python(IMPORT, ROOT, *FILES, cold=True, cwd=folder / "empty", env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "said").write_text(done.stdout)

    lines = (made_once("imports", try_all) / "said").read_text().splitlines()
    return dict(json.loads(line) for line in lines)


@pytest.mark.parametrize("name", FILES)
def test_an_import_changes_nothing_and_says_nothing(name: str, said_by_imports: dict[str, str]):
    """No environment variable, no other stdout, no file, no device, no wandb, no word."""
    assert said_by_imports[name] == "[]\n"


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def headings(page: Path) -> set[str]:
    """Their anchors, as they are made from the words."""
    lines = [line.lstrip("#").strip().lower() for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_files_that_a_page_names_are_there(page: Path):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in headings(target), f"{link}: no such heading"
    folders = (".", "benchmarks", "tests", "slurm", ".ci", ".github/workflows")
    there = {p.relative_to(ROOT).as_posix() for f in folders for p in (ROOT / f).glob("*")}
    for name in re.findall(r"(?<![\w/.*])[\w/]+\.(?:py|sh|sbatch|yml|ini)\b", text):
        assert any(f"/{known}".endswith(f"/{name}") for known in there), f"there is no {name}"


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 170


def test_the_files_for_machines_can_be_read():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert {"3.10", "3.13"} <= {*workflow["jobs"]["test"]["strategy"]["matrix"]["python"]}
    for step in workflow["jobs"]["test"]["steps"]:
        assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {h["id"] for repo in hooks for h in repo["hooks"]} == {"ruff-check", "ruff-format"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (ROOT / "README.md").read_text().splitlines()[0] == f"# {citation['title']}"
    assert (ROOT / "LICENSE").read_text().startswith(f"{citation['license']} License\n")


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-bench"])
def test_the_lock_files_hold_what_is_asked_for_and_name_no_index(name: str):
    def asked(file: str) -> set[str]:
        lines = (ROOT / file).read_text().splitlines()
        names = {re.split(r"[^\w-]", line)[0].lower() for line in lines if line[:1].isalpha()}
        return names | {n for line in lines if line.startswith("-r ") for n in asked(line[3:])}

    lock = (ROOT / f"{name}.lock").read_text()
    assert asked(f"{name}.txt") <= {line.partition("==")[0] for line in lock.splitlines() if "==" in line}
    assert "://" not in lock and "--index" not in lock and "--find-links" not in lock
