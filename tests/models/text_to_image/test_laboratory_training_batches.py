"""Batches for training: what is drawn, how often, and that the targets are exact."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from dng_models.text_to_image.laboratory.captions import parse
from dng_models.text_to_image.laboratory.exact_model import ExactModel
from dng_models.text_to_image.laboratory.training_batches import (
    Batch,
    CaptionMix,
    TrainingBatches,
)
from tests.helpers.small_worlds import small_world
from tests.helpers.statistical import FALSE_ALARM, assert_proportion

WORLD = small_world()
MODEL = ExactModel(WORLD, dtype=torch.float64)
SQUARES = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)


def batches(**options) -> TrainingBatches:
    return TrainingBatches(MODEL, SQUARES, **options)


def kind_of(caption: str) -> str:
    event = parse(caption, WORLD)
    if event.scene is None:
        return "bare" if event.required else "empty"
    if event.excluded:
        return "mixed" if event.required else "without"
    sizes = sorted(map(len, event.required))
    return {(): "scene", (1,): "one", (1, 1): "two", (2,): "either"}[tuple(sizes)]


def test_kinds_of_captions_have_their_shares():
    n = 4000
    found = [kind_of(caption) for caption in batches(size=n).draw(0).captions]
    shares = dataclasses.asdict(CaptionMix())
    assert sum(shares.values()) == pytest.approx(1.0)
    for kind, share in shares.items():
        assert_proportion(found.count(kind), n, share, FALSE_ALARM / len(shares))


def test_timesteps_and_mismatched_pairs_have_their_shares():
    n = 4000
    batch = batches(
        size=n, often=(200, 300), often_share=0.5, mismatched=0.25, mismatched_from=250
    ).draw(0)
    inside = (batch.timesteps >= 200) & (batch.timesteps < 300)
    assert_proportion(int(inside.sum()), n, 0.5 + 0.5 * 0.1, FALSE_ALARM / 2.0)
    assert batch.timesteps.min() < 100 and batch.timesteps.max() > 900
    named = np.array([kind_of(each) not in ("empty", "scene", "bare") for each in batch.captions])
    mismatched = batch.mismatched.numpy()
    named &= (batch.timesteps >= 250).numpy()
    assert not mismatched[~named].any()
    assert_proportion(int(mismatched.sum()), int(named.sum()), 0.25, FALSE_ALARM / 2.0)


def test_targets_are_the_exact_predictions():
    batch = batches(size=64, mismatched=0.5).draw(3)
    assert torch.allclose(batch.alpha**2, SQUARES[batch.timesteps])
    assert torch.allclose(batch.alpha**2 + batch.sigma**2, torch.ones(64, dtype=torch.float64))
    found = MODEL.x0(batch.x, batch.alpha, batch.sigma, batch.captions)
    assert torch.allclose(found, batch.x0, atol=1e-12)
    assert batch.mismatched.any() and not batch.mismatched.all()
    for caption, scene in zip(batch.captions, batch.scenes, strict=True):
        assert parse(scene, WORLD) == dataclasses.replace(
            parse(caption, WORLD), required=frozenset(), excluded=frozenset()
        )


def test_pictures_are_those_of_their_captions():
    batch = TrainingBatches(
        MODEL, torch.ones(3), size=400, often=(0, 3), mismatched=0.5, mismatched_from=0
    ).draw(0)
    holds, _ = MODEL.log_posterior(batch.x, 1.0, 0.0, "", batch.captions)
    matched = ~batch.mismatched
    # A picture of this small world is hardly ever mistaken for another.
    assert float(holds[matched].exp().mean()) > 0.95
    assert float(holds[batch.mismatched].exp().mean()) < 0.8
    scenes, _ = MODEL.log_posterior(batch.x, 1.0, 0.0, "", batch.scenes)
    assert float(scenes.exp().mean()) > 0.95


def test_a_batch_depends_on_seed_and_number_alone():
    def all_of(batch: Batch):
        return (batch.captions, *(each.tolist() for each in (batch.x, batch.x0, batch.timesteps)))

    drawn = batches(size=8, seed=1)
    first, second = drawn.draw(0), drawn.draw(1)
    assert all_of(batches(size=8, seed=1).draw(1)) == all_of(second)
    for one, two in itertools.combinations((first, second, batches(size=8, seed=2).draw(0)), 2):
        assert one.x.tolist() != two.x.tolist()


def test_only_listed_objects():
    # The sea lists one object, so that the second one is any other.
    mix = CaptionMix(0, 0, 0, 0, 0, 1, 0, 0)
    captions = batches(size=200, mix=mix, from_all=0.0).draw(0).captions
    room, sea = ({c for c in captions if c.startswith(s)} for s in ("a room", "the sea"))
    assert room == {"a room with ball, cup"}
    assert sea == {"the sea with ball, egg", "the sea with cup, egg"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batches(size=0), "size must be"),
        (lambda: batches(seed=-1), "seed must be"),
        (lambda: batches(mismatched=1.5), r"mismatched must be .*in \[0, 1\]"),
        (lambda: batches(often_share=-0.1), "often_share must be"),
        (lambda: batches(mismatched_from=-1), "mismatched_from must be"),
        (lambda: batches(from_all=2.0), "from_all must be"),
        (lambda: batches(often=(300, 300)), "often must be an integer from 301"),
        (lambda: batches(often=(0, 1001)), "often must be an integer from 1 to 1000"),
        (lambda: TrainingBatches(MODEL, torch.zeros(0)), "alphas_cumprod must be"),
        (lambda: TrainingBatches(MODEL, 2.0 * SQUARES), "alphas_cumprod must be"),
        (lambda: batches().draw(-1), "number must be"),
        (lambda: CaptionMix(empty=-1.0), "empty must be"),
        (lambda: CaptionMix(0, 0, 0, 0, 0, 0, 0, 0), "a share above 0"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
