"""A whole sampling run, network and guidance, of CIFAR-10's size and 1000 steps.

The published sequence, launched operation by operation, is compared with the same run with the
fused step: called step by step, bound once (a BoundStep), as a CUDA graph of one step that is
replayed, and as one graph of all steps.  A network of random weights takes as long as a trained
one; both predictions of a step come from one call on a doubled batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.contenders import (
    BETAS,
    RULE,
    SEED,
    TOLERANCE,
    largest_error,
    make_plan,
    published_log_p,
)
from benchmarks.device import Device, cpu_device, gpu_device, named_devices
from benchmarks.harness import Contender, Settings, first_words
from benchmarks.overhead import SmallUNet, parameters
from benchmarks.published import Published
from dng_kernels import BoundStep, StepPlan, StepResult, dng_step, standard_normal

__all__ = ["PARTS", "ROW", "named_devices", "report"]

STEPS = len(BETAS)
GPU_STEPS = 200  # of them, the first: more show nothing else and take minutes
CHECKED = 5  # steps after which both runs must still agree
PUBLISHED, EAGER = "published sequence, eager", "dng_step, eager"
BOUND = "BoundStep, eager"
ONE_STEP, WHOLE = "dng_step, graph of a step", "dng_step, graph of the run"
Net = Callable[[Tensor, Tensor], Tensor]  # x (2 B, ...), timesteps (2 B,) -> (2 B, ...)


@dataclass(frozen=True)
class LoopRow:
    """Result of one contender; ``speedup`` is relative to the published run."""

    benchmark: str
    network: str
    parameters: int
    batch: int
    steps: int
    contender: str
    median_s: float | None = None
    q25: float | None = None
    q75: float | None = None
    speedup: float | None = None
    goal: str = ""
    measured: str = ""
    met: str = ""
    note: str = ""


def network(place: torch.device, width: int) -> tuple[str, int, Net]:
    """A UNet for CIFAR-10's size, by diffusers if it can be imported, else plain convolutions."""
    torch.manual_seed(SEED)
    try:
        model = import_module("diffusers").UNet2DModel
    except (ImportError, RuntimeError):  # RuntimeError: diffusers is there and cannot be loaded
        plain = SmallUNet(3, width).to(place).eval()
        return "UNet, plain torch", parameters(plain), lambda x, time: plain(x, time.float())
    net = model(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    net = net.to(place).eval()
    return "UNet2DModel of diffusers", parameters(net), lambda x, time: net(x, time).sample


def published_run(
    net: Net, shape: tuple[int, ...], steps: int, place: torch.device, *, seeded: bool
) -> tuple[Tensor, Tensor]:
    """x and p after the first steps; ``seeded`` uses the noise of our run instead of its own."""
    published = Published(BETAS, torch.float32, place, guidance_scale=RULE.guidance_scale)
    x = standard_normal(SEED, shape, device=place)
    p = torch.full(shape[:1], float(RULE.posterior.prior or 0.0), device=place)  # type: ignore[union-attr]
    for step in range(steps):
        t = STEPS - 1 - step
        time = torch.full((2 * shape[0],), t, device=place)
        eps, eps_neg = net(torch.cat([x, x]), time).chunk(2)
        noise = standard_normal(SEED, shape, step=step, device=place) if seeded else None
        x, p = published.step(t, x, eps, eps_neg, p, noise)
    return x, p


class OurRun:
    """The same run with the fused step, in fixed tensors and with a step counter on the device."""

    def __init__(self, net: Net, shape: tuple[int, ...], place: torch.device, plan: StepPlan):
        self.net, self.plan = net, plan
        self.start = standard_normal(SEED, shape, device=place)
        self.doubled = torch.empty((2 * shape[0], *shape[1:]), device=place)
        self.x = self.doubled[: shape[0]]
        state = plan.init_state(shape[0])
        assert state is not None
        self.prior, self.state = state, state.clone()
        self.step = torch.zeros((), dtype=torch.int64, device=place)
        self.last = torch.tensor(STEPS - 1, device=place)
        self.out = StepResult(self.x, self.state, None, None, None)

    def reset(self) -> None:
        """Go back to the noisy end."""
        self.x.copy_(self.start)
        self.state.copy_(self.prior)
        self.step.zero_()

    def predicted(self) -> tuple[Tensor, Tensor]:
        """Both predictions, in new tensors."""
        self.doubled[len(self.x) :] = self.x
        time = (self.last - self.step).expand(len(self.doubled))
        eps, eps_neg = self.net(self.doubled, time).chunk(2)
        return eps, eps_neg

    def many(self, steps: int) -> None:
        """Take several steps, each a call."""
        given: dict[str, Any] = {"seed": SEED, "out": self.out}
        for _ in range(steps):
            eps, eps_neg = self.predicted()
            dng_step(self.plan, self.step, self.x, eps, eps_neg, self.state, **given)
            self.step += 1

    def many_bound(self, steps: int) -> None:
        """Take several steps, the first ones of the run, with a step that is bound once."""
        bound = None
        for step in range(steps):
            eps, eps_neg = self.predicted()
            if bound is None:
                own = (self.x, eps, eps_neg, self.state)
                bound = BoundStep(self.plan, *own, seed=SEED, out=self.out)
            else:
                bound.rebind(eps=eps, eps_neg=eps_neg)
            bound(step)
            self.step += 1


def check(net: Net, shape: tuple[int, ...], device: Device, ours: OurRun) -> None:
    """Raise unless both runs agree when they have the same noise."""
    x, p = published_run(net, shape, CHECKED, device.place, seeded=True)
    ours.reset()
    ours.many(CHECKED)
    bound = CHECKED * TOLERANCE[torch.float32]
    harness.check_close("x of a run", largest_error(ours.x, x), 0.0, bound)
    error = largest_error(ours.state, p.log())
    bound = CHECKED * published_log_p(torch.float32, x)
    harness.check_close("the posterior of a run", error, 0.0, bound)


def run(device: Device, batch: int, width: int, steps: int, settings: Settings) -> list[LoopRow]:
    """Check and time all contenders with one network."""
    shape = (batch, 3, 32, 32)
    name, count, net = network(device.place, width)
    ours = OurRun(net, shape, device.place, make_plan(device))
    check(net, shape, device, ours)
    blank = LoopRow(device.name, name, count, batch, steps, "")

    def from_the_start(go: Callable[[], object]) -> Callable[[], object]:
        def whole() -> None:
            ours.reset()
            go()

        return whole

    jobs: dict[str, Callable[[], object]] = {
        PUBLISHED: lambda: published_run(net, shape, steps, device.place, seeded=False),
        EAGER: from_the_start(lambda: ours.many(steps)),
        BOUND: from_the_start(lambda: ours.many_bound(steps)),
    }
    expected = ended(jobs[EAGER], ours)
    if not torch.equal(ended(jobs[BOUND], ours), expected):
        raise RuntimeError(f"{BOUND} is not the run of {EAGER}: not timed")
    rows = []
    if device.capture is not None:
        for label, length in ((ONE_STEP, 1), (WHOLE, steps)):
            try:
                ours.reset()
                replay = device.capture(lambda length=length: ours.many(length))  # type: ignore[misc]
            except RuntimeError as error:
                note = f"skipped: no graph can hold it: {first_words(error)}"
                rows.append(replace(blank, contender=label, note=note))
                continue
            again = from_the_start(lambda r=replay, n=steps // length: [r() for _ in range(n)])  # type: ignore[misc]
            if not torch.equal(ended(again, ours), expected):
                raise RuntimeError(f"{label} is not the run that it captured: not timed")
            jobs[label] = again
    contenders = [Contender(label, go, clock=device.clock) for label, go in jobs.items()]
    seconds = harness.interleaved(contenders, settings.repeats, settings.deadline)
    found = []
    for label, own in seconds.items():
        q25, median, q75 = (float(q) for q in np.quantile(own, [0.25, 0.5, 0.75]))
        faster = float(np.median(np.array(seconds[PUBLISHED]) / np.array(own)))
        found.append(
            replace(blank, contender=label, median_s=median, q25=q25, q75=q75, speedup=faster)
        )
    return found + rows


def ended(go: Callable[[], object], ours: OurRun) -> Tensor:
    """Run, and return a copy of x."""
    go()
    return ours.x.clone()


def cpu(settings: Settings) -> list[LoopRow]:
    """A small UNet on the CPU, one image, fewer steps; the network takes most of the time."""
    with torch.inference_mode():
        return run(cpu_device(), 1, 32, 5 if settings.quick else 50, settings)


def gpu(settings: Settings) -> list[LoopRow]:
    """On the GPU, batches of 1 and 64, a small network and one of DDPM's width."""
    if not torch.cuda.is_available():
        blank = LoopRow("gpu", "", 0, 0, STEPS, PUBLISHED)
        return [replace(blank, note="skipped: no GPU (torch sees none)")]
    rows: list[Any] = []
    with torch.inference_mode():
        runs = [(32, 1)] if settings.quick else [(32, 1), (32, 64), (128, 1), (128, 64)]
        for i, (width, batch) in enumerate(runs):
            own = settings.share(len(runs) - i)
            rows += run(gpu_device(), batch, width, 20 if settings.quick else GPU_STEPS, own)
    return rows


PARTS: dict[str, Callable[[Settings], list[LoopRow]]] = {"cpu": cpu, "gpu": gpu}
ROW = LoopRow


def report(rows: list[LoopRow]) -> list[str]:
    """Time of each run, and how much faster it is than the published one."""
    lines = []
    for row in rows:
        start = f"{row.network}, {row.parameters / 1e6:.3g} million parameters, batch {row.batch}"
        if row.median_s is None or row.speedup is None:
            lines.append(f"{row.contender}: {row.note}")
        else:
            lines.append(
                f"{start}, {row.steps} steps, {row.contender}: {row.median_s:.3g} s, "
                f"{row.speedup:.3g}x the published run's speed"
            )
    return lines
