"""The judge: trained here, or a model of Hugging Face; and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dng_models.class_removal import classifier, data
from dng_models.class_removal.classifier import ClassifierConfig, train_classifier
from dng_models.class_removal.judge import Judge, load_classifier
from dng_models.class_removal.small_classifier import SmallClassifier
from dng_models.support import files

CLASSES = ("left", "right", "both")
SHORT = ClassifierConfig(steps=60, batch_size=32, width=8)


def bars(n=150, seed=0, channels=1, side=8):
    """A bright half, the left, the right, or both; and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = -0.7 + 0.2 * torch.randn(n, channels, side, side, generator=generator)
    images[labels != 1, :, 2:-2, : side // 2 - 1] += 1.2
    images[labels != 0, :, 2:-2, side // 2 + 1 :] += 1.2
    return data.Dataset(images.clamp(-1, 1), labels, CLASSES, "bars")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_classifier(
        bars(), tmp_path_factory.mktemp("judge") / "classifier", SHORT, progress=False
    )


# ---------------------------------------------------------------------- the small one


def test_it_learns_and_its_errors_are_beside_it(trained):
    dataset = bars()
    judge = load_classifier(trained, CLASSES, "cpu")
    predicted, features = judge.judge(dataset.held_out.images)
    assert predicted.dtype == np.int64 and features.dtype == np.float64
    assert features.shape == (len(dataset.held_out), 64)
    description = json.loads((trained / "config.json").read_text())
    truth = dataset.held_out.labels.numpy()
    counted = np.zeros((3, 3), dtype=int)
    for true, said in zip(truth, predicted, strict=True):
        counted[true, said] += 1
    np.testing.assert_array_equal(description["confusion"], counted)
    np.testing.assert_array_equal(judge.confusion, counted)
    assert description["held_out_accuracy"] == np.mean(predicted == truth) > 0.9
    assert description["classes"] == list(CLASSES)
    assert description["training"]["steps"] == 60


def test_training_is_a_function_of_data_and_configuration(trained, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = train_classifier(bars(), tmp_path / "again", SHORT, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    other = train_classifier(
        bars(), tmp_path / "other", replace(SHORT, seed=1, steps=2), progress=False
    )
    first, second, third = (
        files.load_tensors(folder / "model.safetensors")[0] for folder in (trained, again, other)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], third["head.weight"])


def test_what_is_there_is_not_trained_again(trained, monkeypatch):
    before = (trained / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(classifier, "_fit", None)
    assert train_classifier(bars(), trained, SHORT, progress=False) == trained
    assert (trained / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"another classifier.*has training .*'steps': 60"):
        train_classifier(bars(), trained, replace(SHORT, steps=61), progress=False)
    with pytest.raises(ValueError, match="another classifier.*has fingerprint"):
        train_classifier(bars(seed=1), trained, SHORT, progress=False)


def test_batches_go_through_all_images_before_any_comes_again():
    config = ClassifierConfig(batch_size=4, seed=3)
    order = np.concatenate([classifier._batch(10, step, config) for step in range(10)])
    for epoch in order.reshape(4, 10):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(10))
    assert (order[:10] != order[10:20]).any()
    whole = np.concatenate([classifier._batch(3, step, config) for step in range(3)])
    np.testing.assert_array_equal(np.bincount(whole), [4, 4, 4])


def test_augmentation_without_any_is_the_image():
    none = ClassifierConfig(shift=0.0, turn=0.0, zoom=0.0, noise=0.0)
    images = bars().images
    torch.testing.assert_close(classifier._augment(images, 7, none), images)
    mirrored = classifier._augment(images, 7, replace(none, flips=True))
    same = (mirrored - images).abs().flatten(1).amax(1) < 1e-5
    flipped = (mirrored - images.flip(3)).abs().flatten(1).amax(1) < 1e-5
    assert (same ^ flipped).all() and 40 < int(flipped.sum()) < 110


def test_augmentation_moves_by_no_more_than_it_says():
    config = ClassifierConfig(shift=0.1, turn=0.0, zoom=0.0, noise=0.0)
    images = torch.full((64, 1, 20, 20), -1.0)
    images[:, :, 9:11, 9:11] = 1.0
    bright = classifier._augment(images, 0, config) + 1.0
    place = torch.arange(20.0)
    for axis in (2, 3):
        marginal = bright.sum(dim=5 - axis)[:, 0]
        moved = (marginal * place).sum(1) / marginal.sum(1) - 9.5
        assert 1.0 < moved.abs().max() <= 2.0 + 1e-4
        assert moved.min() < -1.0 and moved.max() > 1.0
    noisy = classifier._augment(images, 0, replace(config, shift=0.0, noise=0.3)) - images
    assert 0.0 < noisy.flatten(1).std(1).max() < 0.35


@pytest.mark.parametrize(("side", "channels", "layers"), [(8, 1, 1), (28, 1, 1), (32, 3, 2)])
def test_logits_are_linear_in_the_features(side, channels, layers):
    net = SmallClassifier(side, channels, 10, width=8, layers=layers)
    images = torch.randn(3, channels, side, side)
    features = net.features(images)
    assert features.shape == (3, 64) and net(images).shape == (3, 10)
    torch.testing.assert_close(
        net(images), features @ net.head.weight.T + net.head.bias, rtol=1e-5, atol=1e-6
    )


def test_an_image_is_judged_alone(trained):
    """The same bits whatever comes with it, and clamped to what can be shown."""
    judge = load_classifier(trained, CLASSES, "cpu")
    images = bars().images[:50]
    _, whole = judge.judge(images, batch_size=32)
    _, part = judge.judge(images[32:35], batch_size=32)
    np.testing.assert_array_equal(whole[32:35], part)
    _, bright = judge.judge(images * 50.0)
    _, clamped = judge.judge((images * 50.0).clamp(-1, 1))
    np.testing.assert_array_equal(bright, clamped)


def test_errors_are_shares_of_held_out_images():
    confusion = np.array([[8, 1, 1], [0, 18, 2], [3, 0, 27]])
    judge = Judge(CLASSES, None, None, torch.device("cpu"), confusion)
    assert judge.errors(["left"]) == (3 / 50, 2 / 10)
    assert judge.errors(["left", "both"]) == (2 / 20, 1 / 40)
    assert replace(judge, confusion=None).errors(["left"]) is None
    with pytest.raises(ValueError, match="forget must be one of 'left', 'right', 'both'; got 'u"):
        judge.errors(["up"])


def test_wrong_images_are_named(trained):
    judge = load_classifier(trained, CLASSES, "cpu")
    images = bars().images[:5]
    with pytest.raises(ValueError, match=r"\(N, \*\(1, 8, 8\)\), .* got \(5, 3, 8, 8\)"):
        judge.judge(images.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got \(1, 8, 8\)"):
        judge.judge(images[0])
    with pytest.raises(ValueError, match="got .0, 1, 8, 8"):
        judge.judge(images[:0])
    with pytest.raises(TypeError, match="floating-point or uint8 tensor, got torch.int64"):
        judge.judge(images.long())
    with pytest.raises(TypeError, match="got ndarray"):
        judge.judge(images.numpy())
    broken = images.clone()
    broken[1, 0, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="finite, but 1 of 5 are not"):
        judge.judge(broken)
    broken[1, 0, 2, 3] = float("inf")
    with pytest.raises(ValueError, match="finite, but 1 of 5 are not"):
        judge.judge(broken)
    with pytest.raises(ValueError, match=r"in \[-1, 1\], got values from 0 to 255"):
        judge.judge((images - images.min()) * 255.0 / (images.max() - images.min()))


def test_images_of_eight_bits_are_judged_as_a_data_set_reads_them(trained):
    """And those in [0, 1], which cannot be told for certain, with a warning."""
    judge = load_classifier(trained, CLASSES, "cpu")
    eight_bit = ((bars().images + 1.0) * 127.5).round().to(torch.uint8)
    floats = eight_bit.float() / 127.5 - 1.0
    for found, expected in zip(judge.judge(eight_bit), judge.judge(floats), strict=True):
        np.testing.assert_array_equal(found, expected)
    with pytest.warns(UserWarning, match=r"in \[-1, 1\], and no value of .* is negative"):
        judge.judge((floats + 1.0) / 2.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("width", 12), ("noise", -0.1), ("learning_rate", 0.0), ("seed", -1)],
)
def test_a_wrong_configuration_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} must be .*got {value}"):
        replace(ClassifierConfig(), **{field: value})


def test_data_that_it_cannot_be_trained_on(tmp_path):
    dataset = bars()
    wide = replace(dataset, images=dataset.images[:, :, :4])
    with pytest.raises(ValueError, match="square images, got 4 x 8"):
        train_classifier(wide, tmp_path / "a", SHORT)
    nothing_held_out = replace(dataset, is_held_out=torch.zeros(len(dataset), dtype=torch.bool))
    with pytest.raises(ValueError, match="hold out images"):
        train_classifier(nothing_held_out, tmp_path / "b", SHORT)
    assert not any(tmp_path.iterdir())


def test_folders_that_are_not_a_classifier(trained, tmp_path):
    with pytest.raises(ValueError, match=r"classes of the data, a, b; it has left, right, both"):
        load_classifier(trained, ("a", "b"))
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_classifier(tmp_path, CLASSES)
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_classifier(tmp_path, CLASSES)
    weights = (trained / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        load_classifier(tmp_path, CLASSES)
    files.save_tensors(tmp_path / "model.safetensors", {"head.weight": torch.zeros(3, 64)})
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_classifier(tmp_path, CLASSES)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_classifier(tmp_path, CLASSES)


@pytest.mark.slow
def test_digits_are_recognised(tmp_path):
    folder = train_classifier(data.load_dataset("digits"), tmp_path / "judge", progress=False)
    assert files.read_json(folder / "config.json")["held_out_accuracy"] >= 0.985


# ---------------------------------------------------------------------- Hugging Face


def save_model(folder, labels, kind="vit"):
    """A random model with that last layer, and a processor that makes 12 x 12 images."""
    import transformers

    named = {"id2label": dict(enumerate(labels)), "label2id": {c: i for i, c in enumerate(labels)}}
    if kind == "vit":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.ViTConfig(
            **sizes, intermediate_size=24, image_size=12, patch_size=4, **named
        )
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **named
        )
        model = transformers.ResNetForImageClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        # No class wins everywhere, whatever the weights came out to be.
        head = model.classifier if kind == "vit" else model.classifier[-1]
        head.bias -= model.eval()(4 * torch.rand(64, 3, 12, 12) - 2).logits.mean(dim=0)
    model.save_pretrained(folder)
    size = {"height": 12, "width": 12}
    processor = transformers.ViTImageProcessor(
        size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_hugging_face_model_judges(tmp_path, kind):
    """Its labels in another order and spelling; its features are what its last layer sees."""
    torch.manual_seed(0)
    names = ("big cat", "dog", "frog")
    model = save_model(tmp_path, ("Frog", "big_cat", "dog"), kind)
    judge = load_classifier(tmp_path, names, "cpu")
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(30, 1, 12, 12, generator=generator) * 3 - 1.5
    predicted, features = judge.judge(images, batch_size=8)

    levels = torch.from_numpy(np.rint((images.clamp(-1, 1).numpy() + 1) * 127.5)) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        logits = model(((levels - mean) / std).float()).logits
    by_name = np.array([names.index(("frog", "big cat", "dog")[i]) for i in logits.argmax(1)])
    np.testing.assert_array_equal(predicted, by_name)
    assert len(set(predicted)) > 1
    head = model.classifier if kind == "vit" else model.classifier[-1]
    again = head(torch.from_numpy(features).float())
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    assert judge.errors(["dog"]) is None


def test_colour_images_of_another_size(tmp_path):
    save_model(tmp_path, CLASSES)
    judge = load_classifier(tmp_path, CLASSES, "cpu")
    predicted, features = judge.judge(torch.rand(5, 3, 9, 9) * 2 - 1)
    assert predicted.shape == (5,) and features.shape == (5, 16)


def test_models_that_cannot_judge_are_refused(tmp_path):
    import transformers

    model = save_model(tmp_path / "whole", CLASSES)
    with pytest.raises(ValueError, match="data, left, right; it has left, right, both"):
        load_classifier(tmp_path / "whole", ("left", "right"))
    with pytest.raises(ValueError, match="data, a, b, c; it has left, right, both"):
        load_classifier(tmp_path / "whole", ("a", "b", "c"))

    save_model(tmp_path / "headless", CLASSES)
    transformers.ViTModel(model.config, add_pooling_layer=False).save_pretrained(
        tmp_path / "headless"
    )
    with pytest.raises(ValueError, match="trained image classifier, but lacks .*classifier.weight"):
        load_classifier(tmp_path / "headless", CLASSES)

    weights = tmp_path / "whole" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        load_classifier(tmp_path / "whole", CLASSES)
