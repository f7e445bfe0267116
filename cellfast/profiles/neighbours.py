"""Nearest allowed neighbours of profiles: NSC (not same compound) and NSCB (not same compound, not same batch) in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cellfast.errors import CellfastError
from cellfast.profiles.aggregate import num_threads

METRICS = ("cosine", "correlation", "euclidean")
BATCH_RULES = ("joined", "overlap", "plates")

_BLOCK = 1024
_EPSILON = float(np.finfo(np.float64).eps)
# Below this many multiplications a float64 product is quicker than starting the compiled kernels.
_SMALL = 1 << 31


@dataclass
class AllowedPairs:
    """Which profiles may be neighbours of which.

    Attributes:
        compound: int64 [n], equal for profiles of one compound; such pairs are never allowed.
        batch: int64 [n, words]: one code per profile (``overlap`` False: equal codes are the same batch), or bit sets
        (``overlap`` True: sets
            with a common member are the same batch).
        overlap: how ``batch`` is compared.
        candidate: bool [n], may be a neighbour under NSC.
        candidate_b: bool [n], may be a neighbour under NSCB.
    """

    compound: np.ndarray
    batch: np.ndarray
    overlap: bool
    candidate: np.ndarray
    candidate_b: np.ndarray

    def same_batch(self, rows: np.ndarray) -> np.ndarray:
        """Bool [len(rows), n]: pairs of the same batch under the rule."""
        if not self.overlap:
            return self.batch[rows, :1] == self.batch[None, :, 0]
        same = np.zeros((len(rows), len(self.batch)), bool)
        for word in range(self.batch.shape[1]):
            same |= (self.batch[rows, word][:, None] & self.batch[None, :, word]) != 0
        return same

    def allowed(self, rows: np.ndarray, not_same_batch: bool) -> np.ndarray:
        """Bool [len(rows), n]: the candidates of each row under NSC, or NSCB with ``not_same_batch``."""
        other = self.compound[rows][:, None] != self.compound[None, :]
        if not not_same_batch:
            return other & self.candidate[None, :]
        return other & self.candidate_b[None, :] & ~self.same_batch(rows)

    def pool_sizes(self, not_same_batch: bool) -> np.ndarray:
        """int64 [n]: number of candidates of each profile, counted per distinct batch and compound, without an n × n table."""
        n = len(self.compound)
        candidate = self.candidate_b if not_same_batch else self.candidate
        per_compound = np.bincount(self.compound, weights=candidate, minlength=self.compound.max(initial=0) + 1)
        if not not_same_batch:
            return (candidate.sum() - per_compound[self.compound]).astype(np.int64)
        sets, code = np.unique(self.batch, axis=0, return_inverse=True)
        code = code.reshape(-1)
        per_set = np.bincount(code, weights=candidate, minlength=len(sets))
        if self.overlap:
            meets = [np.flatnonzero((sets & row).any(axis=1)) for row in sets]
        else:
            meets = [np.array([i]) for i in range(len(sets))]
        in_batch = np.array([per_set[m].sum() for m in meets])
        pool = candidate.sum() - in_batch[code] - per_compound[self.compound]
        # Candidates of the same compound and the same batch were taken off twice.
        order = np.argsort(self.compound, kind="stable")
        bounds = np.flatnonzero(np.diff(self.compound[order], prepend=-1, append=-1))
        for start, stop in pairwise(bounds):
            rows = order[start:stop]
            counted: dict[int, float] = {}
            for r in rows[candidate[rows]]:
                counted[code[r]] = counted.get(code[r], 0) + 1
            for r in rows:
                pool[r] += sum(counted.get(m, 0) for m in meets[code[r]]) if self.overlap else counted.get(code[r], 0)
        assert len(pool) == n
        return np.round(pool).astype(np.int64)


@dataclass
class Ties:
    """The rows for which the k nearest, or their order, is a matter of choice: equal distances among them, or at the k-th.

    Attributes:
        rows: int64 [t], profiles with ties.
        starts: int64 [t + 1]: the candidates of the i-th are entries starts[i]:starts[i + 1] of the next two.
        members: int64, all candidates not farther than the k-th nearest, nearest first.
        groups: int64, 0 for the nearest and those as near, 1 for the next, …
    """

    rows: np.ndarray
    starts: np.ndarray
    members: np.ndarray
    groups: np.ndarray

    @classmethod
    def collect(cls, found: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> Ties:
        """From (row, members, groups) of each row."""
        none = [np.zeros(0, np.int64)]
        sizes = [len(members) for _, members, _ in found]
        return cls(
            np.array([row for row, _, _ in found], np.int64),
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            np.concatenate([members for _, members, _ in found] or none),
            np.concatenate([groups for _, _, groups in found] or none),
        )

    def of(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(members, groups) of the i-th row."""
        part = slice(self.starts[i], self.starts[i + 1])
        return self.members[part], self.groups[part]


