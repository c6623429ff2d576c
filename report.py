"""Write RUN/report.html: python report.py --run NAME puts everything about a run on one self-contained page.

Numbers, curves, pictures and evidence, all inside one HTML file that needs no other file and no network. The training
scripts also rewrite it whenever they draw their curves. Its sections and curves match wandb's panels.
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

STAGES = {"vae": "VAE", "diffusion": "U-Net", "texture": "Texture"}  # folder of the run -> heading
MAX_FRAMES = 24  # most pictures in a slider: every one of them is inside the page, and a browser loads all at once
BY_TIMESTEP = "loss by timestep, "  # metrics.jsonl keys: this, then "train/t=202" or "val/t=202"

# The page has its style and its one script inside, so that it works offline and asks no server for anything.
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
# Moving a slider shows its picture number `value` and hides the others.
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


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of HTML. Names of runs, classes and settings can contain anything, so every text is escaped.


def data_uri(png: bytes) -> str:
    """A PNG as an address that contains the picture itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def picture(png: bytes, what: str, caption: str = "", kind: str = "") -> str:
    """A <figure> with the picture, `what` as its alternative text, and a caption (default: the same text).

    kind: CSS class; "plot" keeps a white background in dark mode.
    """
    what, caption = html.escape(what), html.escape(caption or what)
    tag = f' class="{kind}"' if kind else ""
    return f'<figure><img{tag} src="{data_uri(png)}" alt="{what}"><figcaption>{caption}</figcaption></figure>'


def slider(frames: Sequence[Path], what: str) -> str:
    """A <figure> that shows one of the pictures EPOCH.png at a time, the last one first.

    With more than MAX_FRAMES, evenly spaced ones.
    """
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
    """A <table> with a row for each name: the name, then its value, or one cell for each item of a list or tuple."""
    text = f"<tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>" if head else ""
    for name, value in rows.items():
        cells = value if isinstance(value, (list, tuple)) else [value]
        shown = "".join(f'<td class="number">{html.escape(_number(c))}</td>' for c in cells)
        text += f"<tr><th scope=row>{html.escape(name)}</th>{shown}</tr>"
    return f"<table>{text}</table>"


