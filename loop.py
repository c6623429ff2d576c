"""What the trainings share, so that their scripts show the method alone: the bookkeeping of a run.

Here are the plan of a training (`Plan`), a run that can be stopped and resumed at any step (`Run`), the averaged
weights (`EMA`), the optimiser step with its watch for gradients that are not finite, and the micro-batch.
Nothing in this file sees a batch, a forward pass or a loss: those are in pre_train.py, train.py, texture.py and
distil.py.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from cluster import Ranks, RunLock, StopSignal, leave_early
from device import Replay, compile_networks, describe_hardware, fetch_async
from report import refresh_report
from runlog import NullLog, RunLog
from utils import UserError, derive_seed, git_commit, progress_bar
from weights import load_state, save_state, save_weights

if TYPE_CHECKING:
    from config import StepsConfig

Network = TypeVar("Network", bound=nn.Module)


class Resumable(Protocol):
    """What can be saved and put back: a network, its average, the optimiser, the schedule, the scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


@dataclass(frozen=True)
class Plan:
    """How long a training is."""

    batch: int  # images in a step, over all ranks
    steps_per_epoch: int
    steps: int  # in all

    @classmethod
    def of(cls, cfg: StepsConfig, n: int) -> Plan:
        """The plan for n images: an epoch has n // batch steps, and what is left over waits for the next shuffle."""
        batch = min(cfg.batch_size, n)
        return cls(batch, n // batch, cfg.epochs * (n // batch))


# ---------------------------------------------------------------------------------------------------------------------
# A run


# Settings that may differ between the command that started a run and the one that continues it. With any other
# difference the resumed run would be a mixture of two.
FREE_TO_CHANGE = {
    "epochs", "device", "wandb", "cache", "checkpoints", "save_minutes", "fresh", "dry_run", "gif_every",
    "sample_every", "data", "micro_batch", "adversarial", "compile",
}  # fmt: skip


def check_same_run(cfg: StepsConfig, fingerprint: str, source: str, state: Mapping[str, Any], folder: Path) -> None:
    """UserError if this command would continue a run that was started with other settings or from other data.

    `source` says in words what `fingerprint` was computed from. A setting that the run does not know, because the flag
    is newer than the run, counts as that flag's default: new flags must do nothing by default (CONTRIBUTING.md).
    """
    old, new = {**asdict(type(cfg)()), **state["config"]}, asdict(cfg)
    changed = [name for name in new if name not in FREE_TO_CHANGE and old[name] != new[name]]
    if changed:
        was = ", ".join(f"{name} {old[name]} -> {new[name]}" for name in changed)
        raise UserError(f"{folder} was started with other settings ({was}): use those, another --run, or --fresh")
    if state["data"] != fingerprint:
        raise UserError(f"{folder} was started on other {source}: use another --run or --fresh")


def open_run(cfg: StepsConfig, stage: str) -> Path:
    """Return the folder CHECKPOINTS/RUN/<stage>, made, writable and free of half-written files.

    With --fresh, an older folder is moved to CHECKPOINTS/RUN/old-DATE/<stage> first.
    """
    folder = Path(cfg.checkpoints) / cfg.run / stage
    if cfg.fresh and folder.exists():
        old = folder.parent / f"old-{time.strftime('%Y%m%d-%H%M%S')}" / stage
        old.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, old)
        print(f"the old {stage} run is now in {old}")
    folder.mkdir(parents=True, exist_ok=True)
    for torn in folder.rglob(".*.tmp"):  # left by a job that was killed while it wrote
        torn.unlink()
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written: choose another --checkpoints folder")
    return folder


