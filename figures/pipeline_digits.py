"""DNG in a Stable Diffusion pipeline whose network is the exact diffusion model of the digits.

The pipeline, its scheduler and its loop are those of diffusers.  Only the network is a mixture on
scikit-learn's digits, which answers the prompt "a digit" and the negative prompt "a 0" without
error.  All differences between the images are therefore effects of guidance.  An oracle that looks
(VL-DNP) is printed beside DNG, in the same pipeline and not in the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from dng_math import DynamicNegativeGuidance, NegativePrompting, Unguided
from dng_math.rules import Rule
from dng_models.support.progress import progress_bar
from dng_models.support.threads import torch_threads
from figures import digits, digits_oracle, style

Array = NDArray[np.float64]

PAPER = "Figs. 5, 12"
TITLE = "Guidance in a diffusers pipeline, image by image (needs torch and diffusers)"
NEEDS = ("torch", "diffusers", "transformers")
MINUTES = 1

FORBIDDEN = 0
STEPS = 50
SCALE, PRIOR = 1.0, 0.1
CONSTANT = 0.5  # scale of negative prompting: half of one that leaves no 0
SHOWN = {True: 3, False: 7}  # number of images that are a 0 without guidance, and that are not
ORACLE_IMAGES = {False: 256, True: 32}  # by quick
CHANGED = 0.3  # smallest visible root mean square difference of pixels in [-1, 1]


@dataclass(frozen=True, eq=False)
class Data:
    """N images by M methods; the first method is unguided, the last DNG; the oracle is apart."""

    labels: tuple[str, ...]
    images: Array  # (M, N, 64)
    forbidden: NDArray[np.bool_]  # (M, N): whether it is a 0, by the exact posterior
    time: Array  # (S,)
    scale: Array  # (S, N), of DNG
    oracle: digits_oracle.Oracle

    @property
    def changed(self) -> NDArray[np.bool_]:
        """Which images of each method differ visibly from the unguided ones, (M, N)."""
        return differ(self.images, self.images[:1])

    @property
    def columns(self) -> NDArray[np.int64]:
        """Images to show, first those that are a 0 without guidance."""
        kinds = [np.flatnonzero(self.forbidden[0] == kind)[:n] for kind, n in SHOWN.items()]
        return np.concatenate(kinds)


def differ(images: Array, others: Array) -> NDArray[np.bool_]:
    """Whether images (..., 64) differ visibly."""
    visible: NDArray[np.bool_] = np.sqrt(np.mean((images - others) ** 2, axis=-1)) > CHANGED
    return visible


def compute(quick: bool = False, seed: int = 0) -> Data:
    """Draw the same seeds without guidance, with a constant scale, and with DNG."""
    import torch
    from diffusers import DDPMScheduler

    from dng_models import apply_guidance
    from dng_models.pipelines.mixture_pipelines import mixture_pipeline

    n = 32 if quick else 64
    mixture = digits.memorised()
    zeros = np.flatnonzero(digits.load()[1] == FORBIDDEN)
    scheduler = DDPMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    side = digits.SIDE
    pipe = mixture_pipeline(mixture, [zeros.tolist()], (1, side, side), scheduler)
    rules: dict[str, Rule] = {
        "unguided": Unguided(),
        style.NP.label: NegativePrompting(CONSTANT),
        "DNG": DynamicNegativeGuidance.tracked(SCALE, PRIOR, tracker="log-odds"),
    }

    def shows(found: Array) -> NDArray[np.bool_]:
        zero: NDArray[np.bool_] = mixture.log_posterior(found, zeros) > np.log(0.5)
        return zero

    images, forbidden, traces = [], [], []
    for rule in progress_bar(rules.values(), "pipeline_digits", unit="run", leave=False):
        generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(n)]
        work = n * digits.SIDE**2 * mixture.n_components
        with torch_threads(work=work), apply_guidance(pipe, rule) as trace:
            found = pipe(
                **pipe.unet.prompts(n),
                num_inference_steps=STEPS,
                generator=generators,
                output_type="latent",
            ).images
        images.append(found.flatten(1).double().numpy())
        forbidden.append(shows(images[-1]))
        traces.append(trace)
    dynamic = traces[-1]
    oracle = digits_oracle.ask_and_guide(
        pipe,
        shows,
        differ,
        n=ORACLE_IMAGES[quick],
        steps=STEPS,
        seed=seed,
        prior=PRIOR,
        constant=CONSTANT,
    )
    return Data(
        tuple(rules),
        np.stack(images),
        np.stack(forbidden),
        dynamic.time,
        dynamic.scale.numpy(),
        oracle,
    )


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """Plot a column for each image and a row for each method, and DNG's scale below."""
    columns = data.columns
    methods = len(data.labels)
    figure = Figure(figsize=(style.WIDTH, 3.7), layout="constrained")
    axes = figure.subplots(
        methods + 1, len(columns), squeeze=False, height_ratios=[1.0] * methods + [1.5]
    )
    for row, (label, images) in enumerate(zip(data.labels, data.images, strict=True)):
        for panel, image in zip(axes[row], columns, strict=True):
            _show(panel, images[image], bool(data.forbidden[row, image]))
        name = label.replace(" ", "\n")
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
    top = 1.1 * max(CONSTANT, float(data.scale[:, columns].max()))
    for i, (panel, image) in enumerate(zip(axes[-1], columns, strict=True)):
        panel.axhline(CONSTANT, **_look(style.NP))
        panel.plot(data.time, data.scale[:, image], **_look(style.DNG_LOG_ODDS))
        panel.set(xlim=(1.0, 0.0), ylim=(0.0, top), xticks=[1, 0])
        if i:
            panel.set_yticklabels([])
    axes[-1, 0].set_ylabel(r"scale $\lambda$", rotation=0, ha="right", va="center", labelpad=6)
    figure.supxlabel("diffusion time $t/T$: noise at 1, image at 0", size=8)
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, ec=style.FORBIDDEN, lw=1.5, label="a 0"),
        *axes[-1, 0].get_lines(),
    ]
    handles[1].set_label(f"negative prompting: constant, {CONSTANT:g}")
    handles[2].set_label(r"DNG: $p(c\,|\,x_t)/(1-p)$, tracked")
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return {"pipeline_digits": figure}


def _look(method: style.Method) -> dict[str, Any]:
    return {"color": method.color, "linestyle": method.linestyle}


def _show(panel: Any, image: Array, forbidden: bool) -> None:
    panel.imshow(image.reshape(digits.SIDE, digits.SIDE), cmap="gray_r", vmin=-1.0, vmax=1.0)
    panel.set(xticks=[], yticks=[])
    for spine in panel.spines.values():
        spine.set_visible(forbidden)
        spine.set(color=style.FORBIDDEN, linewidth=1.5)


def summary(data: Data) -> str:
    """How many forbidden digits were left, and how many other images changed."""
    others = ~data.forbidden[0]
    lines = [
        f"{data.images.shape[1]} images, {STEPS} steps; scale {CONSTANT:g} for negative prompting, "
        f"{SCALE:g} for DNG"
    ]
    for row, label in enumerate(data.labels):
        changed = data.changed[row, others].sum()
        lines.append(
            f"  {label:18} zeros {data.forbidden[row].sum()}; others changed {changed} "
            f"of {others.sum()}"
        )
    strongest = data.scale.max(axis=0)
    lines.append(
        f"  strongest scale of DNG, median: where a 0 appears "
        f"{np.median(strongest[~others]):.2f}, elsewhere {np.median(strongest[others]):.2f}"
    )
    return "\n".join([*lines, *digits_oracle.lines(data.oracle)])
