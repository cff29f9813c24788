"""Whether a pipeline that was trained on the world draws what its captions say.

For each of the experiment's prompts, images of six kinds of captions are drawn and judged exactly.
A pipeline passes if named objects and scenes are there, objects that are not named are as frequent
as in the world, and excluded ones are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from dng_math import checks
from dng_models.support import files
from dng_models.support.progress import Progress
from dng_models.support.threads import torch_threads
from dng_models.text_to_image.laboratory.captions import Event, composed, ideal, parse
from dng_models.text_to_image.laboratory.judge import Judge, Judged
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.laboratory.standard import laboratory_world
from dng_models.text_to_image.laboratory.trained import load_trained
from dng_models.text_to_image.laboratory.worlds import World
from dng_models.text_to_image.prompts import Prompt

NAMED = 0.95  # least share of images in which what is named is there
UNNAMED = 0.03  # largest difference from the world's share, where it is not named
FORBIDDEN = 0.03  # largest share of images in which what is excluded is there
STEPS = 50
GATE = "gate.json"


@dataclass(frozen=True)
class Form:
    """What the images of one kind of caption show, over all prompts.

    Attributes
    ----------
    name : str
        The kind of caption.
    images : int
        Number of images.
    scene, named, forbidden : float
        Shares of images that show the scene, all that is named, and anything that is excluded;
        with no object named, ``named`` is 1.
    worst : float
        The least share of ``named`` of a prompt, or with excluded objects the largest of
        ``forbidden``.
    distance : float
        Mean over cells of the root mean square distance of pixels from the nearest picture, in
        [-1, 1]; the world's own have its bandwidth.
    ghosts : float
        Share of cells that are no picture of the world.
    """

    name: str
    images: int
    scene: float
    named: float
    forbidden: float
    worst: float
    distance: float
    ghosts: float


@dataclass(frozen=True)
class Share:
    """How often objects that are not named are in images of the scenes alone, and in the world.

    Attributes
    ----------
    name : str
        "related" or "unrelated", at least one of the objects of that negative; "blank" cells.
    found, world : float
        Share of images, or of cells; means over prompts.
    """

    name: str
    found: float
    world: float


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes
    ----------
    forms : tuple of Form
    shares : tuple of Share
    """

    forms: tuple[Form, ...]
    shares: tuple[Share, ...]

    @property
    def failures(self) -> list[str]:
        """What is not as it must be, in words; empty if the pipeline passes."""
        found = []
        for form in self.forms:
            for what in ("scene", "named"):
                if (value := getattr(form, what)) < NAMED:
                    found.append(f"{form.name}: {what} in {value:.3f} of images, below {NAMED}")
            if form.forbidden > FORBIDDEN:
                found.append(
                    f"{form.name}: excluded objects in {form.forbidden:.3f} of images, above "
                    f"{FORBIDDEN}"
                )
        for share in self.shares:
            if abs(share.found - share.world) > UNNAMED:
                found.append(
                    f"{share.name}: {share.found:.3f}, more than {UNNAMED} from {share.world:.3f}"
                )
        return found

    @property
    def passed(self) -> bool:
        """Whether the pipeline passes."""
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        """The verdict, for a file."""
        return {"passed": self.passed, "failures": self.failures, **asdict(self)}

    def table(self) -> str:
        """The verdict as tables in Markdown, and whether the pipeline passes."""
        lines = [
            "| caption | images | scene | named | excluded | worst prompt | distance | ghosts |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {f.name} | {f.images} | {f.scene:.3f} | {f.named:.3f} | {f.forbidden:.3f} "
            f"| {f.worst:.3f} | {f.distance:.3f} | {f.ghosts:.3f} |"
            for f in self.forms
        ]
        lines += ["", "| not named | found | world |", "|---|---:|---:|"]
        lines += [f"| {s.name} | {s.found:.3f} | {s.world:.3f} |" for s in self.shares]
        lines += ["", "passed" if self.passed else "NOT passed: " + "; ".join(self.failures)]
        return "\n".join(lines)


def forms_of(prompt: Prompt, world: World) -> dict[str, str]:
    """The captions that are judged for a prompt, by the names of their kinds."""
    first, second = prompt.related.split(", ")
    return {
        "scene": prompt.prompt,
        "with a": composed(prompt.prompt, first, world),
        "with a and b": composed(prompt.prompt, f"{first} and {second}", world),
        "with a, b": composed(prompt.prompt, prompt.related, world),
        "with unrelated": composed(prompt.prompt, prompt.unrelated, world),
        "without a, b": ideal(prompt.prompt, prompt.related, world),
    }


