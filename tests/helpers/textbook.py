"""Independent transcription of the equations as the textbooks write them, for the tests.

Nothing here is imported from the packages or optimised.  Means are formed before they are compared,
squared norms before they are subtracted, and every formula keeps the names of its source, so that
it can be checked against the page.  Arrays have shape (B, D), or (B,) for one number per sample;
everything is float64.

    DDPM   Ho, Jain and Abbeel 2020, arXiv 2006.11239
    DDIM   Song, Meng and Ermon 2021, arXiv 2010.02502
    CFG    Ho and Salimans 2022, arXiv 2207.12598
    SLD    Schramowski et al. 2023, arXiv 2211.05105
    DNG    Koulischer et al. 2025, arXiv 2410.14398
    FBG    Koulischer et al. 2025, arXiv 2506.06085
    CCFG   Chang, Chung and Ye 2024, arXiv 2411.17077
    Perp-Neg   Armandpour et al. 2023, arXiv 2304.04968
    CFG++  Chung et al. 2024, arXiv 2406.08070
    GeoGuide   arXiv 2407.12889
    SPELL  arXiv 2410.06025
    CRG    arXiv 2606.29801
    Safe Denoiser   arXiv 2502.08011
    VL-DNP   arXiv 2510.26052
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

# ---- forward process and samplers


class Coefficients(NamedTuple):
    """DDPM, section 2; index t = 0 is the cleanest of the T times."""

    betas: np.ndarray
    alphas: np.ndarray
    alpha_bars: np.ndarray


def ddpm_coefficients(
    n_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Coefficients:
    """beta_t linear in t, alpha_t = 1 - beta_t, alpha_bar_t = prod_{s <= t} alpha_s."""
    betas = np.zeros(n_steps)
    alphas = np.zeros(n_steps)
    alpha_bars = np.zeros(n_steps)
    product = 1.0
    for t in range(n_steps):
        fraction = t / (n_steps - 1) if n_steps > 1 else 0.0
        betas[t] = beta_start + (beta_end - beta_start) * fraction
        alphas[t] = 1.0 - betas[t]
        product = product * alphas[t]
        alpha_bars[t] = product
    return Coefficients(betas, alphas, alpha_bars)


def forward(c: Coefficients, t: int, x0: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (DDPM, Eq. 4)."""
    return np.sqrt(c.alpha_bars[t]) * x0 + np.sqrt(1.0 - c.alpha_bars[t]) * noise


def ddpm_variance(c: Coefficients, t: int, which: str) -> float:
    """sigma_t^2: "large" beta_t, "small" beta_t (1 - alpha_bar_{t-1})/(1 - alpha_bar_t)."""
    if which == "large":
        return float(c.betas[t])
    assert which == "small"
    alpha_bar_before = c.alpha_bars[t - 1] if t > 0 else 1.0
    return float((1.0 - alpha_bar_before) / (1.0 - c.alpha_bars[t]) * c.betas[t])


def ddpm_mean(c: Coefficients, t: int, x: np.ndarray, eps: np.ndarray) -> np.ndarray:
    """(x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) (DDPM, Eq. 11)."""
    return (x - c.betas[t] / np.sqrt(1.0 - c.alpha_bars[t]) * eps) / np.sqrt(c.alphas[t])


def ddpm_step(
    c: Coefficients, t: int, x: np.ndarray, eps: np.ndarray, noise: np.ndarray, which: str
) -> np.ndarray:
    """Mean plus noise, and no noise into t = 0 (DDPM, Algorithm 2)."""
    mean = ddpm_mean(c, t, x, eps)
    if t == 0:
        return mean
    return mean + np.sqrt(ddpm_variance(c, t, which)) * noise


