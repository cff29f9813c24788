"""The exact target density of guidance, and in one dimension its distribution function.

Forgetting the components c of a mixture p with scale g targets

    q(x) = p(x) p(not c | x)^g / Z                                       (guided target)

because the guided score s - g o (s_c - s), with o = p(c|x)/p(not c|x), is the gradient of
log p + g log p(not c | .) (Koulischer et al., ICLR 2025, Eq. 10 with the exact posterior).

:func:`guided_log_density` is log q + log Z in any dimension, with its score, exact draws and an
estimate of log Z.  :func:`guided_density` is q itself in one dimension, with its distribution
function and its quantiles to about twelve digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import ArrayLike, NDArray

from dng_math import checks
from dng_math.mixture import GaussianMixture

Array = NDArray[np.float64]

# A Gaussian on a panel of 1.5 standard deviations is a polynomial of degree 15 to 1e-15.
_NODES, _NODE_WEIGHTS = legendre.leggauss(16)
# Values at the nodes -> Legendre coefficients of the interpolant (discrete orthogonality).
_TO_LEGENDRE = (np.arange(16) + 0.5)[:, None] * legendre.legvander(_NODES, 15).T * _NODE_WEIGHTS
# 256 panels put nodes at most 4e-4 of the interval apart, so that several of them sample a mode
# whose width is 1e-3 of the interval before any panel is refined.
_FIRST_PANELS = 256
_MAX_PANELS = 200_000
_PANEL_TOLERANCE = 1e-14  # relative to the total mass
_CHUNK = 16384  # points handled at once: bounds memory, whatever the size of the sample


@dataclass(frozen=True, eq=False)
class TargetDensity1D(checks.ReadOnly):
    """A normalised density on [lo, hi] from a log-density known up to a constant.

    The interval is cut into panels, which are halved until the Legendre series of each has
    converged.  A panel is integrated by 16-point Gauss-Legendre quadrature, and the distribution
    function within it is the integral of its series.  Probabilities are good to about 1e-12
    absolute for mixtures of Gaussians with standard deviations down to 1e-3 of the interval.
    Narrower modes may be missed unless ``breakpoints`` frame them.

    Parameters
    ----------
    log_density : callable, (M,) float64 -> (M,) float64
        Logarithm of the density up to a constant, in nats; ``-inf`` where it is zero.  It should
        be piecewise smooth.
    lo, hi : float
        The support, finite.  The density is zero outside.
    breakpoints : sequence of float, optional
        Points of [lo, hi] that become panel edges: kinks, jumps, and, for a mode narrower than
        1e-3 of the interval, its centre and the points where it has decayed.

    Attributes
    ----------
    log_normaliser : float
        log of the integral of ``exp(log_density)`` over [lo, hi], in nats.
    mean : float
        Mean of the normalised density, in the units of x.

    Raises
    ------
    TypeError
        If ``log_density`` cannot be called or ``lo``, ``hi`` or ``breakpoints`` are not numbers.
    ValueError
        If lo >= hi or one of them is not finite; if ``log_density`` returns another shape, NaN
        or +inf, or is ``-inf`` everywhere; or if the panels do not converge.

    Examples
    --------
    >>> target = TargetDensity1D(lambda x: -0.5 * x**2, -12.0, 12.0)
    >>> round(target.log_normaliser, 12) == round(0.5 * math.log(2 * math.pi), 12)
    True
    >>> round(float(target.quantile(0.975)), 9)
    1.959963985
    """

    log_density: Callable[[Array], Array]
    lo: float
    hi: float
    breakpoints: Sequence[float] = ()
    log_normaliser: float = field(init=False)
    mean: float = field(init=False)
    _edges: Array = field(init=False, repr=False)
    _series: Array = field(init=False, repr=False)  # (16, P) coefficients of the density
    _left: Array = field(init=False, repr=False)  # (P + 1,) mass left of each edge
    _right: Array = field(init=False, repr=False)  # (P + 1,) mass right of each edge
    _left_integral: Array = field(init=False, repr=False)  # (P + 1,) int of the cdf up to an edge

    def __post_init__(self) -> None:
        """Resolve and integrate the density; the only place that writes the fields."""
        if not callable(self.log_density):
            raise TypeError(f"log_density must be callable, got {self.log_density!r}")
        lo = checks.real("lo", self.lo, "finite", -math.inf, math.inf, closed="()")
        hi = checks.real("hi", self.hi, "finite", -math.inf, math.inf, closed="()")
        if not lo < hi:
            raise ValueError(f"lo must be below hi, got lo={lo!r} and hi={hi!r}")
        points = checks.reals("breakpoints", self.breakpoints).reshape(-1)
        if not np.isfinite(points).all() or (points < lo).any() or (points > hi).any():
            raise ValueError(f"breakpoints must lie in [{lo!r}, {hi!r}], got {self.breakpoints!r}")

        edges = np.union1d(np.linspace(lo, hi, _FIRST_PANELS + 1), points)
        left, right, log_values = _resolved_panels(self.log_density, edges[:-1], edges[1:])
        half = 0.5 * (right - left)
        shift = float(log_values.max())
        values = np.exp(log_values - shift)
        weights = values * _NODE_WEIGHTS * half[:, None]
        total = math.fsum(weights.ravel())
        nodes = left[:, None] + half[:, None] * (1.0 + _NODES)
        masses = weights.sum(axis=1) / total
        cumulative = np.concatenate([[0.0], np.cumsum(masses)])
        survival = np.concatenate([np.cumsum(masses[::-1])[::-1], [0.0]])
        series = _TO_LEGENDRE @ (values.T / total)
        # Over a panel, int F = F(left edge) (width) + the double integral of the series.
        twice = legendre.legval(1.0, legendre.legint(series, m=2, lbnd=-1.0))
        pieces = 2.0 * half * cumulative[:-1] + half**2 * twice
        computed = {
            "lo": lo,
            "hi": hi,
            "breakpoints": tuple(points.tolist()),
            "log_normaliser": shift + math.log(total),
            # Relative to lo, so that an interval far from the origin costs no digits.
            "mean": lo + math.fsum((weights * (nodes - lo)).ravel()) / total,
            "_edges": np.concatenate([left, right[-1:]]),
            "_series": series,
            "_left": cumulative / cumulative[-1],
            "_right": survival / survival[0],
            "_left_integral": np.concatenate([[0.0], np.cumsum(pieces)]),
        }
        for name, value in computed.items():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
            object.__setattr__(self, name, value)

    def pdf(self, x: ArrayLike) -> Array:
        """Density at x, in inverse units of x: ``exp(log_density(x) - log_normaliser)``.

        Parameters
        ----------
        x : array_like, shape (...)
            Zero is returned outside [lo, hi].

        Returns
        -------
        ndarray, shape (...), float64

        Raises
        ------
        TypeError, ValueError
            If x is not real, or holds NaN.
        """
        points = self._points("x", x)
        inside = (points >= self.lo) & (points <= self.hi)
        density = np.zeros(points.shape)
        log_values = _evaluate(self.log_density, points[inside])
        density[inside] = np.exp(log_values - self.log_normaliser)
        return density[()]

    def cdf(self, x: ArrayLike) -> Array:
        """Probability of (-inf, x].

        Parameters
        ----------
        x : array_like, shape (...)
            Any real numbers, infinities included.

        Returns
        -------
        ndarray, shape (...), float64
            In [0, 1].

        Raises
        ------
        TypeError, ValueError
            If x is not real, or holds NaN.
        """
        return self._by_chunks(self._cdf, self._points("x", x))

    def quantile(self, q: ArrayLike) -> Array:
        """The smallest x with cdf(x) >= q; ``lo`` for 0.

        Parameters
        ----------
        q : array_like, shape (...)
            Probabilities in [0, 1].

        Returns
        -------
        ndarray, shape (...), float64
            In [lo, hi].  ``cdf(quantile(q))`` is q to a few units of rounding; x itself is as
            well determined as the density there allows.

        Raises
        ------
        TypeError, ValueError
            If q is not real, or holds a number outside [0, 1].
        """
        probabilities = self._points("q", q)
        outside = (probabilities < 0.0) | (probabilities > 1.0)
        if outside.any():
            raise ValueError(f"q must be in [0, 1], got {probabilities[outside].flat[0]!r}")
        return self._by_chunks(self._quantile, probabilities)

    def mass(self, lo: ArrayLike, hi: ArrayLike) -> Array:
        """Probability of [lo, hi], accurate in both tails.

        Parameters
        ----------
        lo, hi : array_like, shapes that broadcast to (...)
            Ends of the intervals, infinities allowed, lo <= hi.

        Returns
        -------
        ndarray, shape (...), float64
            In [0, 1].

        Raises
        ------
        TypeError, ValueError
            If an end is not real or is NaN, or if lo > hi somewhere.
        """
        left, right = self._points("lo", lo), self._points("hi", hi)
        try:
            left, right = np.broadcast_arrays(left, right)
        except ValueError:
            raise ValueError(
                f"lo and hi must have shapes that broadcast, got {left.shape} and {right.shape}"
            ) from None
        if (left > right).any():
            worst = np.argmax(left - right)
            raise ValueError(
                f"lo must not exceed hi, got lo={left.flat[worst]!r} and hi={right.flat[worst]!r}"
            )
        below, above = self.cdf(left), self._by_chunks(self._survival, right)
        from_left = self.cdf(right) - below
        from_right = self._by_chunks(self._survival, left) - above
        # The difference of two numbers near one would lose the digits of a small tail.
        return np.maximum(np.where(below < 0.5, from_left, from_right), 0.0)[()]

    def _points(self, name: str, value: ArrayLike) -> Array:
        points = checks.reals(name, value)
        if np.isnan(points).any():
            raise ValueError(
                f"{name} must not be NaN, got NaN at {np.argwhere(np.isnan(points))[0]}"
            )
        return points

    @staticmethod
    def _by_chunks(function: Callable[[Array], Array], points: Array) -> Array:
        flat = points.reshape(-1)
        out = np.empty(flat.shape)
        for start in range(0, flat.size, _CHUNK):
            out[start : start + _CHUNK] = function(flat[start : start + _CHUNK])
        return out.reshape(points.shape)[()]

    def _locate(self, x: Array) -> tuple[NDArray[np.intp], Array, Array]:
        """Panel of each x, half its width, and the place of x within it, in [-1, 1]."""
        panel = np.searchsorted(self._edges, x, side="right") - 1
        panel = np.clip(panel, 0, self._edges.size - 2)
        left = self._edges[panel]
        half = 0.5 * (self._edges[panel + 1] - left)
        u = (x - left) / half - 1.0
        return panel, half, u

    def _cdf(self, x: Array) -> Array:
        panel, half, u = self._locate(np.clip(x, self.lo, self.hi))
        integral = legendre.legint(self._series[:, panel], lbnd=-1.0)
        inside = half * legendre.legval(u, integral, tensor=False)
        return np.clip(self._left[panel] + inside, 0.0, 1.0)

    def _survival(self, x: Array) -> Array:
        panel, half, u = self._locate(np.clip(x, self.lo, self.hi))
        integral = legendre.legint(self._series[:, panel], lbnd=1.0)
        inside = -half * legendre.legval(u, integral, tensor=False)
        return np.clip(self._right[panel + 1] + inside, 0.0, 1.0)

    def _cdf_integral(self, x: Array) -> Array:
        """int_{-inf}^x F(y) dy, in the units of x."""
        panel, half, u = self._locate(np.clip(x, self.lo, self.hi))
        twice = legendre.legint(self._series[:, panel], m=2, lbnd=-1.0)
        inside = half * (1.0 + u) * self._left[panel] + half**2 * legendre.legval(
            u, twice, tensor=False
        )
        return self._left_integral[panel] + inside + np.maximum(x - self.hi, 0.0)

    def _quantile(self, q: Array) -> Array:
        panel = np.searchsorted(self._left, q, side="left") - 1
        panel = np.clip(panel, 0, self._edges.size - 2)
        left, right = self._edges[panel], self._edges[panel + 1]
        half = 0.5 * (right - left)
        series = self._series[:, panel]
        integral = legendre.legint(series, lbnd=-1.0)
        wanted = (q - self._left[panel]) / half
        lower, upper = np.full(q.shape, -1.0), np.full(q.shape, 1.0)
        u = np.zeros(q.shape)
        # Newton's method, kept inside a shrinking bracket: bisection where a step leaves it.
        for _ in range(80):
            excess = legendre.legval(u, integral, tensor=False) - wanted
            lower = np.where(excess < 0.0, u, lower)
            upper = np.where(excess >= 0.0, u, upper)
            with np.errstate(divide="ignore", invalid="ignore"):
                step = u - excess / legendre.legval(u, series, tensor=False)
            trusted = (step >= lower) & (step <= upper)
            following = np.where(trusted, step, 0.5 * (lower + upper))
            settled = (np.abs(following - u) <= 4e-16) | (np.abs(excess) * half <= 2e-16 * q)
            u = np.where(settled, u, following)
            if settled.all():
                break
        x = np.clip(left + half * (1.0 + u), left, right)
        return np.where(q > 0.0, x, self.lo)


def _evaluate(log_density: Callable[[Array], Array], points: Array) -> Array:
    """Evaluate a user's log-density in chunks and check the values."""
    out = np.empty(points.shape)
    for start in range(0, points.size, _CHUNK):
        chunk = points[start : start + _CHUNK]
        values = checks.reals("the result of log_density", log_density(chunk))
        if values.shape != chunk.shape:
            raise ValueError(
                f"log_density must return the shape it is given, {chunk.shape}, got {values.shape}"
            )
        if np.isnan(values).any() or (values == np.inf).any():
            bad = np.argmax(np.isnan(values) | (values == np.inf))
            raise ValueError(
                f"log_density must be finite or -inf, got {values[bad]} at x={chunk[bad]!r}"
            )
        out[start : start + _CHUNK] = values
    return out


