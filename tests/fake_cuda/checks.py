"""What is checked on the card that does nothing: python checks.py FOLDER [PARTS OF NAMES], in a process that sees it.

FOLDER/data holds phantoms, and FOLDER/checkpoints a run `full` that was trained on them on the CPU. Every function
whose name begins with `check_` runs with each of its settings; FOLDER/results.json gets the traceback of each, empty
if all is well, and the counts that docs/speed.md shows. All in one process, because importing torch takes seconds.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import io
import itertools
import json
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import app  # noqa: E402
import distil  # noqa: E402
import evaluate  # noqa: E402
import pre_train  # noqa: E402
import predict  # noqa: E402
import texture  # noqa: E402
import train  # noqa: E402
import tsne  # noqa: E402
from cluster import Ranks  # noqa: E402
from config import (  # noqa: E402
    AppConfig,
    DistilConfig,
    EvaluateConfig,
    PredictConfig,
    PretrainConfig,
    TextureConfig,
    TrainConfig,
    TsneConfig,
    parse,
)
from device import Replay, gather_batches, pick_device, shuffled_batches, to_device_if_it_fits  # noqa: E402
from loop import EMA, Gradients, NonFiniteWatch, find_micro_batch, make_optimizer, make_scaler, optimise  # noqa: E402
from modules import Lookahead, NoiseScheduler_Fast_DDPM, StableDiffusion, UNet  # noqa: E402
from sampling import ImageSampler  # noqa: E402
from utils import UserError, generator  # noqa: E402
from vae import VAE, PatchDiscriminator, Texture  # noqa: E402

FOLDER = Path(sys.argv[1])
DTYPES = (None, torch.bfloat16, torch.float16)


def count(what: str) -> int:
    """A counter of the card: see fake_cuda_count in fake_cuda.c."""
    return ctypes.CDLL(None).fake_cuda_count(what.encode())


@contextmanager
def no_wait():
    """Inside, every wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_the_card(module: nn.Module, dtype: torch.dtype | None) -> Any:
    module = module.cuda().to(memory_format=torch.channels_last)
    module.amp_dtype = dtype
    return module


def networks(dtype: torch.dtype | None, grid: str = "logsnr", steps: int = 10) -> tuple[StableDiffusion, VAE]:
    """A conditional U-Net, and a VAE with texture, tiny."""
    scheduler = NoiseScheduler_Fast_DDPM(num_steps=steps, grid=grid)
    model = StableDiffusion(UNet(2, 8, (8, 16), 1, (4,), (2, 0), dropout=0.1), scheduler)
    vae = VAE(32, 4, 2, (8, 16), 1)
    vae.texture = on_the_card(Texture(32, (8, 16), num_steps=2), dtype)
    return on_the_card(model, dtype), on_the_card(vae, dtype)


def take_steps(
    gradients: Gradients, model: nn.Module, optimizer: torch.optim.Optimizer, tensors: list[Tensor],
    inputs: Callable[[int, list[Tensor]], list[Tensor]], n: int = 14,
) -> None:  # fmt: skip
    """Steps as the trainings take them; from the fifth on any wait is an error."""
    device, batch = torch.device("cuda"), 8
    ema, watch, sums = EMA(model, 0.9), NonFiniteWatch(device, patience=100), torch.zeros((), device=device)
    batches = gather_batches(tensors, shuffled_batches(len(tensors[0]), batch, 0, 0), device)
    for step in range(n):
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        added, norm = gradients(*inputs(step, next(batches)), seed=(0, 9, step))
        optimise(model, optimizer, ema, added)
        sums = sums + added
        watch.stuck_at(norm, step)
    torch.cuda.set_sync_debug_mode("default")
    assert sums.shape == added.shape and all(p.grad is None for p in model.parameters())


def check_a_step_of_train_waits_for_nothing(
    dtype=DTYPES, on_the_host=(False, True), lookahead=(False, True), micro=(8, 3)
):
    model, _ = networks(dtype)
    cfg, device = TrainConfig(), torch.device("cuda")
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(dtype, device)
    optimizer = Lookahead(optimizer, k=2) if lookahead else optimizer
    call = partial(train.backward, model, model, scaler, 10)
    gradients = Gradients(call, [model], optimizer, scaler, 1.0, Ranks(device), 8, micro)
    tensors = [torch.rand(64, 2, 2, 2, 8, 8).half(), torch.zeros(64, 2)]
    if not on_the_host:
        tensors = [to_device_if_it_fits(t, device) for t in tensors]

    def inputs(step: int, batch: list[Tensor]) -> list[Tensor]:
        return [*batch, *train.step_randomness(model, 8, (2, 8, 8), cfg, generator(0, step, device=device))]

    take_steps(gradients, model, optimizer, tensors, inputs)
    assert (gradients.replay is not None) == (micro == 8), "no graph was recorded"


