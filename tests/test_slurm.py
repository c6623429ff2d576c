"""On a real Slurm (a throw-away one will do): the chain, time limits, arrays, two nodes, cancelled jobs."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PATIENCE, ROOT, TINY_TEXTURE, TINY_UNET, TINY_VAE, run
from safetensors.torch import load_file

SINFO = ["sinfo", "-h", "-N", "-o", "%N"]
nodes = subprocess.run(SINFO, capture_output=True, text=True).stdout.split() if shutil.which("sbatch") else []
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.full,
    pytest.mark.skipif(not nodes, reason="there is no Slurm here: sbatch and sinfo must work (.ci/run starts one)"),
]
LIGHT = ["--cpus-per-task=1", "--gres=none"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the scripts to submit from, so that logs do not land in the repository."""
    for file in [*ROOT.glob("*.py"), *(ROOT / "slurm").glob("*.*")]:
        target = tmp_path / "project" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (tmp_path / "project" / "slurm" / "logs").mkdir()
    monkeypatch.setenv("PYTHON", sys.executable)
    for name in [n for n in os.environ if n.startswith("SBATCH_")]:
        monkeypatch.delenv(name)
    return tmp_path / "project"


def submit(project: Path, *args: str | Path) -> str:
    done = subprocess.run(["sbatch", "--parsable", *map(str, args)], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def show(job: str) -> dict[str, str]:
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout))


def wait_for(job: str, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
    for _ in range(int(seconds * 4)):
        facts = show(job)
        if facts.get("JobState") in states:
            return facts
        time.sleep(0.25)
    raise AssertionError(f"job {job} is {facts}")


def log(project: Path, pattern: str = "*") -> str:
    return "\n".join(p.read_text(errors="replace") for p in sorted((project / "slurm" / "logs").glob(pattern)))


def wait_for_the_first_epoch(project: Path) -> None:
    metrics = project / "checkpoints" / "r" / "diffusion" / "metrics.jsonl"
    for _ in range(4 * PATIENCE):
        if metrics.exists() and metrics.stat().st_size:
            return
        time.sleep(0.25)
    raise AssertionError(f"{metrics} never came:\n{log(project)}")


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def where(project: Path, data: Path, run_name: str = "r") -> list[str | Path]:
    return ["--data", data, "--cache", project / "cache", "--run", run_name]


def largest_difference(a: Path, b: Path) -> float:
    x, y = load_file(a), load_file(b)
    assert x.keys() == y.keys()
    return max((x[k].float() - y[k].float()).abs().max().item() for k in x)


def chain(project: Path, data: Path, **stages: str) -> dict[str, str]:
    """Submit the pipeline; {stage: job}."""
    light = {"SBATCH_GRES": "none", "PRE_TRAIN": " ".join(TINY_VAE), "TRAIN": " ".join(TINY_UNET)}
    done = subprocess.run(
        ["slurm/pipeline.sh", "small", *map(str, where(project, data)[:-2]), "--run=my run", "--wandb", "disabled"],
        cwd=project, capture_output=True, text=True, env={**os.environ, **light, **stages},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    jobs = dict(line.split() for line in done.stdout.splitlines())
    assert list(jobs) == ["pre_train", "train", *["texture"] * ("TEXTURE" in stages), "predict", "evaluate"]
    return jobs


def test_the_whole_pipeline_and_an_array_that_is_one_job(project: Path, phantoms: Path, tmp_path: Path):
    jobs = chain(
        project, phantoms,
        PRE_TRAIN=" ".join(TINY_VAE) + " --epochs 2", TRAIN=" ".join(TINY_UNET) + " --epochs 2",
        TEXTURE=" ".join(TINY_TEXTURE) + " --epochs 1", PREDICT="--num-images 30 --batch-size 4",
        EVALUATE="--resamples 20 --no-training-pictures",
    )  # fmt: skip
    ended = wait_for(jobs["evaluate"], *ENDED)
    for stage in ("pre_train", "train", "texture", "predict"):
        assert show(jobs[stage])["JobState"] == "COMPLETED", log(project)
    # 16 slices to hold out are too few for some of the evidence: the job says so, and fails so that Slurm sees it
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "2:0") and "at least 20 images" in log(
        project, "*eval*"
    )
    runs = project / "checkpoints"
    assert (runs / "my run" / "report" / "report.md").exists()
    tasks = log(project, "mri-predict-*")
    assert len(list((project / "slurm" / "logs").glob("mri-predict-*"))) == 4 and tasks.count("images in") == 4
    flags = [
        "--run",
        "my run",
        "--num-images",
        "30",
        "--batch-size",
        "4",
        "--out",
        str(tmp_path / "one"),
        "--wandb",
        "disabled",
    ]
    subprocess.run([sys.executable, "predict.py", "small", *flags], cwd=project, check=True)
    array = filecmp.dircmp(runs / "my run" / "images", tmp_path / "one")
    pictures = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()]
    assert len(pictures) == 30 + 7 and not array.left_only and not array.right_only
    _, other, missing = filecmp.cmpfiles(array.left, array.right, map(str, pictures), shallow=False)
    assert not other and not missing


