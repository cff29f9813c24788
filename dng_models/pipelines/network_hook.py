"""A diffusers hook that replaces a network's forward, whether it is compiled or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from dng_models.pipelines.layouts import Control

NAME = "dng"


def registry(module: nn.Module) -> Any:
    """The registry of diffusers' hooks on a network, made if there is none."""
    return HookRegistry.check_if_exists_or_initialize(module)


def put_on(module: nn.Module, hook: NetworkHook) -> None:
    """Put the hook around a network's forward, outside any other hooks.

    Parameters
    ----------
    module : nn.Module
        The network.
    hook : NetworkHook
        The hook.
    """
    hooks = registry(module)
    hooks.register_hook(hook, NAME)
    hook.installed, hook.own_forward = hooks._module_ref.forward, hook.fn_ref.forward
    hook.settle(module)
    # copy and pickle call this before they reach the hook, which a shallow copy never does.
    vars(module)["__getstate__"] = _refuse_copies


def put_on_again(module: nn.Module) -> None:
    """Put the hook back if it was lost when other hooks were removed from a network.

    Offloading removes its hooks at the end of every call, with everything put around them.
    """
    hooks = registry(module)
    hook = hooks.get_hook(NAME)
    if hook.fn_ref.forward is not hook.own_forward:
        # A hook of diffusers inside ours was removed, and diffusers stored its forward here.
        hook.fn_ref.original_forward = hook.fn_ref.forward
        hook.fn_ref.forward = hook.own_forward
    if hook.is_lost(hooks):
        hook.leave(hooks)
        put_on(module, hook)
    hook.settle(module)


def take_out(module: nn.Module) -> None:
    """Remove the hook from a network, with everything that it put there."""
    vars(module).pop("__getstate__", None)
    hooks = registry(module)
    hook = hooks.get_hook(NAME)
    if hook is None:
        return
    if hooks._hook_order[-1] == NAME and hooks._module_ref.forward is hook.installed:
        hooks.remove_hook(NAME, recurse=False)
    else:
        # Others (accelerate, a user's wrapper) have wrapped it since; their wrappers stay.
        hook.leave(hooks)
    if not hooks.hooks:
        inner = hooks._module_ref
        # Otherwise another wrapper of the network would find the registry; some (torch.compile,
        # PEFT) keep it on the module that they wrap.
        for holder in (module, inner, getattr(module, "_orig_mod", module)):
            vars(holder).pop("_diffusers_hook", None)
        left = inner.__dict__.get("forward")
        if getattr(left, "__func__", None) is getattr(type(inner), "forward", None):
            del inner.forward  # it is the class's own forward


def _refuse_copies() -> Any:
    raise TypeError(
        "the network of a guided pipeline cannot be copied or pickled: the copy would share the "
        "original's guidance. Call remove_guidance(pipe) first"
    )


class NetworkHook(ModelHook):  # type: ignore[misc]
    """A hook between a pipeline and one of its networks.

    Parameters
    ----------
    forward : callable
        Called in place of the network's forward, with this hook, the network, and the positional
        and the keyword arguments.
    control : Control, optional
        The control network that the hook is on; None: the pipeline's main network.
    """

    def __init__(self, forward: Callable[..., Any], control: Control | None) -> None:
        super().__init__()
        self.forward, self.control = forward, control
        self.compiled: Callable[..., Any] | None = None
        self.installed: Any = None  # the network's forward after the hook was put on
        self.own_forward: Any = None  # the hook's function that ``installed`` calls
        # A custom network's own names of arguments, by their usual names.
        self.own_names: Mapping[str, str] = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _refuse_copies()

    def settle(self, module: nn.Module) -> None:
        """Keep the network's compiled forward, so that the hook itself is not compiled."""
        if module._compiled_call_impl is not None:
            self.compiled = module._compiled_call_impl
            module._compiled_call_impl = None
        elif getattr(module, "_orig_mod", None) is registry(module)._module_ref:
            # torch.compile wrapped it after it had hooks, which stay on the inner module.
            self.compiled = module.forward

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """Called by diffusers when the hook is put on a network."""
        self.settle(module)
        return module

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # diffusers' spelling
        """Restore the network's compiled forward, if it had one; called by diffusers."""
        if self.compiled is not None:
            module._compiled_call_impl = self.compiled
        return module

    def is_lost(self, hooks: Any) -> bool:
        """Whether the network's forward, with all wrappers removed, is the class's own again."""
        network = hooks._module_ref
        current = network.forward
        while current is not self.installed:
            if not hasattr(current, "__wrapped__"):
                own = inspect.unwrap(type(network).forward)
                return getattr(current, "__func__", current) is own
            current = current.__wrapped__
        return False

    def leave(self, hooks: Any) -> None:
        """Leave the registry and pass all calls on to the network, where wrappers must stay."""
        if self.fn_ref.forward is self.own_forward:
            self.fn_ref.forward = self.fn_ref.original_forward
        self.fn_ref.pre_forward = ModelHook().pre_forward
        self.fn_ref.post_forward = ModelHook().post_forward
        place = hooks._hook_order.index(NAME)
        del hooks.hooks[NAME], hooks._hook_order[place], hooks._fn_refs[place]
        self.deinitalize_hook(hooks._module_ref)

    # torch.compile must compile the network alone, not the hook.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called in place of the network's forward."""
        return self.forward(self, module, args, kwargs)

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the network itself.

        Parameters
        ----------
        module : nn.Module
            The network.
        args, kwargs
            Its arguments, by their usual names.

        Returns
        -------
        object
            The network's output.
        """
        kwargs = {self.own_names.get(name, name): value for name, value in kwargs.items()}
        if self.compiled is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        # Compiled code looks up the module's forward, and must find the network's own there.
        hooked = module.forward
        module.forward = self.fn_ref.original_forward
        try:
            return self.compiled(*args, **kwargs)
        finally:
            module.forward = hooked