def ddim_step(
    alpha_bar_t: float,
    alpha_bar_s: float,
    x: np.ndarray,
    eps: np.ndarray,
    noise: np.ndarray,
    eta: float,
) -> np.ndarray:
    """DDIM, Eqs. 12 and 16, from time t to any cleaner time s."""
    x0 = (x - np.sqrt(1.0 - alpha_bar_t) * eps) / np.sqrt(alpha_bar_t)
    sigma = (
        eta
        * np.sqrt((1.0 - alpha_bar_s) / (1.0 - alpha_bar_t))
        * np.sqrt(1.0 - alpha_bar_t / alpha_bar_s)
    )
    direction = np.sqrt(1.0 - alpha_bar_s - sigma**2) * eps
    return np.sqrt(alpha_bar_s) * x0 + direction + sigma * noise


def step_mean(
    alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float, x: np.ndarray, eps: np.ndarray
) -> np.ndarray:
    """Mean of the step t -> s of a process x_t = alpha_t x_0 + sigma_t noise."""
    alpha_ts = alpha_t / alpha_s
    beta_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    return (x - beta_ts / sigma_t * eps) / alpha_ts


def step_variance(
    alpha_t: float, sigma_t: float, alpha_s: float, sigma_s: float, which: str
) -> float:
    """beta_ts ("large") or beta_ts sigma_s^2 / sigma_t^2 ("small") of the step t -> s."""
    alpha_ts = alpha_t / alpha_s
    beta_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
    if which == "large":
        return beta_ts
    assert which == "small"
    return beta_ts * sigma_s**2 / sigma_t**2


# ---- the posterior


