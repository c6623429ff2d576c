"""What the tests share: how scripts are started, a small folder of phantoms, and a small finished run on it."""

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
from collections.abc import Callable
from pathlib import Path

# Before torch: one thread per test process, and the same results on every machine.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"  # openTSNE's threads would spend 20 s waiting for one another
os.environ["WANDB_MODE"] = "offline"
ENVIRONMENT = dict(os.environ)  # before any of our files is imported

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import pictures  # noqa: E402

pictures.import_cv2()  # before the tests import it, so that it has the limit on pixels that the scripts give it

TINY_VAE = (
    "--image-size 32 --downsample 4 --latent-channels 2 --channels 8 16 --blocks 1 --batch-size 16 --lr 2e-3 "
    "--kl-weight 3e-4 --schedule plateau --adversarial 0 --no-flip --precision fp32 --compile off --wandb disabled"
).split()
TINY_UNET = (
    "--channels 8 16 --blocks 1 --attention 4 --batch-size 16 --lr 2e-3 --grid logsnr --loss-weight uniform "
    "--ema-decay 0.999 --precision fp32 --compile off --wandb disabled"
).split()
TINY_TEXTURE = (
    "--channels 8 16 --num-steps 4 --noise 0.5 --batch-size 4 --lr 5e-3 --ema-decay 0.9 --precision fp32 --compile off "
    "--wandb disabled"
).split()


PATIENCE = 1200  # seconds that a healthy process may take on the slowest machine: a limit only for what hangs
FULL = os.environ.get("FULL", "") not in ("", "0")  # make test FULL=1; else the tests marked `full` are left out

# A folder for all workers of a test run, which inherit its name from the process that starts them. In it is a pipe that
# each of them holds open from the start, so that the warm interpreter that reads from it lives as long as the last.
if "TESTS_HOME" not in os.environ:
    os.environ["TESTS_HOME"] = tempfile.mkdtemp(prefix="tests-")
    atexit.register(shutil.rmtree, os.environ["TESTS_HOME"], ignore_errors=True)
HOME = Path(os.environ["TESTS_HOME"])
with FileLock(HOME / "lock"):
    if not (HOME / "jobs").exists():
        os.mkfifo(HOME / "jobs")
JOBS = os.open(HOME / "jobs", os.O_RDWR)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [] if FULL else [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


class Warm:
    """A run of a script by tests/zygote.py, to be used as a subprocess.Popen."""

    started: subprocess.Popen | None = None  # by this worker, if it was the first to need it
    zygote: Path | None = None  # in /proc

    def __init__(self, *args: str, env: dict[str, str] | None = None, cwd: str | Path | None = None):
        self.args, self.returncode, self.folder = list(args), None, Path(tempfile.mkdtemp(prefix="run-", dir=HOME))
        job = {"argv": self.args, "env": env or dict(os.environ), "cwd": str(cwd or os.getcwd())}
        (self.folder / "job").write_text(json.dumps(job))
        if Warm.zygote is None:
            with FileLock(HOME / "lock"):
                if not (HOME / "pid").exists():
                    with open(HOME / "jobs", "rb") as jobs:
                        Warm.started = subprocess.Popen([sys.executable, ROOT / "tests" / "zygote.py"], stdin=jobs)
                    (HOME / "pid").write_text(str(Warm.started.pid))
            Warm.zygote = Path("/proc", (HOME / "pid").read_text())
        os.write(JOBS, f"{self.folder}\n".encode())  # so short a line is written whole, whoever else writes

    def poll(self) -> int | None:
        status = self.folder / "status"
        if self.returncode is None and status.exists():
            self.returncode = int(status.read_text())
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        end = time.time() + timeout
        while self.poll() is None:
            if time.time() > end:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            state = (Warm.zygote / "stat").read_text().rpartition(")")[2].split()[0]
            assert state != "Z", "tests/zygote.py has ended"
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
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
    """A script as a person starts it; only that its libraries are imported already, unless it is `cold`.

    `cold` is for what an interpreter reads once, when it starts or imports: CXX, OPENCV_..., the memory it took.
    """
    words = [script if script == "-c" else str(ROOT / script), *map(str, args)]
    if not cold:
        return Warm(*words, **kwargs)
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
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def python(code: str, *args: str | Path, cold: bool = False, **kwargs) -> subprocess.CompletedProcess:
    """python -c CODE ARGS, with the project on the path; its libraries are imported already, unless it is `cold`."""
    return run_any("-c", code, *args, cold=cold, **kwargs)


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """What make(folder) puts into a folder, by whichever worker comes first."""
    with FileLock(HOME / f"{name}.lock"):
        if not (HOME / name).exists():
            make(HOME / f"{name}.part")
            (HOME / f"{name}.part").rename(HOME / name)
    return HOME / name


@pytest.fixture(scope="session")
def phantoms() -> Path:
    """24 synthetic people, 4 slices each, 64 pixels: train/ and val/ with AD and NC. For reading only."""
    import phantom

    return made_once("phantoms", lambda folder: phantom.make_dataset(folder, 24, slices=4, size=64, progress=False))


@pytest.fixture(scope="session")
def trained(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints folder of run `tiny`, this worker's own: a VAE and a class-conditional U-Net, two epochs each."""

    def train(home: Path) -> None:
        where = ["--data", phantoms, "--checkpoints", home / "checkpoints", "--cache", home / "cache", "--run", "tiny"]
        run("pre_train.py", *where, *TINY_VAE, "--epochs", "2", "--gif-every", "1")
        run("train.py", *where, *TINY_UNET, "--epochs", "2", "--sample-every", "2")

    home = made_once("trained", train)
    return Path(shutil.copytree(home / "checkpoints", tmp_path_factory.mktemp("trained") / "checkpoints"))
