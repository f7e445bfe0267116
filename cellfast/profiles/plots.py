"""Pictures of an evaluation: the map of profiles by MoA, by batch and by right or wrong, and the confusion matrix."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cellfast.atomic import atomic_path
from cellfast.errors import CellfastError
from cellfast.metadata import columns as names
from cellfast.printable import printable
from cellfast.profiles.evaluate import Evaluation
from cellfast.profiles.neighbours import prepare
from cellfast.profiles.normalize import natural_key

MAPS = ("tsne", "umap", "pca", "none")

#: Profiles drawn on a map; more are sampled, seeded, and the title says so.
MAX_POINTS = 5000

MOST_CHARACTERS = 60  # of a name in a picture

_MARKERS = "osD^vP*X<>ph"


def profile_map(features: np.ndarray, metric: str = "cosine", method: str = "tsne", seed: int = 0) -> np.ndarray:
    """Two coordinates per profile, float64 [n, 2]: t-SNE, UMAP or PCA of the profiles prepared for the metric; the same seed
    gives the same map.

    Raises:
        CellfastError: UMAP is asked for and umap-learn is not installed; an unknown method.
    """
    x, _ = prepare(features, metric)
    n = len(x)
    _, s, vt = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    components = np.zeros((n, 2))
    components[:, : min(2, len(s))] = (x - x.mean(axis=0)) @ vt[:2].T
    if method == "pca" or n < 5:
        return components
    if method == "tsne":
        from sklearn.manifold import TSNE

        if n - 1 > 50 and x.shape[1] > 50:
            x = (x - x.mean(axis=0)) @ vt[:50].T
        # Started from PCA and not at random: the same map whatever the number of threads.
        return TSNE(
            2,
            perplexity=min(30.0, max(2.0, (n - 1) / 3)),
            init="pca",
            random_state=seed,
            method="barnes_hut" if n > 500 else "exact",
        ).fit_transform(x)
    if method == "umap":
        try:
            import umap
        except ImportError:
            raise CellfastError("--map umap needs the package umap-learn: pip install umap-learn, or use --map tsne.") from None
        return umap.UMAP(n_neighbors=min(15, n - 1), metric="euclidean", random_state=seed, n_jobs=1).fit_transform(x)
    raise CellfastError(f"--map must be one of {', '.join(MAPS)}; got '{method}'.")


def write_pictures(evaluation: Evaluation, stem: str | os.PathLike[str], method: str = "tsne", seed: int = 0) -> list[Path]:
    """Write ``<stem>_map_moa.png``, ``_map_batch.png``, ``_map_correct.png``, ``_confusion_nsc.png`` and
    ``_confusion_nscb.png``; returns the paths written.
    """
    stem = Path(stem)
    written: list[Path] = []
    result, table = evaluation.result, evaluation.table
    metric = result["options"]["metric"]
    if method != "none":
        n = len(table)
        chosen = np.arange(n) if n <= MAX_POINTS else np.sort(np.random.default_rng(seed).choice(n, MAX_POINTS, replace=False))
        xy = profile_map(evaluation.profiles.features[chosen], metric, method, seed)
        shown = table.iloc[chosen]
        note = f"{_title(method)} of {len(chosen):,} profiles" + (f" sampled of {n:,}" if n > len(chosen) else "") + f", {metric}"
        score = f"NSC {_percent(result['nsc'])}, NSCB {_percent(result['nscb'])}"
        colours = {"moa": ("Mechanism of action", shown[names.MOA].to_numpy())}
        if names.BATCH in shown:
            batches = np.array(
                [b if names_ == 1 else "several" for b, names_ in ((str(v), len(str(v).split(";"))) for v in shown[names.BATCH])]
            )
            colours["batch"] = ("Batch", batches)
        right = shown["nsc_correct"].to_numpy(dtype=float)
        verdict = np.select(
            [~shown["nsc_evaluated"], right == 1, right == 0],
            ["not evaluated", "right (NSC)", "wrong (NSC)"],
            "undecided (ties)",
        )
        colours["correct"] = ("Nearest neighbour", verdict)
        for name, (title, labels) in colours.items():
            path = stem.with_name(f"{stem.name}_map_{name}.png")
            _scatter(path, xy, labels, title, f"{note}\n{score}", verdicts=name == "correct")
            written.append(path)
    for rule in ("nsc", "nscb"):
        if result[rule]["num_evaluated"]:
            path = stem.with_name(f"{stem.name}_confusion_{rule}.png")
            _confusion(path, result[rule], rule)
            written.append(path)
    return written


def _figure(width: float, height: float) -> Any:
    # The object interface needs no display and leaves pyplot's global state, and a caller's backend, alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def literal(name: object) -> str:
    """A name from the data as a picture shows it: on one line, of 60 characters at most; `_save` sees that it is not typeset."""
    text = printable(name)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"


def _save(figure: Any, path: Path) -> None:
    from matplotlib.text import Text

    # Every text of a picture is shown as it is: `$` begins no formula, and what TeX would run is no command.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # A letter that no font here has is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, dpi=150, metadata={"Software": "cellfast"})


def _scatter(path: Path, xy: np.ndarray, labels: np.ndarray, title: str, note: str, *, verdicts: bool) -> None:
    from matplotlib import colormaps

    figure = _figure(8.5, 6)
    axes = figure.subplots()
    unique = sorted(set(labels), key=natural_key)
    fixed = {"right (NSC)": "#1b7837", "wrong (NSC)": "#c51b7d", "undecided (ties)": "#e08214", "not evaluated": "#999999"}
    size = 40 if len(xy) <= 500 else 12 if len(xy) <= 2000 else 5
    for i, label in enumerate(unique):
        at = labels == label
        colour = (
            fixed[label]
            if verdicts
            else colormaps["tab20"](i % 20 / 20 + 0.001)
            if len(unique) <= 20
            else colormaps["turbo"](i / len(unique))
        )
        axes.scatter(
            *xy[at].T,
            s=size,
            color=[colour],
            marker=_MARKERS[i % len(_MARKERS)],
            label=str(i),
            linewidths=0.3,
            edgecolors="white",
        )
    axes.set_title(note, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    legend = axes.legend(
        title=title,
        fontsize=7,
        title_fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        ncols=1 + len(unique) // 32,
    )
    # Afterwards: a label that begins with "_" would be left out of the legend.
    for text, label in zip(legend.get_texts(), unique, strict=True):
        text.set_text(f"{literal(label) or '(none)'} ({(labels == label).sum()})")
    _save(figure, path)


def _confusion(path: Path, score: dict[str, Any], rule: str) -> None:
    moas = score["confusion"]["moas"]
    counts = np.array(score["confusion"]["counts"])
    side = max(5.0, 0.42 * len(moas) + 2.5)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if len(moas) <= 40:
        for i, j in zip(*np.nonzero(counts)):
            axes.text(
                j, i, f"{counts[i, j]:.4g}", ha="center", va="center", fontsize=8, color="white" if share[i, j] > 0.5 else "black"
            )
    shown = [literal(moa) for moa in moas]
    axes.set_xticks(range(len(moas)), shown, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(moas)), shown, fontsize=7)
    axes.set_xlabel("MoA of the nearest neighbour")
    axes.set_ylabel("MoA of the treatment")
    axes.set_title(f"{rule.upper()} {_percent(score)} ({score['num_correct']:.6g}/{score['num_evaluated']})", fontsize=10)
    _save(figure, path)


def _percent(score: dict[str, Any]) -> str:
    return "n/a" if score["accuracy"] is None else f"{100 * score['accuracy']:.1f} %"


def _title(method: str) -> str:
    return {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA"}[method]
