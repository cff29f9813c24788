"""The optimizer of the trained pipeline, against its papers written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dng_models.text_to_image.laboratory.muon import MOMENTUM, SIZE, Muon, orthogonal


def written_out(matrix: np.ndarray) -> np.ndarray:
    """Newton and Schulz's iteration on the matrix itself, whichever side is the shorter."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (40, 5), (1, 7), (7, 1)])
def test_a_matrix_becomes_orthogonal(shape):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=shape)
    found = orthogonal(torch.from_numpy(matrix)).numpy()
    np.testing.assert_allclose(found, written_out(matrix), rtol=0, atol=1e-10)
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    # The same singular vectors; the values were above 0.01 of the norm.
    values = np.diag(u.T @ found @ v.T)
    np.testing.assert_allclose(u * values @ v, found, atol=1e-10)
    assert values.min() > 0.6 and values.max() < 1.25


def test_nothing_stays_nothing():
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 1)
        self.hidden = nn.Conv2d(4, 4, 3)
        self.frozen = nn.Linear(2, 2)  # without a gradient


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def test_hidden_matrices_take_its_steps_and_the_rest_adams():
    mine, other = net(), net()
    rate = 0.1
    optimizer = Muon(mine.named_parameters(), 1.0)
    optimizer.learning_rate = rate
    outer = [*other.conv_in.parameters(), other.hidden.bias]
    adam = torch.optim.AdamW(outer, lr=rate, weight_decay=0.01)
    weight = other.hidden.weight.detach().flatten(1).numpy().copy()
    momentum, rng = 0.0, np.random.default_rng(1)
    for _ in range(3):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            p.grad = q.grad = torch.from_numpy(rng.normal(size=p.shape))
        mine.frozen.weight.grad = mine.frozen.bias.grad = None
        gradient = other.hidden.weight.grad.flatten(1).numpy()
        momentum = MOMENTUM * momentum + gradient
        step = written_out(gradient + MOMENTUM * momentum)
        weight = weight * (1.0 - 0.01 * rate) - rate * SIZE * 6.0 * step  # the longer side is 36
        optimizer.step()
        adam.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in mine.parameters())
    np.testing.assert_allclose(mine.hidden.weight.detach().flatten(1), weight, atol=1e-12)
    for p, q in zip([*mine.conv_in.parameters(), mine.hidden.bias], outer, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert torch.equal(mine.frozen.weight, net().frozen.weight)


def test_it_continues_from_its_state():
    rng = np.random.default_rng(2)

    def steps(of: Net, optimizer: Muon, gradients: list[list[np.ndarray]]) -> None:
        for each in gradients:
            for p, value in zip(of.parameters(), each, strict=True):
                p.grad = torch.from_numpy(value)
            optimizer.step()

    whole, first = net(), net()
    gradients = [[rng.normal(size=p.shape) for p in whole.parameters()] for _ in range(4)]
    steps(whole, Muon(whole.named_parameters(), 0.1), gradients)
    stopped = Muon(first.named_parameters(), 0.1)
    fresh = stopped.state()
    assert all(not value.any() for value in fresh.values())
    steps(first, stopped, gradients[:2])
    state = {name: value.clone() for name, value in stopped.state().items()}
    assert state.keys() == fresh.keys()
    again = Muon(first.named_parameters(), 0.1)
    again.load(state, 2)
    steps(first, again, gradients[2:])
    assert all(map(torch.equal, first.parameters(), whole.parameters()))
