"""Which choices pay: VAE, U-Net, grids and samplers, each trained and scored on the same people (docs/results.md).

python benchmarks/quality.py vae|unet|samplers|draws|variants|students|shipped --data DIR. Rows go to
docs/results/quality-WHAT.json as they are measured; the same command again goes on, and two of them at once share the
work (--part 0 --parts 2). `tables` prints the rows that are there as Markdown.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from filelock import FileLock
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import anatomy  # noqa: E402
import features  # noqa: E402
import metrics  # noqa: E402
from cluster import Ranks  # noqa: E402
from config import DataConfig, EvaluateConfig, PredictConfig  # noqa: E402
from dataset import ADNIDataset, load_splits  # noqa: E402
from device import describe_hardware, pick_amp_dtype, pick_device  # noqa: E402
from evaluate import generate_images, images_of  # noqa: E402
from evidence import Evidence, Images, tell_apart  # noqa: E402
from metrics import psnr, ssim, unit  # noqa: E402
from modules import NoiseScheduler_Fast_DDPM, make_grid  # noqa: E402
from pictures import image_grid, png_bytes, to_uint8  # noqa: E402
from sampling import ImageSampler, load_run, plan_sampling  # noqa: E402
from utils import git_commit, read_jsonl, stratified  # noqa: E402
from vae import VAE, load_vae  # noqa: E402
from weights import save_weights, write_atomic  # noqa: E402


@dataclass(frozen=True)
class QualityConfig:
    """Train and score the variants of one question."""

    what: Annotated[
        Literal["vae", "unet", "samplers", "draws", "variants", "students", "shipped", "tables"], tyro.conf.Positional
    ]
    """Which question."""
    data: str = os.environ.get("ADNI_ROOT", "data")
    """Folder of slices; people of val/ are the judges."""
    cache: str = "cache"
    """Folder for decoded slices."""
    checkpoints: str = "checkpoints/study"
    """Folder for the variants' runs."""
    vae_run: str = "checkpoints/pretrained"
    """Run whose VAE the U-Nets of all other questions are trained on; for `shipped`, the teacher."""
    epochs: int = 0
    """Epochs of each training; 0: what docs/results.md was measured with."""
    num_images: int = 320
    """Images of each set in a score; for `shipped` of the generated set, and of the others as many as are held out."""
    device: str = "auto"
    """auto, cuda or cpu."""
    only: tuple[str, ...] = ()
    """Names of the variants to do; all where none are named."""
    part: int = 0
    """Do every PARTS-th variant from this one on."""
    parts: int = 1
    """How many processes share the work."""
    out: str = "docs/results"
    """Folder of the rows and of a grid of 16 images for every row."""