def _resolved_panels(
    log_density: Callable[[Array], Array], left: Array, right: Array
) -> tuple[Array, Array, Array]:
    """Halve panels until each Legendre series has converged; return them from left to right.

    A series has converged when its last four coefficients are below 1e-14 of the total mass, or
    at the level of the rounding of ``log_density`` itself, beyond which halving only chases
    noise.  The values are kept in log space, since a later panel may hold a larger maximum.
    """
    done: list[tuple[Array, Array, Array]] = []
    shift, accepted = -math.inf, 0.0
    count = 0
    while left.size:
        half = 0.5 * (right - left)
        nodes = left[:, None] + half[:, None] * (1.0 + _NODES)
        log_values = _evaluate(log_density, nodes.reshape(-1)).reshape(nodes.shape)
        previous, shift = shift, max(shift, float(log_values.max()))
        if shift == -math.inf:
            raise ValueError(
                "log_density must be above -inf somewhere on [lo, hi], got -inf at every point of "
                f"[{left.min()}, {right.max()}]"
            )
        accepted *= math.exp(previous - shift)
        values = np.exp(log_values - shift)
        series = values @ _TO_LEGENDRE.T
        masses = 2.0 * half * series[:, 0]
        tail = half * np.abs(series[:, -4:]).max(axis=1)
        size = np.spacing(np.maximum(np.abs(left), np.abs(right)))
        with np.errstate(invalid="ignore"):
            slope = np.abs(np.diff(log_values) / np.diff(nodes))
        slope = np.where(np.isfinite(slope), slope, 0.0).max(axis=1)
        largest = np.where(values > 0.0, np.abs(log_values), 0.0).max(axis=1)
        # Rounding of the values of log_density, and of the nodes at which it is evaluated.
        rounding = (4e-16 * (1.0 + largest) + size * slope) * values.max(axis=1) * half
        total = accepted + float(masses.sum())
        narrow = half <= 8.0 * size
        good = (tail <= np.maximum(_PANEL_TOLERANCE * total, rounding)) | narrow
        done.append((left[good], right[good], log_values[good]))
        accepted += float(masses[good].sum())
        count += left.size
        if count > _MAX_PANELS and not good.all():
            raise ValueError(
                f"log_density must be piecewise smooth: {_MAX_PANELS} panels do not resolve it "
                f"near x={float(left[~good][0])!r}"
            )
        left, right = left[~good], right[~good]
        middle = left + 0.5 * (right - left)
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    left, right, log_values = (np.concatenate(parts) for parts in zip(*done, strict=True))
    order = np.argsort(left)
    return left[order], right[order], log_values[order]


