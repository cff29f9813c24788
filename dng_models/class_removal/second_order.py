"""Draw images with DPM-Solver++ 2M, a deterministic solver that needs fewer steps than DDIM.

A step of it combines the predictions of two points, so only a tracker that follows the points has a
right posterior here.  The chain is that of guided pipelines, with diffusers' own scheduler.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from dng_kernels import standard_normal
from dng_math.rules import Rule
from dng_math.schedules import NoiseSchedule, PredictionType, x0_of
from dng_models.pairs.denoisers import Denoiser, Predictor, evaluating
from dng_models.pairs.sampling import Samples
from dng_models.pipelines.guided_chain import GuidedChain
from dng_models.pipelines.noise_levels import scheduler_levels
from dng_models.support.progress import Progress


def sample_second_order(
    base: Denoiser,
    unwanted: Sequence[Denoiser],
    rule: Rule,
    *,
    shape: tuple[int, ...],
    num_images: int,
    schedule: NoiseSchedule,
    steps: int,
    prediction_type: PredictionType = "epsilon",
    seed: int = 0,
    first_image: int = 0,
    device: torch.device,
    autocast: torch.dtype | None = None,
    record: Collection[str] = (),
    progress: str | None = None,
) -> Samples:
    """Draw one batch of images with DPM-Solver++ 2M (arXiv 2211.01095).

    Parameters
    ----------
    base, unwanted, rule
        As for :func:`dng_models.pairs.sampling.sample`, for a rule without a positive denoiser; a
        tracker must be a path tracker.
    shape, num_images, schedule, steps, prediction_type, seed, first_image, device, autocast
        As there.
    record : collection of {"log_posterior", "scale", "x0"}
        What to keep of every step.
    progress : str, optional
        Name on a progress bar; None shows none.

    Returns
    -------
    Samples
        The noise at the start is that of :func:`dng_models.pairs.sampling.sample`.

    Raises
    ------
    ValueError
        If the rule tracks a posterior from transitions, or as for
        :class:`dng_models.pipelines.guided_chain.GuidedChain`.
    """
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=len(schedule),
        trained_betas=1.0 - (schedule.alpha[1:] / schedule.alpha[:-1]) ** 2,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps, device="cpu")
    c = scheduler_levels(scheduler).coefficients
    several = len(unwanted) if len(unwanted) > 1 else None
    chain = GuidedChain(rule, concepts=several)
    if chain.tracks and not chain.follows:
        raise ValueError(f"rule must have a path tracker with a solver of second order: {rule!r}")
    denoisers = [base, *unwanted]
    predict = Predictor(denoisers, device, autocast=autocast)
    x = standard_normal(seed, (num_images, *shape), first_sample=first_image, device=device)
    predicted: list[Tensor] = []
    shown = progress is not None
    with torch.no_grad(), evaluating(denoisers), Progress(steps, progress, shown=shown) as bar:
        for t in scheduler.timesteps:
            step = chain.observe(scheduler, x, t, scaled=False)
            at_time = partial(predict, t=int(t))
            eps, *others = at_time(x)
            guided = chain.guide(eps, others, network=at_time)
            if "x0" in record:
                level = float(c.alpha_t[step]), float(c.sigma_t[step])
                predicted.append(x0_of(prediction_type, x, guided, *level).cpu())
            x = scheduler.step(guided, t, x).prev_sample
            bar.update()
    trace = chain.trace
    records: dict[str, Tensor] = {}
    if "scale" in record:
        assert trace.scale is not None
        records["scale"] = trace.scale
    if "x0" in record:
        records["x0"] = torch.stack(predicted)
    log_posterior = trace.log_posterior
    if log_posterior is not None and "log_posterior" in record:
        records["log_posterior"] = torch.cat([log_posterior, log_posterior[-1:]])
    return Samples(
        images=x.float().cpu(),
        log_posterior=None if log_posterior is None else log_posterior[-1],
        time=np.append(trace.time, 0.0),
        records=records,
    )
