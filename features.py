"""Networks that look at images on behalf of the metrics. None is downloaded; all are the same on every run of a seed.

Images come as uint8 [N, S, S]. Networks are small, because evidence has to be cheap enough to be gathered every time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError

DIM = 64  # of the embeddings: few enough for a covariance of a few hundred images to have full rank
Progress = Callable[[int], object]


def scaled(images: Tensor, side: int, device: torch.device) -> Tensor:
    """uint8 [B, S, S] -> float [B, 1, side, side] in [-1, 1]: averaged down, never enlarged."""
    x = images.to(device)[:, None].float() / 127.5 - 1
    return F.interpolate(x, size=(side, side), mode="area") if x.shape[-1] > side else x


@torch.no_grad()
def embed(network: nn.Module, images: Tensor, side: int, device: torch.device, progress: Progress) -> Tensor:
    """Features float64 [N, D], on the CPU."""
    out = []
    for part in images.split(64):
        out.append(network(scaled(part, side, device)).double().cpu())
        progress(len(part))
    return torch.cat(out)


def random_vgg(device: torch.device) -> nn.Module:
    """VGG-16 with random weights of a fixed seed and 64 outputs: a measure that no data set has biased.

    Naeem et al. 2020, section 5, found such embeddings sound away from natural images. Grey [B, 1, s, s] in [-1, 1].
    """
    from torchvision.models import vgg16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vgg = vgg16(weights=None, num_classes=DIM)
        grey = nn.Conv2d(1, 3, 1, bias=False)
    nn.init.constant_(grey.weight, 2.0)  # to three channels, about as spread as natural images are after whitening
    return nn.Sequential(grey, vgg).eval().to(device, memory_format=torch.channels_last)


def inception(weights: str, device: torch.device) -> nn.Module:
    """InceptionV3 as FID has it (torchmetrics, torch-fidelity), from a file of its weights; grey in [-1, 1]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        network = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights).inception
    except Exception as e:  # whatever a file can be that is not these weights; torch.load runs no code from it
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(f"{weights} does not hold the weights of FID's InceptionV3 ({reason[:120]})") from None

    class Grey(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(((x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1))

    return Grey().eval().to(device)


def _down(cin: int, cout: int) -> nn.Sequential:
    """Convolution that halves the sides."""
    return nn.Sequential(nn.Conv2d(cin, cout, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


def _fit(
    network: nn.Module, images: Tensor, index: Callable[[torch.Generator], Tensor], side: int,
    loss: Callable[[Tensor, Tensor], Tensor], steps: int, lr: float, seed: int, device: torch.device,
    progress: Progress,
) -> None:  # fmt: skip
    """Adam with a one-cycle learning rate; slices are mirrored and shifted by up to 3 % at random."""
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    g = torch.Generator().manual_seed(seed)
    network.train().to(device, memory_format=torch.channels_last)
    for _ in range(steps):
        i = index(g)
        x = scaled(images[i], side, device)
        most = max(1, round(0.03 * x.shape[-1]))
        dy, dx = torch.randint(-most, most + 1, (2,), generator=g).tolist()
        x = x.roll((dy, dx), (2, 3))
        x = torch.where((torch.rand(len(i), generator=g) < 0.5).to(device)[:, None, None, None], x.flip(3), x)
        optimizer.zero_grad()
        loss(x.contiguous(memory_format=torch.channels_last), i).backward()
        optimizer.step()
        schedule.step()
        progress(len(i))
    network.eval()


def train_autoencoder(images: Tensor, side: int, device: torch.device, steps: int, progress: Progress) -> nn.Module:
    """The encoder of a small autoencoder: features [B, 64] that are about these images. Batches of 32.

    side: a multiple of 16, at most the images' own.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths, rest = (16, 32, 64, 64), side // 16
        encoder = nn.Sequential(
            *[_down(a, b) for a, b in zip((1, *widths), widths)], nn.Flatten(), nn.Linear(64 * rest**2, DIM)
        )
        up: list[nn.Module] = [nn.Linear(DIM, 64 * rest**2), nn.Unflatten(1, (64, rest, rest))]
        for cin, cout in ((64, 64), (64, 32), (32, 16), (16, 1)):
            up += [nn.Conv2d(cin, 4 * cout, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
        network = nn.Sequential(encoder, *up[:-1])

        def loss(x: Tensor, i: Tensor) -> Tensor:
            return F.mse_loss(network(x), x)

        _fit(
            network, images, lambda g: torch.randint(len(images), (32,), generator=g), side, loss, steps, 3e-3, 0,
            device, progress,
        )  # fmt: skip
    return encoder


def train_classifier(
    images: Tensor, labels: Tensor, classes: int, seed: int, device: torch.device, steps: int, progress: Progress,
) -> Callable[[Tensor], Tensor]:  # fmt: skip
    """A small CNN told to tell the classes apart; returns uint8 [N, S, S] -> probabilities float64 [N, classes].

    labels int64 [N]; every class is drawn equally often, 32 images a step. At most 128 pixels are looked at.
    """
    of = [torch.nonzero(labels == c)[:, 0] for c in range(classes)]

    def index(g: torch.Generator) -> Tensor:
        share = -(-32 // classes)
        return torch.cat([i[torch.randint(len(i), (share,), generator=g)] for i in of])

    widths = (16, 32, 64, 64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *[_down(a, b) for a, b in zip((1, *widths), widths)], nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(widths[-1], classes),
        )  # fmt: skip

        def loss(x: Tensor, i: Tensor) -> Tensor:
            return F.cross_entropy(network(x), labels[i].to(device), label_smoothing=0.1)

        _fit(network, images, index, 128, loss, steps, 3e-3, seed, device, progress)
    return lambda unseen: embed(network, unseen, 128, device, lambda n: None).softmax(1)
