"""Map the latents by t-SNE: python tsne.py --run NAME --data DIR writes CHECKPOINTS/NAME/tsne/tsne.png and tsne.json.

The map shows real latents (posterior means) by class, and generated ones over them. tsne.json says how well the nearest
neighbours among other people tell the classes apart.
"""

from __future__ import annotations

from config import PredictConfig, TsneConfig, parse

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

from conditions import GROUP, Attribute, category, draw_rows, in_words, learn_attribute
from dataset import load_splits_as_trained, read_images
from device import eval_mode, pick_device
from metrics import TooFew, auc_between_people, interval, resample_people
from modules import load_diffusion
from pictures import in_font
from report import refresh_report
from runlog import RunLog
from sampling import belongs_to, plan_sampling
from utils import UserError, progress_bar, run_script
from vae import load_vae
from weights import write_atomic

Points = tuple[np.ndarray, np.ndarray]  # where they are [N, 2], and codes of what they are coloured by [N]


def draw_map(real: Points, generated: Points | None, colour: Attribute, title: str) -> bytes:
    """Plot real latents as dots and generated ones as crosses: a PNG. Black is unknown.

    A colour for each value of a category, and a scale of colours for a number.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 6), layout="constrained")
    ax = figure.add_subplot()
    dots: dict[str, Any] = {"s": 9, "alpha": 0.55, "lw": 0}
    crosses: dict[str, Any] = {"s": 60, "marker": "X", "edgecolors": "white", "linewidths": 0.9}
    for what, points, style in (("real", real, dots), ("generated", generated, crosses)):
        if points is None:
            continue
        (xy, codes), colours = points, ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
        # The six are distinct for the colour-blind.
        groups = [(i, name, colours[i % 6]) for i, name in enumerate(colour.values)] + [(np.nan, "unknown", "black")]
        for code, name, own in groups:
            here = np.isnan(codes) if np.isnan(code) else codes == code
            if here.any():
                label = in_font(f"{what} {name} ({here.sum():,})")
                ax.scatter(xy[here, 0], xy[here, 1], color=own, label=label, **style)
        if not colour.values:
            low, high = colour.quantiles[0], colour.quantiles[-1]
            values, known = colour.middle + codes * colour.half, ~np.isnan(codes)
            label = f"{what} ({known.sum():,})"
            shown = ax.scatter(
                xy[known, 0], xy[known, 1], c=values[known], vmin=low, vmax=high, cmap="viridis", label=label, **style
            )
            if what == "real":
                unit = f" ({colour.unit})" * bool(colour.unit)
                figure.colorbar(shown, ax=ax, shrink=0.7, label=in_font(f"{colour.name}{unit}"))
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
    latents = torch.cat(parts).numpy()
    people = [data.people[i] for i in chosen]

    # What the points are coloured by. One class alone is one colour.
    name = cfg.colour.lower()
    texts = data.class_names() if name == GROUP else data.column(name)
    colour = category(GROUP, texts) if name == GROUP else learn_attribute(name, texts, flag="--colour")
    codes = colour.encode_all(texts)[chosen]

    # Generated latents: those of a folder of images, or 128 of the run's U-Net, groups in turn.
    generated, of = None, np.zeros(0)
    unet_file = run / "diffusion" / "best.safetensors"
    if cfg.generated:
        images, problems = read_images(Path(cfg.generated))
        of = colour.encode_all(images.column(name))
        print(*problems, sep="\n", end="\n" * bool(problems))
        generated = torch.cat([vae.embed(part[:, None].float() / 255) for part in images.images.split(32)]).numpy()
    elif unet_file.exists():
        model, meta = load_diffusion(unet_file, device)
        if belongs_to(model, meta, vae, vae_file):
            rows = draw_rows(model.attributes, {}, cfg.seed, range(128))
            words = [
                dict(zip((a.name for a in model.attributes), in_words(model.attributes, r))) for r in rows.tolist()
            ]
            of = colour.encode_all([known.get(name, "") for known in words])
            how = plan_sampling(PredictConfig(run=cfg.run), model)
            parts = torch.arange(128).split(32)
            z = [model.generate(vae.latent_shape, cfg.seed, k.tolist(), rows[k], **how) for k in parts]
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
    if len(colour.values) > 1:
        known = ~np.isnan(codes)
        points, labels = torch.from_numpy(pca.transform(latents[known])).double(), torch.from_numpy(codes[known]).long()
        those = [person for person, k in zip(people, known) if k]
        weights = resample_people(those, 200, cfg.seed)
        try:
            auc, low, high = interval(auc_between_people(points, labels, those, weights), 0, 1)
        except TooFew as e:
            raise UserError(f"{cfg.data} cannot be mapped by {cfg.colour}: {e}") from None
        result["separation"] = {"knn_auc": auc, "ci_low": low, "ci_high": high, "people": len(set(those))}
        title += (
            f"\n{' / '.join(colour.values)} by the nearest neighbours among other people:\n"
            f"AUC {auc:.2f} [{low:.2f}, {high:.2f}] (chance 0.5)"
        )

    # Write the map and the numbers, and log them.
    made = None if generated_map is None else (generated_map, of)
    out = Path(cfg.out) if cfg.out else run / "tsne"
    write_atomic(out / "tsne.png", draw_map((np.asarray(real_map), codes), made, colour, title))
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
