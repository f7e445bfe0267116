"""What a plate and its batch add to all their wells alike, estimated from the controls: means that are shrunk as far as they are noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Offsets:
    """Offsets of inner groups (plates).

    Attributes:
        values: float64 [groups, D].
        weight: median weight of a group's own mean against its outer group's, over features and groups with controls.
        outer_weight: the same of the outer groups' means against the mean of all.
    """

    values: np.ndarray
    weight: float
    outer_weight: float


def shrunk_offsets(x: np.ndarray, group: np.ndarray, outer: np.ndarray) -> Offsets:
    """Best linear predictions of the groups' offsets in x = μ + β(outer) + π(group) + ε, with Var β = ω², Var π = τ², Var ε = σ².

    offset = m + w · (mean − m) with w = τ² / (τ² + σ² / n), where m = μ + v · (outer mean − μ) with v = ω² / (ω² + noise of the outer mean):
    the mean of few controls is noise that all wells of a plate would share, and what cannot be told from noise is not taken off. Variances
    are estimated feature by feature by the analysis of variance, negative ones as 0. Where groups hold one control each, their variance
    counts as noise; where nothing is repeated, nothing tells offsets from noise, and all offsets are μ.

    Args:
        x: float64 [n, D], controls; group: int [n], the group of each; outer: int [groups], the outer group of each group; a group without
            controls takes m.

    Source: Robinson 1991, Statistical Science 6:15 (BLUP); Henderson 1953 (variance components).
    """
    groups, outers = len(outer), int(outer.max()) + 1
    n = np.bincount(group, minlength=groups)
    present = n > 0
    of_outer = np.bincount(outer, n, outers)
    outer_mean = _means(x, outer[group], of_outer)
    mean = _means(x, group, n)
    mean[~present] = outer_mean[outer[~present]]
    free_within = len(x) - int(present.sum())
    free_between = int(present.sum()) - outers
    between = (n[:, None] * (mean - outer_mean[outer]) ** 2).sum(axis=0)
    within = ((x - mean[group]) ** 2).sum(axis=0)
    tau, noise = np.zeros(x.shape[1]), np.full(x.shape[1], np.inf)
    if free_within > 0:
        noise = within / free_within
        if free_between > 0:
            size = (len(x) - (n**2 / of_outer[outer]).sum()) / free_between
            tau = np.maximum(between / free_between - noise, 0.0) / size
    elif free_between > 0:
        noise = between / free_between
    of_mean = noise / of_outer[:, None] + tau * (np.bincount(outer, n**2, outers) / of_outer**2)[:, None]
    middle = outer_mean.mean(axis=0)
    omega = np.maximum(outer_mean.var(axis=0, ddof=1) - of_mean.mean(axis=0), 0.0) if outers > 1 else np.zeros(x.shape[1])
    outer_weight = _share(omega, of_mean)
    weight = _share(tau, noise / np.maximum(n, 1)[:, None]) * present[:, None]
    m = (middle + outer_weight * (outer_mean - middle))[outer]
    return Offsets(m + weight * (mean - m), float(np.median(weight[present])), float(np.median(outer_weight)))


def _means(x: np.ndarray, codes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    sums = np.zeros((len(counts), x.shape[1]))
    np.add.at(sums, codes, x)
    return sums / np.maximum(counts, 1)[:, None]


def _share(signal: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """signal / (signal + noise), 0 where there is no signal."""
    with np.errstate(invalid="ignore"):
        return np.where(signal > 0, signal / (signal + noise), 0.0)
