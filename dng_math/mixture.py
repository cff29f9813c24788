"""Gaussian mixtures: closed under diffusing, conditioning and restricting to a class.

``p_0 = sum_k w_k N(m_k, C_k)`` gives ``p_t = sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I)``,
so scores, posteriors and reverse transitions are exact.  With one component on each point of a
data set this is the memorised diffusion model of that data set.

Accuracy.  A diffused mixture keeps its means and covariances in double-double, and squared
distances are recomputed in double-double where double precision is not enough, so the results
follow the *exact* parameters ``alpha m_k`` and ``alpha^2 C_k + sigma^2 I``, not rounded ones.
With e_D = D 2^-104 max_k (x - m_k)^T C_k^-1 (x - m_k), the rounding of squared distances in
double-double, the errors are at most:

- ``log_prob``: 1e-12 max(1, |value|).
- ``log_posterior`` and its complement: 1e-10 max(1, |value|) + e_D.  The second term is what
  cancellation leaves when squared distances of 1e24 differ by a few units.
- ``score``: 1e-10 max(1, |score|) + (1e-12 + e_D) sum_k r_k |s_k - s|.  Where components that
  pull in opposite directions with |s_k| >> |s| share the responsibility, a relative error of
  that size in a responsibility is visible in the sum.
- ``posterior_mean``: 1e-13 max_k (|m_k| + |x - alpha m_k|/alpha) + (1e-9 + e_D) sum_k r_k
  |x0_k - x0|, with x0_k the mean given component k, whatever the condition of the covariances.
- ``posterior_covariance``: 1e-13 max_k |Cov_k| within components, and between them twice the
  second term above times max_k |x0_k - x0|.

The fused chain of :func:`dng_math.sample` works in double throughout: with c the condition number
of a diffused full covariance, its predictions carry an error of 1e-16 c (x - alpha m_k)/alpha.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dng_math import _mixture_kernels as kernels
from dng_math import checks, equations
from dng_math._jit import run_blocks
from dng_math.trackers import log_posterior_from_log_odds

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
CovarianceType = Literal["spherical", "diag", "full", "tied"]

SMALLEST_VARIANCE = 1e-250  # below, double-double products of variances underflow
EPSILON = 2.0**-52
CHUNK = 64 * kernels.BLOCK  # points that a thread takes at a time


def _two_product(a: Array | float, b: Array | float) -> tuple[Array, Array]:
    """a * b as an exact sum of two doubles (Dekker 1971; NumPy has no fused multiply-add)."""
    product = np.multiply(a, b)
    split = 134217729.0  # 2^27 + 1
    a_high, b_high = split * np.asarray(a), split * np.asarray(b)
    a_high, b_high = a_high - (a_high - a), b_high - (b_high - b)
    a_low, b_low = a - a_high, b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def _two_sum(a: Array | float, b: Array | float) -> tuple[Array, Array]:
    """a + b as an exact sum of two doubles (Knuth)."""
    total = np.add(a, b)
    shifted = total - a
    return total, (a - (total - shifted)) + (b - shifted)


def _refuse_ambiguous(covariance: Array, k: int, d: int) -> None:
    """Refuse covariances that, at K = D, have the shape of two types and are valid as either."""
    if k != d or k == 1:
        return
    if covariance.ndim == 1 and np.any(covariance != covariance[0]):
        raise ValueError(
            f"covariance_type must be given: covariances of shape {(k,)} with {k} components in "
            f"{d}D can be a variance of every component (covariance_type='spherical') or of every "
            "dimension (np.tile(covariances, (K, 1)) with covariance_type='diag')"
        )
    if covariance.ndim == 2 and np.allclose(covariance, covariance.T, rtol=1e-10, atol=0.0):
        # A singular matrix, as that of equal variances, cannot be "tied" and is not ambiguous.
        if np.linalg.eigvalsh(covariance)[0] > EPSILON * k * np.abs(covariance).max():
            raise ValueError(
                f"covariance_type must be given: covariances of shape {(k, k)} with {k} components "
                f"in {d}D can be the variances of every component in every dimension "
                "(covariance_type='diag') or one matrix for all (covariance_type='tied')"
            )


class GaussianMixture(checks.ReadOnly):
    """A mixture of K Gaussians in D dimensions; immutable.

    Parameters
    ----------
    weights : array_like, shape (K,)
        Not negative, not all zero; normalised to sum to 1.  Components of weight 0 are kept
        and have no influence.
    means : array_like, shape (K, D)
        Mean of each component.
    covariances : array_like, shape (K,), (K, D), (K, D, D) or (D, D)
        Variances of spherical components, variances of diagonal ones, or symmetric, positive
        definite matrices: one for each component, or one for all with
        ``covariance_type="tied"``.
    labels : array_like, shape (K,), optional
        A class for each component, for :meth:`components`.
    covariance_type : {"spherical", "diag", "full", "tied"}, optional
        Named as in scikit-learn.  By default the shape decides, and never for "tied".  It must be
        given where K = D and the covariances can be read in two ways: unequal variances of shape
        (K,), which could also belong to the dimensions, and a symmetric, positive definite matrix
        of shape (K, K), which could be "diag" or "tied".  The repr shows how they were read.

    Attributes
    ----------
    weights, means, covariances : ndarray, float64, read-only
        A diffused mixture shows its parameters rounded to float64.
    labels : ndarray, shape (K,), or None

    Raises
    ------
    ValueError, TypeError
        If an argument is invalid; the message names it, its value and what is allowed.

    Examples
    --------
    >>> mixture = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [0.1, 0.1])
    >>> mixture.diffuse(0.8, 0.6).covariances
    array([0.424, 0.424])
    """

    weights: Array
    means: Array
    covariances: Array
    labels: NDArray[Any] | None
    _log_weights: Array
    _means_low: Array
    _covariances_low: Array

    def __init__(
        self,
        weights: ArrayLike,
        means: ArrayLike,
        covariances: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        covariance_type: CovarianceType | None = None,
    ) -> None:
        weight = checks.array("weights", weights, ("K",))
        if len(weight) == 0:
            raise ValueError("weights must have at least one component, got none")
        if np.any(weight < 0):
            raise ValueError(f"weights must not be negative, got {weight.min()}")
        if not np.any(weight > 0):
            raise ValueError(f"weights must not be all zero, got {weight.tolist()}")
        mean = checks.array("means", means, (len(weight), "D"))
        if mean.shape[1] == 0:
            raise ValueError(f"means must have shape (K, D) with D >= 1, got {mean.shape}")
        with np.errstate(divide="ignore"):
            log_weight = np.log(weight) - np.log(weight.max())
        log_weight -= np.log(np.exp(log_weight).sum())
        covariance = self._checked_covariances(
            covariances, len(mean), mean.shape[1], covariance_type
        )
        zero = np.zeros_like
        self._set(log_weight, mean, zero(mean), covariance, zero(covariance), labels)

    @staticmethod
    def _checked_covariances(
        covariances: ArrayLike, k: int, d: int, kind: CovarianceType | None
    ) -> Array:
        given = checks.reals("covariances", covariances)
        shapes = {"spherical": (k,), "diag": (k, d), "full": (k, d, d), "tied": (d, d)}
        if kind is not None:
            checks.choice("covariance_type", kind, shapes)
            covariance = checks.array("covariances", given, shapes[kind])
        else:
            if given.shape not in (shapes["spherical"], shapes["diag"], shapes["full"]):
                tied = f", or {(d, d)} with covariance_type='tied'"
                raise ValueError(
                    f"covariances must have shape {(k,)} (spherical), {(k, d)} (diagonal) or "
                    f"{(k, d, d)} (full){tied}, got {given.shape}"
                )
            covariance = checks.array("covariances", given, given.shape)
            _refuse_ambiguous(covariance, k, d)
        if kind == "tied":
            covariance = np.broadcast_to(covariance, (k, d, d))
        variance = covariance
        if covariance.ndim == 3:
            transposed = covariance.transpose(0, 2, 1)
            if not np.allclose(covariance, transposed, rtol=1e-10, atol=0.0):
                bad = int(np.argmax(np.abs(covariance - transposed).max(axis=(1, 2))))
                raise ValueError(f"covariances must be symmetric, covariances[{bad}] is not")
            covariance = 0.5 * (covariance + transposed)
            variance = np.diagonal(covariance, axis1=1, axis2=2)
        if np.any(variance < SMALLEST_VARIANCE):
            raise ValueError(
                "covariances must be positive definite, with variances of at least "
                f"{SMALLEST_VARIANCE:g}; got a variance of {variance.min()}"
            )
        return covariance

    def _set(
        self,
        log_weight: Array,
        mean: Array,
        mean_low: Array,
        covariance: Array,
        covariance_low: Array,
        labels: ArrayLike | None,
    ) -> None:
        fields = {
            "_log_weights": log_weight,
            "weights": np.exp(log_weight),
            "means": mean,
            "_means_low": mean_low,
            "covariances": covariance,
            "_covariances_low": covariance_low,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, checks.frozen(value))
        if labels is not None:
            labels = checks.frozen(checks.numpy_array("labels", labels, "labels"))
            if labels.shape != (self.n_components,):
                raise ValueError(
                    f"labels must have shape ({self.n_components},), got {labels.shape}"
                )
        object.__setattr__(self, "labels", labels)
        if covariance.ndim == 3:
            _ = self._factors  # raises where a covariance is not positive definite

    @classmethod
    def _new(cls, *fields: Any) -> GaussianMixture:
        mixture = cls.__new__(cls)
        mixture._set(*fields)
        return mixture

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse: a mixture is immutable."""
        raise AttributeError(f"GaussianMixture is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> NoReturn:
        """Refuse: a mixture is immutable."""
        raise AttributeError(f"GaussianMixture is immutable: cannot delete {name}")

    def __repr__(self) -> str:
        """Number, kind and dimension of the components."""
        return f"GaussianMixture({self.n_components} {self.kind} components in {self.dim}D)"

    @classmethod
    def from_points(
        cls,
        points: ArrayLike,
        bandwidth: float,
        labels: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> GaussianMixture:
        """The memorised model of a data set: one spherical component on each point.

        Parameters
        ----------
        points : array_like, shape (K, D)
            The data.
        bandwidth : float
            Standard deviation of every component, in the units of the points; > 0.
        labels : array_like, shape (K,), optional
            Class of each point.
        weights : array_like, shape (K,), optional
            Weight of each point; default equal weights.

        Raises
        ------
        ValueError, TypeError
            If an argument is invalid; the message names it, its value and what is allowed.
        """
        width = checks.positive("bandwidth", bandwidth)
        centres = checks.filled("points", points, ("K", "D"))
        if weights is None:
            weights = np.ones(len(centres))
        weights = checks.array("weights", weights, (len(centres),))
        variances = np.full(len(centres), width * width)
        return cls(weights, centres, variances, labels, covariance_type="spherical")

    # ------------------------------------------------------------------ shape

    @property
    def n_components(self) -> int:
        """Number of components K."""
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        """Number of dimensions D."""
        return self.means.shape[1]

    @property
    def kind(self) -> str:
        """Form of the covariances: "spherical", "diagonal" or "full"."""
        return ("spherical", "diagonal", "full")[self.covariances.ndim - 1]

    def components(self, label: Any) -> Indices:
        """Sorted indices of the components with a label, or with one of a list of labels.

        Parameters
        ----------
        label : object or list of objects
            One label, or several.

        Returns
        -------
        ndarray of intp

        Raises
        ------
        ValueError
            If the mixture has no labels, or no component has a given label.
        """
        if self.labels is None:
            raise ValueError("components(label) needs a mixture made with labels")
        several = isinstance(label, (list, tuple, set, frozenset)) or np.ndim(label) == 1
        wanted: list[Any] = list(label) if several else [label]
        if not wanted:
            raise ValueError(f"label must be a label or a list of some, got {label!r}")
        chosen = np.zeros(self.n_components, dtype=bool)
        for each in wanted:
            several = np.ndim(each) > 0
            found = np.zeros(1) if several else np.asarray(self.labels == each)
            if not found.any():
                raise ValueError(f"label must be one of {np.unique(self.labels)}, got {each!r}")
            chosen |= found
        return np.flatnonzero(chosen)

    def component_indices(self, name: str, components: ArrayLike) -> Indices:
        """Sorted indices of components given as indices or as a boolean mask.

        Parameters
        ----------
        name : str
            Name of the argument, for the error message.
        components : array_like of int, or bool mask of shape (K,)

        Returns
        -------
        ndarray of intp, without repetitions

        Raises
        ------
        ValueError, TypeError
            If ``components`` are empty, no indices or mask, or out of range.
        """
        given = checks.numpy_array(name, components, "component indices")
        k = self.n_components
        if given.dtype == np.bool_:
            if given.shape != (k,):
                raise ValueError(f"{name} as a mask must have shape ({k},), got {given.shape}")
            given = np.flatnonzero(given)
        given = np.atleast_1d(given)
        if given.size == 0:
            raise ValueError(f"{name} must not be empty, got {checks.shown(components)}")
        if not np.issubdtype(given.dtype, np.integer) or given.ndim != 1:
            raise TypeError(
                f"{name} must be component indices or a mask, got {checks.shown(components)}"
            )
        if given.min() < 0 or given.max() >= k:
            raise ValueError(
                f"{name} must be from 0 to {k - 1}, got {checks.shown(given.tolist())}"
            )
        return np.unique(given).astype(np.intp)

    def _points(self, x: ArrayLike) -> Array:
        return np.ascontiguousarray(checks.array("x", x, ("N", self.dim)))

    # ------------------------------------------------------------------ new mixtures

    def diffuse(self, alpha: float, sigma: float) -> GaussianMixture:
        """The distribution of ``alpha x + sigma eps``, the forward process.

        docs/theory.md, section 4.1.

        Parameters
        ----------
        alpha, sigma : float
            Not negative, not both zero.

        Returns
        -------
        GaussianMixture
            With the same weights and labels.

        Raises
        ------
        ValueError, TypeError
            If alpha or sigma is invalid, or a mean or variance would be too large or too small for
            float64.
        """
        alpha, sigma = _noise_level(alpha, sigma)
        with np.errstate(over="ignore", invalid="ignore"):
            fields = self._diffused(alpha, sigma)
        if not all(np.isfinite(values).all() for values in fields):
            raise ValueError(
                f"alpha = {alpha} and sigma = {sigma} leave means or variances that float64 cannot "
                "hold"
            )
        variance = fields[2]
        if variance.ndim == 3:
            variance = np.diagonal(variance, axis1=1, axis2=2)
        if variance.min() < SMALLEST_VARIANCE:
            raise ValueError(
                f"alpha = {alpha} and sigma = {sigma} leave a variance below "
                f"{SMALLEST_VARIANCE:g}, which cannot be represented"
            )
        return self._new(self._log_weights, *fields, self.labels)

    def _diffused(self, alpha: float, sigma: float) -> tuple[Array, Array, Array, Array]:
        """Means and covariances at (alpha, sigma), in double-double; not finite on overflow."""
        mean, error = _two_product(alpha, self.means)
        mean, mean_low = _two_sum(mean, error + alpha * self._means_low)
        alpha_sq, alpha_sq_low = _two_product(alpha, alpha)
        sigma_sq, sigma_sq_low = _two_product(sigma, sigma)
        covariance, error = _two_product(alpha_sq, self.covariances)
        error = error + (alpha_sq_low * self.covariances + alpha_sq * self._covariances_low)
        added = sigma_sq if self.covariances.ndim < 3 else sigma_sq * np.eye(self.dim)
        added_low = sigma_sq_low if self.covariances.ndim < 3 else sigma_sq_low * np.eye(self.dim)
        covariance, rounding = _two_sum(covariance, added)
        covariance, covariance_low = _two_sum(covariance, rounding + (error + added_low))
        return mean, mean_low, covariance, covariance_low

    def restrict(self, components: ArrayLike) -> GaussianMixture:
        """The mixture of some components, renormalised: p(x | components).

        Parameters
        ----------
        components : array_like of int, or bool mask of shape (K,)

        Returns
        -------
        GaussianMixture

        Raises
        ------
        ValueError, TypeError
            If ``components`` do not name components, or all of them have weight zero.
        """
        chosen = self.component_indices("components", components)
        log_weight = self._log_weights[chosen]
        top = log_weight.max()
        if top == -np.inf:
            raise ValueError("components must not all have weight zero")
        log_weight = log_weight - (top + np.log(np.exp(log_weight - top).sum()))
        return self._new(
            log_weight,
            self.means[chosen],
            self._means_low[chosen],
            self.covariances[chosen],
            self._covariances_low[chosen],
            None if self.labels is None else self.labels[chosen],
        )

    def reverse_transition(
        self,
        x: ArrayLike,
        alpha_t: float,
        sigma_t: float,
        alpha_s: float = 1.0,
        sigma_s: float = 0.0,
    ) -> GaussianMixture:
        """The exact reverse transition p(x_s | x_t), itself a mixture.

        docs/theory.md, section 4.4.

        Parameters
        ----------
        x : array_like, shape (D,)
            x_t.
        alpha_t, sigma_t : float
            The noisier time.
        alpha_s, sigma_s : float
            The cleaner time; default the data, which gives p(x_0 | x_t).

        Returns
        -------
        GaussianMixture

        Raises
        ------
        ValueError, TypeError
            If an argument is invalid, or (alpha_s, sigma_s) is not less noisy than
            (alpha_t, sigma_t).
        """
        point = checks.array("x", x, (self.dim,))
        alpha_t, sigma_t = _noise_level(alpha_t, sigma_t, "_t")
        alpha_s, sigma_s = _noise_level(alpha_s, sigma_s, "_s")
        if alpha_s == 0 or not alpha_s * sigma_t > alpha_t * sigma_s:
            raise ValueError(
                "(alpha_s, sigma_s) must be less noisy than (alpha_t, sigma_t), with alpha_s > 0; "
                f"got ({alpha_s}, {sigma_s}) and ({alpha_t}, {sigma_t})"
            )
        ratio = equations.transition_alpha(alpha_t, alpha_s)
        beta = equations.transition_variance(sigma_t, sigma_s, ratio)
        clean = self.diffuse(alpha_s, sigma_s)
        noisy = self.diffuse(alpha_t, sigma_t)
        log_weight = noisy._log_joint(point[None])[:, 0]
        cov_s, cov_t = clean.covariances, noisy.covariances
        if self.kind == "full":
            precision, shrink = clean._divided_by(noisy)
            from_prior = (beta * precision) @ clean.means[:, :, None]
            mean = from_prior[:, :, 0] + ratio * (shrink @ point)
        else:
            wide = (slice(None), None) if self.kind == "spherical" else (slice(None),)
            shrink = cov_s / cov_t
            mean = beta * clean.means / cov_t[wide] + ratio * shrink[wide] * point
        covariance = beta * shrink
        return self._new(
            log_weight,
            mean,
            np.zeros_like(mean),
            covariance,
            np.zeros_like(covariance),
            self.labels,
        )

    # ------------------------------------------------------------------ densities

    @cached_property
    def _factors(self) -> tuple[Array, Array, Array]:
        """Inverse Cholesky factors as double-double, and log determinants (full only)."""
        shape = self.covariances.shape
        factor, factor_low = np.empty(shape), np.empty(shape)
        log_det = np.empty(shape[0])
        bad = kernels.inverse_factors(
            self.covariances, self._covariances_low, factor, factor_low, log_det
        )
        if bad >= 0:
            raise ValueError(
                f"covariances must be positive definite, covariances[{bad}] is not: "
                f"{self.covariances[bad].tolist()}"
            )
        return factor, factor_low, log_det

    @cached_property
    def _spread_loss(self) -> float:
        """Factor by which cancellation can enlarge the error of z = W (x - m), about sqrt(cond)."""
        if self.kind != "full":
            return 1.0
        deviation = np.sqrt(np.diagonal(self.covariances, axis1=1, axis2=2))
        correlation = self.covariances / (deviation[:, :, None] * deviation[:, None, :])
        low = np.linalg.eigvalsh(correlation)[:, 0].min()
        return float(np.sqrt(self.dim / low)) if low > 0 else np.inf

    @cached_property
    def _quadratic(self) -> tuple[Array, Array, Array, Array]:
        """Log peak densities, precision for the fast kernel, and variance in double-double."""
        if self.kind == "full":
            factor, factor_low, log_det = self._factors
            precision, variance, variance_low = factor, factor, factor_low
        else:
            shape = (*self.means.shape, 1)
            variance = self._per_dimension(self.covariances).reshape(shape)
            variance_low = self._per_dimension(self._covariances_low).reshape(shape)
            precision = 1.0 / variance
            log_det = (np.log(variance) + variance_low / variance).sum(axis=(1, 2))
        peak = self._log_weights - 0.5 * (log_det + self.dim * np.log(2 * np.pi))
        return peak, precision, variance, variance_low

    def _per_dimension(self, values: Array) -> Array:
        """Values of shape (K,) or (K, D) as a contiguous array (K, D)."""
        if values.ndim == 1:
            values = values[:, None]
        return np.ascontiguousarray(np.broadcast_to(values, self.means.shape))

    def _evaluate(
        self, x: Array, groups: list[Indices], base: Array, gain: Array, *, trace: bool = False
    ) -> tuple[Array, Array, Array, Array]:
        """Fast path of all queries: log_sum (G, N), value (G, N, D), trace and spread (G, N)."""
        order = np.concatenate(groups)
        bounds = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
        peak, precision, _, _ = self._quadratic
        n, n_groups = len(x), len(groups)
        valued = base.size > 0
        log_sum = np.empty((n_groups, n))
        value = np.empty((n_groups, n, self.dim) if valued else (n_groups, 0, self.dim))
        traces = np.empty((2, n_groups, n) if trace else (2, n_groups, 0))
        fixed = (
            bounds,
            peak[order],
            self.means[order],
            self._means_low[order],
            kernels.FULL if self.kind == "full" else kernels.DIAGONAL,
            precision[order],
            base[order] if valued else np.empty((0, self.dim)),
            gain[order] if valued else np.empty((0, self.dim, 1)),
            valued,
            trace,
        )

        def run(chunk: int) -> None:
            rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            kernels.evaluate(
                x[rows],
                *fixed,
                log_sum[:, rows],
                value[:, rows],
                traces[0][:, rows],
                traces[1][:, rows],
            )

        run_blocks(run, -(-n // CHUNK))
        return log_sum, value, traces[0], traces[1]

    def _refine(
        self, x: Array, groups: list[Indices], *, score: bool
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Evaluate groups in double-double: top (N,), relative log_sum, score, trace, spread."""
        order = np.concatenate(groups)
        bounds = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
        peak, _, variance, variance_low = self._quadratic
        n, n_groups = len(x), len(groups)
        top, log_sum = np.empty(n), np.empty((n_groups, n))
        scores = np.empty((n_groups, n, self.dim))
        traces = np.empty((2, n_groups, n))
        fixed = (
            bounds,
            peak[order],
            self.means[order],
            self._means_low[order],
            kernels.FULL if self.kind == "full" else kernels.DIAGONAL,
            variance[order],
            variance_low[order],
            score,
        )

        def run(chunk: int) -> None:
            rows = slice(chunk * 256, (chunk + 1) * 256)
            kernels.refined_groups(
                x[rows],
                *fixed,
                top[rows],
                log_sum[:, rows],
                scores[:, rows],
                traces[0][:, rows],
                traces[1][:, rows],
            )

        run_blocks(run, -(-n // 256))
        return top, log_sum, scores, traces[0], traces[1]

    @property
    def _all(self) -> list[Indices]:
        return [np.flatnonzero(self.weights > 0)]

    @property
    def _nothing(self) -> tuple[Array, Array]:
        return np.empty((0, self.dim)), np.empty((0, self.dim, 1))

    @property
    def _unit(self) -> float:
        """Worst relative error of a log joint density in double precision."""
        return 4 * EPSILON * self.dim**0.5 * self._spread_loss

    @property
    def _ill_conditioned(self) -> bool:
        """Whether squared distances are inaccurate in double precision even before subtraction."""
        return self.dim**0.5 * self._spread_loss * EPSILON > 2e-13

    def _doubtful(self, groups: list[Indices], log_sum: Array, allowed: float) -> NDArray[np.bool_]:
        """Mask (N,) of points where responsibilities may have a relative error above allowed."""
        if sum(len(group) for group in groups) == 1:
            return np.zeros(log_sum.shape[1], dtype=bool)
        return (self._unit * np.abs(log_sum).max(axis=0) > allowed) | self._ill_conditioned

    def log_prob(self, x: ArrayLike) -> Array:
        """Log density of points x in nats; for its accuracy see :mod:`dng_math.mixture`.

        Parameters
        ----------
        x : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N,), float64

        Raises
        ------
        ValueError, TypeError
            If x is not real and finite, has another shape, or is so far out that float64 overflows.
        """
        points = self._points(x)
        if self._ill_conditioned:
            top, log_sum, *_ = self._refine(points, self._all, score=False)
            return _known(points, top + log_sum[0])
        return _known(points, self._evaluate(points, self._all, *self._nothing)[0][0])

    def _log_sums(self, points: Array, groups: list[Indices]) -> tuple[Array, Array]:
        """A reference (N,) and, relative to it, the log joint densities of groups (G, N)."""
        log_sum = self._evaluate(points, groups, *self._nothing)[0]
        reference = log_sum.max(axis=0)
        _beyond(points, reference == -np.inf)
        log_sum -= reference
        # A difference of two log densities carries the rounding errors of both.
        error = self._unit * (np.abs(reference + log_sum) + np.abs(reference))
        doubtful = np.any(error > 1e-11 * np.maximum(1.0, -log_sum), axis=0)
        if doubtful.any():
            top, relative, *_ = self._refine(points[doubtful], groups, score=False)
            reference[doubtful] = top
            log_sum[:, doubtful] = relative
        return reference, _known(points, log_sum, axis=1)

    def _log_joint(self, points: Array) -> Array:
        """log p(k | x), the normalised log joint densities, shape (K, N)."""
        live = self._all[0]
        result = np.full((self.n_components, len(points)), -np.inf)
        result[live] = self._log_sums(points, list(live[:, None]))[1]
        total = np.logaddexp.reduce(result, axis=0)
        return np.asarray(result - total)

    def responsibilities(self, x: ArrayLike) -> Array:
        """Posterior p(k | x) of every component.

        Parameters
        ----------
        x : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N, K), float64

        Raises
        ------
        ValueError, TypeError
            As for :meth:`log_prob`.
        """
        return np.ascontiguousarray(np.exp(self._log_joint(self._points(x))).T)

    def _split(self, components: ArrayLike) -> list[Indices]:
        chosen = self.component_indices("components", components)
        inside = np.zeros(self.n_components, dtype=bool)
        inside[chosen] = True
        live = self.weights > 0
        return [np.flatnonzero(inside & live), np.flatnonzero(~inside & live)]

    def log_odds(self, x: ArrayLike, components: ArrayLike) -> Array:
        """log p(components | x) - log p(not components | x); infinite if one set has no weight.

        Parameters
        ----------
        x : array_like, shape (N, D)
        components : array_like of int, or bool mask of shape (K,)

        Returns
        -------
        ndarray, shape (N,), float64

        Raises
        ------
        ValueError, TypeError
            As for :meth:`log_prob`, or if ``components`` do not name components.
        """
        points = self._points(x)
        inside, outside = self._split(components)
        if len(inside) == 0 or len(outside) == 0:
            return np.full(len(points), np.inf if len(inside) else -np.inf)
        _, log_sum = self._log_sums(points, [inside, outside])
        return np.asarray(log_sum[0] - log_sum[1])

    def log_posterior(
        self, x: ArrayLike, components: ArrayLike, *, complement: bool = False
    ) -> Array:
        """log p(components | x); with ``complement`` log p(not components | x).

        Parameters
        ----------
        x : array_like, shape (N, D)
        components : array_like of int, or bool mask of shape (K,)
        complement : bool
            Return the probability of all other components, which is accurate even at e^-1000.

        Returns
        -------
        ndarray, shape (N,), float64

        Raises
        ------
        ValueError, TypeError
            As for :meth:`log_odds`.
        """
        checks.boolean("complement", complement)
        log_odds = self.log_odds(x, components)
        return log_posterior_from_log_odds(-log_odds if complement else log_odds)

    def posterior(self, x: ArrayLike, components: ArrayLike, *, complement: bool = False) -> Array:
        """p(components | x), shape (N,), in [0, 1]; arguments as for :meth:`log_posterior`.

        Values below about 1e-308 become 0; :meth:`log_posterior` still resolves them.
        """
        return np.asarray(np.exp(self.log_posterior(x, components, complement=complement)))

    # ------------------------------------------------------------------ scores

    def _scores(
        self, x: ArrayLike, groups: list[Indices], *, trace: bool = False
    ) -> tuple[Array, Array, Array]:
        """Relative log sums (G, N), scores (G, N, D) and divergences (G, N) of groups."""
        points = self._points(x)
        if self.kind == "full":
            factor = self._factors[0]
            precision = factor.transpose(0, 2, 1) @ factor
        else:
            precision = self._quadratic[1]
        log_sum, score, traces, spread = self._evaluate(
            points, groups, np.zeros_like(self.means), -precision, trace=trace
        )
        # Scores of ill-conditioned components need double-double, even with one component.
        doubtful = self._doubtful(groups, log_sum, 1e-12) | self._ill_conditioned
        _beyond(points, log_sum.max(axis=0) == -np.inf)
        log_sum -= log_sum.max(axis=0)
        if doubtful.any():
            _, log_sum[:, doubtful], score[:, doubtful], t, s = self._refine(
                points[doubtful], groups, score=True
            )
            if trace:
                traces[:, doubtful], spread[:, doubtful] = t, s
        with np.errstate(invalid="ignore"):
            divergence = traces + spread
        known = [_known(points, values, axis=1) for values in (log_sum, score, divergence)]
        return known[0], known[1], known[2]

    def score(self, x: ArrayLike) -> Array:
        """grad log p(x), in inverse units of x; for its accuracy see :mod:`dng_math.mixture`.

        Parameters
        ----------
        x : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N, D), float64

        Raises
        ------
        ValueError, TypeError
            As for :meth:`log_prob`.
        """
        return self._scores(x, self._all)[1][0]

    def score_divergence(self, x: ArrayLike) -> Array:
        """Divergence of the score, which is the Laplacian of log p, at points x.

        Parameters
        ----------
        x : array_like, shape (N, D)

        Returns
        -------
        ndarray, shape (N,), float64
            In inverse squared units of x.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`log_prob`.
        """
        return self._scores(x, self._all, trace=True)[2][0]

    def log_posterior_gradient(self, x: ArrayLike, components: ArrayLike) -> Array:
        """grad log p(components | x) = s_c - s, the gradient of the exact classifier.

        Parameters
        ----------
        x : array_like, shape (N, D)
        components : array_like of int, or bool mask of shape (K,)

        Returns
        -------
        ndarray, shape (N, D), float64
            Zero if one of the two sets of components has no weight.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`log_odds`.
        """
        groups = self._split(components)
        if any(len(group) == 0 for group in groups):
            return np.zeros_like(self._points(x))
        log_sum, score, _ = self._scores(x, groups)
        # s = p s_c + (1 - p) s_r: the difference keeps its digits as p -> 1.
        rest = np.exp(log_posterior_from_log_odds(log_sum[1] - log_sum[0]))
        return np.asarray(rest[:, None] * (score[0] - score[1]))

    def noise_prediction(self, x: ArrayLike, alpha: float, sigma: float) -> Array:
        """E[eps | x_t], what an exact network for this mixture predicts.

        Parameters
        ----------
        x : array_like, shape (N, D)
            x_t = alpha x0 + sigma eps, with x0 from this mixture.
        alpha, sigma : float
            The noise level: not negative, not both zero.

        Returns
        -------
        ndarray, shape (N, D), float64

        Raises
        ------
        ValueError, TypeError
            As for :meth:`diffuse` and :meth:`log_prob`.
        """
        alpha, sigma = _noise_level(alpha, sigma)
        return np.asarray(equations.noise_from_score(self.diffuse(alpha, sigma).score(x), sigma))

    # ------------------------------------------------------------------ x0 given x_t

    def _divided_by(self, noisy: GaussianMixture) -> tuple[Array, Array]:
        """C_t^-1 and C C_t^-1 (K, D, D) for full covariances C and diffused covariances C_t."""
        precision, shrink = np.empty((2, *self.covariances.shape))
        factor, factor_low, _ = noisy._factors
        kernels.precisions(
            self.covariances, self._covariances_low, factor, factor_low, precision, shrink
        )
        return precision, shrink

    def _shrink(self, noisy: GaussianMixture) -> Array:
        """C (alpha^2 C + sigma^2)^-1, shape (K, D, 1) or (K, D, D)."""
        if self.kind == "full":
            return self._divided_by(noisy)[1]
        shrink = self._per_dimension(self.covariances / noisy.covariances)
        return shrink.reshape(*self.means.shape, 1)

    def _component_means(self, points: Array, noisy: GaussianMixture, gain: Array) -> Array:
        """E[x0 | x_t, k], shape (N, K, D)."""
        offset = (points[:, None] - noisy.means) - noisy._means_low
        if gain.shape[-1] == 1:
            return self.means + gain[:, :, 0] * offset
        return self.means + np.einsum("kde,nke->nkd", gain, offset)

    def posterior_mean(self, x: ArrayLike, alpha: float, sigma: float) -> Array:
        """E[x0 | x_t] by Tweedie's formula, finite also at alpha = 0.

        docs/theory.md, section 4.2.

        Parameters
        ----------
        x : array_like, shape (N, D)
            x_t = alpha x0 + sigma eps, with x0 from this mixture.
        alpha, sigma : float
            The noise level: not negative, not both zero.

        Returns
        -------
        ndarray, shape (N, D), float64

        Raises
        ------
        ValueError, TypeError
            As for :meth:`diffuse` and :meth:`log_prob`.
        """
        points = self._points(x)
        noisy = self.diffuse(*_noise_level(alpha, sigma))
        gain = alpha * self._shrink(noisy)
        log_sum, (mean,), *_ = noisy._evaluate(points, self._all, self.means, gain)
        _beyond(points, log_sum[0] == -np.inf)
        doubtful = np.flatnonzero(noisy._doubtful(self._all, log_sum, 1e-9))
        chunk = max(1, 2**22 // (self.n_components * self.dim))
        for start in range(0, len(doubtful), chunk):
            rows = doubtful[start : start + chunk]
            share = noisy.responsibilities(points[rows])
            means = self._component_means(points[rows], noisy, gain)
            mean[rows] = np.einsum("nk,nkd->nd", share, means)
        return _known(points, mean)

    def posterior_covariance(self, x: ArrayLike, alpha: float, sigma: float) -> Array:
        """Cov[x0 | x_t], shape (N, D, D); arguments and errors as for :meth:`posterior_mean`."""
        points = self._points(x)
        alpha, sigma = _noise_level(alpha, sigma)
        noisy = self.diffuse(alpha, sigma)
        shrink = self._shrink(noisy)
        gain = alpha * shrink
        # C - alpha^2 C C_t^-1 C = sigma^2 C C_t^-1
        within = sigma**2 * (shrink if self.kind == "full" else shrink * np.eye(self.dim))
        result = np.empty((len(points), self.dim, self.dim))
        chunk = max(1, 2**22 // (self.n_components * self.dim))
        for start in range(0, len(points), chunk):
            rows = slice(start, start + chunk)
            weight = noisy.responsibilities(points[rows])
            means = self._component_means(points[rows], noisy, gain)
            mean = np.einsum("nk,nkd->nd", weight, means)
            offset = means - mean[:, None]
            result[rows] = np.einsum("nk,kde->nde", weight, within)
            result[rows] += np.einsum("nk,nkd,nke->nde", weight, offset, offset, optimize=True)
        return _known(points, result)

    # ------------------------------------------------------------------ samples

    def sample(self, n: int, rng: np.random.Generator | int | None = None) -> Array:
        """Independent draws from the mixture.

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
            If n is not an integer >= 0, or rng is neither a generator nor a seed.
        """
        return self.sample_labelled(n, rng)[0]

    def sample_labelled(
        self, n: int, rng: np.random.Generator | int | None = None
    ) -> tuple[Array, Indices]:
        """Draws (n, D) and the component (n,) of each; arguments as for :meth:`sample`."""
        n = checks.size("n", n, 0)
        generator = checks.generator("rng", rng)
        chosen = generator.choice(self.n_components, size=n, p=self.weights / self.weights.sum())
        return self._draw(chosen, generator.standard_normal((n, self.dim))), chosen

    def _draw(self, component: Indices, noise: Array) -> Array:
        """m_k + L_k z for the given components (n,) and standard normals (n, D)."""
        if self.kind == "full":
            deviation = np.linalg.cholesky(self.covariances)
            return self.means[component] + np.einsum("nde,ne->nd", deviation[component], noise)
        deviation = np.sqrt(self._per_dimension(self.covariances))
        return self.means[component] + deviation[component] * noise


def _beyond(points: Array, bad: NDArray[np.bool_]) -> None:
    """Raise ValueError for the first of the points (N, D) that is marked in ``bad`` (N,)."""
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(
            f"x must be where float64 can hold the squares of (x - mean) / variance, but they "
            f"overflow at x[{i}] = {points[i]}"
        )


def _known(points: Array, result: Array, axis: int = 0) -> Array:
    """Return ``result``, computed at points along ``axis``; raise ValueError if any is NaN."""
    if np.isnan(result).any():
        others = tuple(i for i in range(result.ndim) if i != axis)
        _beyond(points, np.asarray(np.isnan(result).any(axis=others)))
    return result


def _noise_level(alpha: float, sigma: float, suffix: str = "") -> tuple[float, float]:
    alpha = checks.non_negative(f"alpha{suffix}", alpha)
    sigma = checks.non_negative(f"sigma{suffix}", sigma)
    if alpha == 0 and sigma == 0:
        raise ValueError(f"alpha{suffix} and sigma{suffix} must not both be zero")
    return alpha, sigma