class LogNormaliser(NamedTuple):
    """log Z in nats, and its estimated error.

    Attributes
    ----------
    value : float
        log Z.
    error : float
        0 for a closed form, the estimated error for a quadrature, or the standard error for an
        estimate from random draws.
    """

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class GuidedLogDensity(checks.ReadOnly):
    """Log density log p(x) + g log p(not components | x), made by :func:`guided_log_density`.

    Attributes
    ----------
    mixture : GaussianMixture
        The unguided distribution p.
    forbidden : ndarray, shape (M,)
        Sorted indices of the forbidden components.
    guidance_scale : float
        The exponent g.
    """

    mixture: GaussianMixture
    forbidden: NDArray[np.intp]
    guidance_scale: float

    def __call__(self, x: ArrayLike) -> Array:
        """The log density up to a constant, in nats.

        Parameters
        ----------
        x : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N,), float64

        Raises
        ------
        TypeError, ValueError
            If x is not real and finite or has another shape, or is so far out that float64
            overflows.
        """
        value = self.mixture.log_prob(x)
        if self.guidance_scale == 0.0:
            return value
        allowed = self.mixture.log_posterior(x, self.forbidden, complement=True)
        return np.asarray(value + self.guidance_scale * allowed)

    def score(self, x: ArrayLike) -> Array:
        """Gradient of the log density, s - g o (s_c - s), shape (N, D): DNG Eq. 10.

        Parameters
        ----------
        x : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N, D), float64
            In inverse units of x.

        Raises
        ------
        TypeError, ValueError
            As for a call.
        """
        # o (s - s_c) = s_r - s, which stays finite as p(c | x) -> 1.
        value = self.mixture.score(x)
        return value + self.guidance_scale * self.mixture.log_posterior_gradient(x, self._allowed)

    @property
    def _allowed(self) -> NDArray[np.intp]:
        return np.setdiff1d(np.arange(self.mixture.n_components), self.forbidden)

    def _proposal(self) -> tuple[GaussianMixture, float, float]:
        """Mixture m, factor c and power h such that q Z = c m(x) p(not components | x)^h."""
        if self.guidance_scale < 1.0:
            return self.mixture, 1.0, self.guidance_scale
        weight = float(self.mixture.weights[self._allowed].sum())
        return self.mixture.restrict(self._allowed), weight, self.guidance_scale - 1.0

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> Array:
        """Independent exact draws from the normalised density, shape (n, D).

        Rejection sampling (von Neumann 1951): for g >= 1, draws of p without the components are
        kept with probability p(not components | x)^(g - 1); for g < 1, draws of p are kept with
        probability p(not components | x)^g.

        Parameters
        ----------
        n : int
            Number of draws.
        rng : numpy.random.Generator, or int seed, optional
            Source of randomness; default unseeded.

        Returns
        -------
        ndarray, shape (n, D), float64

        Raises
        ------
        ValueError, TypeError
            If g < 0, where the weights have no bound, if fewer than one draw in 10,000 is kept, or
            if an argument is invalid.
        """
        n = checks.size("n", n, 0)
        self._bounded("sample")
        generator = checks.generator("rng", rng)
        proposal, _, power = self._proposal()
        kept, count, drawn = [np.empty((0, self.mixture.dim))], 0, 0
        while count < n:
            size = _CHUNK if drawn else max(64, min(n, _CHUNK))
            x = proposal.sample(size, generator)
            drawn += size
            if power > 0:
                log_kept = self.mixture.log_posterior(x, self.forbidden, complement=True)
                x = x[np.log1p(-generator.random(size)) <= power * log_kept]
            kept.append(x)
            count += len(x)
            if drawn >= 100 * _CHUNK and count < 1e-4 * drawn:
                raise ValueError(
                    f"guidance_scale must leave something to draw: of {drawn} draws without the "
                    f"components {count} are kept at {self.guidance_scale!r}"
                )
        return np.concatenate(kept)[:n]

    def log_normaliser(
        self, draws: int | None = None, rng: np.random.Generator | int | None = None
    ) -> LogNormaliser:
        """Log normaliser log Z, with Z = int p p(not components | x)^g dx, and its error.

        Closed forms: 0 for g = 0, and the log weight of the allowed components for g = 1.
        Otherwise, adaptive Gauss-Legendre quadrature in one and two dimensions.  With ``draws``,
        which more dimensions need, Z is estimated from random draws: for g >= 1 as the weight of
        the allowed components times the mean of p(not components | x)^(g - 1) over draws of p
        without the forbidden ones; for g < 1 as the mean of p(not components | x)^g over draws
        of p.

        Parameters
        ----------
        draws : int, optional
            Number of random draws, at least 100.
        rng : numpy.random.Generator, or int seed, optional
            Source of randomness for the draws; default unseeded.

        Returns
        -------
        LogNormaliser
            ``(value, error)``.

        Raises
        ------
        ValueError, TypeError
            If draws are needed and not given.  With draws, if g < 0 or if their effective number
            (sum w)^2 / sum w^2 is below 100, too few for a reliable standard error.  With
            quadrature, if q cannot be normalised (possible for g < 0 only) or has too many or too
            narrow modes.
        """
        if draws is not None:
            draws = checks.size("draws", draws, 100)
        generator = checks.generator("rng", rng)
        if self.guidance_scale == 0.0:
            return LogNormaliser(0.0, 0.0)
        if self.guidance_scale == 1.0:
            return LogNormaliser(math.log(self.mixture.weights[self._allowed].sum()), 0.0)
        if draws is not None:
            return self._from_draws(draws, generator)
        if self.mixture.dim == 1:
            target = guided_density(self.mixture, self.forbidden, self.guidance_scale)
            return LogNormaliser(target.log_normaliser, 1e-11)
        if self.mixture.dim == 2:
            return self._by_cubature()
        raise ValueError(
            f"draws must be given in {self.mixture.dim} dimensions for guidance_scale = "
            f"{self.guidance_scale!r}: log Z is known in closed form for 0 and 1, and by "
            "quadrature in one and two dimensions; got None"
        )

    def _bounded(self, name: str) -> None:
        if self.guidance_scale < 0:
            raise ValueError(
                f"guidance_scale must be >= 0 for {name}, as below p(not components | x)^g has no "
                f"bound; got {self.guidance_scale!r}"
            )

    def _from_draws(self, draws: int, generator: np.random.Generator) -> LogNormaliser:
        self._bounded("draws")
        proposal, weight, power = self._proposal()
        total = squares = 0.0
        for start in range(0, draws, _CHUNK):
            x = proposal.sample(min(_CHUNK, draws - start), generator)
            allowed = self.mixture.log_posterior(x, self.forbidden, complement=True)
            total += math.fsum(np.exp(power * allowed))
            squares += math.fsum(np.exp(2.0 * power * allowed))
        effective = total * total / squares if squares > 0 else 0.0
        if effective < 100.0:
            raise ValueError(
                f"draws must be more, or guidance_scale smaller: of {draws} draws at "
                f"{self.guidance_scale!r} the effective number is {effective:.1f}, and 100 are "
                "needed for a standard error"
            )
        # The standard error of log Z is the relative standard error of the mean weight.
        error = math.sqrt(max(0.0, 1.0 / effective - 1.0 / draws))
        return LogNormaliser(math.log(weight) + math.log(total / draws), error)

    def _by_cubature(self) -> LogNormaliser:
        live = self.mixture.weights > 0
        if self.mixture.kind == "full":
            covariances = self.mixture.covariances[live]
        else:
            variances = self.mixture._per_dimension(self.mixture.covariances)[live]
            covariances = variances[:, :, None] * np.eye(2)
        return _cubature(self, self.mixture.means[live], covariances)


