"""The networks that are trained here: diffusers' ``UNet2DModel``, in sizes for small images.

A network predicts the noise of ``x_t = alpha x0 + sigma eps`` on DDPM's linear schedule of 1000
steps, from x_t and the time step 0 ... 999.  A conditional one takes a label besides, the index of
a class or, for "no label", the number of classes.

On disk a network is a folder in diffusers' layout, which ``UNet2DModel.from_pretrained`` reads,
with ``training.json`` beside the weights: what it was trained on, and how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dng_math import _checks
from dng_models import foreign
from dng_models.class_removal import files

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DModel

Size = Literal["small", "paper"]
SIZES: tuple[Size, ...] = ("small", "paper")
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
METADATA = "training.json"
STATE = "state.safetensors"  # of a training that is not finished


@dataclass(frozen=True)
class _Shape:
    """What the sizes differ in; attention at the levels where ``attention`` says so."""

    channels: tuple[int, ...]
    layers: int
    groups: int
    attention: tuple[bool, ...]

    def arguments(self) -> dict[str, Any]:
        down = tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in self.attention)
        up = tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(self.attention))
        return {
            "block_out_channels": self.channels,
            "layers_per_block": self.layers,
            "norm_num_groups": self.groups,
            "down_block_types": down,
            "up_block_types": up,
            "add_attention": any(self.attention),
        }


# By the largest image side that they serve.
_SHAPES: dict[Size, dict[int, _Shape]] = {
    "small": {
        8: _Shape((16, 32), 1, 8, (False, False)),
        28: _Shape((16, 32, 64), 1, 8, (False, False, False)),
        32: _Shape((32, 64, 128, 128), 1, 8, (False, False, False, False)),
    },
    "paper": {
        8: _Shape((64, 128), 2, 32, (False, True)),
        28: _Shape((64, 128, 128), 2, 32, (False, True, True)),
        32: _Shape((128, 256, 256, 256), 2, 32, (False, True, False, False)),
    },
}
_DDPM_CIFAR10 = {"norm_eps": 1e-6, "freq_shift": 1, "flip_sin_to_cos": False}


def make_unet(
    image_size: int,
    channels: int,
    *,
    num_classes: int | None = None,
    size: Size | None = None,
) -> UNet2DModel:
    """A network with random weights, from torch's global generator.

    ========  =====================================  =====================================
    side      "small"                                "paper"
    ========  =====================================  =====================================
    up to 8   (16, 32), 1 layer: 160 thousand        (64, 128), 2 layers, attention at 4
    up to 28  (16, 32, 64), 1 layer: 620 thousand    (64, 128, 128), 2 layers, attention
              parameters                             at 14 and 7
    larger    (32, 64, 128, 128), 1 layer            ``google/ddpm-cifar10-32``
    ========  =====================================  =====================================

    The last is exactly that configuration: ``block_out_channels`` (128, 256, 256, 256),
    ``layers_per_block`` 2, attention at half the side and in the middle, of one head,
    ``norm_num_groups`` 32, ``norm_eps`` 1e-6, ``freq_shift`` 1, ``flip_sin_to_cos`` False,
    ``downsample_padding`` 0.

    Parameters
    ----------
    image_size : int
        Side of the square images; divisible by 2 to the number of halvings.
    channels : int
        Of the images.
    num_classes : int, optional
        For a conditional network: labels 0 ... num_classes, the last of which is "no label".
    size : {"small", "paper"}, optional
        Default "small" up to side 28, for a laptop, and "paper" above, for a GPU.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, its value and what is allowed.
    """
    from diffusers import UNet2DModel

    image_size = _checks.integer("image_size", image_size, 1)
    channels = _checks.integer("channels", channels, 1)
    if num_classes is not None:
        num_classes = _checks.integer("num_classes", num_classes, 1) + 1
    size = default_size(image_size) if size is None else size
    _checks.choice("size", size, SIZES)
    served = [side for side in _SHAPES[size] if image_size <= side]
    side = served[0] if served else max(_SHAPES[size])
    shape = _SHAPES[size][side]
    divisor = 2 ** (len(shape.channels) - 1)
    if image_size % divisor:
        raise ValueError(
            f"image_size must be divisible by {divisor} for the {size!r} network, "
            f"got {image_size}: load the images at another size"
        )
    arguments = shape.arguments() | {"downsample_padding": 0}
    if size == "paper":
        arguments |= _DDPM_CIFAR10 | {"attention_head_dim": None}
    return UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=num_classes,
        **arguments,
    )


def default_size(image_size: int) -> Size:
    """What :func:`make_unet` makes for a side when it is not told: "small" up to 28."""
    return "small" if image_size <= 28 else "paper"


def save_network(
    directory: Path | str, net: UNet2DModel, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a network as a folder that ``UNet2DModel.from_pretrained`` reads.

    ``training.json``, with the metadata, is the last file to appear: where it is, all is.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files.save_tensors(directory / WEIGHTS, net.state_dict(), {"format": "pt"})
    files.write_text(directory / CONFIG, net.to_json_string())
    files.write_json(directory / METADATA, dict(metadata or {}))


def is_there(directory: Path) -> bool:
    """Whether a folder holds a network, of any kind: not what is left of one, or its beginning."""
    if (directory / METADATA).is_file():
        return all((directory / name).is_file() for name in (CONFIG, WEIGHTS))
    described = any((directory / name).is_file() for name in (CONFIG, "model_index.json"))
    return described and not (directory / STATE).is_file()


def load_network(directory: Path | str, *, device: torch.device | str | None = None) -> UNet2DModel:
    """The network in a folder of :func:`save_network`, or of any saved ``UNet2DModel``.

    Returns
    -------
    UNet2DModel
        In evaluation mode, without gradients, in float32.

    Raises
    ------
    FileNotFoundError
        If the folder is not there or lacks a file.
    ValueError
        If a file is damaged, the network is of another kind than a ``UNet2DModel``, or its
        weights are not finite.
    """
    from diffusers import UNet2DModel

    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} must be the folder of a network, with {CONFIG} and {WEIGHTS}; "
                f"it has no {name}"
            )
    config = foreign.read_object(directory / CONFIG)
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(
            f"{directory / CONFIG} must describe a UNet2DModel, got {kind!r}: "
            "networks of other kinds do not predict noise of images from (x, t)"
        )
    found = foreign.shapes(directory / WEIGHTS)
    net = foreign.outline(UNet2DModel.from_config, config, directory / CONFIG, found)
    wanted = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    if wanted != found:
        name = next(n for n in (*wanted, *found) if wanted.get(n) != found.get(n))
        raise ValueError(
            f"{directory / WEIGHTS} does not hold the weights of the network in {CONFIG}: "
            f"{name} has shape {found.get(name)} in the file and {wanted.get(name)} in the network"
        )
    weights, _ = foreign.load_tensors(directory / WEIGHTS, finite=True)
    net.load_state_dict(weights, assign=True)
    return net.float().to(device).eval().requires_grad_(False)


def read_metadata(directory: Path | str) -> dict[str, Any]:
    """What ``training.json`` says of a trained network.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is damaged.
    """
    path = Path(directory) / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no training was finished there")
    return foreign.read_object(path)