def squared_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a - b|^2 of each sample: (B, ...), (B, ...) -> (B,)."""
    gap = np.asarray(a - b)
    return np.sum(gap.reshape(len(gap), -1) ** 2, axis=1)


def per_sample(values: Any, like: np.ndarray) -> np.ndarray:
    """(B,) -> (B, 1, ..., 1), to multiply an array of the shape of ``like``."""
    values = np.broadcast_to(np.asarray(values, dtype=np.float64), (len(like),))
    return values.reshape((-1,) + (1,) * (like.ndim - 1))


def paper_update(
    log_p: np.ndarray,
    x_next: np.ndarray,
    mean: np.ndarray,
    mean_neg: np.ndarray,
    v: float,
    temperature: float = 1.0,
    offset: float = 0.0,
    p_min: float = 1e-6,
    p_max: float = 0.99,
) -> np.ndarray:
    """log p after one step (DNG, Eq. 12 and Algorithm 2), clamped to [log p_min, log p_max]."""
    difference = squared_distance(x_next, mean_neg) - squared_distance(x_next, mean)
    log_p = log_p - temperature / (2.0 * v) * difference + offset / (2.0 * v)
    return np.clip(log_p, np.log(p_min), np.log(p_max))


def published_update(
    p: np.ndarray,
    c: Coefficients,
    t: int,
    x: np.ndarray,
    x_next: np.ndarray,
    eps: np.ndarray,
    eps_neg: np.ndarray,
    temperature: float = 1.0,
    offset: float = 0.0,
    p_min: float = 1e-6,
    p_max: float = 0.99,
) -> np.ndarray:
    """The same update as in the authors' program, on p itself.

    It divides by the small variance, except in the last step, where that is zero and the program
    uses 1 - alpha_t.
    """
    alpha_bar_before = c.alpha_bars[t - 1] if t > 0 else c.alpha_bars[t]
    variance = (1.0 - alpha_bar_before) / (1.0 - c.alpha_bars[t]) * (1.0 - c.alphas[t])
    mean = ddpm_mean(c, t, x, eps)
    mean_neg = ddpm_mean(c, t, x, eps_neg)
    difference = squared_distance(x_next, mean_neg) - squared_distance(x_next, mean)
    with np.errstate(over="ignore"):
        p = p * np.exp((-temperature * difference + offset) / (2.0 * variance))
    return np.clip(p, p_min, p_max)


def log_odds_update(
    log_odds: np.ndarray,
    x_next: np.ndarray,
    mean: np.ndarray,
    mean_neg: np.ndarray,
    v: float,
    temperature: float = 1.0,
    offset_nats: float = 0.0,
    max_odds: float = math.inf,
) -> np.ndarray:
    """log p(c|x)/p(not c|x) after one step, from the means of the two sides.

    The score is a mean of the two sides' scores, s = p s_c + (1 - p) s_r, and a step's mean is
    affine in the score, so mu = p mu_c + (1 - p) mu_r, or mu_r = mu - o (mu_c - mu) with the odds
    o = p/(1 - p).  Both sides step with variance v, and Bayes' rule for the ratio adds
    log N(x_s; mu_c, v) - log N(x_s; mu_r, v).
    """
    odds = np.minimum(np.exp(log_odds), max_odds)
    mean_rest = mean - per_sample(odds, mean) * (mean_neg - mean)
    log_ratio = squared_distance(x_next, mean_neg) - squared_distance(x_next, mean_rest)
    return log_odds - temperature / (2.0 * v) * log_ratio + offset_nats


# ---- the rules


def dng_scale(p: Any, guidance_scale: float) -> Any:
    """lambda = g p / (1 - p) (DNG, Eq. 10)."""
    return guidance_scale * p / (1.0 - p)


def dng(eps: np.ndarray, eps_neg: np.ndarray, p: np.ndarray, guidance_scale: float) -> np.ndarray:
    """eps - lambda (eps_neg - eps), lambda per sample (DNG, Eq. 10)."""
    return eps - per_sample(dng_scale(p, guidance_scale), eps) * (eps_neg - eps)


def cfg(eps: np.ndarray, eps_pos: np.ndarray, guidance_scale: float) -> np.ndarray:
    """eps + g (eps_pos - eps), plain conditional prediction at g = 1 (CFG, Eq. 6, w = g - 1)."""
    return eps + guidance_scale * (eps_pos - eps)


def negative_prompting(eps: np.ndarray, eps_neg: np.ndarray, guidance_scale: float) -> np.ndarray:
    """eps - g (eps_neg - eps)."""
    return eps - guidance_scale * (eps_neg - eps)


def sld(
    eps: np.ndarray,
    eps_neg: np.ndarray,
    momentum: np.ndarray,
    step: int,
    guidance_scale: float,
    threshold: float = 0.04,
    s_s: float = 100.0,
    s_m: float = 0.1,
    beta_m: float = 0.2,
    warmup: int = 0,
    gate: str = "signed",
) -> tuple[np.ndarray, np.ndarray]:
    """Guided prediction and the next momentum (DNG, Eq. 21, with SLD's momentum).

    Momentum gathers during the warm-up, guidance starts after it.
    """
    difference = eps - eps_neg
    guided = np.zeros_like(eps)
    gamma = np.zeros_like(eps)
    for index, value in np.ndenumerate(difference):
        measured = value if gate == "signed" else abs(value)
        scale = min(1.0, s_s * abs(value)) if measured < threshold else 0.0
        gamma[index] = scale * (eps_neg[index] - eps[index]) + s_m * momentum[index]
        guided[index] = eps[index] - (guidance_scale * gamma[index] if step >= warmup else 0.0)
    return guided, beta_m * momentum + (1.0 - beta_m) * gamma


def perp_neg(
    eps: np.ndarray, eps_neg: np.ndarray, positive: np.ndarray, guidance_scale: float
) -> np.ndarray:
    """eps - g (delta - (delta.u / u.u) u), u the positive direction of each sample (Perp-Neg).

    A sample without a positive direction (u = 0) has nothing to be orthogonal to.
    """
    guided = np.zeros_like(eps)
    for b in range(len(eps)):
        delta = (eps_neg[b] - eps[b]).ravel()
        u = positive[b].ravel()
        length = np.dot(u, u)
        along = np.dot(delta, u) / length * u if length > 0.0 else 0.0 * u
        guided[b] = eps[b] - guidance_scale * (delta - along).reshape(eps[b].shape)
    return guided


def contrastive_cfg(
    eps: np.ndarray, eps_neg: np.ndarray, guidance_scale: float, temperature: float
) -> np.ndarray:
    """eps - g w (eps_neg - eps), w = 2 e^{-tau |delta|^2}/(1 + e^{-tau |delta|^2}) (CCFG)."""
    decay = np.exp(-temperature * squared_distance(eps_neg, eps))
    weight = 2.0 * decay / (1.0 + decay)
    return eps - guidance_scale * per_sample(weight, eps) * (eps_neg - eps)


def cfg_beneath(eps_null: np.ndarray, eps_pos: np.ndarray, w: float) -> np.ndarray:
    """eps_null + w (eps_pos - eps_null), as text-to-image pipelines write it."""
    return eps_null + w * (eps_pos - eps_null)


def sld_pipeline(
    eps_null: np.ndarray,
    eps_pos: np.ndarray,
    eps_safety: np.ndarray,
    momentum: np.ndarray,
    step: int,
    w: float,
    warmup: int,
    sld_scale: float,
    threshold: float,
    momentum_scale: float,
    mom_beta: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Guided prediction and next momentum of the authors' pipeline in diffusers (SLD, Eqs. 3-8)."""
    guidance = eps_pos - eps_null
    scale = np.minimum(np.abs(eps_pos - eps_safety) * sld_scale, 1.0)
    scale = np.where(eps_pos - eps_safety >= threshold, 0.0, scale)
    safety = (eps_safety - eps_null) * scale
    safety = safety + momentum_scale * momentum
    momentum = mom_beta * momentum + (1.0 - mom_beta) * safety
    if step >= warmup:
        guidance = guidance - safety
    return eps_null + w * guidance, momentum


def contrastive_cfg_both(
    eps_null: np.ndarray, eps_pos: np.ndarray, eps_neg: np.ndarray, w: float, tau: float
) -> np.ndarray:
    """u + w f(c - u) (c - u) - w h(n - u) (n - u), both factors (CCFG)."""
    toward = 2.0 / (1.0 + np.exp(-tau * squared_distance(eps_pos, eps_null)))
    decay = np.exp(-tau * squared_distance(eps_neg, eps_null))
    away = 2.0 * decay / (1.0 + decay)
    guided = eps_null + w * per_sample(toward, eps_null) * (eps_pos - eps_null)
    return guided - w * per_sample(away, eps_null) * (eps_neg - eps_null)


def geoguide(
    eps: np.ndarray,
    eps_neg: np.ndarray,
    kappa: float,
    n_steps: int,
    alpha_ts: float,
    beta_ts: float,
    sigma_t: float,
) -> np.ndarray:
    """eps - lambda (eps_neg - eps), lambda = kappa sqrt(D)/(N |m| |delta|) (GeoGuide)."""
    m = -beta_ts / (alpha_ts * sigma_t)
    length = np.sqrt(squared_distance(eps_neg, eps))
    scale = kappa * math.sqrt(eps[0].size) / (n_steps * abs(m) * length)
    return eps - per_sample(scale, eps) * (eps_neg - eps)


def crg(
    eps: np.ndarray,
    eps_null: np.ndarray,
    eps_neg: np.ndarray,
    past: np.ndarray,
    lambda0: float,
    gain: float,
    threshold: float,
) -> np.ndarray:
    """c - lambda0 omega (n - u), omega = max(CP - threshold, 0)/(K |n - u|^2) (CRG)."""
    b = squared_distance(eps, eps_null) - squared_distance(eps, eps_neg)
    cp = gain / 2.0 * b + past
    omega = np.maximum(cp - threshold, 0.0) / (gain * squared_distance(eps_neg, eps_null))
    return eps - lambda0 * per_sample(omega, eps) * (eps_neg - eps_null)


def crg_kappa(beta: float, n_steps: int, alpha: float, alpha_bar: float) -> float:
    """kappa = beta T/(2 alpha (1 - alpha_bar)), which weighs b in the sum over steps, over T."""
    return beta * n_steps / (2.0 * alpha * (1.0 - alpha_bar))


def spell(x0: np.ndarray, points: np.ndarray, radius: float, scale: float) -> np.ndarray:
    """D + scale sum_k relu(r/|D - z_k| - 1)(D - z_k) (SPELL)."""
    moved = x0.copy()
    for point in points:
        distance = np.sqrt(squared_distance(x0, np.broadcast_to(point, x0.shape)))
        moved = moved + scale * per_sample(np.maximum(radius / distance - 1.0, 0.0), x0) * (
            x0 - point
        )
    return moved


def vl_dnp(
    eps_null: np.ndarray,
    eps_pos: np.ndarray,
    eps_neg: np.ndarray,
    w: float,
    w_neg: float,
    shown: np.ndarray,
) -> np.ndarray:
    """u + w (c - u) - w_neg (n - u) for the samples that showed it, u + w (c - u) for others."""
    guided = eps_null + w * (eps_pos - eps_null)
    for i in range(len(guided)):
        if shown[i]:
            guided[i] = guided[i] - w_neg * (eps_neg[i] - eps_null[i])
    return guided


def image_referenced(
    x: np.ndarray,
    x0: np.ndarray,
    density: np.ndarray,
    points: np.ndarray,
    alpha: float,
    sigma: float,
    prior: float,
) -> np.ndarray:
    """D + o (D - D_unsafe), o = p/(1 - p), p = P(unsafe) p_t(x | unsafe)/p_t(x) (Safe Denoiser)."""
    guided = np.zeros_like(x0)
    for i in range(len(x)):
        kernels = [
            math.exp(-np.sum((x[i] - alpha * z) ** 2) / (2.0 * sigma**2))
            / (2.0 * math.pi * sigma**2) ** (len(z) / 2)
            for z in points
        ]
        unsafe = sum(k * z for k, z in zip(kernels, points, strict=True)) / sum(kernels)
        p = prior * sum(kernels) / len(points) / density[i]
        guided[i] = x0[i] + p / (1.0 - p) * (x0[i] - unsafe)
    return guided


def cfg_plus_plus_step(
    alpha_bar_t: float,
    alpha_bar_s: float,
    x: np.ndarray,
    eps_null: np.ndarray,
    eps_pos: np.ndarray,
    guidance_scale: float,
) -> np.ndarray:
    """DDIM with the guided x0 and the unguided noise (CFG++, Algorithm 2)."""
    guided = cfg_beneath(eps_null, eps_pos, guidance_scale)
    x0 = (x - np.sqrt(1.0 - alpha_bar_t) * guided) / np.sqrt(alpha_bar_t)
    return np.sqrt(alpha_bar_s) * x0 + np.sqrt(1.0 - alpha_bar_s) * eps_null


def fbg_scale(log_ratio: Any, mixing: float) -> Any:
    """lambda = p(c|x)/(p(c|x) - (1 - pi)), with log p(c|x) the tracked ratio (FBG)."""
    return np.exp(log_ratio) / (np.exp(log_ratio) - (1.0 - mixing))


def fbg(eps: np.ndarray, eps_pos: np.ndarray, log_ratio: np.ndarray, mixing: float) -> np.ndarray:
    """eps + lambda (eps_pos - eps), lambda per sample (FBG)."""
    return eps + per_sample(fbg_scale(log_ratio, mixing), eps) * (eps_pos - eps)


def fbg_floor(mixing: float, max_scale: float) -> float:
    """The log ratio at which lambda is max_scale: log((1 - pi) lambda/(lambda - 1)) (FBG)."""
    return math.log((1.0 - mixing) * max_scale / (max_scale - 1.0))


def fbg_step_offset(mixing: float, t0: float, n_steps: int, reference_scale: float = 3.0) -> float:
    """The offset of a step, in nats, at which the scale 3 is reached at the time t0 (FBG)."""
    return fbg_floor(mixing, reference_scale) / ((1.0 - t0) * n_steps)


def fbg_temperature(variance_at_t1: float, step_offset: float) -> float:
    """tau = |2 v(t1) step_offset / 10| (FBG)."""
    return abs(2.0 * variance_at_t1 * step_offset / 10.0)


def fbg_update(
    log_ratio: np.ndarray,
    x_next: np.ndarray,
    mean: np.ndarray,
    mean_pos: np.ndarray,
    v: float,
    temperature: float,
    step_offset: float,
    floor: float,
    ceiling: float = 3.0,
) -> np.ndarray:
    """The log ratio after one step, kept in [floor, ceiling] (FBG, and its program)."""
    difference = squared_distance(x_next, mean_pos) - squared_distance(x_next, mean)
    log_ratio = log_ratio - temperature / (2.0 * v) * difference + step_offset
    return np.clip(log_ratio, floor, ceiling)


# ---- whole chains

Predict = Callable[[np.ndarray, int], np.ndarray]


def paper_chain(
    c: Coefficients,
    predict: Predict,
    predict_neg: Predict,
    x: np.ndarray,
    noises: Sequence[np.ndarray],
    guidance_scale: float,
    prior: float,
    temperature: float = 1.0,
    offset: float = 0.0,
    p_min: float = 1e-6,
    p_max: float = 0.99,
    noise_variance: str = "small",
    tracker_variance: str = "small",
) -> tuple[np.ndarray, np.ndarray]:
    """DNG, Algorithms 1 and 2, from x_T to x_0; ``noises[t]`` is the noise of the step at t.

    The last step has no noise, so its small variance says nothing about the class: log p is left
    as it was.
    """
    log_p = np.full(len(x), np.log(prior))
    for t in reversed(range(len(c.betas))):
        eps, eps_neg = predict(x, t), predict_neg(x, t)
        guided = dng(eps, eps_neg, np.exp(log_p), guidance_scale)
        x_next = ddpm_step(c, t, x, guided, noises[t], noise_variance)
        if t > 0:
            log_p = paper_update(
                log_p,
                x_next,
                ddpm_mean(c, t, x, eps),
                ddpm_mean(c, t, x, eps_neg),
                ddpm_variance(c, t, tracker_variance),
                temperature,
                offset,
                p_min,
                p_max,
            )
        x = x_next
    return x, log_p


def published_chain(
    c: Coefficients,
    predict: Predict,
    predict_neg: Predict,
    x: np.ndarray,
    noises: Sequence[np.ndarray],
    guidance_scale: float,
    prior: float,
    temperature: float = 1.0,
    offset: float = 0.0,
    p_min: float = 1e-6,
    p_max: float = 0.99,
) -> tuple[np.ndarray, np.ndarray]:
    """The authors' program: noise with the large variance, p divided by the small one."""
    p = np.full(len(x), prior)
    for t in reversed(range(len(c.betas))):
        eps, eps_neg = predict(x, t), predict_neg(x, t)
        guided = dng(eps, eps_neg, p, guidance_scale)
        x_next = ddpm_step(c, t, x, guided, noises[t], "large")
        p = published_update(p, c, t, x, x_next, eps, eps_neg, temperature, offset, p_min, p_max)
        x = x_next
    return x, p


def log_odds_chain(
    c: Coefficients,
    predict: Predict,
    predict_neg: Predict,
    x: np.ndarray,
    noises: Sequence[np.ndarray],
    guidance_scale: float,
    prior: float,
    temperature: float = 1.0,
    offset_nats: float = 0.0,
    max_odds: float = math.inf,
    noise_variance: str = "small",
    tracker_variance: str = "small",
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 with :func:`log_odds_update`; the last step leaves the odds as they were."""
    log_odds = np.full(len(x), np.log(prior) - np.log1p(-prior))
    for t in reversed(range(len(c.betas))):
        eps, eps_neg = predict(x, t), predict_neg(x, t)
        odds = np.minimum(np.exp(log_odds), max_odds)
        guided = eps - per_sample(guidance_scale * odds, eps) * (eps_neg - eps)
        x_next = ddpm_step(c, t, x, guided, noises[t], noise_variance)
        if t > 0:
            log_odds = log_odds_update(
                log_odds,
                x_next,
                ddpm_mean(c, t, x, eps),
                ddpm_mean(c, t, x, eps_neg),
                ddpm_variance(c, t, tracker_variance),
                temperature,
                offset_nats,
                max_odds,
            )
        x = x_next
    return x, log_odds


# ---- one step, of any process, sampler and kind of prediction


class Interval(NamedTuple):
    """The two ends of a step t -> s of a process x_t = alpha_t x_0 + sigma_t noise."""

    alpha_t: float
    sigma_t: float
    alpha_s: float
    sigma_s: float


def noise_of(at: Interval, x: np.ndarray, prediction: np.ndarray, kind: str) -> np.ndarray:
    """The noise prediction that is equivalent to a prediction of another kind."""
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        x0 = prediction
    elif kind == "v_prediction":
        x0 = (at.alpha_t * x - at.sigma_t * prediction) / (at.alpha_t**2 + at.sigma_t**2)
    else:
        assert kind == "flow_prediction"
        x0 = x - at.sigma_t * prediction
    return (x - at.alpha_t * x0) / at.sigma_t


def prediction_of(at: Interval, x: np.ndarray, eps: np.ndarray, kind: str) -> np.ndarray:
    """eps, v = alpha eps - sigma x_0, x_0 or eps - x_0."""
    x0 = (x - at.sigma_t * eps) / at.alpha_t
    return {
        "epsilon": eps,
        "v_prediction": at.alpha_t * eps - at.sigma_t * x0,
        "sample": x0,
        "flow_prediction": eps - x0,
    }[kind]


def predicted_x0(at: Interval, x: np.ndarray, eps: np.ndarray, clip: float | None) -> np.ndarray:
    """x_0 of a noise prediction (DDPM, Eq. 15), in [-clip, clip] if it is clipped."""
    x0 = (x - at.sigma_t * eps) / at.alpha_t
    return x0 if clip is None else np.clip(x0, -clip, clip)


def family_mean(at: Interval, x: np.ndarray, x0: np.ndarray, eta: float) -> np.ndarray:
    """A x + B x_0 with A = sqrt(sigma_s^2 - V)/sigma_t, B = alpha_s - alpha_t A (DDIM, Eq. 12).

    V is eta^2 times the small variance: the DDPM posterior at eta = 1, no noise at eta = 0.
    """
    variance = eta**2 * step_variance(*at, "small")
    a = np.sqrt(at.sigma_s**2 - variance) / at.sigma_t
    b = at.alpha_s - at.alpha_t * a
    return a * x + b * x0


def euler_maruyama_mean(at: Interval, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """x + f dt + g^2 score dt, with f dt = -log(alpha_t/alpha_s) x and g^2 dt = beta_ts.

    A step to sigma = 0, where the drift is unbounded, goes to the predicted x_0.
    """
    if at.sigma_s == 0.0:
        return at.alpha_s * x0
    score = (at.alpha_t * x0 - x) / at.sigma_t**2
    return x - np.log(at.alpha_t / at.alpha_s) * x + step_variance(*at, "large") * score


def rest_divergence(p: Any, gap: np.ndarray, divergence: Any, divergence_neg: Any) -> Any:
    """div s_r, from gap = s_c - s and the divergences of s and s_c.

    s = p s_c + (1 - p) s_r and grad p = p (s_c - s), so
    div s = p div s_c + (1 - p) div s_r + p (1 - p) |s_c - s_r|^2, and s_c - s_r = gap / (1 - p).
    """
    between = np.sum((gap / per_sample(1.0 - p, gap)) ** 2, axis=1)
    return (divergence - p * divergence_neg - p * (1.0 - p) * between) / (1.0 - p)