def guided_log_density(
    mixture: GaussianMixture, components: ArrayLike, guidance_scale: float
) -> GuidedLogDensity:
    """Log density of the exact guided target, up to a constant, in any dimension.

    ``log p(x) + g log p(not components | x)``, whose gradient is the score of DNG with the exact
    posterior (Koulischer et al., ICLR 2025, Eq. 10).  At g = 0 it is the log density of the
    mixture, at g = 1 that of ``mixture.restrict(the others)`` plus the log of their weight.

    Parameters
    ----------
    mixture : GaussianMixture
        The unguided distribution p, in D dimensions.
    components : array_like of int, or bool mask of shape (K,)
        The forbidden components.
    guidance_scale : float
        The exponent g, finite.  Negative values attract.

    Returns
    -------
    GuidedLogDensity
        A function of points x of shape (N, D), with ``score(x)``, exact draws ``sample(n, rng)``
        and ``log_normaliser()``.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If ``components`` do not name components, or leave none with weight, or if g is not finite.

    Examples
    --------
    >>> mixture = GaussianMixture([0.3, 0.7], [[0.0, 0.0], [2.0, 0.0]], [1.0, 1.0],
    ...                           covariance_type="spherical")
    >>> target = guided_log_density(mixture, [0], 2.0)
    >>> log_z, error = target.log_normaliser()
    >>> density = np.exp(target([[2.0, 0.0]]) - log_z)
    >>> target.sample(4, rng=0).shape
    (4, 2)
    """
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(f"mixture must be a GaussianMixture, got {checks.shown(mixture)}")
    forbidden = mixture.component_indices("components", components)
    g = checks.finite("guidance_scale", guidance_scale)
    allowed = np.setdiff1d(np.arange(mixture.n_components), forbidden)
    # At g = 0 the forbidden components do not matter.
    if g != 0.0 and mixture.weights[allowed].sum() == 0:
        raise ValueError(f"components must leave some component allowed, got {components!r}")
    return GuidedLogDensity(mixture, checks.frozen(forbidden), g)


