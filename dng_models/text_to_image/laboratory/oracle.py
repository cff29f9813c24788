"""What looking at the images on their way gives, beside the tracked posterior: docs/oracle.md.

The oracle is the laboratory's judge, which is exact for finished pictures.  On the way it is shown
E[x0 | x_t], a mean over all pictures that the image may still become.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dng_math import DynamicNegativeGuidance, NegativePrompting
from dng_math.rules import ASKED_AT, ASKED_OF, Rule
from dng_models.pipelines.dynamic_prompts import DynamicPrompts
from dng_models.pipelines.hook import apply_guidance
from dng_models.pipelines.judges import DetectorJudge
from dng_models.pipelines.negative_template import COMPOSED, filled_in
from dng_models.pipelines.trace import Trace
from dng_models.support.progress import progress_bar
from dng_models.support.threads import torch_threads
from dng_models.text_to_image.laboratory.choices import (
    IMAGES,
    KINDS,
    MEASURED,
    STEPS,
    Laboratory,
    Setting,
)
from dng_models.text_to_image.laboratory.judge import Judged
from dng_models.text_to_image.laboratory.judge_scores import JudgeScores
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.prompts import Prompt, split

Array = NDArray[np.float64]
EVERY_STEP = tuple(range(STEPS))
SKIPPED_SHARE = 0.1  # of the scale that DNG starts with, below which nothing is evaluated
PARTS = ("gate", "rules")


class OracleLaboratory(Laboratory):
    """The laboratory with rules that ask, and with the number of negatives that were evaluated.

    Parameters are those of :class:`.choices.Laboratory`.
    """

    def __init__(
        self, images: int = IMAGES, prompts: Sequence[Prompt] = LABORATORY, seed: int = 0
    ) -> None:
        super().__init__(images, prompts, seed)
        self.scores = JudgeScores()
        # Negatives that were evaluated for an image, by the kind of negative; one of each prompt.
        self.evaluated: dict[str, list[float]] = {}

    def asking(self, prompt: Prompt, kind: str, scale: float, **options: Any) -> DynamicPrompts:
        """The rule that asks the judge, with a negative for each concept of a prompt's.

        Parameters
        ----------
        prompt : Prompt
        kind : {"related", "unrelated"}
        scale : float
        **options
            Further arguments of :class:`dng_models.DynamicPrompts`.
        """
        concepts = split(prompt.negative(kind))
        return DynamicPrompts(
            DetectorJudge(self.scores, concepts),
            {name: filled_in(COMPOSED, prompt.prompt, name) for name in concepts},
            scale,
            **options,
        )

    def draw(self, prompt: Prompt, kind: str, setting: Setting) -> tuple[Judged, Any]:
        """The images of a setting; beside them their trace."""
        images, trace = self.run(prompt, kind, setting)
        made = self.evaluated.setdefault(kind, [])
        made.append(trace.evaluations / self.images)
        return self.judge.look(images), trace

    def run(self, prompt: Prompt, kind: str, setting: Setting) -> tuple[Array, Trace]:
        """The images of a setting, as the pipeline returns them, and their trace."""
        rule = setting.rule(prompt, kind)
        asks = isinstance(rule, DynamicPrompts)
        skip_below = setting.skip_below(prompt, kind) if isinstance(setting, Compared) else None
        negative = {} if asks else {"negative_prompt": [prompt.negative(kind)] * self.images}
        self.pipe.scheduler = self._scheduler(setting)
        with apply_guidance(
            self.pipe,
            rule,
            negative_template=None if asks else COMPOSED,
            skip_below=skip_below,
        ) as trace:
            images = self.pipe(
                [prompt.prompt] * self.images, **negative, **self._call(setting)
            ).images
        return images, trace


@dataclass(frozen=True)
class Compared(Setting):
    """A row of the table of rules.

    Attributes
    ----------
    skips : bool
        Whether negatives that cannot matter are skipped (``skip_below``), for DNG.
    """

    skips: bool = False

    def skip_below(self, prompt: Prompt, kind: str) -> float | None:
        """The bound of the scale below which DNG skips a negative; None: it skips none."""
        if not self.skips:
            return None
        rule: Any = self.rule(prompt, kind)
        odds = rule.posterior.prior / (1.0 - rule.posterior.prior)
        return float(SKIPPED_SHARE * rule.guidance_scale * odds)


# ---------------------------------------------------------------------- the gate


@dataclass(frozen=True)
class Gate:
    """What is known at one step of unguided images, over the images of all prompts.

    Attributes
    ----------
    step : int
        Index of the step, 0 the noisiest.
    time : float
        Its diffusion time.
    exact : float
        Mean of the exact posterior of the related negative.
    seen : float
        Share of images in which the oracle saw it.
    seen_of_those : float
        Of the images that have it in the end, the share in which it was seen at this step.
    agrees : float
        Share of images in which it was seen where the posterior is at least a half, or not seen
        where it is less.
    error, tracked_error : float
        Mean difference from the exact posterior: of the oracle's 1 and 0, and of DNG's tracked
        posterior.
    """

    step: int
    time: float
    exact: float
    seen: float
    seen_of_those: float
    agrees: float
    error: float
    tracked_error: float


def gate(
    laboratory: OracleLaboratory,
    at: Sequence[int] = (0, *ASKED_AT, STEPS - 1),
) -> list[Gate]:
    """Ask the oracle in unguided images, and compare its answers with the exact posterior.

    Parameters
    ----------
    laboratory : OracleLaboratory
    at : sequence of int
        Steps at which it is asked.

    Returns
    -------
    list of Gate
        One for each step.
    """
    every: list[dict[str, Array]] = []
    times: Array = np.zeros(len(at))
    for prompt in laboratory.prompts:
        found, times = _one_prompt(laboratory, prompt, at)
        every.append(found)
    exact, seen, tracked, there = (
        np.concatenate([found[name] for found in every], axis=-1)
        for name in ("exact", "seen", "tracked", "there")
    )
    return [
        Gate(
            step,
            float(times[place]),
            float(exact[place].mean()),
            float(seen[place].mean()),
            float(seen[place][there > 0].mean()),
            float((seen[place] == (exact[place] >= 0.5)).mean()),
            float(np.abs(seen[place] - exact[place]).mean()),
            float(np.abs(tracked[place] - exact[place]).mean()),
        )
        for place, step in enumerate(at)
    ]


def _one_prompt(
    laboratory: OracleLaboratory, prompt: Prompt, at: Sequence[int]
) -> tuple[dict[str, Array], Array]:
    """Of a prompt: answers, exact and tracked posteriors, (steps, images), and what is there."""
    negative, exact = prompt.negative("related"), []
    unet = laboratory.pipe.unet

    def look(module: nn.Module, given: tuple[Any, ...]) -> None:
        x = given[0][: laboratory.images]
        yes, _ = unet.exact(x).log_posterior(
            x,
            *unet.noise_level(given[1]),
            prompt.prompt,
            filled_in("with {negative}", "", negative),
        )
        exact.append(yes.double().exp())

    def asked(prompt: Prompt, kind: str) -> Rule:
        return laboratory.asking(prompt, kind, 0.0, at=tuple(at), of=None)

    watching = unet.register_forward_pre_hook(look)
    try:
        images, trace = laboratory.run(prompt, "related", Setting(("gate",), asked))
    finally:
        watching.remove()

    def silent(prompt: Prompt, kind: str) -> Rule:
        share = prompt.share(kind)
        assert share is not None
        return DynamicNegativeGuidance(0.0, DynamicNegativeGuidance.tracked(1.0, share).posterior)

    _, tracker = laboratory.run(prompt, "related", Setting(("tracked",), silent))
    assert tracker.log_posterior is not None
    rows = list(at)
    return {
        # The first calls, with which the layout is checked, begin runs that are stopped.
        "exact": torch.stack(exact[-STEPS:])[rows].numpy(),
        "seen": np.array([[bool(names) for names in one.shown] for one in trace.questions], float),
        "tracked": tracker.log_posterior.double().exp().numpy()[rows],
        "there": laboratory.judge.look(images).has(*split(negative)).astype(float),
    }, trace.time[rows]


def gate_table(laboratory: OracleLaboratory) -> str:
    """The gate at every step of the published schedule, and at the ends, as Markdown."""
    lines = [
        "| step | time | exact posterior, mean | seen | seen, of those that have it in the end "
        "| agrees with posterior >= 1/2 | error of the answer | error of DNG's posterior |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    with torch_threads(count=1):
        for one in gate(laboratory):
            numbers = (one.exact, one.seen, one.seen_of_those, one.agrees, one.error)
            cells = [
                str(one.step),
                f"{one.time:.2f}",
                *(f"{number:.3f}" for number in (*numbers, one.tracked_error)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------- rules


def _share(prompt: Prompt, kind: str) -> float:
    share = prompt.share(kind)
    assert share is not None
    return share


def compared(laboratory: OracleLaboratory) -> Iterator[Compared]:
    """Negative prompting, DNG and the oracle at several scales."""
    for scale in (0.5, 1.0, 2.0):
        yield Compared(("NP", "", f"{scale:g}"), _constant(scale))
    for scale in (1.0, 2.0):
        yield Compared(("DNG", "every step", f"{scale:g}"), _tracked(scale))
    yield Compared(("DNG", "where it can matter", "2"), _tracked(2.0), skips=True)
    for scale in (2.0, 4.0, 8.0, 16.0):
        rule = _asked(laboratory, scale, ASKED_AT)
        yield Compared(("VL-DNP", f"{len(ASKED_AT)} questions", f"{scale:g}"), rule)
    for scale in (2.0, 4.0, 8.0):
        rule = _asked(laboratory, scale, EVERY_STEP)
        yield Compared(("VL-DNP", f"{STEPS} questions", f"{scale:g}"), rule)


def _constant(scale: float) -> Callable[[Prompt, str], Rule]:
    return lambda prompt, kind: NegativePrompting(scale)


def _tracked(scale: float) -> Callable[[Prompt, str], Rule]:
    return lambda prompt, kind: DynamicNegativeGuidance.tracked(scale, _share(prompt, kind))


def _asked(
    laboratory: OracleLaboratory, scale: float, at: Sequence[int]
) -> Callable[[Prompt, str], Rule]:
    return lambda prompt, kind: laboratory.asking(prompt, kind, scale, at=at, of=ASKED_OF)


def rules_table(laboratory: OracleLaboratory) -> str:
    """What every rule leaves, changes and evaluates, as Markdown."""
    lines = [
        f"| rule | asked or evaluated | scale | {MEASURED} "
        "| negatives evaluated an image: related | unrelated |",
        "|---|---|---|" + "---:|" * 6,
    ]
    settings = list(compared(laboratory))
    with torch_threads(count=1):
        for setting in progress_bar(settings, "oracle", unit="row", leave=False):
            laboratory.evaluated = {}
            numbers = laboratory.measure(setting)
            made = [float(np.mean(laboratory.evaluated[kind])) for kind in KINDS]
            cells = [
                *setting.names,
                *(f"{number:.3f}" for number in numbers),
                *(f"{number:.1f}" for number in made),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def part(name: str, images: int = IMAGES) -> str:
    """One of the tables of docs/oracle.md.

    Parameters
    ----------
    name : {"gate", "rules"}
    images : int
        Images of each prompt and negative.
    """
    laboratory = OracleLaboratory(images)
    return gate_table(laboratory) if name == "gate" else rules_table(laboratory)
