"""``python -m figures.laboratory_trained [DIR]``: trained networks beside exact predictions.

DIR is a pipeline that ``train-laboratory`` trained on the laboratory's world; default: the one that
ships with the package.  It takes minutes and can be of one's own, so this is not among the figures
that ``python -m figures`` draws.  Its predictions can be compared with the exact ones at the same
noisy pictures, the posterior that is tracked with them with the one that exact predictions give
along the same chains, and its guided images with those of the exact model.  The calibration of its
tracker is fitted on pictures of the other prompts, so what it mends is what carries over.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dng_math import DynamicNegativeGuidance, NoiseSchedule, PaperTracker
from dng_math.rules import Rule
from dng_math.trackers import TimeProfile
from dng_models.support.progress import progress_bar
from dng_models.support.threads import torch_threads
from figures import style

if TYPE_CHECKING:
    from dng_models.text_to_image.prompts import Prompt

Array = NDArray[np.float64]

STEPS = 50
IMAGES = (16, 64)  # of each prompt and setting: quick, and else
SCALES = (1.0, 2.0)
KINDS = ("related", "unrelated")
PRECISION = 20  # levels at which predictions are compared
PAIR = ("the scene", "with the objects", "their difference")
# How a posterior is tracked: with which predictions, and whether with the fitted tracker.
EXACT = style.Method("exact predictions", style.BLACK, ":", "x")
TRAINED = style.Method("trained network", style.VERMILLION, "-", "o")
CALIBRATED = style.Method("trained network, calibrated", style.BLUE, "--", "s")
WAYS = (EXACT, TRAINED, CALIBRATED)


@dataclass(frozen=True, eq=False)
class Data:
    """All that is measured, over P prompts, with T levels of noise and S steps.

    Attributes
    ----------
    names : tuple of str, P
        The prompts.
    time : ndarray, shape (T,)
        Diffusion time of the levels.
    wrong : ndarray, shape (3, T)
        Mean square of the error of predicted pictures of the scene, and of the difference, over
        the mean square of what is predicted: for captions of the scene, of the scene with the
        related objects, and the difference of both, all at pictures of the scene.
    chain_time : ndarray, shape (S + 1,)
        Diffusion time of the points of a chain.
    log_loss : ndarray, shape (3, P, S + 1)
        Of the tracked posterior along the noising process of labelled pictures, nats.
    exact_loss : ndarray, shape (P, T)
        Of the exact posterior at ``time``.
    temperature, offset : ndarray, shape (P, 2) and (P,)
        Of the tracker that was fitted to the pictures of the other prompts; the temperature at pure
        noise and at the data, between which it varies.
    left, cells, images : ndarray, shape (3, 2, P)
        With each way to track and each scale: share of images in which something related is left,
        and under the unrelated negative the shares of cells and of images in which something
        changed.
    before : ndarray, shape (2, P)
        Share of images with something related, without guidance: exact, trained.
    n : int
        Images of each.
    """

    names: tuple[str, ...]
    time: Array
    wrong: Array
    chain_time: Array
    log_loss: Array
    exact_loss: Array
    temperature: Array
    offset: Array
    left: Array
    cells: Array
    images: Array
    before: Array
    n: int


def compute(pipe: Any, quick: bool = False, seed: int = 0) -> Data:
    """Compare a pipeline of the laboratory's world with the truth."""
    from dng_models.text_to_image.laboratory.prompts import LABORATORY

    prompts = LABORATORY[-2:] if quick else LABORATORY
    n = IMAGES[0] if quick else IMAGES[1]
    with torch_threads(count=1):
        networks = _Networks(pipe, 8 * n, seed)
        time, wrong = networks.errors(prompts)
        evidence = [networks.evidence(prompt) for prompt in prompts]
        trackers = [_others(prompts, evidence, place) for place in range(len(prompts))]
        log_loss = np.array(
            [
                [
                    _loss(evidence[place][way > 0], tracker)
                    for place, (plain, fitted) in enumerate(trackers)
                    for tracker in [fitted if way == 2 else plain]
                ]
                for way in range(len(WAYS))
            ]
        )
        exact_loss = np.array([networks.exact_loss(prompt, time) for prompt in prompts])
        left, cells, images = (np.zeros((3, len(SCALES), len(prompts))) for _ in range(3))
        before = np.zeros((2, len(prompts)))
        work = [(way, place) for way in range(len(WAYS)) for place in range(len(prompts))]
        laboratories = networks.laboratories(n, seed)
        for way, place in progress_bar(work, "laboratory_trained", unit="prompt", leave=False):
            laboratory = laboratories[way > 0]
            chosen = trackers[place][way == 2]
            found = _guided(laboratory, prompts[place], chosen)
            before[int(way > 0), place] = found[0]
            left[way, :, place], cells[way, :, place], images[way, :, place] = found[1]
    return Data(
        names=tuple(prompt.name for prompt in prompts),
        time=time,
        wrong=wrong,
        chain_time=np.append(evidence[0][0].coefficients.time, 0.0),
        log_loss=log_loss,
        exact_loss=exact_loss,
        temperature=np.array([_ends(fitted.temperature) for _, fitted in trackers]),
        offset=np.array([fitted.offset_nats for _, fitted in trackers]),
        left=left,
        cells=cells,
        images=images,
        before=before,
        n=n,
    )