_SQUARE_NODES, _SQUARE_WEIGHTS = legendre.leggauss(12)
_TO_SQUARE_LEGENDRE = (
    (np.arange(12) + 0.5)[:, None] * legendre.legvander(_SQUARE_NODES, 11).T * _SQUARE_WEIGHTS
)
_MAX_CELLS = 50_000


def _box(log_density: Callable[[Array], Array], centres: Array, widths: Array) -> Array:
    """Corners (2, 2) of a rectangle on whose edges a guided density is below e^-60 of its peak."""
    low, high = (centres - 12.0 * widths).min(axis=0), (centres + 12.0 * widths).max(axis=0)
    step = widths.max(axis=0)
    share = np.linspace(0.0, 1.0, 201)
    for _ in range(64):
        grid = low + (high - low) * np.stack(np.meshgrid(share, share), axis=-1)
        inside = np.concatenate([grid.reshape(-1, 2), centres])
        floor = log_density(inside).max() - 60.0
        edges = [grid[:, 0], grid[0], grid[:, -1], grid[-1]]
        enough = np.reshape([log_density(edge).max() < floor for edge in edges], (2, 2))
        if enough.all():
            return np.array([low, high])
        step = 2.0 * step
        low, high = np.where(enough[0], low, low - step), np.where(enough[1], high, high + step)
    raise ValueError(
        "guidance_scale must leave a density that can be normalised; with these components its "
        f"tails do not decay within {low.tolist()} and {high.tolist()}"
    )