def check_a_step_of_pre_train_waits_for_nothing(
    dtype=DTYPES, on_the_host=(False, True), adversarial=(False, True), micro=(8, 3)
):
    vae = on_the_card(VAE(32, 4, 2, (8, 16), 1), dtype)
    discriminator = on_the_card(PatchDiscriminator((8, 8, 8)), dtype)
    cfg, device = PretrainConfig(adversarial=0.5, flip=True), torch.device("cuda")
    optimizer, _ = pre_train.make_optimizer_and_schedule(cfg, vae, discriminator, None)
    scaler = make_scaler(dtype, device)
    if adversarial:
        pre_train.freeze_encoder(vae, EMA(vae, 0.9).module)
    call = partial(pre_train.backward, vae, discriminator, discriminator if adversarial else None, scaler, cfg)
    gradients = Gradients(
        call, [vae, discriminator][: 1 + adversarial], optimizer, scaler, 1.0, Ranks(device), 8, micro
    )
    images = torch.zeros(64, 32, 32, dtype=torch.uint8)
    u, strength = torch.zeros(8, 5, device=device), torch.zeros(8, device=device)

    def inputs(step: int, batch: list[Tensor]) -> list[Tensor]:
        g = generator(0, step, device=device)
        noise = torch.randn(8, *vae.latent_shape, generator=g, device=device)
        return [*batch, u, noise, strength.fill_(step / 10)]

    take_steps(gradients, vae, optimizer, [images if on_the_host else images.to(device)], inputs)
    assert (gradients.replay is not None) == (micro == 8), "no graph was recorded"


def check_a_step_of_texture_waits_for_nothing(dtype=DTYPES, on_the_host=(False, True), micro=(8, 3)):
    model, cfg, device = on_the_card(Texture(32, (8, 16), num_steps=2), dtype), TextureConfig(), torch.device("cuda")
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(dtype, device)
    gradients = Gradients(
        partial(texture.backward, model, scaler), [model], optimizer, scaler, 1.0, Ranks(device), 8, micro
    )
    tensors = [torch.zeros(64, 32, 32, dtype=torch.uint8, device="cpu" if on_the_host else device)]

    def inputs(step: int, batch: list[Tensor]) -> list[Tensor]:
        return [*batch, *texture.step_randomness(model, 8, generator(0, step, device=device))]

    take_steps(gradients, model, optimizer, tensors, inputs)
    assert (gradients.replay is not None) == (micro == 8), "no graph was recorded"


def check_a_step_of_distil_waits_for_nothing(dtype=DTYPES, on_the_host=(False, True), micro=(8, 3)):
    model, _ = networks(dtype, "student", 4)
    cfg, device = DistilConfig(), torch.device("cuda")
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(dtype, device)
    call = partial(distil.backward, distil.Student(model), scaler)
    gradients = Gradients(call, [model], optimizer, scaler, 1.0, Ranks(device), 8, micro)
    tensors = [torch.rand(64, 5, 2, 8, 8).half(), torch.zeros(64, 2)]
    if not on_the_host:
        tensors = [t.to(device) for t in tensors]

    def inputs(step: int, batch: list[Tensor]) -> list[Tensor]:
        g = generator(0, step, device=device)
        return [*batch, torch.randint(4, (8,), generator=g, device=device)]

    take_steps(gradients, model, optimizer, tensors, inputs)
    assert (gradients.replay is not None) == (micro == 8), "no graph was recorded"


def check_the_sampler_is_a_graph_that_waits_for_nothing(
    dtype=DTYPES,
    guidance=(1.0, 2.0),
    how=({}, {"solver": "ddim"}, {"timesteps": [5, 400, 999], "solver": "dpm++2m", "eta": 1.0}),
    grid=("logsnr", "full", "student"),
):  # fmt: skip
    model, vae = (m.eval().requires_grad_(False) for m in networks(dtype, grid, 4))
    sampler = ImageSampler(model, vae, 4, guidance, **how)
    assert sampler.replay is not None, "no graph was recorded"
    with no_wait():
        before = count("graphs")
        pixels, z = sampler(0, range(3), torch.zeros(3, 2))
        assert count("graphs") == before + 1
    assert (pixels.shape, z.shape, pixels.is_cuda) == ((3, 32, 32), (3, 2, 8, 8), True)
    weights = {p.dtype for m in (model.unet, vae.decoder, vae.texture) for p in m.parameters() if p.ndim == 4}
    assert weights == {dtype or torch.float32}, "the weights are converted anew in every call"


