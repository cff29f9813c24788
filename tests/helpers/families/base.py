"""How a family's tiny pipeline is built and called, and the latents that it gives.

A builder makes a pipeline of diffusers' own class with random weights, small enough that a call of
three steps takes well under a second on one core.  Its network must depend on the prompt, so that
another negative prompt gives other latents: weights that are initialised to zero (the last layer of
most transformers) are drawn too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.helpers.versions import before

PROMPT, NEGATIVE = "a breakfast of two", "egg, sausage"
STEPS = 3


@dataclass(frozen=True)
class Family:
    """A pipeline class and how to call it.

    Attributes
    ----------
    name : str
        Name of the class in diffusers.
    build : callable
        Makes the pipeline: networks in evaluation mode, no progress bar, DDPM or another scheduler
        that the family is published with.
    call : callable
        Gives the arguments of a call besides prompt, negative_prompt, num_inference_steps,
        generator and output_type: sizes, conditioning images, and guidance_scale where its default
        switches the negative prompt off.
    prompted : bool
        Whether the call takes ``prompt``; if not, ``call`` has an argument in its place.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    prompted: bool = True


FAMILIES: dict[str, Family] = {}


def family(
    name: str, call: Callable[[], dict[str, Any]] = dict, *, prompted: bool = True
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Decorator: register a builder for a class of diffusers."""

    def enter(build: Callable[[], Any]) -> Callable[[], Any]:
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, build, call, prompted)
        return build

    return enter


def drawn(module: torch.nn.Module, std: float = 0.3) -> None:
    """Draw weights that are initialised to zero, which would make a network ignore its input."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=std)


def silent(pipe: Any) -> Any:
    """Put every network in evaluation mode, and switch the progress bar off."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def built(name: str) -> tuple[Family, Any]:
    """Skipped where the installed diffusers or transformers does not have the class's parts."""
    if not hasattr(diffusers, name.split(" (")[0]) and name != "ConsisIDPipeline":
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    if name == "ZImageOmniPipeline" and not attends_in_bfloat16():
        pytest.skip("its picture encoder attends in bfloat16, which this torch cannot on this CPU")
    try:
        return FAMILIES[name], FAMILIES[name].build()
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        if not before("diffusers", "0.42"):
            raise
        pytest.skip(f"parts of another version than diffusers {diffusers.__version__}: {error}")


def final_latents(pipe: Any, family: Family, *, seed: int = 0, **call: Any) -> Tensor:
    """Output of the scheduler's last step, before the pipeline processes it further.

    Arguments in ``call`` replace those of the family.
    """
    found: list[Tensor] = []
    scheduler = pipe.scheduler
    step = scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        found.append(output[0].detach().clone())
        return output

    watched.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    before = scheduler.__dict__.get("step")
    scheduler.step = watched
    given: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(seed),
        **({"prompt": PROMPT, "negative_prompt": NEGATIVE} if family.prompted else {}),
        **family.call(),
        **call,
    }
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe(**given)
    finally:
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before
    return found[-1]


def attends_in_bfloat16() -> bool:
    """Whether torch can compute attention in bfloat16 here.

    If ATEN_CPU_CAPABILITY makes the CPU an older one, torch may fail: for this many tokens it packs
    numbers for instructions that it may then not use.
    """
    x = torch.ones(1, 2, 77, 8, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        if "pack_vnni2" not in str(error):
            raise
        return False
    return True
