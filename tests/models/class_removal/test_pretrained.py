"""Base networks from pipelines in diffusers' formats, built here."""

import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dng_math import NoiseSchedule
from dng_models.class_removal.networks import make_unet, save_network
from dng_models.class_removal.pretrained import load_denoiser, schedule_of
from dng_models.support import foreign

SIZES = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def unet(**changes):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**SIZES | changes)


def pipeline(folder, *, net=None, scheduler=None, kind=diffusers.DDPMPipeline, **options):
    """Save a pipeline, and return its network."""
    net = unet() if net is None else net
    kind(net, scheduler or diffusers.DDPMScheduler()).save_pretrained(folder, **options)
    return net


def as_the_first_ones_were(folder):
    """All files at the top, weights under the names of old, as in google/ddpm-cifar10-32."""
    net = pipeline(folder)
    state = {}
    for key, tensor in net.state_dict().items():
        for new, old in OLD_NAMES.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = tensor
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["_diffusers_version"] = "0.0.4"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "scheduler" / "scheduler_config.json").replace(folder / "scheduler_config.json")
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    shutil.rmtree(folder / "unet")
    (folder / "scheduler").rmdir()
    return net


def edit(path, **changes):
    """Change values in a JSON file; None removes one."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


@torch.no_grad()
def assert_same(net, loaded):
    x = torch.randn(2, loaded.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 900])
    torch.testing.assert_close(loaded(x, t).sample, net.eval()(x, t).sample, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["DDPM", "DDIM"])
def test_a_pipeline_loads(tmp_path, kind):
    net = pipeline(
        tmp_path,
        kind=getattr(diffusers, f"{kind}Pipeline"),
        scheduler=getattr(diffusers, f"{kind}Scheduler")(),
    )
    found = load_denoiser(tmp_path)
    assert_same(net, found.net)
    assert not found.net.training
    assert not any(p.requires_grad for p in found.net.parameters())
    np.testing.assert_array_equal(found.schedule.alpha, NoiseSchedule.linear(1000).alpha)
    assert (found.prediction_type, found.clip) == ("epsilon", 1.0)
    assert (found.shape, found.num_classes) == ((1, 8, 8), None)


def test_the_layout_of_the_first_pipelines_loads(tmp_path):
    net = as_the_first_ones_were(tmp_path)
    found = load_denoiser(tmp_path)
    assert_same(net, found.net)
    edit(tmp_path / "scheduler_config.json", clip_sample=False, beta_end=0.01)
    found = load_denoiser(tmp_path)
    assert found.clip is None
    np.testing.assert_array_equal(
        found.schedule.alpha, NoiseSchedule.linear(1000, 1e-4, 0.01).alpha
    )


def test_a_network_alone_is_on_the_schedule_of_ddpm(tmp_path):
    net = unet(num_class_embeds=11, sample_size=(8, 16))
    net.save_pretrained(tmp_path)
    found = load_denoiser(str(tmp_path))
    np.testing.assert_array_equal(found.schedule.alpha, NoiseSchedule.linear(1000).alpha)
    assert (found.prediction_type, found.clip) == ("epsilon", 1.0)
    assert (found.shape, found.num_classes) == ((1, 8, 16), 11)


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_a_scheduler_by_a_network_alone_is_read(tmp_path, place):
    folder = tmp_path / "unet"
    unet().save_pretrained(folder)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, prediction_type="sample")
    scheduler.save_pretrained((folder if place == "inside" else tmp_path) / "scheduler")
    found = load_denoiser(folder)
    assert (len(found.schedule), found.prediction_type) == (50, "sample")


def test_a_network_that_was_trained_here_loads(tmp_path):
    net = make_unet(8, 1, num_classes=3)
    save_network(tmp_path, net, metadata={"dataset": "digits"})
    found = load_denoiser(tmp_path, dtype=torch.float64)
    assert (found.shape, found.num_classes, found.net.dtype) == ((1, 8, 8), 4, torch.float64)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.1},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50},
        {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear"}
        | {"prediction_type": "sample"},
    ],
    ids=str,
)
def test_the_schedule_is_that_of_the_scheduler(kind, options):
    scheduler = getattr(diffusers, kind)(**options)
    schedule = schedule_of(json.loads(scheduler.to_json_string()))
    expected = np.sqrt(scheduler.alphas_cumprod.double().numpy())
    # The scheduler multiplies in float32.
    np.testing.assert_allclose(schedule.alpha[1:], expected, rtol=2e-4, atol=1e-6)
    assert len(schedule) == scheduler.config.num_train_timesteps


def test_a_sigmoid_schedule_is_that_of_the_scheduler():
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    schedule = schedule_of(scheduler.config)
    expected = scheduler.alphas_cumprod.double().sqrt().numpy()
    np.testing.assert_allclose(schedule.alpha[1:], expected, rtol=2e-4)


@pytest.mark.parametrize(
    ("changes", "prediction", "clip"),
    [
        ({"prediction_type": "v_prediction", "clip_sample_range": 2}, "v_prediction", 2.0),
        ({"prediction_type": "sample", "clip_sample": False}, "sample", None),
        ({"prediction_type": None, "predict_epsilon": False}, "sample", 1.0),
        ({"prediction_type": None, "clip_sample": None, "clip_sample_range": None}, "epsilon", 1.0),
    ],
)
def test_prediction_and_clip_are_read(tmp_path, changes, prediction, clip):
    pipeline(tmp_path)
    edit(tmp_path / "scheduler" / "scheduler_config.json", **changes)
    found = load_denoiser(tmp_path)
    assert (found.prediction_type, found.clip) == (prediction, clip)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholding": True}, "thresholding must be false"),
        ({"rescale_betas_zero_snr": True}, "must not be with prediction_type 'epsilon'"),
        ({"_class_name": "PNDMScheduler"}, "_class_name must be one of .*; got 'PNDMScheduler'"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be one of 'linear', .*; got 'laplace'"),
        ({"prediction_type": "flow"}, "prediction_type must be one of .*; got 'flow'"),
        ({"beta_end": 2.0}, r"beta_max must be in \[beta_min, 1\), got 2.0"),
        ({"beta_start": "small"}, "beta_min must be a real number"),
        ({"trained_betas": [0.1, -0.1]}, r"betas must be non-empty and in \(0, 1\]"),
        ({"clip_sample_range": -1}, "clip_sample_range must be finite and > 0"),
    ],
)
def test_a_scheduler_that_cannot_be_followed_is_refused(tmp_path, changes, message):
    pipeline(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    edit(path, **changes)
    with pytest.raises(ValueError, match=f"scheduler_config.json describes .*{message}"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DModel, got 'UNet2DConditionModel'"),
        ({"out_channels": 2}, "out_channels = 2 for in_channels = 1: .* variances"),
        ({"out_channels": 3}, "out_channels = 3, other than in_channels = 1"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep': only labels"),
        ({"sample_size": None}, "size of the images .* in sample_size; got None"),
        ({"sample_size": [8, 8, 8]}, r"in sample_size; got \[8, 8, 8\]"),
        ({"num_class_embeds": 3}, "not those of the .* missing keys class_embedding.weight"),
        ({"add_attention": False}, "not those of the .* unexpected keys mid_block.attentions.0"),
        ({"block_out_channels": [8, 24]}, "cannot be loaded as tensors .* size mismatch"),
    ],
)
def test_a_network_of_another_kind_is_refused(tmp_path, changes, message):
    pipeline(tmp_path)
    edit(tmp_path / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_denoiser(tmp_path)


def test_a_pipeline_of_other_parts_is_refused(tmp_path):
    pipeline(tmp_path)
    edit(tmp_path / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(ValueError, match="unet and a scheduler.* got one of scheduler, unet, vae"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("unet/config.json", "there is no .*config.json"),
        ("scheduler/scheduler_config.json", "is a pipeline without scheduler"),
        ("unet/diffusion_pytorch_model.safetensors", "no weights in .*safetensors is needed"),
    ],
)
def test_a_missing_file_is_named(tmp_path, gone, message):
    pipeline(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=message):
        load_denoiser(tmp_path)


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_a_damaged_file_is_named(tmp_path, name):
    pipeline(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is not a whole safetensors|config.json is not JSON"):
        load_denoiser(tmp_path)


class Harmful:
    """Its pickle leaves a directory behind when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_weights_that_need_code_are_refused_and_do_not_run_it(tmp_path):
    as_the_first_ones_were(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Harmful(tmp_path / "mark")}, tmp_path / "x.bin")
    (tmp_path / "x.bin").replace(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="weights as diffusion_pytorch_model.bin only.*safetens"):
        load_denoiser(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of a hub that cannot be reached: where a repository's files go."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--google--ddpm-tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


@pytest.mark.parametrize("build", [pipeline, as_the_first_ones_were])
def test_a_name_on_the_hub_loads_from_its_cache(hub, build):
    net = build(hub)
    found = load_denoiser("google/ddpm-tiny")
    assert_same(net, found.net)


@pytest.mark.parametrize("build", [pipeline, as_the_first_ones_were])
def test_of_a_repository_only_what_is_needed_is_fetched(tmp_path, monkeypatch, build):
    import huggingface_hub

    remote, cache = tmp_path / "remote", tmp_path / "cache"
    net = build(remote)
    for folder in {path.parent for path in remote.rglob("*model.*")}:
        (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    (remote / "image.png").write_bytes(b"an image")

    def download(name, *, allow_patterns, local_files_only):
        assert not local_files_only
        files = [p for p in remote.rglob("*") if p.is_file()]
        names = [p.relative_to(remote).as_posix() for p in files]
        for chosen in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns
        ):
            (cache / chosen).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / chosen, cache / chosen)
        return str(cache)

    monkeypatch.setattr(foreign, "ask_hub", lambda name, kind: True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(net, load_denoiser("google/ddpm-tiny").net)
    fetched = {path.suffix for path in cache.rglob("*") if path.is_file()}
    assert len(fetched) == 2 and not list(cache.rglob("*fp16*"))


def test_without_the_hub_the_message_says_what_to_download(hub):
    with pytest.raises(FileNotFoundError, match=r"hf download google/ddpm-other .*config.json"):
        load_denoiser("google/ddpm-other")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("./nothing/here", FileNotFoundError, "base must be .* there is no such file or folder"),
        (Path("nothing"), FileNotFoundError, "base must be .* there is no such file or folder"),
        (__file__, ValueError, "got the file .*: the command convert"),
    ],
)
def test_a_path_that_is_no_directory_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        load_denoiser(name)
