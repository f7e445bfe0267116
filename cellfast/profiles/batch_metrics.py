"""How much of the plate and the batch is in profiles: a linear probe on the controls, silhouette and LISI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cellfast.metadata import columns as names
from cellfast.profiles.table import ProfileTable

#: Rows measured at most, drawn at random: a probe of more controls says the same, and takes longer.
MOST_ROWS = 500

PERPLEXITY = 30
_FOLDS = 3


def batch_metrics(wells: ProfileTable, controls: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """What tells plates and batches apart in the controls, and MoAs in the other wells.

    Every feature is scaled to unit variance over the wells first, so that profiles before and after normalisation are measured alike.

    Args:
        wells: profiles with plate, batch and MoA as far as they are known.
        controls: bool [N], the controls among them. seed: of the rows drawn and the folds.

    Returns:
        ``plate``, ``batch`` (over controls) and ``moa`` (over the others), each None where there are not two of them with two
        rows each, else ``num_rows``, ``num_groups``, ``silhouette`` (cosine), ``lisi`` (median over rows) and ``lisi_mixed`` (what even
        mixing gives); plate and batch also ``accuracy`` (`probe_accuracy`) and ``chance`` (always naming the largest group).
    """
    moa = wells.metadata.get(names.MOA)
    known = ~controls & (moa != "").to_numpy() if moa is not None else np.zeros(len(wells), bool)
    rng = np.random.default_rng(seed)
    result: dict[str, Any] = {}
    for name, column, of in (("plate", names.PLATE, controls), ("batch", names.BATCH, controls), ("moa", names.MOA, known)):
        result[name] = None
        if column not in wells.metadata:
            continue
        rows = np.flatnonzero(of)
        rows = np.sort(rng.choice(rows, min(MOST_ROWS, len(rows)), replace=False))
        _, labels, counts = np.unique(
            wells.metadata[column].to_numpy()[rows].astype(str), return_inverse=True, return_counts=True
        )
        kept = counts[labels] >= 2
        if len(np.unique(labels[kept])) < 2:
            continue
        labels = np.unique(labels[kept], return_inverse=True)[1]
        x = wells.features[rows[kept]].astype(np.float64)
        spread = x.std(axis=0)
        varies = spread > 1e-12 * np.abs(x).max(axis=0, initial=0.0)
        # The origin stays where it is: the directions that cosine sees are those from the controls' mean, once it was taken off.
        x = x[:, varies] / spread[varies]
        plates = wells.metadata[names.PLATE].to_numpy()[rows[kept]] if name == "batch" and names.PLATE in wells.metadata else None
        result[name] = _measured(x, labels, plates, probe=name != "moa", seed=seed)
    return result


def _measured(x: np.ndarray, labels: np.ndarray, plates: np.ndarray | None, *, probe: bool, seed: int) -> dict[str, Any]:
    from sklearn.metrics import silhouette_score

    shares = np.bincount(labels) / len(labels)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    unit = x / np.where(lengths > 0, lengths, 1.0)
    found: dict[str, Any] = {"num_rows": len(labels), "num_groups": len(shares)}
    if probe:
        found |= {"accuracy": probe_accuracy(x, labels, plates, seed), "chance": float(shares.max())}
    several = len(shares) < len(labels)
    return found | {
        "silhouette": float(silhouette_score(unit, labels, metric="euclidean")) if several else None,
        "lisi": float(np.median(lisi(unit, labels))),
        "lisi_mixed": float(1 / (shares**2).sum()),
    }


def probe_accuracy(x: np.ndarray, labels: np.ndarray, plates: np.ndarray | None = None, seed: int = 0) -> float:
    """Share of rows whose group a ridge classifier names that was fitted on other rows: scikit-learn's ``cross_val_predict`` of
    ``RidgeClassifier`` on standardised features, in up to three stratified folds; its penalty is a tenth of the larger of n and D.

    Args:
        x: float64 [n, D]; labels: int64 [n], at least two groups, each of at least two rows.
        plates: [n]; a plate is then in one fold, where every group has two: a batch is named on plates that were not seen.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=0.1 * max(x.shape)))
    kind, least = StratifiedKFold, int(np.bincount(labels).min())
    if plates is not None:
        of_group = [len(np.unique(plates[labels == group])) for group in range(labels.max() + 1)]
        if min(of_group) > 1:
            kind, least = StratifiedGroupKFold, min(of_group)
        else:
            plates = None
    folds = kind(min(_FOLDS, least), shuffle=True, random_state=seed)
    return float((cross_val_predict(model, x, labels, cv=folds, groups=plates) == labels).mean())


