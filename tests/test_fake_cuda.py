"""The CUDA paths on machines without a GPU: PyTorch's own host code over a driver whose kernels do nothing.

What the driver does and cannot do is said in fake_cuda/fake_cuda.c, and what is checked in fake_cuda/checks.py. All
checks run in one process; each is a test here.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, TINY_UNET, made_once, run

HERE = Path(__file__).parent / "fake_cuda"
CHECKS = [
    f.name
    for f in ast.parse((HERE / "checks.py").read_text()).body
    if isinstance(f, ast.FunctionDef) and f.name.startswith("check_")
]
pytestmark = pytest.mark.skipif(
    (torch.version.cuda or "").partition(".")[0] != "13" or not shutil.which("gcc") or sys.platform != "linux",
    reason="needs PyTorch for CUDA 13, and gcc",
)


def build(folder: Path) -> dict[str, str]:
    """Compile the driver; returns the environment of processes that find its cards."""
    triton = importlib.util.find_spec("triton")
    assert triton and triton.origin  # a part of PyTorch's builds for CUDA; it brings CUDA's own headers
    library, include = folder / "libcuda.so.1", Path(triton.origin).parent / "backends" / "nvidia" / "include"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-w", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", str(library)]
    subprocess.run([*command, str(HERE / "fake_cuda.c"), "-ldl", "-lpthread"], check=True)
    return {
        **os.environ, "LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": str(folder), "FAKE_CUDA_N": "2",
    }  # fmt: skip


@pytest.fixture(scope="module")
def result(phantoms: Path, trained: Path) -> Callable[[str], str]:
    """result(name) -> the tracebacks of the settings in which this check of checks.py failed.

    The checks run in two halves, so that two workers do not wait for each other.
    """

    def make(names: list[str], folder: Path) -> None:
        shutil.copytree(phantoms, folder / "data")
        shutil.copytree(trained / "tiny" / "vae", folder / "checkpoints" / "full" / "vae")
        where = ["--data", folder / "data", "--checkpoints", folder / "checkpoints", "--cache", folder / "cache"]
        run("train.py", *where, *TINY_UNET, "--run", "full", "--grid", "full", "--epochs", "1")
        for gb, small in (("8", False), ("0.2", True)):
            if not (own := [name for name in names if ("on_a_small_card" in name) == small]):
                continue
            command, env = [sys.executable, HERE / "checks.py", folder, *own], {**build(folder), "FAKE_CUDA_GB": gb}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == 0, done.stderr[-3000:]

    def find(name: str) -> str:
        middle = len(CHECKS) // 2
        half = int(CHECKS.index(name) >= middle)
        names = CHECKS[middle:] if half else CHECKS[:middle]
        found: dict[str, str] = {}
        for file in made_once(f"fake_cuda_{half}", partial(make, names)).glob("results-*.json"):
            found |= json.loads(file.read_text())
        return found[name]

    return find


@pytest.mark.parametrize("name", CHECKS)
def test_on_a_card_that_does_nothing(result: Callable[[str], str], name: str):
    assert result(name) == "", result(name)[-3000:]
