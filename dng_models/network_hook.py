"""A hook of diffusers that stands in for a network's forward, compiled or not."""

from __future__ import annotations

import inspect
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


def put_on(module: nn.Module, hook: NetworkHook) -> None:
    """Put the hook around a network's forward, outside of what is around it already."""
    hooks = registry(module)
    hooks.register_hook(hook, NAME)
    hook.installed, hook.own_forward = hooks._module_ref.forward, hook.fn_ref.forward
    hook.settle(module)
    # Where copy and pickle ask it, before they look at the hook (a flat copy never does).
    vars(module)["__getstate__"] = _refuse_copies


def put_on_again(module: nn.Module) -> None:
    """Where the hook was lost with others that were taken off a network, put it back.

    Offloading takes its own off at the end of every call, with what was put around them.
    """
    hooks = registry(module)
    hook = hooks.get_hook(NAME)
    if hook.fn_ref.forward is not hook.own_forward:
        # A hook of diffusers inside of it was taken off: diffusers puts what was in that one here.
        hook.fn_ref.original_forward = hook.fn_ref.forward
        hook.fn_ref.forward = hook.own_forward
    if hook.is_lost(hooks):
        hook.leave(hooks)
        put_on(module, hook)
    hook.settle(module)


def take_out(module: nn.Module) -> None:
    """Take the hook out of a network, and leave nothing of it behind."""
    vars(module).pop("__getstate__", None)
    hooks = registry(module)
    hook = hooks.get_hook(NAME)
    if hook is None:
        return
    if hooks._hook_order[-1] == NAME and hooks._module_ref.forward is hook.installed:
        hooks.remove_hook(NAME, recurse=False)
    else:
        # Others (accelerate, one's own wrapper) put more around it since, which stays.
        hook.leave(hooks)
    if not hooks.hooks:
        inner = hooks._module_ref
        # Another wrapper of the network would find it; some (torch.compile's, PEFT's) keep it on
        # what they wrap.
        for holder in (module, inner, getattr(module, "_orig_mod", module)):
            vars(holder).pop("_diffusers_hook", None)
        left = inner.__dict__.get("forward")
        if getattr(left, "__func__", None) is getattr(type(inner), "forward", None):
            del inner.forward  # the class's own


def _refuse_copies() -> Any:
    raise TypeError(
        "the network of a guided pipeline cannot be copied or pickled: the copy would share the "
        "original's guidance. Call remove_guidance(pipe) first"
    )


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
        self.installed: Any = None  # the network's forward as the hook made it
        self.own_forward: Any = None  # what that calls of the hook
        # What a network in a class of one's own calls its arguments, by their usual names.
        self.own_names: Mapping[str, str] = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _refuse_copies()

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

    def is_lost(self, hooks: Any) -> bool:
        """Whether the network's forward, through all that is around it, is its own again."""
        network = hooks._module_ref
        current = network.forward
        while current is not self.installed:
            if not hasattr(current, "__wrapped__"):
                own = inspect.unwrap(type(network).forward)
                return getattr(current, "__func__", current) is own
            current = current.__wrapped__
        return False

    def leave(self, hooks: Any) -> None:
        """Hand on to the network from now on, and be none of its hooks."""
        if self.fn_ref.forward is self.own_forward:
            self.fn_ref.forward = self.fn_ref.original_forward
        self.fn_ref.pre_forward = ModelHook().pre_forward
        self.fn_ref.post_forward = ModelHook().post_forward
        place = hooks._hook_order.index(NAME)
        del hooks.hooks[NAME], hooks._hook_order[place], hooks._fn_refs[place]
        self.deinitalize_hook(hooks._module_ref)

    # Only the network is anybody's to compile.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """In place of the network's forward."""
        return self.forward(self, module, args, kwargs)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The network itself."""
        kwargs = {self.own_names.get(name, name): value for name, value in kwargs.items()}
        if self.compiled is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        # What was compiled looks its forward up: there it must find the network's own.
        hooked = module.forward
        module.forward = self.fn_ref.original_forward
        try:
            return self.compiled(*args, **kwargs)
        finally:
            module.forward = hooked
