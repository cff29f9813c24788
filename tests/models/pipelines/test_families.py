"""Every family of pipelines that is said to be guided, tiny and with random weights.

Guidance that does nothing is the stock call; a constant push is the stock call's negative
prompting; a listed negative is the pipeline's own; the positive prompt as what is unwanted leaves
the posterior at its prior; and DNG is what one writes by hand around the scheduler's step, from
predictions that are told apart by the stock combination itself, not by the layouts.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dng_math import ClassifierFreeGuidance, DynamicNegativeGuidance, NegativePrompting, Unguided
from dng_models import apply_guidance
from dng_models.pipelines import tiny
from dng_models.pipelines.layouts import LAYOUTS, REFUSED, Layout, standing
from tests.helpers.families import FAMILIES, Family, built, final_latents, stock
from tests.helpers.families.base import NEGATIVE, PROMPT
from tests.helpers.families.walk import pipeline_classes
from tests.helpers.versions import before

tracked_dng = DynamicNegativeGuidance.tracked

# What diffusers, transformers and torch say of their own old and new ways, and of tiny sizes.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        ".*:FutureWarning",
        ".*:DeprecationWarning",
        "In CPU autocast, but the target dtype:UserWarning",
        "Initializing zero-element tensors:UserWarning",
        "std.*degrees of freedom:UserWarning",
        # Some calls must say a scale without guidance: see the test of scales below.
        ".* of the pipeline's call is dropped:UserWarning",
    )
]

# Float32 networks, shown batches of another size: see test_models_hook.  Their errors are handed on
# for three steps here; a half of another family's latents would differ by a hundredth at least.
CLOSE = 2e-5


# Random networks differ by much: evidence that reaches no bound in three steps.
def at_temperature(temperature: float) -> DynamicNegativeGuidance:
    return tracked_dng(40, prior=0.05, temperature=temperature, p_min=1e-300)


RULE = at_temperature(1e-5)
# One of each kind, for every run of the suite; the others are slow.
ALWAYS = (
    "AnimateDiffPipeline",
    "CogView4Pipeline",
    "DiTPipeline",
    "FluxPipeline",
    "HunyuanDiTPipeline",
    "HiDreamImagePipeline",
    "IFSuperResolutionPipeline",
    "LTXImageToVideoPipeline",
    "SanaPAGPipeline",
    "StableDiffusionXLControlNetPipeline",
    "WanPipeline (two networks)",
    "ZImagePipeline",
)
GUIDED = [name for name in FAMILIES if isinstance(LAYOUTS.get(name.split(" (")[0]), Layout)]
# Without a negative prompt: what is unwanted is said in another way, tested below.
CLASSES = ("DiTPipeline",)


def families(*without: str) -> list[Any]:
    return [
        pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow])
        for name in GUIDED
        if not name.startswith(without)
    ]


def guided(
    family: Family, pipe: Any, rule: Any, options: dict[str, Any], **call: Any
) -> tuple[Tensor, Any]:
    with warnings.catch_warnings():
        # Their own schedulers, some without noise; masks that say that everything counts.
        warnings.filterwarnings("ignore", message=".* adds no noise")
        warnings.filterwarnings("ignore", message="the latents were changed")
        with apply_guidance(pipe, rule, **options) as trace:
            found = final_latents(pipe, family, **call)
    return found, trace


def apart(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", families())
def test_guidance_that_does_nothing_is_the_stock_call(name: str) -> None:
    family, pipe = built(name)
    with stock.plainly(name, pipe):
        plain = final_latents(pipe, family, **stock.scale(name, 3.0))
    found, _ = guided(family, pipe, ClassifierFreeGuidance(3.0), stock.mask(name))
    assert apart(found, plain) < CLOSE
    again, _ = guided(family, pipe, ClassifierFreeGuidance(1.0), stock.mask(name))
    assert apart(again, plain) > 10 * CLOSE  # it is told one scale from another


@pytest.mark.parametrize("name", families(*CLASSES))
def test_a_constant_push_is_the_stock_call(name: str) -> None:
    family, pipe = built(name)
    with stock.plainly(name, pipe, keeps_face=True):
        plain = final_latents(pipe, family, **stock.scale(name, 3.0))
    found, _ = guided(family, pipe, NegativePrompting(2.0), stock.mask(name))
    assert apart(found, plain) < CLOSE


@pytest.mark.parametrize("name", families(*CLASSES, *stock.EMBEDDINGS))
def test_negatives_in_a_list_are_the_pipelines_own(name: str) -> None:
    family, pipe = built(name)
    rule, mask = RULE, stock.mask(name)
    own, trace = guided(family, pipe, rule, mask)
    options = {"negative_prompts": [NEGATIVE], **mask}
    listed, same = guided(family, pipe, rule, options, negative_prompt="tea")
    assert apart(listed, own) < CLOSE
    torch.testing.assert_close(same.log_posterior[:, 0], trace.log_posterior, rtol=1e-3, atol=1e-4)
    # Two concepts, by one rule and by a rule for each; base + 1 (positive - base) is the positive.
    options = {"negative_prompts": [NEGATIVE, "tea"], **mask}
    several, two = guided(family, pipe, rule, {**options, "cfg_scale": 1.0})
    each, _ = guided(family, pipe, [rule, rule], options)
    assert apart(several, each) < CLOSE
    # They are told apart: at this temperature, or at one that shows smaller differences.
    _, sharper = guided(family, pipe, at_temperature(0.1), options)
    trajectories = [t.log_posterior for t in (two, sharper)]
    assert any(not torch.equal(t[:, 0], t[:, 1]) for t in trajectories)


@pytest.mark.filterwarnings("error:.* of the pipeline's call is dropped:UserWarning")
def test_a_scale_of_the_call_is_dropped_aloud_and_an_input_of_the_network_is_not() -> None:
    """Flux has both: true_cfg_scale combines two predictions, guidance_scale its network reads."""
    family, pipe = built("FluxPipeline")
    bare = {n: v for n, v in family.call().items() if n != "true_cfg_scale"}
    left_out = dataclasses.replace(family, call=lambda: bare)
    # It need not be given to switch the negative prompt on, and then nothing is said.
    expected, trace = guided(left_out, pipe, RULE, {})
    assert float(trace.scale.max()) > 0.0
    distilled, _ = guided(left_out, pipe, RULE, {}, guidance_scale=7.0)
    assert apart(distilled, expected) > 10 * CLOSE
    with pytest.warns(UserWarning, match=r"true_cfg_scale=4.0 of the pipeline's call is dropped"):
        found, _ = guided(family, pipe, RULE, {})
    assert torch.equal(found, expected)
    guided(family, pipe, RULE, {"cfg_scale": 4.0})  # stands for it: nothing is said


@pytest.mark.parametrize("name", families(*CLASSES, *stock.EMBEDDINGS))
def test_cfg_beneath_is_the_stock_call_without_a_negative(name: str) -> None:
    family, pipe = built(name)
    options = {"cfg_scale": 3.0, **stock.mask(name)}
    found, _ = guided(family, pipe, tracked_dng(0.0), options)
    none = {**stock.scale(name, 3.0), **stock.unprompted(name, pipe, family)}
    with stock.plainly(name, pipe):
        plain = final_latents(pipe, family, **none)
    assert apart(found, plain) < CLOSE


@pytest.mark.parametrize("name", families(*stock.NO_LORA))
def test_with_a_lora(name: str) -> None:
    import peft

    family, pipe = built(name)
    networks = [getattr(pipe, n, None) for n in stock.layout(name).network]
    network: Any = next(n for n in networks if n is not None)
    kinds: dict[str, set[type]] = {}
    for path, module in network.named_modules():
        kinds.setdefault(path.rpartition(".")[2], set()).add(type(module))
    linear = sorted(n for n, kind in kinds.items() if kind == {torch.nn.Linear})
    torch.manual_seed(1)
    before = final_latents(pipe, family, **stock.scale(name, 3.0))
    network.add_adapter(
        peft.LoraConfig(
            r=2,
            init_lora_weights=False,
            target_modules=[n for n in ("to_q", "to_k", "to_v") if n in linear] or linear[:2],
        )
    )
    with stock.plainly(name, pipe, keeps_face=True):
        plain = final_latents(pipe, family, **stock.scale(name, 3.0))
    assert apart(plain, before) > 10 * CLOSE
    found, _ = guided(family, pipe, NegativePrompting(2.0), stock.mask(name))
    assert apart(found, plain) < CLOSE


def test_networks_without_adapters_are_listed() -> None:
    for name in GUIDED:
        if name.startswith(stock.NO_LORA) and name in ALWAYS:
            _, pipe = built(name)
            networks = [getattr(pipe, n, None) for n in stock.layout(name).network]
            assert not any(hasattr(n, "add_adapter") for n in networks)


@pytest.mark.parametrize("name", families(*CLASSES, *stock.EMBEDDINGS, *stock.NOT_ALIKE))
def test_the_positive_prompt_as_unwanted_keeps_the_prior(name: str) -> None:
    family, pipe = built(name)
    wanted = stock.AS_POSITIVE.get(name) or family.call().get("prompt") or PROMPT
    options = {"negative_prompts": [wanted], **stock.mask(name)}
    _, trace = guided(family, pipe, RULE, options)
    np.testing.assert_allclose(trace.log_posterior.exp(), 0.05, atol=1e-4)


# ---------------------------------------------------------------------- by hand


def posterior_factors(scheduler: Any) -> list[tuple[float, float, float, float, float]]:
    """alpha_t, sigma_t and A, B, V of the DDPM posterior (its Eq. 7) of every step, in x0."""
    t = scheduler.timesteps.double().numpy()
    if hasattr(scheduler, "alphas_cumprod"):
        bars = scheduler.alphas_cumprod.double().numpy()[t.astype(int)]
        alpha, sigma = np.sqrt(np.append(bars, 1.0)), np.sqrt(1.0 - np.append(bars, 1.0))
    else:
        sigma = scheduler.sigmas.double().numpy()[: len(t) + 1]
        alpha = 1.0 - sigma
    found = []
    for a_t, s_t, a_s, s_s in zip(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], strict=True):
        a_ts = a_t / a_s
        beta = s_t**2 - a_ts**2 * s_s**2
        found.append(
            (a_t, s_t, a_ts * s_s**2 / s_t**2, a_s * beta / s_t**2, beta * s_s**2 / s_t**2)
        )
    return found


def told_apart(raw: list[Tensor], output: Tensor, w: float) -> tuple[Tensor, Tensor, Tensor]:
    """Positive and negative prediction as the scheduler is given them, and what PAG adds.

    Which is which, and their sign, follows from what the pipeline itself made of them.
    """
    parts = list(raw[0].chunk(3 if len(raw[0]) % 2 else 2)) if len(raw) == 1 else raw
    parts = [part[tuple(slice(n) for n in output.shape)].double() for part in parts]
    if len(parts) == 3:
        negative, positive, _ = parts
        return positive, negative, output - (negative + w * (positive - negative))
    for sign in (1.0, -1.0):
        for negative, positive in (parts, parts[::-1]):
            made = sign * (negative + w * (positive - negative))
            if apart(made, output) < 1e-4:
                return sign * positive, sign * negative, torch.zeros_like(output)
    raise AssertionError("the pipeline combines its network's outputs in another way")


def by_hand(
    name: str, family: Family, pipe: Any, rule: DynamicNegativeGuidance
) -> tuple[Tensor, list[np.ndarray]]:
    """The stock call, with the scheduler given another combination; in float64."""
    raw: list[Tensor] = []
    states: list[np.ndarray] = []
    scheduler, step = pipe.scheduler, pipe.scheduler.step
    log_p: Any = None

    def record(module: Any, args: Any, output: Any) -> None:
        found = output if isinstance(output, Tensor) else output[0]
        raw.append(torch.stack(found) if isinstance(found, list) else found)

    def guided_step(model_output: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal log_p
        factors = posterior_factors(scheduler)
        index = int((scheduler.timesteps - torch.as_tensor(t)).abs().argmin())
        alpha, sigma, a, b, v = factors[index]
        output, x = model_output.double(), sample.double()
        positive, negative, more = told_apart(list(raw), output, 3.0)
        raw.clear()
        if log_p is None:
            log_p = np.full(len(x), np.log(rule.posterior.prior))
        states.append(log_p)
        p = torch.from_numpy(np.exp(log_p)).reshape(-1, *[1] * (x.ndim - 1))
        scale = rule.guidance_scale * p / (1.0 - p)
        made = positive - scale * (negative - positive) + more
        taken = step(made.to(model_output.dtype), t, sample, *args, **kwargs)

        def x0(prediction: Tensor) -> Tensor:
            kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
            if kind == "epsilon":
                return (x - sigma * prediction) / alpha
            if kind == "v_prediction":
                return alpha * x - sigma * prediction
            return x - sigma * prediction

        if v > 0:
            rest = taken[0].double() - (a * x + b * x0(positive))
            gap = b * (x0(negative) - x0(positive))
            evidence = ((rest - gap) ** 2 - rest**2).flatten(1).sum(1).numpy()
            bounds = np.log(rule.posterior.p_min), np.log(rule.posterior.p_max)
            log_p = np.clip(log_p - rule.posterior.temperature * evidence / (2.0 * v), *bounds)
        return taken

    guided_step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    modules = [getattr(pipe, n) for n in stock.layout(name).network if getattr(pipe, n, None)]
    handles = [module.register_forward_hook(record) for module in modules]
    scheduler.step = guided_step
    try:
        with stock.plainly(name, pipe):
            found = final_latents(pipe, family, **stock.scale(name, 3.0))
    finally:
        for handle in handles:
            handle.remove()
        del scheduler.step
    return found, states


@pytest.mark.parametrize("name", families(*CLASSES, *stock.REARRANGED))
def test_it_is_what_one_writes_by_hand(name: str) -> None:
    family, pipe = built(name)
    expected, states = by_hand(name, family, pipe, RULE)
    found, trace = guided(family, pipe, RULE, stock.mask(name))
    assert apart(found, expected) < 10 * CLOSE
    np.testing.assert_allclose(trace.log_posterior, np.stack(states), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------- classes and embeddings


def test_a_negative_class() -> None:
    name = "DiTPipeline"
    family, pipe = built(name)
    rule = RULE
    found, _ = guided(family, pipe, rule, {"negative_classes": [3]})
    cfg, _ = guided(
        family,
        pipe,
        tracked_dng(0.0),
        {"negative_classes": [3], "cfg_scale": 3.0},
    )
    assert apart(cfg, final_latents(pipe, family, guidance_scale=3.0)) < CLOSE
    assert apart(found, cfg) > 10 * CLOSE
    # The class of the call itself as unwanted.
    own = family.call()["class_labels"]
    _, same = guided(family, pipe, rule, {"negative_classes": own[:1]})
    np.testing.assert_allclose(same.log_posterior[:, 0, :1].exp(), 0.05, atol=1e-4)
    for bad, error in (
        ([3.5], ValueError),
        ([10**6], ValueError),
        ("3", TypeError),
        ([], TypeError),
    ):
        with pytest.raises(error, match="negative_classes must be"):
            apply_guidance(pipe, rule, negative_classes=bad)
    with pytest.raises(ValueError, match="negative_classes must be given"):
        apply_guidance(pipe, rule)
    with pytest.raises(ValueError, match="negative_prompts must be None: a DiTPipeline has no"):
        apply_guidance(pipe, rule, negative_prompts=["egg"])


def test_embeddings_of_what_is_unwanted() -> None:
    family, pipe = built("KandinskyV22Pipeline")
    rule = RULE
    own, _ = guided(family, pipe, rule, {})
    unwanted = family.call()["negative_image_embeds"]
    listed, _ = guided(
        family,
        pipe,
        rule,
        {"negative_prompts": [{"negative_image_embeds": unwanted}]},
        negative_image_embeds=torch.randn_like(unwanted),
    )
    assert apart(listed, own) < CLOSE
    with pytest.raises(ValueError, match="negative_prompts must be given as embeddings"):
        guided(family, pipe, rule, {"negative_prompts": ["egg"]})


# ---------------------------------------------------------------------- no prompts


@pytest.mark.parametrize("name", ["DDPMPipeline", "DDIMPipeline"])
def test_pipelines_that_know_of_no_prompt(name: str) -> None:
    import diffusers

    unet, scheduler = tiny.tiny_unet(0), diffusers.DDPMScheduler(clip_sample=False)
    pipe = getattr(diffusers, name)(unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    call = {"batch_size": 2, **({"eta": 1.0} if name == "DDIMPipeline" else {})}
    family = Family(name, lambda: pipe, lambda: call, prompted=False)
    plain = final_latents(pipe, family, output_type="np")
    rule, unwanted = (
        tracked_dng(3.0, prior=0.1, temperature=0.5),
        tiny.tiny_unet(1),
    )
    with apply_guidance(pipe, Unguided()):
        assert apart(final_latents(pipe, family, output_type="np"), plain) < CLOSE
    with apply_guidance(pipe, rule, unwanted=copy.deepcopy(unet)) as same:
        assert apart(final_latents(pipe, family, output_type="np"), plain) < CLOSE
    np.testing.assert_allclose(same.log_posterior.exp(), 0.1, atol=1e-4)
    with apply_guidance(pipe, rule, unwanted=unwanted) as trace:
        assert apart(final_latents(pipe, family, output_type="np"), plain) > 10 * CLOSE
    assert trace.log_posterior.std() > 0


# ---------------------------------------------------------------------- all of diffusers


def test_every_class_of_diffusers_is_guided_or_refused_for_a_reason() -> None:

    known = {name: standing(kind) for name, kind in pipeline_classes().items()}
    unknown = [name for name, found in known.items() if found is None]
    if not before("diffusers", "0.42"):
        assert not unknown, f"neither guided nor refused, because: {unknown}"
    assert len(known) > 150
    reasons = [found for found in known.values() if isinstance(found, str)]
    assert all(reason.strip() for reason in reasons)
    assert not set(LAYOUTS) & set(REFUSED)


def test_what_is_guided_is_tested() -> None:
    tested = {name.split(" (")[0] for name in GUIDED} | {"DDPMPipeline", "DDIMPipeline"}
    assert set(LAYOUTS) == tested


def test_reasons_name_classes_that_can_be_guided() -> None:
    for name, reason in REFUSED.items():
        nearest = reason.rpartition("The nearest that can be is ")[2].split()[0].rstrip(",;.")
        if nearest.endswith("Pipeline"):
            assert nearest in LAYOUTS, (name, nearest)


def test_the_page_of_pipelines_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    import diffusers

    from tests.helpers.families.__main__ import main

    page = (Path(__file__).resolve().parents[3] / "docs" / "pipelines.md").read_text("utf-8")
    if f"diffusers {diffusers.__version__}:" not in page:
        pytest.skip(f"docs/pipelines.md is of another diffusers than {diffusers.__version__}")
    main()
    assert capsys.readouterr().out == page, (
        "renew: python -m tests.helpers.families > docs/pipelines.md"
    )
    prompted = sum(layout.calls != "alone" for layout in LAYOUTS.values())
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text("utf-8")
    assert f"{prompted} pipeline classes of diffusers" in readme


# ---------------------------------------------------------------------- layouts of one's own


def test_a_layout_of_ones_own_is_checked_at_the_first_call() -> None:
    from dataclasses import replace

    family, pipe = built("LTXPipeline")
    rule, row = RULE, LAYOUTS["LTXPipeline"]
    own, _ = guided(family, pipe, rule, {})
    given, _ = guided(family, pipe, rule, {"layout": row})
    assert torch.equal(given, own)
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "order": ({"first": "positive"}, "says that the positive prompt comes first"),
        "text": ({"text": ("encoder_hidden_states",), "batched": None}, "encoder_attention_mask"),
        "names": (
            {"text": ("prompt_embeds",)},
            "must show its network the prompt as prompt_embeds",
        ),
        "time": ({"time_unit": "fraction"}, "is not t over the number of training timesteps"),
        "unnamed time": ({"time": "t"}, "must tell its network the time as t"),
        "latents": ({"latents": "sample"}, "with a tensor sample"),
        "sign": ({"sign": -1}, "must hand its scheduler the guided prediction as it is"),
        "calls": ({"calls": "separate", "first": "positive"}, "called its network once"),
        "network": ({"network": ("unet",)}, "must have a network pipe.unet"),
    }
    for changes, message in wrong.values():
        with pytest.raises(ValueError, match=message):
            guided(family, pipe, rule, {"layout": replace(row, **changes)})
    with pytest.raises(TypeError, match="layout must be a dng_models.pipelines.layouts.Layout"):
        apply_guidance(pipe, rule, layout={"text": "x"})
    bad: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: Layout(calls="twice"), ValueError, "calls must be one of"),
        (lambda: Layout(first="both"), ValueError, "first must be one of"),
        (lambda: Layout(sign=0), ValueError, "sign must be 1 or -1"),
        (lambda: Layout(text="encoder_hidden_states"), TypeError, "text must be a tuple of str"),
        (lambda: Layout(network=()), ValueError, "network must name"),
        (lambda: Layout(text=()), ValueError, "text must name"),
    ]
    for make, error, message in bad:
        with pytest.raises(error, match=message):
            make()
