"""The fused step of Dynamic Negative Guidance: specification, CPU path and Triton kernel."""

from dng_kernels.bound import BoundStep
from dng_kernels.naive import StepResult
from dng_kernels.noise import noise_keys, standard_normal
from dng_kernels.path import PathMemory, update_path
from dng_kernels.plan import StepPlan
from dng_kernels.step import dng_step, guide, update_posterior

__all__ = [
    "BoundStep",
    "PathMemory",
    "StepPlan",
    "StepResult",
    "dng_step",
    "guide",
    "noise_keys",
    "standard_normal",
    "update_path",
    "update_posterior",
]