@dataclass
class Neighbours:
    """The nearest allowed profiles of each profile.

    Attributes:
        index: int64 [n, k], nearest first, of equally near ones the first row; −1 where there are fewer candidates than k.
        distance: float64 [n, k]: 1 − cosine, 1 − Pearson correlation, or Euclidean distance; NaN where index is −1.
        pool_size: int64 [n], number of candidates.
        ties: rows whose neighbours are a matter of choice.
    """

    index: np.ndarray
    distance: np.ndarray
    pool_size: np.ndarray
    ties: Ties = field(default_factory=lambda: Ties.collect([]))


def batch_codes(batches: Sequence[Sequence[str]], rule: str) -> tuple[np.ndarray, bool]:
    """Encode each profile's batches (or plates, for the rule ``plates``) for ``AllowedPairs``.

    Args:
        batches: for each profile the names of the batches its wells are in.
        rule: ``joined`` and ``plates``: profiles with the same set of names are the same batch; ``overlap``: sets with a
        common name are.

    Returns:
        (codes int64 [n, words], overlap flag).
    """
    if rule not in BATCH_RULES:
        raise ValueError(f"rule must be one of {', '.join(BATCH_RULES)}, got {rule!r}")
    if rule != "overlap":
        codes: dict[tuple[str, ...], int] = {}
        return np.array([[codes.setdefault(tuple(sorted(set(b))), len(codes))] for b in batches], np.int64).reshape(-1, 1), False
    bits: dict[str, int] = {}
    for names in batches:
        for name in names:
            bits.setdefault(name, len(bits))
    words = np.zeros((len(batches), max(1, -(-len(bits) // 63))), np.int64)
    for i, names in enumerate(batches):
        for name in names:
            words[i, bits[name] // 63] |= 1 << (bits[name] % 63)
    return words, True


def prepare(features: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Vectors whose products order neighbours: (float64 [n, D], offset [n]); similarity(q, c) = x_q · x_c − offset_c.

    Cosine: rows of unit length. Correlation: rows centred, then of unit length. Euclidean: columns centred, offset ‖x_c‖² / 2,
    which orders candidates by distance.

    Raises:
        CellfastError: a row that is not finite, or has no direction (all zero; for correlation: constant).
    """
    if metric not in METRICS:
        raise CellfastError(f"--metric must be one of {', '.join(METRICS)}; got '{metric}'.")
    x = np.array(features, dtype=np.float64)
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        raise CellfastError(
            f"{bad.sum()} of {len(x)} profiles hold NaN or infinite values (first: row {np.flatnonzero(bad)[0]}): remove "
            f"or repair them first."
        )
    if metric == "euclidean":
        x -= x.mean(axis=0)
        return x, 0.5 * np.einsum("ij,ij->i", x, x)
    largest = np.abs(x).max(axis=1, initial=0.0)
    if metric == "correlation":
        x -= x.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(x, axis=1)
    flat = norm <= 1e-12 * largest * np.sqrt(x.shape[1])
    if flat.any():
        what = "constant over their features" if metric == "correlation" else "zero in every feature"
        raise CellfastError(
            f"{flat.sum()} of {len(x)} profiles are {what} (first: row {np.flatnonzero(flat)[0]}): {metric} distance is "
            f"not defined for them. "
            "Use --metric euclidean, or remove them."
        )
    x /= norm[:, None]
    return x, np.zeros(len(x))


def nearest_neighbours(
    features: np.ndarray, pairs: AllowedPairs, metric: str = "cosine", k: int = 1
) -> tuple[Neighbours, Neighbours]:
    """The k nearest allowed profiles of every profile under NSC and NSCB.

    Equivalent to a float64 distance matrix with forbidden pairs set to infinity and a stable sort of each row; distances that
    are equal to rounding (``tie_tolerance``) are ties. Products are made in float32 blocks, of the upper triangle only; rows
    whose order float32 cannot tell are done again in float64, so the result is float64's.

    Args:
        features: float [n, D].
        pairs: who may be whose neighbour.
        metric: cosine, correlation or euclidean.
        k: neighbours per profile.

    Returns:
        (NSC neighbours, NSCB neighbours).

    Raises:
        CellfastError: values that are not finite, rows without a direction.
    """
    if k < 1:
        raise CellfastError(f"-k must be at least 1, got {k}.")
    x, offset = prepare(features, metric)
    n, d = x.shape
    k_found = min(k, max(n - 1, 1))
    if n * n * d <= _SMALL:
        unsure = np.arange(n)
        index = [np.full((n, k), -1, np.int64) for _ in range(2)]
    else:
        index, unsure = _blocked(x, offset, pairs, k_found, k)
    ties = _exact(x, offset, pairs, unsure, k_found, index)
    results = []
    for rule, found in enumerate(index):
        distance = np.full((n, k), np.nan)
        for column in range(k_found):
            have = found[:, column] >= 0
            distance[have, column] = _distance(x, np.flatnonzero(have), found[have, column], metric)
        results.append(Neighbours(found, distance, pairs.pool_sizes(rule == 1), ties[rule]))
    return results[0], results[1]


def _distance(x: np.ndarray, rows: np.ndarray, others: np.ndarray, metric: str) -> np.ndarray:
    result = np.empty(len(rows))
    for start in range(0, len(rows), 4096):
        a, b = x[rows[start : start + 4096]], x[others[start : start + 4096]]
        if metric == "euclidean":
            result[start : start + 4096] = np.linalg.norm(a - b, axis=1)
        else:
            result[start : start + 4096] = 1.0 - np.einsum("ij,ij->i", a, b)
    return result


def tie_tolerance(norm: np.ndarray, similarity: np.ndarray, num_features: int, offset_used: bool) -> np.ndarray:
    """What similarities of equally near candidates can differ by through rounding, float64 of the shape of ``similarity``.

    Args:
        norm: lengths of the queries' vectors from ``prepare``, of a shape that broadcasts to ``similarity``.
        similarity: float64, of candidates.
        offset_used: whether similarities have an offset (Euclidean distance).
    """
    # A candidate's distance bounds its length, and so the rounding of its product.
    square = norm**2 + (0.0 if offset_used else 1.0) - 2 * similarity
    return 2 * _EPSILON * (8 + num_features**0.5) * (norm + np.sqrt(np.maximum(square, 0.0))) ** 2


def _exact(
    x: np.ndarray, offset: np.ndarray, pairs: AllowedPairs, rows: np.ndarray, k: int, index: list[np.ndarray]
) -> list[Ties]:
    """Search ``rows`` in float64: fills their rows of ``index`` (NSC, NSCB) and returns the ties."""
    step = max(1, (1 << 24) // len(x))
    norm, offset_used = np.sqrt(np.einsum("ij,ij->i", x, x)), bool(offset.any())
    ties: list[list[tuple[int, np.ndarray, np.ndarray]]] = [[], []]
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        similarity = x[part] @ x.T - offset
        for rule in range(2):
            allowed = pairs.allowed(part, rule == 1)
            masked = np.where(allowed, similarity, -np.inf)
            if k == 1:
                order = masked.argmax(axis=1)[:, None]
            else:
                order = np.argsort(-masked, axis=1, kind="stable")[:, :k]
            found = np.take_along_axis(allowed, order, axis=1)
            index[rule][part, :k] = np.where(found, order, -1)
            best = np.take_along_axis(masked, order, axis=1)
            last = np.where(found, best, np.inf).min(axis=1)
            tolerance = tie_tolerance(norm[part], np.where(np.isfinite(last), last, 0.0), x.shape[1], offset_used)
            with np.errstate(invalid="ignore"):
                tied = (best[:, :-1] - best[:, 1:] <= tolerance[:, None]).any(axis=1)
            tied |= (masked >= (last - tolerance)[:, None]).sum(axis=1) > found.sum(axis=1)
            for i in np.flatnonzero(tied):
                members = np.flatnonzero(masked[i] >= last[i] - tolerance[i])
                members = members[np.argsort(-masked[i, members], kind="stable")]
                groups = np.concatenate([[0], np.cumsum(-np.diff(masked[i, members]) > tolerance[i])])
                members = members[np.lexsort((members, groups))]
                index[rule][part[i], : min(k, len(members))] = members[:k]
                ties[rule].append((int(part[i]), members, groups))
    return [Ties.collect(found) for found in ties]


def _blocked(x: np.ndarray, offset: np.ndarray, pairs: AllowedPairs, k: int, width: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Top-k by float32 blocks; returns index lists of both rules and the rows whose order is within rounding error."""
    from threadpoolctl import threadpool_limits

    from cellfast.profiles.kernels import best_of_block

    n, d = x.shape
    x32, offset32 = x.astype(np.float32), offset.astype(np.float32)
    threads = num_threads()
    starts = range(0, n, _BLOCK)
    tasks = [(a, b) for a in starts for b in starts if a <= b]
    lists = []

    def work(share: int) -> None:
        best = np.full((2, n, k + 1), -np.inf, np.float32)
        index = np.full((2, n, k + 1), -1, np.int64)
        lists.append((best, index))
        scratch = np.empty((2, _BLOCK), np.float32)
        hits = np.empty(_BLOCK, np.int64)
        buffer = np.empty(_BLOCK * _BLOCK, np.float32)
        rules = (pairs.compound, pairs.batch, pairs.overlap, np.stack([pairs.candidate, pairs.candidate_b]))
        for a, b in tasks[share::threads]:
            rows, cols = min(_BLOCK, n - a), min(_BLOCK, n - b)
            block = buffer[: rows * cols].reshape(rows, cols)
            np.matmul(x32[a : a + rows], x32[b : b + cols].T, out=block)
            best_of_block(block, a, b, a != b, offset32, rules, best, index, scratch[0], scratch[1], hits)

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    # Rounding of a float32 product of D terms, doubled because two similarities are compared.
    scale = 1.0 if not offset.any() else float(2 * offset.max())
    tolerance = 2.4e-7 * (8 + np.sqrt(d)) * scale
    merged, unsure = [], np.zeros(n, bool)
    for rule in range(2):
        best = np.concatenate([part[0][rule] for part in lists], axis=1)
        index = np.concatenate([part[1][rule] for part in lists], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, : k + 1]
        best, index = np.take_along_axis(best, order, axis=1), np.take_along_axis(index, order, axis=1)
        with np.errstate(invalid="ignore"):
            unsure |= (best[:, :-1] - best[:, 1:] <= tolerance).any(axis=1)
        full = np.full((n, width), -1, np.int64)
        full[:, :k] = index[:, :k]
        merged.append(full)
    return merged, np.flatnonzero(unsure)