def check_a_graph_that_cannot_be_recorded_changes_nothing():
    stream = torch.cuda.current_stream()
    p = nn.Parameter(torch.zeros(3, device="cuda"))
    try:
        Replay(lambda x: (x + x.sum().item(),), p.detach())
    except RuntimeError:
        pass
    else:
        raise AssertionError("a wait was recorded")
    assert torch.cuda.current_stream() == stream
    replay = Replay(lambda x: (x + 1,), p.detach())  # and the next one can be
    with no_wait():
        replay(p.detach())


def check_a_step_that_cannot_be_recorded_goes_on_without():
    layer, device = nn.Linear(3, 3).cuda(), torch.device("cuda")
    optimizer, scaler = make_optimizer(layer.parameters(), TrainConfig()), make_scaler(None, device)

    def call(weight: float, x: Tensor) -> Tensor:
        loss = layer(x).mean()
        loss.item()
        (weight * loss).backward()
        return loss.detach()

    gradients = Gradients(call, [layer], optimizer, scaler, 1.0, Ranks(device), 4, 4)
    for _ in range(3):
        added, _ = gradients(torch.zeros(4, 3, device=device))
        assert layer.weight.grad is not None and added.shape == (3,) and gradients.replay is None


def check_the_second_card_is_made_the_current_one(name=("cuda:1", "cuda:0")):
    device = pick_device(name)
    try:
        assert torch.cuda.current_device() == device.index
        model, vae = (m.to(device).eval().requires_grad_(False) for m in networks(None))
        sampler = ImageSampler(model, vae, 2)
        assert sampler.replay is not None
        pixels, _ = sampler(0, range(2), torch.zeros(2, 2))
        assert pixels.device == device and predict.fetch_async(pixels)().shape == (2, 32, 32)
    finally:
        torch.cuda.set_device(0)


def check_float32_is_not_tf32():
    pick_device("cuda")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def check_on_a_small_card_micro_batch_auto_halves_until_it_fits():
    model, asked = nn.Linear(1000, 1000).cuda(), []

    def trial(n: int) -> None:
        asked.append(n)
        model(torch.empty(n, 1000, device="cuda")).square().mean().backward()

    n = find_micro_batch("auto", 2**18, model, 4, trial)
    assert 1 < n < 2**18 and asked == [2**18 >> i for i in range(len(asked))] and asked[-1] == n
    try:
        find_micro_batch("auto", 1, model, 4, lambda n: trial(2**18))
    except UserError as e:
        assert "not even one image fits" in str(e)
    else:
        raise AssertionError("a card that is too small was not noticed")


# ---------------------------------------------------------------------------------------------------------------------
# Whole scripts


class Waits:
    """Counts waits for the GPU inside the loop over steps of a training, from its fifth step on, by line."""

    def __init__(self, script: Any):
        self.script, self.found = script, []
        source, first = inspect.getsourcelines(script.main)
        begin = next(i for i, line in enumerate(source) if "in run.steps(" in line)
        end = next(i for i, line in enumerate(source) if "run.took(" in line)
        self.lines = range(first + begin + 1, first + end + 1)

    def show(self, message: Any, *rest: Any, **more: Any) -> None:
        for frame, line in traceback.walk_stack(None) if "synchronizing" in str(message) else ():
            if frame.f_code is self.script.main.__code__ and line in self.lines and frame.f_locals["run"].step > 3:
                self.found.append(f"{self.script.__name__}.py:{line}, step {frame.f_locals['run'].step}")

    def __enter__(self) -> Waits:
        self.old, warnings.showwarning = warnings.showwarning, self.show
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        warnings.simplefilter("ignore")
        warnings.showwarning = self.old


WHERE = [
    "--checkpoints", str(FOLDER / "checkpoints"), "--cache", str(FOLDER / "cache"), "--device", "cuda",
    "--wandb", "disabled",
]  # fmt: skip
DATA = ["--data", str(FOLDER / "data")]
TINY = ["--epochs", "2", "--batch-size", "16", "--compile", "off", "--fresh"]
UNET = ["--channels", "8", "16", "--blocks", "1", "--attention", "4", "--sample-every", "2"]


