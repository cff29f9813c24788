"""Negative prompting and DNG in text to image, where the truth is known.

The pipeline, its scheduler and its loop are diffusers' Stable Diffusion.  Its network is the exact
model of a small world of pictures, so that predictions have no error, the ideal images can be
drawn (by the caption "... without ..."), and the exact posterior says what an image shows.  The
negative is composed with the prompt, and the prior is the world's share of images that have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from dng_math import DynamicNegativeGuidance, NegativePrompting
from dng_math.rules import Rule
from dng_models.support.progress import progress_bar
from dng_models.support.threads import torch_threads
from figures import style

if TYPE_CHECKING:
    from dng_models.text_to_image.laboratory.judge import Judged

Pixels = NDArray[np.float32]

PAPER = "Figs. 6, 16-23"
TITLE = "Negative prompting and DNG in text to image, with the truth (needs torch and diffusers)"
MINUTES = 2
NEEDS = ("torch", "diffusers", "transformers")

SHOWN = "english breakfast"
STEPS = 50
CONSTANT = 1.0  # scale of negative prompting
SCALE = 2.0  # of DNG: at 1 the lag of a tracker leaves more
KINDS = ("related", "unrelated")
METHODS = ("unguided", style.NP.label, "DNG", "ideal")
COLUMNS = {True: 4, False: 1}  # number of images with something related, and without
CHANGED = "something else changed, or is no object"
OTHERS = 5  # images under the unrelated negative


@dataclass(frozen=True, eq=False)
class Runs:
    """N images of a prompt under a negative, by each of M methods.

    Attributes
    ----------
    prompt, negative : str
        The prompt's short name, and what is not wanted.
    images : ndarray, shape (M, N, height, width, 3)
        Pixels in [0, 1].
    still_there : ndarray, shape (M, N), bool
        Whether an unwanted object is in the image.
    changed : ndarray, shape (M, N, cells), bool
        Cells that differ from the unguided image, of those that showed nothing unwanted there.
    others : ndarray, shape (N, cells), bool
        Those cells.
    ghosts : ndarray, shape (M, N, cells), bool
        Cells that show nothing of the world.
    """

    prompt: str
    negative: str
    images: Pixels
    still_there: NDArray[np.bool_]
    changed: NDArray[np.bool_]
    others: NDArray[np.bool_]
    ghosts: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Data:
    """The runs of every prompt, first with its related and then with its unrelated negative."""

    runs: tuple[tuple[Runs, Runs], ...]

    @property
    def shown(self) -> tuple[Runs, Runs]:
        """The runs of the prompt that is drawn."""
        return next(pair for pair in self.runs if pair[0].prompt == SHOWN)


def compute(quick: bool = False, seed: int = 0) -> Data:
    """Draw the same seeds by every method, for all prompts or one."""
    from dng_models.text_to_image.laboratory.captions import composed, ideal
    from dng_models.text_to_image.laboratory.judge import Judge
    from dng_models.text_to_image.laboratory.pipelines import laboratory_pipeline
    from dng_models.text_to_image.laboratory.prompts import LABORATORY
    from dng_models.text_to_image.laboratory.standard import laboratory_world

    world = laboratory_world()
    pipe, judge = laboratory_pipeline(world), Judge(world)
    prompts = [each for each in LABORATORY if each.name == SHOWN or not quick]
    n = 32 if quick else 64
    runs = []
    with torch_threads(count=1):
        for prompt in progress_bar(prompts, "text_to_image", unit="prompt", leave=False):
            unguided = _draw(pipe, prompt.prompt, n, seed)
            before = judge.look(unguided)
            pair = []
            for kind in KINDS:
                negative = prompt.negative(kind)
                objects = negative.split(", ")
                share = world.share(prompt.prompt, *objects)
                both = composed(prompt.prompt, negative, world)
                rules: list[Rule] = [
                    NegativePrompting(CONSTANT),
                    DynamicNegativeGuidance.tracked(SCALE, share),
                ]
                images = [unguided]
                images += [_draw(pipe, prompt.prompt, n, seed, both, rule) for rule in rules]
                images.append(_draw(pipe, ideal(prompt.prompt, negative, world), n, seed))
                pair.append(_judged(prompt.name, negative, images, before, judge.look))
            runs.append((pair[0], pair[1]))
    return Data(tuple(runs))


def _draw(
    pipe: Any, prompt: str, n: int, seed: int, negative: str | None = None, rule: Rule | None = None
) -> Pixels:
    """Draw n images, unguided or by a rule."""
    import torch

    from dng_models import apply_guidance

    options = {
        "num_inference_steps": STEPS,
        "generator": [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)],
        "output_type": "np",
    }
    if rule is None:
        found = pipe([prompt] * n, guidance_scale=1.0, **options).images
    else:
        with apply_guidance(pipe, rule):
            found = pipe([prompt] * n, negative_prompt=[negative] * n, **options).images
    pixels: Pixels = found
    return pixels


def _judged(prompt: str, negative: str, images: list[Pixels], before: Judged, look: Any) -> Runs:
    """Judge the images of all methods against the unguided ones."""
    objects = negative.split(", ")
    judged = [look(each) for each in images]
    others = ~before.shows(*objects)
    return Runs(
        prompt,
        negative,
        np.stack(images),
        np.stack([each.has(*objects) for each in judged]),
        np.stack([each.changed(before) & others for each in judged]),
        others,
        np.stack([each.ghosts for each in judged]),
    )


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """Plot a column for each image and a row for each method, for both negatives."""
    related, _ = data.shown
    kinds = [np.flatnonzero(related.still_there[0] == kind)[:n] for kind, n in COLUMNS.items()]
    columns = (np.concatenate(kinds), np.arange(OTHERS))
    figure = Figure(figsize=(style.WIDTH, 3.15), layout="constrained")
    # The left block has the names of the rows too.
    blocks: Any = figure.subfigures(1, 2, wspace=0.02, width_ratios=(1.17, 1.0))
    for block, runs, places in zip(blocks, data.shown, columns, strict=True):
        axes = block.subplots(len(METHODS), len(places), squeeze=False)
        for row, label in enumerate(METHODS):
            for panel, image in zip(axes[row], places, strict=True):
                frame = None
                if runs.still_there[row, image]:
                    frame = style.FORBIDDEN
                elif runs.changed[row, image].any() or runs.ghosts[row, image].any():
                    frame = style.BLUE
                _show(panel, runs.images[row, image], frame)
            if runs is related:
                name = label.replace(" ", "\n")
                axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
        block.suptitle(f"{SHOWN}, negative: {runs.negative}", size=9)
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, ec=style.FORBIDDEN, lw=1.5, label="still there"),
        Rectangle((0, 0), 1, 1, fill=False, ec=style.BLUE, lw=1.5, label=CHANGED),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return {"text_to_image": figure}


def _show(panel: Any, image: Pixels, frame: str | None) -> None:
    panel.imshow(image, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    for spine in panel.spines.values():
        spine.set_visible(frame is not None)
        spine.set(color=frame, linewidth=2.0)


def summary(data: Data) -> str:
    """What is left and what changed, averaged over prompts."""
    n = data.runs[0][0].images.shape[1]
    lines = [
        f"{len(data.runs)} prompts, {n} images each, {STEPS} steps; negatives composed with the "
        f"prompt; scale {CONSTANT:g} for negative prompting, {SCALE:g} for DNG",
        "                       related negative             unrelated negative",
        "                       still there, others changed  cells changed, images, ghosts",
    ]
    for row, label in enumerate(METHODS):
        related = [pair[0] for pair in data.runs]
        unrelated = [pair[1] for pair in data.runs]
        numbers = [
            np.mean([each.still_there[row].mean() for each in related]),
            np.mean([each.changed[row].sum() / each.others.sum() for each in related]),
            np.mean([each.changed[row].sum() / each.others.sum() for each in unrelated]),
            np.mean([each.changed[row].any(1).mean() for each in unrelated]),
            np.mean([each.ghosts[row].mean() for each in unrelated]),
        ]
        left, others, cells, images, ghosts = (f"{number:.3f}" for number in numbers)
        lines.append(f"  {label:21}{left:13}{others:16}{cells:15}{images:8}{ghosts}")
    return "\n".join(lines)
