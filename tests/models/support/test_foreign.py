"""Files and folders from outside, broken or in bad will: each loader refuses its list by name.

The modules in them leave a file behind when they are imported, or its weights when they are loaded;
no test may find it.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
import zlib
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from dng_models.class_removal.__main__ import main as class_removal
from dng_models.class_removal.calibration import Calibration
from dng_models.class_removal.compare import read_rows
from dng_models.class_removal.config import Config as ClassRemoval
from dng_models.class_removal.conversion import convert
from dng_models.class_removal.data import load_dataset, read_image
from dng_models.class_removal.judge import load_classifier
from dng_models.class_removal.networks import (
    load_network,
    make_unet,
    read_metadata,
    save_network,
)
from dng_models.class_removal.pretrained import load_denoiser
from dng_models.class_removal.run_folder import SHIPPED
from dng_models.class_removal.small_classifier import SmallClassifier
from dng_models.class_removal.sweeps import read_table
from dng_models.pipelines.tiny import tiny_clip, tiny_stable_diffusion
from dng_models.support import command_line, files, foreign
from dng_models.support.progress import showing
from dng_models.text_to_image import pipelines, prompts, scores
from dng_models.text_to_image.__main__ import main as text_to_image
from dng_models.text_to_image.config import Config

CPU = torch.device("cpu")
CLASSES = ("left", "right")
EVIL = """
from pathlib import Path
Path({mark!r}).touch()
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
class Evil(UNet2DConditionModel): pass
class EvilPipeline(StableDiffusionPipeline): pass
"""


@pytest.fixture(scope="module", autouse=True)
def quiet():
    pipelines.quiet()


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """What evil code leaves; who asks whether to run it hears yes; no test may end with it."""
    path = tmp_path / "mark"
    monkeypatch.setattr(sys, "stdin", StringIO("y\n" * 9))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield path
    assert not path.exists(), "code of the folder was run"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Sound folders, to be copied and spoiled."""
    root = tmp_path_factory.mktemp("sound")
    tiny_stable_diffusion().save_pretrained(root / "pipeline")
    model, processor = tiny_clip()
    model.save_pretrained(root / "clip")
    processor.save_pretrained(root / "clip")
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    DDPMPipeline(net, DDPMScheduler()).save_pretrained(root / "ddpm")
    save_network(root / "network", make_unet(8, 1), metadata={"steps": 1})
    vit = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=12,
        patch_size=4,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    ViTForImageClassification(vit).save_pretrained(root / "vit")
    ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(root / "vit")
    own = SmallClassifier(8, 1, 2, 8, 1)
    (root / "judge").mkdir()
    save_file(own.state_dict(), root / "judge" / "model.safetensors", {"format": "pt"})
    told = {"kind": "dng_models.SmallClassifier", "classes": CLASSES, "shape": [1, 8, 8]}
    told |= {"training": {"width": 8, "layers": 1}, "confusion": [[3, 0], [1, 2]]}
    (root / "judge" / "config.json").write_text(json.dumps(told))
    return root


LOADERS = {
    "pipeline": lambda folder: pipelines.load_pipeline(Config(model=str(folder)), CPU),
    "clip": lambda folder: scores.load_clip(str(folder)),
    "ddpm": load_denoiser,
    "network": load_network,
    "vit": lambda folder: load_classifier(folder, CLASSES, "cpu"),
    "judge": lambda folder: load_classifier(folder, CLASSES, "cpu"),
}
# Where the weights of each are, and its configuration.
WEIGHTS = {
    "pipeline": "unet/diffusion_pytorch_model.safetensors",
    "clip": "model.safetensors",
    "ddpm": "unet/diffusion_pytorch_model.safetensors",
    "network": "diffusion_pytorch_model.safetensors",
    "vit": "model.safetensors",
    "judge": "model.safetensors",
}


@pytest.fixture
def copy(saved, tmp_path):
    def of(kind):
        return Path(shutil.copytree(saved / kind, tmp_path / kind))

    return of


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def evil(path, mark):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(EVIL.format(mark=str(mark)))


class Harmful:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def config_of(kind, folder):
    return (folder / WEIGHTS[kind]).parent / "config.json"


@pytest.mark.filterwarnings("ignore:texts of more than")
@pytest.mark.parametrize("kind", LOADERS)
def test_what_is_sound_loads(copy, kind, mark):
    assert LOADERS[kind](copy(kind)) is not None


