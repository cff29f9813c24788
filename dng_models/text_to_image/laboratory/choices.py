"""Measurements behind docs/choosing.md: which negative, prior, offset and number of steps.

All of it is measured in the laboratory, over the experiment's five prompts, with the same seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from dng_math import DynamicNegativeGuidance
from dng_math.rules import Rule
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.negative_template import COMPOSED
from dng_models.support.progress import progress_bar
from dng_models.support.threads import torch_threads
from dng_models.text_to_image.laboratory.captions import parse
from dng_models.text_to_image.laboratory.judge import Judge, Judged
from dng_models.text_to_image.laboratory.pipelines import laboratory_pipeline
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.laboratory.standard import laboratory_world
from dng_models.text_to_image.laboratory.worlds import World
from dng_models.text_to_image.prompts import Prompt

KINDS = ("related", "unrelated")
STEPS = 50
IMAGES = 32  # of each prompt and negative; numbers are means over prompts
PAPER_PRIOR = 0.01  # that the paper's prompts have

Prior = Callable[[Prompt, str], float]

# ---------------------------------------------------------------------- exact numbers


def share_of_all(world: World, negative: str) -> float:
    """Probability that a picture of any scene has what a negative names."""
    (objects,) = parse(negative, world).required
    return math.fsum(world.share(scene.name, *objects) for scene in world.scenes) / len(
        world.scenes
    )


def needed_priors(prompts: Sequence[Prompt] = LABORATORY) -> str:
    """The prior that each form of a negative needs, exactly, as Markdown.

    An image of the scene s that has what is unwanted, Q, ends with the likelihood ratio
    1/P(Q | s) if the negative is composed, P(s)/P(Q) if it is bare, and 1/P(Q) if it is bare and
    compared with the empty prompt.  The posterior ends at 1 if the prior is the inverse.

    Parameters
    ----------
    prompts : sequence of Prompt
        Of the laboratory.
    """
    world = laboratory_world()
    lines = [
        "| prompt | negative | composed: P(unwanted given prompt) | bare: prior needed "
        "| missing from .01 (nats) | bare against empty: P(unwanted) |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for prompt in prompts:
        for kind in KINDS:
            negative = prompt.negative(kind)
            (objects,) = parse(negative, world).required
            share = world.share(prompt.prompt, *objects)
            everywhere = share_of_all(world, negative)
            needed = everywhere * len(world.scenes)
            lines.append(
                f"| {prompt.name} | {negative} | {share:.3f} | {needed:.3f} "
                f"| {math.log(needed / PAPER_PRIOR):.2f} | {everywhere:.3f} |"
            )
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Setting:
    """One row of a table: how the related and the unrelated negative are avoided.

    Attributes
    ----------
    names : tuple of str
        The row's cells before its numbers.
    rule : callable
        Makes the rule from the prompt and the kind of its negative.
    composed : bool
        Whether the negative is composed with the prompt.
    reference : {"positive", "unconditional"}
        What the tracker compares it with.
    steps : int
    kind_of_scheduler : type, optional
        Class of the scheduler, with the configuration of the pipeline's own; None: that one.
    """

    names: tuple[str, ...]
    rule: Callable[[Prompt, str], Rule]
    composed: bool = True
    reference: Any = "positive"
    steps: int = STEPS
    kind_of_scheduler: Any = None


class Laboratory:
    """Draws the laboratory's prompts under many settings, and judges them.

    Parameters
    ----------
    images : int
        Images of each prompt and negative.
    prompts : sequence of Prompt
        Of the laboratory.
    seed : int
        Seed of the first image.
    pipe : StableDiffusionPipeline, optional
        Of the laboratory's world.  Default: the exact one.
    """

    def __init__(
        self,
        images: int = IMAGES,
        prompts: Sequence[Prompt] = LABORATORY,
        seed: int = 0,
        pipe: Any = None,
    ) -> None:
        self.images, self.prompts, self.seed = images, prompts, seed
        self.pipe = laboratory_pipeline() if pipe is None else pipe
        self.judge = Judge(laboratory_world())
        self._own = self.pipe.scheduler
        self._unguided: dict[tuple[str, int, str], Judged] = {}

    def measure(self, setting: Setting) -> list[float]:
        """Related left, other cells changed, unrelated cells and images changed, over prompts."""
        left, others = [], []
        cells, images = [], []
        for prompt in self.prompts:
            for kind in KINDS:
                before = self.unguided(prompt, setting)
                after, _ = self.draw(prompt, kind, setting)
                objects = prompt.negative(kind).split(", ")
                free = ~before.shows(*objects)
                changed = after.changed(before) & free
                if kind == "related":
                    left.append(after.has(*objects).mean())
                    others.append(changed.sum() / free.sum())
                else:
                    cells.append(changed.sum() / free.sum())
                    images.append(changed.any(axis=1).mean())
        return [float(np.mean(each)) for each in (left, others, cells, images)]

    def tracking_error(self, setting: Setting) -> list[float]:
        """|tracked - exact| at the end, for the related and the unrelated negative.

        The exact posterior of an image is 1 or 0.
        """
        errors = []
        for kind in KINDS:
            each = []
            for prompt in self.prompts:
                after, posterior = self.draw(prompt, kind, setting)
                there = after.has(*prompt.negative(kind).split(", "))
                each.append(np.abs(posterior - there).mean())
            errors.append(float(np.mean(each)))
        return errors

    def unguided(self, prompt: Prompt, setting: Setting) -> Judged:
        """The unguided images of a prompt, with a setting's steps and scheduler."""
        scheduler = self._scheduler(setting)
        key = (prompt.name, setting.steps, type(scheduler).__name__)
        if key not in self._unguided:
            self.pipe.scheduler = scheduler
            images = self.pipe(
                [prompt.prompt] * self.images, guidance_scale=1.0, **self._call(setting)
            ).images
            self._unguided[key] = self.judge.look(images)
        return self._unguided[key]

    def draw(self, prompt: Prompt, kind: str, setting: Setting) -> tuple[Judged, Any]:
        """The images of a setting, and the tracked posteriors at the end."""
        self.pipe.scheduler = self._scheduler(setting)
        with apply_guidance(
            self.pipe,
            setting.rule(prompt, kind),
            negative_template=COMPOSED if setting.composed else None,
            reference=setting.reference,
        ) as trace:
            images = self.pipe(
                [prompt.prompt] * self.images,
                negative_prompt=[prompt.negative(kind)] * self.images,
                **self._call(setting),
            ).images
        final = trace.final_log_posterior
        assert final is not None
        return self.judge.look(images), final.double().exp().numpy()

    def _scheduler(self, setting: Setting) -> Any:
        kind = setting.kind_of_scheduler
        return self._own if kind is None else kind.from_config(self._own.config)

    def _call(self, setting: Setting) -> dict[str, Any]:
        return {
            "num_inference_steps": setting.steps,
            "generator": [torch.Generator().manual_seed(self.seed + i) for i in range(self.images)],
            "output_type": "np",
        }


