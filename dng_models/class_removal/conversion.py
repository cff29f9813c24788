"""Conversion of the published class networks, torch checkpoints of score_sde's DDPM, to diffusers.

Such a checkpoint is ``{"net": state_dict}`` with keys ``all_modules.N...``: a flat list of layers
in the order in which they run,

    2 Dense, Conv, (ResNet [Attention]) ... Resample ... ResNet [Attention] ... GroupNorm, Conv

(yang-song/score_sde_pytorch, ``models/ddpm.py`` and ``models/layers.py``).  Resampling layers cut
the list into levels, so everything except the image size follows from the keys and shapes.  What
shapes do not show is fixed in that layout, and :class:`diffusers.UNet2DModel` supports it: sine
before cosine with frequencies ``10000^(-i/(half - 1))``, 32 groups with eps 1e-6, SiLU, one
attention head, padding at the right and bottom before the strided convolution when downsampling,
nearest neighbours before the convolution when upsampling.

In the published networks attention follows every block of a level.  score_sde itself has it only
after the last block of an upward level.  For the attention layers that ``UNet2DModel`` has in
addition, the conversion writes zero weights, which make them the identity.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

from dng_math import checks
from dng_models.class_removal.networks import save_network
from dng_models.support import foreign

if TYPE_CHECKING:
    from diffusers import UNet2DModel
    from torch import Size, Tensor

State = Mapping[str, "Tensor"]

GROUPS = 32
# Settings that all networks of the layout share.
CONVENTIONS: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": GROUPS,
    "time_embedding_type": "positional",
}

# Names of the parts of each kind of layer, in score_sde and in diffusers.
PLAIN = {"": ""}
RESAMPLE = {"Conv_0": "conv"}
RESNET = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "time_emb_proj",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "NIN_0": "conv_shortcut",
}
ATTENTION = {
    "GroupNorm_0": "group_norm",
    "NIN_0": "to_q",
    "NIN_1": "to_k",
    "NIN_2": "to_v",
    "NIN_3": "to_out.0",
}
PLAIN_KINDS = {1: "norm", 2: "dense", 4: "conv"}  # by the number of dimensions of the weight


@dataclass(frozen=True)
class _Layer:
    """One layer of ``all_modules``.

    Attributes
    ----------
    name : str
        ``all_modules.N``.
    kind : {"resnet", "attention", "resample", "conv", "dense", "norm"}
    tensors : dict
        Its tensors, by the rest of their keys, such as "Conv_0.weight".
    """

    name: str
    kind: str
    tensors: dict[str, Tensor]

    @property
    def first_key(self) -> str:
        return f"{self.name}.{next(iter(self.tensors))}"

    @property
    def parts(self) -> dict[str, str]:
        """Names of the parts in diffusers, by their names in the checkpoint."""
        if self.kind == "attention":
            return ATTENTION
        if self.kind == "resample":
            return RESAMPLE
        if self.kind != "resnet":
            return PLAIN
        if "Conv_2.weight" not in self.tensors:
            return RESNET
        return {"Conv_2" if old == "NIN_0" else old: new for old, new in RESNET.items()}

    def keys(self) -> Iterator[tuple[str, str]]:
        """Tensors that a layer of this kind may hold: (name in the checkpoint, in diffusers)."""
        for old, new in self.parts.items():
            pair = ("W", "b") if old.startswith("NIN") else ("weight", "bias")
            for leaf, new_leaf in zip(pair, ("weight", "bias"), strict=True):
                yield f"{old}.{leaf}".lstrip("."), f"{new}.{new_leaf}".lstrip(".")


@dataclass(frozen=True)
class _Block:
    """A residual block and the attention after it, if any."""

    resnet: _Layer
    attention: _Layer | None


def _layers(state: State) -> list[_Layer]:
    """The layers in order; raises ValueError if the keys are of another layout."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"all_modules\.(\d+)\.(.+)", key)
        if match is None:
            raise ValueError(
                f"key {key!r} is not of the layout that can be converted, all_modules.N..."
            )
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    for number in range(max(found) + 1):
        if number not in found:
            raise ValueError(
                f"all_modules.{number} has no key: either some are missing, or it is a layer "
                "without weights (resampling without a convolution), which UNet2DModel has not"
            )
    return [_layer(f"all_modules.{number}", found[number]) for number in sorted(found)]