# ---------------------------------------------------------------------- code


def _list_of_a_class(folder, mark):
    evil(folder / "evil.py", mark)
    edit(folder / "model_index.json", _class_name=["evil", "EvilPipeline"])


def _module_beside_a_part(folder, mark):
    evil(folder / "unet" / "evil.py", mark)
    edit(folder / "model_index.json", unet=["evil", "Evil"])


def _module_that_is_called_diffusers(folder, mark):
    evil(folder / "unet" / "diffusers.py", mark)


def _module_of_the_working_directory(folder, mark):
    evil(Path("evilmodule.py"), mark)
    edit(folder / "model_index.json", scheduler=["evilmodule", "Evil"])


def _two_letters_for_a_part(folder, mark):
    evil(Path("e.py"), mark)
    edit(folder / "model_index.json", scheduler="eE")


def _a_mapping_for_a_part(folder, mark):
    evil(Path("evilmodule.py"), mark)
    edit(folder / "model_index.json", scheduler={"evilmodule": 0, "Evil": 1})


def _a_submodule(folder, mark):
    evil(Path("evilpackage/__init__.py"), mark)
    edit(folder / "model_index.json", scheduler=["evilpackage.x", "Evil"])


def _a_file_called_none(folder, mark):
    evil(folder / "None.py", mark)


def _a_function_for_a_class(folder, mark):
    edit(folder / "model_index.json", tokenizer=["transformers", "pipeline"])


def _a_class_of_another_place(folder, mark):
    edit(folder / "model_index.json", scheduler=["diffusers", "utils.Evil"])


def _a_pipeline_that_there_is_not(folder, mark):
    edit(folder / "model_index.json", _class_name="EvilPipeline")


def _a_pipeline_inside(folder, mark):
    evil(folder / "unet" / "x" / "evil.py", mark)
    (folder / "unet" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "x": ["evil", "Evil"]})
    )


