"""Networks used by the evaluation: feature extractors, and a small classifier that is trained on the spot.

Nothing is downloaded, and the same seed gives the same network on every run. Images come as uint8 [N, S, S]. The
networks are small so that an evaluation is cheap enough to run after every training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device import autocast, pick_amp_dtype
from utils import UserError

# Features per image. Few enough that a few hundred images give a covariance matrix of full rank.
DIM = 64
Progress = Callable[[int], object]  # is called with the number of images just processed


def scaled(images: Tensor, side: int, device: torch.device) -> Tensor:
    """uint8 [B, S, S] -> float [B, 1, side, side] in [-1, 1] on the device. Shrinks by averaging, never enlarges."""
    x = images.to(device)[:, None].float() / 127.5 - 1
    return F.interpolate(x, size=(side, side), mode="area") if x.shape[-1] > side else x


@torch.no_grad()
def embed(network: nn.Module, images: Tensor, side: int, device: torch.device, progress: Progress) -> Tensor:
    """Features of uint8 [N, S, S] images, seen at `side` pixels: float64 [N, D] on the CPU."""
    out = []
    for part in images.split(64):
        out.append(network(scaled(part, side, device)).double().cpu())
        progress(len(part))
    return torch.cat(out)


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractors that need no training


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the global random state of CPU and device begins with this seed; afterwards it is what it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def random_vgg(device: torch.device) -> nn.Module:
    """VGG-16 with random weights from a fixed seed: grey [B, 1, s, s] in [-1, 1] -> features [B, 64].

    Features of a network that was trained on photographs are biased towards photographs. Naeem et al. 2020 (section 5)
    found random embeddings to be a sound choice for images unlike ImageNet.
    """
    from torchvision.models import vgg16

    # Seed inside a fork, so that the caller's random state stays as it was.
    with seeded(0, device):
        vgg = vgg16(weights=None, num_classes=DIM)
        grey = nn.Conv2d(1, 3, 1, bias=False)
    # VGG expects three channels with about the spread of whitened photographs, about twice that of ours.
    nn.init.constant_(grey.weight, 2.0)
    return nn.Sequential(grey, vgg).eval().to(device).to(memory_format=torch.channels_last)


def inception(weights: str, device: torch.device) -> nn.Module:
    """The InceptionV3 that FID and KID are defined with, as torchmetrics and torch-fidelity have it.

    weights: path of its weights file. The network maps grey [B, 1, s, s] in [-1, 1] to features [B, 2048].
    Raises UserError if the file cannot be loaded as these weights. torch-fidelity loads it by torch.load, and some
    versions unpickle it without weights_only: give it a file you trust.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        network = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights).inception
    except Exception as e:  # a wrong file can fail in any way
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"{weights} does not hold the weights of FID's InceptionV3 ({reason[:120]})") from None

    class Grey(nn.Module):
        """Inception takes uint8 RGB: repeat the grey channel."""

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(((x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1))

    return Grey().eval().to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Networks that are trained on the images


def _down(cin: int, cout: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU; halves height and width."""
    return nn.Sequential(nn.Conv2d(cin, cout, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


def _train(
    network: nn.Module, images: Tensor, pick: Callable[[torch.Generator], Tensor], side: int,
    loss: Callable[[Tensor, Tensor], Tensor], steps: int, lr: float, seed: int, device: torch.device,
    progress: Progress,
) -> None:  # fmt: skip
    """Train the network in place with Adam and a one-cycle learning rate, then put it into eval mode.

    pick(generator) -> indices int64 [B] of the next batch; loss(x, indices) -> scalar, for x [B, 1, side, side] in
    [-1, 1]. Augmentation: one random shift of up to 3 % for the batch, and each image is mirrored half of the time.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    g = torch.Generator().manual_seed(seed)
    network.train().to(device).to(memory_format=torch.channels_last)
    for _ in range(steps):
        index = pick(g)
        x = scaled(images[index], side, device)
        # Augment. All random numbers come from one generator on the CPU: the same on every device.
        most = max(1, round(0.03 * x.shape[-1]))
        dy, dx = torch.randint(-most, most + 1, (2,), generator=g).tolist()
        x = x.roll((dy, dx), (2, 3))
        x = torch.where((torch.rand(len(index), generator=g) < 0.5).to(device)[:, None, None, None], x.flip(3), x)
        # Step.
        optimizer.zero_grad()
        loss(x.contiguous(memory_format=torch.channels_last), index).backward()
        optimizer.step()
        schedule.step()
        progress(len(index))
    network.eval()


def train_autoencoder(images: Tensor, side: int, device: torch.device, steps: int, progress: Progress) -> nn.Module:
    """Train a small autoencoder on the images and return its encoder: [B, 1, side, side] in [-1, 1] -> [B, 64].

    Unlike `random_vgg`, its features are specific to these images. images: uint8 [N, S, S]; side: a multiple of 16, at
    most S. Each step takes a batch of 32 images. The global random state is left as it was.
    """
    with seeded(0, device):
        # Four halvings of the side, then one linear layer to 64 numbers; the decoder is the mirror image.
        widths, rest = (16, 32, 64, 64), side // 16
        encoder = nn.Sequential(
            *[_down(a, b) for a, b in zip((1, *widths), widths)], nn.Flatten(), nn.Linear(64 * rest**2, DIM)
        )
        up: list[nn.Module] = [nn.Linear(DIM, 64 * rest**2), nn.Unflatten(1, (64, rest, rest))]
        for cin, cout in ((64, 64), (64, 32), (32, 16), (16, 1)):
            up += [nn.Conv2d(cin, 4 * cout, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
        network = nn.Sequential(encoder, *up[:-1])  # no ReLU at the end: pixels can be negative

        def loss(x: Tensor, index: Tensor) -> Tensor:
            return F.mse_loss(network(x), x)

        def pick(g: torch.Generator) -> Tensor:
            return torch.randint(len(images), (32,), generator=g)

        _train(network, images, pick, side, loss, steps, 3e-3, 0, device, progress)
    return encoder


def train_predictor(
    images: Tensor, y: Tensor, categories: Sequence[int], seed: int, device: torch.device, steps: int,
    progress: Progress,
) -> Callable[[Tensor], list[Tensor]]:  # fmt: skip
    """Train a small CNN to tell what images show: uint8 [N, S, S] -> for each attribute float64 [N] or [N, categories].

    y float32 [N, A] are conditions (conditions.py), NaN where unknown; `categories` is 0 for a number, which is
    predicted as it is scaled there, and else the number of values, whose probabilities are predicted. Each step takes
    32 images; those larger than 128 pixels are shrunk to 128. The global random state is left as it was.
    """
    widths, outputs = (16, 32, 64, 64), [max(1, n) for n in categories]
    with seeded(seed, device):
        network = nn.Sequential(
            *[_down(a, b) for a, b in zip((1, *widths), widths)], nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * widths[-1], 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, sum(outputs)),
        )  # fmt: skip

        def loss(x: Tensor, index: Tensor) -> Tensor:
            want, total = y[index].to(device), torch.zeros((), device=device)
            # What is unknown counts nothing. No rows are picked out: a GPU would have to say how many there are.
            for i, (out, n) in enumerate(zip(network(x).split(outputs, 1), categories)):
                known = ~want[:, i].isnan()
                target = want[:, i].nan_to_num()
                each = F.cross_entropy(out, target.long(), reduction="none") if n else (out[:, 0] - target).square()
                total = total + (each * known).sum() / known.sum().clamp(min=1)
            return total

        def pick(g: torch.Generator) -> Tensor:
            return torch.randint(len(images), (32,), generator=g)

        _train(network, images, pick, 128, loss, steps, 3e-3, seed, device, progress)

    def predict(unseen: Tensor) -> list[Tensor]:
        parts = embed(network, unseen, 128, device, lambda n: None).split(outputs, 1)
        return [out.softmax(1) if n else out[:, 0] for out, n in zip(parts, categories)]

    return predict


def equal_batches(labels: Tensor, classes: int) -> Callable[[torch.Generator], Tensor]:
    """For `_train`: about 32 images a batch, with equally many of each class however rare it is. labels int64 [N]."""
    of_class = [torch.nonzero(labels == c)[:, 0] for c in range(classes)]

    def pick(g: torch.Generator) -> Tensor:
        share = -(-32 // classes)  # rounded up
        return torch.cat([rows[torch.randint(len(rows), (share,), generator=g)] for rows in of_class])

    return pick


def train_classifier(
    images: Tensor, labels: Tensor, classes: int, seed: int, device: torch.device, steps: int, progress: Progress,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """Train a small CNN to classify the images and return it: uint8 [N, S, S] -> probabilities float64 [N, classes].

    labels int64 [N]. Images larger than 128 pixels are shrunk to 128. The global random state is left as it was.
    """
    widths = (16, 32, 64, 64)
    with seeded(seed, device):
        network = nn.Sequential(
            *[_down(a, b) for a, b in zip((1, *widths), widths)], nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(widths[-1], classes),
        )  # fmt: skip

        def loss(x: Tensor, index: Tensor) -> Tensor:
            return F.cross_entropy(network(x), labels[index].to(device), label_smoothing=0.1)

        _train(network, images, equal_batches(labels, classes), 128, loss, steps, 3e-3, seed, device, progress)
    return lambda unseen: embed(network, unseen, 128, device, lambda n: None).softmax(1)


class Judge(nn.Module):
    """Whether an image is real, by its detail and as a whole: [B, 1, S, S] in [-1, 1] -> logits [B, 2].

    Two CNNs whose logits add up. One sees the pixels as they are (in training, of a random quarter of the image), the
    other the image at half the resolution. Both average what they find over all places.
    """

    def __init__(self, amp_dtype: torch.dtype | None):
        super().__init__()
        self.amp_dtype = amp_dtype

        def cnn() -> nn.Sequential:
            first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
            down = [_down(a, b) for a, b in ((16, 32), (32, 64), (64, 64))]
            return nn.Sequential(
                first, *down, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 2)
            )  # fmt: skip

        self.detail, self.whole = cnn(), cnn()

    def forward(self, x: Tensor) -> Tensor:
        part, half = x, x.shape[-1] // 2
        if self.training:
            top, left = torch.randint(half + 1, (2,)).tolist()
            part = x[:, :, top : top + half, left : left + half].contiguous(memory_format=torch.channels_last)
        with autocast(x, self.amp_dtype):
            return (self.detail(part) + self.whole(F.avg_pool2d(x, 2))).float()


def train_judge(
    images: Tensor, labels: Tensor, seed: int, device: torch.device, steps: int, progress: Progress
) -> Callable[[Tensor], Tensor]:
    """Train a `Judge` to tell the two labels, int64 [N], apart: uint8 [N, S, S] -> probabilities float64 [N, 2].

    Images larger than 256 pixels are shrunk to 256. The global random state is left as it was.
    """
    with seeded(seed, device):
        judge, side = Judge(pick_amp_dtype("auto", device)), min(256, images.shape[-1])

        def loss(x: Tensor, index: Tensor) -> Tensor:
            return F.cross_entropy(judge(x), labels[index].to(device), label_smoothing=0.1)

        _train(judge, images, equal_batches(labels, 2), side, loss, steps, 3e-3, seed, device, progress)
    return lambda unseen: embed(judge, unseen, side, device, lambda n: None).softmax(1)
