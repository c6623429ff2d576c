"""The sections of an evaluation: each looks at the sets of images, and puts numbers beside their floors.

The floor is the same number with people who were held out in the place of the generated images. Intervals (95 %) are by
bootstrap over people. docs/evaluation.md says what each number means and what it cannot see.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import anatomy
import features
import metrics
from metrics import TooFew, interval, resample_people, weighted_mean
from pictures import to_uint8
from utils import generator, progress_bar
from vae import VAE
from weights import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from config import EvaluateConfig

FEWEST = 128  # images behind a covariance of 64 features
RANGES = {"precision": (0, 1), "recall": (0, 1), "coverage": (0, 1), "density": (0, math.inf), "frechet": (0, math.inf)}


@dataclass
class Images:
    """One set of images. A generated image is a person of its own; a class that is not known is -1."""

    pixels: Tensor  # uint8 [N, S, S]
    labels: Tensor  # int64 [N]
    people: np.ndarray  # str [N]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | Tensor) -> Images:
        rows = torch.as_tensor(rows)
        return Images(self.pixels[rows], self.labels[rows], self.people[rows.numpy()])

    def sample(self, n: int, seed: int) -> Images:
        """n of them, or all."""
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:n]))

    def weights(self, cfg: EvaluateConfig, seed: int = 0) -> Tensor:
        """Bootstrap weights over people, [N, 1 + resamples]."""
        return resample_people(self.people, cfg.resamples, cfg.seed + seed)

    def images(self) -> Tensor:
        """float [N, 1, S, S] in [0, 1]."""
        return self.pixels[:, None].float() / 255


@dataclass
class Evidence:
    """Everything the sections look at, and what they found."""

    train: Images
    held_out: Images
    generated: Images
    classes: list[str]
    cfg: EvaluateConfig
    device: torch.device
    out: Path
    vae: VAE | None = None
    latents: Tensor | None = None  # as drawn, [N, C, h, w]
    source: str = ""  # where the generated images come from
    report: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(
        self, section: str, metric: str, values: Tensor | np.ndarray, floor: Tensor | np.ndarray | float, n: int,
        low: float = -math.inf, high: float = math.inf,
    ) -> None:  # fmt: skip
        """A number and its resamples, [1 + resamples], beside its floor; `low` and `high` are the metric's range."""
        value, ci_low, ci_high = interval(values, low, high)
        floor = float(np.asarray(floor).flat[0])
        self.record(section, metric, value, floor, ci_low, ci_high, n)

    def record(
        self, section: str, metric: str, value: float, floor: float, ci_low: float, ci_high: float, n: int
    ) -> None:
        if not all(map(math.isfinite, (value, floor, ci_low, ci_high))):
            return self.notes.append(f"{section}.{metric} is not defined for these images.")
        numbers = {"value": value, "floor": floor, "ci_low": ci_low, "ci_high": ci_high, "n": n}
        self.report.setdefault(section, {})[metric] = {k: round(v, 6) for k, v in numbers.items()}

    def equal(self) -> tuple[Images, Images, Images]:
        """(train, held out, generated), the same number of each: distances depend on it."""
        n = min(len(self.train), len(self.held_out), len(self.generated), self.cfg.count)
        return tuple(s.sample(n, self.cfg.seed + i) for i, s in enumerate((self.train, self.held_out, self.generated)))

    def need(self, metric: str, least: int, *sets: Images) -> None:
        """TooFew where a set is smaller than a metric needs."""
        for s in sets:
            if len(s) < least:
                name = next(n for n in ("train", "held_out", "generated") if getattr(self, n) is s)
                what = {"train": "training", "held_out": "held-out"}.get(name, name)
                raise TooFew(f"{metric} needs at least {least} images of each set, and there are {len(s)} {what} ones")


# ---------------------------------------------------------------------------------------------------------------------
# The sections. Each raises TooFew where it cannot be had; the others still come.


