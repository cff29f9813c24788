"""The fused step of Dynamic Negative Guidance: one Triton kernel, and its torch reference."""

from dng_kernels.plan import StepPlan
from dng_kernels.step import (
    StepResult,
    dng_step,
    guide,
    noise_keys,
    standard_normal,
    update_posterior,
)

__all__ = [
    "StepPlan",
    "StepResult",
    "dng_step",
    "guide",
    "noise_keys",
    "standard_normal",
    "update_posterior",
]