def check_pre_train_from_start_to_end(more=((), ("--adversarial", "0.5", "--flip"), ("--micro-batch", "5"))):
    flags = f"--run card{'-'.join(more)} --image-size 32 --downsample 4 --latent-channels 2".split()
    flags += ["--channels", "8", "16", "--blocks", "1"]
    with Waits(pre_train) as waits:
        try:
            pre_train.main(parse(PretrainConfig, [*WHERE, *DATA, *TINY, *flags, *more]))
        except torch.linalg.LinAlgError:  # in the end, of the covariance of latents that nobody computed
            pass
    assert not waits.found, waits.found


def check_train_from_start_to_end(
    more=(
        (),
        ("--lookahead", "--precision", "fp16"),
        ("--micro-batch", "5"),
        ("--augment", "1", "--augment-every", "1"),
    ),
):
    run = f"tiny{'-'.join(more)}"
    shutil.copytree(FOLDER / "checkpoints" / "full" / "vae", FOLDER / "checkpoints" / run / "vae")
    with Waits(train) as waits:
        train.main(parse(TrainConfig, [*WHERE, *DATA, *TINY, *UNET, "--run", run, "--dropout", "0.1", *more]))
    assert not waits.found, waits.found


def check_texture_from_start_to_end(more=((), ("--micro-batch", "5"))):
    run = f"textured{'-'.join(more)}"
    shutil.copytree(FOLDER / "checkpoints" / "full" / "vae", FOLDER / "checkpoints" / run / "vae")
    flags = ["--run", run, "--channels", "8", "16", "--num-steps", "2"]
    with Waits(texture) as waits:
        texture.main(parse(TextureConfig, [*WHERE, *DATA, *TINY, *flags, *more]))
    assert not waits.found, waits.found


def check_distil_from_start_to_end():
    flags = "--teacher full --run student --trajectories 96 --teacher-steps 8 --num-steps 2".split()
    # The texture of the check above, for the student that was made before
    texture_flags = "--teacher textured --part texture --run student --trajectories 32 --num-steps 1".split()
    for more in (flags, texture_flags):
        with Waits(distil) as waits:
            distil.main(parse(DistilConfig, [*WHERE, *TINY, *more]))
        assert not waits.found, waits.found


def check_a_dry_run_times_steps_as_a_graph():
    before = count("graphs")
    train.main(parse(TrainConfig, [*WHERE, *DATA, *TINY, *UNET, "--run", "full", "--dry-run"]))
    flags = "--run none --image-size 32 --downsample 4 --latent-channels 2 --channels 8 16 --blocks 1".split()
    pre_train.main(parse(PretrainConfig, [*WHERE, *DATA, *TINY, *flags, "--adversarial", "1", "--dry-run"]))
    distil.main(parse(DistilConfig, [*WHERE, "--teacher", "full", "--run", "none", "--compile", "off", "--dry-run"]))
    texture.main(parse(TextureConfig, [*WHERE, *DATA, *TINY, "--run", "full", "--channels", "8", "16", "--dry-run"]))
    assert count("graphs") >= before + 4


def check_predict_from_start_to_end(more=((), ("--guidance", "2"), ("--solver", "ddim", "--eta", "1"))):
    out = FOLDER / f"out{'-'.join(more)}"
    predict.main(parse(PredictConfig, [*WHERE, "--run", "full", "--num-images", "5", "--out", str(out), *more]))
    assert len([*out.glob("train/*/*.png")]) == 5


def check_evaluate_from_start_to_end():
    flags = ["--run", "full", "--num-images", "32", "--resamples", "10", "--out", str(FOLDER / "report")]
    try:
        evaluate.main(parse(EvaluateConfig, [*WHERE, *DATA, *flags]))
    except UserError as e:  # once all is written: some sections need more people than there are
        assert "need" in str(e)
    assert (FOLDER / "report" / "report.md").exists()


def check_tsne_from_start_to_end():
    try:
        tsne.main(parse(TsneConfig, [*WHERE, *DATA, "--run", "full", "--perplexity", "5"]))
    except ValueError as e:  # from its library, which looks at latents that nobody computed
        assert "NaN" in str(e)