def _auto_map_of_a_part(folder, mark):
    evil(folder / "text_encoder" / "evil.py", mark)
    edit(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Evil"})


def _auto_map_from_elsewhere(folder, mark):
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": "a/b--e.E"})


def _a_class_of_a_network_as_list(folder, mark):
    edit(folder / "unet" / "config.json", _class_name=["evil", "Evil"])


PIPELINES = (
    (_list_of_a_class, "evil.py is code|_class_name"),
    (_module_beside_a_part, "takes unet from .*'evil'.*must be a class of diffusers"),
    (_module_that_is_called_diffusers, "diffusers.py is code, which is never run"),
    (_module_of_the_working_directory, "takes scheduler from .*'evilmodule'"),
    (_two_letters_for_a_part, r"'scheduler': 'eE'.* with \[library, class\]"),
    (_a_mapping_for_a_part, r"'scheduler': .*evilmodule.* with \[library, class\]"),
    (_a_submodule, "takes scheduler from .*evilpackage"),
    (_a_file_called_none, "None.py is code"),
    (_a_function_for_a_class, "takes tokenizer from .*which is no class"),
    (_a_class_of_another_place, "takes scheduler from .*must be a class"),
    (_a_pipeline_that_there_is_not, "_class_name = 'EvilPipeline', and must name a pipeline"),
    (_a_pipeline_inside, "unet/model_index.json takes x from .*'evil'"),
    (_auto_map_of_a_part, "evil.py is code"),
    (_auto_map_from_elsewhere, "tokenizer_config.json has auto_map"),
    (_a_class_of_a_network_as_list, "unet/config.json has _class_name = .*'evil'"),
)


@pytest.mark.parametrize(("spoil", "message"), PIPELINES, ids=[f.__name__ for f, _ in PIPELINES])
def test_no_pipeline_brings_code(copy, mark, tmp_path, monkeypatch, spoil, message):
    folder = copy("pipeline")
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.syspath_prepend(str(working))
    spoil(folder, mark)
    with pytest.raises(ValueError, match=message):
        LOADERS["pipeline"](folder)


def test_a_denoisers_pipeline_brings_no_code(copy, mark):
    folder = copy("ddpm")
    _list_of_a_class(folder, mark)
    with pytest.raises(ValueError, match="evil.py is code"):
        load_denoiser(folder)
    (folder / "evil.py").unlink()
    with pytest.raises(ValueError, match="_class_name = .*'evil'"):
        load_denoiser(folder)


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}, "has auto_map"),
        ({"transformers_weights": "x.bin"}, "has transformers_weights"),
        ({"_attn_implementation": "evil/kernel"}, "is code from the hub"),
        ({"x_config": {"auto_map": {"AutoConfig": "a/b--evil.Evil"}}}, "has auto_map"),
    ],
)
def test_no_model_of_transformers_brings_code(copy, mark, kind, changes, message):
    folder = copy(kind)
    edit(folder / "config.json", model_type="evil", **changes)
    with pytest.raises(ValueError, match=message):
        LOADERS[kind](folder)
    evil(folder / "evil.py", mark)
    with pytest.raises(ValueError, match="evil.py is code"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_processor_brings_no_code(copy, mark, kind):
    folder = copy(kind)
    path = next(p for p in folder.glob("*processor_config.json"))
    edit(path, auto_map={"AutoImageProcessor": "elsewhere/evil--evil.Evil"})
    with pytest.raises(ValueError, match="processor_config.json has auto_map"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_an_adapter_does_not_lead_elsewhere(copy, mark, kind):
    folder = copy(kind)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil"}')
    with pytest.raises(ValueError, match="adapter_config.json makes an adapter .*merge"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", LOADERS)
def test_pickles_are_not_weights(copy, mark, kind):
    folder = copy(kind)
    path = folder / WEIGHTS[kind]
    path.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        torch.save({"x": Harmful(mark)}, path.with_name(name))
    message = "safetensors" if kind in ("network", "judge") else "pytorch_model.bin only.* read "
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", ["pipeline", "clip", "ddpm", "vit"])
@pytest.mark.parametrize("named", ["evil.bin", "../outside.safetensors", "/etc/passwd"])
def test_an_index_of_weights_stays_in_its_folder(copy, mark, kind, named):
    folder = copy(kind)
    path = folder / WEIGHTS[kind]
    torch.save({"x": Harmful(mark)}, path.with_name("evil.bin"))
    index = path.with_name(path.name + ".index.json")
    path.unlink()
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": named}}))
    with pytest.raises(ValueError, match="index.json names .* and must name safetensors files"):
        LOADERS[kind](folder)


def test_parts_of_this_package_and_of_diffusers_pipelines_are_allowed(copy):
    index = copy("pipeline") / "model_index.json"
    edit(index, scheduler=["dng_models.pipelines.schedulers", "EtaDDIMScheduler"])
    edit(index, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    found = foreign.parts(index.parent)
    assert found["scheduler"].__name__ == "EtaDDIMScheduler"
    assert found["safety_checker"].__name__ == "StableDiffusionSafetyChecker"
    assert found["unet"].__name__ == "UNet2DConditionModel"
    for library in ("diffusers.pipelines", "dng_models.no.such", "os", "pipelines", "utils", ""):
        edit(index, scheduler=[library, "Evil"])
        with pytest.raises(ValueError, match="takes scheduler from"):
            foreign.parts(index.parent)


def test_a_data_set_on_the_hub_is_no_script(monkeypatch):
    import datasets

    seen = {}

    def load(name, **options):
        seen.update(options)
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for version, expected in (("3.2.0", False), ("4.0.0", None)):
        seen.clear()
        monkeypatch.setattr(datasets, "__version__", version)
        with pytest.raises(OSError, match="no network"):
            load_dataset("owner/evil")
        assert seen.get("trust_remote_code") is expected


# ---------------------------------------------------------------------- damage and size


@pytest.mark.parametrize("kind", LOADERS)
def test_weights_that_are_not_numbers_are_named(copy, kind):
    folder = copy(kind)
    path = folder / WEIGHTS[kind]
    for value in (float("nan"), float("inf")):
        state = load_file(path)
        name = next(name for name, tensor in sorted(state.items()) if tensor.is_floating_point())
        state[name].view(-1)[0] = value
        save_file(state, path, {"format": "pt"})
        message = "has weights that are NaN or infinite .* training diverged, or .* damaged"
        with pytest.raises(ValueError, match=message):
            LOADERS[kind](folder)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("damage", ["short", "promise", "text", "empty"])
def test_damaged_weights_are_named(copy, kind, damage):
    folder = copy(kind)
    path = folder / WEIGHTS[kind]
    whole = path.read_bytes()
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    content = {
        "short": whole[:-50],
        "promise": struct.pack("<Q", len(header)) + header.encode() + b"0" * 64,
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "empty": b"",
    }
    path.write_bytes(content[damage])
    with pytest.raises(ValueError, match="safetensors is not a whole safetensors file"):
        LOADERS[kind](folder)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "is not JSON .*nested too deeply"),
        ("[]", r"must hold a JSON object, got \[\]"),
        ("{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("", "is not JSON"),
    ],
    ids=["deep", "list", "short", "binary", "empty"],
)
def test_configurations_that_are_none_are_named(copy, kind, content, message):
    folder = copy(kind)
    path = config_of(kind, folder)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"config.json {message}"):
        LOADERS[kind](folder)


def test_json_of_another_size_is_named(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match="config.json has 8192 MiB, .* no more than 64"):
        foreign.read_json(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="must be a regular file"):
        foreign.read_json(path)
    with pytest.raises(FileNotFoundError):
        foreign.read_json(tmp_path / "none.json")


def test_tensors_beyond_the_memory_are_refused_unread(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**42], "data_offsets": [0, 2**44]}})
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    try:
        os.truncate(path, path.stat().st_size + 2**43)
    except OSError:
        pytest.skip("no sparse files of this size here")
    with pytest.raises(ValueError, match="8192 GiB, more than"):
        foreign.load_tensors(path)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("network", {"block_out_channels": [2**20, 2**21]}),
        ("network", {"layers_per_block": 10**9}),
        ("ddpm", {"block_out_channels": [2**20, 2**21]}),
        ("ddpm", {"layers_per_block": 10**9}),
        ("pipeline", {"block_out_channels": [2**20, 2**21]}),
        ("pipeline", {"layers_per_block": 10**9}),
        ("vit", {"hidden_size": 2**20}),
        ("vit", {"num_hidden_layers": 10**9}),
        ("clip", {"projection_dim": 2**40}),
        ("judge", {"training": {"width": 2**20, "layers": 1}}),
        ("judge", {"training": {"width": 8, "layers": 10**9}}),
    ],
)
def test_networks_that_their_weights_do_not_fill_are_refused(copy, kind, changes):
    """At once, and without the memory."""
    folder = copy(kind)
    edit(config_of(kind, folder), **changes)
    message = "other network|not of one network|in the network|describes no network|projection_dim"
    with pytest.raises(ValueError, match=message):
        LOADERS[kind](folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": "one"}, "whole numbers as in_channels"),
        ({"block_out_channels": "wide"}, "describes no network|weights in"),
        ({"down_block_types": [1, 2]}, "describes no network"),
        ({"norm_num_groups": 0}, "describes no network"),
        ({"act_fn": {}}, "describes no network"),
    ],
)
def test_settings_of_wrong_types_are_named(copy, changes, message):
    folder = copy("ddpm")
    edit(folder / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_denoiser(folder)
    if "in_channels" not in changes:
        folder = copy("network")
        edit(folder / "config.json", **changes)
        with pytest.raises(ValueError, match=message):
            load_network(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": None}, "'classes' in .* must be of type list, got None"),
        ({"training": {"width": "8"}}, "'width' in .* must be of type int, got '8'"),
        ({"training": {}}, "has no 'width'"),
        ({"training": {"width": -8, "layers": 1}}, "describes no network"),
        ({"shape": [1, "8", 8]}, "'shape' in .* three positive integers"),
        ({"shape": [1, 8]}, "'shape' in .* three positive integers"),
        ({"confusion": [[1]]}, "'confusion' in .* counts .* 2 x 2"),
        ({"confusion": ["ab", "cd"]}, "'confusion' in .* counts .* 2 x 2"),
    ],
)
def test_a_judges_description_of_wrong_types_is_named(copy, changes, message):
    folder = copy("judge")
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_classifier(folder, CLASSES, "cpu")


