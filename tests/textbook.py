"""The equations once more, independently, as the textbooks write them.

Nothing here is imported from the packages, nothing is clever, and nothing is fast.  Means are
formed before they are compared, squared norms before they are subtracted, and every formula keeps
the names of its source, so that it can be checked against the page.  Arrays have shape (B, D), or
(B,) for one number per sample; everything is float64.

    DDPM   Ho, Jain and Abbeel 2020, arXiv 2006.11239
    DDIM   Song, Meng and Ermon 2021, arXiv 2010.02502
    CFG    Ho and Salimans 2022, arXiv 2207.12598
    SLD    Schramowski et al. 2023, arXiv 2211.05105
    DNG    Koulischer et al. 2025, arXiv 2410.14398
    FBG    Koulischer et al. 2025, arXiv 2506.06085
    CCFG   Chang, Chung and Ye 2024, arXiv 2411.17077
    Perp-Neg   Armandpour et al. 2023, arXiv 2304.04968

The second half is a Gaussian mixture, twice: with SciPy, component by component, and with mpmath,
where the weights, means, covariances, alpha, sigma and x are taken as the exact rationals that the
floats are, and at least 50 digits of every result are right.  An mpf keeps its digits wherever it
goes, but arithmetic on it has those of the moment: subtract within ``mpmath.workdps(60)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mpmath
import numpy as np
from mpmath import mp, mpf
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

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
    """The same as the authors' program does it: on p itself.

    It divides by the small variance, except in the last step, where that is zero and the program
    takes 1 - alpha_t.
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
    """The noise prediction that says what another kind of prediction says."""
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        x0 = prediction
    elif kind == "v_prediction":
        x0 = (at.alpha_t * x - at.sigma_t * prediction) / (at.alpha_t**2 + at.sigma_t**2)
    else:
        assert kind == "flow"
        x0 = x - at.sigma_t * prediction
    return (x - at.alpha_t * x0) / at.sigma_t


