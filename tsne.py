"""Map the latents by t-SNE: python tsne.py --run NAME --data DIR writes CHECKPOINTS/NAME/tsne/tsne.png and tsne.json.

The map shows real latents (posterior means) by class, and generated ones over them. tsne.json says how well the nearest
neighbours among other people tell the classes apart.
"""

from __future__ import annotations

from config import TsneConfig, parse

if __name__ == "__main__":
    cfg = parse(TsneConfig)  # before torch is imported, so that --help answers at once

import io
import json
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conditions import draw_rows
from dataset import load_splits_as_trained, read_images
from device import eval_mode, pick_device
from metrics import TooFew, auc_between_people, interval, resample_people
from modules import load_diffusion
from pictures import in_font
from report import refresh_report
from runlog import RunLog
from sampling import belongs_to, class_names
from utils import UserError, progress_bar, run_script
from vae import load_vae
from weights import write_atomic


def draw_map(
    real: np.ndarray, labels: np.ndarray, generated: np.ndarray | None, of: list[str], classes: list[str], title: str
) -> bytes:
    """Plot real latents as dots and generated ones as crosses, one colour per class: a PNG. Points are [N, 2]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6), layout="constrained")
    ax = figure.add_subplot()
    colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]  # distinct for the colour-blind
    for i, name in enumerate(classes):
        xy, label = real[labels == i], in_font(f"real {name} ({len(real[labels == i]):,})")
        ax.scatter(xy[:, 0], xy[:, 1], s=9, alpha=0.55, lw=0, color=colours[i % 6], label=label)
    if generated is not None:
        for name in sorted(set(of)):
            xy = generated[np.array(of) == name]
            colour = colours[classes.index(name) % 6] if name in classes and len(classes) > 1 else "black"
            ax.scatter(xy[:, 0], xy[:, 1], s=60, marker="X", color=colour, edgecolors="white", linewidths=0.9,
                       label=in_font(f"generated {name} ({len(xy):,})"))  # fmt: skip
    ax.set_title("\n".join(textwrap.fill(line, 80) for line in in_font(title).splitlines()), fontsize=10)
    ax.set_xticks([]), ax.set_yticks([])
    ax.legend(fontsize=8, markerscale=1.2, framealpha=0.9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def main(cfg: TsneConfig) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else its threads burn CPU while they wait for each other
    from openTSNE import TSNE

    device = pick_device(cfg.device)
    run = Path(cfg.checkpoints) / cfg.run
    vae_file = run / "vae" / "best.safetensors"
    vae, meta = load_vae(vae_file, device)
    data = load_splits_as_trained(cfg.data, cfg.cache, meta, vae.config["image_size"])["train"]

    # Encode slices of the training people, at most --max-slices.
    rng = np.random.default_rng(cfg.seed)
    chosen = np.sort(rng.permutation(len(data))[: cfg.max_slices])
    if len(chosen) <= 3 * cfg.perplexity:
        raise UserError(f"{len(chosen)} slices are too few for --perplexity {cfg.perplexity}: take a smaller one")

    parts, bar = [], progress_bar(len(chosen), what="encoding")
    with eval_mode(vae), bar:
        for index in torch.from_numpy(chosen).split(32):
            parts.append(vae.encode(data.batch(index, device))[0].flatten(1).cpu())
            bar.update(len(index))
    latents, labels = torch.cat(parts).numpy(), data.labels[chosen].numpy()
    people = [data.people[i] for i in chosen]

    # Generated latents: those of a folder of images, or 128 of the run's U-Net, classes in turn.
    generated = None
    of: list[str] = []
    unet_file = run / "diffusion" / "best.safetensors"
    if cfg.generated:
        pixels, of, problems = read_images(Path(cfg.generated))
        print(*problems, sep="\n", end="\n" * bool(problems))
        generated = torch.cat([vae.embed(part[:, None].float() / 255) for part in pixels.split(32)]).numpy()
    elif unet_file.exists():
        model, meta = load_diffusion(unet_file, device)
        if belongs_to(model, meta, vae, vae_file):
            rows = draw_rows(model.attributes, {}, cfg.seed, range(128))
            of = class_names(model.attributes, rows, meta["classes"])
            z = [model.generate(vae.latent_shape, cfg.seed, k.tolist(), rows[k]) for k in torch.arange(128).split(32)]
            generated = torch.cat(z).flatten(1).cpu().numpy()
        else:
            print(f"{unet_file} was trained on the latents of another VAE and is left out: run train.py --fresh")

    from sklearn.decomposition import PCA

    # t-SNE on the principal components of the real latents. Generated ones are placed into the finished map (openTSNE's
    # transform) and do not change it, so the real data look the same whatever was generated.
    pca = PCA(min(50, *latents.shape), random_state=cfg.seed).fit(latents)
    real_map = TSNE(perplexity=cfg.perplexity, random_state=cfg.seed, n_jobs=-1).fit(pca.transform(latents))
    generated_map = None if generated is None else np.asarray(real_map.transform(pca.transform(generated)))

    # How well the classes separate, by the neighbours of each slice among other people.
    result: dict[str, Any] = {"slices": len(latents), "generated": 0 if generated is None else len(generated)}
    title = f"t-SNE of {len(latents):,} latents"
    if len(data.classes) > 1:
        points = torch.from_numpy(pca.transform(latents)).double()
        weights = resample_people(people, 200, cfg.seed)
        try:
            auc, low, high = interval(auc_between_people(points, torch.from_numpy(labels), people, weights), 0, 1)
        except TooFew as e:
            raise UserError(f"{cfg.data} cannot be mapped by class: {e}") from None
        result["separation"] = {"knn_auc": auc, "ci_low": low, "ci_high": high, "people": len(set(people))}
        title += (
            f"\n{' / '.join(data.classes)} by the nearest neighbours among other people:\n"
            f"AUC {auc:.2f} [{low:.2f}, {high:.2f}] (chance 0.5)"
        )

    # Write the map and the numbers, and log them.
    out = Path(cfg.out) if cfg.out else run / "tsne"
    write_atomic(out / "tsne.png", draw_map(np.asarray(real_map), labels, generated_map, of, data.classes, title))
    write_atomic(out / "tsne.json", json.dumps(result, indent=1).encode())
    log = RunLog(out, cfg, "tsne")
    log.log(0, {f"separation/{k}": v for k, v in result.get("separation", {}).items()})
    log.picture(0, "t-SNE", out / "tsne.png")
    log.close()
    print(title.replace("\n", "; "))
    refresh_report(Path(cfg.checkpoints) / cfg.run)
    print(f"done: {out / 'tsne.png'}, {out / 'tsne.json'}")


if __name__ == "__main__":
    run_script(main, cfg)
