"""The share of guidance in the time of a whole sampling step, with networks of common sizes.

A sampling step is one call of the network on a doubled batch, for the base and the negative
prediction, and the guidance step that computes x_next and the posterior from them.  The networks
have random weights, on which their time does not depend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.contenders import (
    EAGER,
    KERNEL,
    OURS,
    OWN,
    PUBLISHED,
    SEEDED,
    STEP,
    TIME,
    Case,
    Entry,
    check_published,
    eager_entries,
    kernel_entries,
    label_of,
    largest_error,
    make_plan,
    make_tensors,
)
from benchmarks.device import GRAPH, PLAIN, Device, cpu_device, gpu_device, named_devices
from benchmarks.harness import Contender, Settings, first_words
from benchmarks.step import lap
from benchmarks.style import seconds_text
from dng_kernels import dng_step

__all__ = ["PARTS", "ROW", "named_devices", "report"]

LEAST_SHARE = 0.001  # goal: our share of a sampling step with a real network is below this
NETWORK, WITH_PUBLISHED, WITH_OURS = "network", "network + published", "network + dng_step"
STEPS_ALONE = 64  # steps in a lap without the network; a single one is too short to time


@dataclass(frozen=True)
class ShareRow:
    """Result of one contender: a line of the table and of the CSV.

    ``share`` is the guidance step's part of the time, from times with and without it in the same
    round (a small one is lost in the network's own spread); ``direct_share`` is computed from the
    step timed alone.
    """

    benchmark: str
    network: str
    parameters: int
    dtype: str
    batch: int
    contender: str
    mode: str = PLAIN
    median_s: float | None = None
    q25: float | None = None
    q75: float | None = None
    share: float | None = None
    share_q25: float | None = None
    share_q75: float | None = None
    direct_share: float | None = None
    goal: str = ""
    measured: str = ""
    met: str = ""
    note: str = ""


# ---------------------------------------------------------------------- networks

Predict = Callable[[Tensor], Tensor]  # (2 B, ...) -> (2 B, ...)

STABLE_DIFFUSION: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TOKENS = 77  # tokens per prompt


class SmallUNet(nn.Module):
    """A stand-in for a UNet: residual convolutions at two resolutions and a time embedding."""

    def __init__(self, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(self._block(2 * width) for _ in range(4))
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.last_block = self._block(width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    @staticmethod
    def _block(width: int) -> nn.Module:
        return nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        rates = torch.exp(torch.linspace(0.0, -math.log(1e4), self.width // 2, device=x.device))
        angles = time[:, None] * rates
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        high = self.first(x) + embedding[:, :, None, None]
        low = self.down(high)
        for block in self.blocks:
            low = low + block(low)
        high = high + self.up(low)
        return self.last(high + self.last_block(high))


def parameters(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def small_network(case: Case, device: Device) -> tuple[str, int, Predict]:
    """A UNet small enough for a CPU, by diffusers if it can be imported, else SmallUNet."""
    doubled = 2 * case.shape[0]
    time = torch.full((doubled,), float(TIME), device=device.place)
    try:
        model = import_module("diffusers").UNet2DModel
    except (ImportError, RuntimeError):  # RuntimeError: diffusers is there and cannot be loaded
        plain = SmallUNet(case.shape[1]).to(device.place).eval()
        return "small UNet, plain torch", parameters(plain), lambda x: plain(x, time)
    network = model(
        sample_size=case.shape[-1],
        in_channels=case.shape[1],
        out_channels=case.shape[1],
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    network = network.to(device.place).eval()
    name = "small UNet2DModel of diffusers"
    return name, parameters(network), lambda x: network(x, time).sample


def large_network(
    config: dict[str, Any], case: Case, dtype: torch.dtype, place: torch.device
) -> tuple[int, Predict]:
    """A UNet of diffusers with random weights, made on its device, and random conditions."""
    network = import_module("diffusers").UNet2DConditionModel
    with torch.device(place):
        network = network(**config).to(dtype).eval()
    doubled = 2 * case.shape[0]
    time = torch.full((doubled,), TIME, device=place)
    prompt = (doubled, TOKENS, config["cross_attention_dim"])
    more: dict[str, Any] = {"encoder_hidden_states": torch.randn(prompt, device=place).to(dtype)}
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"]
        pooled -= 6 * config["addition_time_embed_dim"]
        more["added_cond_kwargs"] = {
            "text_embeds": torch.randn(doubled, pooled, device=place).to(dtype),
            "time_ids": torch.ones(doubled, 6, device=place).to(dtype),
        }
    return parameters(network), lambda x: network(x, time, **more).sample


# ---------------------------------------------------------------------- what is timed


def shares(
    blank: ShareRow,
    predict: Predict,
    case: Case,
    dtype: torch.dtype,
    device: Device,
    settings: Settings,
    *,
    judged: bool,
) -> list[ShareRow]:
    """Time the network alone, with the published step and with ours, and both steps alone."""
    plan = make_plan(device)
    t = make_tensors(case, dtype, plan)
    entries = [*eager_entries(plan, dtype, device), *kernel_entries(plan, device)]
    steps = {entry.label: entry for entry in entries}
    steps = {
        WITH_PUBLISHED: steps[label_of(PUBLISHED, EAGER, OWN)],
        WITH_OURS: steps[label_of(OURS, *((KERNEL, SEEDED) if device.kernel else (EAGER, OWN)))],
    }

    def whole(entry: Entry | None, captured: bool) -> None:
        eps, eps_neg = predict(torch.cat([t.x, t.x])).chunk(2)
        if entry is not None:
            own = t._replace(eps=eps, eps_neg=eps_neg)
            (entry.in_graph if captured and entry.in_graph else entry.run)(own)

    rows: list[ShareRow] = []
    contenders: list[Contender] = []
    for mode in (PLAIN, GRAPH) if device.capture is not None else (PLAIN,):
        jobs: dict[str, tuple[Callable[[], object], int]] = {
            NETWORK: (partial(whole, None, mode == GRAPH), 1)
        }
        for name, entry in steps.items():
            jobs[name] = (partial(whole, entry, mode == GRAPH), 1)
            run = entry.in_graph if mode == GRAPH and entry.in_graph else entry.run
            jobs[f"{entry.label}, alone"] = (lap(run, [t], STEPS_ALONE), STEPS_ALONE)
        for name, (go, calls) in jobs.items():
            go()
            if mode == GRAPH and device.capture is not None:
                try:
                    go = device.capture(go)
                except RuntimeError as error:
                    note = f"skipped: no graph can hold it: {first_words(error)}"
                    rows.append(replace(blank, contender=name, mode=mode, note=note))
                    continue
            label = f"{name} ({mode})"
            contenders.append(Contender(label, go, calls=calls, clock=device.clock))
    seconds = harness.interleaved(contenders, settings.repeats, settings.deadline)

    found = []
    for contender in contenders:
        name, _, mode = contender.name.removesuffix(")").rpartition(" (")
        own = np.array(seconds[contender.name])
        q25, median, q75 = (float(q) for q in np.quantile(own, [0.25, 0.5, 0.75]))
        row = replace(blank, contender=name, mode=mode, median_s=median, q25=q25, q75=q75)
        alone = seconds.get(f"{NETWORK} ({mode})")
        if name in steps and alone is not None:
            share = (own - np.array(alone)) / own
            low, middle, high = (float(q) for q in np.quantile(share, [0.25, 0.5, 0.75]))
            row = replace(row, share=middle, share_q25=low, share_q75=high)
            own_step = seconds.get(f"{steps[name].label}, alone ({mode})")
            if own_step is not None:
                direct = float(np.median(own_step)) / (
                    float(np.median(own_step)) + float(np.median(alone))
                )
                row = replace(row, direct_share=direct, note=f"step: {steps[name].label}")
                if name == WITH_OURS and judged:
                    met = harness.verdict(direct < LEAST_SHARE, settings)
                    goal = f"less than {LEAST_SHARE:.1%} of a sampling step"
                    row = replace(row, goal=goal, measured=f"{direct:.2%}", met=met)
        found.append(row)
    return found + rows


def check_views(device: Device, dtype: torch.dtype) -> None:
    """Raise unless a step on views into a doubled batch equals one on separate tensors."""
    plan = make_plan(device)
    t = make_tensors(Case("", (2, 3, 8, 8)), dtype, plan)
    eps, eps_neg = torch.cat([t.eps, t.eps_neg]).chunk(2)
    whole = dng_step(plan, STEP, t.x, t.eps, t.eps_neg, t.state, noise=t.noise).x_next
    halves = dng_step(plan, STEP, t.x, eps, eps_neg, t.state, noise=t.noise).x_next
    assert whole is not None and halves is not None
    harness.check_close("a step of halves", largest_error(halves, whole), 0.0, 0.0)


# ---------------------------------------------------------------------- parts


def cpu(settings: Settings) -> list[ShareRow]:
    """A small UNet on the CPU, CIFAR-10 sized images, float32."""
    device = cpu_device()
    check_published(device, torch.float32)
    check_views(device, torch.float32)
    rows = []
    with torch.inference_mode():
        for batch in (1,) if settings.quick else (1, 8):
            case = Case("CIFAR-10", (batch, 3, 32, 32))
            name, count, predict = small_network(case, device)
            blank = ShareRow("cpu", name, count, "float32", batch, "")
            rows += shares(blank, predict, case, torch.float32, device, settings, judged=False)
    return rows


def _real(
    name: str, config: dict[str, Any], latents: tuple[int, ...], settings: Settings
) -> list[ShareRow]:
    blank = ShareRow("gpu", name, 0, "bfloat16", 0, NETWORK)
    if not torch.cuda.is_available():
        return [replace(blank, note="skipped: no GPU (torch sees none)")]
    device, dtype = gpu_device(), torch.bfloat16
    check_published(device, torch.float32)
    check_views(device, dtype)
    rows = []
    with torch.inference_mode():
        for batch in (1,) if settings.quick else (1, 8):
            case = Case(name, (batch, *latents))
            try:
                count, predict = large_network(config, case, dtype, device.place)
            except (ImportError, RuntimeError) as error:  # not there, or too large for this GPU
                rows.append(replace(blank, batch=batch, note=f"skipped: {first_words(error)}"))
                continue
            one = replace(blank, batch=batch, parameters=count)
            rows += shares(one, predict, case, dtype, device, settings, judged=True)
            # Free the memory for the next network.
            del predict
            torch.cuda.empty_cache()
    return rows


def stable_diffusion(settings: Settings) -> list[ShareRow]:
    """A UNet of Stable Diffusion 1.5's size on the GPU, 512 x 512 pixels, bfloat16."""
    return _real("SD 1.5", STABLE_DIFFUSION, (4, 64, 64), settings)


def sdxl(settings: Settings) -> list[ShareRow]:
    """A UNet of SDXL's size on the GPU, 1024 x 1024 pixels, bfloat16."""
    return _real("SDXL", SDXL, (4, 128, 128), settings)


PARTS: dict[str, Callable[[Settings], list[ShareRow]]] = {
    "cpu": cpu,
    "sd15": stable_diffusion,
    "sdxl": sdxl,
}
ROW = ShareRow


def report(rows: list[ShareRow]) -> list[str]:
    """Share of the guidance step beside its network, measured in both ways."""
    lines = []
    for row in rows:
        start = f"{row.network}, batch {row.batch}, {row.dtype}"
        if row.note.startswith("skipped"):
            lines.append(f"{row.network}, {row.contender}: {row.note}")
        elif row.contender == NETWORK and row.median_s is not None:
            lines.append(
                f"{start} ({row.mode}): {row.parameters / 1e6:.4g} million parameters, two "
                f"predictions in {seconds_text(row.median_s)}"
            )
        elif row.share is not None and row.share_q25 is not None and row.share_q75 is not None:
            line = (
                f"{start} ({row.mode}): {row.contender.removeprefix(f'{NETWORK} + ')} is "
                f"{row.share:.2%} of the step ({row.share_q25:.2%} to {row.share_q75:.2%}) as "
                "the difference"
            )
            if row.direct_share is not None:
                line += f", {row.direct_share:.2%} timed alone"
            lines.append(line)
    return lines + _shares_table(rows)


def _shares_table(rows: list[ShareRow]) -> list[str]:
    """Markdown table of the shares timed alone, with a column for each network and batch."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.direct_share is not None:
            column = f"{row.network}, batch {row.batch}"
            how = "in a graph" if row.mode == GRAPH else "started one by one"
            line = f"{row.contender.removeprefix(f'{NETWORK} + ')}, {how}"
            cells.setdefault(line, {})[column] = f"{row.direct_share:.2%}"
    columns = list(dict.fromkeys(column for own in cells.values() for column in own))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[line, *(own.get(column, "") for column in columns)] for line, own in cells.items()]
    return [f"| {' | '.join(line)} |" for line in lines] if cells else []