class Run:
    """One stage ("vae", "diffusion" or "texture") of a run: its lock, folder, log and checkpoints, and the
    step it has reached.

    It counts, saves, logs and closes. The script goes through these calls in this order:

        with Run(cfg, "diffusion", plan, stop, device) as run:           # locks and opens the folder
            run.track(3, model=model, ema=ema, optimizer=optimizer, ...)  # all that resuming needs
            state = run.resume(fingerprint, "slices than DIR now holds")  # what was saved last, or None
            if run.finished: return
            run.begin(meta, model, [unet], trial)                        # log, micro-batch, compilation, progress bar
            for epoch in run.epochs():                                   # from the first one not yet evaluated
                for step in run.steps(epoch):                            # saves on time, leaves after a signal
                    added, norm = gradients(x, noise)                    # forward, backward, clip (`Gradients`)
                    optimise(model, optimizer, ema, added)
                    run.took(added, norm)                                # counts the step
                run.end_epoch(numbers, ema.module)                       # log, best weights, curves, report
            run.save()                                                   # last.pt and best.safetensors
            run.save_final(ema.module)                                   # final.safetensors: now it is finished

    Public: `ranks`, `folder`, `step` (steps done), `rows` (this rank's rows of a batch), `micro` (images at a time).
    """

    def __init__(self, cfg: StepsConfig, stage: str, plan: Plan, stop: StopSignal, device: torch.device):
        self.cfg, self.plan, self.stop, self.device = cfg, plan, stop, device
        self.ranks = Ranks(device)
        self.folder = Path(cfg.checkpoints) / cfg.run / stage
        self.ranks.run_on_rank0(self._open)
        self.log: NullLog = NullLog()
        self.watch = NonFiniteWatch(device)
        self.bar: Any = None
        self.parts: dict[str, Resumable] = {}
        self.extra: dict[str, Any] = {}  # of this script alone, saved with the state
        self.meta: dict[str, Any] = {}
        self.step, self.evaluated, self.best = 0, 0, float("inf")  # evaluated: the step of the last evaluation
        self.resumed = self.finished = False
        # The best weights since the last save. They wait in memory, because an epoch can be a matter of seconds.
        self.best_so_far: tuple[nn.Module, dict[str, Any]] | None = None

    def _open(self) -> None:
        self.lock = RunLock(self.folder)
        open_run(self.cfg, self.folder.name)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, where: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
        if kind is None:
            self._close()

    def _close(self) -> None:
        self.stop.end()
        self.log.close()
        self.ranks.close()

    # What resuming needs

    def track(self, sums: int, **parts: Resumable) -> None:
        """Name all that must come back when the run is resumed, and how many numbers `took` adds up."""
        self.parts = parts
        # Since the last evaluation, over the steps taken: the script's numbers, the gradient norm, the number of steps.
        self.sums = torch.zeros(sums + 2, device=self.device)

    def resume(self, fingerprint: str, source: str) -> dict[str, Any] | None:
        """Put the saved state back into the tracked parts and return it, or None where nothing was saved.

        Sets `finished` and says so where nothing is left to do. UserError if the run was started with other settings or
        on other data (`check_same_run`), or if the ranks do not see the same files.
        """
        self.fingerprint = fingerprint
        state = self.ranks.rank0_first(lambda: load_state(self.folder / "last.pt"))
        if state:
            check_same_run(self.cfg, fingerprint, source, state, self.folder)
            # A part that only the run or only this command has: --adversarial was turned on or off.
            saved = {name for name, value in state.items() if isinstance(value, dict)} - {"config"}
            for name in sorted(saved ^ {*self.parts}):
                how = "with" if name in saved else "without"
                raise UserError(f"{self.folder} was started {how} a {name}: go on so, or start over with --fresh")
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.evaluated, self.best = state["step"], state["evaluated"], state["best"]
            self.sums = state["sums"].to(self.device)
            self.resumed = True
            # A run that was killed after its last step, but before its last file was written, is not finished.
            self.finished = self.step >= self.plan.steps and (self.folder / "final.safetensors").exists()
            if self.finished:
                print(f"{self.folder} is finished: {self.cfg.epochs} epochs; more with --epochs, again with --fresh")
            else:
                print(f"resuming {self.folder} at epoch {self.step / self.plan.steps_per_epoch:.2f}")
        # Ranks that see another disk would silently train something else.
        self.ranks.check_same(fingerprint, self.step)
        return state

    def begin(
        self, meta: Mapping[str, Any], model: nn.Module, networks: Sequence[nn.Module], ddp: Sequence[nn.Module],
        trial: Callable[[int], object], log_name: str = "",
    ) -> None:  # fmt: skip
        """Open the log, find the micro-batch, compile `networks`, and start the clock and the progress bar.

        `meta` goes into the header of the weights. `trial(n)` is a forward and backward pass of n images through the
        networks of `ddp`, which are as `wrap_ddp` returned them. From here on there is something to save, and so Ctrl-C
        saves before it leaves.
        """
        hardware = describe_hardware(self.device)
        self.meta = {**meta, "config": asdict(self.cfg), "commit": git_commit(), "hardware": hardware}
        # Only now, because opening the log drops the rows after the step at which the run resumes.
        if self.ranks.is_main:
            self.log = RunLog(self.folder, self.cfg, log_name or self.folder.name, self.step)
        # Beside a step there must be room for the gradient buckets of DDP and the best weights, and, in a run that is
        # new, for the two moments of AdamW, which are made in its first step.
        copies = 2 if self.resumed else 4
        self.rows = self.ranks.batch_rows(self.plan.batch)
        share = self.rows.stop - self.rows.start
        torch.backends.cudnn.benchmark = True  # steps have one shape: let cuDNN try which of its kernels is fastest
        with self.ranks.no_sync(*ddp):  # ranks may try different numbers of images
            self.micro = find_micro_batch(self.cfg.micro_batch, share, model, copies, trial)
            compile_networks(self.cfg.compile, networks, lambda: trial(self.micro), self.device)
        # The clock starts after everything that happens once, so that images/s are those of the steps.
        batch = self.plan.batch
        self.bar = progress_bar(self.plan.steps * batch, self.step * batch)
        self.saved_at = self.clock = time.time()
        self.plotted_at = 0.0
        self.clock_step = self.step
        self.stop.begin()

    # The loop

    def epochs(self) -> Iterator[int]:
        """Epochs that are not evaluated yet, counted from 1. After a kill the first one may have no step left to do."""
        yield from range(self.evaluated // self.plan.steps_per_epoch + 1, self.cfg.epochs + 1)

    def steps(self, epoch: int) -> Iterator[int]:
        """The steps that are left of an epoch; the body of the loop calls `took` once for each.

        Between two steps the run is saved every --save-minutes. After a signal it is saved and the process exits: with
        130 after Ctrl-C, else with 75.
        """
        while self.step < epoch * self.plan.steps_per_epoch:
            # A signal can reach one rank alone, and all of them must leave at the same step.
            leaving = self.ranks.any_rank(self.stop, self.step)
            if leaving or time.time() - self.saved_at > 60 * self.cfg.save_minutes:
                self.save()
            if leaving:
                self.leave()
            yield self.step

    def leave(self) -> NoReturn:
        """After a signal, on all ranks: exit with 130 after Ctrl-C, else with 75. What is kept is saved before."""
        if self.bar is not None:
            self.bar.close()
        self._close()
        leave_early(self.stop, self.step / self.plan.steps_per_epoch)

    def took(self, added: Tensor, norm: Tensor) -> None:
        """Count a step, and add what `Gradients` returned for it to `sums`.

        After 20 steps in a row whose gradients were not finite the run is saved and ends with a UserError.
        """
        # All of it stays on the device, because reading a number from a GPU would wait for the step to finish.
        self.sums += added
        self.step += 1
        self.bar.update(self.plan.batch)
        if stuck := self.watch.stuck_at(norm, self.step):
            self.save()
            self.ranks.fail(self.watch.sentence(stuck, stuck / self.plan.steps_per_epoch, self.folder))

    def means(self) -> list[float]:
        """Means of the numbers given to `took`, over the steps since the last evaluation that were not skipped."""
        *sums, _, taken = self.sums.tolist()
        return [value / max(1.0, taken) for value in sums]

    def is_last(self, epoch: int) -> bool:
        """Is this the last epoch of the training?"""
        return epoch == self.cfg.epochs

    def evaluates(self, epoch: int) -> bool:
        """Does this epoch end with an evaluation?"""
        return epoch % self.cfg.evaluate_every == 0 or self.is_last(epoch)

    def end_epoch(
        self, numbers: dict[str, float], module: nn.Module, better: bool = False, pictures: Iterable[str] = (),
        people: bool = False,
    ) -> None:  # fmt: skip
        """Log the numbers of an evaluated epoch; keep `module` if it is the best so far, by "loss/val" or as `better`.

        `numbers` must hold "loss/train" and "loss/val"; it is completed with the epoch, the speed, the gradient norm,
        the learning rate and skipped steps. `pictures` are files of the folder that were written in this epoch; they go
        to wandb, those that show `people` only where somebody asked for it, and the curves and the report are written.
        """
        # Numbers that every training logs.
        speed = (self.step - self.clock_step) * self.plan.batch / max(1e-9, time.time() - self.clock)
        *_, norm, taken = self.sums.tolist()
        optimizer: Any = self.parts["optimizer"]
        numbers |= {
            "epoch": self.step // self.plan.steps_per_epoch, "images per s": speed,
            "gradient norm": norm / max(1.0, taken), "learning rate": optimizer.param_groups[0]["lr"],
        }  # fmt: skip
        if skipped := self.step - self.evaluated - taken:
            numbers["skipped steps"] = skipped
        if self.device.type == "cuda":
            numbers["GPU memory (GB)"] = torch.cuda.max_memory_allocated(self.device) / 1e9

        # The best weights are copied now and written with the next save, so that the file fits the state.
        if better or numbers["loss/val"] < self.best:
            self.best = min(self.best, numbers["loss/val"])
            self.best_so_far = deepcopy(module), {**self.meta, "epoch": numbers["epoch"], "metrics": dict(numbers)}

        # Log, report, line on the terminal. Curves take a second, so where epochs are short they are plotted twice a
        # minute only.
        self.log.log(self.step, numbers)
        for name in pictures:
            self.log.picture(self.step, Path(name).stem, self.folder / name, people)
        if pictures and (self.is_last(int(numbers["epoch"])) or time.time() - self.plotted_at > 30):
            self.log.plot()
            if self.ranks.is_main:
                refresh_report(self.folder.parent)
            self.plotted_at = time.time()
        self.bar.write(epoch_line(numbers))
        # Begin anew with the next epoch; the time of the evaluation does not count.
        self.evaluated = self.clock_step = self.step
        self.clock = time.time()
        self.sums.zero_()

    # What is written

    def save(self) -> None:
        """Write last.pt, and before it best.safetensors if there are better weights than those on disk (rank 0)."""
        self.saved_at = time.time()
        if not self.ranks.is_main:
            return
        # Weights first: if a kill comes between the two writes, the resumed run writes the same weights again.
        if self.best_so_far:
            save_weights(self.folder / "best.safetensors", *self.best_so_far)
            self.best_so_far = None
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        counts = {"step": self.step, "evaluated": self.evaluated, "best": self.best, "sums": self.sums.cpu()}
        facts = {"config": asdict(self.cfg), "data": self.fingerprint}
        save_state(self.folder / "last.pt", {**parts, **counts, **facts, **self.extra})

    def save_final(self, module: nn.Module, **more: Any) -> None:
        """Write final.safetensors, whose header also says `more` (rank 0)."""
        if self.ranks.is_main:
            facts = {**self.meta, **more, "epoch": self.cfg.epochs, "metrics": self.log.rows[-1]}
            save_weights(self.folder / "final.safetensors", module, facts)


def epoch_line(numbers: Mapping[str, float]) -> str:
    """What the terminal shows of an epoch."""
    line = f"epoch {numbers['epoch']:4.0f}  train {numbers['loss/train']:.4f}  val {numbers['loss/val']:.4f}"
    if "PSNR/val" in numbers:
        line += f"  PSNR {numbers['PSNR/val']:.2f} dB  SSIM {numbers['SSIM/val']:.4f}"
    line += f"  {numbers['images per s']:.0f} images/s"
    skipped = numbers.get("skipped steps", 0)
    return line + f"  {skipped:.0f} steps skipped: gradients not finite" * bool(skipped)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation


class EMA(nn.Module, Generic[Network]):
    """`module`: a copy of the model whose weights are an exponential moving average of the model's.

    A young average forgets faster: the decay is min(decay, (1 + n) / (10 + n)) after n steps, and 0 at the first.
    """

    module: Network
    n_averaged: Tensor

    def __init__(self, model: Network, decay: float):
        super().__init__()
        self.module = deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.eval()
        self.register_buffer("n_averaged", torch.tensor(0))  # stays on the host, where reading it costs no wait

    @torch.no_grad()
    def update(self, model: Network, taken: Tensor) -> None:
        """Take in the model's weights, unless the step was skipped (`taken`, a scalar on the device, is 0)."""
        averaged: list[Tensor] = [*self.module.parameters()]
        current: list[Tensor] = [*model.parameters()]
        n = int(self.n_averaged)
        # The first time the copy is replaced, so that the random initial weights do not linger in the average.
        weight = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0
        if taken.device.type == "cpu":
            if not taken:
                return
            torch._foreach_lerp_(averaged, current, weight)
        else:  # nobody waits to see whether the step was taken, so n counts it either way: it matters to the first few
            change = [*torch._foreach_sub(current, averaged)]
            torch._foreach_mul_(change, weight * taken)
            torch._foreach_add_(averaged, change)
        self.n_averaged += 1


def make_optimizer(params: Iterable[Any], cfg: StepsConfig) -> torch.optim.AdamW:
    """AdamW, fused: such a one skips steps that are not finite by itself (`optimise`)."""
    return torch.optim.AdamW(params, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def make_scaler(amp_dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss for float16, whose small gradients would become 0; does nothing in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)


def clip_gradients(
    modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip: float
) -> Tensor:
    """Unscale the gradients, and scale those of each module down to a norm of `clip` at most (0: leave them).

    Returns the norm of the first module's gradients before clipping, a scalar on the device, or that of a module whose
    gradients are not finite.
    """
    # Clipping needs gradients at their true scale; the scaler remembers whether it met one that is not finite.
    scaler.unscale_(optimizer)
    norm, *others = (nn.utils.clip_grad_norm_(m.parameters(), clip or float("inf")).detach() for m in modules)
    for other in others:
        norm = torch.where(other < float("inf"), norm, other)
    scaler.update()  # of the scale of the next step
    return norm


class Gradients:
    """The clipped gradients of a step, and what is to be logged about it.

    `call(weight, *tensors)` is the script's own: the forward and backward pass of some rows of the step's tensors with
    their mean loss times `weight`; it returns numbers [...] that add up over the rows. It runs for each micro-batch in
    turn (`Ranks.micro_batches`, which `ranks`, `batch`, `micro` and `ddp` are for). On a GPU, if one process takes the
    whole batch at once, the call and the clipping are recorded in the first step as a CUDA graph: small batches are
    bound by the hundreds of kernels that the host would have to launch one by one.
    """

    def __init__(
        self, call: Callable[..., Tensor], modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler, clip: float, ranks: Ranks, batch: int, micro: int, ddp: Sequence[nn.Module] = (),
    ):  # fmt: skip
        self.call, self.ranks, self.batch, self.micro, self.ddp = call, ranks, batch, micro, ddp
        self.modules, self.optimizer, self.scaler, self.clip = modules, optimizer, scaler, clip
        self.first_row = ranks.share(batch).start
        self.replay: Replay | None = None
        self.to_record = ranks.device.type == "cuda" and ranks.size == 1 and micro >= batch

    def __call__(self, *tensors: Tensor, seed: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Leave the gradients of these tensors [rows of this rank, ...] in the modules.

        Returns the numbers of `call`, the gradients' norm and a 1, flat; all 0 where the norm is not finite; and the
        norm. The next call may overwrite both. With a `seed`, random numbers inside the networks (dropout) depend on it
        and on the rows.
        """
        if self.to_record:
            self._record(*tensors)
        if self.replay:
            if seed:
                torch.manual_seed(derive_seed(*seed, self.first_row))
            added, norm = self.replay(*tensors)
            return added, norm
        parts = []
        for rows, weight, context in self.ranks.micro_batches(self.batch, self.micro, *self.ddp):
            if seed:
                torch.manual_seed(derive_seed(*seed, self.first_row + rows.start))
            with context:
                parts.append(self.call(weight, *(t[rows] for t in tensors)))
        return self._finish(self.ranks.sum(sum(parts[1:], parts[0])))

    def _finish(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        norm = clip_gradients(self.modules, self.optimizer, self.scaler, self.clip)
        added = torch.cat([numbers.flatten(), norm.view(1), torch.ones_like(norm).view(1)])
        return torch.where(norm < float("inf"), added, 0.0), norm

    def _record(self, *tensors: Tensor) -> None:
        self.to_record = False
        parameters = [p for m in self.modules for p in m.parameters() if p.requires_grad]
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        try:
            self.replay = Replay(
                lambda *tensors: self._finish(self.call(1.0, *tensors)), *tensors,
                parameters=parameters, warm_up=partial(self.call, 1.0),
            )  # fmt: skip
            torch.cuda.empty_cache()  # of what the warm-up took
            # A graph keeps its memory also while the run is evaluated, which may need as much again.
            kept, free = torch.cuda.memory_reserved() - before, torch.cuda.mem_get_info()[0]
            if free < kept:
                raise RuntimeError(f"it would keep {kept / 1e9:.2f} GB of memory and leave {free / 1e9:.2f}")
        except RuntimeError as e:  # torch.OutOfMemoryError, too
            print(f"the training step cannot be a CUDA graph here, going on without ({str(e).splitlines()[0]})")
            self.replay = None
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def optimise(model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA, added: Tensor) -> None:
    """One optimiser step with the gradients that are there, then average, and set gradients to None.

    The last entry of `added` (`Gradients`) is 0 where the gradients are not finite: then no step is taken in any
    precision, and nobody waits for the GPU to find out.
    """
    # A fused optimiser reads this flag on the device and skips the step; Lookahead hides it as `inner`.
    taken, fused = added[-1], cast(Any, getattr(optimizer, "inner", optimizer))
    fused.found_inf = 1 - taken
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update(model, taken)


def rehearse(
    cfg: StepsConfig, plan: Plan, modules: Sequence[nn.Module], networks: Sequence[nn.Module],
    call: Callable[..., Tensor], tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> float:  # fmt: skip
    """Seconds of a step of the plan on this device, from a few that are timed, for a dry run: it changes the modules.

    `networks` are to be compiled, and `tensors` are of a whole batch or fewer images, whose time is scaled up; the rest
    is as for `Gradients`.
    """
    device, n = tensors[0].device, len(tensors[0])
    compile_networks(cfg.compile, networks, lambda: call(1.0, *tensors), device)
    gradients = Gradients(call, modules, optimizer, scaler, cfg.grad_clip, Ranks(device), n, n)
    ema = EMA(modules[0], cfg.ema_decay)

    def seconds() -> float:
        start = time.perf_counter()
        added, _ = gradients(*tensors)
        optimise(modules[0], optimizer, ema, added)
        added.tolist()  # waits for a GPU
        return time.perf_counter() - start

    # The first steps allocate, and record a graph. Then about five seconds.
    seconds()
    spent = [seconds()]
    while sum(spent) < 5 and len(spent) < 20:
        spent.append(seconds())
    return sorted(spent)[len(spent) // 2] * plan.batch / n


class NonFiniteWatch:
    """Notices when `patience` steps in a row had gradients that are not finite, without waiting for the GPU."""

    def __init__(self, device: torch.device, patience: int = 20):
        self.patience, self.count = patience, 0
        self.norms = torch.zeros(10, device=device)  # of the latest ten steps
        self.reading: Callable[[], Any] | None = None

    def stuck_at(self, norm: Tensor, step: int) -> int:
        """Return the step at which `patience` such steps in a row were reached, else 0. May lag 20 steps."""
        self.norms[step % 10] = norm
        stuck = 0
        if step % 10 == 0:
            # The copy that was started ten steps ago has arrived: it holds the ten steps up to then.
            for s, value in enumerate(self.reading() if self.reading else [], step - 19):
                self.count = 0 if math.isfinite(value) else self.count + 1
                if self.count == self.patience:
                    stuck = stuck or s
            self.reading = fetch_async(self.norms.roll(-1))
        return stuck

    def sentence(self, step: int, epoch: float, folder: Path) -> str:
        """The sentence that ends such a run."""
        return (
            f"the gradients of {self.patience} steps in a row were not finite, up to step {step} (epoch {epoch:.2f}); "
            f"none of them was taken and {folder} keeps the weights before them: start over with --fresh and a smaller "
            "--lr, or with --precision fp32"
        )


def find_micro_batch(
    choice: int | Literal["auto"] | None, share: int, model: nn.Module, copies: int, trial: Callable[[int], object]
) -> int:
    """How many of this rank's `share` of a batch go through the network at a time.

    `choice` is --micro-batch: a number, None for all of them, or "auto" for the most that fit the GPU's memory. Then
    `trial(n)`, a forward and backward pass of n images, is tried with half as many until it fits, while `copies` copies
    of the weights lie beside it, for what a step needs later. UserError if not even one image fits.
    """
    if choice != "auto":
        return min(choice or share, share)
    n = share
    while True:
        try:
            room = [torch.empty_like(p) for p in model.parameters() for _ in range(copies)]
            trial(n)
            del room
            if n < share:
                print(f"--micro-batch auto: {n} images at a time")
            return n
        except torch.OutOfMemoryError:
            room = []
        # Give the memory back before half as many are tried.
        if n == 1:
            raise UserError("not even one image fits the GPU's memory: take smaller --channels, or a larger GPU")
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        n = -(-n // 2)
