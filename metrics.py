"""Numbers that mean one thing: functions of tensors, no files.

Images are float [N, 1, H, W] in [0, 1] unless said otherwise; features are float64 [N, D]. A function that takes
`weights` [N, R] (or one for each set) gives R numbers at once: column r says how often each image enters. Made by
`resample_people`, column 0 is the data as they are and the others are bootstrap resamples of people.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1024  # rows of a distance matrix at hand at a time: 20,000 against 20,000 need 160 MB and not 3.2 GB


class TooFew(ValueError):
    """A metric was given fewer images, people or pixels than it needs; the text says which and how many."""


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB with data range 1, per image: [B]. Identical images give inf."""
    return -10 * torch.log10((a - b).square().mean(dim=(1, 2, 3)))


def ssim(a: Tensor, b: Tensor, border: bool = True) -> Tensor:
    """Structural similarity (Wang et al. 2004) with data range 1, per image: [B]; Gaussian window 11 wide, sigma 1.5.

    The values are torchmetrics', which counts a border of mirrored pixels; training leaves the border out. By hand,
    because torchmetrics takes eight seconds to import, and the blur is fast as a banded matrix on either side.
    """
    return _ssim(a, b, border)[0]


def _ssim(a: Tensor, b: Tensor, border: bool = True) -> tuple[Tensor, Tensor]:
    """SSIM, and its contrast-structure factor alone, each [B]."""
    if border:
        a, b = (F.pad(x, [5] * 4, mode="reflect") for x in (a, b))
    left, right = gaussian_band(a.shape[2], a.dtype, a.device), gaussian_band(a.shape[3], a.dtype, a.device).T

    def blur(x: Tensor) -> Tensor:
        return left @ x @ right

    mu_a, mu_b, aa, bb, ab = blur(torch.cat([a, b, a * a, b * b, a * b])).chunk(5)
    var_a, var_b, cov = aa - mu_a * mu_a, bb - mu_b * mu_b, ab - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * cov + c2) / (var_a + var_b + c2)
    value = (2 * mu_a * mu_b + c1) / (mu_a**2 + mu_b**2 + c1) * structure
    if border:  # torchmetrics leaves it out of this factor alone
        structure = structure[..., 5:-5, 5:-5]
    return value.mean(dim=(1, 2, 3)), structure.mean(dim=(1, 2, 3))


@lru_cache
def gaussian_band(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n - 10, n]: row i holds a Gaussian window of sigma 1.5 over pixels i .. i + 10."""
    tap = torch.exp(-0.5 * (torch.arange(11) - 5).square() / 1.5**2)
    rows = torch.arange(n - 10)[:, None]
    band = torch.zeros(n - 10, n).scatter_(1, rows + torch.arange(11), (tap / tap.sum()).expand(n - 10, 11))
    return band.to(device, dtype)


def unit(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], clamped: the range in which PSNR and SSIM are taken."""
    return (x.float().clamp(-1, 1) + 1) / 2


