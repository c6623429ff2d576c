"""The sections of an evaluation. Each one compares generated images with real ones and reports numbers with floors.

A section is a function that takes an `Evidence`, adds numbers to its report and may write pictures to its folder. The
floor of a number is the same number with held-out people in place of the generated images: what other real people would
get. The 95 % intervals come from a bootstrap over people. docs/evaluation.md says what each number means and what it
cannot show.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import anatomy
import features
import metrics
from conditions import Attribute
from metrics import TooFew, interval, resample_people, weighted_mean
from modules import StableDiffusion
from pictures import to_uint8
from utils import evenly_spaced, generator, progress_bar, stratified
from vae import VAE
from weights import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from config import EvaluateConfig

FEWEST = 128  # images that a Fréchet distance needs: twice the number of features, for a usable covariance
JUDGE_STEPS = 300  # training steps of the two-sample test's CNN, of 32 images each
# Possible values of each metric; intervals are cut to them. The kernel distance has no limits: its estimate is unbiased
# and can be below 0.
RANGES = {"precision": (0, 1), "recall": (0, 1), "coverage": (0, 1), "density": (0, math.inf), "frechet": (0, math.inf)}


@dataclass
class Images:
    """One set of images: the training slices, the held-out slices or the generated ones."""

    pixels: Tensor  # uint8 [N, S, S]
    labels: Tensor  # int64 [N], index of the class, -1 if it is not known
    people: np.ndarray  # str [N], whose slice it is; every generated image counts as a person of its own
    conditions: Tensor | None = None  # float32 [N, A], what is known of each, or what it was asked to show

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | Tensor) -> Images:
        """The images at these indices."""
        rows = torch.as_tensor(rows)
        conditions = None if self.conditions is None else self.conditions[rows]
        return Images(self.pixels[rows], self.labels[rows], self.people[rows.numpy()], conditions)

    def sample(self, n: int, seed: int) -> Images:
        """n of them in their old order, at random but spread over all of it, or all if there are fewer."""
        return self.take(stratified(len(self), min(n, len(self)), seed))

    def weights(self, cfg: EvaluateConfig, seed: int = 0) -> Tensor:
        """Bootstrap weights over people, float64 [N, 1 + resamples]. Sets that are compared take different seeds."""
        return resample_people(self.people, cfg.resamples, cfg.seed + seed)

    def images(self) -> Tensor:
        """The pixels as float [N, 1, S, S] in [0, 1]."""
        return self.pixels[:, None].float() / 255


@dataclass
class Evidence:
    """What the sections need, and what they found."""

    train: Images
    held_out: Images
    generated: Images
    classes: list[str]
    cfg: EvaluateConfig
    device: torch.device
    out: Path  # folder for pictures
    model: StableDiffusion | None = None  # of the run, as is the VAE; None for a folder of images without a run
    vae: VAE | None = None
    latents: Tensor | None = None  # the generated images' latents before decoding, [N, C, h, w]
    attributes: Sequence[Attribute] = ()  # what the columns of `conditions` are
    source: str = ""  # where the generated images come from, in words
    # {section: {metric: {value, floor, ci_low, ci_high, n}}}
    report: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)  # sentences about what could not be measured: exit code 2
    notes: list[str] = field(default_factory=list)  # sentences that are no problem

    def put(
        self, section: str, metric: str, values: Tensor | np.ndarray, floor: Tensor | np.ndarray | float, n: int,
        low: float = -math.inf, high: float = math.inf,
    ) -> None:  # fmt: skip
        """Add a number to the report, with its interval.

        values: [1 + resamples], the first from the data as they are. floor: likewise, or one number. n: how many images
        are behind it. low and high: the range of the metric.
        """
        value, ci_low, ci_high = interval(values, low, high)
        self.record(section, metric, value, float(np.asarray(floor).flat[0]), ci_low, ci_high, n)

    def record(
        self, section: str, metric: str, value: float, floor: float, ci_low: float, ci_high: float, n: int
    ) -> None:
        """Add a number whose interval is known. If anything is not finite, add a note instead."""
        if not all(map(math.isfinite, (value, floor, ci_low, ci_high))):
            self.notes.append(f"{section}.{metric} is not defined for these images.")
            return
        numbers = {"value": value, "floor": floor, "ci_low": ci_low, "ci_high": ci_high, "n": n}
        self.report.setdefault(section, {})[metric] = {k: round(v, 6) for k, v in numbers.items()}

    def sample_equally(self) -> tuple[Images, Images, Images]:
        """Random samples (train, held out, generated) of one size, at most cfg.count.

        Distances between sets depend on the sizes of the sets, so values and floors need equal ones.
        """
        n, seed = min(len(self.train), len(self.held_out), len(self.generated), self.cfg.count), self.cfg.seed
        return self.train.sample(n, seed), self.held_out.sample(n, seed + 1), self.generated.sample(n, seed + 2)

    @cached_property
    @torch.no_grad()
    def reconstructed(self) -> Images | None:
        """The held-out slices as they come back from the run's VAE, with texture; None without a VAE of their size."""
        s, parts, done = self.held_out, [], 0
        if self.vae is None or self.vae.config["image_size"] != s.pixels.shape[-1]:
            return None
        with progress_bar(len(s), what="held out, through the VAE") as bar:
            for x in metrics.batches(s.pixels):
                noise = self.vae.texture_noise(self.cfg.seed, range(done, done + len(x)))
                z, _ = self.vae.encode(2 * x.to(self.device) - 1)
                parts.append(torch.from_numpy(to_uint8(self.vae.decode(z, noise))))
                done += len(x)
                bar.update(len(x))
        return replace(s, pixels=torch.cat(parts))

    def require(self, metric: str, least: int, *sets: Images) -> None:
        """Raise TooFew if one of the sets has fewer than `least` images."""
        for s in sets:
            if len(s) < least:
                name = next(n for n in ("train", "held_out", "generated") if getattr(self, n) is s)
                what = {"train": "training", "held_out": "held-out"}.get(name, name)
                raise TooFew(f"{metric} needs at least {least} images of each set, and there are {len(s)} {what} ones")


