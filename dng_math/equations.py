"""Every equation of Dynamic Negative Guidance, written once as arithmetic on its arguments.

The functions use + - * / and nothing else, so the same source runs on Python floats, NumPy arrays
and torch tensors, and is compiled by Numba for CPUs and by Triton for GPUs.  Exponentials, clamps
and gates belong to the callers, because each backend has its own.

The cited sections are those of docs/theory.md, which derives every equation or gives its source.

Notation: ``x = alpha x0 + sigma eps`` at the noisier time t, ``x_next`` at the cleaner time s.
A *prediction* is of the noise or of x0; the guidance rules are affine, so they have the same form
for both.  ``difference`` is another prediction minus the base prediction.  The reverse step has
mean ``x_factor x + x0_factor x0``; ``gap = mu_other - mu_base`` is the difference of two such
means and ``residual = x_next - mu_base``, so every tracker needs only ``|gap|^2`` and
``residual . gap``.  Two large squared norms are never subtracted.

Sources: DNG = arXiv 2410.14398, DDPM = 2006.11239, DDIM = 2010.02502, CFG = 2207.12598,
SLD = 2211.05105, Perp-Neg = 2304.04968, contrastive CFG = 2411.17077, FBG = 2506.06085,
CFG++ = 2406.08070, GeoGuide = 2407.12889, SPELL = 2410.06025, CRG = 2606.29801.
"""

# ---------------------------------------------------------------- model outputs


def noise_from_score(score, sigma):
    """Noise prediction eps = -sigma grad log p(x); DNG section 2; docs/theory.md, section 2.3."""
    return -sigma * score


def x0_from_noise(x, eps, alpha, sigma):
    """x0 with x = alpha x0 + sigma eps; DDPM Eq. 15; docs/theory.md, section 2.3."""
    return (x - sigma * eps) / alpha


def x0_from_velocity(x, velocity, alpha, sigma):
    """x0 from v = alpha eps - sigma x0 (arXiv 2202.00512); docs/theory.md, section 2.3."""
    return (alpha * x - sigma * velocity) / (alpha * alpha + sigma * sigma)


def x0_from_flow(x, velocity, sigma):
    """x0 from the velocity eps - x0, where alpha = 1 - sigma; docs/theory.md, section 2.3."""
    return x - sigma * velocity


# ---------------------------------------------------------------- the reverse step


def transition_alpha(alpha_t, alpha_s):
    """alpha_ts of p(x_t | x_s) = N(alpha_ts x_s, beta_ts); docs/theory.md, section 2.1."""
    return alpha_t / alpha_s


def transition_variance(sigma_t, sigma_s, alpha_ts):
    """beta_ts of p(x_t | x_s); for one DDPM step this is beta_t; docs/theory.md, section 2.1."""
    return sigma_t * sigma_t - alpha_ts * alpha_ts * sigma_s * sigma_s


def posterior_variance(beta_ts, sigma_s, sigma_t):
    """Variance of p(x_s | x_t, x0), "small"; DDPM Eq. 7; docs/theory.md, section 3.1."""
    return beta_ts * (sigma_s * sigma_s) / (sigma_t * sigma_t)


def step_mean(x, x0, x_factor, x0_factor):
    """Mean of the reverse step; DDPM Eq. 7, DDIM Eq. 12; docs/theory.md, section 3.2."""
    return x_factor * x + x0_factor * x0


def step(mean, deviation, noise):
    """x_next from its mean, standard deviation and a standard normal."""
    return mean + deviation * noise


def step_residual(x, base, shift, noise, x_drift, base_drift, factor, deviation):
    """x_next - mu_base, without forming either (derived; docs/theory.md, section 6.6).

    ``shift`` is the guided prediction minus the base one, and ``factor`` multiplies a prediction in
    the step.  The drifts are the factors of the step minus those of the transition that mu_base
    belongs to; they are zero if step and transition agree.
    """
    return x_drift * x + base_drift * base + factor * shift + deviation * noise


# ---------------------------------------------------------------- guidance


def toward(base, difference, scale):
    """base + scale difference: CFG Eq. 6, FBG Eq. 8; docs/theory.md, sections 5.3 and 5.7."""
    return base + scale * difference


def away(base, difference, scale):
    """base - scale difference: negative prompting, and DNG Eq. 10 with its dynamic scale.

    docs/theory.md, sections 5.1 and 5.3.
    """
    return base - scale * difference


def dynamic_scale(guidance_scale, posterior, remainder):
    """lambda = g p / (1 - p), DNG Eq. 10; ``remainder`` is 1 - p, or 1 - sum_j p_j for several.

    docs/theory.md, sections 5.1 and 5.2.
    """
    return guidance_scale * posterior / remainder


def perpendicular(difference, direction, projection):
    """The part of ``difference`` orthogonal to ``direction``; Perp-Neg Eq. 5.

    docs/theory.md, section 5.5.
    """
    return difference - projection * direction


def contrastive_scale(guidance_scale, decay):
    """Scale of contrastive CFG, with decay = exp(-tau |eps_neg - eps|^2).

    docs/theory.md, section 5.6.
    """
    return guidance_scale * (2.0 * decay) / (1.0 + decay)


def contrastive_attraction(decay):
    """Factor of contrastive CFG's positive side, with decay = exp(-tau |eps_pos - eps_null|^2).

    docs/theory.md, section 5.6.
    """
    return 2.0 / (1.0 + decay)


def safe_correction(scale, difference, momentum_scale, momentum):
    """SLD's correction gamma, SLD Eq. 6 and DNG Eq. 21; ``scale`` is elementwise.

    docs/theory.md, section 5.4.
    """
    return scale * difference + momentum_scale * momentum


