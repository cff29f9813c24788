"""Torch's threads: one for small work, and afterwards as many as before."""

from __future__ import annotations

import sys

import pytest
import torch

from dng_math import Unguided
from dng_models import sample
from dng_models.support.threads import SMALL_WORK, torch_threads, work_of


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_small_work_has_one_thread_and_large_work_what_was_set():
    with torch_threads(work=SMALL_WORK - 1):
        assert torch.get_num_threads() == 1
        with torch_threads(work=SMALL_WORK):
            assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    with torch_threads(work=SMALL_WORK):
        assert torch.get_num_threads() == 3


def test_a_count_is_a_count_and_an_error_leaves_what_was_set():
    with pytest.raises(KeyError), torch_threads(count=2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == 3


def test_both_are_refused_and_none_keeps_what_was_set():
    with pytest.raises(TypeError, match="one of work and count may be given, got 5 and 1"):
        torch_threads(work=5, count=1).__enter__()
    with torch_threads():
        assert torch.get_num_threads() == 3


def test_no_threads_are_refused():
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        torch_threads(count=0).__enter__()


def test_without_torch_it_does_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with torch_threads(count=1):
        pass


def test_work_is_weights_times_elements():
    net = torch.nn.Linear(3, 5)
    assert work_of((2, 4, 3), [net]) == 24 * 20
    assert work_of((2,), [torch.nn.Linear(1, 1), net]) == 2 * 20
    assert work_of((8, 1024), [lambda x, t: x]) == SMALL_WORK
    # A UNet of 0.4 million weights on 64 digits is small; that of Stable Diffusion on one is not.
    with torch.device("meta"):
        assert work_of((64, 1, 8, 8), [torch.nn.Linear(650, 650)]) < SMALL_WORK
        assert work_of((1, 4, 64, 64), [torch.nn.Linear(29_000, 29_000)]) > SMALL_WORK


def test_sampling_with_a_small_network_runs_on_one_thread():
    seen = []

    def denoiser(x, t):
        seen.append(torch.get_num_threads())
        return x

    options = {"num_images": 1, "steps": 2, "batch_size": 1}
    sample(denoiser, None, Unguided(), shape=(3,), **options)
    assert seen == [1, 1] and torch.get_num_threads() == 3
    sample(denoiser, None, Unguided(), shape=(1, 128, 128), **options)
    assert seen[2:] == [3, 3]