def _layer(name: str, tensors: dict[str, Tensor]) -> _Layer:
    """A layer; its kind follows from its keys."""
    parts = {key.rpartition(".")[0] for key in tensors}
    if parts == {""}:
        weight = tensors.get("weight")
        if weight is None:
            raise ValueError(f"key {name}.weight is missing")
        kind = PLAIN_KINDS.get(weight.ndim, "plain")
    elif parts == {"Conv_0"}:
        kind = "resample"
    elif parts & {"Conv_0", "Conv_1", "Dense_0", "GroupNorm_1"}:
        kind = "resnet"
    elif parts & ATTENTION.keys():
        kind = "attention"
    else:
        raise ValueError(f"key {name}.{next(iter(tensors))} belongs to no known kind of layer")
    shortcut = tensors.get("Conv_2.weight")
    if kind == "resnet" and shortcut is not None and shortcut.shape[2:] != (1, 1):
        raise ValueError(
            f"key {name}.Conv_2.weight has shape {tuple(shortcut.shape)}: the shortcuts of a "
            "UNet2DModel are convolutions of 1x1"
        )
    return _Layer(name, kind, tensors)


def _levels(layers: list[_Layer]) -> tuple[list[list[_Block]], list[_Layer]]:
    """The blocks of each level, and the resampling layers between the levels."""
    levels: list[list[_Block]] = [[]]
    resampling = []
    previous = "conv"
    for layer in layers:
        if layer.kind == "resnet":
            levels[-1].append(_Block(layer, None))
        elif layer.kind == "attention" and previous == "resnet":
            levels[-1][-1] = _Block(levels[-1][-1].resnet, layer)
        elif layer.kind == "resample":
            resampling.append(layer)
            levels.append([])
        else:
            raise ValueError(
                f"key {layer.first_key} does not fit: UNet2DModel has no {layer.kind} layer "
                f"after one of kind {previous}"
            )
        previous = layer.kind
    return levels, resampling


def _width(blocks: list[_Block]) -> int:
    """Channels of a level: the most frequent size among its tensors."""
    return mode(
        len(tensor)
        for block in blocks
        for key, tensor in block.resnet.tensors.items()
        if tensor.ndim and key.startswith(("Conv_0", "Dense_0", "GroupNorm_1", "Conv_1"))
    )


@dataclass(frozen=True)
class _Plan:
    """The configuration of the UNet2DModel, and the place in it of each layer."""

    config: dict[str, Any]
    places: list[tuple[_Layer, str]]