def test_what_a_training_left_is_an_object(copy):
    folder = copy("network")
    (folder / "training.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="training.json is not JSON .*nested"):
        read_metadata(folder)


def test_a_tokenizer_that_is_damaged_is_one_error(copy):
    for kind in ("pipeline", "clip"):
        folder = copy(kind)
        for path in folder.rglob("vocab.json"):
            path.write_text('["a"]')
        for path in folder.rglob("tokenizer.json"):
            path.write_text("{}")
        with pytest.raises(ValueError, match="cannot be loaded|whole CLIP model"):
            LOADERS[kind](folder)


# ---------------------------------------------------------------------- checkpoints


def checkpoint(path, state=None):
    generator = torch.Generator().manual_seed(0)
    tensors = {"all_modules.0.weight": torch.randn(64, 64, generator=generator)}
    torch.save({"net": tensors if state is None else state}, path)
    return path


def test_a_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = checkpoint(tmp_path / "net.pt")
    data = bytearray(path.read_bytes())
    place = data.index(torch.load(path)["net"]["all_modules.0.weight"].numpy().tobytes()[:64])
    data[place + 5] ^= 1
    path.write_bytes(bytes(data))
    torch.load(path)  # which torch does not
    with pytest.raises(ValueError, match=r"net.pt .* damaged \(the checksum of .*data/0 is wrong"):
        convert(path, tmp_path / "out")


def test_an_archive_that_unpacks_to_more_is_refused_unread(tmp_path):
    path = tmp_path / "net.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", pickle.dumps({}))
        archive.writestr("net/data/0", bytes(2**26))
    with pytest.raises(ValueError, match="would unpack to 64, which torch never writes"):
        convert(path, tmp_path / "out")


