"""Are edits true? Phantoms know: the same person drawn with another age, group or sex, beside what edit.py makes of it.

    python benchmarks/counterfactual.py --run pretrained/phantoms [--people 60]

The people are drawn from another seed than any that was trained on. Prints the numbers of docs/results.md, and writes
counterfactual.png: slices, what edit.py makes of them, and what is true.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import anatomy  # noqa: E402
import phantom  # noqa: E402
from conditions import encode_rows  # noqa: E402
from dataset import to_float  # noqa: E402
from device import pick_device  # noqa: E402
from metrics import psnr, unit  # noqa: E402
from pictures import difference_map, table_of_images, to_uint8  # noqa: E402
from sampling import edit_latents, load_run, plan_inversion  # noqa: E402

LEVELS = (0.2, 0.4, 0.6)


@dataclass(frozen=True)
class Config:
    """How well edits of phantoms agree with the phantoms drawn so."""

    run: str = "pretrained/phantoms"
    checkpoints: str = "checkpoints"
    people: int = 60
    seed: int = 1001
    """Of the people; the data sets of training take seed 0."""
    guidance: float = 1.0
    num_steps: int = 50
    device: str = "auto"
    out: str = "counterfactual.png"


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """SSIM of every pixel of two uint8 images (Wang et al. 2004, Gaussian window of sigma 1.5), float [H, W]."""
    import cv2

    def mean(x: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(x, (11, 11), 1.5)

    a, b = a.astype(np.float64), b.astype(np.float64)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))


def main(cfg: Config) -> None:
    device = pick_device(cfg.device)
    model, vae, _, _ = load_run(Path(cfg.checkpoints) / cfg.run, "best", device)
    timesteps, side = plan_inversion(model, cfg.num_steps, cfg.run), vae.config["image_size"]
    rng, shown = np.random.default_rng(cfg.seed), []
    # What each kind of edit sets: to another age and group at random, the other sex, and what is true already.
    kinds = {"age and group": [], "sex": [], "nothing": []}
    quality = []
    for index in range(cfg.people):
        person = phantom._Person(cfg.seed, index)
        own = {"group": person.name, "age": person.age, "sex": person.sex}
        others = {
            "age and group": own
            | {"age": round(rng.uniform(*phantom.AGES), 1), "group": str(rng.choice(["AD", "NC"]))},
            "sex": own | {"sex": "F" if person.sex == "M" else "M"},
            "nothing": own,
        }
        _, before, truth = phantom.draw_person(cfg.seed, index, size=side, levels=LEVELS, **own)

        def rows(values: dict) -> torch.Tensor:
            columns = {name: [f"{value}"] * len(LEVELS) for name, value in values.items()}
            columns["level"] = [f"{level}" for level in LEVELS]
            return encode_rows(model.attributes, columns, len(LEVELS)).to(device)

        x = to_float(torch.from_numpy(before)).to(device)
        with torch.no_grad():
            z = vae.encode(x)[0]
            decoded = vae.decode(z)
        for kind, values in others.items():
            same, after = edit_latents(model, vae, z, rows(own), rows(values), timesteps, cfg.guidance)
            if kind == "nothing":
                quality.append([psnr(unit(v), unit(x)).mean().item() for v in (same, decoded)])
            same8, after8 = to_uint8(same), to_uint8(after)
            _, true8, changed = phantom.draw_person(cfg.seed, index, size=side, levels=LEVELS, **values)
            measured = [anatomy.measure(v) for v in (same8, after8)]
            for i in range(len(LEVELS)):
                stays = np.abs(true8[i].astype(int) - before[i]) <= 8
                kinds[kind].append({
                    "ventricle_fraction": (measured[1]["ventricle_fraction"] - measured[0]["ventricle_fraction"])[i],
                    "brain_area": (measured[1]["brain_area"] - measured[0]["brain_area"])[i],
                    "true ventricle_fraction": changed[i]["ventricle_fraction"] - truth[i]["ventricle_fraction"],
                    "true brain_area": (changed[i]["brain_area"] - truth[i]["brain_area"]) / side**2,
                    "ssim where nothing changes": ssim_map(same8[i], after8[i])[stays].mean(),
                    "change": np.abs(after8[i].astype(int) - same8[i]).mean(),
                })  # fmt: skip
            if kind == "age and group" and index < 6:
                named = f"{values['group']}, {values['age']:g}"
                shown.append((f"{person.name}, {person.age:g} to\n{named}", before[1], same8[1], after8[1], true8[1]))
    # The numbers
    print(f"run {cfg.run}: {cfg.people} people, {len(timesteps)} steps, guidance {cfg.guidance:g}")
    trip, alone = np.mean(quality, 0)
    print(f"round trip {trip:.2f} dB, the VAE alone {alone:.2f} dB")
    for kind, measure in (("age and group", "ventricle_fraction"), ("sex", "brain_area")):
        got, true = (np.array([r[k] for r in kinds[kind]]) for k in (measure, f"true {measure}"))
        slope, r = (got @ true) / (true @ true), np.corrcoef(got, true)[0, 1]
        print(f"{kind}: change of {measure} against the true one: correlation {r:.3f}, slope {slope:.3f}")
        print(f"  SSIM where nothing changes {np.mean([r['ssim where nothing changes'] for r in kinds[kind]]):.4f}")
    nothing, something = (np.mean([r["change"] for r in kinds[k]]) for k in ("nothing", "age and group"))
    print(f"an edit to the same values changes {nothing / something:.2%} of what another changes")
    rows_of = {name: [s[i] for s in shown] for i, name in ((1, "before"), (3, "edited"), (4, "true"))}
    rows_of["edited:\nchange"] = [difference_map(s[3].astype(int) - s[2]) for s in shown]
    rows_of["true:\nchange"] = [difference_map(s[4].astype(int) - s[1]) for s in shown]
    table_of_images(
        Path(cfg.out), rows_of, [s[0] for s in shown], "Phantoms with another age and group: edited, and drawn so"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
