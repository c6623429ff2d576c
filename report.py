"""RUN/report.html: all of a run on one page that needs nothing else: python report.py --run NAME.

The training scripts write it again whenever they draw their curves. Sections and curves are those of wandb's panels.
"""

from __future__ import annotations

from config import ReportConfig, parse

if __name__ == "__main__":
    cfg = parse(ReportConfig)  # before torch is imported, so that --help answers at once

import base64
import html
import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from utils import UserError, evenly_spaced, git_commit, read_jsonl, run_script
from weights import read_meta, write_atomic

STAGES = {"vae": "VAE", "diffusion": "U-Net"}
MAX_FRAMES = 24  # of a slider: what a browser opens at once
BY_TIMESTEP = "loss by timestep, "

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --page: #fff; --line: #d0d7de; --soft: #57606a; --note: #fff4e0 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --page: #14171b; --line: #3a424c; --soft: #a3adb8; --note: #3a2f18 }
  .plot { background: #fff }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page) }
main { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem }
img { max-width: 100%; height: auto } figure { margin: 1rem 0 } figcaption, .soft { color: var(--soft) }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse } td.number { font-variant-numeric: tabular-nums }
.note { background: var(--note); padding: .6rem 1rem; border-radius: .4rem }
input[type=range] { width: min(30rem, 100%) } summary { cursor: pointer } pre { overflow-x: auto }
"""
SLIDE = """
for (const f of document.querySelectorAll("figure[data-frames]")) {
  const images = f.querySelectorAll("img"), slider = f.querySelector("input"), out = f.querySelector("output");
  const show = () => {
    images.forEach((image, i) => image.hidden = i != slider.value);
    out.textContent = images[slider.value].alt;
  };
  slider.addEventListener("input", show); show();
}
"""


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def picture(png: bytes, what: str, caption: str = "", kind: str = "") -> str:
    """A figure with its text for those who cannot see it."""
    what, caption = html.escape(what), html.escape(caption or what)
    tag = f' class="{kind}"' if kind else ""
    return f'<figure><img{tag} src="{data_uri(png)}" alt="{what}"><figcaption>{caption}</figcaption></figure>'


def slider(frames: Sequence[Path], what: str) -> str:
    """Pictures EPOCH.png of some epochs, one at a time."""
    keep = evenly_spaced(len(frames), MAX_FRAMES)
    images = "".join(
        f'<img src="{data_uri(path.read_bytes())}" alt="epoch {int(path.stem)}"{" hidden" * (i < len(keep) - 1)}>'
        for i, path in enumerate(frames[k] for k in keep)
    )
    return (
        f'<figure data-frames>{images}<figcaption><label>{html.escape(what)}, <output></output><br><input type="range" '
        f'min="0" max="{len(keep) - 1}" value="{len(keep) - 1}" step="1"></label></figcaption></figure>'
    )


def table(rows: Mapping[str, object], head: Sequence[str] = ()) -> str:
    """Two columns, or as many as the values have."""
    text = f"<tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>" if head else ""
    for name, value in rows.items():
        cells = value if isinstance(value, (list, tuple)) else [value]
        shown = "".join(f'<td class="number">{html.escape(_number(c))}</td>' for c in cells)
        text += f"<tr><th scope=row>{html.escape(name)}</th>{shown}</tr>"
    return f"<table>{text}</table>"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(n: Mapping[str, float]) -> str:
    return f"[{_number(n['ci_low'])}, {_number(n['ci_high'])}]"


def plot_by_timestep(rows: Sequence[Mapping[str, float]]) -> bytes | None:
    """The last epoch's loss over the timestep, and validation's at earlier epochs in fainter lines."""
    from matplotlib.figure import Figure

    named = [r for r in rows if any(k.startswith(BY_TIMESTEP) for k in r)]
    if not named:
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    ax = figure.add_subplot()
    for kind, colour in (("train", "tab:blue"), ("val", "tab:orange")):
        earlier = evenly_spaced(len(named), 5) if kind == "val" else [-1]
        some = [named[i] for i in earlier]
        for n, row in enumerate(some, 1):
            place = {int(k.rpartition("=")[2]): v for k, v in row.items() if k.startswith(f"{BY_TIMESTEP}{kind}/t=")}
            label = f"{kind}, epoch {row['epoch']:g}"
            ax.plot([*place], [*place.values()], ".-", color=colour, alpha=(n / len(some)) ** 1.5, label=label)
    ax.set(xlabel="timestep (0: clean, 999: noise)", ylabel="loss", yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def stage(folder: Path, people: bool) -> str:
    """What one stage left: its numbers, curves, pictures over the epochs, configuration."""
    rows = read_jsonl(folder / "metrics.jsonl")
    if not rows:
        return ""
    last = rows[-1]
    files = [folder / f"{name}.safetensors" for name in ("final", "best")]
    meta = next((read_meta(f) for f in files if f.exists()), {})
    best = min((r for r in rows if "loss/val" in r), key=lambda r: r["loss/val"], default=last)
    speeds = [r["images per s"] for r in rows if "images per s" in r]
    facts: dict[str, object] = {"epochs": f"{last.get('epoch', 0):g}", "steps": f"{last['step']:,}"}
    facts |= {k: last[k] for k in ("loss/train", "loss/val", "PSNR/val", "SSIM/val") if k in last}
    facts["lowest loss/val"] = f"{best.get('loss/val', float('nan')):.4g} at epoch {best.get('epoch', 0):g}"
    if speeds:
        facts["images per s, median (slowest, fastest epoch)"] = (
            f"{np.median(speeds):.3g} ({min(speeds):.3g}, {max(speeds):.3g})"
        )
    facts |= {k: meta[k] for k in ("data", "hardware", "commit") if meta.get(k)}
    text = [table(facts)]
    curves = folder / "curves.png"
    if curves.exists():
        text.append(picture(curves.read_bytes(), f"Curves of the {STAGES[folder.name]} over the epochs", kind="plot"))
    if by_timestep := plot_by_timestep(rows):
        text.append(picture(by_timestep, "Loss by timestep", kind="plot"))
    frames = [p for p in sorted(folder.glob("frames/*.png")) if p.stem.isdecimal()]
    real = folder.name == "vae"
    if frames and (people or not real):
        what = "Slices, their reconstructions, and the error" if real else "The same seeds"
        text.append(slider(frames, what))
    if (strip := folder / "denoising.png").exists():
        text.append(picture(strip.read_bytes(), "Denoising: x_t above, the estimate of the clean image below"))
    if meta.get("config"):
        told = {k: v for k, v in meta["config"].items() if people or k not in ("data", "cache", "checkpoints")}
        config = html.escape(json.dumps(told, indent=1))
        text.append(f"<details><summary>Configuration</summary><pre>{config}</pre></details>")
    return f"<h2>{STAGES[folder.name]}</h2>" + "\n".join(text)


def evidence(folder: Path) -> str:
    """What evaluate.py and tsne.py found, if they were run."""
    text, file = [], folder / "report" / "report.json"
    found = json.loads(file.read_bytes()) if file.exists() else {}
    rows = {
        f"{name}, {space}".replace("_", " "): (n["value"], n.get("floor", ""), _interval(n))
        for space, numbers in found.items()
        if isinstance(numbers, dict) and "blurred" not in space
        for name, n in numbers.items()
        if isinstance(n, dict) and isinstance(n.get("value"), float) and "ci_low" in n
    }
    if rows:
        text.append(
            "<p>The floor is the same number with people who were held out (<code>report/report.md</code>).</p>"
        )
        text.append(table(rows, ["", "generated", "floor", "interval"]))
    shown = {"generated": "Generated slices", "spectrum": "Power spectrum", "anatomy": "Anatomy"}
    shown |= {"memorisation": "Distances to the closest training slice"}
    for name, what in shown.items():
        if (path := folder / "report" / f"{name}.png").exists():
            text.append(picture(path.read_bytes(), what, kind="plot" if name != "generated" else ""))
    if (path := folder / "tsne" / "tsne.png").exists():
        text.append(picture(path.read_bytes(), "t-SNE of the latents", kind="plot"))
    return "<h2>Evidence</h2>" + "\n".join(text) if text else ""


def write_report(home: Path, people: bool = True, out: Path | None = None) -> Path | None:
    """RUN/report.html, or OUT; None where the run has no numbers yet. Without `people`, no slice of the data."""
    stages = [stage(home / name, people) for name in STAGES]
    if not any(stages):
        return None
    warning = (
        "This page shows slices of the people in the training data. Keep it as you keep the data; "
        "<code>python report.py --no-training-pictures</code> makes one without them."
        if people
        else "No slice of the training data is on this page."
    )
    name, when = html.escape(home.name), time.strftime("%Y-%m-%d %H:%M")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Run {name}</title>
<style>{STYLE}</style></head><body><main>
<h1>Run {name}</h1>
<p class="soft">Written {when}, code {html.escape(git_commit())}. Synthetic images, for research: not for diagnosis.</p>
<p class="note">{warning}</p>
{chr(10).join(stages)}
{evidence(home)}
</main><script>{SLIDE}</script></body></html>
"""
    out = out or home / ("report.html" if people else "report-without-people.html")
    write_atomic(out, page.encode("utf-8", "replace"))
    return out


def refresh_report(home: Path) -> None:
    """The same from within a training, which a damaged file beside it must not end."""
    try:
        write_report(home)
    except Exception as e:
        print(f"{home / 'report.html'} is not written anew ({type(e).__name__}: {e})", file=sys.stderr)


def main(cfg: ReportConfig) -> None:
    home = Path(cfg.checkpoints) / cfg.run
    if not home.is_dir():
        raise UserError(f"there is no run {home}: name one with --run")
    path = write_report(home, cfg.training_pictures, Path(cfg.out) if cfg.out else None)
    if path is None:
        raise UserError(f"{home} has no numbers yet (vae/metrics.jsonl, diffusion/metrics.jsonl): train it first")
    print(path)


if __name__ == "__main__":
    run_script(main, cfg)