def test_a_tensor_that_repeats_a_number_for_ever_is_refused(tmp_path):
    state = {"all_modules.0.weight": torch.zeros(1).expand(2**20, 2**20)}
    with pytest.raises(ValueError, match="tensors would take 4,194,304: it is damaged, or made to"):
        convert(checkpoint(tmp_path / "net.pt", state), tmp_path / "out")


def test_a_checkpoint_that_needs_code_does_not_run_it(tmp_path, mark):
    torch.save({"net": Harmful(mark)}, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="would run code from the file"):
        convert(tmp_path / "net.pt", tmp_path / "out")
    (tmp_path / "net.pt").write_bytes(pickle.dumps({"net": Harmful(mark)}))
    with pytest.raises(ValueError, match="cannot be loaded as weights alone"):
        convert(tmp_path / "net.pt", tmp_path / "out")


# ---------------------------------------------------------------------- images and tables


def png(width, height, rows=b""):
    """A PNG file of so many black pixels, or one that says so."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(2**14, 2**14), (12_000, 12_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_that_fills_the_memory_is_refused_unread(tmp_path, size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size))
    with pytest.raises(ValueError, match="it unpacks to .*more than 134 million pixels"):
        read_image(path, "it")


def test_a_large_photograph_is_no_bomb(tmp_path):
    """Above the size that Pillow warns of."""
    path = tmp_path / "large.png"
    path.write_bytes(png(10_000, 9_000))
    with foreign.open_image(path, "it") as image:
        assert image.size == (10_000, 9_000)


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(mark) (w) file\n",
        b"%PDF-1.4\n",
        b"",
        b"\x89PNG\r\n\x1a\n",
        png(8, 8)[:40],
        b"P6 8 8 255\n",
        b"GIF89a",
    ],
    ids=["eps", "pdf", "empty", "signature", "header", "ppm", "gif"],
)
def test_what_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "it.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="it cannot be decoded"):
        read_image(path, "it")


def test_postscript_does_not_start_a_program(tmp_path, monkeypatch):
    import subprocess

    def never(*_, **__):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", never)
    buffer = BytesIO()
    Image.new("L", (8, 8)).save(buffer, "EPS")
    path = tmp_path / "it.png"
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="it cannot be decoded"):
        read_image(path, "it")


def test_images_beyond_the_memory_are_refused_after_the_first(tmp_path, monkeypatch):
    cells = [png(64, 64, bytes(65 * 64))] * 8
    table = pyarrow.table({"image": cells, "label": [0, 1] * 4})
    parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(foreign, "_memory", lambda: 100_000)
    with pytest.raises(ValueError, match="8 images of 64 x 64 in grey would take .*image_size"):
        load_dataset(tmp_path / "a.parquet")


def test_a_table_that_unpacks_to_gigabytes_is_refused_unread(tmp_path, monkeypatch):
    """Its values are one, many times over: as it says itself, or by a dictionary."""
    monkeypatch.setattr(foreign, "UNPACKED_BYTES", 2**22)
    image = bytes(2**18)
    table = pyarrow.table({"image": [image] * 64, "label": [0, 1] * 32})
    for name, options in (
        ("plain", {"use_dictionary": False, "compression": "gzip"}),
        ("dictionary", {"use_dictionary": True, "compression": "gzip"}),
    ):
        path = tmp_path / f"{name}.parquet"
        parquet.write_table(table, path, **options)
        assert path.stat().st_size < 2**17
        with pytest.raises(ValueError, match="and unpacks to more than 4: images do not"):
            load_dataset(path)


def test_a_table_of_usual_images_is_read_as_before(tmp_path):
    rng = np.random.default_rng(0)
    cells = [png(8, 8, rng.integers(0, 255, 72, dtype=np.uint8).tobytes()) for _ in range(6)]
    rows = [b"".join(b"\0" + bytes(8) for _ in range(8))] * 6
    cells = [png(8, 8, row) for row in rows]
    parquet.write_table(
        pyarrow.table({"image": cells, "label": [0, 1] * 3}), tmp_path / "a.parquet"
    )
    assert len(load_dataset(tmp_path / "a.parquet")) == 6


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(99) + b"PAR1", b"text"])
def test_a_table_that_is_none_is_named(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.parquet cannot be read: it is no whole parquet file"):
        load_dataset(path)


# ---------------------------------------------------------------------- paths and the hub


@pytest.mark.parametrize(
    ("name", "is_path"),
    [
        ("photos/", True),
        ("./photos", True),
        ("../photos", True),
        (".photos", True),
        ("/photos", True),
        ("~/photos", True),
        ("a/b/c", True),
        ("x.parquet", True),
        ("here/photos", True),
        ("a\\b", True),
        ("my photos", True),
        (Path("photos"), True),
        ("photos", False),
        ("nowhere/photos", False),
        ("google/ddpm-cifar10-32", False),
        ("stabilityai/model-3.5-large", False),
        ("stabilityai/model-1.0", False),
    ],
)
def test_what_looks_like_a_path_is_one(tmp_path, monkeypatch, name, is_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert foreign.is_path(name) is is_path


@pytest.mark.parametrize(
    "load",
    [
        lambda name: load_dataset(name),
        lambda name: load_denoiser(name),
        lambda name: load_classifier(name, CLASSES, CPU),
    ],
    ids=["dataset", "base", "classifier"],
)
def test_a_mistyped_path_is_known_without_the_hub(tmp_path, monkeypatch, load):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", None)
    for name in ("phots/", "./phots"):
        with pytest.raises(FileNotFoundError, match=r"no such file or .*did you mean photos\?"):
            load(name)
    with pytest.raises(FileNotFoundError, match="no folder x/y"):
        load("x/y/z")


def test_the_hub_is_asked_once_and_not_for_long(tmp_path, monkeypatch, capsys):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    asked, answer = [], None

    def repo_info(self, name, *, repo_type, timeout):
        asked.append((name, repo_type, timeout))
        if answer is not None:
            raise answer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    with showing(True):
        assert foreign.ask_hub("some/photos", "dataset")
    told = capsys.readouterr().err
    assert "asking the Hugging Face hub for a dataset" in told and "at most 10 s" in told
    assert asked == [("some/photos", "dataset", 10)]
    answer = OSError("no route to host")
    assert not foreign.ask_hub("some/photos", "dataset")
    answer = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with pytest.raises(FileNotFoundError, match="the Hugging Face hub has no dataset of that name"):
        load_dataset("some/photos")
    assert len(asked) == 3


def test_a_hub_that_is_not_reached_is_not_asked_again(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(foreign, "ask_hub", lambda name, kind: False)
    offline = []

    def load(path, **_):
        offline.extend((datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE))
        raise ConnectionError("offline")

    before = datasets.config.HF_HUB_OFFLINE
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(FileNotFoundError, match="the Hugging Face hub cannot be reached"):
        load_dataset("some/photos")
    assert offline == [True, True] and datasets.config.HF_HUB_OFFLINE is before


# ---------------------------------------------------------------------- what runs leave


def _changed(value, place, new):
    """The same JSON with something else in a place."""
    if not place:
        return new
    key, rest = place[0], place[1:]
    changed = list(value) if isinstance(value, list) else dict(value)
    changed[key] = _changed(value[key], rest, new) if rest or key in changed else new
    return changed


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (["version"], 7, "is a calibration of version 7"),
        (["version"], "1", "'version' .* must be of type int"),
        (["fits"], [], "'fits' .* must be of type dict"),
        (["fits"], {}, "has no 'paper'"),
        (["fits", "paper"], None, "'paper' .* must be of type dict"),
        (["fits", "paper", "temperature"], [], "'temperature' in 'paper' .* at least one number"),
        (["fits", "paper", "temperature"], [1.0], "temperature must have a number for each of"),
        (["fits", "paper", "temperature", 0], "a", "'temperature' .* must be finite numbers"),
        (["fits", "paper", "times"], "0", "'times' in 'paper' .* must be of type list"),
        (["fits", "paper", "tracker"], "log-odds", "is a fit of the 'log-odds' tracker"),
        (["fits", "paper", "prior"], 2.0, "is no fit: prior must be"),
        (["fits", "paper", "p_max"], True, "'p_max' in 'paper' .* must be of type"),
        (["fits", "paper", "offset_nats"], 10**400, "must|is no fit"),
        (["report", "time"], [], "'time' .* at least one number"),
        (["report", "paper", "log_loss"], [1.0], "'log_loss' in 'paper' .* must be"),
        (["report", "paper", "brier", 0], None, "'brier' in 'paper' .* finite numbers"),
        (["report", "paper"], 3, "'paper' .* must be an object"),
        (["report", "paper", "reliability", "low"], [], "'low' in 'paper'"),
    ],
)
def test_a_calibration_of_wrong_types_is_named(tmp_path, place, new, message):
    path = tmp_path / "mine.json"
    sound = json.loads((SHIPPED / "digits" / "calibration" / "0.json").read_text())
    path.write_text(json.dumps(_changed(sound, place, new)))
    with pytest.raises(ValueError, match=message) as error:
        Calibration.load(path)
    assert "mine.json" in str(error.value)


BROKEN_JSON = [
    ("[" * 100_000, "nested too deeply"),
    ('{"a": NaN}', "the number NaN"),
    ('{"a": [1, -Infinity]}', "the number -Infinity"),
    ('{"a": 1e999}', "the number 1e999"),
    ("{", "is not JSON"),
    (b"\xff\xfe", "is not JSON|UTF-8"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN_JSON)
def test_json_that_we_never_write_is_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for load in (files.read_json, Calibration.load):
        with pytest.raises(ValueError, match=rf"mine\.json.*({message})"):
            load(path)
    path.write_bytes(path.read_bytes() + b"\n")  # a whole line
    with pytest.raises(ValueError, match=rf"mine\.json.*({message})"):
        read_rows(path)
    with pytest.raises(ValueError, match="mine.json, line 1 is not a row of a sweep"):
        read_table(path)


ROW = {
    "config": ClassRemoval().to_json(),
    "metrics": {"num_images": 4, "safety": 0.5, "safety_low": 0.1, "safety_high": 0.9},
    "key": ClassRemoval().key,
    "sources": {},
}


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (["config"], [], "'config' and 'metrics'"),
        (["config", "forget"], "cat", "names of classes in 'forget'"),
        (["config", "forget"], [1], "names of classes in 'forget'"),
        (["config", "guidance_scale"], "much", "a number as 'guidance_scale'"),
        (["metrics", "safety"], "low", "numbers in its 'metrics', got safety = 'low'"),
        (["metrics", "histogram"], [1, "a"], "numbers in its 'metrics'"),
        (["metrics", "num_images"], 0, "a positive 'num_images'"),
    ],
)
def test_rows_of_wrong_types_are_named(tmp_path, place, new, message):
    path = tmp_path / "sweep.jsonl"
    path.write_text(json.dumps(_changed(ROW, place, new)) + "\n")
    with pytest.raises(ValueError, match=rf"sweep\.jsonl, line 1, .*{message}"):
        read_rows(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "must be an object"),
        ({"dataset": 5}, "dataset must be a text"),
        ({"base": ["a"]}, "base must be a text"),
        ({"forget": "0"}, "forget must be a sequence"),
        ({"forget": {"0": 1}}, "forget must be a sequence"),
        ({"forget": 3}, "forget must be a sequence"),
        ({"guidance_scale": "a"}, "guidance_scale"),
        ({"steps": 1.5}, "steps must be an integer"),
        ({"rule": []}, "rule must be"),
        ({"nothing": 1}, "no field 'nothing'"),
    ],
)
def test_a_setting_of_wrong_types_is_named(tmp_path, capsys, fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ClassRemoval.from_json(fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    line = one_line(capsys, class_removal, "evaluate", tmp_path, "--out", tmp_path / "o")
    assert "config.json is no setting of this version" in line


def test_images_in_another_range_are_named(tmp_path, capsys):
    path = tmp_path / "images.safetensors"
    save_file({"images": 255.0 * torch.rand(8, 1, 8, 8)}, path)
    line = one_line(capsys, class_removal, "evaluate", path, "--out", tmp_path / "o")
    assert str(path) in line and "must be in [-1, 1]" in line and "divided by 127.5" in line


# ---------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "mine.json is not JSON .*nested too deeply"),
        ('[{"name": "a", "prompt": "\\ud800", "related": "b", "unrelated": "c"}]', "UTF-8"),
        ('[{"name": "$x$", "prompt": "a", "related": "b", "unrelated": "c"}]', "more than one [$]"),
        ('[{"name": 1}]', "prompt 1: prompt, related, unrelated must be given"),
        ("[[]]", r"prompt 1: must be an object, got \[\]"),
        (b"\xff\xff", "mine.json is not JSON"),
    ],
)
def test_prompts_that_cannot_be_drawn_are_named(tmp_path, content, message):
    path = tmp_path / "mine.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, TypeError), match=message):
        prompts.load(str(path))


# ---------------------------------------------------------------------- the command lines


def one_line(capsys, main, *arguments):
    """What a command that was given something bad says."""
    assert main([str(each) for each in arguments]) == command_line.USER_ERROR
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("python -m")]
    return line


def test_the_commands_say_one_line(tmp_path, capsys, copy, mark):
    bomb = tmp_path / "images"
    bomb.mkdir()
    (bomb / "a.png").write_bytes(png(2**14, 2**14))
    line = one_line(capsys, class_removal, "evaluate", bomb, "--out", tmp_path / "o")
    assert line.count("a.png") == 1 and "a.png unpacks to more than 134 million pixels" in line
    folder = copy("pipeline")
    _module_that_is_called_diffusers(folder, mark)
    line = one_line(
        capsys, text_to_image, "generate", "--model", folder, "--out", tmp_path / "t", "--quiet"
    )
    assert "diffusers.py is code, which is never run here: remove it" in line
    path = checkpoint(tmp_path / "net.pt")
    path.write_bytes(path.read_bytes()[:-100])
    line = one_line(capsys, class_removal, "convert", path, "--out", tmp_path / "net")
    assert "net.pt cannot be loaded as weights alone: it is damaged" in line


class _Parser:
    """Arguments of a command that raises what it was given."""

    def __init__(self, error, debug=False):
        self.command, self.error, self.debug = "raise", error, debug

    def parse_args(self, _):
        return self


def ended(error, monkeypatch, debug=False):
    def raise_it(given):
        raise given.error

    module = type(sys)("commands_of_the_test")
    module.raise_command = raise_it
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return command_line.run("program", _Parser(error, debug), module.__name__)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("x is\nbad"), 2, "program: error: x is bad\n"),
        (RecursionError("deep"), 2, "nested too deeply (deep)"),
        (EOFError(), 2, "program: error: EOFError"),
        (zipfile.BadZipFile("no zip"), 2, "no zip"),
        (Image.DecompressionBombError("large"), 2, "large"),
        (pyarrow.ArrowInvalid("no table"), 2, "no table"),
        (MemoryError(), 1, "there is not enough memory (MemoryError)"),
        (RuntimeError("[..] can't allocate memory: you tried 9 bytes"), 1, "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), 1, "No space left"),
        (OSError(errno.EROFS, "Read-only file system", "a.json"), 1, "Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "a.json"), 1, "Permission denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.json"), 2, "Not a directory"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.json"), 2, "a.json"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_expected_failures_are_one_line_and_a_status(monkeypatch, capsys, error, status, message):
    assert ended(error, monkeypatch) == status
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told and len(told.strip().splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), RuntimeError("a bug")])
def test_mistakes_of_the_program_are_not_hidden(monkeypatch, error):
    with pytest.raises(type(error)):
        ended(error, monkeypatch)
    with pytest.raises(ValueError, match="as it is"):
        ended(ValueError("as it is"), monkeypatch, debug=True)
