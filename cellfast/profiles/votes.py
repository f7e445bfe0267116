"""The label a profile's nearest neighbours vote for; where they are equally near, the expectation over a random choice among them."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from functools import lru_cache
from math import comb

import numpy as np

from cellfast.profiles.neighbours import Ties


def majority_vote(labels: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """The most frequent label among each row's neighbours, the nearer one on a tie; −1 without neighbours.

    Args:
        labels: int [n].
        neighbours: int [q, k], nearest first, −1 for none.
    """
    votes = np.where(neighbours >= 0, labels[np.maximum(neighbours, 0)], -1)
    if votes.shape[1] == 1:
        return votes[:, 0]
    counts = ((votes[:, :, None] == votes[:, None, :]) & (votes >= 0)[:, :, None]).sum(axis=2)
    return np.take_along_axis(votes, counts.argmax(axis=1)[:, None], axis=1)[:, 0]


def correct_shares(
    labels: np.ndarray, neighbours: np.ndarray, ties: Ties | None = None, members: np.ndarray | None = None
) -> np.ndarray:
    """How probable it is that the vote of each profile's neighbours is right, float64 [n]: 0 or 1 without ties.

    Args:
        labels: int [n].
        neighbours: int [n, k], nearest first, −1 for none.
        ties: rows with several equally near neighbours; a random order of these decides.
        members: bool [labels, MoAs], where labels stand for several MoAs: each neighbour votes for all of its own, and the vote is right
            when one of those that win is among the profile's.
    """
    k = neighbours.shape[1]
    if members is not None:
        shares = _shared(labels, neighbours, members)
    else:
        shares = (majority_vote(labels, neighbours) == labels).astype(np.float64)
    if ties is None or len(ties.rows) == 0:
        return shares
    if k == 1:
        sizes = np.diff(ties.starts)
        theirs, own = labels[ties.members], np.repeat(labels[ties.rows], sizes)
        right = theirs == own if members is None else (members[theirs] & members[own]).any(axis=1)
        shares[ties.rows] = np.add.reduceat(right.astype(np.int64), ties.starts[:-1]) / sizes
        return shares
    for i, row in enumerate(ties.rows):
        found, groups = ties.of(i)
        if members is None:
            shares[row] = vote_share(labels[found], groups, k, labels[row])
        else:
            shares[row] = _drawn_share(labels[found], groups, k, labels[row], members)
    return shares


def _shared(labels: np.ndarray, neighbours: np.ndarray, members: np.ndarray) -> np.ndarray:
    """1 where a MoA that wins the vote is among the profile's, else 0; of equally frequent MoAs those of the nearest voter win."""
    have = neighbours >= 0
    votes = members[labels[np.maximum(neighbours, 0)]] & have[:, :, None]
    if neighbours.shape[1] == 1:
        won = votes[:, 0]
    else:
        # A vote more counts more than any order of the voters.
        order = votes.sum(axis=1) * (votes.shape[1] + 1) - votes.argmax(axis=1)
        order[~votes.any(axis=1)] = -1
        won = (order == order.max(axis=1, keepdims=True)) & (order >= 0)
    return (won & members[labels[: len(neighbours)]]).any(axis=1).astype(np.float64)


def _drawn_share(labels: np.ndarray, groups: np.ndarray, k: int, label: int, members: np.ndarray, draws: int = 1000) -> float:
    """As ``vote_share`` for labels of several MoAs, over random orders of the equally near (1,000, always the same)."""
    rng = np.random.default_rng(0)
    order = np.argsort(groups[None, :] + rng.random((draws, len(groups))) * 0.999, axis=1)[:, :k]
    # The profile itself stands first, then the voters of each draw.
    everyone = np.concatenate([np.full(draws, label), labels[order].reshape(-1)])
    voters = draws + np.arange(order.size).reshape(order.shape)
    return float(_shared(everyone, voters, members).mean())


def vote_shares(labels: np.ndarray, ties: Ties, i: int, k: int) -> dict[int, float]:
    """How probable each label is as the vote of the i-th row with ties."""
    members, groups = ties.of(i)
    found = labels[members]
    return {int(label): vote_share(found, groups, k, label) for label in np.unique(found)}


def vote_share(labels: np.ndarray, groups: np.ndarray, k: int, label: int) -> float:
    """The probability that ``label`` wins the vote of the k nearest, over random orders of the equally near ones.

    Args:
        labels: int [m], of the candidates, nearest first.
        groups: int [m], not decreasing; candidates of one group are equally near.
        k: how many vote; the most frequent label wins, of equally frequent ones the one that comes first.
    """
    k = min(k, len(labels))
    boundary = groups[k - 1]
    whole, last = labels[(groups < boundary)], labels[groups == boundary]
    drawn_from = Counter(last.tolist())
    count, first = Counter(whole.tolist()), {}
    for place, one in zip(groups.tolist(), whole.tolist()):
        first.setdefault(one, place)
    in_first = Counter((place, one) for place, one in zip(groups.tolist(), whole.tolist()) if first[one] == place)
    entries = [
        (
            count[one],
            first.get(one, int(boundary)),
            in_first[first[one], one] if one in first else 0,
            drawn_from[one],
            one == label,
        )
        for one in sorted({*count, *drawn_from})
    ]
    return _share(tuple(sorted(entries)), k - len(whole))


@lru_cache(maxsize=4096)
def _share(entries: tuple[tuple[int, int, int, int, bool], ...], draws: int) -> float:
    """Each entry is a label: (certain votes, group of its first, how many of it are in that group or 0, candidates it has in the
    last group, whether it is the label asked for); ``draws`` of the last group vote.

    The ways to draw are counted label by label, by how many are drawn and who leads so far. Among leaders whose first votes lie
    in one group, whose comes first is as probable as its number in that group.
    """
    ways: dict[tuple[int, int, int, int, int], int] = {(0, 0, 0, 0, 0): 1}
    for certain, group, in_group, available, own in entries:
        after: dict[tuple[int, int, int, int, int], int] = {}
        for (drawn, most, place, weight, own_weight), count in ways.items():
            for x in range(min(available, draws - drawn) + 1):
                votes, here = certain + x, in_group or x
                lead = (most, place, weight, own_weight)
                if votes and (votes, -group) > (most, -place):
                    lead = (votes, group, here, here * own)
                elif votes and (votes, group) == (most, place):
                    lead = (most, place, weight + here, own_weight + here * own)
                key = (drawn + x, *lead)
                after[key] = after.get(key, 0) + count * comb(available, x)
        ways = after
    total = comb(sum(entry[3] for entry in entries), draws)
    right = sum(Fraction(count * own, weight) for (drawn, _, _, weight, own), count in ways.items() if drawn == draws)
    return float(right / total)


def number(value: float) -> int | float:
    """An expected count for JSON: an integer where it is one to rounding."""
    return round(value) if abs(value - round(value)) < 1e-9 else float(value)
