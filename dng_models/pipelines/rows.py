"""A network's arguments as tensors with dotted names, and their rows.

In a doubled batch of B images, an argument has the first prompt's rows, then the second's.  If it
has m rows per image (the frames of a video), the m rows of an image are adjacent.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

# Tolerances of :func:`near`, relative to the tensors' size: for 32-bit and for 16-bit numbers.
SAME_32, SAME_16 = 1e-4, 2e-2


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Iterate over every tensor in nested arguments, with its dotted name.

    Parameters
    ----------
    value : mapping, sequence, Tensor or anything
        The arguments.
    path : str
        Name of the value itself.

    Yields
    ------
    (str, Tensor)
    """
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}" if path else str(index))


def mapped(value: Any, function: Callable[[str, Tensor], Any], path: str = "") -> Any:
    """The same arguments, in new containers, with another value in place of every tensor.

    Parameters
    ----------
    value : mapping, sequence, Tensor or anything
        The arguments.
    function : callable
        Maps a dotted name and a tensor to the new value.
    path : str
        Name of the value itself.
    """
    if isinstance(value, Tensor):
        return function(path, value)
    if isinstance(value, Mapping):
        return {
            name: mapped(item, function, f"{path}.{name}" if path else str(name))
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        items = [
            mapped(item, function, f"{path}.{index}" if path else str(index))
            for index, item in enumerate(value)
        ]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def at(value: Any, path: str) -> Tensor:
    """The tensor with a dotted name in nested arguments."""
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, list | tuple) else value[name]
    assert isinstance(value, Tensor)
    return value


def with_text(value: Any, other: Any, patterns: Sequence[str], path: str = "") -> Any:
    """The arguments of one call, with those that match the patterns taken from another call.

    Parameters
    ----------
    value, other : mapping, sequence, Tensor or anything
        Arguments of the two calls; a match that the other call does not have is left out.
    patterns : sequence of str
        Dotted names; ``*`` stands for any part of one.
    path : str
        Name of the value itself.
    """
    if path and matches(path, patterns):
        return other
    if not isinstance(value, Mapping) and not (value is None and isinstance(other, Mapping)):
        return value
    own, given = value or {}, other if isinstance(other, Mapping) else {}
    found = {}
    for name in {**own, **given}:
        full = f"{path}.{name}" if path else str(name)
        if name in given if matches(full, patterns) else name in own:
            found[name] = with_text(own.get(name), given.get(name), patterns, full)
    return found if found or value is not None else None


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted name matches one of the patterns, or lies inside one."""
    return any(fnmatchcase(path, p) or path.startswith(f"{p}.") for p in patterns)


def of_images(part: int, images: Tensor, batch: int, each: int) -> Tensor:
    """Indices of the rows of some images in one part of a batch.

    Parameters
    ----------
    part : int
        Part of the batch: 0 for the first prompt, 1 for the second ...
    images : Tensor, shape (n,), int64
        Indices of the images.
    batch : int
        Number of images in a part.
    each : int
        Number of rows per image.

    Returns
    -------
    Tensor, shape (n * each,), int64
    """
    first = (part * batch + images) * each
    return (first[:, None] + torch.arange(each)[None]).reshape(-1)


@functools.lru_cache(maxsize=256)
def _parameters(kind: Any) -> tuple[tuple[str, ...], bool]:
    """Names of a network's positional arguments, and whether it takes ``*args``."""
    found = list(inspect.signature(kind.forward).parameters.values())[1:]
    names = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return tuple(names), any(p.kind is p.VAR_POSITIONAL for p in found)


def other_names(module: nn.Module, usual: Sequence[str]) -> dict[str, str]:
    """Map a custom network's names of latents and time to the names that diffusers uses.

    A traced network, or one of a user's own class, may give its first two arguments other names.

    Parameters
    ----------
    module : nn.Module
        The network.
    usual : sequence of str
        The usual names, those of latents and time first.

    Returns
    -------
    dict of str to str
        Usual names by the network's own; empty for diffusers' networks.
    """
    if isinstance(module, ModelMixin):
        return {}
    kind: Any = type(getattr(module, "_orig_mod", module))
    names, unnamed = _parameters(kind)
    if unnamed or set(usual[:1]) & set(names):
        return {}
    own = names[:2]
    return {n: u for n, u in zip(own, usual[:2], strict=False) if u not in names}