def prediction_of(at: Interval, x: np.ndarray, eps: np.ndarray, kind: str) -> np.ndarray:
    """eps, v = alpha eps - sigma x_0, x_0 or eps - x_0."""
    x0 = (x - at.sigma_t * eps) / at.alpha_t
    return {
        "epsilon": eps,
        "v_prediction": at.alpha_t * eps - at.sigma_t * x0,
        "sample": x0,
        "flow": eps - x0,
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

    A step to sigma = 0, where the drift has no end, goes to the predicted x_0.
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


# ---- the Gaussian mixture in float64: x (N, D), weights (K,), means (K, D),
# ---- covariances (K,) times the identity, (K, D) on the diagonal, or (K, D, D)


def _float_components(
    weights: Any, means: Any, covariances: Any, alpha: float, sigma: float
) -> list[tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(weight, alpha m, alpha^2 C + sigma^2 I, m, C) of each component, C always a matrix."""
    weights, means = np.asarray(weights, dtype=float), np.asarray(means, dtype=float)
    covariances = np.asarray(covariances, dtype=float)
    identity = np.eye(means.shape[1])
    components = []
    for k in range(len(weights)):
        if covariances.ndim == 1:
            c = covariances[k] * identity
        elif covariances.ndim == 2:
            c = np.diag(covariances[k])
        else:
            c = covariances[k]
        noisy = alpha**2 * c + sigma**2 * identity
        components.append((weights[k] / weights.sum(), alpha * means[k], noisy, means[k], c))
    return components


def _log_joint(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float, sigma: float
) -> np.ndarray:
    """log w_k + log N(x; alpha m_k, alpha^2 C_k + sigma^2 I), shape (N, K)."""
    columns = []
    with np.errstate(divide="ignore"):
        for w, mean, covariance, _, _ in _float_components(
            weights, means, covariances, alpha, sigma
        ):
            columns.append(
                np.log(w) + np.atleast_1d(multivariate_normal.logpdf(x, mean, covariance))
            )
    return np.stack(columns, axis=1)


def log_prob(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float = 1.0, sigma: float = 0.0
) -> np.ndarray:
    """log sum_k w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I), shape (N,)."""
    return logsumexp(_log_joint(x, weights, means, covariances, alpha, sigma), axis=1)


def responsibilities(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float = 1.0, sigma: float = 0.0
) -> np.ndarray:
    """p(k | x), shape (N, K)."""
    joint = _log_joint(x, weights, means, covariances, alpha, sigma)
    return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))


def log_posterior(
    x: Any,
    components: Iterable[int],
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    complement: bool = False,
) -> np.ndarray:
    """log p(components | x), or of the other components, shape (N,)."""
    joint = _log_joint(x, weights, means, covariances, alpha, sigma)
    chosen = set(components)
    kept = [k for k in range(joint.shape[1]) if (k in chosen) != complement]
    if not kept:
        return np.full(len(joint), -np.inf)
    return logsumexp(joint[:, kept], axis=1) - logsumexp(joint, axis=1)


def score(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float = 1.0, sigma: float = 0.0
) -> np.ndarray:
    """grad log p(x) = -sum_k p(k|x) S_k^{-1} (x - alpha m_k), shape (N, D)."""
    x = np.asarray(x, dtype=float)
    shares = responsibilities(x, weights, means, covariances, alpha, sigma)
    result = np.zeros_like(x)
    for k, (_, mean, covariance, _, _) in enumerate(
        _float_components(weights, means, covariances, alpha, sigma)
    ):
        for n in range(len(x)):
            result[n] -= shares[n, k] * np.linalg.solve(covariance, x[n] - mean)
    return result


def posterior_mean(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float = 1.0, sigma: float = 0.0
) -> np.ndarray:
    """E[x_0 | x] = sum_k p(k|x) (m_k + alpha C_k S_k^{-1} (x - alpha m_k)), shape (N, D)."""
    x = np.asarray(x, dtype=float)
    shares = responsibilities(x, weights, means, covariances, alpha, sigma)
    result = np.zeros_like(x)
    for k, (_, mean, noisy, clean_mean, clean) in enumerate(
        _float_components(weights, means, covariances, alpha, sigma)
    ):
        for n in range(len(x)):
            gain = alpha * clean @ np.linalg.solve(noisy, x[n] - mean)
            result[n] += shares[n, k] * (clean_mean + gain)
    return result


# ---- the Gaussian mixture in many digits: one point x (D,), results are mpf


class _Component(NamedTuple):
    log_weight: Any  # log w_k, -inf for a component without weight
    maha: Any  # (x - alpha m)^T S^{-1} (x - alpha m)
    log_det: Any  # log det S
    gradient: list[Any]  # -S^{-1} (x - alpha m), the component's own score
    trace_inverse: Any  # tr S^{-1}
    gain: list[Any]  # m + alpha C S^{-1} (x - alpha m), the component's posterior mean
    lost_digits: int  # by how much S amplifies a rounding error


def _mp_cholesky(matrix: list[list[Any]]) -> list[list[Any]]:
    size = len(matrix)
    lower = [[mpf(0)] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - mpmath.fsum(lower[i][k] * lower[j][k] for k in range(j))
            if i == j:
                if rest <= 0:
                    raise ValueError("the covariance is not positive definite")
                lower[i][i] = mpmath.sqrt(rest)
            else:
                lower[i][j] = rest / lower[j][j]
    return lower


def _mp_solve_lower(lower: list[list[Any]], b: list[Any]) -> list[Any]:
    y: list[Any] = []
    for i in range(len(b)):
        y.append((b[i] - mpmath.fsum(lower[i][k] * y[k] for k in range(i))) / lower[i][i])
    return y


def _mp_solve_upper(lower: list[list[Any]], y: list[Any]) -> list[Any]:
    size = len(y)
    z: list[Any] = [mpf(0)] * size
    for i in reversed(range(size)):
        tail = mpmath.fsum(lower[k][i] * z[k] for k in range(i + 1, size))
        z[i] = (y[i] - tail) / lower[i][i]
    return z


def _mp_component(
    x: list[Any], w: Any, m: list[Any], c: Any, form: int, alpha: Any, sigma: Any
) -> _Component:
    size = len(x)
    gap = [x[d] - alpha * m[d] for d in range(size)]
    if form < 3:
        clean = [c] * size if form == 1 else c
        noisy = [alpha**2 * clean[d] + sigma**2 for d in range(size)]
        solved = [gap[d] / noisy[d] for d in range(size)]
        log_det = mpmath.fsum(mpmath.log(s) for s in noisy)
        trace_inverse = mpmath.fsum(1 / s for s in noisy)
        gain = [m[d] + alpha * clean[d] * solved[d] for d in range(size)]
        maha = mpmath.fsum(gap[d] * solved[d] for d in range(size))
        lost = 0
    else:
        matrix = [
            [alpha**2 * c[i][j] + (sigma**2 if i == j else 0) for j in range(size)]
            for i in range(size)
        ]
        lower = _mp_cholesky(matrix)
        whitened = _mp_solve_lower(lower, gap)
        solved = _mp_solve_upper(lower, whitened)
        maha = mpmath.fsum(y * y for y in whitened)
        log_det = 2 * mpmath.fsum(mpmath.log(lower[i][i]) for i in range(size))
        columns = [_mp_solve_lower(lower, [mpf(i == j) for i in range(size)]) for j in range(size)]
        trace_inverse = mpmath.fsum(y * y for column in columns for y in column)
        gain = [
            m[i] + alpha * mpmath.fsum(c[i][j] * solved[j] for j in range(size))
            for i in range(size)
        ]
        # tr S tr S^{-1} is at least the condition number.
        condition = mpmath.fsum(matrix[i][i] for i in range(size)) * trace_inverse
        lost = _digits(condition)
    log_weight = mpmath.log(w) if w > 0 else mpf("-inf")
    return _Component(
        log_weight, maha, log_det, [-value for value in solved], trace_inverse, gain, lost
    )


def _digits(value: Any) -> int:
    """Decimal digits before the point."""
    return max(0, int(mpmath.mag(value) * 0.302) + 1) if value > 0 else 0


def _mp_components(
    x: Any, weights: Any, means: Any, covariances: Any, alpha: float, sigma: float
) -> list[_Component]:
    covariances = np.asarray(covariances, dtype=np.float64)
    form = covariances.ndim
    if form == 1:
        exact = [mpf(float(c)) for c in covariances]
    elif form == 2:
        exact = [[mpf(float(v)) for v in row] for row in covariances]
    else:
        exact = [[[mpf(float(v)) for v in row] for row in c] for c in covariances]
    point = [mpf(float(v)) for v in np.asarray(x).ravel()]
    ws = [mpf(float(w)) for w in np.asarray(weights).ravel()]
    total = mpmath.fsum(ws)
    return [
        _mp_component(
            point,
            ws[k] / total,
            [mpf(float(v)) for v in np.asarray(means)[k]],
            exact[k],
            form,
            mpf(float(alpha)),
            mpf(float(sigma)),
        )
        for k in range(len(ws))
    ]


def _in_many_digits(
    finish: Callable[[list[_Component]], Any],
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float,
    sigma: float,
    digits: int,
) -> Any:
    """``finish(components)`` with as many working digits as its subtractions need.

    Log-densities of size maha are subtracted from each other and exponentiated, so an error of
    10^-digits in a result needs log10(maha) digits more in them; solving with S loses the digits
    of its condition number, twice where a solution is used in another product.  A first pass
    measures both, and is itself the answer when it had digits to spare.
    """
    working = digits + 60
    while True:
        with mp.workdps(working):
            components = _mp_components(x, weights, means, covariances, alpha, sigma)
            size = max(_digits(c.maha) + _digits(abs(c.log_det)) for c in components)
            needed = digits + 20 + size + 2 * max(c.lost_digits for c in components)
            if needed <= working:
                return finish(components)
        working = needed + 20


def _log_joints(components: list[_Component]) -> list[Any]:
    """log w_k N_k(x) without the (2 pi)^{-D/2}."""
    return [c.log_weight - (c.maha + c.log_det) / 2 for c in components]


def _mp_logsumexp(values: list[Any]) -> Any:
    top = max(values)
    if top == mpf("-inf"):
        return top
    index = values.index(top)
    others = [mpmath.exp(v - top) for i, v in enumerate(values) if i != index]
    # log1p: a second term of e^(-10^20) is kept, where 1 + e^(-10^20) would be 1.
    return top + mpmath.log1p(mpmath.fsum(others))


def _mp_shares(components: list[_Component]) -> list[Any]:
    joints = _log_joints(components)
    total = _mp_logsumexp(joints)
    return [mpmath.exp(v - total) for v in joints]


def exact_log_prob(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> Any:
    """log p(x) at one point x (D,), an mpf."""

    def finish(components: list[_Component]) -> Any:
        size = len(components[0].gradient)
        return _mp_logsumexp(_log_joints(components)) - size * mpmath.log(2 * mp.pi) / 2

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def exact_log_posterior(
    x: Any,
    chosen: Iterable[int],
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    complement: bool = False,
    digits: int = 50,
) -> Any:
    """log p(chosen | x) at one point, or of the other components, an mpf.

    -log(1 + e^{-l}) of the log odds l, by log1p, so that both ends keep their digits: a posterior
    next to one has a logarithm of -e^{-|l|}, which may be e^(-10^20) and is not zero.
    """
    inside = set(chosen)

    def finish(components: list[_Component]) -> Any:
        joints = _log_joints(components)
        ours = [v for k, v in enumerate(joints) if (k in inside) != complement]
        theirs = [v for k, v in enumerate(joints) if (k in inside) == complement]
        minus_infinity = mpf("-inf")
        a = _mp_logsumexp(ours) if ours else minus_infinity
        b = _mp_logsumexp(theirs) if theirs else minus_infinity
        if a == minus_infinity:
            return minus_infinity
        if b == minus_infinity:
            return mpf(0)
        if b <= a:
            return -mpmath.log1p(mpmath.exp(b - a))
        return (a - b) - mpmath.log1p(mpmath.exp(a - b))

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def exact_responsibilities(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> list[Any]:
    """p(k | x) at one point, K mpf."""
    return _in_many_digits(_mp_shares, x, weights, means, covariances, alpha, sigma, digits)


def exact_score(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> list[Any]:
    """grad log p at one point, D mpf."""

    def finish(components: list[_Component]) -> list[Any]:
        return _weighted(_mp_shares(components), [c.gradient for c in components])

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def exact_posterior_mean(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> list[Any]:
    """E[x_0 | x] at one point, D mpf."""

    def finish(components: list[_Component]) -> list[Any]:
        return _weighted(_mp_shares(components), [c.gain for c in components])

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def exact_score_divergence(
    x: Any,
    weights: Any,
    means: Any,
    covariances: Any,
    alpha: float = 1.0,
    sigma: float = 0.0,
    digits: int = 50,
) -> Any:
    """The Laplacian of log p at one point: sum_k p(k|x) (|s_k - s|^2 - tr S_k^{-1}), an mpf.

    From lap p_k = p_k (|s_k|^2 - tr S_k^{-1}) and lap log p = lap p / p - |s|^2; the variance of
    the s_k replaces a difference of squares.
    """

    def finish(components: list[_Component]) -> Any:
        shares = _mp_shares(components)
        mean = _weighted(shares, [c.gradient for c in components])
        return mpmath.fsum(
            share
            * (
                mpmath.fsum((a - b) ** 2 for a, b in zip(c.gradient, mean, strict=True))
                - c.trace_inverse
            )
            for share, c in zip(shares, components, strict=True)
        )

    return _in_many_digits(finish, x, weights, means, covariances, alpha, sigma, digits)


def _weighted(shares: list[Any], vectors: list[list[Any]]) -> list[Any]:
    return [
        mpmath.fsum(share * vector[d] for share, vector in zip(shares, vectors, strict=True))
        for d in range(len(vectors[0]))
    ]