def lisi(x: np.ndarray, labels: np.ndarray, perplexity: float = PERPLEXITY) -> np.ndarray:
    """Local inverse Simpson's index of each row: the effective number of groups among its neighbours, float64 [n].

    Neighbours are the 3 · perplexity nearest rows (Euclidean), weighted by exp(−β · distance) with the β whose weights have that
    perplexity, exp(entropy); the index is 1 / Σ (share of each group)². With few rows the perplexity is a third of the other rows.

    Args:
        x: float [n, D], n ≥ 2; labels: int [n].

    Source: Korsunsky et al. 2019, Nature Methods 16:1289.
    """
    from sklearn.neighbors import NearestNeighbors

    n = len(x)
    perplexity = max(1.0, min(perplexity, (n - 1) / 3))
    k = min(n - 1, max(1, int(3 * perplexity)))
    distance, index = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(x).kneighbors()
    distance = distance - distance[:, :1]  # a factor common to all weights of a row
    low, high = np.zeros(n), np.full(n, np.inf)
    beta = np.ones(n)
    for _ in range(60):
        weights = np.exp(-distance * beta[:, None])
        total = weights.sum(axis=1)
        entropy = np.log(total) + beta * (distance * weights).sum(axis=1) / total
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, beta, low), np.where(wide, high, beta)
        with np.errstate(over="ignore"):
            beta = np.where(np.isinf(high), np.minimum(2 * beta, 1e300), (low + high) / 2)
    weights /= weights.sum(axis=1, keepdims=True)
    shares = np.zeros((n, labels.max() + 1))
    for column in range(k):
        shares[np.arange(n), labels[index[:, column]]] += weights[:, column]
    return 1 / (shares**2).sum(axis=1)


def batch_lines(metrics: dict[str, Any] | None) -> list[str]:
    """``{"before": …, "after": …}`` of `batch_metrics`, for people."""
    if not metrics:
        return []
    lines = []
    for name, what in (("plate", "a control's plate"), ("batch", "a control's batch"), ("moa", "MoAs")):
        stages = [(stage, metrics[stage][name]) for stage in ("before", "after") if metrics.get(stage, {}).get(name)]
        if not stages:
            continue
        first = stages[0][1]
        text = [f"{first['num_groups']} groups, {first['num_rows']:,} wells"]
        if "accuracy" in first:
            text.append("named by a linear probe " + _stages(stages, "accuracy", lambda v: f"{100 * v:.0f} %")
                        + f" (chance {100 * first['chance']:.0f} %)")  # fmt: skip
        text.append("silhouette " + _stages(stages, "silhouette", lambda v: f"{v:.2f}"))
        text.append("LISI " + _stages(stages, "lisi", lambda v: f"{v:.1f}") + f" (evenly mixed {first['lisi_mixed']:.1f})")
        lines.append(f"{'batch' if name != 'moa' else 'MoA':<10}{what}: {'; '.join(text)}")
    return lines


def _stages(stages: Sequence[tuple[str, dict[str, Any]]], key: str, form: Any) -> str:
    return ", ".join(f"{form(one[key])} {stage}" for stage, one in stages if one[key] is not None) or "n/a"
