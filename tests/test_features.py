"""The metrics' networks: the same on every run, no bother to anybody else's random numbers, and of use on phantoms."""

import numpy as np
import pytest
import scipy.ndimage
import torch

import features
import metrics
import phantom

CPU = torch.device("cpu")
PEOPLE, SLICES = 80, 2
SEEN = torch.arange(PEOPLE * SLICES) < PEOPLE  # slices of the first forty people


def quiet(n):
    return None


@pytest.fixture(scope="module")
def heads():
    """uint8 [160, 64, 64]: eighty people, two slices each."""
    return torch.from_numpy(np.concatenate([phantom.draw_person(31, i, SLICES, 64)[1] for i in range(PEOPLE)]))


def auc(probabilities, labels):
    return metrics.auc(probabilities, labels, torch.ones(len(labels), 1, dtype=torch.float64)).item()


def test_scaled_averages_and_never_enlarges():
    x = torch.tensor([[[0, 255, 10, 20], [255, 0, 30, 40]] * 2], dtype=torch.uint8)
    assert features.scaled(x, 2, CPU)[0, 0].tolist() == [pytest.approx([0, 25 / 127.5 - 1], abs=1e-6)] * 2
    for side in (4, 8):
        torch.testing.assert_close(features.scaled(x, side, CPU), x[:, None] / 127.5 - 1)
    assert features.scaled(x, 2, CPU).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Random VGG


@pytest.fixture(scope="module")
def vgg():
    torch.manual_seed(123)
    return features.random_vgg(CPU)


def test_random_vgg_is_the_same_on_every_call(vgg, heads):
    torch.manual_seed(456)  # whatever the state is
    again = features.random_vgg(CPU)
    x = heads[:3]
    want = features.embed(vgg, x, 32, CPU, quiet)
    assert torch.equal(features.embed(again, x, 32, CPU, quiet), want)


def test_random_vgg_leaves_the_random_state():
    torch.manual_seed(789)  # not the state that an earlier call may have left
    state = torch.get_rng_state()
    features.random_vgg(CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_embeddings_do_not_depend_on_batches(vgg, heads):
    seen = []
    whole = features.embed(vgg, heads[:70], 32, CPU, seen.append)  # 64 and 6
    assert sum(seen) == 70 and whole.shape == (70, features.DIM) and whole.dtype == torch.float64
    assert not whole.requires_grad
    parts = torch.cat([features.embed(vgg, part, 32, CPU, quiet) for part in heads[:70].split((1, 30, 39))])
    spread = whole.std(0)
    assert (spread > 1e-4 * whole.abs().mean(0)).all()  # every feature says something about the image
    assert torch.linalg.matrix_rank(whole - whole.mean(0)) == features.DIM
    assert ((whole - parts).abs() < 0.01 * spread).all()  # float32, summed in another order


# ---------------------------------------------------------------------------------------------------------------------
# Classifier


@pytest.fixture(scope="module")
def sharp_or_blurred(heads):
    """(images, labels, which are of the people to train on): every slice as it is, and blurred by a pixel."""
    blurred = scipy.ndimage.gaussian_filter(heads.numpy().astype(float), (0, 1, 1)).round().astype(np.uint8)
    return torch.cat([heads, torch.from_numpy(blurred)]), torch.arange(2).repeat_interleave(len(heads)), SEEN.repeat(2)


def test_classifier_tells_blurred_from_sharp(sharp_or_blurred):
    images, labels, train = sharp_or_blurred
    seen = []
    classify = features.train_classifier(images[train], labels[train], 2, 0, CPU, 30, seen.append)
    assert sum(seen) == 30 * 32
    probabilities = classify(images[~train])
    assert probabilities.shape == (160, 2) and probabilities.dtype == torch.float64
    torch.testing.assert_close(probabilities.sum(1), torch.ones(160, dtype=torch.float64), rtol=0, atol=1e-6)
    assert auc(probabilities, labels[~train]) > 0.95  # found: 1.0


def test_classifier_finds_nothing_in_random_labels(heads):
    # By person, as classes of people are; the AUC of forty people drawn at random has an sd of 0.09.
    rng = np.random.default_rng(0)
    coin = np.concatenate([rng.permutation(np.arange(40) % 2), rng.permutation(np.arange(40) % 2)])
    labels = torch.from_numpy(coin.repeat(SLICES))
    classify = features.train_classifier(heads[SEEN], labels[SEEN], 2, 0, CPU, 30, quiet)
    assert 0.3 < auc(classify(heads[~SEEN]), labels[~SEEN]) < 0.7


def test_classifier_is_made_by_its_seed_alone(sharp_or_blurred):
    images, labels, _ = sharp_or_blurred
    results = []
    for seed, somebody_else in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(somebody_else)
        state = torch.get_rng_state()
        classify = features.train_classifier(images, labels, 2, seed, CPU, 4, quiet)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(classify(images[::16]))
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2])


