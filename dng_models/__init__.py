"""Dynamic Negative Guidance on trained networks: samplers, measurements and experiments.

The public names are loaded on first use, so that a command line that only prints its help does not
pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "Calibration",
    "ClipJudge",
    "Control",
    "DNGDDPMPipeline",
    "DNGStableDiffusionPipeline",
    "DNGStableDiffusionXLPipeline",
    "DetectorJudge",
    "DynamicNegativeGuider",
    "DynamicPrompts",
    "EtaDDIMScheduler",
    "Labelled",
    "Layout",
    "PointsDenoiser",
    "PosteriorFlowScheduler",
    "Samples",
    "ShowLatents",
    "Trace",
    "VisionLanguageJudge",
    "add_latents_block",
    "apply_guidance",
    "estimate_prior",
    "load_network",
    "remove_guidance",
    "sample",
    "scheduler_run",
    "tiny_stable_diffusion",
    "transition",
]

if TYPE_CHECKING:
    from dng_models.class_removal.calibration import (
        Calibration,
    )
    from dng_models.class_removal.networks import (
        load_network,
    )
    from dng_models.pairs.denoisers import Labelled
    from dng_models.pairs.points import PointsDenoiser
    from dng_models.pairs.sampling import Samples, sample
    from dng_models.pipelines.dynamic_prompts import DynamicPrompts
    from dng_models.pipelines.guider import DynamicNegativeGuider
    from dng_models.pipelines.hook import (
        apply_guidance,
        remove_guidance,
    )
    from dng_models.pipelines.judges import ClipJudge, DetectorJudge, VisionLanguageJudge
    from dng_models.pipelines.layouts import (
        Control,
        Layout,
    )
    from dng_models.pipelines.modular_blocks import ShowLatents, add_latents_block
    from dng_models.pipelines.ready_made import (
        DNGDDPMPipeline,
        DNGStableDiffusionPipeline,
        DNGStableDiffusionXLPipeline,
    )
    from dng_models.pipelines.schedulers import (
        EtaDDIMScheduler,
        PosteriorFlowScheduler,
    )
    from dng_models.pipelines.tiny import (
        tiny_stable_diffusion,
    )
    from dng_models.pipelines.trace import (
        Trace,
    )
    from dng_models.pipelines.transitions import (
        scheduler_run,
        transition,
    )
    from dng_models.text_to_image.priors import estimate_prior
else:
    from dng_models.support import extras

    # Hidden from type checkers, to which a module __getattr__ says that every name exists.
    _HOME = {
        "Calibration": "class_removal.calibration",
        "ClipJudge": "pipelines.judges",
        "Control": "pipelines.layouts",
        "DNGDDPMPipeline": "pipelines.ready_made",
        "DNGStableDiffusionPipeline": "pipelines.ready_made",
        "DNGStableDiffusionXLPipeline": "pipelines.ready_made",
        "DetectorJudge": "pipelines.judges",
        "DynamicNegativeGuider": "pipelines.guider",
        "DynamicPrompts": "pipelines.dynamic_prompts",
        "EtaDDIMScheduler": "pipelines.schedulers",
        "Labelled": "pairs.denoisers",
        "Layout": "pipelines.layouts",
        "PointsDenoiser": "pairs.points",
        "PosteriorFlowScheduler": "pipelines.schedulers",
        "Samples": "pairs.sampling",
        "ShowLatents": "pipelines.modular_blocks",
        "Trace": "pipelines.trace",
        "VisionLanguageJudge": "pipelines.judges",
        "add_latents_block": "pipelines.modular_blocks",
        "apply_guidance": "pipelines.hook",
        "estimate_prior": "text_to_image.priors",
        "load_network": "class_removal.networks",
        "remove_guidance": "pipelines.hook",
        "sample": "pairs.sampling",
        "scheduler_run": "pipelines.transitions",
        "tiny_stable_diffusion": "pipelines.tiny",
        "transition": "pipelines.transitions",
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