# ---------------------------------------------------------------------------------------------------------------------
# The sections. A section that cannot be measured raises TooFew; evaluate.py reports that and goes on with the next.


def damaged(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Positive controls: uint8 [N, S, S] images damaged in known ways, which every distance should notice.

    "blurred" (Gaussian, sigma 1.5 % of the side), "noised" (standard deviation 0.1 of white), "shuffled" (the pixels,
    by one permutation for all images).
    """
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
    """Distances from the training slices in up to three feature spaces: sections random_vgg, autoencoder, inception.

    Of the generated images and, as positive controls, of damaged held-out slices (sections <space>_blurred, ...).
    Inception is used if cfg.inception_weights names its weights. Raises TooFew below 20 images of a set; below 128,
    everything but the Fréchet distance is measured before it is raised.
    """
    # samples of equal size, and the controls
    train, held_out, generated = e.sample_equally()
    n, side = len(train), min(64, train.pixels.shape[-1] // 16 * 16)
    if n < 20:
        raise TooFew(f"distances between sets need at least 20 images of each set, and there are {n}")
    sets = {"": generated.pixels, **{f"_{k}": v for k, v in damaged(held_out.pixels, e.cfg.seed).items()}}
    everything = [train.pixels, held_out.pixels, *sets.values()]
    spaces = ["random_vgg", "autoencoder"] + ["inception"] * bool(e.cfg.inception_weights)
    steps = 300  # of training the autoencoder, 32 images each
    total = len(spaces) * n * len(everything) + 32 * steps
    with progress_bar(total, what="features") as bar:
        for space in spaces:
            # the network, and the size at which it sees images
            if space == "autoencoder":
                network, seen_at = features.train_autoencoder(e.train.pixels, side, e.device, steps, bar.update), side
            elif space == "inception" and e.cfg.inception_weights:
                network, seen_at = features.inception(e.cfg.inception_weights, e.device), 299
            else:
                network, seen_at = features.random_vgg(e.device), side
            # features of all sets: training, held out, generated, controls
            f = [features.embed(network, pixels, seen_at, e.device, bar.update) for pixels in everything]
            # In units of the training features' standard deviation, so that distances are readable. FID and KID are
            # defined on Inception's features as they are.
            if space != "inception":
                f = [(x - f[0].mean(0)) / f[0].var(0).mean().sqrt() for x in f]
            compare_features(e, space, (train, held_out, generated), f[0], f[1], dict(zip(sets, f[2:])))
    if n < FEWEST:
        raise TooFew(f"{spaces[0]}.frechet needs at least {FEWEST} images of each set, and there are {n}")


def compare_features(
    e: Evidence,
    space: str,
    sets: tuple[Images, Images, Images],
    real: Tensor,
    held_out: Tensor,
    fakes: dict[str, Tensor],
) -> None:
    """Report all distances between features, float64 [N, D] each, with the training features `real`.

    sets: the images (train, held out, generated) that the features come from. `held_out` gives the floor. `fakes`:
    the generated images under "", the controls under "_<name>"; each goes to section <space><key>.
    """
    train, others, generated = sets
    n, cfg = len(train), e.cfg
    # A resample of Inception's 2048 features takes seconds, one of 64 features milliseconds: take at most 20 of those.
    columns = slice(None, 1 + (cfg.resamples if real.shape[1] <= 64 else min(20, cfg.resamples)))
    w_train, w_others, w_generated = (s.weights(cfg, i)[:, columns] for i, s in enumerate(sets))

    def numbers(fake: Tensor, people: np.ndarray, w: Tensor) -> dict[str, Tensor]:
        """{metric: [1 + resamples]} of one set against the training features."""
        found = {}
        if n >= FEWEST:
            found["frechet"] = metrics.frechet(real, fake, w_train, w)
        found["kernel"] = metrics.kernel_distance(real, fake, w_train, w)
        return found | metrics.precision_recall(real, fake, train.people, people, w_train, w)

    floor = numbers(held_out, others.people, w_others)
    for name, fake in fakes.items():
        # The controls are held-out slices: they come from several slices of each person, which the bootstrap must know.
        people, w = (others.people, w_others) if name else (generated.people, w_generated)
        for metric, values in numbers(fake, people, w).items():
            e.put(space + name, metric, values, floor[metric], n, *RANGES.get(metric, (-math.inf, math.inf)))


def random_pairs(s: Images, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Up to n random pairs of images of different people, each float [n, 1, S, S] in [0, 1]. No image is used twice."""
    order = np.random.default_rng(seed).permutation(len(s))
    a, b = order[: len(order) // 2], order[len(order) // 2 : len(order) // 2 * 2]
    different = s.people[a] != s.people[b]
    return s.take(a[different][:n]).images(), s.take(b[different][:n]).images()


def diversity(e: Evidence) -> None:
    """Sections diversity and unpaired: are generated images as different from one another as people are?

    diversity.ms_ssim: mean MS-SSIM between random pairs of generated images; the floor is that between training people.
    unpaired: PSNR and SSIM between generated and unrelated held-out slices; the floor is training against held-out.
    """
    if e.train.pixels.shape[-1] < 48:
        raise TooFew(f"diversity.ms_ssim needs images of at least 48 pixels, and these have {e.train.pixels.shape[-1]}")
    e.require("diversity.ms_ssim", 20, e.train, e.generated)

    # MS-SSIM within the generated images, and within the training slices
    similarity = []
    pairs = [random_pairs(s, 250, e.cfg.seed + i) for i, s in enumerate((e.generated, e.train))]
    with progress_bar(sum(len(a) for a, _ in pairs), what="MS-SSIM") as bar:
        for a, b in pairs:
            parts = []
            for x, y in zip(a.split(50), b.split(50)):
                parts.append(metrics.ms_ssim(x, y))
                bar.update(len(x))
            similarity.append(torch.cat(parts))

    def resampled(x: Tensor) -> Tensor:
        """Mean [1 + resamples] of one number per pair; the pairs are independent, so pairs are resampled."""
        return weighted_mean(x, resample_people(range(len(x)), e.cfg.resamples, e.cfg.seed))

    of_generated, of_train = similarity
    e.put("diversity", "ms_ssim", resampled(of_generated), of_train.mean(), len(of_generated), 0, 1)

    # PSNR and SSIM between unrelated images of two sets
    n = min(250, len(e.generated), len(e.train), len(e.held_out))
    fake, real, others = (s.sample(n, e.cfg.seed + 5).images() for s in (e.generated, e.train, e.held_out))
    shuffle = torch.randperm(n, generator=generator(e.cfg.seed, 10))
    for name, f in (("psnr", metrics.psnr), ("ssim", metrics.ssim)):
        e.put("unpaired", name, resampled(f(fake, others[shuffle])), f(real, others[shuffle]).mean(), n)


def spectrum(e: Evidence) -> None:
    """Section spectrum: differences between the radial power spectra and the training slices', in dB.

    distance_db: mean absolute difference over all frequencies. high_frequencies_db: mean signed difference in the upper
    half of them; below 0 is too smooth, above 0 too noisy. Writes spectrum.png.
    """
    sets = e.sample_equally()
    n, cycles = len(sets[0]), sets[0].pixels.shape[-1] // 2 - 1
    power = [torch.cat([metrics.power_spectrum(x) for x in metrics.batches(s.pixels)]) for s in sets]
    weights = [s.weights(e.cfg, i) for i, s in enumerate(sets)]
    # Mean spectra of train, held out and generated in dB, [frequencies, 1 + resamples], and how far each is from train.
    mean = [10 * (p.T @ w) / w.sum(0) for p, w in zip(power, weights)]
    _, of_held_out, of_generated = (m - mean[0] for m in mean)
    high = slice(cycles // 2, None)
    e.put("spectrum", "distance_db", of_generated.abs().mean(0), of_held_out.abs().mean(0), n, 0)
    e.put("spectrum", "high_frequencies_db", of_generated[high].mean(0), of_held_out[high].mean(0), n)
    draw_spectrum(e.out / "spectrum.png", [m.numpy() for m in mean])


def with_matched_noise(made: Images, real: Images, seed: int) -> Images:
    """Images with noise that is distributed as what they lack of the real ones: its spectrum, and its standard
    deviation at each of 16 levels of brightness."""
    x = made.images()[:, 0]
    lacking = real.images()[:, 0] - x
    noise = torch.randn(x.shape, generator=generator(seed, 21))
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * torch.fft.fft2(lacking).abs().square().mean(0).sqrt()).real
    level = (x * 15.999).long()
    sd = torch.tensor([lacking[level == i].std(correction=0).item() if (level == i).any() else 0 for i in range(16)])
    noisy = x + sd[level] * noise / noise.std()
    return replace(made, pixels=(noisy.clamp(0, 1) * 255).round().to(torch.uint8))


def tell_apart(a: Images, b: Images, e: Evidence, bar: Callable[[int], object]) -> tuple[Tensor, Tensor]:
    """Two-sample test: (accuracy, AUC), each [1 + resamples], of a CNN (features.Judge) that tells set b from set a.

    Cross-validated over people: the people of both sets are halved, one CNN is trained on each half, and each is tested
    on the other. With a split by slice the CNN would recognise people, and could even tell real from real. `bar` is
    called with the number of images just processed. Raises TooFew if a set has fewer than four people.
    """
    # one set of both: class 0 is a, class 1 is b. The prefix keeps a person of a from being one of b.
    joined = Images(
        torch.cat([a.pixels, b.pixels]), torch.cat([torch.zeros(len(a)), torch.ones(len(b))]).long(),
        np.concatenate([np.char.add("a", a.people), np.char.add("b", b.people)]),
    )  # fmt: skip
    weights = torch.cat([a.weights(e.cfg, 0), b.weights(e.cfg, 1)])

    # halve the people of each set at random
    half = np.zeros(len(joined), dtype=int)
    for prefix in "ab":
        names = np.array(sorted({p for p in joined.people.tolist() if p[0] == prefix}))
        if len(names) < 4:
            raise TooFew(f"the two-sample test needs at least 4 people in each set, and one set has {len(names)}")
        second_half = np.random.default_rng(e.cfg.seed).permutation(names)[::2]
        half[np.isin(joined.people, second_half)] = 1

    # train on one half, test on the other, and average
    accuracy, auc = [], []
    for fold in (0, 1):
        train, test = joined.take(np.flatnonzero(half == fold)), torch.from_numpy(np.flatnonzero(half != fold))
        judge = features.train_judge(train.pixels, train.labels, e.cfg.seed, e.device, JUDGE_STEPS, bar)
        p, y, w = judge(joined.pixels[test]), joined.labels[test], weights[test]
        right = ((p[:, 1] > 0.5).long() == y).double()
        # The mean over the two classes, so that 0.5 is chance even if the sets differ in size.
        accuracy.append((weighted_mean(right[y == 0], w[y == 0]) + weighted_mean(right[y == 1], w[y == 1])) / 2)
        auc.append(metrics.auc(p, y, w))
    return (accuracy[0] + accuracy[1]) / 2, (auc[0] + auc[1]) / 2


def two_sample(e: Evidence) -> None:
    """Section two_sample: accuracy and AUC of a CNN that tells generated images from training slices.

    0.5: they cannot be told apart. 1: told apart every time. The floor is held-out against training slices. With a run
    whose VAE has the images' size also the AUC of held-out slices that went through it, and of these with matched
    noise: a control that looks worse to people and has to look worse to the CNN.
    """
    train, held_out, generated = e.sample_equally()
    if len(train) < 40:
        raise TooFew(f"two_sample needs at least 40 images of each set, and there are {len(train)}")
    sets = [held_out, generated]
    if e.reconstructed is not None:
        others = e.reconstructed.sample(len(held_out), e.cfg.seed + 1)  # of the same slices as `held_out`
        sets += [others, with_matched_noise(others, held_out, e.cfg.seed)]
    with progress_bar(len(sets) * 2 * JUDGE_STEPS * 32, what="two-sample test") as bar:
        (accuracy_floor, floor), (accuracy, auc), *controls = (tell_apart(train, s, e, bar.update) for s in sets)
    e.put("two_sample", "accuracy", accuracy, accuracy_floor, len(generated), 0, 1)
    e.put("two_sample", "auc", auc, floor, len(generated), 0, 1)
    for name, (_, values) in zip(("auc_of_reconstructed", "auc_of_reconstructed_noised"), controls):
        e.put("two_sample", name, values, floor, len(held_out), 0, 1)


def anatomical(e: Evidence) -> None:
    """Sections anatomy, anatomy_<class> and class_difference: areas, contrast and symmetry, as distributions.

    <measure>_d: Cohen's d, generated - training. <measure>_emd: earth mover's distance to the training slices, in
    their standard deviations. class_difference: Cohen's d between the first class and the last, in the generated
    images; the floor is the training slices'. A class with under 10 images in a set is left out. Writes anatomy.png.
    And the section of `effects`.
    """
    from scipy.stats import wasserstein_distance

    # measure samples of the three sets
    sets = [s.sample(e.cfg.count, e.cfg.seed + i) for i, s in enumerate((e.train, e.held_out, e.generated))]
    e.require("anatomy", 20, e.train, e.held_out, e.generated)
    with progress_bar(sum(map(len, sets)), what="anatomy") as bar:
        found = [anatomy.measure(s.pixels.numpy(), bar.update) for s in sets]
    weights = [s.weights(e.cfg, i).numpy() for i, s in enumerate(sets)]

    # differences from the training slices: of all images (class -1), then class by class
    groups = {"anatomy": -1}
    if len(e.classes) > 1:
        groups |= {f"anatomy_{name}": c for c, name in enumerate(e.classes)}
    for section, c in groups.items():
        rows = [np.flatnonzero((s.labels.numpy() == c) | (c < 0)) for s in sets]
        if min(map(len, rows)) < 10:
            continue
        for name in anatomy.MEASURES:
            # values x and weights w of train (t), held out (h) and generated (g)
            (xt, wt), (xh, wh), (xg, wg) = ((f[name][r], w[r]) for f, r, w in zip(found, rows, weights))
            n = len(xg)
            e.put(section, f"{name}_d", anatomy.cohens_d(xg, xt, wg, wt), anatomy.cohens_d(xh, xt, wh, wt), n)
            emd = np.full((2, wt.shape[1]), math.nan)  # stays so where a resample has nobody of this class
            for i, (x, w) in enumerate(((xg, wg), (xh, wh))):
                for r in np.flatnonzero(w.any(0) & wt.any(0)):
                    emd[i, r] = wasserstein_distance(x, xt, w[:, r], wt[:, r]) / xt.std()
            e.put(section, f"{name}_emd", emd[0], emd[1], n, 0)

    # the difference between the classes, within each set
    if len(e.classes) > 1 and (sets[2].labels >= 0).any():
        first, last = 0, len(e.classes) - 1
        for name in anatomy.MEASURES:
            d = []
            for s, f, w in zip(sets, found, weights):
                a, b = (np.flatnonzero(s.labels.numpy() == c) for c in (first, last))
                d.append(anatomy.cohens_d(f[name][a], f[name][b], w[a], w[b]) if min(len(a), len(b)) > 9 else None)
            of_train, _, of_generated = d
            if of_generated is not None and of_train is not None:
                e.put("class_difference", f"{name}_d", of_generated, of_train, len(sets[2]))
    if e.attributes and all(s.conditions is not None for s in sets):
        effects(e, sets, found)
    draw_anatomy(e.out / "anatomy.png", e.classes, sets, found)


def design(e: Evidence, s: Images) -> tuple[list[str], np.ndarray]:
    """(names, float64 [N, p]) of a linear model of the conditions: NaN in rows where one is unknown.

    A number counts from 0 at the lowest value of the training data to 1 at the highest, with its square for the level,
    which anatomy does not follow in a straight line; a category counts 1, but for the first.
    """
    names, columns = [""], [np.ones(len(s))]
    for a, code in zip(e.attributes, s.conditions.double().numpy().T if s.conditions is not None else ()):
        if a.values:
            for i, value in enumerate(a.values[1:], 1):
                names.append(f"{a.name}_{value}_against_{a.values[0]}")
                columns.append(np.where(np.isnan(code), np.nan, code == i))
        else:
            names.append(a.name)
            columns.append((code + 1) / 2)
            if a.name == "level":
                names.append("")
                columns.append(code**2)
    return names, np.stack(columns, 1)


def effects(e: Evidence, sets: Sequence[Images], found: Sequence[dict[str, np.ndarray]]) -> None:
    """Section effects: how anatomy follows what images were asked to show, beside how it does in people.

    <attribute>_on_<measure>: the coefficient of a linear model of the measure on all attributes at once, in standard
    deviations of the training slices: of a number from its lowest value to its highest, of a category against the
    first. The floor is the coefficient in the training slices. `sets` and `found` (their measures) are of the training
    slices, the held-out ones and the generated images.
    """
    train, _, generated = sets
    fits: list[dict[str, np.ndarray]] = []
    for s, measured in ((train, found[0]), (generated, found[2])):
        names, x = design(e, s)
        known = ~np.isnan(x).any(1)
        x, w = x[known], s.weights(e.cfg).numpy()[known]
        if known.sum() < 5 * x.shape[1] or np.linalg.matrix_rank(x) < x.shape[1]:
            e.notes.append("The images are too few or too alike to say how anatomy follows what was asked for.")
            return
        # Weighted least squares of all measures, for the data and for every resample: (X' W X) b = X' W y. The small
        # number on the diagonal is for resamples in which some value does not occur.
        y = np.stack([measured[m][known] / found[0][m].std() for m in anatomy.MEASURES], 1)
        b = [np.linalg.solve((x.T * v) @ x + 1e-9 * np.eye(x.shape[1]), (x.T * v) @ y) for v in w.T]
        fits.append(dict(zip(anatomy.MEASURES, np.stack(b).transpose(2, 0, 1))))  # each [1 + resamples, p]
    for j, name in enumerate(names):
        for measure in anatomy.MEASURES if name else ():
            of_train, of_generated = (fit[measure][:, j] for fit in fits)
            e.put("effects", f"{name}_on_{measure}", of_generated, of_train, len(generated))


def attributes(e: Evidence) -> None:
    """Section attributes: do images show what they were asked to show? Measured by a CNN trained on training people.

    <number>_error: mean absolute error of the prediction against what was asked for, in the attribute's unit.
    <number>_slope: slope of the prediction over what was asked for. <category>_accuracy: share predicted as asked for.
    The floors are those of people held out, against what is known of them. Measures nothing without attributes.
    """
    generated, others = e.generated, e.held_out
    if not e.attributes or e.train.conditions is None or generated.conditions is None or others.conditions is None:
        return
    e.require("attributes", 10, generated, others)
    categories, steps = [len(a.values) for a in e.attributes], 600
    with progress_bar(steps * 32, what="predicting attributes") as bar:
        predict = features.train_predictor(
            e.train.pixels, e.train.conditions, categories, e.cfg.seed, e.device, steps, bar.update
        )
    predicted = [predict(s.pixels) for s in (generated, others)]
    for i, a in enumerate(e.attributes):
        found: list[dict[str, Tensor]] = []
        for s, guesses in zip((generated, others), predicted):
            assert s.conditions is not None
            asked = s.conditions[:, i].double()
            known = ~asked.isnan()
            asked, guess, w = asked[known], guesses[i][known], s.weights(e.cfg)[known]
            if known.sum() < 10:
                break
            if a.values:
                found.append({"accuracy": weighted_mean((guess.argmax(1) == asked).double(), w)})
                continue
            mean = weighted_mean(asked, w)
            spread = weighted_mean(asked.square(), w) - mean.square()
            slope = (weighted_mean(asked * guess, w) - mean * weighted_mean(guess, w)) / spread
            found.append({"error": a.half * weighted_mean((guess - asked).abs(), w), "slope": slope})
        if len(found) < 2:
            e.notes.append(f"The {a.name} of too few images is known: it was not measured.")
            continue
        for metric, values in found[0].items():
            limits = {"accuracy": (0.0, 1.0), "error": (0.0, math.inf)}.get(metric, (-math.inf, math.inf))
            e.put("attributes", f"{a.name}_{metric}", values, found[1][metric], len(generated), *limits)


def class_fidelity(e: Evidence) -> None:
    """Section class_fidelity: AUC of classifiers that tell the classes apart, tested on held-out people.

    train_on_real, train_on_generated, train_on_both: by what the classifier was trained on. real_to_generated: the one
    trained on real slices, tested on the generated ones: do they show what their label says? The floor of all four is
    train_on_real. Measures nothing if there is one class, or, with a note, if the generated images have no classes.
    """
    # is there enough of every class?
    if len(e.classes) == 1:
        return
    labels = e.generated.labels
    if (labels < 0).all():
        e.notes.append("The generated images have none of the data's classes: class fidelity was not measured.")
        return
    for c, name in enumerate(e.classes):
        if (labels == c).sum() < 20:
            raise TooFew(
                f"class_fidelity needs at least 20 images of class {name}, and {(labels == c).sum()} are generated"
            )
        if len(set(e.held_out.people[(e.held_out.labels == c).numpy()])) < 2:
            raise TooFew(f"class_fidelity needs two held-out people of class {name}")

    # the training sets; a generated image of an unknown class teaches nothing
    known = e.generated.take(torch.nonzero(labels >= 0)[:, 0])
    train_sets = {
        "train_on_real": (e.train.pixels, e.train.labels),
        "train_on_generated": (known.pixels, known.labels),
        "train_on_both": (torch.cat([e.train.pixels, known.pixels]), torch.cat([e.train.labels, known.labels])),
    }

    # Train three classifiers on each set and add up their probabilities: one alone depends much on its seed.
    weights = e.held_out.weights(e.cfg)
    seeds, steps, found = 3, 150, {}
    with progress_bar(3 * seeds * steps * 32, what="class fidelity") as bar:
        for name, (pixels, y) in train_sets.items():
            classifiers = [
                features.train_classifier(pixels, y, len(e.classes), e.cfg.seed + s, e.device, steps, bar.update)
                for s in range(seeds)
            ]
            found[name] = metrics.auc(sum_of_probabilities(classifiers, e.held_out), e.held_out.labels, weights)
            if name == "train_on_real":
                p = sum_of_probabilities(classifiers, known)
                found["real_to_generated"] = metrics.auc(p, known.labels, known.weights(e.cfg))
    for name, values in found.items():
        e.put("class_fidelity", name, values, found["train_on_real"], len(known), 0, 1)


def sum_of_probabilities(classifiers: Sequence[Callable[[Tensor], Tensor]], images: Images) -> Tensor:
    """float64 [N, classes]: each image's probabilities, added up over the classifiers."""
    return sum((classifier(images.pixels) for classifier in classifiers), torch.zeros((), dtype=torch.float64))


def memorisation(e: Evidence) -> None:
    """Section memorisation: how many generated images are copies of a training slice (metrics.CopyDetector).

    copy_rate; its floor are the false alarms among people held out. copy_rate_of_reconstructed: the rate of held-out
    slices that went through the run's VAE, measured if the images have its size. <space>_distance: mean distance to the
    nearest training slice, in units of the threshold. Writes memorisation.png, and, with cfg.training_pictures,
    closest_pairs.png, which shows training slices.
    """
    # the distance of every generated image to its nearest training slice
    total = len(e.train) + len(e.held_out) + len(e.generated)
    with progress_bar(total, what="looking for copies") as bar:
        encode = None if e.vae is None else e.vae.embed
        detector = metrics.CopyDetector(e.train.pixels, e.train.people, encode, on_batch=bar.update)
        others, _ = detector.distances(e.held_out.pixels)
        found, index = detector.distances(e.generated.pixels)
    cfg, n = e.cfg, len(e.generated)
    rate, low, high = copy_rate(e, detector, found)
    floor = metrics.is_copy(others).double().mean().item()
    e.record("memorisation", "copy_rate", rate, floor, low, high, n)

    # A blurred image is closer to everything. How much of the copy rate can the VAE's blur explain?
    if e.reconstructed is not None:
        copies = metrics.is_copy(detector.distances(e.reconstructed.pixels)[0]).double()
        rates = weighted_mean(copies, e.held_out.weights(cfg))
        e.put("memorisation", "copy_rate_of_reconstructed", rates, floor, len(copies), 0, 1)

    # mean distances, and pictures
    for space, d in found.items():
        means = weighted_mean(d, e.generated.weights(cfg))
        e.put("memorisation", f"{space}_distance", means, others[space].mean(), n, 0)
    draw_memorisation(e.out / "memorisation.png", found, others)
    if cfg.training_pictures:
        draw_pairs(e.out / "closest_pairs.png", e, torch.stack(list(found.values())).amin(0), index)


def copy_rate(e: Evidence, detector: metrics.CopyDetector, found: dict[str, Tensor]) -> tuple[float, float, float]:
    """(copy rate, lower end, upper end of its 95 % interval) of the generated images' distances `found`.

    The interval covers two sources of doubt: the threshold depends on who was trained on (bootstrap over people), and
    the rate on how many images were drawn (binomial interval).
    """
    from scipy.stats import binomtest

    def quantile(d: Tensor, weight: Tensor, share: float) -> float:
        """A quantile of the distances d [N], each counted `weight` times."""
        order = d.argsort()
        shares = weight[order].cumsum(0) / weight.sum()
        return d[order][min(int(torch.searchsorted(shares, share)), len(d) - 1)].item()

    n, w = len(e.generated), resample_people(detector.people, e.cfg.resamples, e.cfg.seed)
    rate = metrics.is_copy(found).double().mean().item()
    # the rate by the threshold of each resample of the training people
    rates, first = [], np.unique(detector.people, return_index=True)[1]  # a row of each person
    for r in range(1, w.shape[1]):
        share = metrics.below_most(np.repeat(detector.cleared, w[first, r].int().numpy()))
        relative = {space: found[space] / quantile(d, w[:, r], share) for space, d in detector.between.items()}
        rates.append(metrics.is_copy(relative).double().mean().item())
    # the binomial intervals of the lowest and the highest of these rates
    low, high = (binomtest(round(q * n), n).proportion_ci() for q in np.quantile(rates, [0.025, 0.975]))
    return rate, min(low.low, rate), max(high.high, rate)


@torch.no_grad()
def latent_spread(e: Evidence) -> None:
    """Section latent_spread: standard deviation of the generated latents, per channel. Training latents have 1.

    A sampler that is too coarse loses spread here before anything shows in the images. The floor is the held-out
    slices' latents, as posterior samples. Measures nothing if a folder of images is evaluated.
    """
    if e.latents is None or e.vae is None:
        return
    # first and second moments of each image's latent, [N, 2, C]; in closed form for the posterior of real slices
    of_generated = torch.stack([e.latents.mean((2, 3)), e.latents.square().mean((2, 3))], 1)
    parts = []
    for x in metrics.batches(e.held_out.pixels):
        mean, std = e.vae.encode(2 * x.to(e.device) - 1)
        parts.append(torch.stack([mean.mean((2, 3)), (mean.square() + std.square()).mean((2, 3))], 1).cpu())
    # standard deviations over all images and positions, [C, 1 + resamples]
    spread = []
    for moments, s in ((of_generated, e.generated), (torch.cat(parts), e.held_out)):
        w = s.weights(e.cfg)
        first, second = torch.einsum("nkc,nr->kcr", moments.double(), w) / w.sum(0)
        spread.append((second - first.square()).clamp(min=0).sqrt())
    for c in range(spread[0].shape[0]):
        e.put("latent_spread", f"channel_{c}", spread[0][c], spread[1][c], len(e.generated), 0)


@torch.no_grad()
def membership(e: Evidence) -> None:
    """Section membership: does the denoising loss tell who was trained on (Matsumoto et al. 2023, arXiv 2302.03262)?

    AUC by person: how often somebody trained on has less loss than somebody held out, over four slices each, at up to
    ten timesteps and over all of them. 0.5 is what should be. Measures nothing without a run.
    """
    if e.model is None or e.vae is None:
        return
    if e.vae.config["image_size"] != e.train.pixels.shape[-1]:
        e.notes.append("The images have another size than the run's: membership was not measured.")
        return
    timesteps = e.model.scheduler.timesteps
    timesteps = timesteps[evenly_spaced(len(timesteps), 10)]
    # As many people of the training set as are held out, at least 64 if there are so many: [people, timesteps] each.
    most, losses = max(64, len(set(e.held_out.people))), []
    for k, s in enumerate((e.train, e.held_out)):
        names = np.random.default_rng([e.cfg.seed, k]).permutation(sorted(set(s.people)))[:most]
        chosen = [np.flatnonzero(s.people == name) for name in names]
        chosen = [rows[evenly_spaced(len(rows), 4)] for rows in chosen]
        bar, means = progress_bar(len(names), what="membership", unit=" people"), []
        with bar:
            for rows in chosen:
                own = s.take(rows)
                z, _ = e.vae.encode(2 * own.images().to(e.device) - 1)
                y = None if own.conditions is None else own.conditions.to(e.device)
                noise = torch.randn(z.shape, generator=generator(e.cfg.seed, 20)).to(e.device)  # the same for everybody
                means.append(torch.stack([e.model(z, t.expand(len(z)), noise, y)[0].mean() for t in timesteps]).cpu())
                bar.update(1)
        losses.append(torch.stack(means).double())
    loss = torch.cat(losses)
    trained = torch.arange(len(loss)) < len(losses[0])
    # Bootstrap over the people of each side. In the mean all timesteps count alike, however large their loss is.
    weights = torch.cat(
        [resample_people(np.arange(len(x)), e.cfg.resamples, e.cfg.seed + k) for k, x in enumerate(losses)]
    )
    columns = {"auc": (loss / loss.mean(0)).mean(1)}
    columns |= {f"auc_t={t}": loss[:, i] for i, t in enumerate(timesteps.tolist())}
    for name, values in columns.items():
        e.put("membership", name, metrics.binary_auc(-values, trained, weights), 0.5, len(loss), 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

# These colours can also be told apart by colour-blind readers (Okabe & Ito).
COLOURS = {"train": "#555555", "held out": "#0072b2", "generated": "#d55e00"}


def figure(width: float, height: float) -> Figure:
    """An empty matplotlib figure, in inches. Not by pyplot, which would keep it in memory and want a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(fig: Figure, path: Path) -> None:
    """Write the figure as PNG, atomically."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    write_atomic(path, buffer.getvalue())


def draw_spectrum(path: Path, means: Sequence[np.ndarray]) -> None:
    """Plot the mean spectra of train, held out and generated, with 95 % intervals.

    means: in dB, [frequencies, 1 + resamples] each.
    """
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


def draw_anatomy(
    path: Path, classes: Sequence[str], sets: Sequence[Images], found: Sequence[dict[str, np.ndarray]]
) -> None:
    """Plot histograms of the measures: a row for each class, a column for each measure, a line for each set.

    found: for each set, anatomy.measure of its images. Without generated images of known classes there is one row.
    """
    known = [c for c in range(len(classes)) if (sets[2].labels == c).sum() > 9]
    rows = known if len(classes) > 1 and known else [-1]
    fig = figure(2.7 * len(anatomy.MEASURES), 2.3 * len(rows))
    for i, c in enumerate(rows):
        for j, (name, title) in enumerate(anatomy.MEASURES.items()):
            ax = fig.add_subplot(len(rows), len(anatomy.MEASURES), 1 + i * len(anatomy.MEASURES) + j)
            # the same bins for all sets; a few outliers may fall outside
            low, high = np.quantile(np.concatenate([f[name] for f in found]), [0.002, 0.998])
            bins = np.linspace(low, high, 30).tolist()
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
    """Plot histograms of the distances to the nearest training slice, in units of the threshold; one for each space.

    found: {space: [N]} of the generated images; others: of the held-out slices.
    """
    fig = figure(4.2 * len(found), 3.1)
    for i, name in enumerate(found):
        ax = fig.add_subplot(1, len(found), i + 1)
        end = max(found[name].quantile(0.995), others[name].quantile(0.995)).item() * 1.02
        bins = np.linspace(0, end, 40).tolist()
        for label, d in (("held out", others[name]), ("generated", found[name])):
            ax.hist(d.numpy(), bins, density=True, histtype="stepfilled", alpha=0.45, color=COLOURS[label], label=label)
        ax.axvline(1, color="black", lw=1)
        ax.set(yticks=[], xlabel="distance to the nearest training slice / threshold", title=f"{name} distance")
        ax.legend(frameon=False, fontsize=8)
    save(fig, path)


def draw_pairs(path: Path, e: Evidence, distance: Tensor, index: Tensor) -> None:
    """Show the eight generated images that are closest to a training slice, those slices, and the differences.

    distance [N]: of each generated image, in units of the threshold. index int64 [N]: of its nearest training slice.
    The picture shows slices of people.
    """
    closest = distance.argsort()[:8]
    fig = figure(1.35 * len(closest), 4.5)
    for column, k in enumerate(closest.tolist()):
        made, real = e.generated.pixels[k].int(), e.train.pixels[index[k]].int()
        rows = ((made, "generated"), (real, "nearest\ntraining slice"), (made - real, "difference"))
        for row, (image, name) in enumerate(rows):
            ax = fig.add_subplot(3, len(closest), 1 + row * len(closest) + column)
            if name == "difference":
                ax.imshow(image.numpy(), cmap="RdBu_r", vmin=-255, vmax=255)
            else:
                ax.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
            ax.set_xticks([]), ax.set_yticks([])
            ax.set_ylabel(name if column == 0 else "", fontsize=9)
            ax.set_title(f"{distance[k]:.2f}" if row == 0 else "", fontsize=9)
    fig.suptitle("Distance to the nearest training slice over the threshold; below 1 is a copy", fontsize=10)
    save(fig, path)


# In the order of the report. evaluate.py calls each with the Evidence.
SECTIONS = (
    distances, diversity, spectrum, two_sample, anatomical, attributes, class_fidelity, memorisation, membership,
    latent_spread,
)  # fmt: skip
# Files that sections and evaluate.py write, in the order of the report.
PICTURES = ("generated.png", "spectrum.png", "anatomy.png", "memorisation.png", "closest_pairs.png")
