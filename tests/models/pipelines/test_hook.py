"""Guidance on the networks of diffusers pipelines, on tiny ones with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from dng_math import (
    ClassifierFreeGuidance,
    ContrastiveCFG,
    DynamicNegativeGuidance,
    FeedbackGuidance,
    LimitedInterval,
    NegativePrompting,
    PaperTracker,
    PerpNeg,
    SafeLatentDiffusion,
    Unguided,
)
from dng_models.pipelines import chain_posterior, chain_prediction, tiny, trace
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.hook import apply_guidance, remove_guidance
from dng_models.pipelines.schedulers import PosteriorFlowScheduler
from tests.helpers import textbook
from tests.helpers.families.base import attends_in_bfloat16

tracked_dng = DynamicNegativeGuidance.tracked

PROMPT, NEGATIVE = "A classic British breakfast", "egg, sausage"
STEPS = 6
ODDS = 0.01 / 0.99

# Float32 networks: a batch of another shape, or the same sum in another order, differs by a few
# roundings (6e-8) of latents up to 30 a step, and the networks hand them on.
CLOSE = 1e-5


def ddpm(pipe: Any) -> Any:
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    return pipe


def noisy_flow(pipe: Any) -> Any:
    pipe.scheduler = PosteriorFlowScheduler.from_config(pipe.scheduler.config)
    return pipe


BUILD: dict[str, Callable[[], Any]] = {
    "sd": lambda: ddpm(tiny.tiny_stable_diffusion(0)),
    "v": lambda: ddpm(tiny.tiny_stable_diffusion(0, prediction_type="v_prediction")),
    "xl": lambda: ddpm(tiny.tiny_stable_diffusion_xl(0)),
    "sd3": lambda: noisy_flow(tiny.tiny_stable_diffusion_3(0)),
    "controlnet": lambda: ddpm(tiny.tiny_controlnet(0)),
    "img2img": lambda: StableDiffusionImg2ImgPipeline(
        **ddpm(tiny.tiny_stable_diffusion(0)).components, requires_safety_checker=False
    ),
}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {}


@pytest.fixture
def pipe_of(pipes: dict[str, Any]) -> Callable[[str], Any]:
    """Built once, unguided whenever a test asks for one."""

    def get(name: str) -> Any:
        if name not in pipes:
            pipes[name] = BUILD[name]()
            pipes[name].set_progress_bar_config(disable=True)
        remove_guidance(pipes[name])
        return pipes[name]

    return get


@pytest.fixture
def pipe(pipe_of: Callable[[str], Any]) -> Any:
    return pipe_of("sd")


def run(pipe: Any, seeds: tuple[int, ...] = (0, 1), **options: Any) -> Any:
    """Latents; one generator an image."""
    given: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "num_inference_steps": STEPS,
        "num_images_per_prompt": len(seeds),
        "output_type": "latent",
    }
    name = type(pipe).__name__
    if "ControlNet" in name or "Img2Img" in name:
        given["image"] = Image.new("RGB", (16, 16), "green")
    if "Img2Img" in name:
        given["strength"] = 0.7
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(generator=generator, **{**given, **options}).images


def apart(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# ---------------------------------------------------------------------- what it must reduce to


@pytest.mark.parametrize("name", [n for n in BUILD if n != "v"])
def test_scale_0_is_plain_classifier_free_guidance(
    pipe_of: Callable[[str], Any], name: str
) -> None:
    pipe = pipe_of(name)
    plain = run(pipe, negative_prompt=None, guidance_scale=6.5)
    for rule in (tracked_dng(0.0), Unguided()):
        with apply_guidance(pipe, rule, cfg_scale=6.5):
            # The pipeline's own scale is without effect.
            assert apart(run(pipe, guidance_scale=2.0), plain) < CLOSE
    assert torch.equal(run(pipe, negative_prompt=None, guidance_scale=6.5), plain)


@pytest.mark.parametrize("name", BUILD)
def test_temperature_0_is_plain_negative_prompting(
    pipe_of: Callable[[str], Any], name: str
) -> None:
    pipe = pipe_of(name)
    stock = run(pipe, guidance_scale=1 + 300 * ODDS)
    with apply_guidance(pipe, tracked_dng(300, prior=0.01, temperature=0.0)) as trace:
        dynamic = run(pipe)
    with apply_guidance(pipe, NegativePrompting(300 * ODDS)):
        constant = run(pipe)
    assert apart(dynamic, stock) < CLOSE
    assert apart(constant, stock) < CLOSE
    np.testing.assert_allclose(trace.scale, 300 * ODDS, rtol=1e-5)
    with apply_guidance(pipe, tracked_dng(300, prior=0.01, temperature=1.0)):
        assert apart(run(pipe), stock) > 100 * CLOSE


def test_a_scale_that_the_call_is_given_is_dropped_aloud(pipe: Any) -> None:
    with apply_guidance(pipe, tracked_dng(40, prior=0.05)):
        expected = run(pipe)
        with pytest.warns(UserWarning, match="guidance_scale=5.0 of the.*cfg_scale=") as said:
            found = [run(pipe, guidance_scale=5.0) for _ in range(2)]
    assert len(said) == 1 and said[0].filename == __file__  # once, where the call is
    assert all(torch.equal(each, expected) for each in found)
    for rule in (ClassifierFreeGuidance(3.0), PerpNeg(2.0, 3.0)):
        with (
            apply_guidance(pipe, rule),
            pytest.warns(UserWarning, match="guidance_scale=5.0 of the.*has a scale of its own"),
        ):
            run(pipe, guidance_scale=5.0)
    # What stands for it is given: nothing is said (warnings are errors here).
    with apply_guidance(pipe, tracked_dng(40, prior=0.05), cfg_scale=5.0):
        found = run(pipe, guidance_scale=5.0)
    assert apart(found, expected) > 100 * CLOSE


# ---------------------------------------------------------------------- a hand-written loop


def latents_of(pipe: Any, seeds: tuple[int, ...], shape: tuple[int, ...] = (4, 8, 8)) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators, torch.cat([torch.randn(1, *shape, generator=g) for g in generators])


def loop(
    pipe: Any,
    ends: Callable[[int], textbook.Interval],
    rule: DynamicNegativeGuidance,
    negatives: tuple[str, ...],
    cfg_scale: float | None = None,
    scaled: Callable[[int], float] = lambda step: 1.0,
) -> tuple[Any, np.ndarray]:
    """A guided pipeline as one writes it by hand, each prompt evaluated alone, in float64.

    ``ends`` in the coordinates of the scheduler's latents, which the network is shown times
    ``scaled``; for noise predictions.
    """
    posterior = rule.posterior
    prompts = [PROMPT, "", *negatives]
    encoded = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in prompts]
    generators, latents = latents_of(pipe, (0, 1))
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    latents = latents * scheduler.init_noise_sigma
    log_p = np.full((len(negatives), 2), np.log(posterior.prior))
    states = [log_p]
    for step, t in enumerate(scheduler.timesteps):
        shown = latents * scaled(step)
        with torch.no_grad():
            eps, uncond, *eps_neg = (
                pipe.unet(shown, t, e.expand(2, -1, -1)).sample.double().numpy() for e in encoded
            )
        p = np.exp(log_p)
        base = eps if cfg_scale is None else textbook.cfg(uncond, eps, cfg_scale)
        rest = 1.0 - p.sum(axis=0)
        guided = base - sum(
            textbook.per_sample(rule.guidance_scale * own / rest, eps) * (other - eps)
            for own, other in zip(p, eps_neg, strict=True)
        )
        x = latents.double().numpy()
        latents = scheduler.step(
            torch.from_numpy(guided).float(), t, latents, generator=generators
        ).prev_sample
        at = ends(step)
        v = textbook.step_variance(*at, "small")
        if v > 0:
            mean, *means = (textbook.step_mean(*at, x, e) for e in (eps, *eps_neg))
            log_p = np.stack(
                [
                    textbook.paper_update(
                        own,
                        latents.double().numpy(),
                        mean,
                        other,
                        v,
                        posterior.temperature,
                        posterior.offset,
                        posterior.p_min,
                        posterior.p_max,
                    )
                    for own, other in zip(log_p, means, strict=True)
                ]
            )
        states.append(log_p)
    return latents, np.stack(states[:-1])


def ddpm_ends(pipe: Any) -> Callable[[int], textbook.Interval]:
    bars = pipe.scheduler.alphas_cumprod.double().numpy()
    copied = copy.deepcopy(pipe.scheduler)
    copied.set_timesteps(STEPS)
    times = [*copied.timesteps.tolist()]

    def ends(step: int) -> textbook.Interval:
        t = times[step]
        s = t - copied.config.num_train_timesteps // STEPS
        before = bars[s] if s >= 0 else 1.0
        return textbook.Interval(
            np.sqrt(bars[t]), np.sqrt(1 - bars[t]), np.sqrt(before), np.sqrt(1 - before)
        )

    return ends


@pytest.mark.parametrize("cfg_scale", [None, 4.0])
@pytest.mark.parametrize("negatives", [(NEGATIVE,), ("egg", "sausage", "tea")])
def test_it_agrees_with_a_loop_written_by_hand(
    pipe: Any, cfg_scale: float | None, negatives: tuple[str, ...]
) -> None:
    rule = tracked_dng(40, prior=0.02, temperature=0.7, offset=0.002)
    expected, log_posterior = loop(pipe, ddpm_ends(pipe), rule, negatives, cfg_scale)
    several = list(negatives) if len(negatives) > 1 else None
    with apply_guidance(pipe, rule, negative_prompts=several, cfg_scale=cfg_scale) as trace:
        found = run(pipe, negative_prompt=NEGATIVE if several is None else None)
    assert apart(found, expected) < CLOSE
    assert trace.log_posterior is not None
    tracked = trace.log_posterior if several else trace.log_posterior[:, None]
    np.testing.assert_allclose(tracked, log_posterior, atol=CLOSE * 10)
    assert np.abs(np.diff(log_posterior[:, 0], axis=0)).max() > 0.05  # it does move


def test_the_coordinates_of_euler_ancestral(pipe: Any) -> None:
    # Its latents are x0 + sigma eps, and the network sees them over sqrt(sigma^2 + 1).
    stock = pipe.scheduler
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(stock.config)
    try:
        pipe.scheduler.set_timesteps(STEPS)
        sigmas = pipe.scheduler.sigmas.double().numpy()
        rule = tracked_dng(40, prior=0.02, temperature=0.7)
        expected, log_posterior = loop(
            pipe,
            lambda step: textbook.Interval(1.0, sigmas[step], 1.0, sigmas[step + 1]),
            rule,
            (NEGATIVE,),
            None,
            lambda step: 1.0 / np.sqrt(sigmas[step] ** 2 + 1.0),
        )
        with apply_guidance(pipe, rule) as trace:
            found = run(pipe)
        assert apart(found, expected) < CLOSE
        np.testing.assert_allclose(trace.log_posterior, log_posterior[:, 0], atol=CLOSE * 10)
    finally:
        pipe.scheduler = stock


# ---------------------------------------------------------------------- the other rules


def predictions(pipe: Any, shown: Any, t: Any) -> tuple[np.ndarray, ...]:
    """Positive, negative and unconditional, of what the network was shown."""
    found = []
    for text in (PROMPT, NEGATIVE, ""):
        embedded = pipe.encode_prompt(text, "cpu", 1, False)[0]
        with torch.no_grad():
            found.append(pipe.unet(shown, t, embedded.expand(len(shown), -1, -1)).sample)
    return tuple(p.double().numpy() for p in found)


def test_the_rules_differ_in_one_word(pipe: Any) -> None:
    expected: dict[Any, Callable[..., np.ndarray]] = {
        NegativePrompting(1.5): lambda p, n, u: textbook.negative_prompting(p, n, 1.5),
        ContrastiveCFG(1.5, 1e-2): lambda p, n, u: textbook.contrastive_cfg(p, n, 1.5, 1e-2),
        SafeLatentDiffusion(1.5, threshold=0.01): lambda p, n, u: textbook.sld(
            p, n, np.zeros_like(p), 0, 1.5, 0.01
        )[0],
        PerpNeg(1.5, 5.0): lambda p, n, u: textbook.perp_neg(u, n, p - u, 1.5) + 5.0 * (p - u),
        tracked_dng(20.0, 0.1): lambda p, n, u: textbook.dng(p, n, np.full(2, 0.1), 20.0),
        LimitedInterval(NegativePrompting(1.5), 0.0, 0.5): lambda p, n, u: p,
        ClassifierFreeGuidance(3.0): lambda p, n, u: textbook.cfg(n, p, 3.0),
        FeedbackGuidance(0.5): lambda p, n, u: textbook.fbg(n, p, np.zeros(2), 0.5),
    }
    for rule, formula in expected.items():
        seen: list[Any] = []
        with apply_guidance(pipe, rule) as trace:
            handle = pipe.unet.register_forward_hook(
                lambda module, args, kwargs, out, seen=seen: seen.append((args, out[0])),
                with_kwargs=True,
            )
            run(pipe)
            handle.remove()
        (shown, t), guided = seen[0][0][:2], seen[0][1]
        assert torch.equal(guided[:2], guided[2:])
        by_hand = formula(*predictions(pipe, shown[:2], t))
        np.testing.assert_allclose(guided[:2], by_hand, atol=CLOSE, err_msg=repr(rule))
        assert trace.scale.shape == (STEPS, 2)
        assert (trace.log_posterior is None) == (
            not isinstance(rule, DynamicNegativeGuidance | FeedbackGuidance)
        )


def test_one_concept_in_a_list_is_the_negative_prompt(pipe: Any) -> None:
    rule = tracked_dng(40, prior=0.05)
    with apply_guidance(pipe, rule) as plain:
        expected = run(pipe)
    with apply_guidance(pipe, rule, negative_prompts=[NEGATIVE]) as listed:
        found = run(pipe, negative_prompt="what is here does not matter without cfg_scale")
    assert apart(found, expected) < CLOSE
    assert plain.log_posterior is not None and listed.log_posterior is not None
    torch.testing.assert_close(listed.log_posterior[:, 0], plain.log_posterior)


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("options", [{}, {"divergence_probes": 1}, {"skip_below": 1.0}])
@pytest.mark.parametrize("name", ["sd", "sd3"])
@pytest.mark.thinned(2)
def test_the_seed_decides_whatever_else_is_in_the_batch(
    pipe_of: Callable[[str], Any], name: str, options: dict[str, Any]
) -> None:
    pipe = pipe_of(name)
    stock = pipe.scheduler
    if "divergence_probes" in options:
        kind = DDIMScheduler if name == "sd" else diffusers.FlowMatchEulerDiscreteScheduler
        pipe.scheduler = kind.from_config(stock.config)
    try:
        with apply_guidance(pipe, tracked_dng(40, prior=0.05), **options):
            together = run(pipe, (3, 4, 5))
            alone = run(pipe, (4,))
            moved = run(pipe, (7, 8, 6, 4))
    finally:
        pipe.scheduler = stock
    assert apart(alone[0], together[1]) < CLOSE
    assert apart(moved[3], together[1]) < CLOSE
    assert apart(moved[2], together[1]) > 0.1


def test_a_new_run_starts_anew(pipe: Any) -> None:
    rule = tracked_dng(40, prior=0.05)

    def stop(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with apply_guidance(pipe, rule) as trace:
        first = run(pipe)
        again = run(pipe)
        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=stop)
        after = run(pipe)
        larger = run(pipe, (0, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, after)
    assert apart(larger[:2], first) < CLOSE
    assert [len(record.steps) for record in trace.runs] == [6, 6, 3, 6, 6]
    assert trace.scale.shape == (STEPS, 3)
    assert [record.evaluations for record in trace.runs] == [12, 12, 6, 12, 18]
    assert trace.evaluations == 60 and trace.evaluations_saved == 0
    assert torch.equal(trace.runs[0].scale, trace.runs[3].scale)


def test_a_broken_image_breaks_no_other(pipe_of: Callable[[str], Any]) -> None:
    pipe = pipe_of("controlnet")
    options: dict[str, Any] = {"negative_prompts": ["egg", "tea"], "cfg_scale": 3.0}

    def spoil(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            kwargs["latents"][0] = np.nan
        return kwargs

    with apply_guidance(pipe, tracked_dng(4, prior=0.05), **options):
        expected = run(pipe)
        with pytest.warns(UserWarning, match="the latents were changed before step 2"):
            found = run(pipe, callback_on_step_end=spoil)
    assert found[0].isnan().all()
    assert torch.equal(found[1], expected[1])


def test_img2img_starts_where_it_starts(pipe_of: Callable[[str], Any]) -> None:
    pipe = pipe_of("img2img")
    with apply_guidance(pipe, tracked_dng(40, prior=0.05)) as trace:
        run(pipe)
        run(pipe, strength=1.0)
    assert [record.steps for record in trace.runs] == [[2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    for record in trace.runs:
        assert record.log_posterior is not None
        np.testing.assert_allclose(record.log_posterior[0].exp(), 0.05, rtol=1e-5)


def test_nothing_is_left_behind(pipe: Any, tmp_path: Any) -> None:
    plain = run(pipe)
    trace = apply_guidance(pipe, tracked_dng(40, prior=0.05))
    guided = run(pipe)
    pipe.save_pretrained(tmp_path)
    remove_guidance(pipe)
    remove_guidance(pipe)
    assert apart(guided, plain) > 1e-3
    assert torch.equal(run(pipe), plain)
    assert len(trace.runs) == 1
    assert torch.equal(run(StableDiffusionPipeline.from_pretrained(tmp_path)), plain)
    with (
        pytest.raises(KeyboardInterrupt),
        apply_guidance(pipe, tracked_dng(40)),
    ):
        raise KeyboardInterrupt
    assert torch.equal(run(pipe), plain)


@pytest.mark.filterwarnings("ignore:DDIMScheduler adds no noise")
def test_networks_in_half_precision(pipe: Any) -> None:
    if not attends_in_bfloat16():
        pytest.skip("this torch cannot attend in bfloat16 on this CPU")
    # Noise is drawn in the latents' precision, and otherwise in each: so there is none here.
    ode = copy.deepcopy(pipe)
    ode.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    half = copy.deepcopy(ode).to(torch.bfloat16)
    latents = latents_of(pipe, (0, 1))[1].bfloat16()
    rule = tracked_dng(40, prior=0.05)
    with apply_guidance(ode, rule) as trace:
        run(ode, latents=latents.float())
    with apply_guidance(half, rule, cfg_scale=3.0):
        # Latents are of the networks' kind, and so is what the scheduler is given.
        assert run(half, latents=latents).dtype == torch.bfloat16
    with apply_guidance(half, rule) as rounded:
        run(half, latents=latents)
    assert rounded.log_posterior is not None and trace.log_posterior is not None
    assert rounded.runs[0]._log_posterior[0].dtype == torch.float32
    # Latents of up to 30 are rounded by 0.06, against a small variance of 0.02 to 0.9 but at the
    # last step, and predictions by a hundredth of their difference.
    np.testing.assert_allclose(rounded.log_posterior[:-1], trace.log_posterior[:-1], atol=0.3)
    assert trace.log_posterior[:-1].std() > 0.5


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=pytest.mark.slow)
        for how in ("in place", "wrapped", "in place, later")
    ],
)
def test_compiled_networks(pipe: Any, how: str) -> None:
    from torch._dynamo.testing import CompileCounter

    rule = tracked_dng(40, prior=0.05)
    with apply_guidance(pipe, rule):
        expected = run(pipe)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = copy.deepcopy(pipe)
    if how == "wrapped":
        compiled.unet = torch.compile(compiled.unet, backend=counter)
    elif how == "in place":
        compiled.unet.compile(backend=counter, fullgraph=True)
    with apply_guidance(compiled, rule):
        if how == "in place, later":
            compiled.unet.compile(backend=counter)
        found = run(compiled)
        graphs = counter.frame_count
        assert graphs >= 1
        run(compiled, seeds=(2, 3))
        assert counter.frame_count == graphs  # the hook makes no step another graph
    assert apart(found, expected) < CLOSE
    torch._dynamo.reset()
    compiled.unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 77, 32))
    assert counter.frame_count > graphs  # and leaves the network compiled


def test_a_network_that_is_moved_around(pipe: Any) -> None:
    from accelerate import cpu_offload

    rule = tracked_dng(40, prior=0.05)
    with apply_guidance(pipe, rule, cfg_scale=3.0):
        expected = run(pipe)
    for first in (True, False):
        moved = copy.deepcopy(pipe)
        if first:
            cpu_offload(moved.unet, execution_device="cpu")
        with apply_guidance(moved, rule, cfg_scale=3.0):
            if not first:
                cpu_offload(moved.unet, execution_device="cpu")
            assert moved.unet.conv_in.weight.device.type == "meta"
            assert torch.equal(run(moved), expected)


def test_the_fused_kernel_in_place_of_the_reference(pipe: Any, monkeypatch: Any) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernel is compiled here, for a GPU: see the test below")
    rule = tracked_dng(40, prior=0.05)
    options: dict[str, Any] = {"negative_prompts": ["egg", "tea"], "cfg_scale": 3.0}
    with apply_guidance(pipe, rule, **options) as trace:
        expected = run(pipe, num_inference_steps=3)
    for module, name in ((chain_prediction, "guide"), (chain_posterior, "update_posterior")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), backend="triton"))
    with apply_guidance(pipe, rule, **options) as fused:
        found = run(pipe, num_inference_steps=3)
    assert apart(found, expected) < CLOSE
    torch.testing.assert_close(fused.log_posterior, trace.log_posterior, atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd", "xl", "sd3"])
def test_on_a_gpu(pipe_of: Callable[[str], Any], name: str) -> None:
    pipe = pipe_of(name)
    rule = tracked_dng(40, prior=0.05)
    with apply_guidance(pipe, rule, cfg_scale=3.0) as trace:
        expected = run(pipe)
    on_gpu = copy.deepcopy(pipe).to("cuda")
    with apply_guidance(on_gpu, rule, cfg_scale=3.0) as fused:
        found = run(on_gpu)
        again = run(on_gpu)
    assert found.is_cuda and torch.equal(found, again)
    # TF32 is off by default in matrix products, on in convolutions: three digits.
    assert apart(found.cpu(), expected) < 2e-2
    torch.testing.assert_close(fused.log_posterior, trace.log_posterior, atol=0.2, rtol=0.05)
    offloaded = copy.deepcopy(pipe)
    offloaded.enable_model_cpu_offload()
    with apply_guidance(offloaded, rule, cfg_scale=3.0):
        assert torch.equal(run(offloaded), found)


def test_a_transformer_that_predicts_variances_too() -> None:
    """PixArt: a doubled batch as elsewhere, prompts with masks, and twice the channels."""
    tokenizer = ByT5Tokenizer()
    torch.manual_seed(0)
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1)
        ),
        vae=tiny.tiny_stable_diffusion(0).vae,
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            cross_attention_dim=32,
            caption_channels=32,
            use_additional_conditions=False,
        ),
        scheduler=DDPMScheduler(clip_sample=False),
    )
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        part.eval()
    # A new network of this kind hardly says anything.
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    picture = {"height": 16, "width": 16, "clean_caption": False, "use_resolution_binning": False}
    stock = run(pipe, guidance_scale=1 + 300 * ODDS, **picture)
    with apply_guidance(pipe, tracked_dng(300, prior=0.01, temperature=0.0)):
        assert apart(run(pipe, **picture), stock) < CLOSE
    with apply_guidance(pipe, tracked_dng(300, prior=0.01)) as trace:
        assert apart(run(pipe, **picture), stock) > 100 * CLOSE
    assert trace.log_posterior is not None and trace.log_posterior.std() > 0
    stock = run(pipe, negative_prompt="", guidance_scale=2.0, **picture)
    with apply_guidance(pipe, tracked_dng(0.0), cfg_scale=2.0):
        assert apart(run(pipe, **picture), stock) < CLOSE


# ---------------------------------------------------------------------- inpainting


def inpaint(pipe: Any, channels: int) -> Any:
    parts = dict(pipe.components)
    if channels == 9:
        unet = copy.deepcopy(pipe.unet)
        conv = torch.nn.Conv2d(9, unet.conv_in.out_channels, 3, padding=1)
        unet.register_to_config(in_channels=9)
        unet.conv_in = conv
        parts["unet"] = unet
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def test_a_network_for_inpainting_sees_more_than_latents(pipe: Any) -> None:
    torch.manual_seed(0)
    painter = inpaint(pipe, 9)
    painter.set_progress_bar_config(disable=True)
    picture = {
        "image": Image.new("RGB", (16, 16), "green"),
        "mask_image": Image.new("L", (16, 16), 255),
        "height": 16,
        "width": 16,
    }
    plain = run(painter, negative_prompt=None, guidance_scale=3.0, **picture)
    with apply_guidance(painter, tracked_dng(0.0), cfg_scale=3.0) as trace:
        assert apart(run(painter, **picture), plain) < CLOSE
        assert trace.log_posterior is not None and trace.log_posterior.std() > 0
    painter.scheduler = DDIMScheduler.from_config(painter.scheduler.config)
    with apply_guidance(painter, tracked_dng(1.0), divergence_probes=1) as probed:
        run(painter, **picture)
        assert probed.log_posterior is not None and probed.log_posterior.std() > 0


def test_what_the_pipeline_overwrites_is_no_evidence(pipe: Any) -> None:
    painter = inpaint(pipe, 4)
    painter.set_progress_bar_config(disable=True)
    left = Image.fromarray(np.repeat(np.array([[255] * 8 + [0] * 8], dtype=np.uint8), 16, 0))
    picture = {"image": Image.new("RGB", (16, 16), "green"), "mask_image": left}
    picture |= {"height": 16, "width": 16, "strength": 1.0}
    rule = tracked_dng(40, prior=0.05)
    with pytest.raises(ValueError, match="mask must be given"):
        apply_guidance(painter, rule)
    with apply_guidance(painter, NegativePrompting(1.0)):  # which looks at no step
        run(painter, **picture)
    side = (run(painter, **picture).shape[-1]) // 2
    mask = torch.zeros(1, 1, 2 * side, 2 * side)
    mask[..., :side] = 1.0
    traces = {}
    for name, chosen in {"half": mask, "none": 0 * mask}.items():
        with apply_guidance(painter, rule, mask=chosen) as trace:
            run(painter, **picture)
        traces[name] = trace.log_posterior
    with (
        apply_guidance(painter, rule, mask=torch.ones_like(mask)) as trace,
        pytest.warns(UserWarning, match="the latents were changed before step 1"),
    ):
        run(painter, **picture)
    traces["all"] = trace.log_posterior
    np.testing.assert_allclose(traces["none"], np.log(0.05), rtol=1e-6)
    assert (traces["half"] - traces["none"]).abs().max() > 0.01
    assert (traces["half"] - traces["all"]).abs().max() > 0.01
    with (
        apply_guidance(painter, rule, mask=torch.ones(1, 1, 3, 3)),
        pytest.raises(ValueError, match="mask must broadcast to the latents"),
    ):
        run(painter, **picture)


# ---------------------------------------------------------------------- noise, and its lack


def test_samplers_without_noise_warn_and_name_one_with(pipe: Any) -> None:
    stock = pipe.scheduler
    try:
        for kind in (DDIMScheduler, DPMSolverMultistepScheduler):
            pipe.scheduler = kind.from_config(stock.config)
            with (
                apply_guidance(pipe, tracked_dng(1.0)),
                pytest.warns(UserWarning, match=f"{kind.__name__} adds no noise .*from_config"),
            ):
                run(pipe)
            with apply_guidance(pipe, NegativePrompting(1.0)):  # tracks nothing
                run(pipe)
            with apply_guidance(pipe, tracked_dng(1.0), divergence_probes=2) as trace:
                run(pipe)
            assert trace.log_posterior is not None
            assert torch.isfinite(trace.log_posterior).all()
    finally:
        pipe.scheduler = stock


def test_the_eta_of_a_pipelines_call_is_found_out(pipe: Any) -> None:
    stock = pipe.scheduler
    rule = tracked_dng(1.0, prior=0.1)
    with apply_guidance(pipe, rule) as ancestral:
        run(pipe)
    try:
        pipe.scheduler = DDIMScheduler.from_config(
            stock.config, set_alpha_to_one=True, timestep_spacing="leading"
        )
        with apply_guidance(pipe, rule) as trace:
            run(pipe, eta=1.0)
        # DDIM with eta = 1 is DDPM; the noise of each is drawn alike.
        assert trace.log_posterior is not None
        np.testing.assert_allclose(trace.log_posterior, ancestral.log_posterior, atol=1e-3)
        with (
            apply_guidance(pipe, rule),
            pytest.warns(UserWarning, match=r"too little noise \(eta = 0\.[3-6]"),
        ):
            run(pipe, eta=0.45)
        with apply_guidance(pipe, rule, eta=1.0) as told:
            run(pipe, eta=1.0)
        np.testing.assert_allclose(told.log_posterior, trace.log_posterior, atol=1e-6)

        def spoil(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                kwargs["latents"][0] = np.nan
            return kwargs

        with (
            apply_guidance(pipe, rule) as broken,
            pytest.warns(UserWarning, match="the latents were changed before step 1"),
        ):
            run(pipe, eta=1.0, callback_on_step_end=spoil)
        np.testing.assert_allclose(broken.log_posterior[:, 1], trace.log_posterior[:, 1], atol=1e-6)
        with (
            apply_guidance(pipe, rule, eta=1.0),
            pytest.raises(ValueError, match="eta must be what the pipeline's call is given"),
        ):
            run(pipe)
    finally:
        pipe.scheduler = stock


# ---------------------------------------------------------------------- skipping


def test_what_cannot_matter_is_not_evaluated(pipe: Any) -> None:
    rule = tracked_dng(40, prior=0.05)  # begins with a scale of 2.1
    with apply_guidance(pipe, rule) as full:
        expected = run(pipe, num_inference_steps=20)
    rows: list[int] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda m, a, out: rows.append(len(out)))
    with apply_guidance(pipe, rule, skip_below=1.0) as trace:
        found = run(pipe, num_inference_steps=20)
    handle.remove()
    assert trace.evaluations + trace.evaluations_saved == full.evaluations == 40
    assert 5 < trace.evaluations_saved < 30
    assert sum(rows) == 40 + trace.evaluations
    # Scales below 1 times a difference of predictions of a percent.
    assert apart(found, expected) < 1e-2
    # It never looks away where guidance acts, and takes nothing for granted.
    with apply_guidance(pipe, rule, skip_below=1e-9) as careful:
        assert apart(run(pipe, num_inference_steps=20), expected) < CLOSE
    assert careful.evaluations_saved == 0
    with apply_guidance(pipe, LimitedInterval(rule, 0.5, 1.0), skip_below=1e-9) as early:
        run(pipe, num_inference_steps=20)
    assert early.evaluations == 20  # after the interval nothing can matter
    with (
        apply_guidance(pipe, rule, skip_below=2.0),
        pytest.warns(UserWarning, match=r"skip_below should be well below .* = 2\.11 .*got 2:"),
    ):
        run(pipe)


def test_skipping_with_added_prompts(pipe_of: Callable[[str], Any]) -> None:
    pipe = pipe_of("controlnet")
    rule = tracked_dng(40, prior=0.02)
    options: dict[str, Any] = {"negative_prompts": ["egg", "tea"], "cfg_scale": 3.0}
    with apply_guidance(pipe, rule, **options) as full:
        expected = run(pipe, num_inference_steps=12)
    with apply_guidance(pipe, rule, skip_below=0.4, **options) as trace:
        found = run(pipe, num_inference_steps=12)
    assert full.evaluations == 48
    assert 0 < trace.evaluations_saved < 48
    assert apart(found, expected) < 1e-2


def test_controlnet_sees_the_prompts_that_are_added(pipe_of: Callable[[str], Any]) -> None:
    pipe = pipe_of("controlnet")
    rule = tracked_dng(40, prior=0.05)
    with apply_guidance(pipe, rule):
        expected = run(pipe)
    with apply_guidance(pipe, rule, negative_prompts=[NEGATIVE]):
        assert apart(run(pipe, negative_prompt="something else"), expected) < CLOSE


# ---------------------------------------------------------------------- pipelines without prompts


@pytest.mark.parametrize("several", [False, True])
def test_networks_in_place_of_prompts(several: bool) -> None:
    pipe = tiny.tiny_ddpm(0)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    unwanted = [tiny.tiny_unet(seed) for seed in (1, 2)] if several else [tiny.tiny_unet(1)]
    rule = tracked_dng(3.0, prior=0.1, temperature=0.5)

    def images() -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipe(
            batch_size=2, generator=generators, num_inference_steps=5, output_type="np"
        ).images

    plain = images()
    with apply_guidance(pipe, Unguided()):
        assert np.array_equal(images(), plain)
    seen: list[Any] = []
    handle = pipe.unet.register_forward_hook(lambda m, args, out: seen.append((args, out.sample)))
    with apply_guidance(pipe, rule, unwanted=unwanted if several else unwanted[0]) as trace:
        images()
    handle.remove()
    bars = pipe.scheduler.alphas_cumprod.double().numpy()
    log_p = np.full((len(unwanted), 2), np.log(0.1))
    for step, ((x, t), guided) in enumerate(seen):
        with torch.no_grad():
            eps, *others = (net(x, t).sample.double().numpy() for net in (pipe.unet, *unwanted))
        assert trace.log_posterior is not None
        tracked = trace.log_posterior[step] if several else trace.log_posterior[step][None]
        np.testing.assert_allclose(tracked, log_p, atol=1e-4)
        p = np.exp(log_p)
        by_hand = eps - sum(
            textbook.per_sample(3.0 * own / (1 - p.sum(0)), eps) * (other - eps)
            for own, other in zip(p, others, strict=True)
        )
        np.testing.assert_allclose(guided, by_hand, atol=1e-5)
        if step + 1 < len(seen):
            s = int(seen[step + 1][0][1])
            ends = textbook.Interval(
                *(
                    f(b)
                    for b in (bars[int(t)], bars[s])
                    for f in (np.sqrt, lambda b: np.sqrt(1 - b))
                )
            )
            v = textbook.step_variance(*ends, "small")
            x_next = seen[step + 1][0][0].double().numpy()
            mean, *means = (
                textbook.step_mean(*ends, x.double().numpy(), e) for e in (eps, *others)
            )
            log_p = np.stack(
                [
                    textbook.paper_update(own, x_next, mean, other, v, 0.5)
                    for own, other in zip(log_p, means, strict=True)
                ]
            )
    with (
        apply_guidance(pipe, rule, unwanted=unwanted[0], skip_below=100.0) as skipping,
        pytest.warns(UserWarning, match="skip_below should be well below"),
    ):
        images()
    assert skipping.evaluations_saved > 0


# ---------------------------------------------------------------------- what it did, drawn


@pytest.mark.parametrize("low", [1e-300, 1e-6, 0.02, 0.3, 0.8, 0.97])
def test_a_posterior_that_comes_near_1_is_read_against_it(low: float) -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    axes.plot([1.0, 0.0], [low, 0.98])
    trace._posterior_axis(axes.yaxis, np.array([low, 0.98]))
    ticks = axes.get_yticks()
    labels = [axes.yaxis.get_major_formatter()(tick, None) for tick in ticks]
    assert axes.get_yscale() == "log" and axes.get_ylim() == (low / 1.3, 1.0)
    assert len(labels) >= 3 and labels[-1] == "1" and len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("rule", "images", "options"),
    [
        (tracked_dng(40, 0.05), 2, {}),
        (tracked_dng(40, 0.05), 9, {}),
        (tracked_dng(40, 0.05), 1, {"negative_prompts": ["egg", "tea"]}),
        (NegativePrompting(1.0), 2, {}),
        (FeedbackGuidance(0.5), 2, {}),
    ],
)
def test_the_trace_is_drawn(
    pipe: Any, tmp_path: Any, rule: Any, images: int, options: dict[str, Any]
) -> None:
    with apply_guidance(pipe, rule, **options) as trace:
        with pytest.raises(ValueError, match="trace must have a run"):
            trace.plot(tmp_path / "none.png")
        run(pipe, tuple(range(images)))
    trace.plot(tmp_path / "scale.png")
    with Image.open(tmp_path / "scale.png") as drawn:
        pixels = np.asarray(drawn.convert("L"))
    assert pixels.shape[0] > 400 and (pixels < 128).mean() > 0.002
    assert "1 runs" in repr(trace)
    assert trace.timesteps.shape == trace.time.shape == (STEPS,)
    assert np.all(np.diff(trace.time) < 0) and 0 < trace.time[-1] < trace.time[0] <= 1


# ---------------------------------------------------------------------- bad input


def cut_off(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        pipe._guidance_scale = 0.0
        kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
    return kwargs


def halve(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        kwargs["latents"] = kwargs["latents"][:1]
        kwargs["prompt_embeds"] = kwargs["prompt_embeds"][[0, 2]]
    return kwargs


def swap(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    if step == 2:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(STEPS)
    return kwargs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt": None}, "negative_prompt of the pipeline's call must be given"),
        ({"negative_prompt": ""}, "negative_prompt of the pipeline's call must be given"),
        ({"guidance_scale": 1.0}, "guidance_scale of the pipeline's call must be > 1"),
        ({"guidance_rescale": 0.5}, "guidance_rescale of the pipeline's call must be 0"),
        (
            {
                "callback_on_step_end": cut_off,
                "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
            },
            "guidance_scale must switch the negative prompt on.*LimitedInterval",
        ),
        (
            {
                "callback_on_step_end": halve,
                "callback_on_step_end_tensor_inputs": ["prompt_embeds", "latents"],
            },
            "the batch must stay the same during a run: step 3",
        ),
        ({"callback_on_step_end": swap}, "pipe.scheduler must stay the same during a run: at step"),
    ],
)
def test_calls_that_cannot_be_guided(pipe: Any, options: dict[str, Any], message: str) -> None:
    stock = pipe.scheduler
    try:
        with (
            apply_guidance(pipe, tracked_dng(1.0)),
            pytest.raises(ValueError, match=message),
        ):
            run(pipe, **options)
    finally:
        pipe.scheduler = stock
    with apply_guidance(pipe, tracked_dng(1.0)) as trace:
        run(pipe)
    assert len(trace.last.steps) == STEPS


def test_added_prompts_are_encoded_with_the_options_of_the_call(
    pipe_of: Callable[[str], Any],
) -> None:
    pipe, rule = pipe_of("xl"), tracked_dng(40, prior=0.05)
    with apply_guidance(pipe, rule):
        plain, expected = run(pipe), run(pipe, clip_skip=1)
    with apply_guidance(pipe, rule, negative_prompts=[NEGATIVE]):
        assert apart(run(pipe, negative_prompt="tea", clip_skip=1), expected) < CLOSE
    assert apart(plain, expected) > 100 * CLOSE
    stock = run(pipe, negative_prompt=None, guidance_scale=3.0, clip_skip=1)
    with apply_guidance(pipe, tracked_dng(0.0), cfg_scale=3.0):
        assert apart(run(pipe, clip_skip=1), stock) < CLOSE


def test_no_negative_prompt_for_sdxl_and_sd3(pipe_of: Callable[[str], Any]) -> None:
    for name in ("xl", "sd3"):
        pipe = pipe_of(name)
        for missing in (None, ""):
            with (
                apply_guidance(pipe, tracked_dng(1.0)),
                pytest.raises(ValueError, match="negative_prompt of the pipeline's call"),
            ):
                run(pipe, negative_prompt=missing)


@pytest.mark.parametrize(
    ("rule", "options", "error", "message"),
    [
        ("dng", {}, TypeError, "rule must be one of dng_math.rules, got 'dng'"),
        (DynamicNegativeGuidance(), {}, ValueError, "no exact one"),
        (DynamicNegativeGuidance(1.0, PaperTracker()), {}, ValueError, "prior must be given"),
        (
            tracked_dng(),
            {"cfg_scale": np.nan},
            ValueError,
            "cfg_scale must be finite",
        ),
        (PerpNeg(), {"cfg_scale": 2.0}, ValueError, "cfg_scale must be None for PerpNeg"),
        (
            tracked_dng(),
            {"eta": 1.5},
            ValueError,
            r"eta must be in \[0, 1\], got 1.5",
        ),
        (
            tracked_dng(),
            {"divergence_probes": -1},
            ValueError,
            "divergence_probes must be",
        ),
        (tracked_dng(), {"skip_below": 0.0}, ValueError, "skip_below must be"),
        (tracked_dng(), {"mask": [1]}, TypeError, "mask must be a tensor"),
        (
            tracked_dng(),
            {"negative_prompts": "egg"},
            TypeError,
            "a sequence of str",
        ),
        (
            tracked_dng(),
            {"negative_prompts": []},
            ValueError,
            "one or more non-empty str",
        ),
        (
            tracked_dng(),
            {"negative_prompts": ["egg", ""]},
            ValueError,
            "non-empty str",
        ),
        (NegativePrompting(), {"negative_prompts": ["a", "b"]}, ValueError, "only DNG gives each"),
        (
            tracked_dng(),
            {"unwanted": len},
            ValueError,
            "unwanted must be None",
        ),
    ],
)
def test_rules_and_options_that_cannot_be(
    pipe: Any, rule: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), apply_guidance(pipe, rule, **options):
        run(pipe)


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"prior": 0.0}, r"prior must be in \(0, 1\), got 0.0"),
        ({"prior": 1.0}, r"prior must be in \(0, 1\), got 1.0"),
        ({"temperature": -0.1}, "temperature must be"),
        ({"p_max": 1.0}, "p_max must be in"),
        ({"p_min": 0.999}, "p_min must be in"),
        ({"guidance_scale": np.inf}, "guidance_scale must be finite"),
        ({"tracker": "exact"}, "tracker must be"),
        ({"variance": "tiny"}, "variance"),
    ],
)
def test_hyperparameters_out_of_range(hyperparameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tracked_dng(**hyperparameters)


def test_pipelines_that_cannot_be_guided(pipe: Any) -> None:
    with pytest.raises(ValueError, match="pipe must be a diffusers pipeline, got a Linear"):
        apply_guidance(torch.nn.Linear(1, 1), tracked_dng())
    with (
        apply_guidance(pipe, tracked_dng()),
        pytest.raises(ValueError, match="pipe must not be guided already"),
    ):
        apply_guidance(pipe, tracked_dng())
    without = copy.copy(pipe)
    without.text_encoder = None
    with pytest.raises(ValueError, match="pipe must have its text encoder"):
        apply_guidance(without, tracked_dng(), cfg_scale=3.0)
    plain = tiny.tiny_ddpm(0)
    with pytest.raises(TypeError, match="unwanted must be a network"):
        apply_guidance(plain, tracked_dng())
    with pytest.raises(ValueError, match="negative_prompts must be None"):
        apply_guidance(plain, tracked_dng(), negative_prompts=["egg"])
    with pytest.raises(ValueError, match="must do without a second prompt"):
        apply_guidance(plain, tracked_dng(), cfg_scale=2.0, unwanted=tiny.tiny_unet(1))
    with pytest.raises(ValueError, match="must not be an empty sequence"):
        apply_guidance(plain, tracked_dng(), unwanted=[])


def test_a_scheduler_that_cannot_be_served_is_named(pipe: Any) -> None:
    stock = pipe.scheduler
    try:
        pipe.scheduler = diffusers.PNDMScheduler.from_config(stock.config)
        with (
            apply_guidance(pipe, tracked_dng()),
            pytest.raises(ValueError, match="PNDMScheduler"),
        ):
            run(pipe)
    finally:
        pipe.scheduler = stock


def test_a_chain_insists_on_its_order() -> None:
    chain = GuidedChain(tracked_dng())
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="observe\\(\\) must come before guide\\(\\)"):
        chain.guide(x, x)
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    chain.observe(scheduler, x, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="must have the shape of the latents"):
        chain.guide(x[:, :2], x)
    with pytest.raises(ValueError, match="negatives must be 1 predictions"):
        chain.guide(x, [x, x])
    with pytest.raises(ValueError, match="was shown but not guided"):
        chain.observe(scheduler, x, scheduler.timesteps[1])
    chain.reset()
    chain.observe(scheduler, x, scheduler.timesteps[0])
    chain.guide(x, x)
    with pytest.raises(ValueError, match="called twice"):
        chain.guide(x, x)
    with pytest.raises(ValueError, match="timestep must be 500.0 at step 1"):
        chain.observe(scheduler, x, scheduler.timesteps[2])
    with pytest.raises(ValueError, match="timestep must be one of the scheduler's"):
        GuidedChain(tracked_dng()).observe(scheduler, x, 3)
    with pytest.raises(ValueError, match="concepts must be"):
        GuidedChain(tracked_dng(), concepts=0)
    with pytest.raises(ValueError, match="unconditional must be given"):
        chain = GuidedChain(tracked_dng(), cfg_scale=2.0)
        chain.observe(scheduler, x, scheduler.timesteps[0])
        chain.guide(x, x)
