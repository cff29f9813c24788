"""Dynamic Negative Guidance on trained networks: samplers, measurements and experiments.

The public names are loaded on first use, so that a command line that only prints its help does not
pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "DNGDDPMPipeline",
    "DNGStableDiffusionPipeline",
    "DNGStableDiffusionXLPipeline",
    "DynamicNegativeGuider",
    "EtaDDIMScheduler",
    "Labelled",
    "PosteriorFlowScheduler",
    "Samples",
    "ShowLatents",
    "Trace",
    "add_latents_block",
    "apply_guidance",
    "remove_guidance",
    "sample",
]

if TYPE_CHECKING:
    from dng_models.guider import DynamicNegativeGuider, ShowLatents, add_latents_block
    from dng_models.hook import apply_guidance, remove_guidance
    from dng_models.pipelines import (
        DNGDDPMPipeline,
        DNGStableDiffusionPipeline,
        DNGStableDiffusionXLPipeline,
    )
    from dng_models.sampling import Labelled, Samples, sample
    from dng_models.schedulers import EtaDDIMScheduler, PosteriorFlowScheduler
    from dng_models.trace import Trace
else:
    from dng_models import extras

    # Hidden from type checkers, to which a module __getattr__ says that every name exists.
    _HOME = {
        "EtaDDIMScheduler": "schedulers",
        "Labelled": "sampling",
        "PosteriorFlowScheduler": "schedulers",
        "Samples": "sampling",
        "Trace": "trace",
        "apply_guidance": "hook",
        "remove_guidance": "hook",
        "sample": "sampling",
        "DNGDDPMPipeline": "pipelines",
        "DNGStableDiffusionPipeline": "pipelines",
        "DNGStableDiffusionXLPipeline": "pipelines",
        "DynamicNegativeGuider": "guider",
        "ShowLatents": "guider",
        "add_latents_block": "guider",
    }

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"dng_models.{_HOME[name]}"), name)
        except ModuleNotFoundError as error:
            told = extras.told(f"dng_models.{name}", error, "models")
            raise ModuleNotFoundError(told, name=error.name, path=error.path) from error

    def __dir__():
        return sorted({*globals(), *__all__})
