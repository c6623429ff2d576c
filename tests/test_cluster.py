"""Ranks that work as one, the lock of a run, and faults that a run must outlive."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, ROOT, TINY_TEXTURE, TINY_UNET, TINY_VAE, run, run_any, start
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_errors import refused, small_disk  # noqa: F401 (a fixture)
from test_pipeline import ADVERSARIAL, wait_for, where

import cluster
import utils
import weights
from config import PretrainConfig
from vae import load_vae


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(script: str, *args: str | Path, size: int = 2) -> list[subprocess.Popen]:
    """The ranks of a job, as torchrun would start them."""
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    return [start(script, *args, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(size)]


def run_ranks(script: str, *args: str | Path, size: int = 2) -> list[str]:
    """Their outputs; fails the test if one fails."""
    processes = start_ranks(script, *args, size=size)
    ends = [p.communicate(timeout=PATIENCE) for p in processes]
    assert [p.returncode for p in processes] == [0] * size, "\n".join(err[-3000:] for _, err in ends)
    return [out for out, _ in ends]


def largest_difference(a: Path, b: Path) -> float:
    x, y = load_file(a), load_file(b)
    assert x.keys() == y.keys()
    return max((x[k] - y[k]).abs().max().item() for k in x)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(n=st.integers(0, 70), size=st.integers(1, 40), micro=st.integers(1, 20))
def test_shares_and_micro_batches_are_the_whole_once(n: int, size: int, micro: int):
    def rank(r: int) -> cluster.Ranks:
        ranks = cluster.Ranks(torch.device("cpu"))
        ranks.rank, ranks.size = r, size
        return ranks

    class Network:
        alone = False

        @contextmanager
        def no_sync(self) -> Iterator[None]:
            self.alone = True
            yield
            self.alone = False

    rows = [i for r in range(size) for i in range(n)[rank(r).share(n)]]
    assert rows == list(range(n)) and (not n or rank(0).share(n).stop > 0)
    cuts = rank(0).row_bounds(n, micro)
    assert cuts[0] == 0 and cuts[-1] == n and all(c % micro == 0 or c == n for c in cuts) and cuts == sorted(cuts)
    # weights times means of portions, averaged over the ranks as DDP does, are the mean of the batch
    values, mean = torch.arange(float(n)).square(), 0.0
    for r in range(size):
        mine, passes = values[rank(r).share(n)], []
        networks = Network(), Network()
        for part, weight, passing in rank(r).micro_batches(n, micro, *networks):
            assert 0 < len(mine[part]) <= micro
            mean += weight * mine[part].mean().item() / size
            with passing:
                passes.append(networks[0].alone)
                assert networks[1].alone == networks[0].alone
            assert not networks[0].alone
        # the last portion of each rank carries the gradients
        assert passes == ([size > 1] * (len(passes) - 1) + [False] if passes else [])
    assert mean == pytest.approx(values.mean().item() if n else 0.0)


def test_two_ranks_train_the_vae_of_one(trained: Path, phantoms: Path, tmp_path: Path):
    flags = [*where(tmp_path, phantoms), *TINY_VAE, "--epochs", "2", "--gif-every", "1", "--micro-batch", "5"]
    first, second = run_ranks("pre_train.py", *flags)
    assert "done: " in first and second == ""  # rank 0 alone speaks, and writes
    a, b = trained / "tiny" / "vae", tmp_path / "tiny" / "vae"
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    x = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("best.safetensors", "final.safetensors"):
        one, two = (load_vae(folder / name, torch.device("cpu"))[0] for folder in (a, b))
        # not the weights themselves: a bias before a GroupNorm of single channels has no gradient but rounding
        for u, v in zip(one.encode(x), two.encode(x)):
            torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.decode(one.encode(x)[0]), two.decode(one.encode(x)[0]), rtol=1e-5, atol=1e-5)
    rows = [utils.read_jsonl(folder / "metrics.jsonl") for folder in (a, b)]
    for u, v in zip(*rows):
        for key in u.keys() - {"images per s"}:
            assert u[key] == pytest.approx(v[key], rel=1e-4), key


@pytest.mark.full
def test_two_ranks_and_a_discriminator_are_one(phantoms: Path, tmp_path: Path):
    flags = [*TINY_VAE, *ADVERSARIAL, "--epochs", "4", "--gif-every", "4"]
    run("pre_train.py", *where(tmp_path / "one", phantoms), *flags)
    run_ranks("pre_train.py", *where(tmp_path / "two", phantoms), *flags, "--micro-batch", "5")
    x = torch.rand(8, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, two = (
        load_vae(tmp_path / n / "tiny" / "vae" / "best.safetensors", torch.device("cpu"))[0] for n in ("one", "two")
    )
    torch.testing.assert_close(one.decode(one.encode(x)[0]), two.decode(one.encode(x)[0]), rtol=1e-4, atol=1e-4)
    rows = [utils.read_jsonl(tmp_path / n / "tiny" / "vae" / "metrics.jsonl")[-1] for n in ("one", "two")]
    for key in rows[0].keys() - {"images per s"}:
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-3), key


@pytest.mark.full
def test_two_ranks_teach_the_texture_of_one(trained: Path, phantoms: Path, tmp_path: Path):
    for name in ("one", "two"):
        shutil.copytree(trained / "tiny" / "vae", tmp_path / name / "tiny" / "vae")
    flags = [*TINY_TEXTURE, "--batch-size", "16", "--epochs", "2"]
    run("texture.py", *where(tmp_path / "one", phantoms), *flags)
    run_ranks("texture.py", *where(tmp_path / "two", phantoms), *flags, "--micro-batch", "5")
    rows = [utils.read_jsonl(tmp_path / n / "tiny" / "texture" / "metrics.jsonl")[-1] for n in ("one", "two")]
    for key in rows[0].keys() - {"images per s"}:
        assert rows[0][key] == pytest.approx(rows[1][key], rel=1e-3), key


@pytest.mark.full
def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(trained: Path, phantoms: Path, tmp_path: Path):
    for name in ("ranks", "alone"):
        shutil.copytree(trained / "tiny" / "vae", tmp_path / name / "tiny" / "vae")
    flags = [*TINY_UNET, "--epochs", "12", "--sample-every", "6", "--flip"]
    # a step of each rank takes five portions of 3 images and one of 1; the same run as one process in one
    first, second = start_ranks("train.py", *where(tmp_path / "ranks", phantoms), *flags, "--micro-batch", "3")
    wait_for(tmp_path / "ranks" / "tiny" / "diffusion" / "metrics.jsonl", first)
    second.send_signal(signal.SIGUSR1)
    (out, err), _ = first.communicate(timeout=PATIENCE), second.communicate(timeout=PATIENCE)
    assert (first.returncode, second.returncode) == (75, 75), err
    assert "stopped by a signal to another rank and saved at epoch" in out
    done = run("train.py", *where(tmp_path / "ranks", phantoms), *flags).stdout
    assert "resuming" in done
    run("train.py", *where(tmp_path / "alone", phantoms), *flags)
    for name in ("best.safetensors", "final.safetensors"):
        a, b = (tmp_path / home / "tiny" / "diffusion" / name for home in ("ranks", "alone"))
        assert largest_difference(a, b) < 1e-4  # after 60 steps of rounding


@pytest.mark.full
def test_torchrun_ends_a_job_whose_rank_died(trained: Path, phantoms: Path, tmp_path: Path):
    shutil.copytree(trained / "tiny" / "vae", tmp_path / "tiny" / "vae")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    flags = [*where(tmp_path, phantoms), *TINY_UNET, "--epochs", "5000", "--sample-every", "5000"]
    job = subprocess.Popen(
        [*torchrun, str(ROOT / "train.py"), *map(str, flags)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_for(tmp_path / "tiny" / "diffusion" / "metrics.jsonl", job)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    ranks = [c for c in children if b"RANK=1" in Path(f"/proc/{c}/environ").read_bytes().split(b"\0")]
    os.kill(int(ranks[0]), signal.SIGKILL)
    died = time.time()
    _, err = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0 and time.time() - died < 60
    assert "Signal 9 (SIGKILL)" in err and "local_rank: 1" in err.replace("  ", " "), err[-3000:]


@pytest.mark.full  # compiles for a minute
def test_a_compiled_backward_is_cut_where_gradients_can_travel(trained: Path, phantoms: Path, tmp_path: Path):
    """Compiled inside DDP; outside of it the backward pass is one piece, and gradients travel at its end only."""
    shutil.copytree(trained / "tiny" / "vae", tmp_path / "tiny" / "vae")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    flags = [*where(tmp_path, phantoms), *TINY_UNET, "--channels", "256", "--attention", "0", "--epochs", "1"]
    job = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *map(str, flags), "--compile", "on"],
        capture_output=True, text=True, timeout=PATIENCE,
        env={**os.environ, "TORCH_LOGS": "ddp_graphs", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
    )  # fmt: skip
    assert job.returncode == 0, job.stderr[-3000:]
    assert "---submod_0 graph---" in job.stderr and "---submod_1 graph---" in job.stderr


def test_predict_and_evaluate_spread_over_ranks(trained: Path, phantoms: Path, tmp_path: Path):
    flags = ["--checkpoints", trained, "--run", "tiny", "--wandb", "disabled"]
    draw = [*flags, "--num-images", "10", "--batch-size", "2"]
    run("predict.py", *draw, "--out", tmp_path / "one")
    run_ranks("predict.py", *draw, "--out", tmp_path / "two")
    for part in ("0", "1", "2"):
        run("predict.py", *draw, "--out", tmp_path / "parts", "--shard", part, "--shards", "3")
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 10 + 7
    for name in ("two", "parts"):
        assert files == sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*") if p.is_file())
        assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / name / f).read_bytes() for f in files)
    assert "--shard 3 of --shards 3" in refused("predict.py", *draw, "--shard", "3", "--shards", "3")

    measure = [*flags, "--data", phantoms, "--cache", tmp_path, "--num-images", "20", "--resamples", "20"]
    for name, ranks in (("one", 1), ("two", 2)):
        ends = start_ranks("evaluate.py", *measure, "--out", tmp_path / f"report-{name}", size=ranks)
        messages = [p.communicate(timeout=PATIENCE)[1] for p in ends]
        assert [p.returncode for p in ends] == [2] + [0] * (ranks - 1), messages  # too few slices for some evidence
    one, two = (json.loads((tmp_path / f"report-{name}" / "report.json").read_text()) for name in ("one", "two"))
    assert one["latent_spread"] == two["latent_spread"] and one["spectrum"] == two["spectrum"]


def test_what_rank_0_refuses_ends_all_ranks(trained: Path, phantoms: Path, tmp_path: Path):
    (tmp_path / "tiny").mkdir()
    record = {"host": "node9", "pid": 4, "job": "17", "since": "2026-01-01 00:00:00"}
    (tmp_path / "tiny" / "vae.lock").write_text(json.dumps(record))
    (tmp_path / "c" / "vae").mkdir(parents=True)
    (tmp_path / "c" / "vae" / "last.pt").write_bytes(b"torn")
    for flags, sentence in (
        ([], "is being worked on by process 4 on node9"), (["--run", "b"], "--batch-size 1 is less"),
        (["--run", "c"], "last.pt cannot be read"),
    ):  # fmt: skip
        ranks = start_ranks("pre_train.py", *where(tmp_path, phantoms), *TINY_VAE, "--batch-size", "1", *flags)
        ends = [p.communicate(timeout=PATIENCE)[1] for p in ranks]
        assert [p.returncode for p in ranks] == [2, 2] and sentence in ends[0] and "Traceback" not in "".join(ends)


def test_predict_stopped_by_a_signal_goes_on(trained: Path, tmp_path: Path):
    flags = ["--checkpoints", trained, "--run", "tiny", "--num-images", "200", "--batch-size", "1", "--out", tmp_path]
    process = start("predict.py", *flags, "--wandb", "disabled")
    wait_for(tmp_path / "train" / "AD" / "s0i00004_0.png", process)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "stopped by SIGUSR1 with" in out, err
    drawn = len((tmp_path / "manifest.csv").read_text().splitlines()) - 1
    assert 5 <= drawn < 200 and len(list(tmp_path.rglob("s0*.png"))) == drawn and not (tmp_path / "README.md").exists()
    assert f"{200 - drawn} images in" in run("predict.py", *flags, "--wandb", "disabled").stdout


# ---------------------------------------------------------------------------------------------------------------------
# The lock

HOLD = "import sys, time, cluster, pathlib; cluster.RunLock(pathlib.Path(sys.argv[1])); print('held', flush=True)\n"


def hold(folder: Path, then: str = f"time.sleep({PATIENCE})", **env: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + then, str(folder)], cwd=ROOT, env={**os.environ, **env}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen]]:
    folder = tmp_path / "run" / "vae"
    process = hold(folder, SLURM_JOB_ID="17")
    yield folder, process
    process.kill()
    process.wait()


def test_a_second_job_is_refused_and_a_dead_one_is_taken_over(held: tuple[Path, subprocess.Popen], capsys, phantoms):
    folder, process = held
    with pytest.raises(utils.UserError, match=f"process {process.pid} on .*, job 17, since 2.*: wait for it, stop it"):
        cluster.RunLock(folder)
    flags = ["--checkpoints", folder.parent.parent, "--run", "run", "--cache", folder.parent, "--data", phantoms]
    assert "is being worked on by process" in refused("pre_train.py", *flags, *TINY_VAE, "--fresh")
    assert not folder.exists()  # nothing was made, nothing was moved aside
    process.kill()
    process.wait()
    lock = cluster.RunLock(folder)
    assert f"taking over {folder} from process {process.pid}" in capsys.readouterr().out
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release()
    cluster.RunLock(folder).release()
    assert capsys.readouterr().out == "" and lock.path.read_text() == ""  # who leaves in good order leaves no record


def test_a_job_on_another_machine_counts_while_its_heart_beats(tmp_path: Path, monkeypatch, capsys):
    folder = tmp_path / "vae"
    record = {"host": "node9", "pid": 4, "job": "17", "start": "0", "since": "2026-01-01 00:00:00"}
    path = folder.with_name("vae.lock")
    path.write_text(json.dumps(record))
    with pytest.raises(utils.UserError, match="process 4 on node9, job 17, since .*, last seen . s ago"):
        cluster.RunLock(folder)
    assert json.loads(path.read_text()) == record
    monkeypatch.setenv("SLURM_JOB_ID", "17")  # another command of the same job
    with pytest.raises(utils.UserError, match="process 4 on node9"):
        cluster.RunLock(folder)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the same job, requeued on another node
    cluster.RunLock(folder).release()
    path.write_text(json.dumps(record))
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    os.utime(path, (time.time() - 130, time.time() - 130))
    cluster.RunLock(folder).release()
    assert capsys.readouterr().out.count("taking over") == 2
    for torn in (b"{", b"[]", b"\xff", b'{"host": 3}'):
        path.write_bytes(torn)
        cluster.RunLock(folder).release()


def test_the_heart_beats(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cluster.RunLock, "BEAT", 0.05)
    lock = cluster.RunLock(tmp_path / "vae")
    os.utime(lock.path, (0, 0))
    end = time.time() + PATIENCE
    while time.time() < end:
        time.sleep(0.05)
        if lock.path.stat().st_mtime > 0:
            break
    assert time.time() - lock.path.stat().st_mtime < 10
    lock.release()


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_gradients_that_are_never_finite_stop_the_run(trained: Path, phantoms: Path, tmp_path: Path):
    """Latents divided by nothing: infinite in half precision, and so is every loss."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(trained / "tiny" / "vae", tmp_path / "tiny" / "vae")
    file = tmp_path / "tiny" / "vae" / "best.safetensors"
    with safe_open(file, "pt") as f:
        meta = json.loads(f.metadata()["meta"])
    meta.pop("digest", None)
    save_file({**load_file(file), "latent_std": torch.full((2,), 1e-12)}, file, {"meta": json.dumps(meta)})
    flags = [*where(tmp_path, phantoms), *TINY_UNET, "--epochs", "20", "--sample-every", "99"]
    done = run_any("train.py", *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the gradients of 20 steps in a row were not finite, up to step 20 (epoch 4.00)" in done.stderr
    assert "5 steps skipped" in done.stderr + done.stdout
    state = weights.load_state(tmp_path / "tiny" / "diffusion" / "last.pt")
    assert 20 <= state["step"] <= 40
    assert all(v.isfinite().all() for part in ("model", "ema") for v in state[part].values())
    again = run_any("train.py", *flags)  # and the same command says the same
    assert again.returncode == 2 and "not finite" in again.stderr


def test_data_that_changes_under_a_run(phantoms: Path, tmp_path: Path):
    data = Path(shutil.copytree(phantoms, tmp_path / "data"))
    flags = [*where(tmp_path, data), *TINY_VAE, "--epochs", "4", "--gif-every", "9"]
    process = start("pre_train.py", *flags[:-4], "--epochs", "400", "--gif-every", "9")
    wait_for(tmp_path / "tiny" / "vae" / "metrics.jsonl", process)
    file = next((data / "train" / "AD").glob("*.png"))
    file.rename(tmp_path / "kept.png")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "Traceback" not in err  # what was decoded at the start is what it trains on
    assert "started on other slices" in refused("pre_train.py", *flags[:-4], "--epochs", "400")
    (tmp_path / "kept.png").rename(file)
    process = start("pre_train.py", *flags[:-4], "--epochs", "400", "--gif-every", "9")
    rows = len(utils.read_jsonl(tmp_path / "tiny" / "vae" / "metrics.jsonl"))
    end = time.time() + PATIENCE
    while time.time() < end:
        if len(utils.read_jsonl(tmp_path / "tiny" / "vae" / "metrics.jsonl")) > rows:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert "resuming" in process.communicate(timeout=PATIENCE)[0] and process.returncode == 75


def test_power_loss_between_write_and_rename(trained: Path, phantoms: Path, tmp_path: Path):
    """A temporary file that was never renamed, and the moment between the two renames of last.pt."""
    shutil.copytree(trained / "tiny" / "vae", tmp_path / "tiny" / "vae")
    flags = [*where(tmp_path, phantoms), *TINY_UNET, "--sample-every", "9"]
    run("train.py", *flags, "--epochs", "1")
    folder = tmp_path / "tiny" / "diffusion"
    (folder / ".last.pt.1.tmp").write_bytes((folder / "last.pt").read_bytes()[:1000])
    (folder / "last.pt").rename(folder / "last.prev.pt")
    assert "resuming" in run("train.py", *flags, "--epochs", "2").stdout
    assert not list(folder.glob(".*.tmp"))


def test_a_read_only_folder_is_one_sentence(trained: Path, phantoms: Path, small_disk: Path, tmp_path: Path):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    base = ["--data", phantoms, "--cache", tmp_path]
    assert "Read-only file system" in refused("pre_train.py", *base, *TINY_VAE, "--checkpoints", small_disk)
    assert "Read-only" in refused("predict.py", "--checkpoints", trained, "--run", "tiny", "--out", small_disk / "out")
    assert "Read-only" in refused("pre_train.py", "--data", phantoms, *TINY_VAE, "--checkpoints", tmp_path / "c",
                                  "--cache", small_disk)  # fmt: skip


def test_wandbs_own_disk_is_full(phantoms: Path, tmp_path: Path):
    folder = tmp_path / "tiny" / "vae" / "wandb"
    folder.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        flags = [f for f in TINY_VAE if f not in ("--wandb", "disabled")]
        done = run("pre_train.py", *where(tmp_path, phantoms), *flags, "--epochs", "2", "--wandb", "offline")
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
    assert "done: " in done.stdout and len(utils.read_jsonl(tmp_path / "tiny" / "vae" / "metrics.jsonl")) == 2


def test_a_state_of_the_first_version_is_refused(trained: Path, phantoms: Path, tmp_path: Path):
    shutil.copytree(trained / "tiny", tmp_path / "tiny")
    torch.save({"format": 1, "step": 3}, tmp_path / "tiny" / "vae" / "last.pt")
    sentence = refused("pre_train.py", *where(tmp_path, phantoms), *TINY_VAE, "--epochs", "3")
    assert "another version of this code" in sentence and "--fresh" in sentence


def test_ranks_are_read_from_torchrun_or_srun(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert utils.job_ranks() == (0, 1, 0)
    monkeypatch.setenv("SLURM_PROCID", "0")  # a batch script
    monkeypatch.setenv("SLURM_LOCALID", "0")
    assert utils.job_ranks() == (0, 1, 0)
    for name, value in zip(names[3:], ("5", "8", "1")):
        monkeypatch.setenv(name, value)
    assert utils.job_ranks() == (5, 8, 1)
    for name, value in zip(names[:3], ("2", "4", "0")):
        monkeypatch.setenv(name, value)
    assert utils.job_ranks() == (2, 4, 0)  # torchrun inside of srun
    assert PretrainConfig().micro_batch is None
