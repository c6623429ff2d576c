"""OUT/slices.html: one slice of every scan that `dataset.py slice` cut, the most unusual ones first."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pictures import import_cv2
from weights import write_atomic

SIDE = 160  # pixels of a picture
MOST = 2000  # scans on the page: 10 MB
UNUSUAL = 3.5  # deviations from the median, as robust statistics counts them

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; background: #fff }
ul { list-style: none; padding: 0; display: grid; gap: 12px }
ul { grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)) }
li { overflow-wrap: anywhere; font-size: 12px }
li img { width: 160px; height: 160px; display: block; background: #000 }
.unusual { color: #a30000; font-weight: 600 }
td { padding: 2px 12px 2px 0; vertical-align: top }
th { text-align: left }
"""


def deviations(values: Sequence[float]) -> np.ndarray:
    """How many robust standard deviations (1.4826 times the median distance) each value is from the median; NaN: 0."""
    x = np.array(values, dtype=np.float64)
    known = np.isfinite(x)
    if known.sum() < 4:
        return np.zeros(len(x))
    distance = x - np.median(x[known])
    spread = max(1.4826 * np.median(np.abs(distance[known])), 1e-6 * np.abs(x[known]).max(), 1e-12)
    return np.where(known, distance / spread, 0.0)


def number(text: str) -> float:
    return float(text) if text else float("nan")


def judge(rows: Sequence[Any]) -> list[tuple[float, str]]:
    """(how unusual, why) for each row of volumes.csv (`Row` in volumes.py).

    By the brain's volume, the similarity with the template, and the window.
    """
    ends = [r.window.partition(" to ")[::2] for r in rows]
    width = [number(b) - number(a) for a, b in ends]
    columns = {
        "brain of {} ml": (deviations([number(r.brain_ml) for r in rows]), [r.brain_ml for r in rows]),
        "similarity {}": (
            np.minimum(deviations([number(r.similarity) for r in rows]), 0),
            [r.similarity for r in rows],
        ),
        "window {}": (deviations(np.log(np.maximum(width, 1e-12)).tolist()), [r.window for r in rows]),
    }
    found = []
    for i in range(len(rows)):
        score, words = max((abs(float(z[i])), words.format(text[i])) for words, (z, text) in columns.items())
        found.append((score, words if score > UNUSUAL else ""))
    return found


def thumbnail(path: Path) -> str:
    """A small JPEG as a data URL; "" if the file cannot be read."""
    cv2 = import_cv2()
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        return ""
    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode() if done else ""


def write_page(out: Path, rows: Sequence[Any], slices: Mapping[str, Sequence[Path]], ignored: Sequence[str]) -> None:
    """Write OUT/slices.html. `slices`: {scan: its files}; `ignored`: sentences about what was not looked at."""
    good, bad = [r for r in rows if r.slices], [r for r in rows if not r.slices]
    judged = sorted(zip(judge(good), good), key=lambda item: (-(item[0][0] > UNUSUAL) * item[0][0], item[1].source))
    unusual = sum(score > UNUSUAL for (score, _), _ in judged)
    text = html.escape

    # The scans
    items = []
    for (_, why), row in judged[:MOST]:
        files = sorted(slices.get(row.scan, []))
        picture = thumbnail(files[len(files) // 2]) if files else ""
        facts = [f"{row.slices} slices", row.brain_ml and f"brain {row.brain_ml} ml"]
        facts += [row.similarity and f"similarity {row.similarity}", row.note]
        words = f"{text(row.label)}, {text(row.patient)}<br>{text(', '.join(filter(None, facts)))}"
        words += f'<br><span class="unusual">{text(why)}</span>' * bool(why)
        alt = f"middle slice of {text(row.scan)}"
        items.append(f'<li><img src="{picture}" alt="{alt}"><b>{text(row.scan)}</b><br>{words}</li>')
    more = f"<p>{len(judged) - MOST:,} more are not shown.</p>" if len(judged) > MOST else ""

    # What was left out, by reason
    reasons = Counter(r.left_out for r in bad).most_common(100)
    table = "".join(
        f"<tr><td>{n:,}</td><td>{text(why)}</td><td>{text(next(r.source for r in bad if r.left_out == why))}</td></tr>"
        for why, n in reasons
    )
    left_out = (
        f"<table><tr><th>volumes</th><th>why</th><th>for example</th></tr>{table}</table>" if bad else "<p>None.</p>"
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Slices</title><style>{STYLE}</style>'
        f"<h1>{sum(r.slices for r in good):,} slices of {len(good):,} scans</h1>"
        "<p><b>This page shows people.</b> Keep it as carefully as the data. The middle slice of each scan; "
        f"{unusual:,} of them come first because a number of theirs lies far from the others' (volume of the brain, "
        "similarity with the template, window of intensities).</p>"
        f"<ul>{''.join(items)}</ul>{more}<h2>Left out: {len(bad):,} volumes</h2>{left_out}"
        f"<h2>Not looked at</h2><p>{text('; '.join(ignored)) or 'Nothing.'}</p></html>"
    )
    write_atomic(out / "slices.html", page.encode("utf-8", "backslashreplace"))