def test_classifier_of_three_unequal_classes(heads):
    # Brightness in three steps; the rarest class has four slices.
    labels = torch.cat([torch.zeros(120), torch.ones(36), torch.full((4,), 2)]).long()
    images = (heads * (1 - 0.3 * labels[:, None, None])).to(torch.uint8)
    # 60 steps, not 30: the running means of batch normalisation come later than the weights.
    probabilities = features.train_classifier(images, labels, 3, 0, CPU, 60, quiet)(images)
    assert probabilities.shape == (160, 3) and auc(probabilities, labels) > 0.95


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder


def test_autoencoder_keeps_what_makes_a_slice_itself(heads):
    seen = []
    encoder = features.train_autoencoder(heads[SEEN], 64, CPU, 40, seen.append)
    assert sum(seen) == 40 * 32
    unseen = heads[~SEEN]
    noise = 8 * torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))
    noisy = (unseen + noise).clamp(0, 255).round().to(torch.uint8)
    a, b = (features.embed(encoder, x, 64, CPU, quiet) for x in (unseen, noisy))
    assert a.shape == (80, features.DIM) and (a.var(0) > 0).all()
    other = torch.randint(1, 80, (80,), generator=torch.Generator().manual_seed(1))
    other = (torch.arange(80) + other) % 80  # never itself
    assert ((a - b).norm(dim=1) < (a - a[other]).norm(dim=1)).double().mean() >= 0.9  # found: all


def test_autoencoder_is_the_same_on_every_run(heads):
    results = []
    for somebody_else in (1, 2):
        torch.manual_seed(somebody_else)
        state = torch.get_rng_state()
        encoder = features.train_autoencoder(heads, 32, CPU, 4, quiet)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(features.embed(encoder, heads[:8], 32, CPU, quiet))
    assert torch.equal(*results)


def test_autoencoder_of_sides_that_are_no_multiple_of_sixteen(heads):
    encoder = features.train_autoencoder(heads[:8, 4:-4, 4:-4], 48, CPU, 2, quiet)
    assert features.embed(encoder, heads[:8, 4:-4, 4:-4], 48, CPU, quiet).shape == (8, features.DIM)


# ---------------------------------------------------------------------------------------------------------------------
# Inception


@pytest.fixture
def weights(tmp_path):
    """A file like that of FID's InceptionV3, with random weights: the real one would have to be downloaded."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")

    class Blank(fidelity.FeatureExtractorInceptionV3):
        """As it is before its weights are loaded."""

        def load_state_dict(self, state):
            assert not state

    path = tmp_path / "inception.pth"
    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Blank("inception-v3-compat", ["2048"], str(path))
        for layer in network.modules():
            if isinstance(layer, torch.nn.Conv2d):  # PyTorch's own would fade to nothing over 48 layers
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    yield str(path)
    path.unlink()  # 95 MB


@pytest.mark.full
def test_inception_gives_the_frechet_distance_of_torchmetrics(weights, heads):
    from torchmetrics.image import FrechetInceptionDistance

    a, b = heads[:8], heads[8:16] // 2
    network = features.inception(weights, CPU)
    x, y = (features.embed(network, images, 299, CPU, quiet) for images in (a, b))
    assert x.shape == (8, 2048)
    ones = torch.ones(8, 1, dtype=torch.float64)
    metric = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights)
    for images, real in ((a, True), (b, False)):
        metric.update(images[:, None].expand(-1, 3, -1, -1), real=real)
    assert metrics.frechet(x, y, ones, ones).item() == pytest.approx(metric.compute().item(), rel=1e-3)
