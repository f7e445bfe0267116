"""Functions whose ``**options`` are declared elsewhere: the signature says what they take, anything else is refused by name."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from cellfast.errors import CellfastError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes(
    *declarations: Callable[..., Any], unset: bool = False, refuse: bool = True, without: Sequence[str] = ()
) -> Callable[[_Function], _Function]:
    """Say in a function's signature what its ``**options`` are: the values of these declarations, with their defaults.

    ``unset``: None stands for a value that is not given, and something else than the declaration decides it.
    ``refuse``: False where the function refuses other names itself. ``without``: names that the function gives the declaration
        itself.
    """

    def decorate(function: _Function) -> _Function:
        own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
        named = {one.name for one in own} | set(without)
        declared = {
            one.name: one.replace(kind=one.KEYWORD_ONLY, default=None if unset else one.default)
            for declaration in declarations
            for one in inspect.signature(declaration).parameters.values()
            if one.name not in named and (one.kind is one.KEYWORD_ONLY or inspect.isclass(declaration))
        }

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            known = [*declared, *(one.name for one in own)]
            for name in options if refuse else ():
                if name not in known:
                    near = difflib.get_close_matches(name, known, 1)
                    raise CellfastError(
                        f"{function.__name__}: there is no parameter {name!r}{f'; did you mean {near[0]!r}?' if near else ''} "
                        f"Known: {', '.join(known)}"
                    )
            return function(*arguments, **options)

        call.__signature__ = inspect.Signature([*own, *declared.values()])  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def split(declaration: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Take out of ``options`` those that a declaration knows."""
    return {name: options.pop(name) for name in inspect.signature(declaration).parameters if name in options}