class _Networks:
    """Exact and trained predictions at the same noisy pictures of a scene."""

    def __init__(self, pipe: Any, count: int, seed: int) -> None:
        from dng_models.text_to_image.laboratory.judge import Judge
        from dng_models.text_to_image.laboratory.standard import laboratory_world

        self.pipe, self.count, self.seed = pipe, count, seed
        self.world = laboratory_world()
        self.judge = Judge(self.world)
        self.model = self.judge.model
        self.schedule = NoiseSchedule.from_alpha_bar(pipe.scheduler.alphas_cumprod.numpy())

    def pictures(self, prompt: Prompt, seed: int) -> tuple[Any, NDArray[np.bool_]]:
        """Latents of pictures of the scene alone, and which have something related."""
        latents = self.model.sample(prompt.prompt, self.count, generator=seed).latents
        _, shown = self.model.log_posterior(latents, 1.0, 0.0, prompt.prompt, self.negative(prompt))
        return latents, (shown.exp() < 0.5).numpy()

    def negative(self, prompt: Prompt) -> str:
        from dng_models.text_to_image.laboratory.captions import composed

        return composed(prompt.prompt, prompt.related, self.world)

    def trained(self, caption: str) -> Any:
        """The network's prediction of x0 for a caption, as a denoiser."""
        import torch

        ids = self.pipe.tokenizer(
            [caption],
            padding="max_length",
            max_length=self.pipe.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            embedding = self.pipe.text_encoder(ids)[0]

        def denoiser(x: Any, t: Any) -> Any:
            told = embedding.expand(len(x), -1, -1)
            return self.pipe.unet(x, t, encoder_hidden_states=told).sample

        return denoiser

    def exact(self, caption: str) -> Any:
        """The world's prediction of x0 for a caption, as a denoiser."""
        squares = self.pipe.scheduler.alphas_cumprod

        def denoiser(x: Any, t: Any) -> Any:
            square = squares[int(t.flatten()[0])]
            return self.model.x0(x, float(square.sqrt()), float((1 - square).sqrt()), caption)

        return denoiser

    def errors(self, prompts: Any) -> tuple[Array, Array]:
        """Relative square errors of two predictions and of their difference, (3, T)."""
        import torch

        steps = np.linspace(999, 0, PRECISION + 1)[:-1].round().astype(int)
        wrong, size = np.zeros((3, len(steps))), np.zeros((3, len(steps)))
        for prompt in prompts:
            latents, _ = self.pictures(prompt, self.seed)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(self.seed))
            captions = (prompt.prompt, self.negative(prompt))
            for place, step in enumerate(steps):
                square = float(self.pipe.scheduler.alphas_cumprod[step])
                x, t = square**0.5 * latents + (1 - square) ** 0.5 * noise, torch.tensor([step])
                with torch.no_grad():
                    found = [self.trained(caption)(x, t) for caption in captions]
                    truth = [self.exact(caption)(x, t) for caption in captions]
                for each in (found, truth):
                    each.append(each[1] - each[0])
                for row, (one, other) in enumerate(zip(found, truth, strict=True)):
                    wrong[row, place] += float((one - other).square().mean())
                    size[row, place] += float((other if row == 2 else latents).square().mean())
        return self.schedule.time[steps + 1], wrong / size

    def evidence(self, prompt: Prompt) -> tuple[Any, Any]:
        """What exact and trained predictions see along noised pictures of known content."""
        from dng_models.class_removal.evidence import collect

        latents, shows = self.pictures(prompt, self.seed + 1)
        exact, trained = (
            collect(
                make(prompt.prompt),
                make(self.negative(prompt)),
                latents,
                shows,
                schedule=self.schedule,
                steps=STEPS,
                paths=1,
                prediction_type="sample",
                seed=self.seed,
                device="cpu",
            )
            for make in (self.exact, self.trained)
        )
        return exact, trained

    def exact_loss(self, prompt: Prompt, time: Array) -> Array:
        """Log loss of the exact posterior at noised pictures, (T,)."""
        import torch

        latents, shows = self.pictures(prompt, self.seed + 1)
        generator, found = torch.Generator().manual_seed(self.seed), []
        for level in np.searchsorted(self.schedule.time, time - 1e-9):
            alpha, sigma = float(self.schedule.alpha[level]), float(self.schedule.sigma[level])
            x = alpha * latents + sigma * torch.randn(latents.shape, generator=generator)
            yes, no = self.model.log_posterior(
                x, alpha, sigma, prompt.prompt, self.negative(prompt)
            )
            found.append(-np.where(shows, yes.numpy(), no.numpy()).mean())
        return np.array(found)

    def laboratories(self, n: int, seed: int) -> tuple[Any, Any]:
        """What draws and judges images: with exact predictions, and with the network's."""
        from dng_models.text_to_image.laboratory.choices import Laboratory

        return Laboratory(n, seed=seed), Laboratory(n, seed=seed, pipe=self.pipe)


