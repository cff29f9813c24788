"""Guided attention against textbooks: exact mixtures, and networks evaluated by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dng_math import (
    NegativeAwareSubtraction,
    NormalizedAttention,
    ValueSignFlip,
    predict,
)
from dng_models.pipelines import tiny
from dng_models.pipelines.attention_processors import (
    AttentionState,
    CrossAttention,
    Rows,
    guided_heads,
    guiding,
)
from dng_models.pipelines.hook import apply_guidance
from tests.helpers.mixtures import moderate, points
from tests.helpers.versions import before

PROMPT, NEGATIVE = "A classic British breakfast", "egg, sausage"
RULES: dict[str, Any] = {
    "nag": NormalizedAttention(4.0, tau=1.2, alpha=0.6),
    "nag without a limit": NormalizedAttention(1.5, tau=math.inf, alpha=1.0),
    "vsf": ValueSignFlip(1.5),
    "nasa": NegativeAwareSubtraction(0.4),
}
each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
# Float64 through a network of a few layers.
ROUNDING = 1e-10


# ---------------------------------------------------------------------- exact mixtures


class PosteriorMean(nn.Module):
    """An attention layer whose output is E[x0 | x] of an isotropic mixture, in D + 1 numbers.

    The query is (x, 1).  A token stands for a component, and holds the two linear forms of x that
    are its logit, and the value m_k + (alpha v_k / V_k)(x - alpha m_k), which is made for an x.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        width = dim + 1
        self.attn2 = Attention(width, cross_attention_dim=2 * width, heads=1, dim_head=width)
        self.double()
        eye = torch.eye(width, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.attn2.parameters():
                parameter.zero_()
            self.attn2.to_q.weight.copy_(eye)
            self.attn2.to_k.weight[:, :width] = eye
            self.attn2.to_v.weight[:, width:] = eye
            self.attn2.to_out[0].weight.copy_(eye)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        query = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        found: Tensor = self.attn2(query[:, None], encoder_hidden_states=text)
        return found[:, 0, :-1]


def tokens(mixture: Any, chosen: list[int], x: np.ndarray, alpha: float, sigma: float) -> Tensor:
    """The components' tokens for every x, shape (N, K, 2 (D + 1))."""
    n, width = len(x), mixture.dim + 1
    text = np.zeros((n, len(chosen), 2 * width))
    for place, k in enumerate(chosen):
        mean, variance = mixture.means[k], mixture.covariances[k]
        total = alpha**2 * variance + sigma**2
        key = np.append(
            alpha * mean / total,
            math.log(mixture.weights[k]) - alpha**2 * mean @ mean / (2 * total),
        )
        text[:, place, :width] = key * math.sqrt(width)  # the layer divides by it
        text[:, place, width:-1] = mean + alpha * variance / total * (x - alpha * mean)
    return torch.from_numpy(text)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.99), st.sampled_from(sorted(RULES)))
