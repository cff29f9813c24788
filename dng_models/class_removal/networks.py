"""The networks that are trained here: diffusers' ``UNet2DModel``, in sizes for small images.

A network predicts the noise of ``x_t = alpha x0 + sigma eps`` on DDPM's linear schedule of 1000
steps, from x_t and the time step 0 ... 999.  A conditional network also takes a label: the index of
a class, or the number of classes for "no label".

On disk a network is a folder in diffusers' layout, which ``UNet2DModel.from_pretrained`` reads.
``training.json`` beside the weights says what it was trained on, and how.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dng_math import checks
from dng_models.support import files, foreign

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DModel

Size = Literal["small", "paper"]
SIZES: tuple[Size, ...] = ("small", "paper")
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
METADATA = "training.json"
STATE = "state.safetensors"  # state of an unfinished training


@dataclass(frozen=True)
class _Shape:
    """The architecture parameters of a size; ``attention`` says which levels have attention."""

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


# By size and by the largest image side that each shape is meant for; the last one also serves
# larger images.
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
    """Make a network with random weights, drawn from torch's global generator.

    ========  =====================================  =====================================
    side      "small"                                "paper"
    ========  =====================================  =====================================
    up to 8   (16, 32), 1 layer: 160 thousand        (64, 128), 2 layers, attention at 4
    up to 28  (16, 32, 64), 1 layer: 620 thousand    (64, 128, 128), 2 layers, attention
              parameters                             at 14 and 7
    larger    (32, 64, 128, 128), 1 layer            ``google/ddpm-cifar10-32``
    ========  =====================================  =====================================

    The last is exactly that configuration: ``block_out_channels`` (128, 256, 256, 256),
    ``layers_per_block`` 2, attention at half the side and in the middle, with one head,
    ``norm_num_groups`` 32, ``norm_eps`` 1e-6, ``freq_shift`` 1, ``flip_sin_to_cos`` False,
    ``downsample_padding`` 0.

    Parameters
    ----------
    image_size : int
        Side of the square images in pixels; a multiple of 2 to the number of halvings.
    channels : int
        Channels of the images.
    num_classes : int, optional
        Makes a conditional network, with labels 0 ... num_classes; the last one is "no label".
    size : {"small", "paper"}, optional
        Default "small" up to side 28, for a laptop, and "paper" above, for a GPU.

    Returns
    -------
    UNet2DModel
        In float32, on torch's default device.

    Raises
    ------
    ValueError, TypeError
        If an argument is not allowed; the message names it, its value and what is allowed.
    """
    from diffusers import UNet2DModel

    image_size = checks.integer("image_size", image_size, 1)
    channels = checks.integer("channels", channels, 1)
    if num_classes is not None:
        num_classes = checks.integer("num_classes", num_classes, 1) + 1
    size = default_size(image_size) if size is None else size
    checks.choice("size", size, SIZES)
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
    """The default size of :func:`make_unet` for an image side: "small" up to 28, else "paper"."""
    return "small" if image_size <= 28 else "paper"


def save_network(
    directory: Path | str, net: UNet2DModel, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a network as a folder that ``UNet2DModel.from_pretrained`` reads.

    ``training.json`` is written last, so a folder that has it is complete.

    Parameters
    ----------
    directory : Path or str
        Folder to write; made if needed.
    net : UNet2DModel
    metadata : mapping, optional
        Contents of ``training.json``; values that JSON can hold.

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
    """Whether a folder holds a complete network of any kind, and not an unfinished training."""
    if (directory / METADATA).is_file():
        return all((directory / name).is_file() for name in (CONFIG, WEIGHTS))
    described = any((directory / name).is_file() for name in (CONFIG, "model_index.json"))
    return described and not (directory / STATE).is_file()


def load_network(directory: Path | str, *, device: torch.device | str | None = None) -> UNet2DModel:
    """The network in a folder of :func:`save_network`, or of any saved ``UNet2DModel``.

    Parameters
    ----------
    directory : Path or str
        A local folder.
    device : torch.device or str, optional
        Default: the CPU.

    Returns
    -------
    UNet2DModel
        In evaluation mode, without gradients, in float32.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it lacks a file.
    ValueError
        If a file is damaged, the network is not a ``UNet2DModel``, or its weights are not finite.
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
    """Read the ``training.json`` of a trained network.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is damaged.
    """
    path = Path(directory) / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: no training was finished there")
    return foreign.read_object(path)
