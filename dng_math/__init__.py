"""Exact theory of Dynamic Negative Guidance: schedules, mixtures, rules, posteriors, chains.

The public names are loaded on first use, because the rules and schedules are also what the GPU
packages import and those must not pay for SciPy and Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "DDIM",
    "DDPM",
    "ChainResult",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ContrastiveCFG",
    "DynamicNegativeGuidance",
    "EulerMaruyama",
    "ExactPosterior",
    "FeedbackGuidance",
    "GaussianMixture",
    "GuidedLogDensity",
    "GuidedPrediction",
    "LimitedInterval",
    "LogOddsTracker",
    "NegativePrompting",
    "NoiseSchedule",
    "PaperTracker",
    "PerpNeg",
    "ProbabilityFlow",
    "SafeLatentDiffusion",
    "StepCoefficients",
    "TimeProfile",
    "Unguided",
    "__version__",
    "divergence_correction",
    "divergence_gap",
    "guided_density",
    "guided_log_density",
    "predict",
    "sample",
]

if TYPE_CHECKING:
    from dng_math.density import GuidedLogDensity, guided_density, guided_log_density
    from dng_math.guidance import (
        ClassifierFreeGuidance,
        ClassifierGuidance,
        ContrastiveCFG,
        DynamicNegativeGuidance,
        FeedbackGuidance,
        LimitedInterval,
        NegativePrompting,
        PerpNeg,
        SafeLatentDiffusion,
        Unguided,
    )
    from dng_math.mixture import GaussianMixture
    from dng_math.posterior import ExactPosterior, LogOddsTracker, PaperTracker, TimeProfile
    from dng_math.prediction import (
        GuidedPrediction,
        divergence_correction,
        divergence_gap,
        predict,
    )
    from dng_math.sampling import ChainResult, sample
    from dng_math.schedules import (
        DDIM,
        DDPM,
        EulerMaruyama,
        NoiseSchedule,
        ProbabilityFlow,
        StepCoefficients,
    )
else:
    # Hidden from type checkers, to which a module __getattr__ says that every name exists.
    _HOME = {
        "GuidedLogDensity": "density",
        "guided_density": "density",
        "guided_log_density": "density",
        "ClassifierFreeGuidance": "guidance",
        "ClassifierGuidance": "guidance",
        "ContrastiveCFG": "guidance",
        "DynamicNegativeGuidance": "guidance",
        "FeedbackGuidance": "guidance",
        "LimitedInterval": "guidance",
        "NegativePrompting": "guidance",
        "PerpNeg": "guidance",
        "SafeLatentDiffusion": "guidance",
        "Unguided": "guidance",
        "GaussianMixture": "mixture",
        "ExactPosterior": "posterior",
        "LogOddsTracker": "posterior",
        "PaperTracker": "posterior",
        "TimeProfile": "posterior",
        "GuidedPrediction": "prediction",
        "divergence_correction": "prediction",
        "divergence_gap": "prediction",
        "predict": "prediction",
        "ChainResult": "sampling",
        "sample": "sampling",
        "DDIM": "schedules",
        "DDPM": "schedules",
        "EulerMaruyama": "schedules",
        "NoiseSchedule": "schedules",
        "ProbabilityFlow": "schedules",
        "StepCoefficients": "schedules",
    }

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value  # so that this function is asked once per name
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
