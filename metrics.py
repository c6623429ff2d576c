"""Image metrics as plain functions of tensors. Nothing here reads or writes a file.

Images are float [N, 1, H, W] in [0, 1] unless a docstring says otherwise; features are float64 [N, D].

Many functions take bootstrap weights, float64 [N, R], and return R numbers at once. Entry (i, r) says how many times
image i counts in resample r. `resample_people` makes them: column 0 is the data as they are (all ones), the other
columns are bootstrap resamples of people. `interval` turns the R numbers into a value with a 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a distance matrix computed at a time. A full 20,000 x 20,000 matrix in float64 takes 3.2 GB, a block 160 MB.
BLOCK = 1024

People = Sequence[str] | Sequence[int] | np.ndarray  # whose slice each image is: one name or number per image


class TooFew(ValueError):
    """Raised when a metric gets fewer images, people or pixels than it needs; the message says which and how many."""


# ---------------------------------------------------------------------------------------------------------------------
# Pairs of images: PSNR, SSIM, MS-SSIM


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB with data range 1, per image: [B]. Identical images give inf."""
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)))


def ssim(a: Tensor, b: Tensor, border: bool = True) -> Tensor:
    """Structural similarity (Wang et al. 2004) with data range 1, per image: [B]. Gaussian window 11 wide, sigma 1.5.

    With `border` the values equal torchmetrics', which pads images by reflection; the training losses leave the border
    out. Reimplemented because importing torchmetrics takes eight seconds and a blur by two matrix products is faster.
    """
    return _ssim(a, b, border)[0]


def _ssim(a: Tensor, b: Tensor, border: bool = True) -> tuple[Tensor, Tensor]:
    """(SSIM, its contrast-structure factor alone), each [B]. MS-SSIM needs the factor at its coarser scales."""
    if border:
        a, b = (F.pad(x, [5] * 4, mode="reflect") for x in (a, b))
    # The window is separable, so blurring is one product with a banded matrix along rows and one along columns.
    left, right = gaussian_band(a.shape[2], a.dtype, a.device), gaussian_band(a.shape[3], a.dtype, a.device).T

    def blur(x: Tensor) -> Tensor:
        return left @ x @ right

    # Local means, variances and covariance under the window, all five blurs in one batch.
    mu_a, mu_b, aa, bb, ab = blur(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    var_a, var_b, cov = aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b
    # Wang et al. 2004, equation 13: luminance times contrast-structure.
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    value = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1) * structure
    # torchmetrics averages SSIM over the whole image, but this factor without the border. Its MS-SSIM depends on that.
    if border:
        structure = structure[..., 5:-5, 5:-5]
    return value.mean(dim=(1, 2, 3)), structure.mean(dim=(1, 2, 3))


