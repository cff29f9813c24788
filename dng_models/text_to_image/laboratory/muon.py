"""Muon, the optimizer of the trained pipeline's UNet.

For matrices of hidden layers, a step of momentum is replaced by the nearest matrix with orthogonal
rows or columns (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"),
scaled so that the size of its numbers does not depend on its shape (Liu et al. 2025, arXiv
2502.16982).  First and last layers, embeddings, gains and biases have AdamW.  The same loss takes
about half as many updates as with AdamW for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
DECAY = 0.01
SIZE = 0.4  # root mean square of a step, in units of the learning rate
# Five steps of this polynomial bring singular values from [0.001, 1] to about [0.7, 1.2].
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# Not hidden: the layers at both ends, and what embeds time and caption.
OUTER = ("conv_in", "conv_out", "time_embedding", "add_embedding")


class Muon:
    """Muon for hidden matrices, AdamW for the rest.

    Parameters
    ----------
    named : iterable of (str, Parameter)
        The parameters of a UNet.
    learning_rate : float
        Of both.

    Attributes
    ----------
    learning_rate : float
        Of the next step.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self._hidden: dict[str, nn.Parameter] = {}
        self._others: dict[str, nn.Parameter] = {}
        for name, p in named:
            hidden = p.ndim >= 2 and not name.startswith(OUTER)
            (self._hidden if hidden else self._others)[name] = p
        self._momentum = {name: torch.zeros_like(p) for name, p in self._hidden.items()}
        self._adam = torch.optim.AdamW(
            list(self._others.values()), lr=learning_rate, weight_decay=DECAY, fused=True
        )

    @torch.no_grad()
    def step(self) -> None:
        """Change the parameters by one step of their gradients."""
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate
        self._adam.step()
        for name, p in self._hidden.items():
            if p.grad is None:
                continue
            momentum = self._momentum[name].mul_(MOMENTUM).add_(p.grad)
            step = orthogonal(p.grad.add(momentum, alpha=MOMENTUM).flatten(1))
            size = SIZE * max(step.shape) ** 0.5
            p.mul_(1.0 - self.learning_rate * DECAY)
            p.add_(step.view_as(p), alpha=-self.learning_rate * size)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in (*self._hidden.values(), *self._others.values()):
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """The moments of all parameters by their names; zeros before the first step."""
        found = {f"momentum.{name}": value for name, value in self._momentum.items()}
        for name, p in self._others.items():
            moments = self._adam.state.get(p, {})
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{kind}.{name}"] = moments.get(kind, torch.zeros_like(p))
        return found

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Continue after a number of steps from the moments of :meth:`state`.

        Parameters
        ----------
        state : dict
        step : int
            Number of steps that were taken.
        """
        for name, momentum in self._momentum.items():
            momentum.copy_(state[f"momentum.{name}"])
        moments = {
            i: {
                "step": torch.tensor(float(step)),
                "exp_avg": state[f"exp_avg.{name}"],
                "exp_avg_sq": state[f"exp_avg_sq.{name}"],
            }
            for i, name in enumerate(self._others)
        }
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": moments, "param_groups": groups})


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose shorter side is orthogonal, by Newton and Schulz's iteration.

    Parameters
    ----------
    matrix : Tensor, shape (M, N)

    Returns
    -------
    Tensor, shape (M, N)
        With singular values near 1; zeros for zeros.
    """
    a, b, c = POLYNOMIAL
    x = matrix / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    # x becomes p(x x^T) x: all of it but the last product is of the shorter side alone.
    gram = x @ x.T
    whole: Any = None
    for i in range(ITERATIONS):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        whole = factor if whole is None else factor @ whole
        if i < ITERATIONS - 1:
            gram = factor @ gram @ factor
    x = whole @ x
    return x.T if tall else x