def _share(prompt: Prompt, kind: str) -> float:
    share = prompt.share(kind)
    assert share is not None
    return share


def _everywhere(prompt: Prompt, kind: str) -> float:
    return share_of_all(laboratory_world(), prompt.negative(kind))


def _rule(scale: float, prior: float | Prior, **settings: Any) -> Callable[[Prompt, str], Rule]:
    """DNG with a prior, or with one that depends on the prompt and the kind of its negative."""

    def rule(prompt: Prompt, kind: str) -> Rule:
        value = prior(prompt, kind) if callable(prior) else prior
        return DynamicNegativeGuidance.tracked(scale, value, **settings)

    return rule


def forms() -> Iterator[Setting]:
    """Forms of a negative, each with its prior and scale."""
    for scale in (1.0, 2.0):
        yield Setting(("composed", "share", "0", f"{scale:g}"), _rule(scale, _share))
    for scale in (1.0, 2.0):
        for name, prior in (("share of all images", _everywhere), ("share", _share)):
            yield Setting(
                ("bare against empty", name, "0", f"{scale:g}"),
                _rule(scale, prior),
                composed=False,
                reference="unconditional",
            )
    yield Setting(("bare", "share", "0", "1"), _rule(1.0, _share), composed=False)
    yield Setting(
        ("bare, as in the paper", "0.01, temperature 0.2", "0.003 a step", "20"),
        _rule(20.0, PAPER_PRIOR, temperature=0.2, offset=0.003),
        composed=False,
    )
    for nats in (0.0, 1.5, 3.0, 4.5):
        yield Setting(
            ("bare", "0.25", f"{nats:g} nats", "6"),
            _rule(6.0, 0.25, offset_nats=nats),
            composed=False,
        )