def safe_momentum(momentum, correction, decay):
    """SLD's momentum for the next step, SLD Eq. 7; docs/theory.md, section 5.4."""
    return decay * momentum + (1.0 - decay) * correction


def feedback_scale(ratio, pi):
    """FBG's lambda = e^L / (e^L - (1 - pi)), with ratio = e^L; docs/theory.md, section 5.7."""
    return ratio / (ratio - (1.0 - pi))


def geometric_scale(length, distance):
    """Scale with which a step's mean moves by ``length``; ``distance`` is |gap|.

    docs/theory.md, section 5.10.
    """
    return length / distance


def regulating_evidence(to_null_sq, to_negative_sq):
    """b of CRG, from |c - u|^2 and |c - n|^2; docs/theory.md, section 5.11."""
    return to_null_sq - to_negative_sq


def regulating_scale(guidance_scale, surplus, gain, norm_sq):
    """CRG's scale, where the evidence exceeds its threshold by ``surplus``.

    docs/theory.md, section 5.11.
    """
    return guidance_scale * surplus / (gain * norm_sq)


def shield(radius, distance):
    """How far SPELL moves a prediction from a point, as a share of its distance from it.

    docs/theory.md, section 5.12.
    """
    return radius / distance - 1.0


def plus_plus_scale(guidance_scale, alpha_t, sigma_t, alpha_s, sigma_s):
    """CFG's scale that makes DDIM's step that of CFG++; docs/theory.md, section 5.14."""
    whole = alpha_s * sigma_t
    return guidance_scale * whole / (whole - alpha_t * sigma_s)


def log_weight(noise_shift, shift_sq, deviation):
    """log N(x_s; mu, v) - log N(x_s; mu + shift, v) of x_s = mu + shift + sqrt(v) z.

    Derived; docs/theory.md, section 7.1.

    ``noise_shift`` is z . shift, ``shift_sq`` is |shift|^2, and ``deviation`` is sqrt(v).
    """
    return -noise_shift / deviation - shift_sq / (2.0 * deviation * deviation)


# ---------------------------------------------------------------- the posterior, tracked


def log_likelihood_ratio(gap_sq, residual_gap, variance):
    """log N(x_next; mu_other, v) - log N(x_next; mu_base, v); DNG Eq. 12.

    docs/theory.md, section 6.2.
    """
    return (2.0 * residual_gap - gap_sq) / (2.0 * variance)


def log_odds_ratio(odds, gap_sq, residual_gap, variance):
    """log N(x_next; mu_c, v) - log N(x_next; mu_rest, v), with mu_rest = mu - odds gap.

    Derived; docs/theory.md, section 6.3.

    The base is the mixture p c + (1 - p) rest, so its mean lies between the two.  ``odds`` is
    p / (1 - p) as the caller caps it.
    """
    return (1.0 + odds) * (2.0 * residual_gap - (1.0 - odds) * gap_sq) / (2.0 * variance)


def tracker_update(state, log_ratio, variance, temperature, offset, offset_nats):
    """The tracked log p(c|x_s), or log-odds, from its value at t; DNG Eq. 12 and Algorithm 2.

    docs/theory.md, sections 6.2, 6.3 and 6.8.

    With :func:`log_likelihood_ratio` and a state log p this is the paper's tracker, with
    :func:`log_odds_ratio` and a state log p/(1-p) the normalised one.  ``offset`` is the
    paper's and is divided by 2 v; ``offset_nats`` is added as it is.
    """
    return state + temperature * log_ratio + offset / (2.0 * variance) + offset_nats


def divergence_correction(eta, beta_ts, divergence_gap):
    """The term that the log ratio of a step lacks when the reverse noise has eta < 1.

    Derived; docs/theory.md, section 6.9.

    ``divergence_gap`` is div s_c - div s, the difference of the divergences of the scores.
    """
    return -(1.0 - eta * eta) * (0.5 * beta_ts) * divergence_gap


def rest_divergence_gap(odds, divergence_gap, score_gap_sq):
    """div s_c - div s_rest from div s_c - div s and |s_c - s|^2.

    Derived; docs/theory.md, section 6.9.
    """
    return (1.0 + odds) * (divergence_gap + odds * score_gap_sq)


# ------------------------------------------------- the posterior, along the path of the points


def path_rate(product, divergence_term):
    """tau dL/dtau of L = log p(x|c)/p(x) at fixed u = x/alpha, with tau = sigma^2/alpha^2.

    Derived; docs/theory.md, section 6.11.

    ``product`` is (eps_c - eps) . (eps_c + eps), and ``divergence_term`` is
    sigma^2 (div s_c - div s), for the scores in x.
    """
    return 0.5 * (product + divergence_term)


def path_end(pull, rate, weight):
    """What one end of a step adds to the line integral of L.

    Derived; docs/theory.md, section 6.11.

    ``pull`` is the gradient of L at this end along the way, and ``weight`` what the rate counts
    for; both depend on the coordinates in which the trapezoid is taken.
    """
    return pull - rate * weight


def path_log_ratio(before, after, odds, next_odds):
    """Trapezoid of the line integral of L, or of log p/(1-p), between two points.

    Derived; docs/theory.md, section 6.11.

    ``before`` and ``after`` are the :func:`path_end` of the two points.  The log-odds change
    1 + o times as fast as log p; with odds of 0 the result is the change of log p.
    """
    return 0.5 * ((1.0 + odds) * before + (1.0 + next_odds) * after)
