"""An oracle that looks, in the pipeline whose network is exact digits: printed beside the figure.

The judge is the digits' own classifier, which is right of every finished image, and on its way an
image is judged by its prediction of x0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dng_math import DynamicNegativeGuidance, NegativePrompting
from dng_math.rules import ASKED_AT, ASKED_OF
from dng_models.support.progress import progress_bar

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

SCALES = (2.0, 7.5)  # of the oracle; the larger one is published


@dataclass(frozen=True, eq=False)
class Row:
    """What a rule leaves, changes and costs: counts of images, evaluations of all of them."""

    name: str
    questions: str
    scale: float
    left: int
    changed: int
    evaluations: int


@dataclass(frozen=True, eq=False)
class Oracle:
    """Answers along unguided runs of N images, at S steps, and what rules do.

    Attributes
    ----------
    step, time : ndarray, shape (S,)
        The first step, those at which the published method asks, and the last.
    seen : ndarray of bool, shape (S, N)
        Whether the judge saw the forbidden digit in the prediction of x0.
    exact, tracked : ndarray, shape (S, N)
        p(c | x_t): the exact one, and that of the log-odds tracker.
    there : ndarray of bool, shape (N,)
        Whether the finished image is the forbidden digit.
    rows : tuple of Row
    """

    step: NDArray[np.int64]
    time: Array
    seen: Flags
    exact: Array
    tracked: Array
    there: Flags
    rows: tuple[Row, ...]


def ask_and_guide(
    pipe: Any,
    shows: Callable[[Array], Flags],
    changed: Callable[[Array, Array], Flags],
    *,
    n: int,
    steps: int,
    seed: int,
    prior: float,
    constant: float,
) -> Oracle:
    """Draw n images under every rule, from the same noise.

    Parameters
    ----------
    pipe : StableDiffusionPipeline
        From :func:`dng_models.pipelines.mixture_pipelines.mixture_pipeline`, with the forbidden
        digit as its first concept.
    shows : callable
        Maps images (N, 64) to whether each is the forbidden digit.
    changed : callable
        Maps images and the unguided ones to whether each differs visibly.
    n, steps, seed : int
    prior : float
        Of DNG's tracker.
    constant : float
        Scale of negative prompting.
    """
    import torch

    from dng_models import DynamicPrompts, apply_guidance
    from dng_models.support.threads import torch_threads

    unet = pipe.unet

    def flat(images: Any) -> Array:
        return np.asarray(images.flatten(1).double())

    def run(rule: Any) -> tuple[Array, Any]:
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]
        work = n * unet.mixture.means.size
        with torch_threads(work=work), apply_guidance(pipe, rule) as trace:
            found = pipe(
                **unet.prompts(n),
                num_inference_steps=steps,
                generator=generators,
                output_type="latent",
            ).images
        return flat(found), trace

    def asking(scale: float, at: Any, of: int | None) -> Any:
        return DynamicPrompts(
            lambda x0, step: [["it"] if one else [] for one in shows(flat(x0))],
            {"it": unet.embeddings(1, 0)},
            scale,
            at=at,
            of=of,
            decode=lambda x0: x0,
        )

    def tracking(scale: float) -> DynamicNegativeGuidance:
        return DynamicNegativeGuidance.tracked(scale, prior, tracker="log-odds")

    kinds: list[tuple[str, str, float, Any]] = [
        ("NP", "", constant, NegativePrompting(constant)),
        *(("DNG", "", scale, tracking(scale)) for scale in (1.0, 2.0)),
    ]
    for at in (ASKED_AT, tuple(range(ASKED_OF))):
        kinds += [("VL-DNP", str(len(at)), scale, asking(scale, at, ASKED_OF)) for scale in SCALES]
    done = iter(progress_bar(range(2 + len(kinds)), "oracle", unit="run", leave=False))

    exact: list[Array] = []

    def look(module: Any, given: tuple[Any, ...]) -> None:
        exact.append(np.asarray(unet.log_posterior(given[0][:n], given[1]).double().exp()))

    next(done)
    watching = unet.register_forward_pre_hook(look)
    try:
        plain, trace = run(asking(0.0, range(steps), None))
    finally:
        watching.remove()
    next(done)
    _, silent = run(tracking(0.0))
    there, rows = shows(plain), []
    for name, questions, scale, rule in kinds:
        next(done)
        images, own = run(rule)
        others = changed(images, plain)[~there]
        rows.append(
            Row(
                name, questions, scale, int(shows(images).sum()), int(others.sum()), own.evaluations
            )
        )
    chosen = np.array(sorted({0, *(step * steps // ASKED_OF for step in ASKED_AT), steps - 1}))
    seen = np.array([[bool(names) for names in one.shown] for one in trace.questions])
    return Oracle(
        chosen,
        np.asarray(trace.time)[chosen],
        seen[chosen],
        # The first calls, with which the layout is checked, begin runs that are stopped.
        np.array(exact[-steps:])[chosen],
        np.asarray(silent.log_posterior.double().exp())[chosen],
        there,
        tuple(rows),
    )


def lines(oracle: Oracle) -> list[str]:
    """Both tables, as Markdown."""
    n, there = len(oracle.there), oracle.there
    told = [
        f"an oracle that looks: {n} images, {there.sum()} of them a 0 without guidance",
        "| step | time | exact posterior, mean | seen | seen, of those that are a 0 in the end "
        "| agrees with posterior >= 1/2 | error of the answer | error of DNG's posterior |",
        f"|---:|---:|{'---:|' * 6}",
    ]
    for i, step in enumerate(oracle.step):
        seen, exact = oracle.seen[i], oracle.exact[i]
        numbers = (
            exact.mean(),
            seen.mean(),
            seen[there].mean() if there.any() else np.nan,
            (seen == (exact >= 0.5)).mean(),
            np.abs(seen - exact).mean(),
            np.abs(oracle.tracked[i] - exact).mean(),
        )
        cells = " | ".join(f"{number:.3f}" for number in numbers)
        told.append(f"| {step} | {oracle.time[i]:.2f} | {cells} |")
    told += [
        "| rule | questions | scale | zeros left | other images changed "
        "| negatives evaluated an image |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in oracle.rows:
        told.append(
            f"| {row.name} | {row.questions} | {row.scale:g} | {row.left} of {there.sum()} "
            f"| {row.changed} of {(~there).sum()} | {row.evaluations / n:.1f} |"
        )
    return told