def unpaired(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean (PSNR, SSIM) of image i of a against the unrelated image i of b: says how alike two strangers are."""
    return psnr(a, b).mean().item(), ssim(a, b).mean().item()


def ms_ssim(a: Tensor, b: Tensor, border: bool = True) -> Tensor:
    """Multi-scale SSIM (Wang et al. 2003), per image: [B]; as many of its five scales as the images' side allows.

    Five scales need 176 pixels, four 99, three 44 (torchmetrics, whose values these are: side // (scales - 1)^2 above
    10). `border` as in `ssim`.
    """
    betas = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
    scales = next(n for n in (5, 4, 3, 2) if min(a.shape[-2:]) // (n - 1) ** 2 > 10)
    value = torch.ones(len(a), dtype=a.dtype, device=a.device)
    for i, beta in enumerate(betas[:scales]):
        whole, structure = _ssim(a, b, border)
        factor = whole if i == scales - 1 else structure
        value = value * factor.clamp(min=1e-6) ** (beta / sum(betas[:scales]))  # negative ones count as none
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def resample_people(people: Sequence[str], resamples: int, seed: int) -> Tensor:
    """How often each image enters each bootstrap resample of the *people*: float64 [N, 1 + resamples], column 0 all 1.

    Slices of one person are no independent observations; a bootstrap over slices would give intervals far too narrow.
    """
    names, which = np.unique(np.asarray(people), return_inverse=True)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples).T  # [people, resamples]
    return torch.from_numpy(np.concatenate([np.ones((len(names), 1)), times], axis=1)[which])


def interval(values: Tensor | np.ndarray, low: float = -math.inf, high: float = math.inf) -> tuple[float, float, float]:
    """(value, low end, high end of the 95 % interval) of [1 + resamples] numbers, the first of all the data.

    Value ± 1.96 standard deviations of the resamples, within the metric's own range. Not their percentiles: a resample
    holds people twice, which moves distances and coverages to one side, so only its spread can be used.
    """
    values = np.asarray(values, dtype=np.float64)
    value, sd = float(values[0]), float(np.nanstd(values[1:], ddof=1))
    return value, max(low, value - 1.96 * sd), min(high, value + 1.96 * sd)


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    """[N], [N, R] -> [R]."""
    return x.double() @ weights / weights.sum(0)


# ---------------------------------------------------------------------------------------------------------------------
# Distances between sets of features


def frechet(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Fréchet distance of two Gaussians fitted to the features (Heusel et al. 2017): [R].

    tr sqrt(Sx Sy) is the nuclear norm of A B^T, where A^T A = Sx and B^T B = Sy: no matrix root is taken, whatever the
    rank. A are the centred features over sqrt(n - 1), or something smaller with the same A^T A.
    """

    def moments(f: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = w @ f / w.sum()
        a = (f - mean) * (w / (w.sum() - 1)).sqrt()[:, None]
        if len(a) > a.shape[1]:
            values, vectors = torch.linalg.eigh(a.T @ a)
            kept = values > values[-1] * 1e-14 * len(values)  # the rest is rounding of zero
            a = (values * kept).sqrt()[:, None] * vectors.T
        return mean, a.square().sum(), a

    out = []
    for r in range(wx.shape[1]):
        (mx, tx, a), (my, ty, b) = moments(x, wx[:, r]), moments(y, wy[:, r])
        out.append((mx - my).square().sum() + tx + ty - 2 * torch.linalg.svdvals(a @ b.T).sum())
    return torch.stack(out)


def kernel_distance(x: Tensor, y: Tensor, wx: Tensor, wy: Tensor) -> Tensor:
    """Unbiased squared MMD with the kernel (a.b / D + 1)^3, KID's (Binkowski et al. 2018): [R].

    An image is never compared with itself, nor with its copies in a resample. Slices of one person are compared, as KID
    does: between sets of few people it is above 0 even if they come from one population, and so is its floor.
    """

    def mean(a: Tensor, b: Tensor, wa: Tensor, wb: Tensor, same: bool) -> Tensor:
        total = torch.zeros(wa.shape[1], dtype=torch.float64, device=a.device)
        for i in range(0, len(a), BLOCK):
            k = (a[i : i + BLOCK] @ b.T / a.shape[1] + 1) ** 3
            if same:
                k.diagonal(i).zero_()
            total += (wa[i : i + BLOCK] * (k @ wb)).sum(0)
        pairs = wa.sum(0) * wb.sum(0) - (wa.square().sum(0) if same else 0)
        return total / pairs

    return mean(x, x, wx, wx, True) + mean(y, y, wy, wy, True) - 2 * mean(x, y, wx, wy, False)


def distances_to(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of two sets of points: [n, D], [m, D] -> [n, m]."""
    square = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * x @ y.T
    return square.clamp_(min=0).sqrt_()


def radii(x: Tensor, people: Sequence[str], k: int) -> Tensor:
    """Distance of each point to its k-th nearest among the slices of *other* people: [N].

    The nearest slices of one's own head are a millimetre away. With them the balls would be so small that no other
    person falls into any, and precision of real people would look poor.
    """
    if len(x) <= k:
        raise TooFew(f"a neighbourhood takes {k} slices of other people, and a set holds {len(x)} in all")
    own = torch.from_numpy(np.unique(np.asarray(people), return_inverse=True)[1]).to(x.device)
    out = []
    for i in range(0, len(x), BLOCK):
        d = distances_to(x[i : i + BLOCK], x)
        d[own[i : i + BLOCK, None] == own[None]] = math.inf
        out.append(d.kthvalue(k, dim=1).values)
    r = torch.cat(out)
    if not r.isfinite().all():
        raise TooFew(f"a neighbourhood takes {k} slices of other people, and a set holds fewer")
    return r


def precision_recall(
    real: Tensor, fake: Tensor, real_people: Sequence[str], fake_people: Sequence[str], wr: Tensor, wf: Tensor,
    k: int = 5,
) -> dict[str, Tensor]:  # fmt: skip
    """precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020), each [R].

    Balls reach to the k-th nearest slice of another person (`radii`); in resamples they keep their size.
    """
    r_real, r_fake = radii(real, real_people, k), radii(fake, fake_people, k)
    hits: dict[str, list[Tensor]] = {name: [] for name in ("precision", "density", "recall", "coverage")}
    for i in range(0, len(fake), BLOCK):
        balls = (distances_to(fake[i : i + BLOCK], real) <= r_real).double() @ wr  # [b, R]: real balls around each fake
        hits["precision"].append((balls > 0).double())
        hits["density"].append(balls / k)
    for i in range(0, len(real), BLOCK):
        d = distances_to(real[i : i + BLOCK], fake)  # [b, M]
        hits["recall"].append(((d <= r_fake).double() @ wf > 0).double())
        hits["coverage"].append(((d <= r_real[i : i + BLOCK, None]).double() @ wf > 0).double())
    over = {"precision": wf, "density": wf, "recall": wr, "coverage": wr}
    return {name: (torch.cat(h) * over[name]).sum(0) / over[name].sum(0) for name, h in hits.items()}


def auc_between_people(features: Tensor, labels: Tensor, people: Sequence[str], weights: Tensor, k: int = 15) -> Tensor:
    """How far k nearest neighbours among *other* people tell the classes apart: AUC (one against the rest): [R].

    features [N, D], labels int64 [N] of at least two classes. 0.5 is chance.
    """
    own = torch.from_numpy(np.unique(np.asarray(people), return_inverse=True)[1])
    if min(len(own[labels == c].unique()) for c in labels.unique()) < 2:
        raise TooFew("telling the classes apart takes at least two people of each")
    votes = []
    for i in range(0, len(features), BLOCK):
        d = distances_to(features[i : i + BLOCK], features)
        d[own[i : i + BLOCK, None] == own[None]] = math.inf
        nearest, index = d.topk(min(k, d.shape[1]), largest=False)
        seen = F.one_hot(labels[index], int(labels.max()) + 1).double() * nearest.isfinite()[..., None]
        votes.append(seen.sum(1) / seen.sum((1, 2)).clamp(min=1)[:, None])
    return auc(torch.cat(votes), labels, weights)


def auc(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Area under the ROC curve: [R]. scores [N, classes], labels int64 [N]; over two classes the mean of one against
    the rest. A resample without one of the classes gives NaN.
    """
    classes = labels.unique().tolist()
    columns = classes[1:] if len(classes) == 2 else classes
    return torch.stack([_auc(scores[:, c].double(), labels == c, weights) for c in columns]).mean(0)


def _auc(score: Tensor, positive: Tensor, weights: Tensor) -> Tensor:
    """Weighted Mann-Whitney statistic, ties counted half; for all resamples in one sort."""
    order = score.argsort()
    score, pos, neg = score[order], weights[order] * positive[order, None], weights[order] * ~positive[order, None]
    _, tie = score.unique_consecutive(return_inverse=True)
    groups = int(tie[-1]) + 1
    p = torch.zeros(groups, weights.shape[1], dtype=torch.float64).index_add_(0, tie, pos)
    n = torch.zeros(groups, weights.shape[1], dtype=torch.float64).index_add_(0, tie, neg)
    below = n.cumsum(0) - n
    return (p * (below + n / 2)).sum(0) / (p.sum(0) * n.sum(0))


# ---------------------------------------------------------------------------------------------------------------------
# Radial power spectrum


def power_spectrum(x: Tensor) -> Tensor:
    """log10 of the power at each spatial frequency 1 ... S/2 - 1 cycles per image, averaged over angles: [N, S/2 - 1].

    x [N, 1, S, S]. Power below 1e-12 of the image's own total counts as that, so that empty frequencies stay finite.
    """
    s = x.shape[-1]
    f = torch.fft.fftfreq(s, 1 / s, device=x.device)
    ring = (f[:, None] ** 2 + f[None] ** 2).sqrt().round().long().flatten()
    power = torch.fft.fft2(x[:, 0]).abs().square().flatten(1).double()
    total = torch.zeros(len(x), int(ring.max()) + 1, dtype=torch.float64, device=x.device)
    mean = total.index_add(1, ring, power) / ring.bincount().clamp(min=1)
    return mean[:, 1 : s // 2].clamp(min=1e-12 * power.sum(1, keepdim=True) + 1e-30).log10()


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def align(x: Tensor) -> Tensor:
    """Move the brain's centre of mass to the middle of the image, and set its brightness: [N, 1, H, W] in [0, 1].

    So that a copy that was shifted or made brighter is compared where it was taken from. The centre is that of what is
    lit (above a fifth of the 99th percentile), whose mean becomes 0.5.
    """
    peak = x.flatten(1).float().quantile(0.99, dim=1).clamp(min=1e-3)[:, None, None, None]
    lit = (x > 0.2 * peak).float()
    mass = lit.sum((2, 3), keepdim=True).clamp(min=1)
    theta = torch.zeros(len(x), 2, 3, device=x.device)
    theta[:, 0, 0] = theta[:, 1, 1] = 1
    for row, n, dim in ((0, x.shape[3], 3), (1, x.shape[2], 2)):
        at = (torch.arange(n, device=x.device) * 2 + 1) / n - 1  # centres of pixels in grid_sample's coordinates
        at = at.view([1, 1, 1, n] if dim == 3 else [1, 1, n, 1])
        theta[:, row, 2] = ((lit * at).sum((2, 3), keepdim=True) / mass).flatten()
    mean = ((x * lit).sum((2, 3), keepdim=True) / mass).clamp(min=1e-3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x * (0.5 / mean), grid, align_corners=False).clamp(0, 1)


def thumbnails(x: Tensor, side: int = 24) -> Tensor:
    """Aligned images as points whose squared distance is 2 (1 - correlation of grey values): float32 [N, side^2]."""
    small = F.interpolate(align(x), size=(side, side), mode="area").flatten(1)
    return F.normalize(small - small.mean(1, keepdim=True), dim=1)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """For each point of x the nearest of y: (distance float32 [N], index int64 [N])."""
    best = [distances_to(part, y).min(1) for part in x.split(BLOCK)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


class CopyDetector:
    """Is an image a copy of a training slice?

    It is where its nearest training slice is closer than the `quantile` of the same distance of people who were held
    out. Two distances, and either suffices: between aligned thumbnails, where mirrored training slices count too; and,
    where `encode` gives latents [N, D] of aligned images, between latents. Distances are in units of their threshold:
    below 1 is a copy.
    """

    def __init__(
        self, train: Tensor, held_out: Tensor, encode: Callable[[Tensor], Tensor] | None = None, quantile: float = 0.01,
        on_batch: Callable[[int], None] = lambda n: None,
    ):  # fmt: skip
        """train and held_out: uint8 [N, S, S]; `on_batch` hears how many images were embedded."""
        if len(held_out) < 100:
            raise TooFew(
                f"the threshold for copies is the 1st percentile of held-out slices: it needs 100, not {len(held_out)}"
            )
        self.spaces = {"pixel": thumbnails, **({"latent": lambda x: encode(align(x))} if encode else {})}
        self.on_batch = on_batch
        self.train = self.embed(train)
        mirrored = torch.cat([thumbnails(part.flip(3)) for part in batches(train)])
        self.train["pixel"] = torch.cat([self.train["pixel"], mirrored])
        self.count, self.quantile, self.threshold = len(train), quantile, dict.fromkeys(self.spaces, 1.0)
        self.held_out, _ = self.distances(held_out)  # in natural units
        self.threshold = {name: d.quantile(quantile).clamp(min=1e-9).item() for name, d in self.held_out.items()}
        self.held_out = {name: d / self.threshold[name] for name, d in self.held_out.items()}

    def embed(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 [N, S, S] -> points of each space."""
        points: dict[str, list[Tensor]] = {name: [] for name in self.spaces}
        for x in batches(images):
            for name, f in self.spaces.items():
                points[name].append(f(x))
            self.on_batch(len(x))
        return {name: torch.cat(p) for name, p in points.items()}

    def distances(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """({space: distance to the nearest training slice / threshold [N]}, index of the closest of both [N])."""
        found = {name: nearest(p, self.train[name]) for name, p in self.embed(images).items()}
        relative = {name: d.cpu() / self.threshold[name] for name, (d, _) in found.items()}
        closest = torch.stack(list(relative.values())).argmin(0)
        index = torch.stack([i.cpu() % self.count for _, i in found.values()])
        return relative, index.gather(0, closest[None])[0]


def is_copy(distances: dict[str, Tensor]) -> Tensor:
    """bool [N] from `CopyDetector.distances`: closer than the threshold in any space."""
    return torch.stack(list(distances.values())).amin(0) < 1


def batches(images: Tensor, size: int = 64) -> Iterator[Tensor]:
    """uint8 [N, S, S] -> float [B, 1, S, S] in [0, 1]."""
    return (part[:, None].float() / 255 for part in images.split(size))