def damaged(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Positive controls, uint8 [N, S, S]: blurred (sigma 1.5 % of the side), noised (sd 0.1), pixels shuffled."""
    from torchvision.transforms.functional import gaussian_blur

    s, g = x.shape[-1], generator(seed, 9)
    sigma = 0.015 * s
    image = x[:, None].float() / 255
    blurred = gaussian_blur(image, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma] * 2)
    noised = image + 0.1 * torch.randn(image.shape, generator=g)
    shuffled = image.flatten(2)[:, :, torch.randperm(s * s, generator=g)].view_as(image)
    made = {"blurred": blurred, "noised": noised, "shuffled": shuffled}
    return {name: (v.clamp(0, 1) * 255).round().to(torch.uint8)[:, 0] for name, v in made.items()}


def distances(e: Evidence) -> None:
    """Distances between sets in three kinds of features; controls are the held-out slices, damaged."""
    train, held_out, generated = e.equal()
    n, side = len(train), min(64, train.pixels.shape[-1] // 16 * 16)
    if n < 20:
        raise TooFew(f"distances between sets need at least 20 images of each set, and there are {n}")
    sets = {"": generated.pixels, **{f"_{k}": v for k, v in damaged(held_out.pixels, e.cfg.seed).items()}}
    everything = [train.pixels, held_out.pixels, *sets.values()]
    kinds = ["random_vgg", "autoencoder"] + ["inception"] * bool(e.cfg.inception_weights)
    steps = 300
    total = len(kinds) * n * len(everything) + 32 * steps
    with progress_bar(total, what="features") as bar:
        for kind in kinds:
            if kind == "random_vgg":
                network, seen_at = features.random_vgg(e.device), side
            elif kind == "autoencoder":
                network, seen_at = features.train_autoencoder(e.train.pixels, side, e.device, steps, bar.update), side
            else:
                network, seen_at = features.inception(e.cfg.inception_weights, e.device), 299
            f = [features.embed(network, pixels, seen_at, e.device, bar.update) for pixels in everything]
            if kind != "inception":  # in units of the training features' own spread; FID is by definition not
                f = [(x - f[0].mean(0)) / f[0].var(0).mean().sqrt() for x in f]
            measure(e, kind, (train, held_out, generated), f[0], f[1], dict(zip(sets, f[2:])))
    if n < FEWEST:
        raise TooFew(f"{kinds[0]}.frechet needs at least {FEWEST} images of each set, and there are {n}")


def measure(
    e: Evidence,
    kind: str,
    sets: tuple[Images, Images, Images],
    real: Tensor,
    held_out: Tensor,
    fakes: dict[str, Tensor],
) -> None:
    """Every distance of `fakes` from the training features, and of the held-out ones: the floor."""
    train, others, generated = sets
    n, cfg = len(train), e.cfg
    # A resample of Inception's 2048 features takes seconds where one of 64 takes milliseconds.
    take = slice(None, 1 + (cfg.resamples if real.shape[1] <= 64 else min(20, cfg.resamples)))
    wt, wo, wg = (s.weights(cfg, i)[:, take] for i, s in enumerate(sets))

    def numbers(fake: Tensor, people: np.ndarray, w: Tensor) -> dict[str, Tensor]:
        found = {}
        if n >= FEWEST:
            found["frechet"] = metrics.frechet(real, fake, wt, w)
        found["kernel"] = metrics.kernel_distance(real, fake, wt, w)
        return found | metrics.precision_recall(real, fake, train.people, people, wt, w)

    floor = numbers(held_out, others.people, wo)
    for name, fake in fakes.items():
        people, w = (others.people, wo) if name else (generated.people, wg)
        for metric, values in numbers(fake, people, w).items():
            e.put(kind + name, metric, values, floor[metric], n, *RANGES.get(metric, (-math.inf, math.inf)))


def strangers(s: Images, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Up to n disjoint pairs of images of different people, each float [n, 1, S, S] in [0, 1]."""
    order = np.random.default_rng(seed).permutation(len(s))
    a, b = order[: len(order) // 2], order[len(order) // 2 : len(order) // 2 * 2]
    ok = s.people[a] != s.people[b]
    return s.take(a[ok][:n]).images(), s.take(b[ok][:n]).images()


def diversity(e: Evidence) -> None:
    """Are generated images as unlike one another as people are; and PSNR/SSIM against unrelated real slices."""
    if e.train.pixels.shape[-1] < 48:
        raise TooFew(f"diversity.ms_ssim needs images of at least 48 pixels, and these have {e.train.pixels.shape[-1]}")
    e.need("diversity.ms_ssim", 20, e.train, e.generated)
    made, real = (strangers(s, 250, e.cfg.seed + i) for i, s in enumerate((e.generated, e.train)))
    found = []
    with progress_bar(len(made[0]) + len(real[0]), what="MS-SSIM") as bar:
        for a, b in (made, real):
            parts = []
            for x, y in zip(a.split(50), b.split(50)):
                parts.append(metrics.ms_ssim(x, y))
                bar.update(len(x))
            found.append(torch.cat(parts))

    def resampled(x: Tensor) -> Tensor:
        return weighted_mean(x, resample_people(range(len(x)), e.cfg.resamples, e.cfg.seed))

    e.put("diversity", "ms_ssim", resampled(found[0]), found[1].mean(), len(found[0]), 0, 1)
    n = min(250, len(e.generated), len(e.train), len(e.held_out))
    fake, real, others = (s.sample(n, e.cfg.seed + 5).images() for s in (e.generated, e.train, e.held_out))
    shuffle = torch.randperm(n, generator=generator(e.cfg.seed, 10))
    for name, f in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
        e.put("unpaired", name, resampled(f(fake, others[shuffle])), f(real, others[shuffle]).mean(), n)


def spectrum(e: Evidence) -> None:
    """Power at each spatial frequency."""
    sets = e.equal()
    n, cycles = len(sets[0]), sets[0].pixels.shape[-1] // 2 - 1
    power = [torch.cat([metrics.power_spectrum(x) for x in metrics.batches(s.pixels)]) for s in sets]
    weights = [s.weights(e.cfg, i) for i, s in enumerate(sets)]
    mean = [10 * (p.T @ w) / w.sum(0) for p, w in zip(power, weights)]  # dB, [frequencies, R]
    away = [m - mean[0] for m in mean]
    high = slice(cycles // 2, None)
    e.put("spectrum", "distance_db", away[2].abs().mean(0), away[1].abs().mean(0), n, 0)
    e.put("spectrum", "high_frequencies_db", away[2][high].mean(0), away[1][high].mean(0), n)
    draw_spectrum(e.out / "spectrum.png", [m.numpy() for m in mean])


def tell_apart(a: Images, b: Images, e: Evidence, bar: Callable[[int], object]) -> tuple[Tensor, Tensor]:
    """(accuracy, AUC), each [R], of a CNN that tells set b from a, on people and samples it was not trained on.

    Two CNNs, each trained on one half of the people of both sets and scored on the others. Split by slice, it would
    recognise people, and tell real from real.
    """
    both = Images(
        torch.cat([a.pixels, b.pixels]), torch.cat([torch.zeros(len(a)), torch.ones(len(b))]).long(),
        np.concatenate([np.char.add("a", a.people), np.char.add("b", b.people)]),
    )  # fmt: skip
    weights = torch.cat([a.weights(e.cfg, 0), b.weights(e.cfg, 1)])
    half = np.zeros(len(both), dtype=int)
    for side in "ab":
        names = np.array(sorted({p for p in both.people.tolist() if p[0] == side}))
        if len(names) < 4:
            raise TooFew(f"the two-sample test needs at least 4 people in each set, and one set has {len(names)}")
        odd = np.random.default_rng(e.cfg.seed).permutation(names)[::2]
        half[np.isin(both.people, odd)] = 1
    accuracy, auc = [], []
    for fold in (0, 1):
        fit, test = both.take(np.flatnonzero(half == fold)), torch.from_numpy(np.flatnonzero(half != fold))
        judge = features.train_classifier(fit.pixels, fit.labels, 2, e.cfg.seed, e.device, 150, bar)
        p, y, w = judge(both.pixels[test]), both.labels[test], weights[test]
        right = ((p[:, 1] > 0.5).long() == y).double()
        accuracy.append((weighted_mean(right[y == 0], w[y == 0]) + weighted_mean(right[y == 1], w[y == 1])) / 2)
        auc.append(metrics.auc(p, y, w))
    return sum(accuracy) / 2, sum(auc) / 2


def two_sample(e: Evidence) -> None:
    """Can a small CNN tell generated from real? 0.5 is indistinguishable."""
    train, held_out, generated = e.equal()
    if len(train) < 40:
        raise TooFew(f"two_sample needs at least 40 images of each set, and there are {len(train)}")
    with progress_bar(4 * 150 * 32, what="two-sample test") as bar:
        floor = tell_apart(train, held_out, e, bar.update)
        found = tell_apart(train, generated, e, bar.update)
    for name, values, of in zip(("accuracy", "auc"), found, floor):
        e.put("two_sample", name, values, of, len(generated), 0, 1)


def anatomical(e: Evidence) -> None:
    """Areas, contrast and symmetry as distributions: all images, and class by class."""
    from scipy.stats import wasserstein_distance

    sets = [s.sample(e.cfg.count, e.cfg.seed + i) for i, s in enumerate((e.train, e.held_out, e.generated))]
    e.need("anatomy", 20, e.train, e.held_out, e.generated)
    with progress_bar(sum(map(len, sets)), what="anatomy") as bar:
        found = [anatomy.measure(s.pixels.numpy(), bar.update) for s in sets]
    weights = [s.weights(e.cfg, i).numpy() for i, s in enumerate(sets)]
    groups = {"anatomy": -1}
    if len(e.classes) > 1:
        groups |= {f"anatomy_{name}": c for c, name in enumerate(e.classes)}
    for section, c in groups.items():
        rows = [np.flatnonzero((s.labels.numpy() == c) | (c < 0)) for s in sets]
        if min(map(len, rows)) < 10:
            continue
        for name in anatomy.MEASURES:
            (xt, wt), (xh, wh), (xg, wg) = ((f[name][r], w[r]) for f, r, w in zip(found, rows, weights))
            n = len(xg)
            e.put(section, f"{name}_d", anatomy.cohens_d(xg, xt, wg, wt), anatomy.cohens_d(xh, xt, wh, wt), n)
            emd = [
                [wasserstein_distance(x, xt, w[:, r], wt[:, r]) / xt.std() for r in range(w.shape[1])]
                for x, w in ((xg, wg), (xh, wh))
            ]
            e.put(section, f"{name}_emd", np.array(emd[0]), np.array(emd[1]), n, 0)
    if len(e.classes) > 1 and (sets[2].labels >= 0).any():
        first, last = 0, len(e.classes) - 1
        for name in anatomy.MEASURES:
            d = []
            for s, f, w in zip(sets, found, weights):
                a, b = (np.flatnonzero(s.labels.numpy() == c) for c in (first, last))
                d.append(anatomy.cohens_d(f[name][a], f[name][b], w[a], w[b]) if min(len(a), len(b)) > 9 else None)
            if d[2] is not None and d[0] is not None:
                e.put("class_difference", f"{name}_d", d[2], d[0], len(sets[2]))
    draw_anatomy(e.out / "anatomy.png", e.classes, sets, found)


def class_fidelity(e: Evidence) -> None:
    """Of what use the generated images are: a CNN trained on real, generated, or both tells classes of real people."""
    if len(e.classes) == 1:
        return
    labels = e.generated.labels
    if (labels < 0).all():
        e.notes.append("The generated images have no classes: class fidelity was not measured.")
        return
    for c, name in enumerate(e.classes):
        if (labels == c).sum() < 20:
            raise TooFew(
                f"class_fidelity needs at least 20 images of class {name}, and {(labels == c).sum()} are generated"
            )
        if len(set(e.held_out.people[(e.held_out.labels == c).numpy()])) < 2:
            raise TooFew(f"class_fidelity needs two held-out people of class {name}")
    known = e.generated.take(torch.nonzero(labels >= 0)[:, 0])
    both = [torch.cat(pair) for pair in ((e.train.pixels, known.pixels), (e.train.labels, known.labels))]
    weights = e.held_out.weights(e.cfg)
    seeds, steps, found = 3, 150, {}
    with progress_bar(3 * seeds * steps * 32, what="class fidelity") as bar:
        for name, pixels, y in (
            ("train_on_real", e.train.pixels, e.train.labels), ("train_on_generated", known.pixels, known.labels),
            ("train_on_both", *both),
        ):  # fmt: skip
            judges = [
                features.train_classifier(pixels, y, len(e.classes), e.cfg.seed + s, e.device, steps, bar.update)
                for s in range(seeds)
            ]
            found[name] = metrics.auc(sum(j(e.held_out.pixels) for j in judges), e.held_out.labels, weights)
            if name == "train_on_real":  # do generated images show to it what their label says?
                p = sum(j(known.pixels) for j in judges)
                found["real_to_generated"] = metrics.auc(p, known.labels, known.weights(e.cfg))
    for name, values in found.items():
        e.put("class_fidelity", name, values, found["train_on_real"], len(known), 0, 1)


def memorisation(e: Evidence) -> None:
    """Nearest training slice of each generated image, compared with how near people held out come."""
    from scipy.stats import binomtest

    total = len(e.train) + len(e.held_out) + len(e.generated)
    with progress_bar(total, what="looking for copies") as bar:
        encode = None if e.vae is None else e.vae.embed
        detector = metrics.CopyDetector(e.train.pixels, e.held_out.pixels, encode, on_batch=bar.update)
        found, index = detector.distances(e.generated.pixels)
    others, cfg, n = detector.held_out, e.cfg, len(e.generated)
    w = e.held_out.weights(cfg)

    def copies(d: dict[str, Tensor], at: dict[str, float]) -> float:
        return metrics.is_copy({k: v / at[k] for k, v in d.items()}).double().mean().item()

    def quantile(d: Tensor, weight: Tensor) -> float:
        order = d.argsort()
        share = weight[order].cumsum(0) / weight.sum()
        return d[order][min(int(torch.searchsorted(share, detector.quantile)), len(d) - 1)].item()

    # Two kinds of doubt: the threshold hangs on who was held out, the share on how many images were drawn.
    rates = [copies(found, {k: quantile(d, w[:, r]) for k, d in others.items()}) for r in range(1, w.shape[1])]
    low, high = (binomtest(round(q * n), n).proportion_ci() for q in np.quantile(rates, [0.025, 0.975]))
    # Floor: each person held out, by the threshold of the others.
    names, crossed = sorted(set(e.held_out.people)), 0.0
    for fold in np.array_split(np.random.default_rng(cfg.seed).permutation(names), min(10, len(names))):
        mine = torch.from_numpy(np.isin(e.held_out.people, fold))
        at = {k: d[~mine].quantile(detector.quantile).item() for k, d in others.items()}
        crossed += copies({k: d[mine] for k, d in others.items()}, at) * mine.double().mean().item()
    rate, floor = metrics.is_copy(found).double().mean().item(), crossed
    e.record("memorisation", "copy_rate", rate, floor, min(low.low, rate), max(high.high, rate), n)
    # Unsharp images are closer to everything: how much of the copy rate is that?
    if e.vae is not None and e.vae.config["image_size"] == e.train.pixels.shape[-1]:
        with progress_bar(len(e.held_out), what="held out, through the VAE") as bar:
            seen = []
            for x in metrics.batches(e.held_out.pixels):
                seen.append(torch.from_numpy(to_uint8(e.vae.decode(e.vae.encode(2 * x.to(e.device) - 1)[0]))))
                bar.update(len(x))
        seen = torch.cat(seen)
        near = metrics.is_copy(detector.distances(seen)[0]).double()
        e.put("memorisation", "copy_rate_of_reconstructed", weighted_mean(near, w), floor, len(near), 0, 1)
    for name, d in found.items():
        e.put("memorisation", f"{name}_distance", weighted_mean(d, e.generated.weights(cfg)), others[name].mean(), n, 0)
    draw_memorisation(e.out / "memorisation.png", found, others)
    if cfg.training_pictures:
        draw_pairs(e.out / "closest_pairs.png", e, torch.stack(list(found.values())).amin(0), index)


@torch.no_grad()
def latent_spread(e: Evidence) -> None:
    """Standard deviation of the latents as drawn, per channel; training latents have 1. Samplers lose it first."""
    if e.latents is None:
        return
    drawn = torch.stack([e.latents.mean((2, 3)), e.latents.square().mean((2, 3))], 1)  # first two moments [N, 2, C]
    real = []
    for x in metrics.batches(e.held_out.pixels):
        mean, std = e.vae.encode(2 * x.to(e.device) - 1)
        real.append(torch.stack([mean.mean((2, 3)), (mean.square() + std.square()).mean((2, 3))], 1).cpu())
    spread = []
    for moments, s in ((drawn, e.generated), (torch.cat(real), e.held_out)):
        w = s.weights(e.cfg)
        first, second = torch.einsum("nkc,nr->kcr", moments.double(), w) / w.sum(0)
        spread.append((second - first.square()).clamp(min=0).sqrt())
    for c in range(spread[0].shape[0]):
        e.put("latent_spread", f"channel_{c}", spread[0][c], spread[1][c], len(e.generated), 0)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

COLOURS = {"train": "#555555", "held out": "#0072b2", "generated": "#d55e00"}  # told apart by the colour-blind


def figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(fig: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    write_atomic(path, buffer.getvalue())


def draw_spectrum(path: Path, means: Sequence[np.ndarray]) -> None:
    """Mean spectra in dB, [frequencies, 1 + resamples], with their intervals."""
    fig = figure(5, 3.4)
    ax = fig.add_subplot()
    for (name, colour), m in zip(COLOURS.items(), means):
        x, sd = np.arange(1, len(m) + 1), 1.96 * m[:, 1:].std(1)
        ax.plot(x, m[:, 0], label=name, color=colour, lw=1.4)
        ax.fill_between(x, m[:, 0] - sd, m[:, 0] + sd, color=colour, alpha=0.2, lw=0)
    ax.set(xscale="log", xlabel="spatial frequency (cycles per image)", ylabel="power (dB)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    save(fig, path)


def draw_anatomy(path: Path, classes: Sequence[str], sets: Sequence[Images], found: Sequence[dict]) -> None:
    """Histograms, one row per class, one column per measure."""
    known = [c for c in range(len(classes)) if (sets[2].labels == c).sum() > 9]
    rows = known if len(classes) > 1 and known else [-1]
    fig = figure(2.7 * len(anatomy.MEASURES), 2.3 * len(rows))
    for i, c in enumerate(rows):
        for j, (name, title) in enumerate(anatomy.MEASURES.items()):
            ax = fig.add_subplot(len(rows), len(anatomy.MEASURES), 1 + i * len(anatomy.MEASURES) + j)
            bins = np.linspace(*np.quantile(np.concatenate([f[name] for f in found]), [0.002, 0.998]), 30)
            for (label, colour), s, f in zip(COLOURS.items(), sets, found):
                x = f[name][(s.labels.numpy() == c) | (c < 0)]
                ax.hist(x, bins, density=True, histtype="step", color=colour, label=label, lw=1.3)
            ax.set_title(title.replace(", ", ",\n") if i == 0 else "", fontsize=9)
            ax.set_ylabel(classes[c] if c >= 0 and j == 0 else "", fontsize=10)
            ax.set_yticks([])
            ax.tick_params(labelsize=8)
            if i == j == 0:
                ax.legend(fontsize=7, frameon=False)
    save(fig, path)


def draw_memorisation(path: Path, found: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Histograms of the distance to the nearest training slice, in units of the threshold."""
    fig = figure(4.2 * len(found), 3.1)
    for i, name in enumerate(found):
        ax = fig.add_subplot(1, len(found), i + 1)
        bins = np.linspace(0, max(found[name].quantile(0.995), others[name].quantile(0.995)).item() * 1.02, 40)
        for label, d in (("held out", others[name]), ("generated", found[name])):
            ax.hist(d.numpy(), bins, density=True, histtype="stepfilled", alpha=0.45, color=COLOURS[label], label=label)
        ax.axvline(1, color="black", lw=1)
        ax.set(yticks=[], xlabel="distance to the nearest training slice / threshold", title=f"{name} distance")
        ax.legend(frameon=False, fontsize=8)
    save(fig, path)


def draw_pairs(path: Path, e: Evidence, distance: Tensor, index: Tensor) -> None:
    """The eight generated images closest to a training slice, those slices, and the difference."""
    closest = distance.argsort()[:8]
    fig = figure(1.35 * len(closest), 4.5)
    for column, k in enumerate(closest.tolist()):
        made, real = e.generated.pixels[k].int(), e.train.pixels[index[k]].int()
        for row, (image, name) in enumerate(
            ((made, "generated"), (real, "nearest\ntraining slice"), (made - real, "difference"))
        ):
            ax = fig.add_subplot(3, len(closest), 1 + row * len(closest) + column)
            how = {"cmap": "gray", "vmin": 0, "vmax": 255} if row < 2 else {"cmap": "RdBu_r", "vmin": -255, "vmax": 255}
            ax.imshow(image, **how)
            ax.set_xticks([]), ax.set_yticks([])
            ax.set_ylabel(name if column == 0 else "", fontsize=9)
            ax.set_title(f"{distance[k]:.2f}" if row == 0 else "", fontsize=9)
    fig.suptitle("Distance to the nearest training slice over the threshold; below 1 is a copy", fontsize=10)
    save(fig, path)


SECTIONS = (distances, diversity, spectrum, two_sample, anatomical, class_fidelity, memorisation, latent_spread)
PICTURES = ("generated.png", "spectrum.png", "anatomy.png", "memorisation.png", "closest_pairs.png")
