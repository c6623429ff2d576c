"""Make a run into weights to be published: python benchmarks/ship.py --run NAME --out checkpoints/pretrained ...

Writes the best weights of all stages in half precision, or with --bits 8 in half of that, and README.md, the model
card: what it was trained on, how, and every number of the run's report (evaluate.py comes first). People's slices are
not in any of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import ABOUT, rows_of  # noqa: E402
from sampling import load_run  # noqa: E402
from utils import UserError, read_jsonl, run_script  # noqa: E402
from vae import load_vae  # noqa: E402
from weights import read_meta, save_weights, write_atomic  # noqa: E402

HEAD = [["", "value", "95 % interval", "floor", "n"], ["---"] * 5]
LIMITS = """
Images are synthetic and can show anatomy that no one has. A copy rate cannot show that nothing of a person is left in
an image, or in weights. Slices are of one orientation and one range of heights, skull-stripped."""


@dataclass(frozen=True)
class ShipConfig:
    """Publish the weights of a run."""

    run: str
    """Run in CHECKPOINTS, trained and evaluated."""
    out: str
    """Folder to write to."""
    data: str
    """What the training data are, where they come from, and their licence: a sentence for the model card."""
    commands: tuple[str, ...] = ()
    """The commands that made the run, for the model card."""
    notes: str = ""
    """Limits of these weights beyond those of all."""
    weights: str = "best"
    """best or final weights of the U-Net."""
    bits: Literal[8, 16] = 16
    """Bits of a weight of U-Net and texture; the VAE's keep 16, because a run's latents must stay the same."""
    checkpoints: str = "checkpoints"
    """Folder of all runs."""


def training(folder: Path, batch: int) -> str:
    """Steps and minutes of a stage, from its log; the VAE of a student has none."""
    if not (folder / "metrics.jsonl").exists():
        return "that of its teacher"
    rows, steps = read_jsonl(folder / "metrics.jsonl"), [0]
    steps += [r["step"] for r in rows]
    seconds = sum((b - a) * batch / r["images per s"] for a, b, r in zip(steps, steps[1:], rows))
    return f"{steps[-1]:,} steps of {batch} images, {rows[-1]['epoch']:.0f} epochs, {seconds / 60:.0f} minutes"


def main(cfg: ShipConfig) -> None:
    home, out = Path(cfg.checkpoints) / cfg.run, Path(cfg.out)
    if not (home / "report" / "report.json").exists():
        raise UserError(f"{home / 'report'} has no report: python evaluate.py --run {cfg.run} comes first")
    model, vae, meta, _ = load_run(home, cfg.weights, torch.device("cpu"))
    _, vae_meta = load_vae(home / "vae" / "best.safetensors", torch.device("cpu"))
    texture, vae.texture = vae.texture, None
    texture_meta = read_meta(home / "texture" / "best.safetensors") if texture is not None else {"config": {}}
    for p in (p for m in (model, vae, texture) if m is not None for p in m.parameters()):  # buffers stay as they are
        p.data = p.data.half()
    for m in (vae_meta, meta, texture_meta):  # folders are nobody's business
        m["config"] |= {"data": Path(m["config"].get("data", "")).name, "cache": "cache", "checkpoints": "checkpoints"}
    save_weights(out / "vae" / "best.safetensors", vae, vae_meta)
    meta = {**meta, "vae": vae.latent_hash()}
    save_weights(out / "diffusion" / "best.safetensors", model, meta, cfg.bits)
    if texture is not None:
        save_weights(out / "texture" / "best.safetensors", texture, texture_meta, cfg.bits)

    size = sum(p.stat().st_size for p in out.glob("*/best.safetensors")) / 1e6
    counts = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (vae, model, texture) if m is not None]
    own, reconstruction, side = meta["scheduler"], vae_meta["metrics"], vae.config["image_size"]
    steps = "" if own["grid"] == "full" else f" of {own['num_steps']} steps"
    times = [training(home / k, m["config"]["batch_size"]) for k, m in (("vae", vae_meta), ("diffusion", meta))]
    about_texture = []
    if texture is not None:
        took = training(home / "texture", texture_meta["config"]["batch_size"])
        name, against = "high frequencies, dB/val", "on people never trained on"
        if "teacher" in texture_meta:
            name, against = "high frequencies against the teacher, dB/val", "distilled, and against its teacher"
        about_texture.append(
            f"| texture | {counts[2]:.1f} M parameters, {texture.config['num_steps']} steps; {took}; {against} "
            f"{texture_meta['metrics'][name]:.1f} dB in the upper half of the frequencies |"
        )
    report = json.loads((home / "report" / "report.json").read_text())
    lines = [
        "# Model card", "",
        "Generates synthetic axial brain slices. **Not for diagnosis**, nor for any decision about a person.", "",
        "| | |", "|---|---|",
        f"| trained on | {cfg.data} {meta['data']} |",
        f"| VAE | {counts[0]:.1f} M parameters, {side}x{side} pixels to latents "
        f"{'x'.join(map(str, vae.latent_shape))}; {times[0]} |",
        "| reconstruction of people never trained on | "
        f"PSNR {reconstruction['PSNR/val']:.2f} dB, SSIM {reconstruction['SSIM/val']:.4f} |",
        f"| U-Net | {counts[1]:.1f} M parameters, {meta['prediction']}-prediction on the {own['grid']} grid{steps}; "
        f"{times[1]}; the weights are of epoch {meta['epoch']} |",
        *about_texture,
        f"| classes | {', '.join(meta['classes'])} |",
        f"| conditioned on | {'; '.join(map(str, model.attributes)) or 'nothing'} |",
        f"| hardware | {meta['hardware']} |",
        f"| code | {meta['commit']} |",
        f"| files | safetensors, {'half precision' if cfg.bits == 16 else 'VAE half precision, the rest 8 bits'}, "
        f"{size:.1f} MB |", "",
        *(["Made by", "", *(f"    {c}" for c in cfg.commands), ""] if cfg.commands else []),
        "## Numbers", "",
        "`python evaluate.py` on images of these weights. The floor is the "
        "same number with people held out in the place of generated images. More: docs/evaluation.md.",
    ]  # fmt: skip
    for section, rows in rows_of(report).items():
        lines += ["", f"**{section}.** {ABOUT.get(section, '')}".replace("\n", " "), ""]
        lines += ["| " + " | ".join(row[:5]) + " |" for row in HEAD + rows]
    lines += ["", "## Limits", "", cfg.notes, LIMITS]
    write_atomic(out / "README.md", "\n".join(lines).encode())
    print(f"{out}: {size:.1f} MB")


if __name__ == "__main__":
    run_script(main, tyro.cli(ShipConfig, description=__doc__))