def check_on_a_small_card_train_says_what_fits(more=(("auto", 80), ("", 24))):
    """Batches that do not fit are taken in portions; where one just fits, it is no graph, which would fill the card."""
    (micro, batch), told = more, io.StringIO()
    run = f"batch{batch}"
    shutil.copytree(FOLDER / "checkpoints" / "full" / "vae", FOLDER / "checkpoints" / run / "vae")
    flags = f"--channels 64 128 --batch-size {batch} --run {run}".split() + ["--micro-batch", micro] * bool(micro)
    with redirect_stdout(told):
        train.main(parse(TrainConfig, [*WHERE, *DATA, *TINY, *UNET, *flags]))
    print(told.getvalue())
    found = re.search(r"--micro-batch auto: (\d+) images at a time", told.getvalue())
    assert (found and 1 <= int(found[1]) < batch) if micro else "it would keep" in told.getvalue(), told.getvalue()
    assert (FOLDER / "checkpoints" / run / "diffusion" / "final.safetensors").exists()


def check_the_page_generates_and_walks():
    how = {"checkpoints": str(FOLDER / "checkpoints"), "cache": str(FOLDER / "cache"), "device": "cuda"}
    studio = app.Studio(AppConfig(run=("full",), **how))
    *_, (strip, gallery, words, _) = studio.generate("full", "AD", 3, 0, 10, "dpm++2m", 2.0)
    assert strip.dtype == np.uint8 and len(gallery) == 3 and "3 images in" in words
    assert studio.walk("full", "AD", 0, 1, 0.5, 10, "ddim", 1.0)[0].dtype == np.uint8


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def count_a_step(batch: int = 16) -> dict[str, float]:
    """What the host does in a step of the `adni` U-Net with everything on the card: per step, after the first few."""
    import time

    device, cfg, n = torch.device("cuda"), TrainConfig(), 8
    model = on_the_card(
        StableDiffusion(UNet(8, 32, conditions=(2,), norm_group=24), NoiseScheduler_Fast_DDPM()), torch.bfloat16
    )
    optimizer, scaler = make_optimizer(model.parameters(), cfg), make_scaler(torch.bfloat16, device)
    ema = EMA(model, 0.999)
    call = partial(train.backward, model, model, scaler, 10)
    gradients = Gradients(call, [model], optimizer, scaler, 1.0, Ranks(device), batch, batch)
    moments, y = torch.zeros(64, 1, 2, 8, 32, 32).half().to(device), torch.zeros(64, 1, device=device)
    batches, watch = (
        gather_batches([moments, y], shuffled_batches(64, batch, 0, 0), device),
        NonFiniteWatch(device, 10**6),
    )
    sums, names = torch.zeros(22, device=device), ("launches", "graphs", "waits", "allocations", "copies", "bytes")
    for step in range(4 + n):
        if step == 4:
            before, start = [count(name) for name in names], time.perf_counter()
        z, y = next(batches)
        randomness = train.step_randomness(model, batch, (8, 32, 32), cfg, generator(0, step, device=device))
        added, norm = gradients(z, y, *randomness)
        optimise(model, optimizer, ema, added)
        sums += added
        watch.stuck_at(norm, step)
    seconds = time.perf_counter() - start
    found = {name: (count(name) - b) / n for name, b in zip(names, before)}
    return {**found, "host microseconds": 1e6 * seconds / n}


def check_a_step_launches_little_outside_of_its_graph():
    found = count_a_step()
    RESULTS["counts"] = found
    assert found["graphs"] == 1 and found["launches"] <= 25 and found["waits"] <= 0.2 and found["allocations"] == 0, (
        found
    )


RESULTS: dict[str, Any] = {}


def main() -> None:
    torch.backends.cudnn.enabled = False  # convolutions by cuBLAS: cuDNN looks at the card itself
    torch.backends.cuda.enable_cudnn_sdp(False)
    warnings.simplefilter("ignore")
    # Those for a small card run only there; FAKE_CUDA_GB is its size.
    small = torch.cuda.mem_get_info()[1] < 2e9
    wanted = sys.argv[2:] or [""]  # parts of names, for somebody who mends one thing
    for name, check in [*globals().items()]:
        right_card = ("on_a_small_card" in name) == small
        if not (name.startswith("check_") and right_card and any(part in name for part in wanted)):
            continue
        settings = {k: p.default for k, p in inspect.signature(check).parameters.items()}
        for values in itertools.product(*settings.values()):
            setting = dict(zip(settings, values))
            try:
                check(**setting)
                RESULTS.setdefault(name, "")
            except (Exception, SystemExit):
                RESULTS[name] = RESULTS.get(name, "") + f"{setting}\n{traceback.format_exc()}\n"
            torch.cuda.set_sync_debug_mode("default")
            gc.collect()  # what a failed step's traceback held: the next setting finds an empty card
            torch.cuda.empty_cache()
    (FOLDER / f"results-{'small' if small else 'large'}.json").write_text(json.dumps(RESULTS))


if __name__ == "__main__":
    main()