class Judge:
    """Scores sets of images against the same training people, beside the floor: the people held out.

    All sets have n images. Features are those of evaluate.py: VGG-16 with random weights, and the code of an
    autoencoder trained on the training people.
    """

    def __init__(self, train: Images, held_out: Images, n: int, device: torch.device):
        self.device, self.n = device, n
        self.train, self.held_out = train.sample(n, 0), held_out.sample(n, 1)
        self.side = min(64, train.pixels.shape[-1] // 16 * 16)
        self.networks = {
            "vgg": features.random_vgg(device),
            "ae": features.train_autoencoder(train.pixels, self.side, device, 300, lambda n: None),
        }
        raw = {k: self.look(k, self.train.pixels) for k in self.networks}
        self.scale = {k: (f.mean(0), f.var(0).mean().sqrt()) for k, f in raw.items()}
        self.real = {k: self.embed(k, self.train.pixels) for k in self.networks}
        self.power = self.spectrum(self.train.pixels)
        self.detector = metrics.CopyDetector(train.pixels, train.people)
        cfg = EvaluateConfig(resamples=10)
        self.evidence = Evidence(self.train, self.held_out, self.held_out, [], cfg, device, Path())

    def look(self, kind: str, pixels: Tensor) -> Tensor:
        return features.embed(self.networks[kind], pixels, self.side, self.device, lambda n: None)

    def embed(self, kind: str, pixels: Tensor) -> Tensor:
        mean, sd = self.scale[kind]
        return (self.look(kind, pixels) - mean) / sd

    def spectrum(self, pixels: Tensor) -> Tensor:
        power = torch.cat([metrics.power_spectrum(x) for x in metrics.batches(pixels)])
        return 10 * power.mean(0)[power.shape[1] // 2 :]  # dB, the upper half of the frequencies

    def floor(self) -> dict[str, float]:
        return self.score(self.held_out)

    def score(self, images: Images, two_sample: bool = True) -> dict[str, float]:
        """Every number of a set; up to n of its images are looked at."""
        images = images.sample(self.n, 2)
        row: dict[str, float] = {"scored": len(images)}  # distances grow a little where these are fewer than n
        one = torch.ones(len(images), 1, dtype=torch.float64)
        for kind, real in self.real.items():
            fake, w = self.embed(kind, images.pixels), torch.ones(len(real), 1, dtype=torch.float64)
            row[f"frechet_{kind}"] = metrics.frechet(real, fake, w, one).item()
            row[f"kernel_{kind}"] = metrics.kernel_distance(real, fake, w, one).item()
            found = metrics.precision_recall(real, fake, self.train.people, images.people, w, one)
            row |= {f"{name}_{kind}": found[name].item() for name in ("precision", "recall")}
        row["high_frequencies_db"] = (self.spectrum(images.pixels) - self.power).mean().item()
        row["copy_rate"] = metrics.is_copy(self.detector.distances(images.pixels)[0]).double().mean().item()
        if two_sample:
            accuracy, auc = tell_apart(self.train, images, self.evidence, lambda n: None)
            row |= {"two_sample_accuracy": accuracy[0].item(), "two_sample_auc": auc[0].item()}
        return {k: round(v, 4) for k, v in row.items()}


class Table:
    """Rows of a question in a JSON file, shared by processes; a row that is there is not measured again."""

    def __init__(self, path: Path):
        self.path, self.lock = path, FileLock(path.with_suffix(".lock"))
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict]:
        return json.loads(self.path.read_text()) if self.path.exists() else []

    def has(self, name: str) -> bool:
        return any(r["name"] == name for r in self.rows())

    def add(self, row: dict) -> None:
        print(json.dumps(row), flush=True)
        with self.lock:
            rows = [r for r in self.rows() if r["name"] != row["name"]] + [row]
            write_atomic(self.path, ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode())


def script(*command: object) -> float:
    """Seconds of `python SCRIPT ...` in the repository's folder; a failure ends this process with its last words."""
    start = time.time()
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} failed: {done.stderr[-800:]}")
    return time.time() - start


def draw(drawer: ImageSampler, n: int, seed: int = 0) -> tuple[Images, Tensor, float]:
    """(n images, their latents, images/s)."""
    pixels, latents, start = [], [], time.time()
    for k in torch.arange(n).split(drawer.batch):
        x, z = drawer(seed, k.tolist(), torch.zeros(len(k), len(drawer.model.attributes)))
        pixels.append(x.cpu()), latents.append(z.cpu())
    speed = n / (time.time() - start)
    return Images(torch.cat(pixels), torch.zeros(n), np.arange(n).astype(str)), torch.cat(latents), speed


