"""The path tracker in modular pipelines: the numbers of the hook, from the network it is shown."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from torch import nn

from dng_math import DynamicNegativeGuidance
from dng_models.pipelines.guider import DynamicNegativeGuider
from dng_models.pipelines.guider_network import SeenNetwork
from dng_models.pipelines.hook import apply_guidance
from tests.models.pipelines.test_guider import build, latents, needs_guiders

STEPS = 3
# Networks of random numbers: their evidence is large.
RULE = {"guidance_scale": 20.0, "prior": 0.02, "temperature": 1e-3, "tracker": "path"}


@pytest.mark.slow
@needs_guiders
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("xl", EulerDiscreteScheduler),
        pytest.param("xl", HeunDiscreteScheduler, marks=pytest.mark.slow),
        pytest.param("sd3", FlowMatchEulerDiscreteScheduler, marks=pytest.mark.slow),
    ],
)
def test_against_the_hook(name: str, kind: Any) -> None:
    """Deterministic schedulers, of which the other trackers refuse one."""
    pipe = build(name)
    scheduler = kind.from_config(pipe.classic.scheduler.config)
    pipe.update_components(scheduler=scheduler)
    guider = DynamicNegativeGuider(**RULE)
    ours = latents(pipe, guider, num_inference_steps=STEPS)
    pipe.classic.scheduler = kind.from_config(scheduler.config)
    with apply_guidance(pipe.classic, DynamicNegativeGuidance.tracked(**RULE)) as trace:
        theirs = pipe.classic(
            ["a cat", "a house"],
            negative_prompt=["egg", "sausage"],
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    found = guider.trace.log_posterior
    torch.testing.assert_close(found, trace.log_posterior, rtol=1e-4, atol=1e-4)
    assert float((found[-1] - found[0]).abs().min()) > 1e-4


@needs_guiders
def test_without_probes_it_is_the_tracker_of_transitions() -> None:
    pipe = build("xl")
    runs = []
    for options in ({"tracker": "log-odds"}, {"tracker": "path", "probes": 0}):
        guider = DynamicNegativeGuider(**RULE | options)
        runs.append((latents(pipe, guider, num_inference_steps=STEPS), guider.trace.log_posterior))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@needs_guiders
def test_it_is_saved_and_watches_no_network_that_it_does_not_need(tmp_path: Any) -> None:
    DynamicNegativeGuider(**RULE, probes=2).save_pretrained(tmp_path)
    again = DynamicNegativeGuider.from_pretrained(tmp_path)
    assert again.config.tracker == "path" and again.config.probes == 2
    network = nn.Linear(1, 1)
    for guider, hooks in (
        (again, 1),
        (DynamicNegativeGuider(20.0, 0.02), 0),
        (DynamicNegativeGuider(**RULE, enabled=False), 0),
    ):
        guider.prepare_models(network)
        assert len(network._forward_hooks) == hooks
        guider.cleanup_models(network)
        assert not network._forward_hooks


class Net(nn.Module):
    def forward(self, x: Any, t: Any, *, tokens: Any) -> Any:
        return (torch.sin(x) * tokens,)


def test_a_call_is_made_again_at_other_latents() -> None:
    """With what stands behind the latents: tokens of an image, or channels of a mask."""
    x, behind, tokens = torch.randn(2, 3, 4), torch.randn(2, 2, 4), torch.randn(2, 1, 4)
    seen, net = SeenNetwork(), Net()
    for given in (tokens, 2.0 * tokens):
        seen.watch(net)
        net(torch.cat([x, behind], dim=1), torch.tensor(3.0), tokens=given)
        seen.unwatch()
    net(x, 0.0, tokens=tokens)  # not watched
    predictions = [torch.sin(x) * tokens, 2.0 * torch.sin(x) * tokens]
    shown, again = seen.at_other_latents(x + 1e-7, predictions)
    assert torch.equal(shown, x)
    other = torch.randn(2, 3, 4)
    for found, factor in zip(again(other), (1.0, 2.0), strict=True):
        torch.testing.assert_close(found, factor * torch.sin(other) * tokens)
    for wrong in ((x + 1.0, predictions), (x, [-each for each in predictions])):
        with pytest.raises(ValueError, match="probes must be 0 in this pipeline.*no network"):
            seen.at_other_latents(*wrong)
    seen.forget()
    with pytest.raises(ValueError, match="probes must be 0"):
        seen.at_other_latents(x, predictions)
