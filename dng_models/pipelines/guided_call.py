"""A guided pipeline: the hooks in its networks, and which of its calls are guided."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dng_models.pairs.denoisers import Denoiser
from dng_models.pipelines import rows
from dng_models.pipelines.call_batch import BatchCall
from dng_models.pipelines.call_begun import Concept, Parts, Run, check_text_encoder
from dng_models.pipelines.call_separate import AloneCall, SeparateCall
from dng_models.pipelines.call_watched import WatchedCall
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.layouts import Calls, Control, Layout
from dng_models.pipelines.negative_template import with_composed_negatives
from dng_models.pipelines.network_hook import (
    NAME,
    NetworkHook,
    put_on,
    put_on_again,
    registry,
    take_out,
)

KINDS: dict[Calls, type[WatchedCall]] = {
    "batch": BatchCall,
    "separate": SeparateCall,
    "alone": AloneCall,
}


class GuidedCalls:
    """Guides the calls of a pipeline; made by :func:`dng_models.pipelines.hook.guided_calls`.

    Parameters
    ----------
    pipe : DiffusionPipeline
        The pipeline to guide.
    layout : Layout
        Layout of the pipeline's class.
    chain : GuidedChain
        Rule, posteriors and trace.
    concepts : sequence of Concept, optional
        Unwanted concepts in place of the pipeline's own negative prompt.
    denoisers : sequence of callable
        Unwanted networks, for pipelines without prompts.
    negative_template : str, optional
        How the negative prompt of each call is composed with its prompt.

    Raises
    ------
    ValueError
        If the pipeline has no text encoder for prompts that must be added.
    """

    def __init__(
        self,
        pipe: Any,
        layout: Layout,
        chain: GuidedChain,
        concepts: Sequence[Concept] | None,
        denoisers: Sequence[Denoiser],
        negative_template: str | None = None,
    ) -> None:
        self.negative_template = negative_template
        self.pipe, self.layout, self.chain = pipe, layout, chain
        self.denoisers = list(denoisers)
        self.parts = Parts(chain, concepts)
        self.hooked: list[nn.Module] = []
        self._call: WatchedCall | None = None
        self._verified = False
        self._told = False
        self._told_of_scale = False
        if layout.calls != "alone":
            check_text_encoder(pipe, self.parts)

    # ------------------------------------------------------------------ hooks

    def attach(self) -> None:
        """Put hooks on the networks that the pipeline has now.

        Raises
        ------
        ValueError
            If another guided pipeline shares one of the networks.
        """
        wanted: dict[int, tuple[nn.Module, Control | None]] = {}
        controls = {control.name: control for control in self.layout.control}
        for name in (*self.layout.network, *controls):
            module = getattr(self.pipe, name, None)
            if isinstance(module, nn.Module):
                wanted[id(module)] = (module, controls.get(name))
        for module in [m for m in self.hooked if id(m) not in wanted]:
            self._take_out(module)
        for module, control in wanted.values():
            if any(module is known for known in self.hooked):
                put_on_again(module)
                continue
            if registry(module).get_hook(NAME) is not None:
                self.detach()
                raise ValueError(
                    "pipe must not share its network with a pipeline that is guided now: call "
                    "remove_guidance on that one first"
                )
            put_on(module, NetworkHook(self.forward, control))
            self.hooked.append(module)

    def detach(self) -> None:
        """Remove the hooks from all networks that have one."""
        for module in list(self.hooked):
            self._take_out(module)

    def _take_out(self, module: nn.Module) -> None:
        take_out(module)
        self.hooked = [m for m in self.hooked if m is not module]

    # ------------------------------------------------------------------ calls

    def run(self, function: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the pipeline under guidance.

        Parameters
        ----------
        function : callable
            The pipeline's own call.
        args, kwargs
            Arguments of that call.

        Returns
        -------
        object
            What the pipeline's call returns.

        Raises
        ------
        ValueError
            If the call cannot be guided, or is made while another one is under way.
        """
        if self._call is not None:
            raise ValueError("pipe must not be called again while a guided call of it runs")
        self.attach()
        given = rows.given_to(function, args, kwargs)[0]
        if self.negative_template is not None:
            kwargs = with_composed_negatives(self.negative_template, given, kwargs)
        kwargs = self._switched_on(function, given, kwargs)
        call = self._call = KINDS[self.layout.calls](
            self.pipe,
            self.layout,
            self.chain,
            self.parts,
            self.denoisers,
            function,
            args,
            kwargs,
        )
        try:
            call.prepare(verify=not self._verified)
            self._tell_of_dropped_scale(given)
            with call.watching_the_scheduler(), call.watching_the_processors(after=False):
                result = function(*args, **call.with_own_code(kwargs))
            call.check_result(result)
            call.check_end()
            self._verified = True
        except BaseException:
            self.chain.forget_unconfirmed()
            raise
        finally:
            self.chain.reset()
            self._call = None
        return result

    def _switched_on(
        self, function: Run, given: Mapping[str, Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Arguments with the negative prompt switched on, where the pipeline's default is off.

        Users need not give this argument, because its value has no other effect.
        """
        name, above = self.layout.guidance_scale, self.layout.above
        if name is None or name in given:
            return kwargs
        default = rows.call_parameters(function)[name].default
        off = isinstance(default, int | float) and default <= above
        return {**kwargs, name: above + 1.0} if off else kwargs

    def _tell_of_dropped_scale(self, given: Mapping[str, Any]) -> None:
        """Warn once that a guidance scale given to the call is ignored."""
        name, chain = self.layout.guidance_scale, self.chain
        if name is None or chain.cfg_scale is not None or self._told_of_scale:
            return
        dropped = [n for n in (name, f"{name}_2") if given.get(n) is not None]
        if not dropped:
            return
        self._told_of_scale = True
        said = ", ".join(f"{n}={given[n]!r}" for n in dropped)
        cure = (
            f"leave it out, for {chain.rule!r} has a scale of its own"
            if chain.needs_unconditional
            else "leave it out, or give cfg_scale= beside the rule for classifier-free guidance "
            "beneath it: base = unconditional + cfg_scale (positive - unconditional)"
        )
        warnings.warn(
            f"{said} of the pipeline's call is dropped: under guidance it only switches the "
            f"negative prompt on, whatever its value; {cure}",
            stacklevel=4,
        )

    def forward(
        self, hook: NetworkHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Called in place of a network's forward; other code's calls pass through unguided."""
        call = self._call
        if call is None or call.is_strange():
            self._tell_of_strangers()
            return hook.call(module, args, kwargs)
        if call.inside:
            return hook.call(module, args, kwargs)
        usual = (self.layout.latents, self.layout.time, *self.layout.text)
        arguments = rows.named(module, args, kwargs, usual)
        hook.own_names = {u: own for own, u in rows.other_names(module, usual).items()}
        with call.evaluating_itself():
            if hook.control is not None:
                return call.control(hook, module, hook.control, arguments)
            return call.network(hook, module, arguments)

    def _tell_of_strangers(self) -> None:
        if self._told:
            return
        self._told = True
        warnings.warn(
            f"the network of a guided {type(self.pipe).__name__} was called by something else (a "
            "pipeline that shares it, or your own code): such calls are not guided",
            stacklevel=4,
        )