def prior_factors() -> Iterator[Setting]:
    """Wrong priors of a composed negative: odds that are too small or too large by a factor."""
    for scale in (1.0, 2.0):
        for factor in (0.01, 0.1, 0.3, 1.0, 3.0, 10.0):

            def prior(prompt: Prompt, kind: str, factor: float = factor) -> float:
                odds = factor * _share(prompt, kind) / (1.0 - _share(prompt, kind))
                return odds / (1.0 + odds)

            yield Setting((f"{factor:g}", f"{scale:g}"), _rule(scale, prior))


def step_settings() -> Iterator[Setting]:
    """Trackers, schedulers and numbers of steps, at scale 1 with the right prior."""
    rows: list[tuple[str, str, Any, tuple[int, ...]]] = [
        ("DDPM", "paper", None, (10, 25, 50, 100)),
        ("DDPM", "log-odds", None, (10, 50)),
        ("DDPM", "path", None, (10,)),
        ("DDIM, eta 0", "path", DDIMScheduler, (10,)),
        ("DPM-Solver++", "path", DPMSolverMultistepScheduler, (10,)),
    ]
    for name, tracker, scheduler, steps in rows:
        for count in steps:
            yield Setting(
                (name, tracker, str(count)),
                _rule(1.0, _share, tracker=tracker),
                steps=count,
                kind_of_scheduler=scheduler,
            )


MEASURED = "related: still there | other cells changed | unrelated: cells changed | images changed"


def measured_table(
    laboratory: Laboratory, titles: str, settings: Sequence[Setting], *, tracking: bool = False
) -> str:
    """Draw and judge every setting: a row each, as Markdown.

    Parameters
    ----------
    laboratory : Laboratory
    titles : str
        Titles of the cells before the numbers, separated by bars.
    settings : sequence of Setting
    tracking : bool
        Whether to measure the tracked posteriors' error too, in unguided images.
    """
    extra = " | tracked posterior's error: related | unrelated" if tracking else ""
    count = titles.count("|") + 1
    lines = [
        f"| {titles} | {MEASURED}{extra} |",
        "|" + "---|" * count + "---:|" * (6 if tracking else 4),
    ]
    with torch_threads(count=1):
        for setting in progress_bar(settings, "choices", unit="row", leave=False):
            numbers = laboratory.measure(setting)
            if tracking:

                def silent(p: Prompt, k: str, setting: Setting = setting) -> Rule:
                    rule: Any = setting.rule(p, k)
                    return DynamicNegativeGuidance(0.0, rule.posterior)

                numbers += laboratory.tracking_error(replace(setting, rule=silent))
            cells = [*setting.names, *(f"{number:.3f}" for number in numbers)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


PARTS = ("needed", "forms", "priors", "steps")


def part(name: str, images: int = IMAGES) -> str:
    """One of the tables of docs/choosing.md.

    Parameters
    ----------
    name : {"needed", "forms", "priors", "steps"}
    images : int
        Images of each prompt and negative; "needed" takes none.  "steps" takes the first and the
        last prompt only, because a path's derivatives take long.
    """
    if name == "needed":
        return needed_priors()
    if name == "steps":
        laboratory = Laboratory(images, (LABORATORY[0], LABORATORY[-1]))
        return measured_table(
            laboratory, "sampler | tracker | steps", list(step_settings()), tracking=True
        )
    laboratory = Laboratory(images)
    if name == "forms":
        return measured_table(laboratory, "negative | prior | offset | scale", list(forms()))
    return measured_table(laboratory, "odds times | scale", list(prior_factors()))