def _others(prompts: Any, evidence: Any, place: int) -> tuple[PaperTracker, PaperTracker]:
    """The tracker of a prompt as it is, and fitted to pictures of the other prompts."""
    from dng_models.class_removal.calibration import fit
    from dng_models.class_removal.evidence import Evidence

    share = prompts[place].related_share
    plain = PaperTracker(prior=share)
    rest = [trained for i, (_, trained) in enumerate(evidence) if i != place]
    first = rest[0]
    counts = np.cumsum([0, *(len(each.image) for each in rest[:-1])])
    joined = Evidence(
        forbidden=np.concatenate([each.forbidden for each in rest]),
        image=np.concatenate([each.image + n for each, n in zip(rest, counts, strict=True)]),
        coefficients=first.coefficients,
        gap_sq=np.concatenate([each.gap_sq for each in rest], axis=1),
        residual_gap=np.concatenate([each.residual_gap for each in rest], axis=1),
    )
    # The prompts' shares are the same but for their rounding.
    fitted = fit(joined, "paper", prior=share).make()
    assert isinstance(fitted, PaperTracker)
    return plain, fitted


def _ends(temperature: float | TimeProfile) -> tuple[float, float]:
    """A temperature at pure noise and at the data."""
    if isinstance(temperature, TimeProfile):
        return temperature.values[-1], temperature.values[0]
    return temperature, temperature


def _loss(evidence: Any, tracker: PaperTracker) -> Array:
    from dng_models.class_removal.calibration import log_losses, tracked

    return log_losses(tracked(evidence, tracker), evidence.forbidden).mean(axis=1)


def _guided(laboratory: Any, prompt: Prompt, tracker: PaperTracker) -> tuple[float, Array]:
    """Share with something related unguided; what is left and changed at both scales, (3, 2)."""
    from dng_models.text_to_image.laboratory.choices import Setting

    found = np.zeros((3, len(SCALES)))
    shares = {"related": prompt.related_share, "unrelated": prompt.unrelated_share}
    for column, scale in enumerate(SCALES):

        def rule(_: Prompt, kind: str, scale: float = scale) -> Rule:
            return DynamicNegativeGuidance(scale, replace(tracker, prior=shares[kind]))

        setting = Setting((), rule)
        before = laboratory.unguided(prompt, setting)
        for kind in KINDS:
            after, _ = laboratory.draw(prompt, kind, setting)
            objects = prompt.negative(kind).split(", ")
            free = ~before.shows(*objects)
            changed = after.changed(before) & free
            if kind == "related":
                found[0, column] = after.has(*objects).mean()
            else:
                found[1:, column] = changed.sum() / free.sum(), changed.any(axis=1).mean()
    return float(before.has(*prompt.related.split(", ")).mean()), found


