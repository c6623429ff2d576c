"""benchmarks/gpu.sh: a part that fails or takes too long costs its own rows and no other's."""

from __future__ import annotations

import json
import os
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
