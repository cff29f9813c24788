"""The published implementation's step, operation by operation, as a baseline for timing.

It follows the class removal code of the DNG paper (arXiv 2410.14398); only the benchmarks use it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


class Published:
    """One step of the paper's class removal code: the same operations, each with a new tensor.

    Two hindrances of the original are removed: the schedule is on the tensors' device, where the
    original copies coefficients there at every step, and coefficients are 0-dimensional, so that
    16-bit tensors stay 16-bit.

    Parameters
    ----------
    betas : ndarray, shape (T,)
        Variances of the forward process; index 0 is the cleanest.
    dtype : torch.dtype
        Precision of the tensors.
    device : torch.device or str
        Device of the tensors.
    guidance_scale, temperature, offset, p_min, p_max : float
        As in the paper.
    """

    def __init__(
        self,
        betas: np.ndarray[Any, np.dtype[np.float64]],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        guidance_scale: float = 1.0,
        temperature: float = 1.0,
        offset: float = 0.0,
        p_min: float = 1e-6,
        p_max: float = 0.99,
    ) -> None:
        # 16 bits are too coarse for the schedule.
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        self.betas = torch.from_numpy(betas).to(device, precision)
        self.alphas = torch.from_numpy(1.0 - betas).to(device, precision)
        self.alpha_bars = torch.from_numpy(np.cumprod(1.0 - betas)).to(device, precision)
        self.guidance_scale, self.temperature, self.offset = guidance_scale, temperature, offset
        self.p_min, self.p_max = p_min, p_max

    def mean(self, t: int, x: Tensor, eps: Tensor) -> Tensor:
        factor = (1 - self.alphas[t]) / torch.sqrt(1 - self.alpha_bars[t])
        return 1 / torch.sqrt(self.alphas[t]) * (x - factor * eps)

    def step(
        self,
        t: int,
        x: Tensor,
        eps: Tensor,
        eps_neg: Tensor,
        p: Tensor,
        noise: Tensor | None = None,
        *,
        assertion: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Return x_next (B, ...) and p (B,), given x, eps, eps_neg (B, ...) and p (B,).

        Without ``noise`` the step draws its own.  ``assertion`` checks for NaN as the original
        does, which waits for the device.
        """
        scale = (self.guidance_scale * p / (1 - p)).reshape(-1, *[1] * (x.ndim - 1))
        guided = eps - scale * (eps_neg - eps)
        beta, deviation = self.betas[t], torch.sqrt(1 - self.alpha_bars[t])
        x_next = (x - beta / deviation * guided) / torch.sqrt(1.0 - beta)
        if t != 0:
            z = torch.randn_like(x) if noise is None else noise
            x_next = x_next + torch.sqrt(beta) * z
        p = self.posterior(t, x, x_next, eps, eps_neg, p)
        if assertion:
            assert not torch.isnan(p).any(), "the posterior is NaN"
        return x_next, torch.clamp(p, min=self.p_min, max=self.p_max)

    def posterior(
        self, t: int, x: Tensor, x_next: Tensor, eps: Tensor, eps_neg: Tensor, p: Tensor
    ) -> Tensor:
        """The posterior p (B,) after the step, before it is clamped."""
        before = self.alpha_bars[t - 1] if t > 0 else self.alpha_bars[t]
        variance = (1 - before) / (1 - self.alpha_bars[t]) * (1 - self.alphas[t])
        x, x_next = torch.flatten(x, 1), torch.flatten(x_next, 1)
        mean = self.mean(t, x, torch.flatten(eps, 1))
        mean_neg = self.mean(t, x, torch.flatten(eps_neg, 1))
        distance_neg = torch.sum((x_next - mean_neg).pow(2), dim=1)
        distance = torch.sum((x_next - mean).pow(2), dim=1)
        difference = distance_neg - distance
        return p * torch.exp(1 / (2 * variance) * (-self.temperature * difference + self.offset))
