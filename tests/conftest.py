"""A small folder of phantoms and a small finished run on it, made once for every test that only reads them."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before torch: one thread per test process, and the same results on every machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pictures  # noqa: E402

pictures.import_cv2()  # before the tests import it, so that it has the limit on pixels that the scripts give it

TINY_VAE = (
    "--image-size 32 --downsample 4 --latent-channels 2 --channels 8 16 --blocks 1 --batch-size 16 --lr 2e-3 "
    "--precision fp32 --wandb disabled"
).split()
TINY_UNET = (
    "--channels 8 16 --blocks 1 --attention 4 --batch-size 16 --lr 2e-3 --precision fp32 --wandb disabled".split()
)


class Warm:
    """A run of a script by tests/zygote.py, to be used as a subprocess.Popen."""

    zygote: subprocess.Popen | None = None

    def __init__(self, script: str, *args: str):
        if Warm.zygote is None:
            Warm.zygote = subprocess.Popen([sys.executable, str(ROOT / "tests" / "zygote.py")], stdin=subprocess.PIPE)
        self.args, self.returncode, self.folder = [script, *args], None, Path(tempfile.mkdtemp(prefix="warm-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        job = {"argv": self.args, "folder": str(self.folder), "env": dict(os.environ), "cwd": os.getcwd()}
        Warm.zygote.stdin.write(json.dumps(job).encode() + b"\n")
        Warm.zygote.stdin.flush()

    def poll(self) -> int | None:
        status = self.folder / "status"
        if self.returncode is None and status.exists():
            self.returncode = int(status.read_text())
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.time() + timeout
        while self.poll() is None:
            if time.time() > end:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            assert Warm.zygote.poll() is None, "tests/zygote.py has ended"
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        self.wait(timeout)
        out, err = ((self.folder / name).read_text(errors="surrogateescape") for name in ("stdout", "stderr"))
        shutil.rmtree(self.folder)
        return out, err

    def send_signal(self, number: int) -> None:
        while not (self.folder / "pid").exists() or not (self.folder / "pid").read_text():
            time.sleep(0.01)
        if self.poll() is None:
            os.kill(int((self.folder / "pid").read_text()), number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(script: str, *args: str | Path, cold: bool = False, **kwargs) -> subprocess.Popen | Warm:
    """A script as a person starts it; only that its libraries are imported already, unless it is `cold`."""
    words = [str(ROOT / script), *map(str, args)]
    if not (cold or kwargs):
        return Warm(*words)
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def run(script: str, *args: str | Path, **kwargs) -> subprocess.CompletedProcess:
    """A script as a person runs it; fails the test if the script fails."""
    done = run_any(script, *args, **kwargs)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_any(script: str, *args: str | Path, **kwargs) -> subprocess.CompletedProcess:
    process = start(script, *args, **kwargs)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 synthetic people, 4 slices each, 64 pixels: train/ and val/ with AD and NC."""
    import phantom

    return phantom.make_dataset(
        tmp_path_factory.mktemp("data") / "phantoms", people=24, slices=4, size=64, progress=False
    )


@pytest.fixture(scope="session")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints folder of run `tiny`: a VAE and a class-conditional U-Net, two epochs each."""
    home = tmp_path_factory.mktemp("trained")
    where = ["--data", phantoms, "--checkpoints", home / "checkpoints", "--cache", home / "cache", "--run", "tiny"]
    run("pre_train.py", *where, *TINY_VAE, "--epochs", "2", "--gif-every", "1")
    run("train.py", *where, *TINY_UNET, "--epochs", "2", "--sample-every", "2")
    return home / "checkpoints"