class Quality:
    """One question: its data, judge, table and trainings."""

    def __init__(self, cfg: QualityConfig, side: int):
        self.cfg, self.device, self.side = cfg, pick_device(cfg.device), side
        splits, _ = load_splits(DataConfig(data=cfg.data, cache=cfg.cache), side)
        self.train, self.val = splits["train"], splits["val"]
        n = len(self.val) if cfg.what == "shipped" else cfg.num_images
        self.judge = Judge(images_of(self.train, []), images_of(self.val, []), n, self.device)
        self.table = Table(Path(cfg.out) / f"quality-{cfg.what}.json")
        self.stamp = {
            "date": time.strftime("%Y-%m-%d"), "device": describe_hardware(self.device), "commit": git_commit(),
            "data": Path(cfg.data).name, "side": side, "n": cfg.num_images,
        }  # fmt: skip
        if not self.table.has("floor"):
            self.table.add({"name": "floor", **self.judge.floor(), **self.stamp})

    def mine(self, names: list[str]) -> list[str]:
        return [n for n in names if not self.cfg.only or n in self.cfg.only][self.cfg.part :: self.cfg.parts]

    def flags(self, name: str) -> list[object]:
        c = self.cfg
        where = ["--data", c.data, "--cache", c.cache, "--checkpoints", c.checkpoints, "--run", name]
        return [*where, "--wandb", "disabled", "--device", c.device]

    def show(self, name: str, pixels: Tensor) -> None:
        path = Path(self.cfg.out) / f"quality-{self.cfg.what}" / f"{name.replace('/', '-')}.png"
        write_atomic(path, png_bytes(image_grid(pixels[:16].numpy(), columns=8)))

    def unet(self, name: str, vae: Path, epochs: int, *flags: object) -> float:
        """Train a U-Net on this VAE (a best.safetensors) as run NAME; seconds it took, 0 if it was there."""
        home = Path(self.cfg.checkpoints) / name
        if (home / "diffusion" / "final.safetensors").exists():
            return 0.0
        (home / "vae").mkdir(parents=True, exist_ok=True)
        (home / "vae" / "best.safetensors").write_bytes(vae.read_bytes())
        return script("train.py", "small", *self.flags(name), "--epochs", epochs, "--sample-every", epochs, *flags)

    def generated(
        self, name: str, run: str, timesteps: list[int], solver: str, eta: float = 0.0, n: int = 0, **facts: object
    ) -> None:
        """Draw n images from a run's final weights, score them, and put the row down."""
        if self.table.has(name):
            return
        model, vae, _, _ = load_run(Path(self.cfg.checkpoints) / run, "final", self.device, "auto")
        model.amp_dtype = pick_amp_dtype("auto", self.device)
        drawer = ImageSampler(model, vae, 64, timesteps=timesteps, solver=solver, eta=eta)
        n = n or self.cfg.num_images
        images, z, speed = draw(drawer, n)
        self.show(name, images.pixels)
        spread = z.std((0, 2, 3))  # training latents have 1
        row = {"name": name, "run": run, "steps": len(timesteps), "solver": solver, "eta": eta, **facts}
        row |= {"images_per_s": round(speed, 2), "spread": [round(s, 3) for s in spread.tolist()], "drawn": n}
        self.table.add({**row, **self.judge.score(images, two_sample=False), **self.stamp})


# Flags over the base of each question; what is not said is the base's.
VAES = {
    "base": [],
    "mse": ["--reconstruction", "mse"],
    "l1": ["--reconstruction", "l1"],
    "l1_ms_ssim": ["--reconstruction", "l1_ms_ssim"],
    "l1_ssim_frequency": ["--reconstruction", "l1_ssim_frequency"],
    "adversarial 0.5": ["--adversarial", "0.5"],
    "kl 1e-5": ["--kl-weight", "1e-5"],
    "kl 1e-2": ["--kl-weight", "1e-2"],
    "8 channels": ["--latent-channels", "8"],
    "downsample 8, 16 channels": ["--downsample", "8", "--latent-channels", "16"],
    "width 64": ["--channels", "64"],
    "width 192": ["--channels", "192"],
}


@torch.no_grad()
def reconstructed(vae: VAE, data: ADNIDataset, device: torch.device) -> tuple[Images, float, float]:
    """A split as the VAE gives it back, and its PSNR and SSIM."""
    pixels, quality = [], []
    for x in data.batches(64, device):
        x_hat = vae.decode(vae.encode(x)[0])
        pixels.append(torch.from_numpy(to_uint8(x_hat)))
        quality.append(torch.stack([psnr(unit(x_hat), unit(x)), ssim(unit(x_hat), unit(x))], 1).cpu())
    p, s = torch.cat(quality).mean(0).tolist()
    return Images(torch.cat(pixels), data.labels, np.array(data.people)), p, s