@settings(max_examples=15)
def test_exact_mixtures_through_the_processors(seed: int, alpha: float, name: str) -> None:
    rule, sigma, forbidden = RULES[name], math.sqrt(1.0 - alpha**2), [0, 3]
    mixture = moderate(seed, "spherical", 5, 3)
    # One variance for all: only then the logits are linear in x.
    mixture = type(mixture)(mixture.weights, mixture.means, np.full(5, 0.3))
    x = points(mixture, seed)
    expected = predict(
        mixture, x, alpha, sigma, rule, forbidden=forbidden, prediction_type="sample"
    )
    # The positive text of VSF is the rest, of the others the whole mixture.
    positive = [1, 2, 4] if isinstance(rule, ValueSignFlip) else [0, 1, 2, 3, 4]
    text, other = (tokens(mixture, part, x, alpha, sigma) for part in (positive, forbidden))
    layer, shown = PosteriorMean(3), torch.from_numpy(x)
    state = AttentionState(rule, other, rows=Rows(slice(0, len(x))))
    with torch.no_grad(), guiding(layer, state, CrossAttention):
        found = layer(shown, text)
        state.rows = None
        plain = layer(shown, text)
    np.testing.assert_allclose(found, expected.guided, rtol=1e-10, atol=1e-10)
    if not isinstance(rule, ValueSignFlip):
        np.testing.assert_allclose(plain, expected.base, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_compiled_layer_knows_its_rule() -> None:
    mixture = moderate(3, "spherical", 3, 2)
    x = points(mixture, 5)
    texts = [tokens(mixture, part, x, 0.7, 0.7) for part in ([0, 1, 2], [0], [2])]
    layer, shown = PosteriorMean(2), torch.from_numpy(x)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    def outputs(network: Any) -> list[Tensor]:
        found = [network(shown, texts[0])]
        for rule in (RULES["nag"], NormalizedAttention(1.0), ValueSignFlip(0.5)):
            for other in texts[1:]:
                state = AttentionState(rule, other, rows=Rows(slice(0, len(x))))
                with guiding(layer, state, CrossAttention):
                    # The second time the negative's keys are there.
                    found += [network(shown, texts[0]), network(shown, texts[0])]
        return [*found, network(shown, texts[0])]

    with torch.no_grad():
        for one, another in zip(outputs(compiled), outputs(layer), strict=True):
            torch.testing.assert_close(one, another, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


# ---------------------------------------------------------------------- a textbook's attention


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention with joined heads, written out; (B, tokens, width) each."""
    b, n, width = q.shape
    split = [t.reshape(b, -1, heads, width // heads) for t in (q, k, v)]
    logits = torch.einsum("bqhd,bkhd->bhqk", split[0], split[1]) / math.sqrt(width // heads)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights, split[2]).reshape(b, n, width)


def pushed(rule: Any, plus: Tensor, minus: Tensor) -> Tensor:
    """NAG and NASA, token by token."""
    if isinstance(rule, NegativeAwareSubtraction):
        return plus - rule.scale * minus
    z = plus + rule.scale * (plus - minus)
    ratio = z.norm(p=1, dim=-1, keepdim=True) / plus.norm(p=1, dim=-1, keepdim=True)
    z = z * torch.minimum(ratio, torch.full_like(ratio, rule.tau)) / ratio
    return rule.alpha * z + (1 - rule.alpha) * plus


class Textbook:
    """Cross-attention of a UNet in a textbook's words, for a batch [unconditional, positive]."""

    def __init__(self, rule: Any, negative: Tensor, guided: int) -> None:
        self.rule, self.negative, self.guided = rule, negative, guided

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
    ) -> Tensor:
        assert attention_mask is None
        text = encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        z = attended(q, k, v, attn.heads)
        new = slice(len(z) - self.guided, None)
        other_k, other_v = attn.to_k(self.negative), attn.to_v(self.negative)
        if isinstance(self.rule, ValueSignFlip):
            keys = torch.cat([k[new], other_k], 1)
            values = torch.cat([v[new], -self.rule.scale * other_v], 1)
            z[new] = attended(q[new], keys, values, attn.heads)
        else:
            minus = attended(q[new], other_k, other_v, attn.heads)
            z[new] = pushed(self.rule, z[new], minus)
        return attn.to_out[0](z)


def run(pipe: Any, seeds: tuple[int, ...] = (0, 1), **options: Any) -> Any:
    """Latents; one generator an image."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "num_images_per_prompt": len(seeds),
        "output_type": "latent",
        "generator": made,
    }
    return pipe(**{**given, **options}).images


def apart(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def pipe_of() -> Callable[[str], Any]:
    """Pipelines in float64, built once."""
    if before("transformers", "5"):
        pytest.skip("transformers 4 has no mask for a text encoder in float64")
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            build: Any = {
                "sd": tiny.tiny_stable_diffusion,
                "xl": tiny.tiny_stable_diffusion_xl,
                "sd3": tiny.tiny_stable_diffusion_3,
            }[name]
            made[name] = build(0).to(torch.float64)
        return made[name]

    return get


@each_rule
@pytest.mark.parametrize(("name", "scale"), [("sd", 4.0), ("xl", 0.0)])
def test_a_unet_attends_as_in_a_textbook(
    pipe_of: Callable[[str], Any], name: str, scale: float, rule: Any
) -> None:
    pipe = pipe_of(name)
    with apply_guidance(pipe, rule):
        found = run(pipe, negative_prompt=NEGATIVE, guidance_scale=scale)
    negative = pipe.encode_prompt(
        NEGATIVE,
        device=torch.device("cpu"),
        num_images_per_prompt=2,
        do_classifier_free_guidance=False,
    )[0]
    by_hand = copy.deepcopy(pipe)
    processors = {
        key: Textbook(rule, negative, 2) if "attn2" in key else own
        for key, own in by_hand.unet.attn_processors.items()
    }
    by_hand.unet.set_attn_processor(processors)
    assert apart(found, run(by_hand, guidance_scale=scale)) < ROUNDING
    assert apart(found, run(pipe, guidance_scale=scale)) > 1e-3


def transformed(
    network: Any, rule: Any, x: Tensor, t: Tensor, text: Tensor, pooled: Tensor, negative: Tensor
) -> Tensor:
    """SD3's transformer with two streams of text, of which the image attends to both."""
    height, width = x.shape[-2:]
    image = network.pos_embed(x)
    temb = network.time_text_embed(t, pooled)
    streams = [network.context_embedder(words) for words in (text, negative)]
    for block in network.transformer_blocks:
        attn, heads = block.attn, block.attn.heads
        normed, gate, shift, scale, gate_mlp = block.norm1(image, emb=temb)
        q, k, v = attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)
        seen, own = [], []
        for words in streams:
            if block.context_pre_only:
                context, rest = block.norm1_context(words, temb), ()
            else:
                context, *rest = block.norm1_context(words, emb=temb)
            projections = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
            own.append(([project(context) for project in projections], rest))
            joined = [torch.cat(pair, 1) for pair in zip((q, k, v), own[-1][0], strict=True)]
            seen.append(attended(*joined, heads))
        plus, minus = (z[:, : q.shape[1]] for z in seen)
        if isinstance(rule, ValueSignFlip):
            (_, k_plus, v_plus), (_, k_minus, v_minus) = own[0][0], own[1][0]
            keys = torch.cat([k, k_plus, k_minus], 1)
            z = attended(q, keys, torch.cat([v, v_plus, -rule.scale * v_minus], 1), heads)
        else:
            z = pushed(rule, plus, minus)
        image = image + gate[:, None] * attn.to_out[0](z)
        fed = block.norm2(image) * (1 + scale[:, None]) + shift[:, None]
        image = image + gate_mlp[:, None] * block.ff(fed)
        if block.context_pre_only:
            break
        for i, words in enumerate(streams):
            c_gate, c_shift, c_scale, c_gate_mlp = own[i][1]
            words = words + c_gate[:, None] * attn.to_add_out(seen[i][:, q.shape[1] :])
            fed = block.norm2_context(words) * (1 + c_scale[:, None]) + c_shift[:, None]
            streams[i] = words + c_gate_mlp[:, None] * block.ff_context(fed)
    out = network.proj_out(network.norm_out(image, temb))
    p = network.config.patch_size
    out = out.reshape(len(x), height // p, width // p, p, p, network.out_channels)
    return torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, height, width)