def _plan(layers: list[_Layer], image_size: int) -> _Plan:
    """Derive the architecture from the layers; ValueError if UNet2DModel cannot express it."""
    head, body, tail = layers[:3], layers[3:-2], layers[-2:]
    kinds = ["dense", "dense", "conv", "norm", "conv"]
    for layer, kind in zip([*head, *tail], kinds, strict=True):
        if layer.kind != kind:
            raise ValueError(
                f"key {layer.first_key} belongs to a layer of kind {layer.kind}, where the layout "
                f"has one of kind {kind}"
            )
    levels, resampling = _levels(body)
    if len(levels) % 2 == 0:
        raise ValueError(
            f"key {resampling[-1].first_key} is one of {len(resampling)} resampling layers: "
            "a network has as many on its way up as on its way down"
        )
    depth = len(levels) // 2
    bottom = levels[depth]
    count = (len(bottom) - 3) // 2
    down, middle, up = (
        [*levels[:depth], bottom[:count]],
        bottom[count : count + 2],
        [bottom[count + 2 :], *levels[depth + 1 :]],
    )
    for level, wanted in [(bottom, 2 * max(count, 1) + 3)] + [
        (level, count + extra) for side, extra in ((down, 0), (up, 1)) for level in side
    ]:
        if len(level) != wanted:
            near = level[0].resnet if level else body[0] if body else tail[0]
            raise ValueError(
                f"key {near.first_key} starts a level of {len(level)} residual blocks where "
                f"{wanted} are wanted: UNet2DModel has as many on every level, one more on the way "
                "up, and two in the middle"
            )
    if middle[1].attention is not None:
        raise ValueError(
            f"key {middle[1].attention.first_key} is attention after the second block of the "
            "middle, where UNet2DModel has none"
        )
    places = [
        (head[0], "time_embedding.linear_1"),
        (head[1], "time_embedding.linear_2"),
        (head[2], "conv_in"),
        *_placed(down, resampling[:depth], "down_blocks", "downsamplers"),
        *_placed([middle], [], "mid_block", ""),
        *_placed(up, resampling[depth:], "up_blocks", "upsamplers"),
        (tail[0], "conv_norm_out"),
        (tail[1], "conv_out"),
    ]
    widths = tuple(_width(level) for level in down)
    for width, level in zip(widths, down, strict=True):
        if width % GROUPS:
            raise ValueError(
                f"key {level[0].resnet.first_key} is of a level with {width} channels: the "
                f"layout normalises in {GROUPS} groups"
            )
    embedded = len(head[2].tensors["weight"])
    if embedded == head[0].tensors["weight"].shape[1] != widths[0]:
        raise ValueError(
            f"key {head[2].name}.weight has {embedded} channels and the level after it "
            f"{widths[0]} (ch_mult does not start with 1): UNet2DModel has one number for both"
        )
    if image_size % 2**depth:
        raise ValueError(
            f"image_size must be a multiple of {2**depth} for a network of {depth + 1} "
            f"resolutions, got {image_size}"
        )
    config = {
        **CONVENTIONS,
        "sample_size": image_size,
        "in_channels": head[2].tensors["weight"].shape[1],
        "out_channels": tail[1].tensors["weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": count,
        "down_block_types": tuple(_block_type("Down", level) for level in down),
        "up_block_types": tuple(_block_type("Up", level) for level in up),
        "add_attention": middle[0].attention is not None,
    }
    return _Plan(config, places)


def _block_type(way: str, level: list[_Block]) -> str:
    attends = any(block.attention is not None for block in level)
    return f"{'Attn' if attends else ''}{way}Block2D"


def _placed(
    levels: list[list[_Block]], resampling: list[_Layer], side: str, resampler: str
) -> Iterator[tuple[_Layer, str]]:
    """The layers of one side of the network, each with its place in UNet2DModel."""
    for i, level in enumerate(levels):
        prefix = side if side == "mid_block" else f"{side}.{i}"
        for j, block in enumerate(level):
            yield block.resnet, f"{prefix}.resnets.{j}"
            if block.attention is not None:
                yield block.attention, f"{prefix}.attentions.{j}"
        if i < len(resampling):
            yield resampling[i], f"{prefix}.{resampler}.0"


def _renamed(plan: _Plan, wanted: Mapping[str, Size]) -> dict[str, Tensor]:
    """The float32 state dict for a UNet2DModel; raises ValueError for a wrong key or shape."""
    import torch

    state = {}
    for layer, place in plan.places:
        named = {old: f"{place}.{new}" for old, new in layer.keys()}
        for old, new in named.items():
            if new in wanted and old not in layer.tensors:
                raise ValueError(f"key {layer.name}.{old} is missing")
        for old, tensor in layer.tensors.items():
            key, target = f"{layer.name}.{old}", named.get(old)
            if target is None or target not in wanted:
                raise ValueError(f"key {key} is one too many: UNet2DModel has no place for it")
            shape = tuple(wanted[target])
            here = shape[1::-1] if old.endswith(".W") else shape
            if tuple(tensor.shape) != here:
                raise ValueError(
                    f"key {key} must have shape {here} in this network, got {tuple(tensor.shape)}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"key {key} must be finite, and has numbers that are NaN or infinite: the "
                    "checkpoint is damaged, or its training diverged"
                )
            moved = tensor.T if old.endswith(".W") else tensor
            state[target] = moved.reshape(shape).to(torch.float32, copy=True).contiguous()
    # Zero weights turn the attention layers that the checkpoint lacks into the identity.
    identity = {key: torch.zeros(wanted[key]) for key in wanted.keys() - state.keys()}
    return state | identity


def _entry(checkpoint: Path, entry: str) -> dict[str, Tensor]:
    """The state dict of an entry of a checkpoint, without DataParallel's "module." prefix."""
    import torch

    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint must be a file, and there is none at {checkpoint}")
    foreign.check_archive(checkpoint)
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise almost any type
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it needs {blocked[1]}, and loading that would run code from the file"
            if blocked
            else "it is damaged, or no checkpoint of torch"
        )
        raise ValueError(f"{checkpoint} cannot be loaded as weights alone: {reason}") from error
    if not isinstance(content, dict) or entry not in content:
        held = list(content) if isinstance(content, dict) else [type(content).__name__]
        listed = ", ".join(map(repr, held[:8])) + (", ..." if len(held) > 8 else "")
        raise ValueError(f"{checkpoint} has no entry {entry!r}; it holds {listed}")
    others = [
        name
        for name, value in content.items()
        if name != entry and ("ema" in str(name).lower() or _is_network(value))
    ]
    if others:
        warnings.warn(
            f"{checkpoint} holds {', '.join(map(repr, others))} beside {entry!r}: only {entry!r} "
            "is converted (entry names another)",
            stacklevel=3,
        )
    state = content[entry]
    if not isinstance(state, dict) or not state:
        raise ValueError(
            f"entry {entry!r} of {checkpoint} must be a state dict, got a {type(state).__name__}"
        )
    for key, tensor in state.items():
        if not isinstance(key, str) or not torch.is_tensor(tensor):
            raise ValueError(
                f"key {key!r} of entry {entry!r} must be a tensor with a name, got a "
                f"{type(tensor).__name__}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"key {key} must be a floating-point tensor, got {tensor.dtype}")
    foreign.require_stored(checkpoint, state.values())
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return state


def _is_network(value: object) -> bool:
    return isinstance(value, dict) and any("all_modules." in str(key) for key in value)


def convert(
    checkpoint: Path | str, out: Path | str, *, image_size: int = 32, entry: str = "net"
) -> UNet2DModel:
    """Convert a checkpoint in the published layout to a directory for ``from_pretrained``.

    Parameters
    ----------
    checkpoint : Path or str
        A file that ``torch.load(weights_only=True)`` reads; one that needs code is refused.
    out : Path or str
        New or empty directory to write, as
        :func:`dng_models.class_removal.networks.save_network` does; its ``training.json`` says
        which file was converted.
    image_size : int
        Height and width of the images in pixels, which cannot be derived from the weights.
    entry : str
        Which network of the checkpoint; some keep averaged weights beside ``"net"``.

    Returns
    -------
    UNet2DModel
        On the CPU, float32, in evaluation mode.  It takes images in [-1, 1] and the time step
        0 ... T - 1, and predicts what the published network predicts.

    Raises
    ------
    ValueError
        If the file is damaged or needs code to be run, or if keys or shapes are missing, too many
        or of a network that a UNet2DModel cannot express (the message names the key).
    FileNotFoundError
        If there is no checkpoint.
    FileExistsError
        If ``out`` is not a new or empty directory.
    OSError
        If the disk is full or the directory cannot be written.

    Warns
    -----
    UserWarning
        If the checkpoint holds other networks or averaged weights, which are not converted.
    """
    import torch
    from diffusers import UNet2DModel

    checkpoint, out = Path(checkpoint), Path(out)
    image_size = checks.integer("image_size", image_size, 1)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"out must be a new or an empty directory, got {out}")
    layers = _layers(_entry(checkpoint, entry))
    if len(layers) < 6:
        raise ValueError(
            f"key {layers[-1].first_key} ends a network of {len(layers)} layers: that is not all "
            "of one"
        )
    plan = _plan(layers, image_size)
    with torch.device("meta"):
        net = UNet2DModel(**plan.config)
    wanted = {key: tensor.shape for key, tensor in net.state_dict().items()}
    net.load_state_dict(_renamed(plan, wanted), assign=True)
    net.eval()
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = {"checkpoint": checkpoint.name, "entry": entry, "sha256": digest}
    save_network(out, net, metadata={"converted_from": origin})
    return net


def main(
    checkpoint: Path | str, out: Path | str, *, image_size: int = 32, entry: str = "net"
) -> str:
    """Call :func:`convert` and return a text about the result for the command line."""
    net = convert(checkpoint, out, image_size=image_size, entry=entry)
    return f"{describe(net)}\nwritten to {out}"


def describe(net: UNet2DModel) -> str:
    """The architecture of a network in one sentence."""
    config = net.config
    sizes = [config.sample_size >> i for i in range(len(config.block_out_channels))]
    attends = [
        str(size)
        for size, kind in zip(sizes, config.down_block_types, strict=True)
        if kind.startswith("Attn")
    ]
    channels = ", ".join(
        f"{width} at {size}x{size}"
        for width, size in zip(config.block_out_channels, sizes, strict=True)
    )
    return (
        f"{sum(p.numel() for p in net.parameters()):,} parameters; {config.in_channels} channels "
        f"in, {config.out_channels} out; {config.layers_per_block} blocks a level; channels "
        f"{channels}; attention at {', '.join(attends) or 'no level'}"
        f"{' and in the middle' if config.add_attention else ''}"
    )