def _cubature(
    log_density: Callable[[Array], Array], centres: Array, covariances: Array
) -> LogNormaliser:
    """log of the integral over the plane, by adaptive quartering of cells.

    A cell is accepted when the highest third of its Legendre series is below 1e-13 of the whole.
    Within eight deviations of a mode it must also be no wider than six deviations of the mode's
    narrowest axis, or its nodes could miss the mode.
    """
    box = _box(log_density, centres, np.sqrt(np.diagonal(covariances, axis1=1, axis2=2)))
    narrow = np.sqrt(np.linalg.eigvalsh(covariances)[:, 0])
    whiten = np.linalg.inv(np.linalg.cholesky(covariances))
    size = (box[1] - box[0]) / 16.0
    cells = box[0] + size * np.stack(np.meshgrid(range(16), range(16)), axis=-1).reshape(-1, 2)
    nodes = np.stack(np.meshgrid(_SQUARE_NODES, _SQUARE_NODES, indexing="ij"), axis=-1)
    shift, accepted, doubt = -math.inf, 0.0, 0.0
    count = 0
    while len(cells):
        count += len(cells)
        if count > _MAX_CELLS:
            raise ValueError(
                "mixture must have fewer or wider modes for quadrature in two dimensions: "
                f"{_MAX_CELLS} cells do not resolve the density; give draws"
            )
        points = (cells[:, None, None] + 0.5 * size * (1.0 + nodes)).reshape(-1, 2)
        log_values = np.concatenate(
            [log_density(points[i : i + _CHUNK]) for i in range(0, len(points), _CHUNK)]
        ).reshape(len(cells), 12, 12)
        previous, shift = shift, max(shift, float(log_values.max()))
        accepted *= math.exp(previous - shift)
        doubt *= math.exp(previous - shift)
        values = np.exp(log_values - shift)
        series = np.abs(_TO_SQUARE_LEGENDRE @ values @ _TO_SQUARE_LEGENDRE.T)
        area = 0.25 * float(size.prod())
        masses = area * np.einsum("i,cij,j->c", _SQUARE_WEIGHTS, values, _SQUARE_WEIGHTS)
        tail = (
            4.0
            * area
            * np.maximum(series[:, 8:].max(axis=(1, 2)), series[:, :, 8:].max(axis=(1, 2)))
        )
        total = accepted + float(masses.sum())
        # The series cannot converge below the rounding of the values themselves.
        rounding = 1e-15 * masses * (1.0 + np.abs(log_values).max(axis=(1, 2)))
        good = tail <= np.maximum(1e-13 * total, rounding)
        for k in np.flatnonzero(size.max() > 6.0 * narrow):
            halves = np.linalg.norm(0.5 * size * [[1, 1], [1, -1]] @ whiten[k].T, axis=-1)
            distance = np.linalg.norm((cells + 0.5 * size - centres[k]) @ whiten[k].T, axis=-1)
            good &= distance > 8.0 + halves.max()
        accepted += float(masses[good].sum())
        doubt += float(tail[good].sum())
        left = cells[~good]
        size = 0.5 * size
        corners = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]) * size
        cells = (left[:, None] + corners).reshape(-1, 2)
    return LogNormaliser(shift + math.log(accepted), doubt / accepted)