def _number(value: object) -> str:
    """Four significant digits for a float, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(n: Mapping[str, float]) -> str:
    """The 95 % interval of a number in report.json, for example "[1.2, 3.4]"."""
    return f"[{_number(n['ci_low'])}, {_number(n['ci_high'])}]"


# ---------------------------------------------------------------------------------------------------------------------
# Sections of the page


def plot_by_timestep(rows: Sequence[Mapping[str, float]]) -> bytes | None:
    """PNG of the loss over the timestep, or None if the rows of metrics.jsonl hold none.

    Training loss of the last epoch, and validation loss of up to five epochs, the earlier the fainter.
    """
    from matplotlib.figure import Figure

    # Not every row has these losses; those of the VAE never do.
    named = [r for r in rows if any(k.startswith(BY_TIMESTEP) for k in r)]
    if not named:
        return None
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    ax = figure.add_subplot()
    for kind, colour in (("train", "tab:blue"), ("val", "tab:orange")):
        epochs = evenly_spaced(len(named), 5) if kind == "val" else [-1]
        shown = [named[i] for i in epochs]
        for n, row in enumerate(shown, 1):
            prefix = f"{BY_TIMESTEP}{kind}/t="
            loss = {int(k.removeprefix(prefix)): v for k, v in row.items() if k.startswith(prefix)}  # by timestep
            label = f"{kind}, epoch {row['epoch']:g}"
            ax.plot([*loss], [*loss.values()], ".-", color=colour, alpha=(n / len(shown)) ** 1.5, label=label)
    # Losses at small and at large timesteps differ by orders of magnitude, hence the logarithmic axis.
    ax.set(xlabel="timestep (0: clean, 999: noise)", ylabel="loss", yscale="log")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def stage(folder: Path, people: bool) -> str:
    """The section about one stage, RUN/vae or RUN/diffusion: numbers, curves, pictures over the epochs, configuration.

    "" if the stage has no numbers yet. Without `people`, no slice of the data and none of the paths on this machine.
    """
    # read the numbers and the weights' header
    rows = read_jsonl(folder / "metrics.jsonl")
    if not rows:
        return ""
    last = rows[-1]
    # While the training runs there is no final.safetensors yet.
    files = [folder / f"{name}.safetensors" for name in ("final", "best")]
    meta = next((read_meta(f) for f in files if f.exists()), {})

    # the table: where the training stands, its best epoch, its speed, what it ran on
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

    # curves
    curves = folder / "curves.png"
    if curves.exists():
        text.append(picture(curves.read_bytes(), f"Curves of the {STAGES[folder.name]} over the epochs", kind="plot"))
    if by_timestep := plot_by_timestep(rows):
        text.append(picture(by_timestep, "Loss by timestep", kind="plot"))

    # pictures over the epochs: U-Net and students show only generated slices, all others those of people, too
    frames = [p for p in sorted(folder.glob("frames/*.png")) if p.stem.isdecimal()]
    shown = {
        "vae": "Slices, their reconstructions, and the error", "diffusion": "The same seeds",
        "texture": "Slices, their reconstructions, and those with texture",
    }  # fmt: skip
    student = "teacher" in meta
    if frames and (people or student or folder.name == "diffusion"):
        words = "The same seeds by the teacher, above, and by the student" if student else shown[folder.name]
        text.append(slider(frames, words))
    if (strip := folder / "denoising.png").exists():
        text.append(picture(strip.read_bytes(), "Denoising: x_t above, the estimate of the clean image below"))

    # configuration; for a page to publish without paths, which can name people or projects
    if meta.get("config"):
        settings = {k: v for k, v in meta["config"].items() if people or k not in ("data", "cache", "checkpoints")}
        config = html.escape(json.dumps(settings, indent=1))
        text.append(f"<details><summary>Configuration</summary><pre>{config}</pre></details>")
    return f"<h2>{STAGES[folder.name]}</h2>" + "\n".join(text)


def evidence(folder: Path) -> str:
    """The section about what evaluate.py and tsne.py found in this run's folder. "" if neither was run."""
    # numbers: {section: {metric: {value, floor, ci_low, ci_high, n}}}; the damaged controls are left out
    text, file = [], folder / "report" / "report.json"
    found = json.loads(file.read_bytes()) if file.exists() else {}
    rows = {
        f"{name}, {space}".replace("_", " "): (n["value"], n.get("floor", ""), _interval(n))
        for space, numbers in found.items()
        if isinstance(numbers, dict) and not space.endswith(("_blurred", "_noised", "_shuffled"))
        for name, n in numbers.items()
        if isinstance(n, dict) and isinstance(n.get("value"), float) and "ci_low" in n
    }
    if rows:
        text.append(
            "<p>The floor is the same number with people who were held out (<code>report/report.md</code>).</p>"
        )
        text.append(table(rows, ["", "generated", "floor", "interval"]))
    # pictures
    shown = {"generated": "Generated slices", "spectrum": "Power spectrum", "anatomy": "Anatomy"}
    shown |= {"memorisation": "Distances to the closest training slice"}
    for name, what in shown.items():
        if (path := folder / "report" / f"{name}.png").exists():
            text.append(picture(path.read_bytes(), what, kind="plot" if name != "generated" else ""))
    if (path := folder / "tsne" / "tsne.png").exists():
        text.append(picture(path.read_bytes(), "t-SNE of the latents", kind="plot"))
    return "<h2>Evidence</h2>" + "\n".join(text) if text else ""


# ---------------------------------------------------------------------------------------------------------------------
# The page


def write_report(home: Path, people: bool = True, out: Path | None = None) -> Path | None:
    """Write the page of the run in folder `home` and return its path; None if the run has no numbers yet.

    people: show slices of the data, which are of people. Without, the page can be shared, and its default name is
    report-without-people.html instead of report.html.
    """
    # the sections; the page needs at least one stage
    stages = [stage(home / name, people) for name in STAGES]
    if not any(stages):
        return None
    # a note at the top says whether the page may be shared
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
    # Another default name: a training rewrites report.html with slices of people, and must not overwrite this one.
    out = out or home / ("report.html" if people else "report-without-people.html")
    write_atomic(out, page.encode("utf-8", "replace"))  # a file name that is not UTF-8 shows a "?"
    return out


def refresh_report(home: Path) -> None:
    """Write the page from within a training. Whatever goes wrong is printed and does not end the training."""
    try:
        write_report(home)
    except Exception as e:  # for example a damaged report.json or picture
        print(f"{home / 'report.html'} was not updated ({type(e).__name__}: {e})", file=sys.stderr)


def main(cfg: ReportConfig) -> None:
    """Write the page and print its path. UserError if there is no such run, or if it has no numbers yet."""
    home = Path(cfg.checkpoints) / cfg.run
    if not home.is_dir():
        raise UserError(f"there is no run {home}: name one with --run")
    path = write_report(home, cfg.training_pictures, Path(cfg.out) if cfg.out else None)
    if path is None:
        raise UserError(f"{home} has no numbers yet (vae/metrics.jsonl, diffusion/metrics.jsonl): train it first")
    print(path)


if __name__ == "__main__":
    run_script(main, cfg)