def judge_pipeline(
    pipe: StableDiffusionPipeline,
    world: World,
    *,
    prompts: Sequence[Prompt] = LABORATORY,
    images: int = 1000,
    steps: int = STEPS,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Verdict:
    """Draw images of all kinds of captions, without guidance, and judge them.

    Parameters
    ----------
    pipe : StableDiffusionPipeline
        On any device, with its own scheduler.
    world : World
        Which it was trained on.
    prompts : sequence of Prompt
        Whose negatives name two related objects, and unrelated ones.
    images : int
        Images of each kind of caption, over all prompts; one at least for each.
    steps : int
        Of the scheduler.
    batch_size : int
        Images that are drawn at once.
    seed : int
        Of the images.
    progress : bool
        Whether to show the time left.

    Returns
    -------
    Verdict

    Raises
    ------
    ValueError
        If a number is not allowed.
    """
    each = checks.integer("images", images, len(prompts)) // len(prompts)
    checks.integer("batch_size", batch_size, 1)
    judge = Judge(world)
    captions = [forms_of(prompt, world) for prompt in prompts]
    seen: dict[str, list[Judged]] = {name: [] for name in captions[0]}
    work = torch_threads(count=1)  # more mostly wait for each other
    with work, Progress(each * len(prompts) * len(seen), "judging", shown=progress) as bar:
        for place, named in enumerate(captions):
            for number, (name, caption) in enumerate(named.items()):
                drawn = []
                for start in range(0, each, batch_size):
                    n = min(batch_size, each - start)
                    source = np.random.SeedSequence([seed, place, number, start])
                    generator = torch.Generator().manual_seed(int(source.generate_state(1)[0]))
                    found = pipe(
                        [caption] * n,
                        num_inference_steps=steps,
                        guidance_scale=1.0,
                        generator=generator,
                        output_type="np",
                    )
                    drawn.append(found.images)
                    bar.update(n)
                seen[name].append(judge.look(np.concatenate(drawn)))
    forms = [
        _form(name, seen[name], [parse(each[name], world) for each in captions]) for name in seen
    ]
    return Verdict(tuple(forms), _shares(seen["scene"], prompts, world))


def judge_folder(
    folder: Path | str,
    *,
    images: int = 1000,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Verdict:
    """Judge the finished pipeline in a folder, and write the verdict to its ``gate.json``.

    Parameters
    ----------
    folder : Path or str
        Of a pipeline that was trained on the laboratory's world.
    images, device, progress
        As for :func:`judge_pipeline`, and where it is drawn.

    Returns
    -------
    Verdict

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no finished pipeline, or the number of images is not allowed.
    """
    pipe = load_trained(folder).to(device)
    verdict = judge_pipeline(pipe, laboratory_world(), images=images, progress=progress)
    files.write_json(Path(folder) / GATE, verdict.as_json())
    return verdict


def _form(name: str, judged: Sequence[Judged], events: Sequence[Event]) -> Form:
    """What the images of a kind of caption show, one entry for each prompt."""
    pairs = list(zip(judged, events, strict=True))
    named = [each.holds(Event(None, event.required)) for each, event in pairs]
    forbidden = [each.has(*event.excluded) for each, event in pairs]
    scene = [each.holds(Event(event.scene)) for each, event in pairs]
    excludes = any(event.excluded for event in events)
    return Form(
        name,
        sum(map(len, judged)),
        _mean(scene),
        _mean(named),
        _mean(forbidden),
        float(max(map(np.mean, forbidden)) if excludes else min(map(np.mean, named))),
        _mean([each.distance for each in judged]),
        _mean([each.ghosts for each in judged]),
    )


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(np.concatenate(values)))


def _shares(judged: Sequence[Judged], prompts: Sequence[Prompt], world: World) -> tuple[Share, ...]:
    """Shares of what is not named in images of the scenes alone."""
    found = []
    for kind, negatives in (
        ("related", [prompt.related for prompt in prompts]),
        ("unrelated", [prompt.unrelated for prompt in prompts]),
    ):
        objects = [each.split(", ") for each in negatives]
        there = [each.has(*names) for each, names in zip(judged, objects, strict=True)]
        shares = [
            world.share(prompt.prompt, *names)
            for prompt, names in zip(prompts, objects, strict=True)
        ]
        found.append(Share(kind, _mean(there), float(np.mean(shares))))
    scenes = [scene.name for scene in world.scenes]
    blank = [world.shares[scenes.index(prompt.prompt), 0] for prompt in prompts]
    cells = [each.cells == 0 for each in judged]
    return (*found, Share("blank cells", _mean(cells), float(np.mean(blank))))
