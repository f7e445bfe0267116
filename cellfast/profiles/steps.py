"""The steps of normalisation: their names and options, and the recipes made of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cellfast.errors import CellfastError
from cellfast.profiles.whitening import ROTATIONS, parse_lambda

_SCALING = ("by", "controls")
_SPHERING = ("by", "controls", "lambda", "rotation", "epsilon")

#: Every step, and the options it takes.
METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "standardize": _SCALING,
    "robustize": _SCALING,
    "mad_robustize": _SCALING,
    "center": ("by", "controls", "towards"),
    "rank": ("by",),
    "pca": ("controls", "n", "variance"),
    "sphering": _SPHERING,
    "coral": ("by", "controls", "lambda"),
    "tvn": _SPHERING,
    "harmony": ("by",),
}
GROUPINGS = ("plate", "batch", "all")

#: Steps after which a feature is a mixture of those before: features are selected before the first of them.
MIXING = ("pca", "sphering", "coral", "tvn", "harmony")

RECIPES: dict[str, tuple[str, ...]] = {
    "default": ("standardize:by=all,controls=all", "center:towards=batch", "tvn"),
    "perakis2021": ("tvn:lambda=1",),
}

_FIELDS = {"lambda": "lam"}


@dataclass(frozen=True)
class Step:
    """One normalisation step.

    Attributes:
        method: one of ``METHODS``.
        by: fit once per ``plate``, per ``batch``, or over ``all`` rows; None takes the method's own: scaling and center ``plate``, rank and
            sphering ``all``, coral and harmony ``batch``, tvn sphering over all and CORAL per ``batch``.
        controls: query for the rows it is fitted on (``treatments.find_controls``); None finds DMSO (pca: every row).
        lam: regularisation of sphering: ``auto`` (Ledoit-Wolf), ``0.1`` (added to the eigenvalues), ``0.1x`` (times the mean
            eigenvalue).
        rotation: ``pca``, ``zca``, or either with ``-cor`` (on variables scaled to unit variance); None: pca, and zca when
            fitted per group.
        epsilon: pycytominer's regularisation instead of lam: added to the singular values of the controls.
        n: components that pca keeps.
        variance: share of the variance that pca keeps, in (0, 1], instead of n.
        towards: center: take means that are shrunk towards that of the plate's ``batch``, or of ``all``, as far as they are noise.

    Raises:
        CellfastError: an unknown method, a value out of range, an option that the method does not take.
    """

    method: str
    by: str | None = None
    controls: str | None = None
    lam: str | None = None
    rotation: str | None = None
    epsilon: float | None = None
    n: int | None = None
    variance: float | None = None
    towards: str | None = None

    @property
    def needs_controls(self) -> bool:
        """Whether it is fitted on controls that are to be found, not on rows that it names or on all."""
        return self.controls is None and "controls" in METHODS[self.method] and self.method != "pca"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            near = difflib.get_close_matches(str(self.method), METHODS, 1)
            raise CellfastError(
                f"A normalisation step must be one of {', '.join(METHODS)} (with options as sphering:by=all,lambda=0.1x); "
                f"got '{self.method}'.{f' Did you mean {near[0]}?' if near else ''}"
            )
        takes = METHODS[self.method]
        for option in ("by", "controls", "lambda", "rotation", "epsilon", "n", "variance", "towards"):
            if getattr(self, _FIELDS.get(option, option)) is not None and option not in takes:
                options = f"its options are {', '.join(f'{o}=' for o in takes)}" if takes else "it has no options"
                raise CellfastError(f"--normalize {self.method} does not take {option}=: {options}.")
        for option, value, allowed in (
            ("by", self.by, GROUPINGS),
            ("rotation", self.rotation, ROTATIONS),
            ("towards", self.towards, GROUPINGS[1:]),
        ):
            if value is not None and value not in allowed:
                raise CellfastError(f"--normalize {self.method}: {option} must be one of {', '.join(allowed)}; got '{value}'.")
        if self.lam is not None:
            kind, _ = parse_lambda(self.lam)
            if self.method == "coral" and kind != "absolute":
                raise CellfastError(f"--normalize coral: lambda must be a number, as coral:lambda=1; got '{self.lam}'.")
        if self.lam is not None and self.epsilon is not None:
            raise CellfastError(f"--normalize {self.method}: lambda and epsilon are two ways to regularise; give one.")
        if self.towards is not None and (self.by or "plate") in (self.towards, "all"):
            raise CellfastError(
                f"--normalize center: the means of by={self.by} cannot be shrunk towards={self.towards}; that must be wider."
            )
        if self.method == "pca":
            if (self.n is None) == (self.variance is None):
                raise CellfastError(
                    "--normalize pca: say how much is kept, by pca:n=64 (components) or pca:variance=0.95 (share)."
                )
            if self.n is not None and self.n < 1:
                raise CellfastError(f"--normalize pca: n must be at least 1, got {self.n}.")
            if self.variance is not None and not 0 < self.variance <= 1:
                raise CellfastError(f"--normalize pca: variance must be above 0 and at most 1, got {self.variance:g}.")


def parse_steps(texts: Sequence[str], defaults: Mapping[str, Any] | None = None) -> list[Step]:
    """``["standardize:by=all,controls=all", "sphering:lambda=1"]`` → steps.

    Args:
        texts: a step each, with options of its own.
        defaults: fields of ``Step`` for every step that takes them and leaves them open (but pca is fitted on every row unless it says
            otherwise).

    Raises:
        CellfastError: unknown method, option or value; a default that no step takes.
    """
    given = {key: value for key, value in (defaults or {}).items() if value is not None}
    # The controls are marked in the profiles whether a step is fitted on them or not.
    unused = set(given) - {"controls"}
    steps = []
    for text in texts:
        method, _, rest = text.partition(":")
        method = method.strip().lower()
        takes = METHODS.get(method, ())
        fields: dict[str, Any] = {}
        # A comma inside a query is not a separator: only one that is followed by another option is.
        for option in re.split(r",\s*(?=\w+=(?!=))", rest) if rest else []:
            key, _, value = (part.strip() for part in option.partition("="))
            if method in METHODS and (key not in takes or not value):
                options = f"options are {', '.join(f'{o}=' for o in takes)}" if takes else "it has no options"
                raise CellfastError(f"--normalize {text}: {options}; got '{option}'.")
            fields[_FIELDS.get(key, key)] = _number(text, key, value)
        for option in takes:
            name = _FIELDS.get(option, option)
            if name in given and name not in fields and not (method == "pca" and name == "controls"):
                # Two ways to regularise: what the step says itself goes first.
                if {"lam": "epsilon", "epsilon": "lam"}.get(name) in fields:
                    continue
                fields[name] = given[name]
                unused.discard(name)
        # A choice for all steps that is as wide as what the means were to be shrunk towards leaves nothing to shrink.
        if fields.get("by") == given.get("by") and fields.get("by") in ("all", fields.get("towards")):
            fields.pop("towards", None)
        steps.append(Step(method, **fields) if method in METHODS else Step(method))
    if unused:
        option = {"lam": "lambda"}.get(first := min(unused), first)
        raise CellfastError(
            f"--{option} {given[first]} changes nothing: none of the steps ({', '.join(texts)}) takes it, or each says its own."
        )
    return steps


def _number(text: str, key: str, value: str) -> Any:
    kind = {"epsilon": float, "variance": float, "n": int}.get(key)
    if kind is None:
        return value
    try:
        return kind(value)
    except ValueError:
        raise CellfastError(
            f"--normalize {text}: {key} must be a {'whole ' if kind is int else ''}number, got '{value}'."
        ) from None
