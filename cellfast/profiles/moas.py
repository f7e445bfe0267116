"""Mechanisms of action of profiles, where a compound may have several: ``a|b`` matches ``a``, ``b`` and ``b|c``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SEPARATOR = "|"


@dataclass
class MoaLabels:
    """The MoAs of profiles as codes.

    Attributes:
        code: int64 [n], the label of each profile: a set of MoAs.
        labels: the labels as text, parts sorted and joined by ``|``.
        moas: the MoAs that occur in them.
        members: bool [labels, moas].
        match: bool [labels, labels]: labels that share a MoA.
    """

    code: np.ndarray
    labels: list[str]
    moas: list[str]
    members: np.ndarray
    match: np.ndarray

    @property
    def single(self) -> bool:
        """No profile has several MoAs."""
        return len(self.labels) == len(self.moas) and bool((self.members.sum(axis=1) == 1).all())

    def num_compounds(self, compound: np.ndarray) -> np.ndarray:
        """int64 [moas]: how many compounds have each MoA."""
        pairs = np.unique(np.stack([compound, self.code]), axis=1)
        having = np.zeros((int(compound.max(initial=0)) + 1, len(self.moas)), bool)
        np.logical_or.at(having, pairs[0], self.members[pairs[1]])
        return having.sum(axis=0)

    def clusters(self) -> np.ndarray:
        """int64 [n]: profiles whose MoAs are linked by shared labels have one number; without ``a|b`` labels that is the MoA."""
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import connected_components

        return connected_components(csr_matrix(self.match), directed=False)[1][self.code].astype(np.int64)


def moa_parts(label: str) -> tuple[str, ...]:
    """The MoAs of a label, sorted: ``b | a`` → ``("a", "b")``."""
    return tuple(sorted({part.strip() for part in label.split(SEPARATOR)} - {""}))


def moa_labels(values: Iterable[str]) -> MoaLabels:
    """Codes of a MoA column [n]; every value names at least one MoA."""
    parts = {value: moa_parts(str(value)) for value in dict.fromkeys(values)}
    sets = sorted(set(parts.values()))
    moas = sorted({one for found in sets for one in found})
    number = {one: i for i, one in enumerate(moas)}
    members = np.zeros((len(sets), len(moas)), bool)
    for i, found in enumerate(sets):
        members[i, [number[one] for one in found]] = True
    place = {found: i for i, found in enumerate(sets)}
    code = np.array([place[parts[value]] for value in values], np.int64)
    match = members.astype(np.float32) @ members.astype(np.float32).T > 0
    return MoaLabels(code, [SEPARATOR.join(found) for found in sets], moas, members, match)
