"""A hook of diffusers that stands in for a network's forward, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from dng_models.layouts import Control

NAME = "dng"


def registry(module: nn.Module) -> Any:
    """The hooks of diffusers on a network."""
    return HookRegistry.check_if_exists_or_initialize(module)


def take_out(module: nn.Module) -> None:
    """Take the hook out of a network, and leave nothing of it behind."""
    hooks = registry(module)
    hooks.remove_hook(NAME, recurse=False)
    if not hooks.hooks:
        del module._diffusers_hook  # which another wrapper of the network would find
        inner = hooks._module_ref
        left = inner.__dict__.get("forward")
        if getattr(left, "__func__", None) is getattr(type(inner), "forward", None):
            del inner.forward  # the class's own


class NetworkHook(ModelHook):  # type: ignore[misc]
    """Between a pipeline and one of its networks.

    Parameters
    ----------
    forward : callable
        What is called in place of the network's forward: with this hook, the network, and the
        unnamed and the named arguments.
    control : Control, optional
        Which of the pipeline's control networks it is; None: the network itself.
    """

    def __init__(self, forward: Callable[..., Any], control: Control | None) -> None:
        super().__init__()
        self.forward, self.control = forward, control
        self.compiled: Callable[..., Any] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "the network of a guided pipeline cannot be copied or pickled: the copy would share "
            "the original's guidance. Call remove_guidance(pipe) first"
        )

    def settle(self, module: nn.Module) -> None:
        """Remember a network that is compiled; the hook itself is not to be."""
        if module._compiled_call_impl is not None:
            self.compiled = module._compiled_call_impl
            module._compiled_call_impl = None
        elif getattr(module, "_orig_mod", None) is registry(module)._module_ref:
            # Wrapped after it had hooks of diffusers, which stay on what is inside.
            self.compiled = module.forward

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """When it is put on a network."""
        self.settle(module)
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # diffusers' spelling
        """Leave the network compiled, if it was."""
        if self.compiled is not None:
            module._compiled_call_impl = self.compiled
        return module

    # Only the network is anybody's to compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In place of the network's forward."""
        return self.forward(self, module, args, kwargs)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The network itself."""
        if self.compiled is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        # What was compiled looks its forward up: there it must find the network's own.
        hooked = module.forward
        module.forward = self.fn_ref.original_forward
        try:
            return self.compiled(*args, **kwargs)
        finally:
            module.forward = hooked