@pytest.mark.parametrize(
    ("rule", "scale"), [(RULES["nag"], 1.0), *((rule, 4.0) for rule in RULES.values())]
)
def test_a_joint_transformer_attends_as_in_a_textbook(
    pipe_of: Callable[[str], Any], rule: Any, scale: float
) -> None:
    pipe = pipe_of("sd3")
    seen: list[Any] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs, output[0]))

    watching = pipe.transformer.register_forward_hook(look, with_kwargs=True)
    try:
        with apply_guidance(pipe, rule):
            run(pipe, negative_prompt=NEGATIVE, guidance_scale=scale, max_sequence_length=16)
    finally:
        watching.remove()
    with torch.no_grad():
        negative = pipe.encode_prompt(
            NEGATIVE,
            None,
            None,
            num_images_per_prompt=2,
            do_classifier_free_guidance=False,
            max_sequence_length=16,
        )[0]
        for given_, output in seen[-2:]:
            x, t = given_["hidden_states"], given_["timestep"]
            text, pooled = given_["encoder_hidden_states"], given_["pooled_projections"]
            network = pipe.transformer
            assert len(x) == (4 if scale > 1 else 2)
            expected = transformed(network, rule, x[-2:], t[-2:], text[-2:], pooled[-2:], negative)
            assert apart(output[-2:], expected) < ROUNDING
            if scale > 1:
                plain = network(x, text, pooled, t).sample
                assert apart(output[:2], plain[:2]) < ROUNDING


# ---------------------------------------------------------------------- heads


def test_heads_in_half_precision_are_combined_in_single() -> None:
    generator = torch.Generator().manual_seed(2)
    plus, minus = torch.randn(2, 2, 3, 8, generator=generator).bfloat16()
    rule = NormalizedAttention(4.0)
    found = guided_heads(rule, plus, minus)
    assert found.dtype == torch.bfloat16
    wide = pushed(rule, plus.double(), minus.double())
    # One rounding, by a part in 2^9, of what float64 gives.
    assert ((found - wide).abs() <= 2.0**-8 * wide.abs()).all()
    closed = guided_heads(rule, plus, minus, torch.tensor([0.0, 1.0]))
    assert torch.equal(closed[0], plus[0]) and torch.equal(closed[1], found[1])


def test_a_token_is_guided_by_itself() -> None:
    generator = torch.Generator().manual_seed(3)
    plus, minus = torch.randn(2, 2, 3, 8, generator=generator)
    found = partial(guided_heads, NormalizedAttention(4.0))
    other = plus.clone()
    other[1, 2] *= 50.0
    changed = found(other, minus) != found(plus, minus)
    assert changed[1, 2].any() and changed.sum() == changed[1, 2].sum()
