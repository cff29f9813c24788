"""What a family's tiny pipeline is: how it is built, how it is called, what comes out.

A builder makes a pipeline of diffusers' own class with random weights, small enough that a call of
three steps takes well under a second on one core.  Its network must read the prompt: whatever a
random initialisation leaves at zero (the last layer of most transformers) is drawn as well, so
that another negative prompt gives other latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROMPT, NEGATIVE = "a breakfast of two", "egg, sausage"
STEPS = 3


@dataclass(frozen=True)
class Family:
    """A pipeline class and how to call it.

    Attributes
    ----------
    name : str
        Of the class in diffusers.
    build : callable
        Makes the pipeline: networks in evaluation mode, no progress bar, DDPM or another scheduler
        that the family is published with.
    call : callable
        Arguments of a call beside prompt, negative_prompt, num_inference_steps, generator and
        output_type: sizes, conditioning images, guidance_scale where its default switches the
        negative off.
    prompted : bool
        Whether the call takes ``prompt`` (else ``call`` says what is wanted).
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    prompted: bool = True


FAMILIES: dict[str, Family] = {}


def family(
    name: str, call: Callable[[], dict[str, Any]] = dict, *, prompted: bool = True
) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Enter the builder below it as that of a class of diffusers."""

    def enter(build: Callable[[], Any]) -> Callable[[], Any]:
        assert name not in FAMILIES, name
        FAMILIES[name] = Family(name, build, call, prompted)
        return build

    return enter


def drawn(module: torch.nn.Module, std: float = 0.3) -> None:
    """Draw the weights that are zero at first, without which a network ignores its input."""
    for parameter in module.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=std)


def silent(pipe: Any) -> Any:
    """No progress bar, every network in evaluation mode."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def final_latents(pipe: Any, family: Family, *, seed: int = 0, **call: Any) -> Tensor:
    """What the scheduler's last step gave, whatever the pipeline makes of it afterwards.

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
    """Whether torch can: on a CPU that is told to be an older one (ATEN_CPU_CAPABILITY) it may not.

    It then packs numbers, of so many tokens, for instructions that it was told it has not.
    """
    x = torch.ones(1, 2, 77, 8, dtype=torch.bfloat16)
    try:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError as error:
        if "pack_vnni2" not in str(error):
            raise
        return False
    return True
