"""The matrices of sphering and CORAL: covariance, its powers, and its regularisation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cellfast.errors import CellfastError

ROTATIONS = ("pca", "zca", "pca-cor", "zca-cor")


@dataclass
class Whitening:
    """A fitted sphering, x ↦ (x − mean) @ matrix.

    Attributes:
        mean: float64 [D].
        matrix: float64 [D, D].
        rank: directions in which the controls vary.
        lam: what was added to the eigenvalues (None with epsilon, infinity where the covariance was replaced by its mean
        eigenvalue).
        relative_lam: lam over the mean eigenvalue.
        shrinkage: Ledoit-Wolf intensity in [0, 1], or None.
    """

    mean: np.ndarray
    matrix: np.ndarray
    rank: int
    lam: float | None
    relative_lam: float | None
    shrinkage: float | None


def parse_lambda(text: str) -> tuple[str, float]:
    """``"auto"`` → ("auto", 0), ``"0.1x"`` → ("relative", 0.1), ``"1"`` → ("absolute", 1).

    Raises:
        CellfastError: anything else, or a negative number.
    """
    text = str(text).strip().lower()
    if text == "auto":
        return "auto", 0.0
    kind, number = ("relative", text[:-1]) if text.endswith("x") else ("absolute", text)
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not (0 <= value < np.inf):
        raise CellfastError(
            f"--lambda must be 'auto', a number (added to the eigenvalues) or a multiple of the mean eigenvalue such as "
            f"0.1x; got '{text}'."
        )
    return kind, value


def second_moment(x: np.ndarray) -> np.ndarray:
    """``x.T @ x / len(x)``, float64 [D, D]."""
    return x.T @ x / len(x)


def symmetric_power(c: np.ndarray, power: float, added: float = 0.0) -> np.ndarray:
    """``(c + added · I) ** power`` for a symmetric positive semidefinite matrix c, by its eigenvalues."""
    s, v = np.linalg.eigh(c)
    return (v * (np.maximum(s, 0.0) + added) ** power) @ v.T


def times_power(x: np.ndarray, rows: np.ndarray, power: float, added: float) -> np.ndarray:
    """``x @ symmetric_power(second_moment(rows), power, added)`` without the D × D matrix where rows [n, D] are few; x [N, D].

    With G = rows · rowsᵀ / n = U · diag(s) · Uᵀ (n × n), (C + added · I)^power = added^power · I + rowsᵀ · U · diag(f(s) / n) · Uᵀ · rows and
    f(s) = ((s + added)^power − added^power) / s: nothing is divided by a small singular value.
    """
    n, d = rows.shape
    # At 330 rows of 512 the short way takes half the time; the two meet at about three quarters.
    if 4 * n >= 3 * d or added <= 0:
        return x @ symmetric_power(second_moment(rows), power, added)
    s, u = np.linalg.eigh(rows @ rows.T / n)
    s = np.maximum(s, 0.0)
    # expm1 and log1p: f tends to power · added^(power − 1), and the difference of the powers would cancel there.
    f = np.full(n, power * added ** (power - 1))
    some = s > added * np.finfo(np.float64).eps
    f[some] = added**power * np.expm1(power * np.log1p(s[some] / added)) / s[some]
    basis = u.T @ rows
    return added**power * x + ((x @ basis.T) * (f / n)) @ basis


def ledoit_wolf_shrinkage(x: np.ndarray) -> float:
    """The intensity δ in [0, 1] with which (1 − δ) · C + δ · mean eigenvalue · I is closest to the true covariance; x [n, D]
    centred.

    Source: Ledoit & Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", lemma 3.2 to 3.4.
    """
    n, d = x.shape
    # tr(C²) by the smaller of the two Gram matrices.
    gram = x @ x.T if n < d else x.T @ x
    square = float((gram * gram).sum()) / n**2
    mu = float((x * x).sum()) / (n * d)
    distance = square / d - mu**2
    if distance <= 0:
        return 1.0
    fourth = float(((x * x).sum(axis=1) ** 2).sum())
    noise = (fourth / n - square) / (n * d)
    return float(min(max(noise, 0.0) / distance, 1.0))


def fit_whitening(x: np.ndarray, lam: str = "auto", rotation: str = "pca", epsilon: float | None = None) -> Whitening:
    """Fit sphering on control rows: W = V · diag(1 / √(s + λ)) (PCA), W · Vᵀ (ZCA), with C = V · diag(s) · Vᵀ the controls'
    covariance (divisor n).

    Where the controls do not vary (fewer controls than features), V is not determined, and the treatment median depends on it:
    a fixed, generic orthonormal basis of that space is taken, so that the result does not depend on the linear algebra library.

    Args:
        x: float64 [n, D], n ≥ 2.
        lam: ``auto``: Ledoit-Wolf shrinkage, s ↦ (1 − δ) s + δ · mean(s); ``0.1``: λ; ``0.1x``: λ as a multiple of mean(s).
        rotation: ``pca``, ``zca``, ``pca-cor``, ``zca-cor``; -cor scales the features by their standard deviation in x first.
        epsilon: use pycytominer's convention instead: W = √(n − 1) · V · diag(1 / (σ + ε)), σ the singular values of the
        centred x, the
            smallest of them standing in for those that are zero.

    Raises:
        CellfastError: controls that do not vary at all, λ = 0 with a singular covariance, ``auto`` on two rows.

    Source: the reference implementation's whitening_transform (λ); Kessy et al. 2018 and pycytominer's Spherize (ε, -cor).
    """
    n, d = x.shape
    mean = x.mean(axis=0)
    centered = x - mean
    scale = None
    if rotation.endswith("-cor"):
        scale = centered.std(axis=0)
        if (scale <= np.abs(mean) * n * np.finfo(np.float64).eps).any():
            raise CellfastError(
                f"--rotation {rotation}: {(scale == 0).sum()} features do not vary over the controls; put standardize "
                f"before it, or use {rotation[:3]}."
            )
        centered = centered / scale
    # Of many rows the triangle has the same singular values and right vectors, and the left ones are not needed.
    triangle = np.linalg.qr(centered, mode="r") if n > d else centered
    _, sigma, vt = np.linalg.svd(triangle, full_matrices=False)
    if sigma.max(initial=0.0) == 0:
        raise CellfastError(f"Sphering: the {n} control rows are all the same; there is no variation to normalise by.")
    rank = int((sigma > sigma[0] * max(n, d) * np.finfo(np.float64).eps).sum())
    # The sign of a singular vector is arbitrary: its largest component is made positive.
    vt = vt[:rank]
    vt = vt * np.sign(vt[np.arange(rank), np.abs(vt).argmax(axis=1)])[:, None]
    v = np.concatenate([vt.T, _complement(vt)], axis=1)
    s = np.zeros(d)
    s[:rank] = sigma[:rank] ** 2 / n
    shrinkage = value = relative = None
    if epsilon is not None:
        full = np.concatenate([sigma[:rank], np.full(d - rank, sigma[rank - 1])])
        diagonal = np.sqrt(n - 1) / (full + epsilon)
    else:
        kind, number = parse_lambda(lam)
        average = float(s.mean())
        if kind == "auto":
            shrinkage = ledoit_wolf_shrinkage(centered)
            # Two rows, centred, are ±a: they agree wholly, nothing is shrunk, and the directions they leave out would be divided by 0.
            if shrinkage < 1e-9 and rank < d:
                raise CellfastError(
                    f"Sphering: from {n} control rows the regularisation of {d} features cannot be estimated. Give it, e.g. --lambda 0.1x, "
                    "or choose --normalize standardize, or other controls (--controls QUERY; --controls all takes every well)."
                )
            diagonal = 1.0 / np.sqrt((1 - shrinkage) * s + shrinkage * average)
            relative = shrinkage / (1 - shrinkage) if shrinkage < 1 else None
            value = relative * average if relative is not None else None
        else:
            value = number * average if kind == "relative" else number
            relative = value / average
            if value == 0 and rank < d:
                raise CellfastError(
                    f"--lambda 0 with {n} controls and {d} features: the covariance has rank {rank}; use --lambda auto or "
                    f"a positive value."
                )
            diagonal = 1.0 / np.sqrt(s + value)
    matrix = v * diagonal
    if rotation.startswith("zca"):
        matrix = matrix @ v.T
    if scale is not None:
        matrix = matrix / scale[:, None]
    return Whitening(mean, matrix, rank, value, relative, shrinkage)


def _complement(vt: np.ndarray) -> np.ndarray:
    """An orthonormal basis [D, D − r] of what is orthogonal to the rows of vt [r, D]: a fixed Gaussian matrix, projected and
    orthonormalised.
    """
    rank, d = vt.shape
    if rank == d:
        return np.empty((d, 0))
    # Any basis is as good, and with a tiny λ the treatment median depends on it: on Ljosa's table at λ = 1e-6 sixty such bases
    # give NSC 82 to 89
    # and NSCB 61 to 68. This one gives their median.
    g = np.random.default_rng(4).standard_normal((d, d - rank))
    for _ in range(2):
        g -= vt.T @ (vt @ g)
    q, r = np.linalg.qr(g)
    return q * np.sign(np.diag(r))
