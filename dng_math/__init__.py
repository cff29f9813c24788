"""Exact theory of Dynamic Negative Guidance: schedules, mixtures, rules, posteriors, chains.

The public names are loaded on first use: the GPU packages import rules and schedules from here
and must not pay for importing SciPy and Numba.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.2.0"

__all__ = [
    "CRG",
    "DDIM",
    "DDPM",
    "SPELL",
    "AskedNegative",
    "CFGPlusPlus",
    "ChainResult",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "ContrastiveCFG",
    "DynamicNegativeGuidance",
    "EulerMaruyama",
    "ExactPosterior",
    "FeedbackGuidance",
    "FeynmanKac",
    "GaussianMixture",
    "GeoGuide",
    "GuidedLogDensity",
    "GuidedPrediction",
    "ImageReferenced",
    "LimitedInterval",
    "LogOddsTracker",
    "NegativeAwareSubtraction",
    "NegativePrompting",
    "NoiseSchedule",
    "NormalizedAttention",
    "PaperTracker",
    "PathTracker",
    "PerpNeg",
    "ProbabilityFlow",
    "SafeLatentDiffusion",
    "SignedNegative",
    "StepCoefficients",
    "TimeProfile",
    "Unguided",
    "ValueSignFlip",
    "__version__",
    "divergence_correction",
    "divergence_gap",
    "guided_density",
    "guided_log_density",
    "path_ends",
    "predict",
    "sample",
]

if TYPE_CHECKING:
    from dng_math.density import GuidedLogDensity, guided_density, guided_log_density
    from dng_math.mixture import GaussianMixture
    from dng_math.prediction import (
        GuidedPrediction,
        divergence_correction,
        divergence_gap,
        path_ends,
        predict,
    )
    from dng_math.rules import (
        CRG,
        SPELL,
        AskedNegative,
        CFGPlusPlus,
        ClassifierFreeGuidance,
        ClassifierGuidance,
        ContrastiveCFG,
        DynamicNegativeGuidance,
        FeedbackGuidance,
        GeoGuide,
        ImageReferenced,
        LimitedInterval,
        NegativeAwareSubtraction,
        NegativePrompting,
        NormalizedAttention,
        PerpNeg,
        SafeLatentDiffusion,
        SignedNegative,
        Unguided,
        ValueSignFlip,
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
    from dng_math.trackers import (
        ExactPosterior,
        LogOddsTracker,
        PaperTracker,
        PathTracker,
        TimeProfile,
    )
    from dng_math.weights import FeynmanKac
else:
    # Hidden from type checkers, which take a module __getattr__ to mean that every name exists.
    _HOME = {
        "GuidedLogDensity": "density",
        "guided_density": "density",
        "guided_log_density": "density",
        "CRG": "rules",
        "SPELL": "rules",
        "AskedNegative": "rules",
        "CFGPlusPlus": "rules",
        "ClassifierFreeGuidance": "rules",
        "ClassifierGuidance": "rules",
        "ContrastiveCFG": "rules",
        "DynamicNegativeGuidance": "rules",
        "FeedbackGuidance": "rules",
        "GeoGuide": "rules",
        "ImageReferenced": "rules",
        "LimitedInterval": "rules",
        "NegativeAwareSubtraction": "rules",
        "NegativePrompting": "rules",
        "NormalizedAttention": "rules",
        "PerpNeg": "rules",
        "SafeLatentDiffusion": "rules",
        "SignedNegative": "rules",
        "Unguided": "rules",
        "ValueSignFlip": "rules",
        "GaussianMixture": "mixture",
        "ExactPosterior": "trackers",
        "LogOddsTracker": "trackers",
        "PaperTracker": "trackers",
        "PathTracker": "trackers",
        "TimeProfile": "trackers",
        "FeynmanKac": "weights",
        "GuidedPrediction": "prediction",
        "divergence_correction": "prediction",
        "divergence_gap": "prediction",
        "path_ends": "prediction",
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
        globals()[name] = value  # later accesses do not call this function
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
