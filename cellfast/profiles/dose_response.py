"""Does the effect of a compound grow with its dose, and from which dose on is it active?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cellfast.metadata import columns as names
from cellfast.profiles.precision_null import false_discovery_rates

if TYPE_CHECKING:
    from cellfast.profiles.activity import ActivityOptions

FEWEST_DOSES = 3


def dose_responses(
    treatments: pd.DataFrame, codes: np.ndarray, metadata: pd.DataFrame, magnitude: np.ndarray, options: ActivityOptions
) -> pd.DataFrame:
    """One row per compound (and other columns that tell treatments apart) with three doses or more.

    ``trend`` is Spearman's correlation of the wells' doses and Mahalanobis distances; its one-sided p-value exchanges the
    distances among the compound's wells. ``lowest_active_dose`` is the lowest dose that is active, NaN where none is;
    ``active_above``: every higher dose is active too.

    Args:
        treatments: with ``active`` and the key columns; codes: int64 [n], their rows, −1 for controls.
        metadata: of the wells [n]; magnitude: float64 [n].
    """
    key = [c for c in treatments.columns[: treatments.columns.get_loc("active")] if c not in (names.CONCENTRATION, names.MOA)]
    rows: list[dict[str, object]] = []
    if names.CONCENTRATION in treatments:
        doses = metadata[names.CONCENTRATION].to_numpy(np.float64)
        num = treatments.groupby(key, dropna=False)[names.CONCENTRATION].transform("nunique")
        several = treatments[(num >= FEWEST_DOSES) & treatments[names.CONCENTRATION].notna()]
        for value, part in several.groupby(key, sort=True, dropna=False):
            part = part.sort_values(names.CONCENTRATION)
            wells = np.flatnonzero(np.isin(codes, part.index.to_numpy()))
            active = part["active"].to_numpy(dtype=bool)
            first = int(active.argmax())
            trend, p = _trend(doses[wells], magnitude[wells], options.num_permutations, options.seed + len(rows))
            rows.append(
                {
                    **dict(zip(key, value)),
                    "num_doses": len(part), "num_wells": len(wells), "num_active_doses": int(active.sum()),
                    "lowest_active_dose": float(part[names.CONCENTRATION].iloc[first]) if active.any() else np.nan,
                    "active_above": bool(active.any() and active[first:].all()), "trend": trend, "trend_p": p,
                }
            )  # fmt: skip
    frame = pd.DataFrame(rows, columns=[*key, "num_doses", "num_wells", "num_active_doses", "lowest_active_dose", "active_above",
                                        "trend", "trend_p"])  # fmt: skip
    return frame.assign(trend_q=false_discovery_rates(frame["trend_p"].to_numpy(np.float64)))


def _trend(dose: np.ndarray, effect: np.ndarray, num_permutations: int, seed: int) -> tuple[float, float]:
    from scipy.stats import rankdata

    by_dose, by_effect = (rankdata(v) - (len(v) + 1) / 2 for v in (dose, effect))
    scale = np.sqrt((by_dose**2).sum() * (by_effect**2).sum())
    if scale == 0:
        return 0.0, 1.0
    observed, as_good = by_dose @ by_effect, 0
    rng = np.random.default_rng(seed)
    step = max(1, (1 << 20) // len(dose))
    for start in range(0, num_permutations, step):
        drawn = rng.permuted(np.tile(by_effect, (min(step, num_permutations - start), 1)), axis=1)
        as_good += int((drawn @ by_dose >= observed - 1e-9 * scale).sum())
    return float(observed / scale), (1 + as_good) / (1 + num_permutations)