def test_a_failed_stage_stops_the_rest(project: Path, phantoms: Path):
    jobs = chain(project, phantoms, PRE_TRAIN="--lr 1000")
    assert wait_for(jobs["pre_train"], *ENDED)["ExitCode"] == "2:0"
    for stage in ("train", "predict", "evaluate"):
        assert wait_for(jobs[stage], *ENDED)["JobState"] == "CANCELLED"
    assert "--lr 1000 is not between" in log(project) and not (project / "checkpoints").exists()


def test_a_run_longer_than_its_time_limit_finishes_by_itself(project: Path, trained: Path, phantoms: Path):
    """Slurm looks at time limits twice a minute: the warning comes within half a minute, the requeue takes ten more."""
    for home in ("checkpoints", "reference"):
        shutil.copytree(trained / "tiny" / "vae", project / home / "r" / "vae")
    flags = [*where(project, phantoms), *TINY_UNET, "--epochs", "300", "--sample-every", "150", "--dropout", "0.1"]
    limits = ["--time=1", "--signal=B:USR1@60", *LIGHT]
    job = submit(project, *limits, "slurm/train.sbatch", *flags)
    run("train.py", *flags, "--checkpoints", project / "reference")
    facts = wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    assert facts["JobState"] == "COMPLETED" and int(facts["Restarts"]) >= 1, log(project)
    text = log(project)
    assert text.count("and saved at epoch") == text.count("resuming") == int(facts["Restarts"])
    folders = [project / home / "r" / "diffusion" for home in ("checkpoints", "reference")]
    for name in ("best.safetensors", "final.safetensors"):
        assert largest_difference(folders[0] / name, folders[1] / name) == 0.0


def test_a_cancelled_job_saves_and_is_not_requeued(project: Path, trained: Path, phantoms: Path):
    shutil.copytree(trained / "tiny" / "vae", project / "checkpoints" / "r" / "vae")
    job = submit(
        project, *LIGHT, "slurm/train.sbatch", *where(project, phantoms), *TINY_UNET, "--epochs", "5000",
        "--sample-every", "5000",
    )  # fmt: skip
    wait_for_the_first_epoch(project)
    subprocess.run(["scancel", job], check=True)
    assert wait_for(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING")["JobState"] == "CANCELLED"
    time.sleep(3)
    facts = show(job)
    assert facts["JobState"] == "CANCELLED" and facts["Restarts"] == "0", log(project)


@pytest.mark.skipif(len(set(nodes)) < 2, reason="there are no two nodes here")
def test_two_nodes_are_one(project: Path, trained: Path, phantoms: Path):
    """The weights of two ranks on two nodes are those of the run that one process made, within float error."""
    shutil.copytree(trained / "tiny" / "vae", project / "checkpoints" / "r" / "vae")
    two = ["--nodes=2", "--ntasks-per-node=1", *LIGHT]
    flags = [*where(project, phantoms), *TINY_UNET, "--epochs", "2", "--sample-every", "2"]
    job = submit(project, *two, "slurm/train.sbatch", *flags)
    assert wait_for(job, *ENDED)["JobState"] == "COMPLETED", log(project)
    for name in ("best.safetensors", "final.safetensors"):
        a, b = (home / "diffusion" / name for home in (project / "checkpoints" / "r", trained / "tiny"))
        assert largest_difference(a, b) < 1e-5
    assert log(project).count("done: ") == 1  # rank 0 alone speaks


@pytest.mark.skipif(len(set(nodes)) < 2, reason="there are no two nodes here")
def test_a_rank_that_dies_takes_the_job_down(project: Path, trained: Path, phantoms: Path):
    shutil.copytree(trained / "tiny" / "vae", project / "checkpoints" / "r" / "vae")
    job = submit(
        project, "--nodes=2", "--ntasks-per-node=1", *LIGHT, "slurm/train.sbatch", *where(project, phantoms),
        *TINY_UNET, "--epochs", "5000", "--sample-every", "5000",
    )  # fmt: skip
    wait_for_the_first_epoch(project)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            env = (process / "environ").read_bytes().split(b"\0")
            name = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}".encode() in env and b"SLURM_PROCID=1" in env and b"train.py" in name:
            os.kill(int(process.name), 9)
    start = time.time()
    facts = wait_for(job, *ENDED)
    assert facts["JobState"] == "FAILED" and facts["ExitCode"] != "0:0" and time.time() - start < 60
    assert "task 1" in log(project) and "Killed" in log(project)
