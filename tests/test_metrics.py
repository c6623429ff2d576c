"""Every metric means one thing: against NumPy, SciPy, scikit-learn and torchmetrics, and on data made to move it."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image import (
    FrechetInceptionDistance,
    KernelInceptionDistance,
    MultiScaleStructuralSimilarityIndexMeasure,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

import metrics
import phantom
from metrics import psnr, ssim, unit, unpaired

maths = settings(deadline=None, derandomize=True, max_examples=40)


def pictures(n, side=16, seed=0):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


@maths
@given(n=st.integers(1, 4), seed=st.integers(0, 99), noise=st.floats(1e-3, 1))
def test_psnr_against_numpy(n, seed, noise):
    a = pictures(n, seed=seed)
    b = (a + noise * (pictures(n, seed=seed + 100) - 0.5)).clamp(0, 1)
    mse = ((a.double().numpy() - b.double().numpy()) ** 2).reshape(n, -1).mean(1)
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(1 / mse), rtol=1e-5, atol=1e-3)


def test_psnr_of_known_pairs():
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([a[0] + 0.1, a[0] + 1])
    assert psnr(a, b).tolist() == pytest.approx([20, 0], abs=1e-4)  # errors of a tenth and of the whole range
    assert psnr(a, a).tolist() == [math.inf, math.inf]


def test_psnr_against_torchmetrics():
    a, b = pictures(1), pictures(1, seed=1)
    assert psnr(a, b).item() == pytest.approx(PeakSignalNoiseRatio(data_range=1.0)(a, b).item(), rel=1e-5)


def test_data_range_is_fixed_not_taken_from_the_images():
    a, b = pictures(2), pictures(2, seed=1)
    torch.testing.assert_close(psnr(a / 10, b / 10), psnr(a, b) + 20)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_ssim_is_per_image_and_torchmetrics(n):
    a = pictures(n)
    b = (a + 0.2 * pictures(n, seed=1)).clamp(0, 1)
    got = ssim(a, b)
    assert got.shape == (n,)  # also for a batch of one
    for i in range(n):
        class_ = StructuralSimilarityIndexMeasure(data_range=1.0, sigma=1.5, kernel_size=11)
        assert got[i].item() == pytest.approx(class_(a[i : i + 1], b[i : i + 1]).item(), abs=1e-5)


def test_ssim_of_known_pairs():
    a = pictures(2)
    assert ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-5)
    flat = ssim(torch.full((1, 1, 16, 16), 0.2), torch.full((1, 1, 16, 16), 0.6)).item()
    assert flat == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-4)  # luminance alone


@maths
@given(values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20))
def test_unit_maps_and_clamps(values):
    got = unit(torch.tensor(values))
    np.testing.assert_allclose(got, (np.clip(np.array(values), -1, 1) + 1) / 2, atol=1e-6)
    assert got.dtype == torch.float32


def test_unit_returns_float32_and_leaves_its_input():
    x = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.bfloat16)
    assert unit(x).tolist() == [0.0, 0.5, 1.0] and unit(x).dtype == torch.float32
    assert x.tolist() == [-3.0, 0.0, 3.0]


def test_unpaired_is_the_mean_over_pairs_by_index():
    a, b = pictures(4), pictures(4, seed=1)
    got = unpaired(a, b)
    one_by_one = [(psnr(a[i : i + 1], b[i : i + 1]).item(), ssim(a[i : i + 1], b[i : i + 1]).item()) for i in range(4)]
    assert got == pytest.approx(np.mean(one_by_one, axis=0).tolist(), rel=1e-5)
    assert all(isinstance(v, float) for v in got)
    assert unpaired(a, a.flip(0))[0] < unpaired(a, (a + 0.01).clamp(0, 1))[0]  # strangers are less alike


@pytest.mark.parametrize("size", [64, 128, 256])
def test_ms_ssim_orders_pairs_at_every_size(size):
    a = pictures(2, size)
    near = (a + 0.1 * (pictures(2, size, seed=1) - 0.5)).clamp(0, 1)
    assert metrics.ms_ssim(a, a).tolist() == pytest.approx([1, 1], abs=1e-5)
    close, far = metrics.ms_ssim(a, near), metrics.ms_ssim(a, pictures(2, size, seed=2))
    assert close.shape == (2,) and (close > 0.9).all() and (far < 0.5).all()


def test_ms_ssim_is_torchmetrics_where_five_scales_fit():
    a = pictures(2, 256)
    b = (0.6 * a + 0.4 * pictures(2, 256, seed=1)).clamp(0, 1)
    got = metrics.ms_ssim(a, b)
    for i in range(2):
        metric = MultiScaleStructuralSimilarityIndexMeasure(data_range=1.0, sigma=1.5, normalize="relu")
        # The weights of the paper sum to 1.0001, here to 1.
        assert got[i].item() == pytest.approx(metric(a[i : i + 1], b[i : i + 1]).item(), abs=1e-4)


@pytest.mark.parametrize("size", [42, 96, 168])
def test_ms_ssim_between_the_usual_sizes(size):
    a = pictures(1, size)
    assert metrics.ms_ssim(a, a).item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Features: Gaussian, with person effects where people matter


def points(n, d=6, seed=0, shift=0.0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, (n, d)))


def crowd(people, slices, d, seed, noise=0.3):
    """(features [people * slices, d], person of each): every person a Gaussian point, slices around it."""
    rng = np.random.default_rng(seed)
    x = np.repeat(rng.normal(size=(people, d)), slices, axis=0)
    return torch.from_numpy(x + rng.normal(0, noise, x.shape)), np.repeat(np.arange(people), slices)


def ones(x, columns=1):
    return torch.ones(len(x), columns, dtype=torch.float64)


def column(weights):
    return torch.tensor(weights, dtype=torch.float64)[:, None]


def repeated(x, weights):
    return x[torch.from_numpy(np.repeat(np.arange(len(x)), weights))]


class AsTheyAre(torch.nn.Module):
    """Feature extractor of torchmetrics for images that are features already."""

    def __init__(self, d):
        super().__init__()
        self.num_features = d

    def forward(self, x):
        return x.flatten(1)


def frechet(x, y):
    return metrics.frechet(x, y, ones(x), ones(y)).item()


def kernel(x, y):
    return metrics.kernel_distance(x, y, ones(x), ones(y)).item()


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 8), (200, 300, 12), (10, 14, 40)])
def test_frechet_against_torchmetrics_and_numpy(n, m, d):
    mix = points(d, d, seed=9)
    x, y = points(n, d), points(m, d, seed=1, shift=0.3) @ mix / 3
    got = frechet(x, y)
    metric = FrechetInceptionDistance(AsTheyAre(d)).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert got == pytest.approx(metric.compute().item(), rel=1e-4)
    sx, sy = np.cov(x.numpy().T), np.cov(y.numpy().T)
    means = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    eig = np.sqrt(np.linalg.eigvals(sx @ sy).real.clip(0)).sum()
    assert got == pytest.approx(means + np.trace(sx) + np.trace(sy) - 2 * eig, rel=1e-5)
    if n > d:  # the root of a matrix without full rank is not to be trusted
        root = np.trace(scipy.linalg.sqrtm(sx @ sy)).real
        assert got == pytest.approx(means + np.trace(sx) + np.trace(sy) - 2 * root, rel=1e-8)


@maths
@given(
    n=st.integers(2, 12), d=st.integers(1, 9), seed=st.integers(0, 99),
    shift=st.floats(-5, 5), scale=st.floats(0, 3),
)  # fmt: skip
def test_frechet_of_known_pairs(n, d, seed, shift, scale):
    x = points(n, d, seed)
    total = x.var(0).sum().item()
    close = {"rel": 1e-9, "abs": 1e-9}
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, x + shift) == pytest.approx(d * shift**2, **close)
    centred = x - x.mean(0)
    assert frechet(centred, scale * centred) == pytest.approx((1 - scale) ** 2 * total, **close)
    y = points(n + 3, d, seed + 100)
    assert frechet(x, y) == pytest.approx(frechet(y, x), **close)


def test_kernel_distance_against_torchmetrics_and_loops():
    x, y = points(40, 5), points(40, 5, seed=1, shift=0.4)
    got = kernel(x, y)
    with pytest.warns(UserWarning, match="memory"):
        metric = KernelInceptionDistance(AsTheyAre(5), subsets=1, subset_size=40).set_dtype(torch.float64)
    metric.update(x, real=True)
    metric.update(y, real=False)
    assert got == pytest.approx(metric.compute()[0].item(), rel=1e-4)
    assert got == pytest.approx(looped_mmd(x.numpy(), y.numpy()[:40]), rel=1e-10)
    assert kernel(x, y[:23]) == pytest.approx(looped_mmd(x.numpy(), y.numpy()[:23]), rel=1e-10)


def looped_mmd(x, y, x_image=None, y_image=None):
    """Unbiased squared MMD by double loops; rows of the same image are never compared."""

    def mean(a, b, ia, ib):
        pairs = [(a[i] @ b[j] / a.shape[1] + 1) ** 3 for i in range(len(a)) for j in range(len(b)) if ia[i] != ib[j]]
        return sum(pairs) / len(pairs)

    ix = range(len(x)) if x_image is None else x_image
    iy = range(len(y)) if y_image is None else y_image
    return mean(x, x, ix, ix) + mean(y, y, iy, iy) - 2 * mean(x, y, [-1] * len(x), iy)


def brute_precision_recall(real, fake, real_people, fake_people, k, wr=None, wf=None):
    """One number each, by comparing everything with everything."""
    real, fake, rp, fp = real.numpy(), fake.numpy(), np.asarray(real_people), np.asarray(fake_people)

    def radius(x, p):
        return np.array([np.sort(cdist(x[[i]], x[p != p[i]])[0])[k - 1] for i in range(len(x))])

    # Radii are those of all the data; weighted sets are made by repeating rows.
    r = np.repeat(np.arange(len(real)), np.ones(len(real), int) if wr is None else wr)
    f = np.repeat(np.arange(len(fake)), np.ones(len(fake), int) if wf is None else wf)
    d = cdist(real, fake)[r][:, f]
    in_real, in_fake = d <= radius(real, rp)[r][:, None], d <= radius(fake, fp)[f][None]
    return {
        "precision": in_real.any(0).mean(), "recall": in_fake.any(1).mean(),
        "density": in_real.sum(0).mean() / k, "coverage": in_real.any(1).mean(),
    }  # fmt: skip


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_against_brute_force(k):
    # Every image its own person: the metrics of the papers.
    real, fake = points(70, 4), points(50, 4, seed=1, shift=0.5)
    got = metrics.precision_recall(real, fake, range(70), range(50), ones(real), ones(fake), k)
    want = brute_precision_recall(real, fake, range(70), range(50), k)
    assert set(got) == set(want) and 0.05 < want["precision"] < 0.95
    assert {name: v.item() for name, v in got.items()} == pytest.approx(want, abs=1e-9)
    neighbours = NearestNeighbors(n_neighbors=k + 1).fit(real.numpy()).kneighbors(real.numpy())[0][:, k]
    np.testing.assert_allclose(metrics.radii(real, range(70), k), neighbours, rtol=1e-9)


def test_precision_recall_leaves_out_the_own_person():
    (real, rp), (fake, fp) = crowd(15, 4, 3, 0), crowd(12, 5, 3, 1)
    names = [f"P{i:03d}" for i in rp]  # people are named by strings, in any order
    order = np.random.default_rng(0).permutation(60)
    got = metrics.precision_recall(
        real[order], fake, [names[i] for i in order], fp, ones(real), ones(fake), 4
    )  # fmt: skip
    want = brute_precision_recall(real, fake, rp, fp, 4)
    assert {name: v.item() for name, v in got.items()} == pytest.approx(want, abs=1e-9)
    assert want != pytest.approx(brute_precision_recall(real, fake, range(60), range(60), 4), abs=0.05)


def test_radii_take_enough_other_people():
    with pytest.raises(metrics.TooFew, match="5 slices of other people"):
        metrics.radii(points(12), [0] * 8 + [1] * 4, 5)  # eight have four others
    assert metrics.radii(points(13), [0] * 8 + [1] * 5, 5).isfinite().all()


def test_radii_of_fewer_points_than_neighbours():
    with pytest.raises(metrics.TooFew):
        metrics.radii(points(4), range(4), 5)


def test_blocks_do_not_change_results(monkeypatch):
    (x, px), (y, py) = crowd(12, 3, 4, 0), crowd(10, 4, 4, 1)
    wx, wy = metrics.resample_people(px, 3, 0), metrics.resample_people(py, 3, 1)
    labels = torch.from_numpy(px % 3)

    def everything():
        out = metrics.precision_recall(x, y, px, py, wx, wy)
        out["kernel"] = metrics.kernel_distance(x, y, wx, wy)
        out["radii"], out["auc"] = metrics.radii(x, px, 5), metrics.auc_between_people(x, labels, px, wx)
        out["nearest"], index = metrics.nearest(x, y)
        return out | {"index": index.double()}

    whole = everything()
    for block in (1, 7, 36):
        monkeypatch.setattr(metrics, "BLOCK", block)
        for name, got in everything().items():
            torch.testing.assert_close(got, whole[name], rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)


counts = st.lists(st.integers(0, 3), min_size=9, max_size=9).filter(lambda w: sum(x > 0 for x in w) > 1)


@maths
@given(wx=counts, wy=counts, seed=st.integers(0, 99))
def test_weighted_distances_are_those_of_repeated_data(wx, wy, seed):
    x, y = points(9, 4, seed), points(9, 4, seed + 100, shift=0.5)
    # Weights in the second column: the first must not leak into it.
    wide = [torch.cat([ones(x), column(w)], 1) for w in (wx, wy)]
    rx, ry = repeated(x, wx), repeated(y, wy)
    got = metrics.frechet(x, y, *wide)
    assert got[0].item() == pytest.approx(frechet(x, y), rel=1e-9, abs=1e-9)
    # Fewer images than features leave eigenvalues of about 1e-16 instead of 0, whose roots count (found: 2e-8).
    full = min(sum(n > 0 for n in w) for w in (wx, wy)) > x.shape[1]
    assert got[1].item() == pytest.approx(frechet(rx, ry), rel=1e-9 if full else 2e-7, abs=1e-9 if full else 2e-7)
    got = metrics.kernel_distance(x, y, *wide)
    images = [np.repeat(np.arange(9), w) for w in (wx, wy)]
    assert got[0].item() == pytest.approx(kernel(x, y), rel=1e-9, abs=1e-9)
    assert got[1].item() == pytest.approx(looped_mmd(rx.numpy(), ry.numpy(), *images), rel=1e-9, abs=1e-9)
    mean = metrics.weighted_mean(x[:, 0], wide[0])
    assert mean.tolist() == pytest.approx([x[:, 0].mean().item(), rx[:, 0].mean().item()], rel=1e-9, abs=1e-12)


@maths
@given(wr=counts, wf=counts, seed=st.integers(0, 99), k=st.integers(1, 4))
def test_weighted_precision_recall_is_that_of_repeated_data(wr, wf, seed, k):
    real, fake = points(9, 3, seed), points(9, 3, seed + 100)
    people = [0, 0, 1, 1, 2, 3, 4, 5, 6]
    weights = [torch.cat([ones(real), column(w)], 1) for w in (wr, wf)]
    got = metrics.precision_recall(real, fake, people, people, *weights, k)
    for r, w in enumerate(((None, None), (wr, wf))):
        want = brute_precision_recall(real, fake, people, people, k, *w)
        assert {name: v[r].item() for name, v in got.items()} == pytest.approx(want, abs=1e-9)


@maths
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=25).filter(
        lambda rows: {label for _, label, w in rows if w} == {False, True}
    )
)
def test_auc_is_scikit_learns_with_ties_and_weights(rows):
    score, label, weight = (np.array(c) for c in zip(*rows))
    scores = torch.from_numpy(np.stack([4 - score, score], 1) / 4)
    labels = torch.from_numpy(label.astype(np.int64))
    got = metrics.auc(scores, labels, torch.cat([ones(labels), column(weight.tolist())], 1))
    assert got[0].item() == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert got[1].item() == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-12)


def test_auc_of_three_classes_and_of_a_resample_without_one():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 90)
    score = rng.integers(0, 5, (90, 3)) + 2 * np.eye(3, dtype=int)[label]
    weight = rng.integers(0, 4, 90)
    weights = torch.cat([ones(label), column(weight.tolist()), column((label > 0).tolist())], 1)
    got = metrics.auc(torch.from_numpy(score), torch.from_numpy(label), weights)
    for r, w in enumerate((None, weight)):
        want = np.mean([roc_auc_score(label == c, score[:, c], sample_weight=w) for c in range(3)])
        assert got[r].item() == pytest.approx(want, abs=1e-12)
    assert got[2].isnan() and 0.6 < got[0] < 0.95


@pytest.mark.parametrize(("people", "slices", "classes"), [(20, 4, 2), (21, 3, 3), (5, 3, 2)])
def test_auc_between_people_against_brute_force(people, slices, classes):
    # The last crowd has twelve slices of others, fewer than k.
    x, p = crowd(people, slices, 3, 5)
    label = p % classes
    x[:, 0] += torch.from_numpy(label)
    votes = []
    for i, d in enumerate(cdist(x.numpy(), x.numpy())):
        others = [j for j in np.argsort(d) if p[j] != p[i]][:15]
        votes.append(np.bincount(label[others], minlength=classes) / len(others))
    votes = np.array(votes)
    weights = metrics.resample_people(p, 4, 1)
    if people == 5:
        weights = weights[:, :1]  # resamples of five may lack a class
    got = metrics.auc_between_people(x, torch.from_numpy(label), p, weights)
    for r in range(weights.shape[1]):
        w = weights[:, r].numpy()
        want = [roc_auc_score(label == c, votes[:, c], sample_weight=w) for c in range(classes)]
        assert got[r].item() == pytest.approx(np.mean(want), abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


@maths
@given(people=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), seed=st.integers(0, 99))
def test_resample_people_draws_whole_people(people, seed):
    weights = metrics.resample_people(people, 12, seed)
    assert weights.shape == (len(people), 13) and weights.dtype == torch.float64
    assert (weights[:, 0] == 1).all() and (weights >= 0).all() and (weights == weights.round()).all()
    of = {name: weights[people.index(name)] for name in people}
    for name, row in zip(people, weights):
        assert torch.equal(row, of[name])
    assert (sum(of.values()) == len(of)).all()
    assert torch.equal(weights, metrics.resample_people(people, 12, seed))


def test_resamples_depend_on_the_seed():
    people = list(range(20))
    a, b = metrics.resample_people(people, 5, 0), metrics.resample_people(people, 5, 1)
    assert not torch.equal(a, b)
    assert 0.25 < (metrics.resample_people(people, 200, 0) == 0).double().mean() < 0.45  # about 1/e are left out


def test_interval_is_the_spread_of_resamples_around_the_value():
    values = np.array([3.0, *np.random.default_rng(0).normal(7, 2, 50)])  # resamples off to one side
    sd = values[1:].std(ddof=1)
    assert metrics.interval(torch.from_numpy(values)) == pytest.approx((3, 3 - 1.96 * sd, 3 + 1.96 * sd))
    assert metrics.interval(values, 1, 4) == (3, 1, 4)
    # A resample without one of the classes has no AUC.
    assert metrics.interval([*values, math.nan]) == pytest.approx((3, 3 - 1.96 * sd, 3 + 1.96 * sd))


def test_intervals_by_people_hold_the_truth_and_those_by_slice_do_not():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(20), 10)
    weights = {"people": metrics.resample_people(people, 200, 0), "slices": metrics.resample_people(range(200), 200, 0)}
    held = dict.fromkeys(weights, 0)
    for _ in range(200):
        x = torch.from_numpy(rng.normal(size=20)[people] + rng.normal(0, 0.3, 200))  # the true mean is 0
        for name, w in weights.items():
            _, low, high = metrics.interval(metrics.weighted_mean(x, w))
            held[name] += low <= 0 <= high
    # Expected with 20 people: about 93 %; with "200 independent slices" about 45 %. sd of a share of 200: 2 to 4 %.
    assert 0.88 <= held["people"] / 200 <= 0.99
    assert held["slices"] / 200 < 0.75


# ---------------------------------------------------------------------------------------------------------------------
# Do the metrics move when the images get worse?


def test_halves_of_people_are_at_the_floor_and_damage_is_far_above_it():
    # One slice per person; the next test has several.
    x, px = crowd(300, 1, 8, 0)
    y, py = crowd(300, 1, 8, 1)
    z, _ = crowd(300, 1, 8, 2)
    weights = metrics.resample_people(px, 100, 0), metrics.resample_people(py, 100, 1)
    _, low, high = metrics.interval(metrics.kernel_distance(x, y, *weights))
    assert low <= 0 <= high
    floor = frechet(x, y)
    assert 0.5 < frechet(x, z) / floor < 2
    point = y[:1].expand(300, -1)
    for worse in (y + 0.5, point, 0.3 * y):
        assert frechet(x, worse) > 5 * floor
        assert kernel(x, worse) > 2 * high
    # More damage, more distance.
    assert frechet(x, y + 1) > 2 * frechet(x, y + 0.5) and kernel(x, y + 1) > 2 * kernel(x, y + 0.5)


def test_several_slices_per_person_lift_the_kernel_distance():
    # Its docstring warns of this: pairs of slices of one person enter the means within a set. Compare with a floor.
    several, single = [], []
    for seed in range(20):
        (x, _), (y, _) = crowd(60, 5, 16, 2 * seed), crowd(60, 5, 16, 2 * seed + 1)
        several.append(kernel(x, y))
        single.append(kernel(x[::5], y[::5]))
    assert min(several) > 0.05  # found: 0.20 on average, sd 0.04
    assert abs(np.mean(single)) < 3 * np.std(single) / math.sqrt(20)
    assert max(several) < 3 * np.median(several)  # the floor is about the same whoever is drawn


def test_precision_and_recall_tell_collapse_from_noise():
    (real, rp), (good, gp) = crowd(60, 4, 4, 0), crowd(60, 4, 4, 1)

    def measured(fake, people):
        got = metrics.precision_recall(real, fake, rp, people, ones(real), ones(fake))
        return {name: v.item() for name, v in got.items()}

    floor = measured(good, gp)
    assert floor["precision"] > 0.7 and floor["recall"] > 0.7 and floor["coverage"] > 0.6
    # All images close to one real person near the middle of the crowd.
    middle = real[real.square().sum(1).argmin()]
    collapsed = measured(middle + 0.05 * points(240, 4, seed=3), range(240))
    assert collapsed["precision"] > 0.95 and collapsed["density"] > 1
    assert collapsed["recall"] < 0.05 and collapsed["coverage"] < 0.1
    noise = measured(10 + 3 * points(240, 4, seed=4), range(240))
    assert noise["precision"] < 0.05 and noise["density"] < 0.05 and noise["coverage"] < 0.05


def test_precision_of_real_people_needs_the_radii_of_other_people():
    # 20 nearly identical slices each. Balls among one's own slices are too small for any other person.
    (real, rp), (fake, fp) = crowd(60, 20, 4, 0, noise=0.02), crowd(60, 20, 4, 1, noise=0.02)
    weights = ones(real), ones(fake)
    assert metrics.precision_recall(real, fake, rp, fp, *weights)["precision"].item() > 0.6
    assert metrics.precision_recall(real, fake, range(1200), range(1200), *weights)["precision"].item() < 0.3


def test_auc_between_people_is_blind_to_who_it_is():
    rng = np.random.default_rng(0)
    x, p = crowd(60, 10, 8, 0, noise=0.1)
    label = rng.permutation(np.arange(60) % 2)[p]
    labels = torch.from_numpy(label)
    assert metrics.auc_between_people(x, labels, p, ones(x)).item() == pytest.approx(0.5, abs=0.2)
    assert metrics.auc_between_people(x, labels, range(600), ones(x), k=9).item() > 0.9
    x[:, 0] += 4 * labels
    assert metrics.auc_between_people(x, labels, p, ones(x)).item() > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Radial power spectrum


@maths
@given(cycles=st.integers(1, 15), axis=st.booleans(), phase=st.floats(0, 6))
def test_power_of_a_cosine_is_at_its_frequency(cycles, axis, phase):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(32) / 32 + phase).expand(32, 32)
    x = (wave.T if axis else wave)[None, None].float()
    got = metrics.power_spectrum(0.5 + 0.4 * x)
    assert got.shape == (1, 15) and got.argmax().item() == cycles - 1
    rest = got[0, torch.arange(15) != cycles - 1]
    assert got.max() - rest.max() > 6  # float32 leaks no more than a millionth


def test_power_spectrum_against_numpy():
    x = pictures(2, 24)
    f = np.fft.fftfreq(24, 1 / 24)
    ring = np.hypot(f[:, None], f[None]).round()
    got = metrics.power_spectrum(x)
    for i in range(2):
        power = np.abs(np.fft.fft2(x[i, 0].double().numpy())) ** 2
        np.testing.assert_allclose(got[i], [np.log10(power[ring == k].mean()) for k in range(1, 12)], atol=1e-5)


def test_blur_takes_high_frequencies_and_white_noise_is_flat():
    x = pictures(64, 64)
    blurred = torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, 1.5, 1.5), mode="wrap"))
    sharp, soft = metrics.power_spectrum(x).mean(0), metrics.power_spectrum(blurred).mean(0)
    assert (sharp - soft)[16:].mean() > 1  # 10 dB in the high half
    assert (sharp - soft)[:2].mean() < 0.2
    assert (sharp - sharp.median()).abs().max() < 0.1  # 64 images: the lowest ring's own sd is about 0.02


def test_power_of_a_constant_image_is_finite():
    assert metrics.power_spectrum(torch.full((1, 1, 16, 16), 0.4)).isfinite().all()


def test_power_of_a_black_image_is_finite():
    assert metrics.power_spectrum(torch.zeros(1, 1, 16, 16)).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# Copies


def people(which, slices=4, size=64, seed=3):
    return torch.from_numpy(np.concatenate([phantom.draw_person(seed, i, slices, size)[1] for i in which]))


def floats(images):
    return images[:, None].float() / 255


def bytes_(x):
    return (x[:, 0].clamp(0, 1) * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def heads():
    """uint8 slices of (40 people to train on, 30 held out, 20 fresh ones), four each."""
    return people(range(40)), people(range(40, 70)), people(range(70, 90))


@pytest.fixture(scope="module")
def detector(heads):
    return metrics.CopyDetector(heads[0], np.arange(160) // 4)


def test_thumbnails_forget_place_and_brightness_but_not_the_person(heads):
    x = floats(heads[2][::4])
    plain = metrics.thumbnails(x)
    assert plain.shape == (20, 576) and plain.dtype == torch.float32
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(20))
    small = torch.nn.functional.interpolate(metrics.align(x), size=(24, 24), mode="area").flatten(1)
    np.testing.assert_allclose((plain[0] - plain[1:]).square().sum(1), 2 - 2 * np.corrcoef(small)[0, 1:], atol=1e-5)
    apart = (plain[:, None] - plain[None]).norm(dim=2)[~torch.eye(20, dtype=torch.bool)]
    for dy, dx in ((4, 4), (-4, 1), (0, -4)):  # 4 of 64 pixels: 6 %
        for brightness in (0.8, 1.0, 1.2):
            moved = (x.roll((dy, dx), (2, 3)) * brightness).clamp(0, 1)
            assert (metrics.thumbnails(moved) - plain).norm(dim=1).max() < 0.1  # found: 0.001
    assert apart.min() > 0.12  # found: 0.15


def test_align_centres_and_normalises(heads):
    x = floats(heads[2][::4]).roll((3, -3), (2, 3)) * 0.7
    got = metrics.align(x)
    assert got.shape == x.shape and got.min() >= 0 and got.max() <= 1
    lit = (got > 0.1).float()
    at = torch.arange(64.0) - 31.5
    for dim, shape in ((2, (1, 1, 64, 1)), (3, (1, 1, 1, 64))):
        centre = (lit * at.view(shape)).sum((1, 2, 3)) / lit.sum((1, 2, 3))
        assert centre.abs().max() < 0.75, dim  # pixels
    assert ((got * lit).sum((1, 2, 3)) / lit.sum((1, 2, 3)) - 0.5).abs().max() < 0.05
    assert metrics.align(torch.zeros(2, 1, 16, 16)).isfinite().all()


def test_nearest_against_scipy():
    x, y = points(30, 5).float(), points(40, 5, seed=1).float()
    d, index = metrics.nearest(x, y)
    want = cdist(x.double(), y.double())
    np.testing.assert_array_equal(index, want.argmin(1))
    np.testing.assert_allclose(d, want.min(1), rtol=1e-4)


def test_every_training_slice_is_a_copy_of_itself(heads, detector):
    distances, index = detector.distances(heads[0])
    assert metrics.is_copy(distances).all()
    assert index.tolist() == list(range(160))


@pytest.mark.parametrize("change", ["noise", "shift", "dark", "bright", "mirror", "blur", "all"])
def test_changed_copies_are_still_copies(heads, detector, change):
    x = floats(heads[0])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    if change in ("blur", "all"):
        x = torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), (0, 0, 0.7, 0.7)))
    if change in ("mirror", "all"):
        x = x.flip(3)
    if change in ("shift", "all"):
        x = torch.cat([part.roll(by, (2, 3)) for part, by in zip(x.split(40), ((4, 4), (-4, 3), (0, -4), (2, 0)))])
    x = x * {"dark": 0.85, "all": 0.85, "bright": 1.2}.get(change, 1)
    if change in ("noise", "all"):
        x = x + 0.05 * noise
    distances, index = detector.distances(bytes_(x))
    assert metrics.is_copy(distances).double().mean() >= 0.95  # found: all of them
    assert (index == torch.arange(160)).double().mean() >= 0.95


def test_people_never_seen_are_not_copies(detector):
    distances, _ = detector.distances(people(range(40, 190)))
    assert metrics.is_copy(distances).double().mean() <= 0.02  # found: 0.8 %
    assert metrics.is_copy(detector.between).double().mean() <= 0.02


def test_thresholds_between_people_against_numpy():
    """From the nearest slice of somebody else, mirrored or not: 95 % of people have 98 % of their slices above."""
    x, person = people(range(60)), np.arange(240) // 4
    project = points(64 * 64, 16, seed=3).float()
    detector = metrics.CopyDetector(x, person, lambda x: x.flatten(1) @ project)
    thumbs = [metrics.thumbnails(floats(y)).double().numpy() for y in (x, x.flip(2))]
    latents = (metrics.align(floats(x)).flatten(1) @ project).double().numpy()
    others = person[:, None] != person[None]
    near = {
        "pixel": np.minimum(*(np.where(others, cdist(thumbs[0], t), np.inf).min(1) for t in thumbs)),
        "latent": np.where(others, cdist(latents, latents), np.inf).min(1),
    }
    for space, d in near.items():
        np.testing.assert_allclose(detector.between[space] * detector.threshold[space], d, rtol=1e-3)
        # the same share of slices below the threshold of each space
        assert (d < detector.threshold[space]).mean() == pytest.approx(detector.share, abs=0.01)
    either = np.logical_or(*(d < detector.threshold[space] for space, d in near.items()))
    called = np.bincount(person, either) > 0  # of four slices, any one is more than 2 %
    assert 0 < called.sum() <= 4  # 5 % of 60 people; two can be each other's nearest


def test_nearest_of_other_people():
    x = torch.tensor([[0.0], [1.0], [1.1], [5.0]])
    who = torch.tensor([0, 1, 1, 2])
    d, index = metrics.nearest(x, x, (who, who))
    assert index.tolist() == [1, 0, 0, 2] and torch.allclose(d, torch.tensor([1.0, 1.0, 1.1, 3.9]))


def test_copies_in_latent_space(heads):
    train, _, fresh = heads
    project = points(64 * 64, 32, seed=7).float()
    seen = []
    detector = metrics.CopyDetector(train, np.arange(160) // 4, lambda x: x.flatten(1) @ project, on_batch=seen.append)
    assert sum(seen) == len(train)
    distances, index = detector.distances(train.roll((2, -1), (1, 2)))
    assert set(distances) == {"pixel", "latent"} and (distances["latent"] < 1).double().mean() >= 0.95
    assert index.tolist() == list(range(160))
    # The mirrored are found by their pixels alone.
    distances, index = detector.distances(train.flip(2))
    assert metrics.is_copy(distances).all() and (distances["latent"] < 1).double().mean() < 0.1
    assert metrics.is_copy(detector.distances(fresh)[0]).double().mean() <= 0.05  # found: 2.5 %


def test_is_copy_takes_either_distance():
    distances = {"pixel": torch.tensor([0.5, 2.0, 1.0, 2.0]), "latent": torch.tensor([3.0, 0.9, 1.0, 1.5])}
    assert metrics.is_copy(distances).tolist() == [True, True, False, False]


def test_the_threshold_for_copies_needs_people(heads):
    with pytest.raises(metrics.TooFew, match="not 39 of 10"):
        metrics.CopyDetector(heads[0][:39], np.arange(39) // 4)
    with pytest.raises(metrics.TooFew, match="not 160 of 3"):
        metrics.CopyDetector(heads[0], np.arange(160) % 3)