def study_vae(q: Quality) -> None:
    """Each VAE, and a U-Net on its latents, at 64²: what reconstructs best, and what generates best."""
    for name in q.mine(list(VAES)):
        if q.table.has(name):
            continue
        run, epochs = f"vae-{name.replace(' ', '-').replace(',', '')}", q.cfg.epochs or 6
        base = [
            "--image-size", q.side, "--downsample", 4, "--latent-channels", 4, "--channels", 128, "--blocks", 2,
            "--no-attention", "--lr", "6e-4", "--kl-weight", "1e-3", "--schedule", "cosine",
        ]  # fmt: skip
        file = Path(q.cfg.checkpoints) / run / "vae" / "best.safetensors"
        seconds = script("pre_train.py", "small", *q.flags(run), "--epochs", epochs, *base, *VAES[name])
        vae, _ = load_vae(file, q.device)
        images, p, s = reconstructed(vae, q.val, q.device)
        row = {"name": name, "PSNR": round(p, 2), "SSIM": round(s, 4), "latent": vae.latent_shape}
        z = torch.randn(64, *vae.latent_shape, device=q.device)
        vae.decode(z)
        start = time.time()
        vae.decode(z).sum().item()  # waits for a GPU
        row |= {"decoded_per_s": round(64 / (time.time() - start), 1), "seconds": round(seconds)}
        row |= {f"reconstruction_{k}": v for k, v in q.judge.score(images).items()}
        q.unet(run, file, 2 * epochs, "--channels", 64, 128, "--attention", 8, "--no-flip")
        model, vae, _, _ = load_run(file.parent.parent, "final", q.device)
        model.amp_dtype = pick_amp_dtype("auto", q.device)
        images, _, _ = draw(ImageSampler(model, vae, 64), q.cfg.num_images)
        q.show(name, images.pixels)
        q.table.add({**row, **q.judge.score(images), **q.stamp})


UNETS = {
    "base": [],
    "latents not rotated": [],
    "eps": ["--prediction", "eps"],
    "min-SNR": ["--loss-weight", "min_snr"],
    "no flip": ["--no-flip"],
    "dropout 0.1": ["--dropout", "0.1"],
    "EMA 0.99": ["--ema-decay", "0.99"],
    "EMA 0.9995": ["--ema-decay", "0.9995"],
    "lr 2e-4": ["--lr", "2e-4"],
    "lr 2e-3": ["--lr", "2e-3"],
    "batch 64": ["--batch-size", "64", "--lr", "1.4e-3"],
    "no attention": ["--attention", "0"],
    "patches of 2": ["--patch", "2", "--channels", "128", "256"],
    "twice as wide": ["--channels", "128", "256"],
}
SMALL_UNET = ["--channels", 64, 128, "--ema-decay", "0.9985", "--grid", "logsnr", "--no-draw-by-weight"]
TRAINED_ALREADY = {"base": "full-v-seed0", "eps": "full-eps"}  # by the samplers' question


def not_rotated(path: Path, out: Path) -> Path:
    """The same VAE with latents normalised channel by channel, as most projects do."""
    vae, meta = load_vae(path, torch.device("cpu"))
    r = vae.latent_rotation
    vae.latent_mean = r.T @ vae.latent_mean
    vae.latent_std = (r.T.square() @ vae.latent_std.square()).sqrt()
    vae.latent_rotation = torch.eye(len(r))
    save_weights(out, vae, meta)
    return out


def study_unet(q: Quality) -> None:
    """Each U-Net on the same latents, trained on the full grid and drawn from in ten steps."""
    for name in q.mine(list(UNETS)):
        run = TRAINED_ALREADY.get(name, f"unet-{name.replace(' ', '-')}")
        flags = [*SMALL_UNET, "--grid", "full", *UNETS[name]]
        vae_file = Path(q.cfg.vae_run) / "vae" / "best.safetensors"
        if name == "latents not rotated":
            vae_file = not_rotated(vae_file, Path(q.cfg.checkpoints) / "not-rotated" / "vae" / "best.safetensors")
        seconds = q.unet(run, vae_file, q.cfg.epochs or 16, *flags)
        model, _, meta, _ = load_run(Path(q.cfg.checkpoints) / run, "final", q.device)
        facts = {
            "loss_val": round(meta["metrics"]["loss/val"], 4),
            "loss_train": round(meta["metrics"]["loss/train"], 4),
        }
        facts |= {"parameters": sum(p.numel() for p in model.parameters()), "seconds": round(seconds)}
        q.generated(name, run, model.scheduler.fast_timesteps, "dpm++2m", **facts)


