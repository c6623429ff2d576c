"""benchmarks/gpu.sh: a part that fails or takes too long costs its own rows and no other's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.parametrize(("bench", "want"), [("exit 3", 3), ("exec sleep 60", 124), ("exit 0", 0)])
def test_parts_of_the_gpu_benchmarks_fail_alone(bench: str, want: int, tmp_path: Path):
    for name, line in (("py", "exit 0"), ("bench", bench), ("nvidia-smi", "echo a card")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PY": str(tmp_path / "py"), "BENCH": str(tmp_path / "bench"), "OUT": str(tmp_path / "out")}
    env |= {"LIMIT": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=env, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "out" / "gpu-status.jsonl").read_text().splitlines()]
    ends = {row["part"]: row["exit"] for row in rows}
    peers = dict.fromkeys(["train_step", "train_step_16", "sample", "train_epoch"], want)
    assert ends == peers | {"profile_step": 0, "tests": 0}
    assert done.returncode == (want != 0)
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    limits = [int(line.split()[2]) for line in text.splitlines() if line.startswith("  part ")]
    assert sum(limits) <= 480  # 8 minutes on one card


def test_weights_are_made_in_parts_that_go_on(tmp_path: Path):
    # A stand-in for every script: it leaves with 75 when SIGTERM comes, and the first time it takes too long.
    code = f"""#!/bin/bash
echo "$1" >> {tmp_path}/calls
trap 'touch {tmp_path}/interrupted; exit 75' TERM
[ -e {tmp_path}/interrupted ] || for i in $(seq 300); do sleep 0.1; done
"""
    (tmp_path / "py").write_text(code)
    (tmp_path / "py").chmod(0o755)
    env = {**os.environ, "PY": str(tmp_path / "py"), "DATA": "slices", "LIMIT": "22"}
    command = ["bash", "benchmarks/pretrained.sh", "real"]
    first = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert first.returncode == 75 and "the same command goes on" in first.stdout
    env["LIMIT"] = "1000"
    (tmp_path / "code").mkdir()  # where the stand-ins publish nothing, so that there is something to link
    shutil.copytree(ROOT / "benchmarks", tmp_path / "code" / "benchmarks")
    for student in ("pretrained/student", "pretrained/student-2", "real-2"):
        (tmp_path / "code" / "checkpoints" / student).mkdir(parents=True)
    done = subprocess.run(command, cwd=tmp_path / "code", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    published = ["evaluate.py", "benchmarks/ship.py"]
    students = ["distil.py", "distil.py", *published, "distil.py", *published]  # four steps and texture, then two steps
    scripts = ["pre_train.py", "pre_train.py", "train.py", "texture.py", *published, *students]
    assert (tmp_path / "calls").read_text().split() == scripts
