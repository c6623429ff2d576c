"""Kill -9 at random moments of both trainings and of sampling: python tests/chaos.py [--kills 50] [--seed 0].

Undisturbed runs first; then the same commands, killed and started again until they are done. Then weights and images
must be those of the undisturbed runs, and after every kill no file may be torn. tests/test_chaos.py is the short form.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT, TINY_UNET, TINY_VAE

STAGES = ("pre_train.py", "train.py", "predict.py")
IMAGES = 600


def command(script: str, data: Path, home: Path) -> list[str]:
    """Saving all the time, so that a kill often meets a write."""
    where = ["--run", "r", "--checkpoints", home, "--cache", home / "cache"]
    flags = {
        "pre_train.py": ["--data", data, *TINY_VAE, "--epochs", 12, "--gif-every", 1, "--save-minutes", 0, "--flip"],
        "train.py": ["--data", data, *TINY_UNET, "--epochs", 24, "--sample-every", 3, "--save-minutes", 0, "--dropout",
                     0.1, "--lookahead"],
        "predict.py": ["--num-images", IMAGES, "--batch-size", 4, "--out", home / "out", "--wandb", "disabled"],
    }[script]  # fmt: skip
    return [sys.executable, str(ROOT / script), *map(str, [*where, *flags])]


def run_through(script: str, data: Path, home: Path) -> None:
    done = subprocess.run(command(script, data, home), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} failed where nobody disturbed it:\n{done.stderr[-3000:]}")


def torn_files(home: Path) -> list[str]:
    """Files under their final names that cannot be read whole."""
    import cv2
    from PIL import Image
    from safetensors.torch import load_file

    import weights

    torn = []
    for path in home.rglob("*"):
        if path.name.startswith(".") or not path.is_file() or "cache" in path.parts:
            continue
        try:
            if path.suffix == ".png":
                assert cv2.imread(str(path)) is not None
            elif path.suffix == ".gif":
                with Image.open(path) as gif:
                    for k in range(gif.n_frames):
                        gif.seek(k)
                        gif.load()
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == "last.pt":
                assert weights.load_state(path) is not None
        except Exception as e:
            torn.append(f"{path.relative_to(home)}: {e!r}")
    return torn


def differences(a: Path, b: Path) -> list[str]:
    """What two homes do not agree on: weights bit for bit, log rows but for speed, images byte for byte."""
    from safetensors.torch import load_file

    import utils

    found = []
    for part in ("vae", "diffusion"):
        for name in ("best.safetensors", "final.safetensors"):
            x, y = (load_file(home / "r" / part / name) for home in (a, b))
            if x.keys() != y.keys() or not all((x[k] == y[k]).all() for k in x):
                found.append(f"{part}/{name}")
        rows = [utils.read_jsonl(home / "r" / part / "metrics.jsonl") for home in (a, b)]
        if len({json.dumps([{k: v for k, v in r.items() if k != "images per s"} for r in rs]) for rs in rows}) > 1:
            found.append(f"{part}/metrics.jsonl")
    outs = (a / "out", b / "out")
    made = [{p.relative_to(o).as_posix(): p.read_bytes() for p in (o / "train").rglob("*.png")} for o in outs]
    tables = [list(csv.DictReader((h / "out" / "manifest.csv").open())) for h in (a, b)]
    if made[0] != made[1] or len(made[0]) != IMAGES:
        found.append("images")
    if [r["file"] for r in tables[0]] != sorted(made[0], key=lambda f: int(f.split("i")[-1].split("_")[0])):
        found.append("manifest.csv lacks images, or has them twice")
    if [{**r, "checkpoint": ""} for r in tables[0]] != [{**r, "checkpoint": ""} for r in tables[1]]:
        found.append("manifest.csv")
    return found


def kill_once(script: str, data: Path, home: Path, rng: random.Random, seconds: float) -> dict | None:
    """Start a stage and kill it at a random moment; None where it was finished before that."""
    folder = home / {"pre_train.py": "r/vae", "train.py": "r/diffusion", "predict.py": "out"}[script]
    kind = rng.choice(["anywhere", "at work", "while a file is written", "while a file is written"])
    process = subprocess.Popen(command(script, data, home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    start = time.time()
    skip, moment = rng.randrange(1, 40), start + rng.uniform(0.0, 1.2 * seconds)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")} if folder.exists() else {}
    working, seen = None, ""
    while process.poll() is None:
        time.sleep(0.0005)
        now = time.time()
        if kind == "anywhere" and now > moment:
            break
        if kind != "anywhere" and folder.exists():
            new = [p for p in folder.rglob("*") if p not in before]
            if new and working is None:
                working = now + rng.uniform(0.0, 0.4 * seconds)
            if kind == "at work" and working and now > working:
                break
            tmp = [p for p in new if p.name.endswith(".tmp") and p.name != seen]
            skip -= bool(tmp)
            if kind == "while a file is written" and tmp and skip < 0:
                seen = tmp[0].name
                break
    process.kill()
    killed = process.wait() == -9
    message = process.stderr.read().decode(errors="replace")
    if not killed and process.returncode:
        raise SystemExit(f"{script} left with {process.returncode} after it was killed before:\n{message[-3000:]}")
    if not killed:
        return None
    return {"stage": script, "kind": kind, "seconds": round(time.time() - start, 2), "writing": seen}


def chaos(kills: int, seed: int, data: Path, home: Path) -> Iterator[dict]:
    """Rows of what was done; raises where a promise is broken."""
    rng, calm, seconds = random.Random(seed), home / "calm", {}
    for script in STAGES:
        start = time.time()
        run_through(script, data, calm)
        seconds[script] = time.time() - start
    done, turn = 0, 0
    while done < kills:
        wild, turn = home / f"wild{turn}", turn + 1
        for i, script in enumerate(STAGES):
            quota = -(-(kills - done) // (len(STAGES) - i)) if turn > 1 or kills < 20 else 8
            while quota and done < kills:
                row = kill_once(script, data, wild, rng, seconds[script])
                if row is None:
                    break
                torn = torn_files(wild)
                if torn:
                    raise SystemExit(f"torn after a kill of {script}: {torn}")
                done, quota = done + 1, quota - 1
                yield {"kill": done, **row}
            run_through(script, data, wild)
        found = differences(calm, wild)
        if found:
            raise SystemExit(f"not what an undisturbed run leaves: {found}")
        left = [p.name for p in wild.rglob(".*.tmp")]
        if left:
            raise SystemExit(f"left behind: {left}")
        yield {"turn": turn, "identical": True, "kills": done}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import phantom

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file for a row of JSON per kill")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as home:
        data = phantom.make_dataset(Path(home) / "phantoms", people=24, slices=4, size=64, progress=False)
        for row in chaos(args.kills, args.seed, data, Path(home)):
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.log:
                args.log.write_text("".join(json.dumps(r) + "\n" for r in rows))
    print(Counter((r["stage"], r["kind"]) for r in rows if "stage" in r))


if __name__ == "__main__":
    main()