# (run, its flags): what the sampler table is made of. Several seeds where the question is close.
TRAININGS = {
    "logsnr-10-v-seed0": [],
    "full-v-seed0": ["--grid", "full"],
    "logsnr-10-v-seed1": ["--seed", 1],
    "full-v-seed1": ["--grid", "full", "--seed", 1],
    "nonuniform-10-v": ["--grid", "nonuniform"],
    "logsnr-10-eps": ["--prediction", "eps"],
    "nonuniform-10-eps": ["--grid", "nonuniform", "--prediction", "eps"],
    "uniform-10-v": ["--grid", "uniform"],
    "logsnr-5-v": ["--num-steps", 5],
    "logsnr-20-v": ["--num-steps", 20],
    "full-eps": ["--grid", "full", "--prediction", "eps"],
    "logsnr-10-v-seed2": ["--seed", 2],
    "full-v-seed2": ["--grid", "full", "--seed", 2],
}


def study_samplers(q: Quality) -> None:
    """Weights of every grid, by every solver: Fast-DDPM's own timesteps, and the full grid's at any number."""
    for run in q.mine(list(TRAININGS)):
        flags = [*SMALL_UNET, *TRAININGS[run]]
        q.unet(run, Path(q.cfg.vae_run) / "vae" / "best.safetensors", q.cfg.epochs or 16, *flags)
        model, _, _, _ = load_run(Path(q.cfg.checkpoints) / run, "final", q.device)
        own, abar = model.scheduler.config, model.scheduler.abar
        grid, steps = ("logsnr", 10) if own["grid"] == "full" else (own["grid"], own["num_steps"])
        plans = [(grid, steps, "dpm++2m", 0)]
        if not run.endswith(("seed1", "seed2")):
            plans += [(grid, steps, "ddim", 0), (grid, steps, "ddim", 1)]
        if run == "full-v-seed0":
            plans += [("logsnr", 5, "dpm++2m", 0), ("logsnr", 20, "dpm++2m", 0), ("logsnr", 50, "ddim", 0)]
            plans += [("uniform", 10, "dpm++2m", 0), ("nonuniform", 10, "dpm++2m", 0), ("nonuniform", 10, "ddim", 0)]
        for grid, steps, solver, eta in plans:
            name = f"{run}/{grid}-{steps}-{solver}" + f"-eta{eta}" * bool(eta)
            q.generated(name, run, make_grid(grid, steps, abar).tolist(), solver, float(eta), trained_on=own["grid"])
        if run == "full-v-seed0":  # a thousand steps take half the images, and ten steps as many beside them
            half = q.cfg.num_images // 2
            for grid, steps, solver, eta in (("logsnr", 10, "dpm++2m", 0), ("full", 1000, "ddim", 1)):
                name, timesteps = f"{run}/{grid}-{steps}-{solver}, {half} images", make_grid(grid, steps, abar).tolist()
                q.generated(name, run, timesteps, solver, float(eta), half, trained_on="full")


# How timesteps are drawn for training: the ten of sampling or all; alike, where log-SNR is about 0, or by their weight;
# rectified flow.
DRAWS = {
    "full": ["--grid", "full"],
    "full, log-SNR": ["--grid", "full", "--log-snr", 0, 3, "--loss-weight", "uniform"],
    "full, by weight": ["--grid", "full", "--draw-by-weight"],
    "ten": [],
    "ten, uniform weights": ["--loss-weight", "uniform"],
    "ten, log-SNR": ["--log-snr", 0, 3, "--loss-weight", "uniform"],
    "ten, by weight": ["--draw-by-weight"],
    "flow": ["--grid", "full", "--prediction", "flow", "--log-snr", 0, 2, "--loss-weight", "uniform"],
}