def guided_density(
    mixture: GaussianMixture,
    components: ArrayLike,
    guidance_scale: float,
    bounds: tuple[float, float] | None = None,
) -> TargetDensity1D:
    """The exact guided target q(x) = p(x) p(not components | x)^g / Z of a 1D mixture.

    This is the distribution whose score is that of DNG with the exact posterior (Koulischer et
    al., ICLR 2025, Eq. 10, at the same noise level): g = 0 is p, g = 1 is p without the
    components, renormalised.

    Parameters
    ----------
    mixture : GaussianMixture
        The unguided distribution p, in one dimension; :func:`guided_log_density` takes any.
    components : array_like of int
        The forbidden components, as ``mixture.log_posterior`` takes them.
    guidance_scale : float
        The exponent g, finite.  Negative values attract.
    bounds : (float, float), optional
        Support of the result.  Default: every mean +- 12 standard deviations, widened until q
        is below e^-60 of its maximum at both ends.

    Returns
    -------
    TargetDensity1D
        ``exp(log_normaliser)`` is Z, the integral of p p(not c|x)^g; at g = 1 the weight of the
        allowed components.

    Raises
    ------
    TypeError
        If ``mixture`` is not a GaussianMixture, or another argument is not made of numbers.
    ValueError
        If the mixture is not one-dimensional, if every component is forbidden, if ``bounds`` do
        not increase, or if q cannot be normalised (possible for g < 0 only).
    """
    guided = guided_log_density(mixture, components, guidance_scale)
    if mixture.dim != 1:
        raise ValueError(
            f"mixture must have dimension 1, got {mixture.dim}: guided_log_density takes any"
        )
    centres, widths = mixture.means[:, 0], np.sqrt(mixture.covariances.reshape(-1))

    def log_density(x: Array) -> Array:
        return guided(x[:, None])

    if bounds is None:
        lo, hi = _bounds(log_density, centres, widths)
    else:
        if not isinstance(bounds, (tuple, list, np.ndarray)) or len(bounds) != 2:
            raise ValueError(f"bounds must be (lo, hi), got {checks.shown(bounds)}")
        lo, hi = (
            checks.real(f"bounds[{i}]", bound, "finite", -math.inf, math.inf, closed="()")
            for i, bound in enumerate(bounds)
        )
        if not lo < hi:
            raise ValueError(f"bounds must be increasing, got {bounds!r}")
    # Panel edges at the centre, the flanks and the ends of a mode resolve it, however narrow it
    # is.
    points = (centres[:, None] + widths[:, None] * np.array([-9.0, -6.0, 0.0, 6.0, 9.0])).ravel()
    points = np.unique(points[(points > lo) & (points < hi)])
    return TargetDensity1D(log_density, lo, hi, tuple(points.tolist()))


def _bounds(
    log_density: Callable[[Array], Array], centres: Array, widths: Array
) -> tuple[float, float]:
    """Ends of an interval at which a guided density is below e^-60 of its peak."""
    lo, hi = float((centres - 12.0 * widths).min()), float((centres + 12.0 * widths).max())
    step = float(widths.max())
    for _ in range(64):
        scan = np.concatenate([np.linspace(lo, hi, 1001), centres])
        # A large exponent moves the mass away from the forbidden modes, beyond twelve widths.
        values = np.asarray(log_density(scan))
        floor = values.max() - 60.0
        low_enough, high_enough = values[0] < floor, values[1000] < floor
        if low_enough and high_enough:
            return lo, hi
        step *= 2.0
        lo, hi = (lo if low_enough else lo - step), (hi if high_enough else hi + step)
    raise ValueError(
        "guidance_scale must leave a density that can be normalised; with these components its "
        f"tails do not decay near x={lo!r} or x={hi!r}"
    )
