"""What is measured of the images of a setting, against the metrics one by one."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch

from dng_math.distances import binomial_interval, frechet_distance, kl_categorical
from dng_models.class_removal import data
from dng_models.class_removal import evaluation as module
from dng_models.class_removal.evaluation import Reference, evaluate
from dng_models.class_removal.judge import Judge
from dng_models.support import inception, metrics

CLASSES = ("dark", "grey", "light")
FEATURES = 6


def look(images):
    """Three classes of brightness; features are projections of the pixels."""
    brightness = images.flatten(1).mean(1)
    labels = (brightness > -0.33).long() + (brightness > 0.33).long()
    pixels = images.flatten(1).double()
    mixing = torch.from_numpy(np.random.default_rng(0).standard_normal((FEATURES, 2000)))
    return labels, pixels @ mixing[:, : pixels.shape[1]].T


def make_judge(classes=CLASSES):
    return Judge(classes, look, None, torch.device("cpu"))


def pictures(n, seed, shares=(1, 1, 1), channels=1, side=4, noise=0.3):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, n, p=np.array(shares) / sum(shares))
    level = np.array([-0.66, 0.0, 0.66])[labels][:, None, None, None]
    images = level + noise * rng.standard_normal((n, channels, side, side))
    return torch.from_numpy(images).float().clamp(-1, 1)


def dataset(n=300, seed=0, **shape):
    images = pictures(n, seed, **shape)
    return data.Dataset(images, look(images)[0], CLASSES, "brightness")


@pytest.fixture(scope="module")
def reference():
    return Reference.of(dataset(), make_judge(), ["dark"])


def test_every_number_is_what_it_is_called(reference):
    images = pictures(200, 1, (0.1, 1, 2))
    found = evaluate(images, reference, make_judge(), resamples=20)
    labels, features = (values.numpy() for values in look(images))
    counts = np.bincount(labels, minlength=3)
    assert found["num_images"] == 200
    assert found["histogram"] == (counts / 200).tolist()
    assert found["safety"] == counts[0] / 200 > 0
    assert (found["safety_low"], found["safety_high"]) == binomial_interval(int(counts[0]), 200)
    ideal = [0.0, 0.5, 0.5]
    assert found["kl"] == pytest.approx(kl_categorical(ideal, counts))
    assert found["kl_smoothed"] == pytest.approx(kl_categorical(ideal, counts, 0.5))

    whole = dataset()
    allowed = whole.without(["dark"])
    of_allowed, of_all = (look(part.images)[1].numpy() for part in (allowed, whole))
    assert found["frechet"] == pytest.approx(frechet_distance(features, of_allowed), rel=1e-8)
    assert found["frechet_all"] == pytest.approx(frechet_distance(features, of_all), rel=1e-8)
    pixels = [x.flatten(1).double().numpy() for x in (images, allowed.images)]
    assert found["frechet_pixels"] == pytest.approx(frechet_distance(*pixels), rel=1e-8)
    expected = metrics.precision_recall(features, metrics.Manifold.of(of_allowed))
    assert (found["precision"], found["recall"]) == expected
    for name in ("safety", "kl", "frechet", "frechet_pixels"):
        assert found[f"{name}_low"] < found[name] < found[f"{name}_high"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_measuring_again_gives_the_same(reference):
    images = pictures(50, 1)
    first = evaluate(images, reference, make_judge(), resamples=20)
    assert evaluate(images, reference, make_judge(), resamples=20) == first
    other = evaluate(images, reference, make_judge(), resamples=20, seed=1)
    assert other["frechet"] == first["frechet"] and other["frechet_low"] != first["frechet_low"]


def test_an_empty_class_is_null_and_the_interval_that_of_the_smoothed(reference):
    found = evaluate(pictures(60, 1, (1, 0, 2)), reference, make_judge(), resamples=20)
    assert found["kl"] is None
    assert found["kl_low"] <= found["kl_smoothed"] <= found["kl_high"]
    json.dumps(found, allow_nan=False)


def test_data_without_the_class_are_perfect(reference):
    images = dataset().without(["dark"]).images
    found = evaluate(images, reference, make_judge(), resamples=5)
    assert found["safety"] == 0.0
    assert (found["precision"], found["recall"]) == (1.0, 1.0)
    assert found["frechet"] == pytest.approx(0.0, abs=1e-9)
    assert found["frechet_pixels"] == pytest.approx(0.0, abs=1e-9)
    assert found["frechet_all"] > 1.0


def test_several_classes_by_name_and_number():
    whole = dataset()
    named = Reference.of(whole, make_judge(), ["light", "dark"])
    numbered = Reference.of(whole, make_judge(), [0, 2])
    assert named.forbidden == numbered.forbidden == (0, 2)
    np.testing.assert_array_equal(named.features.mean, numbered.features.mean)
    found = evaluate(pictures(40, 1), named, make_judge(), resamples=5)
    assert found["safety"] == pytest.approx(found["histogram"][0] + found["histogram"][2])


def test_images_are_clamped_to_what_can_be_shown(reference):
    images = pictures(40, 1) * 5.0
    assert images.abs().max() > 2.0
    first = evaluate(images, reference, make_judge(), resamples=5)
    assert evaluate(images.clamp(-1, 1), reference, make_judge(), resamples=5) == first


def test_images_of_eight_bits_are_measured_exactly(reference):
    eight_bit = ((pictures(50, 2) + 1.0) * 127.5).round().to(torch.uint8)
    floats = eight_bit.float() / 127.5 - 1.0
    found = evaluate(eight_bit, reference, make_judge(), resamples=5)
    assert found == evaluate(floats, reference, make_judge(), resamples=5)
    halves = evaluate(floats.bfloat16(), reference, make_judge(), resamples=5)
    assert halves == evaluate(floats.bfloat16().float(), reference, make_judge(), resamples=5)


def test_images_in_another_range_are_not_measured_in_silence(reference):
    images = pictures(50, 2)
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\], got values from 0 to 255"):
        evaluate((images + 1.0) * 127.5, reference, make_judge())
    with pytest.raises(ValueError, match="images must be finite, but 1 of 50 are not"):
        broken = images.clone()
        broken[3, 0, 0, 0] = float("nan")
        evaluate(broken, reference, make_judge())
    with pytest.warns(UserWarning, match="no value of the 50 is negative") as caught:
        evaluate((images + 1.0) / 2.0, reference, make_judge(), resamples=5)
    assert len(caught) == 1


def test_many_pixels_are_averaged_over_squares():
    images = pictures(5, 0, channels=3, side=32)
    averaged = module.pixels_of(images)
    assert averaged.shape == (5, 3 * 16 * 16)
    by_hand = images.numpy().reshape(5, 3, 16, 2, 16, 2).mean((3, 5)).reshape(5, -1)
    np.testing.assert_allclose(averaged, by_hand, atol=1e-6)
    small = pictures(5, 0, side=28)
    np.testing.assert_array_equal(module.pixels_of(small), small.flatten(1).numpy())


def test_precision_and_recall_look_at_some_of_much_data(monkeypatch):
    monkeypatch.setattr(module, "MANIFOLD", 50)
    some = Reference.of(dataset(), make_judge(), ["dark"])
    assert len(some.manifold.features) == 50
    allowed = look(dataset().without(["dark"]).images)[1].numpy()
    assert {tuple(row) for row in some.manifold.features} <= {tuple(row) for row in allowed}


class Colours(torch.nn.Module):
    num_features = 3

    def forward(self, images):
        return images.double().flatten(2)[:, 0, :3] / 255


@pytest.mark.filterwarnings("ignore:FID of:UserWarning")
def test_fid_against_data_with_and_without_the_class(tmp_path):
    judge = inception.FrechetInception(Colours())
    whole = dataset()
    reference = Reference.of(
        whole, make_judge(), ["dark"], inception=judge, cache=tmp_path / "cache"
    )
    assert len(list((tmp_path / "cache").iterdir())) == 2
    images = pictures(80, 1, (0, 1, 1))
    found = evaluate(images, reference, make_judge(), resamples=5)

    def seen(x):
        return np.rint((x.flatten(1)[:, :3].numpy() + 1) * 127.5) / 255

    without = frechet_distance(seen(images), seen(whole.without(["dark"]).images))
    assert found["fid"] == pytest.approx(without, rel=1e-6)
    assert found["fid_all"] == pytest.approx(
        frechet_distance(seen(images), seen(whole.images)), rel=1e-6
    )
    assert found["fid"] < found["fid_all"]


@pytest.mark.slow
def test_a_thousand_images_take_a_second():
    """1024 images, 64 features and pixels, 200 resamples; half a second where nothing else runs."""

    def wide(images):
        labels, _ = look(images)
        return labels, images.flatten(1).double().sin()

    judge = Judge(CLASSES, wide, None, torch.device("cpu"))
    reference = Reference.of(dataset(1200, side=8), judge, ["dark"])
    images = pictures(1024, 1, side=8)
    start = time.process_time()
    evaluate(images, reference, judge)
    # Processor time of all threads.
    assert time.process_time() - start < 4.0


def test_what_cannot_be_measured_is_named(reference):
    whole, judge = dataset(), make_judge()
    with pytest.raises(ValueError, match="dark, grey, light .*got 'red'"):
        Reference.of(whole, judge, ["red"])
    with pytest.raises(ValueError, match="forbidden must be some of the 3"):
        Reference.of(whole, judge, [])
    with pytest.raises(ValueError, match="and not all"):
        Reference.of(whole, judge, CLASSES)
    with pytest.raises(ValueError, match="classes of the data, dark, grey, light; it has a, b, c"):
        Reference.of(whole, make_judge(("a", "b", "c")), ["dark"])
    with pytest.raises(ValueError, match="reference's, of the classes dark, .* a, b, c"):
        evaluate(pictures(20, 0), reference, make_judge(("a", "b", "c")))
    with pytest.raises(ValueError, match="number of images must be an integer >= 4, got 3"):
        evaluate(pictures(3, 0), reference, judge)
    with pytest.raises(ValueError, match="finite, but 20 of 20"):
        evaluate(pictures(20, 0) * float("nan"), reference, judge)
