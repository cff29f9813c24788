"""Checkpoints in the published layout, against a transcription of the published network."""

import hashlib
import os

import diffusers
import pytest
import torch

from dng_models.class_removal.conversion import _layers, _plan, convert, main
from dng_models.class_removal.networks import read_metadata
from tests.helpers.published_network import PublishedNetwork

SIZES = {
    "published": {},
    "score_sde": {"up_attention": "last", "attention": (1, 2)},
    "one resolution": {"ch_mult": (1,), "attention": (0,), "blocks": 1},
    "three resolutions": {"ch_mult": (1, 2, 3), "attention": (0, 2), "blocks": 3, "channels": 1},
    "no attention": {"ch_mult": (1, 1), "attention": (), "middle_attention": False},
    "convolved shortcut": {"ch_mult": (1, 2), "shortcut": "1"},
}
SMALL = {"ch_mult": (1, 2), "blocks": 1}


def published(tmp_path, name="net.pt", *, change=None, entry="net", **sizes):
    """A checkpoint file and the network in it; ``change`` acts on the state dict."""
    net = PublishedNetwork(**sizes)
    state = dict(net.state_dict())
    if change is not None:
        change(state)
    path = tmp_path / name
    torch.save({entry: state}, path)
    return path, net


@torch.no_grad()
def compare(net, converted, *, dtype=torch.float32, size=16, **options):
    """Largest difference of their outputs, relative to the largest output."""
    generator = torch.Generator().manual_seed(1)
    channels = converted.config.in_channels
    x = torch.randn(4, channels, size, size, generator=generator, dtype=torch.float64).to(dtype)
    t = torch.tensor([0, 17, 500, 999])
    expected = net.to(dtype)(x, t, **options)
    return float((converted.to(dtype)(x, t).sample - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_converted_network_gives_the_outputs_of_the_published_one(tmp_path, sizes):
    path, net = published(tmp_path, **sizes)
    convert(path, tmp_path / "out", image_size=16)
    loaded = diffusers.UNet2DModel.from_pretrained(tmp_path / "out")
    assert loaded.config.sample_size == 16
    assert compare(net, loaded) < 1e-5


@pytest.mark.parametrize("sizes", [SIZES["published"], SIZES["score_sde"]], ids=["each", "last"])
def test_in_float64_nothing_but_rounding_is_left(tmp_path, sizes):
    path, net = published(tmp_path, **sizes)
    converted = convert(path, tmp_path / "out")
    # diffusers computes the sines in float32 whatever the network: here both get the same.
    embedding = converted.time_proj(torch.tensor([0, 17, 500, 999])).double()
    assert compare(net, converted, dtype=torch.float64, embedding=embedding) < 1e-12


def test_the_published_size_is_recognised():
    with torch.device("meta"):
        state = PublishedNetwork(128).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert len(shapes) == 328
    assert shapes["all_modules.0.weight"] == (512, 128)
    assert shapes["all_modules.7.NIN_3.W"] == (256, 256)
    assert shapes["all_modules.31.NIN_0.W"] == (384, 256)
    assert shapes["all_modules.38.weight"] == (3, 128, 3, 3)
    config = _plan(_layers(state), 32).config
    assert config["block_out_channels"] == (128, 256, 256, 256)
    assert config["layers_per_block"] == 2
    assert config["down_block_types"] == ("DownBlock2D", "AttnDownBlock2D", *2 * ["DownBlock2D"])
    assert config["up_block_types"] == (*2 * ["UpBlock2D"], "AttnUpBlock2D", "UpBlock2D")
    assert (config["in_channels"], config["out_channels"], config["sample_size"]) == (3, 3, 32)


def test_a_summary_and_the_origin_are_written(tmp_path):
    path, _ = published(tmp_path, **SMALL)
    summary = main(path, tmp_path / "new" / "out", image_size=8)
    assert "32 at 8x8, 64 at 4x4; attention at 4 and in the middle" in summary
    origin = read_metadata(tmp_path / "new" / "out")["converted_from"]
    assert (origin["checkpoint"], origin["entry"]) == ("net.pt", "net")
    assert origin["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_prefix_of_data_parallel_is_removed(tmp_path):
    path, net = published(tmp_path, **SMALL)
    state = {f"module.{key}": tensor for key, tensor in net.state_dict().items()}
    torch.save({"net": state}, path)
    assert compare(net, convert(path, tmp_path / "out")) < 1e-5


def test_an_average_beside_the_network_is_named_and_can_be_chosen(tmp_path):
    path, net = published(tmp_path, **SMALL)
    average = PublishedNetwork(**SMALL)
    with torch.no_grad():
        average.all_modules[2].weight.mul_(0.5)
    torch.save({"net": net.state_dict(), "ema": average.state_dict(), "step": 7}, path)
    with pytest.warns(UserWarning, match="holds 'ema' beside 'net': only 'net' is converted"):
        converted = convert(path, tmp_path / "net")
    assert compare(net, converted) < 1e-5 < compare(average, converted)
    with pytest.warns(UserWarning, match="holds 'net' beside 'ema'"):
        converted = convert(path, tmp_path / "ema", entry="ema")
    assert compare(average, converted) < 1e-5


def test_half_precision_is_read_as_float32(tmp_path):
    net = PublishedNetwork(**SMALL).half().float()
    halves = {key: tensor.half() for key, tensor in net.state_dict().items()}
    torch.save({"net": halves}, tmp_path / "net.pt")
    converted = convert(tmp_path / "net.pt", tmp_path / "out")
    assert converted.dtype == torch.float32
    assert compare(net, converted) < 1e-5


def gone(key):
    return lambda state: state.pop(key)


def put(key, *shape, value=0.0):
    return lambda state: state.__setitem__(key, torch.full(shape, value))


# SMALL: 0 1 dense, 2 conv, 3 resnet, 4 down, 5 resnet, 6 attention, 7 resnet, 8 attention,
# 9 resnet (middle), 10-13 two resnets with attention, 14 up, 15 16 resnets, 17 norm, 18 conv.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (gone("all_modules.0.weight"), "all_modules.0.weight is missing"),
        (gone("all_modules.3.Conv_0.weight"), "all_modules.3.Conv_0.weight is missing"),
        (gone("all_modules.3.Dense_0.bias"), "all_modules.3.Dense_0.bias is missing"),
        (gone("all_modules.5.NIN_0.W"), "all_modules.5.NIN_0.W is missing"),
        (gone("all_modules.6.NIN_3.b"), "all_modules.6.NIN_3.b is missing"),
        (gone("all_modules.14.Conv_0.bias"), "all_modules.14.Conv_0.bias is missing"),
        (gone("all_modules.17.bias"), "all_modules.17.bias is missing"),
        (put("sigmas", 10), "'sigmas' is not of the layout"),
        (put("all_modules.3.NIN_0.W", 32, 32), "all_modules.3.NIN_0.W is one too many"),
        (put("all_modules.4.Conv_0.extra", 3), "all_modules.4.Conv_0.extra is one too many"),
        (put("all_modules.6.NIN_4.W", 64, 64), "all_modules.6.NIN_4.W is one too many"),
        (put("all_modules.19.weight", 3), "belongs to a layer of kind conv.* one of kind norm"),
        (put("all_modules.20.weight", 3), "all_modules.19 has no key"),
        (
            put("all_modules.3.Conv_0.weight", 48, 32, 3, 3),
            r"all_modules.3.Conv_0.weight must have shape \(32, 32, 3, 3\).* got \(48, 32, 3, 3\)",
        ),
        (
            put("all_modules.5.NIN_0.W", 64, 32),
            r"all_modules.5.NIN_0.W must have shape \(32, 64\).* got \(64, 32\)",
        ),
        (
            put("all_modules.0.weight", 128, 64),
            r"all_modules.0.weight must have shape \(128, 32\)",
        ),
        (put("all_modules.1.bias", 96), r"all_modules.1.bias must have shape \(128,\)"),
        (put("all_modules.4.Conv_0.weight", 32, 32, 2, 2), "all_modules.4.Conv_0.weight must"),
        (put("all_modules.2.bias", 32, value=torch.nan), "all_modules.2.bias must be finite"),
        (
            lambda state: state.update({"all_modules.2.bias": torch.zeros(32, dtype=torch.int64)}),
            "all_modules.2.bias must be a floating-point tensor, got torch.int64",
        ),
        (lambda state: state.update(step=3), "'step' of entry 'net' must be a tensor"),
        (lambda state: state.clear(), "entry 'net' .* must be a state dict"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, change, message):
    path, _ = published(tmp_path, change=change, **SMALL)
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def reordered(numbers):
    """The state dict with its layers in another order, some left out or repeated."""

    def change(state):
        old = dict(state)
        state.clear()
        for new, number in enumerate(numbers):
            prefix = f"all_modules.{number}."
            for key in old:
                if key.startswith(prefix):
                    state[f"all_modules.{new}.{key.removeprefix(prefix)}"] = old[key]

    return change


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([*range(14), *range(15, 19)], "all_modules.4.Conv_0.weight is one of 1 resampling layers"),
        ([*range(4), 3, *range(4, 19)], "all_modules.3.* starts a level of 2 residual blocks"),
        ([*range(16), *range(17, 19)], "all_modules.15.* starts a level of 1 residual blocks"),
        ([0, 1, 2, 6, *range(3, 19)], "all_modules.3.* no attention layer after one of kind conv"),
        ([*range(7), 6, *range(7, 19)], "all_modules.7.* no attention layer after .* attention"),
        ([*range(10), 8, *range(10, 19)], "all_modules.10.* attention after the second block"),
        ([*range(9), 2, *range(9, 19)], "all_modules.9.* no conv layer after one of kind att"),
        ([0, 1, 2, 17, 18], "all_modules.4.* ends a network of 5 layers"),
        ([0, 1, 2, 3, 17, 18], "all_modules.3.* starts a level of 1 residual blocks where 5"),
    ],
)
def test_an_architecture_that_diffusers_has_not_got_is_refused(tmp_path, numbers, message):
    path, _ = published(tmp_path, change=reordered(numbers), **SMALL)
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"ch_mult": (2, 2)}, "all_modules.2.weight has 32 channels and the level after it 64"),
        ({"ch_mult": (1, 2), "shortcut": "3"}, r"Conv_2.weight has shape \(64, 32, 3, 3\)"),
    ],
)
def test_a_size_that_diffusers_has_not_got_is_refused(tmp_path, sizes, message):
    path, _ = published(tmp_path, **sizes)
    with pytest.raises(ValueError, match=message):
        convert(path, tmp_path / "out")