@style.applied
def draw(data: Data) -> dict[str, Figure]:
    """Errors of predictions, log loss of posteriors, what is left and what changed."""
    figure = Figure(figsize=(style.WIDTH, 4.6), layout="constrained")
    (first, second), (third, fourth) = figure.subplots(2, 2)
    looks = (style.GREY, style.BLUE, style.VERMILLION)
    for color, name, values in zip(looks, PAIR, data.wrong, strict=True):
        first.plot(data.time, values, color=color, label=name)
    first.set(yscale="log", xlabel="diffusion time", ylabel="relative square error", xlim=(1, 0))
    style.log_ticks(first.yaxis)
    first.legend(title="predicted picture of")
    style.title(first, "a", "Errors of predictions")

    second.plot(
        data.time,
        data.exact_loss.mean(0),
        color=style.GREY,
        lw=3,
        alpha=0.5,
        label="exact posterior",
    )
    for way, values in zip(WAYS, data.log_loss.mean(1), strict=True):
        second.plot(
            data.chain_time,
            values,
            color=way.color,
            ls=way.linestyle,
            label=f"tracked: {way.label}",
        )
    second.set(xlabel="diffusion time", ylabel="log loss (nats)", xlim=(1, 0), ylim=(0, None))
    # Room for the legend above the curves.
    second.set_ylim(0.0, 1.6 * second.get_ylim()[1])
    second.legend()
    style.title(second, "b", "Posterior of what is unwanted")

    for panel, values, letter, what in (
        (third, data.left, "c", "Related: images in which it is left"),
        (fourth, data.images, "d", "Unrelated: images that changed"),
    ):
        for i, way in enumerate(WAYS):
            places = np.arange(len(SCALES)) + 0.27 * (i - 1)
            panel.bar(places, values[i].mean(-1), 0.25, color=way.color, label=way.label)
            for column, place in enumerate(places):
                each = values[i, column]
                panel.plot(np.full(len(each), place), each, ".", color=style.GREY, ms=4, zorder=3)
        panel.set_xticks(range(len(SCALES)), [f"g = {scale:g}" for scale in SCALES])
        panel.set_ylabel("share of images")
        style.title(panel, letter, what)
    third.set_ylim(0, 1.5 * max(float(data.left.max()), float(data.before.max())))
    third.axhline(data.before.mean(), color=style.GREY, ls="--", lw=0.9, label="unguided")
    third.legend()
    return {"laboratory_trained": figure}


def summary(data: Data) -> str:
    """Tables in Markdown: predictions, calibration by prompt, guided images."""
    lines = [
        f"n = {data.n}; relative square error of predictions by diffusion time",
        "| time | " + " | ".join(PAIR) + " |",
        "|---:|---:|---:|---:|",
    ]
    for place in range(0, len(data.time), 2):
        cells = " | ".join(f"{value:.3f}" for value in data.wrong[:, place])
        lines.append(f"| {data.time[place]:.2f} | {cells} |")
    lines += [
        "",
        "log loss over the chain, nats; temperature and offset fitted to the other prompts",
        "| prompt | exact predictions | trained | calibrated | temperature (t = 1, 0) | offset |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for place, name in enumerate(data.names):
        losses = " | ".join(f"{value:.3f}" for value in data.log_loss[:, place].mean(-1))
        noisy, clean = data.temperature[place]
        fitted = f"{noisy:.3f}, {clean:.3f} | {data.offset[place]:+.2f}"
        lines.append(f"| {name} | {losses} | {fitted} |")
    lines += [
        "",
        f"guided images; unguided {data.before[0].mean():.3f} and {data.before[1].mean():.3f} have "
        "something related",
        "| predictions | g | related: left | unrelated: cells changed | images changed |",
        "|---|---:|---:|---:|---:|",
    ]
    for i, way in enumerate(WAYS):
        for column, scale in enumerate(SCALES):
            cells = " | ".join(
                f"{values[i, column].mean():.3f}" for values in (data.left, data.cells, data.images)
            )
            lines.append(f"| {way.label} | {scale:g} | {cells} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure of the pipeline in a folder, and print its tables."""
    from dng_models.text_to_image.laboratory.trained import SHIPPED, load_trained

    parser = argparse.ArgumentParser(prog="python -m figures.laboratory_trained")
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=SHIPPED,
        metavar="DIR",
        help="that train-laboratory left (default: the one that ships)",
    )
    parser.add_argument("--out", type=Path, default=Path("figures", "out"), metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="two prompts, and 16 images of each")
    given = parser.parse_args(arguments)
    try:
        pipe = load_trained(given.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    data = compute(pipe, given.quick)
    given.out.mkdir(parents=True, exist_ok=True)
    for stem, figure in draw(data).items():
        style.save(figure, given.out / f"{stem}.png")
    print(summary(data))


if __name__ == "__main__":
    main()