def named(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], usual: Sequence[str]
) -> dict[str, Any]:
    """All arguments of a network's call, by name.

    Parameters
    ----------
    module : nn.Module
        The network, or a wrapper that takes ``*args`` (PEFT, DDP).
    args, kwargs
        Arguments of the call.
    usual : sequence of str
        Names of the positional arguments, used where the signature does not name them.

    Returns
    -------
    dict of str to object

    Raises
    ------
    ValueError
        If there are more positional arguments than names.
    """
    kind: Any = type(getattr(module, "_orig_mod", module))
    names, unnamed = _parameters(kind)
    if unnamed and len(args) > len(names):
        names = tuple(usual)
    other = other_names(module, usual)
    names = tuple(other.get(name, name) for name in names)
    if len(args) > len(names):
        raise ValueError(
            f"pipe must call its network with arguments that have names: a "
            f"{type(module).__name__} got {len(args)}, of which {list(names)} are known"
        )
    return dict(zip(names, args, strict=False)) | kwargs


def call_parameters(call: Any) -> dict[str, inspect.Parameter]:
    """The named parameters of a pipeline's call.

    If the call takes ``*args`` or ``**kwargs``, those of its parent classes are included.

    Parameters
    ----------
    call : callable
        The bound ``__call__`` of a pipeline, or of one of its parent classes.

    Returns
    -------
    dict of str to inspect.Parameter
    """
    found: dict[str, inspect.Parameter] = {}
    owner = getattr(call, "__self__", None)
    known = [vars(kind)["__call__"] for kind in type(owner).__mro__ if "__call__" in vars(kind)]
    own = getattr(call, "__func__", None)
    parents = known[known.index(own) + 1 :] if own in known else []
    parameters: Any = inspect.signature(call).parameters
    while True:
        found |= {n: p for n, p in parameters.items() if n not in found and n != "self"}
        hands_on = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
        if not hands_on or not parents:
            break
        parameters = inspect.signature(parents.pop(0)).parameters
    return {n: p for n, p in found.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def given_to(
    call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a pipeline's call by name: as given, and with all defaults filled in.

    Parameters
    ----------
    call : callable
        As for :func:`call_parameters`.
    args, kwargs
        Arguments of the call.

    Returns
    -------
    tuple of two dicts
    """
    bound = inspect.signature(call).bind(*args, **kwargs)
    parameters = call_parameters(call)
    given: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            given |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            given[name] = value
        else:
            following = [n for n in parameters if n not in bound.signature.parameters]
            given |= dict(zip(following, value, strict=False))
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    return given, {**defaults, **given}


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, in copies of their containers; tensors are not copied."""
    found: dict[str, Any] = mapped(arguments, lambda path, value: value)
    return found


def prediction(output: Any) -> Tensor:
    """The prediction in a network's output: a tensor, or the first entry of a container."""
    found = output if isinstance(output, Tensor) else output[0]
    if isinstance(found, list):
        found = torch.stack(found)
    assert isinstance(found, Tensor)
    return found


def replaced(output: Any, other: Tensor) -> Any:
    """A network's output with another prediction in it."""
    if isinstance(output, Tensor):
        return other
    own: Any = list(other) if isinstance(output[0], list) else other
    if isinstance(output, tuple):
        return (own, *output[1:])
    first = next(iter(output))
    return type(output)(**{**output, first: own})


def near(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to rounding in the coarser one's precision."""
    if a is b:
        return True
    coarse = min(a.element_size(), b.element_size()) < 4 and a.is_floating_point()
    if not a.is_floating_point():
        return bool(torch.equal(a, b.to(a.device, a.dtype)))
    one, other = a.detach().float(), b.detach().to(a.device).float()
    finite = torch.isfinite(one) & torch.isfinite(other)
    same = torch.where(finite, one - other, (one.isnan() != other.isnan()).float() * 1e30)
    size = torch.where(finite, other, 0.0).abs().max() if other.numel() else 0.0
    bound = (SAME_16 if coarse else SAME_32) * size
    return bool((same.abs() <= bound).all())