def study_draws(q: Quality) -> None:
    """Every draw of timesteps, at equal cost, and images of ten network calls; for the first seed also of a hundred."""
    abar = NoiseScheduler_Fast_DDPM().abar
    for seed in range(3):
        for draw_name in q.mine(list(DRAWS)):
            run = f"draw-{draw_name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            plans = [("logsnr", 10, "dpm++2m")]
            if draw_name == "flow":
                plans += [("flow", 10, "ddim"), ("flow", 5, "heun")]
            if seed == 0 and "ten" not in draw_name:
                plans += [("logsnr", 100, "dpm++2m")]
            named = {
                f"{draw_name}, seed {seed}/{grid}-{steps}-{solver}": (grid, steps, solver)
                for grid, steps, solver in plans
            }
            if all(map(q.table.has, named)):
                continue
            flags = [*SMALL_UNET, *DRAWS[draw_name], "--seed", seed]
            q.unet(run, Path(q.cfg.vae_run) / "vae" / "best.safetensors", q.cfg.epochs or 4, *flags)
            for name, (grid, steps, solver) in named.items():
                q.generated(name, run, make_grid(grid, steps, abar).tolist(), solver)


# Variants of the training slices, for few people and many epochs: what keeps a network from learning them by heart.
VARIANTS = {
    "none": [],
    "dropout 0.1": ["--dropout", "0.1"],
    "3": ["--augment", 3],
    "3, others every 5 epochs": ["--augment", 3, "--augment-every", 5],
}


def study_variants(q: Quality) -> None:
    """Every kind of variants, at an equal number of steps: the lowest and the last loss of people held out, the loss in
    training, and images of the last weights."""
    for kind in q.mine(list(VARIANTS)):
        run = f"variants-{kind.replace(', ', '-').replace(' ', '-')}"
        flags = [*SMALL_UNET, *DRAWS["flow"], *VARIANTS[kind], "--evaluate-every", 5]
        q.unet(run, Path(q.cfg.vae_run) / "vae" / "best.safetensors", q.cfg.epochs or 40, *flags)
        log = read_jsonl(Path(q.cfg.checkpoints) / run / "diffusion" / "metrics.jsonl")
        best, last = min(log, key=lambda r: r["loss/val"]), log[-1]
        losses = {"loss_val": last["loss/val"], "best_loss_val": best["loss/val"], "loss_train": last["loss/train"]}
        grid = make_grid("logsnr", 10, load_run(Path(q.cfg.checkpoints) / run, "final", q.device)[0].scheduler.abar)
        facts = {"best_epoch": best["epoch"], "people": len({*q.train.people})}
        q.generated(kind, run, grid.tolist(), "dpm++2m", **facts, **{k: round(v, 4) for k, v in losses.items()})


def study_students(q: Quality) -> None:
    """Students of 4, 2 and 1 steps of the full grid's first run, beside their teacher in as many steps and in ten."""
    teacher = "full-v-seed0"
    flags = [*SMALL_UNET, *TRAININGS[teacher]]
    q.unet(teacher, Path(q.cfg.vae_run) / "vae" / "best.safetensors", q.cfg.epochs or 16, *flags)
    abar = load_run(Path(q.cfg.checkpoints) / teacher, "final", q.device)[0].scheduler.abar
    if not q.cfg.part:
        q.generated("teacher, 10 steps", teacher, make_grid("logsnr", 10, abar).tolist(), "dpm++2m")
    for n in q.mine(["4", "2", "1"]):
        grid, run = make_grid("student", int(n), abar).tolist(), f"student-{n}"
        q.generated(f"teacher, {n} steps", teacher, grid, "dpm++2m")
        where = ["--checkpoints", q.cfg.checkpoints, "--cache", q.cfg.cache, "--device", q.cfg.device]
        few = ["--trajectories", 2048, "--epochs", q.cfg.epochs or 16, "--lr", "3e-4", "--ema-decay", "0.998"]
        named = ["--teacher", teacher, "--run", run, "--num-steps", n, "--wandb", "disabled"]
        seconds = script("distil.py", *where, *named, *few)
        q.generated(f"student, {n} steps", run, grid, "ddim", seconds=round(seconds))


SHIPPED = {"teacher": "", "student of 4 steps": "student", "student of 2 steps": "student-2"}  # folders


