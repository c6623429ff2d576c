"""Time and memory of the metrics at scale: python benchmarks/evidence.py [--n 20000] [--tsne] [--json FILE].

Random features and images of n slices of n / 20 people against n generated ones. Peak memory is that of the process.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from json import dumps
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import metrics


def main(n: int = 20_000, side: int = 128, resamples: int = 200, tsne: bool = False, json: str = "") -> None:
    """Measure.

    Args:
        n: Images in each set.
        side: Pixels of an image's side.
        resamples: Bootstrap resamples of people.
        tsne: Also compare openTSNE with scikit-learn on n points of 50 dimensions.
        json: Where to write the rows.
    """
    rows: list[dict] = []

    def took(task: str, call: Callable[[], object]) -> None:
        start = time.time()
        call()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append({"task": task, "n": n, "seconds": round(time.time() - start, 1), "peak_gb": round(memory, 2)})
        print(f"{task:<34}{n:>8,}{rows[-1]['seconds']:>9.1f} s{memory:>8.2f} GB")

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {resamples} resamples")
    took("start", lambda: None)
    g = torch.Generator().manual_seed(0)
    people = np.arange(n) // 20
    x, y = torch.randn(n, 64, generator=g).double(), torch.randn(n, 64, generator=g).double()
    wx, wy = metrics.resample_people(people, resamples, 0), metrics.resample_people(range(n), resamples, 1)
    took("Fréchet distance, 64 features", lambda: metrics.frechet(x, y, wx, wy))
    took("kernel distance", lambda: metrics.kernel_distance(x, y, wx, wy))
    took("precision, recall, density, coverage", lambda: metrics.precision_recall(x, y, people, range(n), wx, wy))
    labels = torch.from_numpy(people % 2)
    took("kNN AUC between people", lambda: metrics.auc_between_people(x, labels, people, wx))
    train, made = (torch.randint(0, 256, (n, side, side), generator=g, dtype=torch.uint8) for _ in range(2))
    project = torch.randn(side * side // 16, 2048, generator=g)

    def encode(images: torch.Tensor) -> torch.Tensor:  # as many numbers as a latent of 8 x 16 x 16
        return torch.nn.functional.avg_pool2d(images, 4).flatten(1) @ project

    detectors: list[metrics.CopyDetector] = []
    took("copies: learn training slices", lambda: detectors.append(metrics.CopyDetector(train, people, encode)))
    took("copies: look at generated ones", lambda: detectors[0].distances(made))
    if tsne:
        points = torch.randn(n, 50, generator=g).numpy()
        points[:, :3] += np.random.default_rng(0).normal(size=(20, 3))[np.arange(n) % 20] * 6
        from openTSNE import TSNE as Open
        from sklearn.manifold import TSNE as Scikit

        took("t-SNE, openTSNE", lambda: Open(random_state=0, n_jobs=-1).fit(points))
        took("t-SNE, scikit-learn", lambda: Scikit(random_state=0, n_jobs=-1).fit_transform(points))
    if json:
        Path(json).write_text(dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
