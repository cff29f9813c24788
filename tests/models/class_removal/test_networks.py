"""Networks in their sizes, and folders of them that are damaged or foreign."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from dng_models.class_removal import networks
from dng_models.class_removal.networks import (
    CONFIG,
    METADATA,
    WEIGHTS,
    load_network,
    make_unet,
    read_metadata,
    save_network,
)
from dng_models.support import files

# config.json of google/ddpm-cifar10-32, as it is published.
DDPM_CIFAR10 = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "resnet_time_scale_shift": "default",
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return make_unet(8, 1).eval()


@pytest.fixture
def folder(net, tmp_path):
    save_network(tmp_path / "net", net, metadata={"steps": 3})
    return tmp_path / "net"


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def test_32_pixels_are_the_published_configuration():
    with torch.device("meta"):
        net = make_unet(32, 3)
    config = json.loads(net.to_json_string())
    assert {name: config[name] for name in DDPM_CIFAR10} == DDPM_CIFAR10
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**DDPM_CIFAR10)
    shapes = [{n: v.shape for n, v in one.state_dict().items()} for one in (net, theirs)]
    assert shapes[0] == shapes[1]
    # DDPM's own count, section 4: 35.7 million.
    assert round(parameters(net) / 1e5) == 357


@pytest.mark.parametrize(
    ("image_size", "channels", "size", "thousands"),
    [
        (8, 1, None, 160),
        (8, 1, "paper", 3990),
        (28, 1, None, 620),
        (28, 1, "paper", 6801),
        (32, 3, "small", 4064),
    ],
)
def test_sizes(image_size, channels, size, thousands):
    with torch.device("meta"):
        net = make_unet(image_size, channels, size=size)
    assert round(parameters(net) / 1e3) == thousands


@pytest.mark.parametrize(
    ("image_size", "channels", "size"),
    [
        (4, 1, None),
        (8, 3, None),
        (8, 1, "paper"),
        (28, 1, None),
        (28, 1, "paper"),
        (64, 1, "small"),
    ],
)
def test_a_prediction_has_the_shape_of_the_images(image_size, channels, size):
    net = make_unet(image_size, channels, size=size)
    x = torch.randn(2, channels, image_size, image_size)
    with torch.no_grad():
        assert net(x, torch.tensor([0, 999])).sample.shape == x.shape


def test_a_conditional_network_has_one_label_more_for_none():
    net = make_unet(8, 1, num_classes=10)
    assert net.config["num_class_embeds"] == 11
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 5])
    with torch.no_grad():
        told = net(x, t, class_labels=torch.tensor([0, 10])).sample
        other = net(x, t, class_labels=torch.tensor([0, 1])).sample
    assert torch.equal(told[0], other[0]) and not torch.equal(told[1], other[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((7, 1), ValueError, "image_size must be divisible by 2 for the 'small' network, got 7"),
        ((30, 3), ValueError, "divisible by 8 for the 'paper' network, got 30"),
        ((0, 1), ValueError, "image_size must be an integer >= 1"),
        ((8.0, 1), TypeError, "image_size must be an integer"),
        ((8, 0), ValueError, "channels"),
        ((8, 1, {"num_classes": 0}), ValueError, "num_classes"),
        ((8, 1, {"size": "huge"}), ValueError, "size must be one of 'small', 'paper'"),
    ],
)
def test_networks_that_there_are_not(arguments, error, message):
    *positional, keywords = arguments if len(arguments) == 3 else (*arguments, {})
    with pytest.raises(error, match=message):
        make_unet(*positional, **keywords)


# ---------------------------------------------------------------------- on disk


def test_a_folder_gives_the_same_network_to_both(net, folder):
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    theirs = diffusers.UNet2DModel.from_pretrained(folder, use_safetensors=True)
    ours = load_network(folder)
    with torch.no_grad():
        expected = net(x, t).sample
        assert torch.equal(ours(x, t).sample, expected)
        assert torch.equal(theirs(x, t).sample, expected)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    assert read_metadata(folder) == {"steps": 3}
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS, METADATA]


def test_a_folder_of_diffusers_is_read(net, tmp_path):
    net.save_pretrained(tmp_path)
    loaded = load_network(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), net.parameters(), strict=True)
    )
    with pytest.raises(FileNotFoundError, match="no training was finished there"):
        read_metadata(tmp_path)


def test_what_says_that_a_network_is_whole_is_written_last(net, tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        save_network(tmp_path, net)
    assert (tmp_path / WEIGHTS).is_file() and (tmp_path / CONFIG).is_file()
    assert not (tmp_path / METADATA).exists()


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_folder_that_lacks_a_file(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"it has no {missing}"):
        load_network(folder)


def test_damaged_weights(folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not a whole safetensors file"):
        load_network(folder)


def test_weights_of_another_network(folder):
    torch.manual_seed(1)
    save_network(folder.parent / "other", make_unet(8, 3))
    (folder.parent / "other" / WEIGHTS).rename(folder / WEIGHTS)
    with pytest.raises(ValueError, match="does not hold the weights.*conv_in.weight has shape"):
        load_network(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not JSON"),
        ("[]", r"must hold a JSON object, got \[\]"),
        ('{"_class_name": "UNet2DConditionModel"}', "got 'UNet2DConditionModel'"),
    ],
)
def test_a_config_that_is_damaged_or_foreign(folder, content, message):
    (folder / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_network(folder)


def test_damaged_metadata(folder):
    (folder / METADATA).write_text("[]")
    with pytest.raises(ValueError, match="training.json must hold a JSON object"):
        read_metadata(folder)


def test_the_default_size_is_one_that_the_machine_can_train():
    assert networks.default_size(28) == "small" and networks.default_size(32) == "paper"