def study_shipped(q: Quality) -> None:
    """The published weights of real slices, teacher and students: the same images by each, as predict.py draws them."""
    n, train = q.cfg.num_images, q.judge.train
    floor = f"floor, {n} images"  # distances grow where images are fewer, so the floor has to have as many
    if not q.cfg.part and not q.table.has(floor):
        q.table.add({"name": floor, **q.judge.score(q.judge.held_out.sample(n, 3)), **q.stamp})
    for name in q.mine(list(SHIPPED)):
        if q.table.has(name):
            continue
        model, vae, _, _ = load_run(Path(q.cfg.vae_run) / SHIPPED[name], "best", q.device, "auto")
        known = images_of(q.train, model.attributes).conditions
        assert known is not None
        y, how, start = known[stratified(len(known), n, 0)], plan_sampling(PredictConfig(), model), time.time()
        pixels, _ = generate_images(EvaluateConfig(), model, vae, y, how, Ranks(q.device))
        seconds = time.time() - start
        images = Images(pixels, torch.zeros(n), np.arange(n).astype(str))
        symmetry = [anatomy.measure(s.pixels.numpy())["symmetry"] for s in (images, train)]
        row = {"name": name, "steps": len(how["timesteps"]), "images_per_s": round(n / seconds, 2)}
        row |= {"texture": len(vae.texture.scheduler.timesteps) if vae.texture else 0}
        row |= {"symmetry_d": round(float(anatomy.cohens_d(*symmetry)), 2)}
        q.show(name, pixels)
        q.table.add({**row, **q.judge.score(images), **q.stamp})


COLUMNS = {
    "PSNR": "PSNR", "SSIM": "SSIM", "reconstruction_high_frequencies_db": "its high freq., dB", "loss_val": "loss",
    "best_loss_val": "lowest", "best_epoch": "in epoch", "loss_train": "in training",
    "frechet_vgg": "Fréchet VGG", "frechet_ae": "Fréchet AE", "kernel_vgg": "kernel VGG", "kernel_ae": "kernel AE",
    "precision_vgg": "precision", "recall_vgg": "recall", "precision_ae": "precision AE", "recall_ae": "recall AE",
    "high_frequencies_db": "high freq., dB", "two_sample_accuracy": "two-sample", "two_sample_auc": "AUC",
    "MONAI_FID": "MONAI FID", "MONAI_MS_SSIM": "MONAI MS-SSIM", "spread": "spread, min … max", "copy_rate": "copies",
    "symmetry_d": "symmetry, d", "decoded_per_s": "decoded/s", "images_per_s": "images/s",
}  # fmt: skip


def cell(value: object) -> str:
    if isinstance(value, list):
        return f"{min(value):.2f} … {max(value):.2f}"
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def tables(folder: Path) -> str:
    """Every table as Markdown, columns without a number left out."""
    text = []
    for path in sorted(folder.glob("quality-*.json")):
        rows = json.loads(path.read_text())
        names = [k for k in COLUMNS if any(k in r for r in rows)]
        text += [
            f"{path.stem}: {rows[-1]['n']} images, {rows[-1]['side']}x{rows[-1]['side']}, {rows[-1]['device']}",
            "",
        ]
        text += ["| | " + " | ".join(COLUMNS[k] for k in names) + " |", "|---|" + "---|" * len(names)]
        text += [f"| {r['name']} | " + " | ".join(cell(r.get(k)) for k in names) + " |" for r in rows]
        text.append("")
    return "\n".join(text)


def main(cfg: QualityConfig) -> None:
    if cfg.what == "tables":
        return print(tables(Path(cfg.out)))
    if cfg.what == "vae":
        return study_vae(Quality(cfg, 64))
    vae, _ = load_vae(Path(cfg.vae_run) / "vae" / "best.safetensors", torch.device("cpu"))
    q = Quality(cfg, vae.config["image_size"])
    studies = {
        "unet": study_unet, "samplers": study_samplers, "draws": study_draws, "variants": study_variants,
        "students": study_students, "shipped": study_shipped,
    }  # fmt: skip
    studies[cfg.what](q)


if __name__ == "__main__":
    main(tyro.cli(QualityConfig, description=__doc__))