@lru_cache
def gaussian_band(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Blur of a line of n pixels as a matrix [n - 10, n]: row i is a Gaussian (sigma 1.5) over pixels i to i + 10."""
    tap = torch.exp(-0.5 * (torch.arange(11) - 5).square() / 1.5**2)
    rows = torch.arange(n - 10)[:, None]
    band = torch.zeros(n - 10, n).scatter_(1, rows + torch.arange(11), (tap / tap.sum()).expand(n - 10, 11))
    return band.to(device, dtype)


def unit(x: Tensor) -> Tensor:
    """Images in [-1, 1] -> [0, 1], clamped: the range that PSNR and SSIM expect."""
    return (x.float().clamp(-1, 1) + 1) / 2


def unpaired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean (PSNR, SSIM) between image i of a and image i of b when the two are unrelated.

    This measures how alike any two images of the sets are, not how well one reproduces the other.
    """
    return psnr(a, b).mean().item(), ssim(a, b).mean().item()


def ms_ssim(a: Tensor, b: Tensor, border: bool = True) -> Tensor:
    """Multi-scale SSIM (Wang et al. 2003, equation 7), per image: [B]. `border` as in `ssim`.

    Five scales need images of 176 pixels, four 99, three 44; smaller images use fewer scales, with the exponents
    rescaled to sum to 1. The limits and values are torchmetrics': side // (scales - 1)^2 must exceed 10.
    """
    betas = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # exponents of the five scales, from the paper
    scales = next(n for n in (5, 4, 3, 2) if min(a.shape[-2:]) // (n - 1) ** 2 > 10)
    value = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for i, beta in enumerate(betas[:scales]):
        whole, structure = _ssim(a, b, border)
        # The luminance factor enters at the coarsest scale only.
        factor = whole if i == scales - 1 else structure
        # A negative factor has no real power. It counts as nearly 0, that is, not similar at all.
        value = value * factor.clamp(min=1e-6) ** (beta / sum(betas[:scales]))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Bootstrap over people


def resample_people(people: People, resamples: int, seed: int) -> Tensor:
    """Bootstrap weights, float64 [N, 1 + resamples]: how often each image counts in each resample. Column 0 is all 1.

    Whole people are drawn, with all their slices, because slices of one person are not independent observations.
    A bootstrap over slices would give intervals that are far too narrow.
    """
    names, person = np.unique(np.asarray(people), return_inverse=True)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples).T  # [people, resamples]
    return torch.from_numpy(np.concatenate([np.ones((len(names), 1)), times], axis=1)[person])


def interval(values: Tensor | np.ndarray, low: float = -math.inf, high: float = math.inf) -> tuple[float, float, float]:
    """(value, lower end, upper end) of the 95 % interval, from [1 + resamples] numbers, the first from all the data.

    The interval is the value ± 1.96 standard deviations of the resamples, cut to the metric's range [low, high].
    Percentiles of the resamples would be wrong: a resample contains some people twice, which shifts distances and
    coverages to one side. Only the spread of the resamples can be used. NaN resamples are ignored.
    """
    values = np.asarray(values, dtype=np.float64)
    value, sd = float(values[0]), float(np.nanstd(values[1:], ddof=1))
    return value, max(low, value - 1.96 * sd), min(high, value + 1.96 * sd)


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """Mean of x [N] under each column of the weights [N, R]: float64 [R]."""
    return x.double() @ weights / weights.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets of features


def frechet(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Fréchet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, equation 6): [R].

    |mean x - mean y|^2 + tr Sx + tr Sy - 2 tr sqrt(Sx Sy). The last trace is the nuclear norm of A B^T, where
    A^T A = Sx and B^T B = Sy. So no matrix square root is taken, and covariances of any rank are fine.
    """

    def moments(f: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean [D], trace of the covariance, a factor A with A^T A = covariance)."""
        mean = w @ f / w.sum()
        a = (f - mean) * (w / (w.sum() - 1)).sqrt()[:, None]
        # With more images than dimensions, replace A [N, D] by an equivalent [D, D]: the SVD below gets cheaper.
        if len(a) > a.shape[1]:
            values, vectors = torch.linalg.eigh(a.T @ a)
            kept = values > values[-1] * 1e-14 * len(values)  # anything smaller is the rounding error of a zero
            a = (values * kept).sqrt()[:, None] * vectors.T
        return mean, a.square().sum(), a

    out = []
    for r in range(wx.shape[1]):
        (mx, tx, a), (my, ty, b) = moments(x, wx[:, r]), moments(y, wy[:, r])
        out.append((mx - my).square().sum() + tx + ty - 2 * torch.linalg.svdvals(a @ b.T).sum())
    return torch.stack(out)


def kernel_distance(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Kernel distance, as in KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (a.b / D + 1)^3: [R].

    An image is never compared with itself, nor with its own copies in a resample. Slices of one person are compared
    with each other, as in KID. So between two small sets of people the value is above 0 even if both come from one
    population; the floor in the report is above 0 for the same reason.
    """

    def mean_kernel(a: Tensor, b: Tensor, wa: Tensor, wb: Tensor, same: bool) -> Tensor:
        """Weighted mean of the kernel over pairs (a, b): [R]. `same`: a and b are one set, leave out the diagonal."""
        total = torch.zeros(wa.shape[1], dtype=torch.float64, device=a.device)
        for i in range(0, len(a), BLOCK):
            k = (a[i : i + BLOCK] @ b.T / a.shape[1] + 1) ** 3
            if same:
                k.diagonal(i).zero_()
            total += (wa[i : i + BLOCK] * (k @ wb)).sum(0)
        pairs = wa.sum(0) * wb.sum(0) - (wa.square().sum(0) if same else 0)
        return total / pairs

    return mean_kernel(x, x, wx, wx, True) + mean_kernel(y, y, wy, wy, True) - 2 * mean_kernel(x, y, wx, wy, False)


def distances_to(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances between two sets of points: [n, D], [m, D] -> [n, m]."""
    square = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    return square.clamp_(min=0).sqrt_()  # rounding can make the square of a small distance negative


def radii(x: Tensor, people: People, k: int) -> Tensor:
    """Distance from each point to its k-th nearest neighbour among slices of *other* people: [N].

    Raises TooFew if some point has fewer than k slices of other people. A person's own slices do not count: the next
    slice of the same head is a millimetre away. With them, the balls of `precision_recall` would be so small that
    hardly any slice of another person falls into one, and even real people would get a poor precision.
    """
    if len(x) <= k:
        raise TooFew(f"precision and recall need {k} slices of other people for each slice; a set has {len(x)} in all")
    person = torch.from_numpy(np.unique(np.asarray(people), return_inverse=True)[1]).to(x.device)
    out = []
    for i in range(0, len(x), BLOCK):
        d = distances_to(x[i : i + BLOCK], x)
        d[person[i : i + BLOCK, None] == person[None]] = math.inf
        out.append(d.kthvalue(k, dim=1).values)
    r = torch.cat(out)
    if not r.isfinite().all():
        raise TooFew(f"precision and recall need {k} slices of other people for each slice; a set has fewer")
    return r


def precision_recall(
    real: Tensor, fake: Tensor, real_people: People, fake_people: People, wr: Tensor, wf: Tensor, k: int = 5
) -> dict[str, Tensor]:
    """precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020), each [R].

    Each point gets a ball that reaches to its k-th nearest neighbour of another person (`radii`). precision: share of
    fakes inside a real ball. density: real balls around a fake, over k. recall: share of reals inside a fake ball.
    coverage: share of real balls that contain a fake. A resample reweights the points; the balls keep their size.
    """
    r_real, r_fake = radii(real, real_people, k), radii(fake, fake_people, k)
    hits: dict[str, list[Tensor]] = {name: [] for name in ("precision", "density", "recall", "coverage")}
    # From each fake: how many real balls is it in?
    for i in range(0, len(fake), BLOCK):
        balls = (distances_to(fake[i : i + BLOCK], real) <= r_real).double() @ wr  # [b, R]
        hits["precision"].append((balls > 0).double())
        hits["density"].append(balls / k)
    # From each real: is it in a fake ball, and is a fake in its own ball?
    for i in range(0, len(real), BLOCK):
        d = distances_to(real[i : i + BLOCK], fake)  # [b, M]
        hits["recall"].append(((d <= r_fake).double() @ wf > 0).double())
        hits["coverage"].append(((d <= r_real[i : i + BLOCK, None]).double() @ wf > 0).double())
    over = {"precision": wf, "density": wf, "recall": wr, "coverage": wr}  # the set that each one averages over
    return {name: (torch.cat(h) * over[name]).sum(0) / over[name].sum(0) for name, h in hits.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Classification: area under the ROC curve


def auc_between_people(features: Tensor, labels: Tensor, people: People, weights: Tensor, k: int = 15) -> Tensor:
    """AUC of a k-nearest-neighbour classifier that only looks at slices of *other* people: [R]. 0.5 is chance.

    features [N, D], labels int64 [N] of at least two classes; with more than two, the mean AUC of one against the
    rest. Raises TooFew if a class has fewer than two people.
    """
    person = torch.from_numpy(np.unique(np.asarray(people), return_inverse=True)[1])
    if min(len(person[labels == c].unique()) for c in labels.unique()) < 2:
        raise TooFew("classifying by nearest neighbours needs at least two people of each class")
    votes = []
    for i in range(0, len(features), BLOCK):
        d = distances_to(features[i : i + BLOCK], features)
        d[person[i : i + BLOCK, None] == person[None]] = math.inf
        nearest, index = d.topk(min(k, d.shape[1]), largest=False)
        # Share of each class among the neighbours. With few other people, some of the k are the person's own slices
        # at distance inf: these do not vote.
        seen = F.one_hot(labels[index], int(labels.max()) + 1).double() * nearest.isfinite()[..., None]
        votes.append(seen.sum(1) / seen.sum((1, 2)).clamp(min=1)[:, None])
    return auc(torch.cat(votes), labels, weights)


def auc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Area under the ROC curve: [R]. scores [N, classes], labels int64 [N].

    With more than two classes, the mean over classes of one against the rest. A resample that lacks a class gives NaN.
    """
    classes = labels.unique().tolist()
    columns = classes[1:] if len(classes) == 2 else classes
    return torch.stack([binary_auc(scores[:, c].double(), labels == c, weights) for c in columns]).mean(0)


def binary_auc(score: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Weighted Mann-Whitney statistic with ties counted half: [R]. One sort serves all resamples.

    score [N], positive bool [N]: the chance that a random positive scores higher than a random negative.
    """
    order = score.argsort()
    score, pos, neg = score[order], weights[order] * positive[order, None], weights[order] * ~positive[order, None]
    # Add up the weights of equal scores, then count for each group of ties the negatives below it.
    _, tie = score.unique_consecutive(return_inverse=True)
    groups = int(tie[-1]) + 1
    p = torch.zeros(groups, weights.shape[1], dtype=torch.float64).index_add_(0, tie, pos)
    n = torch.zeros(groups, weights.shape[1], dtype=torch.float64).index_add_(0, tie, neg)
    below = n.cumsum(0) - n
    return (p * (below + n / 2)).sum(0) / (p.sum(0) * n.sum(0))


# ---------------------------------------------------------------------------------------------------------------------
# Radial power spectrum


def power_spectrum(x: Tensor) -> Tensor:
    """log10 of the mean power at each spatial frequency 1 ... S/2 - 1 (cycles per image): float64 [N, S/2 - 1].

    x [N, 1, S, S]. Power is averaged over all directions of a frequency. It is clamped from below at 1e-12 of the
    image's total power, so that frequencies without any power do not give -inf.
    """
    s = x.shape[-1]
    f = torch.fft.fftfreq(s, 1 / s, device=x.device)
    # Frequencies of (about) equal length form a ring in the 2-D spectrum; each pixel of it belongs to one ring.
    ring = (f[:, None] ** 2 + f[None] ** 2).sqrt().round().long().flatten()
    power = torch.fft.fft2(x[:, 0]).abs().square().flatten(1).double()
    total = torch.zeros(len(x), int(ring.max()) + 1, dtype=torch.float64, device=x.device)
    mean = total.index_add(1, ring, power) / ring.bincount().clamp(min=1)
    return mean[:, 1 : s // 2].clamp(min=1e-12 * power.sum(1, keepdim=True) + 1e-30).log10()


def high_frequencies(x: Tensor, y: Tensor) -> Tensor:
    """Power of x against that of y, both [N, 1, S, S], in the upper half of the frequencies: dB, float64 [N].

    Below 0 is too smooth, above it too noisy.
    """
    of_x, of_y = (10 * power_spectrum(v.cpu()) for v in (x, y))
    return (of_x - of_y)[:, of_x.shape[1] // 2 :].mean(1)


# ---------------------------------------------------------------------------------------------------------------------
# Copies of training slices


def align(x: Tensor) -> Tensor:
    """Centre each image on its brain and normalise its brightness: [N, 1, H, W] in [0, 1].

    This makes a shifted or brightened copy of a training slice comparable with the original. The brain is every pixel
    above a fifth of the image's 99th percentile. Its centre of mass moves to the image centre, its mean becomes 0.5.
    """
    # Find the brain and its area.
    peak = x.flatten(1).float().quantile(0.99, dim=1).clamp(min=1e-3)[:, None, None, None]
    brain = (x > 0.2 * peak).float()
    area = brain.sum((2, 3), keepdim=True).clamp(min=1)
    # Affine matrices [N, 2, 3] of a pure shift: identity, with the centre of mass in the last column.
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    for row, n, dim in ((0, x.shape[3], 3), (1, x.shape[2], 2)):
        at = (torch.arange(n, device=x.device) * 2 + 1) / n - 1  # pixel centres in grid_sample's [-1, 1] coordinates
        at = at.view([1, 1, 1, n] if dim == 3 else [1, 1, n, 1])
        theta[:, row, 2] = ((brain * at).sum((2, 3), keepdim=True) / area).flatten()
    # Shift, and scale the brightness in the same pass.
    mean = ((x * brain).sum((2, 3), keepdim=True) / area).clamp(min=1e-3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x * (0.5 / mean), grid, align_corners=False).clamp(0, 1)


def thumbnails(x: Tensor, side: int = 24) -> Tensor:
    """Aligned, shrunken, standardised images as points: float32 [N, side^2].

    The squared distance between two of them is 2 (1 - correlation of their grey values).
    """
    small = F.interpolate(align(x), size=(side, side), mode="area").flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1)


def nearest(x: Tensor, y: Tensor, people: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """For each point of x [N, D] the nearest point of y [M, D]: (distance float32 [N], index into y int64 [N]).

    With `people`, int64 [N] and [M], only among points of other people (inf where there are none).
    """
    best = []
    for i in range(0, len(x), BLOCK):
        d = distances_to(x[i : i + BLOCK], y)
        if people is not None:
            d[people[0][i : i + BLOCK, None] == people[1][None]] = math.inf
        best.append(d.min(1))
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def below_most(values: np.ndarray) -> float:
    """The largest of the values that at least 95 % of them reach."""
    return np.quantile(values, 0.05, method="lower").item()


class CopyDetector:
    """Decides whether an image is a copy of a training slice.

    An image counts as a copy if it is closer to its nearest training slice than slices of two people are. This is
    tested in two spaces, and either one suffices: "pixel", between aligned thumbnails, where mirrored training slices
    count too, and, if `encode` is given, "latent", between the latents that it returns for aligned images
    ([B, 1, S, S] in [0, 1] -> [B, D]). All distances are reported in units of their space's threshold, so anything
    below 1 is a copy.

    How close two people come is measured between the training people. The thresholds are such that 95 % of them have at
    most 2 % of their slices closer to those of the others. That holds for somebody never seen as well, who differs from
    them in nothing but that (split conformal prediction, by people because the slices of one are alike).

    Attributes: `threshold` {space: float}; `between` {space: distances of training slices to other people [n]}, of up
    to 4,096 training slices, and `people` [n], whose they are.
    """

    def __init__(
        self, train: Tensor, people: People, encode: Callable[[Tensor], Tensor] | None = None,
        on_batch: Callable[[int], object] = lambda n: None,
    ):  # fmt: skip
        """train: uint8 [N, S, S], a slice of person people[i] each. `on_batch` is called with the number of images just
        embedded.

        Raises TooFew if there are fewer than 40 training slices, or fewer than four people.
        """
        names, person = np.unique(np.asarray(people), return_inverse=True)
        if len(train) < 40 or len(names) < 4:
            raise TooFew(
                "the threshold for copies comes from the distances between training people: it needs 40 slices of 4 "
                f"people, not {len(train)} of {len(names)}"
            )
        self.spaces: dict[str, Callable[[Tensor], Tensor]] = {"pixel": thumbnails}
        if encode is not None:
            self.spaces["latent"] = lambda x: encode(align(x))
        self.on_batch = on_batch
        # Embed the training slices. The mirror images come after all the originals, so that an index modulo `count`
        # is that of the training slice.
        self.train = self.embed(train)
        mirrored = torch.cat([thumbnails(part.flip(3)) for part in batches(train)])
        self.train["pixel"] = torch.cat([self.train["pixel"], mirrored])
        self.count = len(train)
        # The distance of a training slice to its nearest one of another person
        rows = torch.arange(0, len(train), -(-len(train) // 4096))
        whose = torch.from_numpy(person)
        self.people = np.asarray(people)[rows]
        distance = {}
        for name, points in self.train.items():
            own = (whose[rows].to(points.device), whose.repeat(len(points) // len(train)).to(points.device))
            distance[name] = nearest(points[rows], points, own)[0].cpu()
        # A slice is below a threshold in one space or the other if its smaller rank is below that of the thresholds,
        # `share`. The rank that clears 98 % of a person's slices, and of these ranks one that 95 % of people exceed.
        rank = torch.stack([d.argsort().argsort() / (len(rows) - 1) for d in distance.values()]).amin(0).numpy()
        self.cleared = np.array(
            [np.quantile(rank[self.people == p], 0.02, method="lower") for p in np.unique(self.people)]
        )
        self.share = below_most(self.cleared)
        self.threshold = {name: d.quantile(self.share).clamp(min=1e-9).item() for name, d in distance.items()}
        self.between = {name: d / self.threshold[name] for name, d in distance.items()}

    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [N, S, S] -> {space: points [N, D]}."""
        points: dict[str, list[Tensor]] = {name: [] for name in self.spaces}
        for x in batches(images):
            for name, f in self.spaces.items():
                points[name].append(f(x))
            self.on_batch(len(x))
        return {name: torch.cat(p) for name, p in points.items()}

    def distances(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Compare uint8 [N, S, S] images with all training slices.

        Returns ({space: distance to the nearest training slice, over the threshold [N]}, index int64 [N] of the nearest
        training slice in the space where the image is closest to one).
        """
        found = {name: nearest(p, self.train[name]) for name, p in self.embed(images).items()}
        relative = {name: d.cpu() / self.threshold[name] for name, (d, _) in found.items()}
        closest = torch.stack(list(relative.values())).argmin(0)  # which space, [N]
        index = torch.stack([i.cpu() % self.count for _, i in found.values()])  # [spaces, N]
        return relative, index.gather(0, closest[None])[0]


def is_copy(distances: dict[str, Tensor]) -> Tensor:
    """bool [N], from `CopyDetector.distances`: is the image below the threshold in any space?"""
    return torch.stack(list(distances.values())).amin(0) < 1


def batches(images: Tensor, size: int = 64) -> Iterator[Tensor]:
    """Batches of uint8 [N, S, S] images as float [B, 1, S, S] in [0, 1]."""
    return (part[:, None].float() / 255 for part in images.split(size))