def test_channels_that_32_groups_do_not_divide_are_refused(tmp_path):
    def narrow(state):
        for key in state:
            state[key] = torch.zeros([48 if n == 32 else n for n in state[key].shape])

    path, _ = published(tmp_path, change=narrow, **SMALL)
    with pytest.raises(ValueError, match=r"all_modules.3.* level with 48 channels.* 32 groups"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("image_size", "error", "message"),
    [
        (0, ValueError, "image_size must be an integer >= 1"),
        (16.0, TypeError, "image_size must be an integer"),
        (20, ValueError, "image_size must be a multiple of 8 for a network of 4 resolutions"),
    ],
)
def test_an_image_size_that_does_not_halve_is_refused(tmp_path, image_size, error, message):
    path, _ = published(tmp_path)
    with pytest.raises(error, match=message):
        convert(path, tmp_path / "out", image_size=image_size)


class Harmful:
    """Its pickle leaves a file behind when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_file_that_needs_code_is_refused_and_does_not_run_it(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"net": {}, "extra": Harmful(mark)}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"net.pt .* weights alone: it needs (posix|nt).mkdir"):
        convert(tmp_path / "net.pt", tmp_path / "out")
    assert not mark.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_a_damaged_file_is_named(tmp_path, keep):
    path, _ = published(tmp_path, **SMALL)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"net.pt cannot be loaded .* it is damaged"):
        convert(path, tmp_path / "out")


def test_another_content_is_named(tmp_path):
    path, net = published(tmp_path, entry="model", **SMALL)
    with pytest.raises(ValueError, match="has no entry 'net'; it holds 'model'"):
        convert(path, tmp_path / "out")
    torch.save(net.state_dict(), path)
    with pytest.raises(
        ValueError, match="no entry 'net'; it holds 'all_modules.0.weight', .*, ..."
    ):
        convert(path, tmp_path / "out")
    torch.save([1.0], path)
    with pytest.raises(ValueError, match="no entry 'net'; it holds 'list'"):
        convert(path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="there is none at .*other.pt"):
        convert(tmp_path / "other.pt", tmp_path / "out")


def test_what_is_there_is_not_overwritten(tmp_path):
    path, _ = published(tmp_path, **SMALL)
    out = tmp_path / "out"
    out.mkdir()
    convert(path, out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(FileExistsError, match="out must be a new or an empty directory"):
        convert(path, out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    resource = pytest.importorskip("resource")
    path, _ = published(tmp_path, **SMALL)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="safetensors was not written"):
            convert(path, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []
