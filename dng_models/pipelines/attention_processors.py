"""Attention processors that guide: a layer's own processor, run for the negative text too.

A processor of diffusers joins its heads and hands them to the layer's output projection.  A guided
one lets the layer's own processor do all of this, whichever it is (scaled dot product, sliced,
fused, IP-Adapter, a user's), but shows it a layer whose projections are watched: queries are kept,
and the joined heads are changed on their way to the output projection.  The heads of the negative
text come from a second run of the same processor, with the queries that were kept.

In a UNet the negative's keys and values depend on nothing but its text, and are made once a call.
In a transformer whose text tokens attend to the image (SD3) the negative text is evolved with the
image: each guided image has a twin row with its own latents and the negative text, whose image
tokens are those of the image itself in every layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from dng_math.rules import AttentionRule, ValueSignFlip

# Projections of the layer's input, whose results are kept; the last two are the fused ones.
PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
FUSED = ("to_kv", "to_added_qkv")


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a network's batch are guided, and how.

    Attributes
    ----------
    guided : slice
        Rows whose attention is changed, one for each of G images.
    twins : slice, optional
        Rows of the same images with the negative text, the last of the batch, in a network whose
        text attends to the image.
    images : Tensor, shape (G,), int64, optional
        Indices of the images, into the negative text's rows; None: all, in order.
    opening : Tensor, shape (G,), optional
        How far the gate opens for each image; None: fully.
    """

    guided: slice
    twins: slice | None = None
    images: Tensor | None = None
    opening: Tensor | None = None


@dataclass(eq=False)
class AttentionState:
    """What the guided processors of a network share during a call of its pipeline.

    Attributes
    ----------
    rule : AttentionRule
        The rule.
    text : Tensor, shape (B, L, D)
        The negative text's embeddings, one row for each image.
    bias : Tensor, shape (B, 1, L), optional
        What is added to the logits of its tokens, for masked ones.
    rows : Rows, optional
        The guided rows of the network's call under way; None: nothing is guided.
    """

    rule: AttentionRule
    text: Tensor
    bias: Tensor | None = None
    rows: Rows | None = None


def guided_heads(
    rule: AttentionRule, positive: Tensor, negative: Tensor, opening: Tensor | None = None
) -> Tensor:
    """The guided joined heads of every token.

    Parameters
    ----------
    rule : NormalizedAttention or NegativeAwareSubtraction; or ValueSignFlip
        The rule.
    positive, negative : Tensor, shape (G, tokens, D)
        Joined heads for the positive and the negative text; for ValueSignFlip the second is that
        for both texts together.
    opening : Tensor, shape (G,), optional
        How far a gate opens.

    Returns
    -------
    Tensor, shape and dtype of ``positive``
        Computed in float32 at least; ``positive`` itself, bit for bit, where the gate is closed.
    """
    wide = torch.promote_types(positive.dtype, torch.float32)
    own, other = positive.to(wide), negative.to(wide)
    guided: Tensor = other if isinstance(rule, ValueSignFlip) else rule.features(own, other)
    if opening is not None:
        guided = own + opening.to(own).reshape(-1, 1, 1) * (guided - own)
    return guided.to(positive.dtype)


class _Watched:
    """An attention layer with some of its parts exchanged, as a processor is shown it."""

    def __init__(self, layer: Any, parts: Mapping[str, Any]) -> None:
        self._layer, self._parts = layer, parts

    def __getattr__(self, name: str) -> Any:
        parts = self.__dict__["_parts"]
        return parts[name] if name in parts else getattr(self.__dict__["_layer"], name)


@dataclass(eq=False)
class _Run:
    """One run of a layer's own processor: what it is given, and what is kept of it."""

    given: Mapping[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    heads: list[Tensor] = field(default_factory=list)


class GuidedProcessor:
    """A layer's own processor, and the guidance of its joined heads.

    Parameters
    ----------
    inner : object
        The layer's own processor.
    state : AttentionState
        Shared by all layers.
    name : str
        The layer's name, for messages.
    """

    def __init__(self, inner: Any, state: AttentionState, name: str) -> None:
        super().__init__()
        self.inner, self.state, self.name = inner, state, name
        # Keys and values of the negative text, one row for each image.
        self.negative: dict[str, Tensor] = {}

    def attend(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Called in place of the layer's own processor, with the same arguments and result."""
        rows = self.state.rows
        if rows is None or encoder_hidden_states is None:
            return self.inner(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )
        if rows.twins is not None:
            # The twins' image tokens are those of their images.
            hidden_states = torch.cat(
                [hidden_states[: rows.twins.start], hidden_states[rows.guided]]
            )
        run = _Run()

        def guide(heads: Tensor) -> Tensor:
            given = (hidden_states, encoder_hidden_states, attention_mask, kwargs)
            part = self._guided(attn, rows, run, heads, *given)
            return torch.cat([heads[: rows.guided.start], part, heads[rows.guided.stop :]])

        output = self._own(
            attn, run, hidden_states, encoder_hidden_states, attention_mask, kwargs, guide
        )
        if len(run.heads) != 1:
            raise ValueError(
                f"the processor of {self.name}, {type(self.inner).__name__}, cannot be combined "
                f"with {type(self.state.rule).__name__}: it must hand its joined heads to "
                f"attn.to_out[0] once, and did so {len(run.heads)} times; set another processor"
            )
        return output

    # ------------------------------------------------------------------ the layer's own processor

    def _own(
        self,
        attn: Any,
        run: _Run,
        hidden_states: Tensor,
        text: Any,
        mask: Tensor | None,
        kwargs: dict[str, Any],
        change: Callable[[Tensor], Tensor] | None,
    ) -> Any:
        """Run the layer's own processor; without ``change`` nothing is projected."""

        def watched(name: str) -> Callable[..., Tensor]:
            def project(value: Tensor, *args: Any) -> Tensor:
                if name in run.given:
                    return run.given[name]
                run.kept[name] = getattr(attn, name)(value, *args)
                return run.kept[name]

            return project

        def project_heads(heads: Tensor, *args: Any) -> Tensor:
            run.heads.append(heads)
            return heads if change is None else attn.to_out[0](change(heads), *args)

        parts: dict[str, Any] = {
            name: watched(name)
            for name in (*PROJECTIONS, *FUSED)
            if getattr(attn, name, None) is not None
        }
        parts["to_out"] = [project_heads, *list(attn.to_out)[1:]]
        if change is None and getattr(attn, "to_add_out", None) is not None:
            parts["to_add_out"] = _unchanged
        return self.inner(
            _Watched(attn, parts),
            hidden_states,
            encoder_hidden_states=text,
            attention_mask=mask,
            **kwargs,
        )

    def _heads(
        self,
        attn: Any,
        given: Mapping[str, Tensor],
        hidden_states: Tensor,
        text: Any,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The joined heads of a run of the layer's own processor, with given projections."""
        run = _Run(given)
        self._own(attn, run, hidden_states, text, mask, kwargs, None)
        return run.heads[0]

    # ------------------------------------------------------------------ guidance

    def _guided(
        self,
        attn: Any,
        rows: Rows,
        run: _Run,
        heads: Tensor,
        hidden_states: Tensor,
        text: Any,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """The guided heads of the guided rows, from those of the whole batch."""
        raise NotImplementedError

    def _combined(self, rows: Rows, whole: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """The guided heads; ``whole`` are the rows' heads with what pictures add to ``own``."""
        guided = guided_heads(self.state.rule, own, other, rows.opening)
        return guided if own is whole else whole + (guided - own)

    def _needs(self, run: _Run, names: tuple[str, ...]) -> None:
        if missing := [name for name in names if name not in run.kept]:
            raise ValueError(
                f"the processor of {self.name}, {type(self.inner).__name__}, cannot be combined "
                f"with {type(self.state.rule).__name__}, whose values change sign: it must project "
                f"with attn.{missing[0]}; set another processor, and unfuse fused projections "
                "(pipe.unfuse_qkv_projections())"
            )


class CrossAttention(GuidedProcessor):
    """Guides a layer whose keys and values are of the text alone; arguments as for its base."""

    def _guided(
        self,
        attn: Any,
        rows: Rows,
        run: _Run,
        heads: Tensor,
        hidden_states: Tensor,
        text: Any,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        guided, state = rows.guided, self.state
        at = slice(None) if rows.images is None else rows.images.to(state.text.device)
        negative = state.text[at]
        bias = None if state.bias is None else state.bias[at]
        pictures = isinstance(text, tuple)
        positive = (text[0] if pictures else text)[guided]
        own_mask = _rows_of(mask, guided, attn)
        kwargs = {name: value for name, value in kwargs.items() if name != "ip_adapter_masks"}
        part, queries = hidden_states[guided], _rows_in(run.kept, ("to_q",), guided)

        def heads_of(words: Tensor, bias: Tensor | None, given: Mapping[str, Tensor]) -> Tensor:
            shown: Any = (words, []) if pictures else words
            return self._heads(attn, {**queries, **given}, part, shown, bias, kwargs)

        whole = own = heads[guided]
        projections = _rows_in(run.kept, ("to_k", "to_v", "to_kv"), guided)
        if pictures:
            own = heads_of(positive, own_mask, projections)
        if not isinstance(state.rule, ValueSignFlip):
            found = heads_of(negative, bias, self._negative(attn, at))
            return self._combined(rows, whole, own, found)
        self._needs(run, ("to_kv",) if "to_kv" in run.kept else ("to_k", "to_v"))
        flipped = self._flipped(attn, negative, self._negative(attn, at))
        both = {
            name: torch.cat([projections[name], flipped[name]], dim=1)
            for name in projections
            if name in flipped
        }
        words = torch.cat([positive, negative], dim=1)
        joint = _joined(own_mask, bias, positive, negative)
        return self._combined(rows, whole, own, heads_of(words, joint, both))

    def _negative(self, attn: Any, at: Any) -> dict[str, Tensor]:
        """Keys and values of the negative text for some images, made at the first call."""
        if attn.norm_cross is not None:
            return {}  # the processor norms the text first
        if not self.negative:
            fused = getattr(attn, "fused_projections", False)
            for name in ("to_kv",) if fused else ("to_k", "to_v"):
                self.negative[name] = getattr(attn, name)(self.state.text)
        return {name: value[at] for name, value in self.negative.items()}

    def _flipped(
        self, attn: Any, negative: Tensor, given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Keys and values of the negative text, the values times -scale."""
        if not given:
            words = attn.norm_encoder_hidden_states(negative)
            given = {"to_k": attn.to_k(words), "to_v": attn.to_v(words)}
        factor = -self.state.rule.strength
        flipped = dict(given)
        if "to_v" in flipped:
            flipped["to_v"] = factor * flipped["to_v"]
        if "to_kv" in flipped:
            keys, values = flipped["to_kv"].chunk(2, dim=-1)
            flipped["to_kv"] = torch.cat([keys, factor * values], dim=-1)
        return flipped


class JointAttention(GuidedProcessor):
    """Guides the image tokens of a layer in which text and image attend to each other.

    Arguments as for :class:`GuidedProcessor`.
    """

    def _guided(
        self,
        attn: Any,
        rows: Rows,
        run: _Run,
        heads: Tensor,
        hidden_states: Tensor,
        text: Any,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        guided, twins = rows.guided, rows.twins
        assert twins is not None
        pictures = kwargs.get("ip_hidden_states") is not None
        kwargs = {n: v for n, v in kwargs.items() if n not in ("ip_hidden_states", "temb")}
        kept = run.kept
        whole = own = heads[guided]
        other = heads[twins]
        if pictures:
            pair = [_rows_in(kept, PROJECTIONS, at) for at in (guided, twins)]
            own, other = (
                self._heads(attn, given, hidden_states[at], text[at], mask, kwargs)
                for given, at in zip(pair, (guided, twins), strict=True)
            )
        if isinstance(self.state.rule, ValueSignFlip):
            self._needs(run, PROJECTIONS)
            given = _rows_in(kept, PROJECTIONS, guided)
            factors = {"add_k_proj": 1.0, "add_v_proj": -self.state.rule.strength}
            for name, factor in factors.items():
                given[name] = torch.cat([given[name], factor * kept[name][twins]], dim=1)
            other = self._heads(attn, given, hidden_states[guided], text[guided], mask, kwargs)
        return self._combined(rows, whole, own, other)


# ---------------------------------------------------------------------- in and out


def cross_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers of a network that attend to a text from their image alone."""
    for name, module in network.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            yield name, module


def joint_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and layers of a network in which text and image attend to each other."""
    for name, module in network.named_modules():
        if isinstance(module, Attention) and module.context_pre_only is not None:
            yield name, module


class ProcessorsInPlace:
    """Guided processors in the layers of a network; :func:`guiding` puts them in and out.

    Attributes
    ----------
    layers : list of (layer, holder, own, guided)
        Each layer, the dictionary that holds its processor, that processor, and the guided one.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Any, dict[str, Any], Any, GuidedProcessor]] = []

    def check(self) -> None:
        """Raise a ValueError if another processor was set in a layer meanwhile."""
        for layer, _, _, guided in self.layers:
            if layer.processor is not guided:
                raise ValueError(
                    f"the attention processor of {guided.name} must stay the same during a call, "
                    f"and a {type(layer.processor).__name__} was set in it: set processors, "
                    "slicing and adapters before the call"
                )


@contextmanager
def guiding(
    network: nn.Module, state: AttentionState, kind: type[GuidedProcessor]
) -> Iterator[ProcessorsInPlace]:
    """Put guided processors into a network within a block, and its own ones back after it.

    Parameters
    ----------
    network : nn.Module
        The network.
    state : AttentionState
        What they share.
    kind : type
        :class:`CrossAttention` or :class:`JointAttention`.

    Yields
    ------
    ProcessorsInPlace
    """
    found = joint_layers(network) if kind is JointAttention else cross_layers(network)
    placed = ProcessorsInPlace()
    try:
        for name, layer in list(found):
            # An IP-Adapter's processor has weights, and is a submodule of its layer.
            holder = layer._modules if "processor" in layer._modules else layer.__dict__
            own = holder["processor"]
            inner: Any = type(own)
            guided = _kind(kind, inner)(own, state, name)  # type: ignore[arg-type]
            holder["processor"] = guided
            placed.layers.append((layer, holder, own, guided))
        yield placed
    finally:
        for _, holder, own, guided in placed.layers:
            # One that somebody else has set since stays.
            if holder.get("processor") is guided:
                holder["processor"] = own


@functools.cache
def _kind(kind: Any, inner: Any) -> Any:
    """The class of guided processors around those of a class.

    Attention layers read from the signature of the call which keyword arguments it takes, and
    processors with weights must be modules.
    """
    bases = (kind, nn.Module) if issubclass(inner, nn.Module) else (kind,)

    @functools.wraps(inner.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.attend(*args, **kwargs)

    return type(f"Guided{inner.__name__}", bases, {"__call__": call})


def _unchanged(value: Tensor) -> Tensor:
    return value


def _rows_in(kept: Mapping[str, Tensor], names: tuple[str, ...], at: Any) -> dict[str, Tensor]:
    """Some rows of what was kept under some names."""
    return {name: kept[name][at] for name in names if name in kept}


def _rows_of(mask: Tensor | None, guided: slice, attn: Any) -> Tensor | None:
    """A mask's rows, of which there may be one for all, or one for each row and head."""
    if mask is None or len(mask) == 1:
        return mask
    return mask[guided]


def _joined(
    own: Tensor | None, other: Tensor | None, positive: Tensor, negative: Tensor
) -> Tensor | None:
    """The bias of both texts' tokens, from that of each, if there is any."""
    if own is None and other is None:
        return None
    biases = []
    for bias, words in ((own, positive), (other, negative)):
        blank = words.new_zeros(len(words), 1, words.shape[1])
        biases.append(blank if bias is None else bias.to(words).expand_as(blank))
    return torch.cat(biases, dim=-1)
