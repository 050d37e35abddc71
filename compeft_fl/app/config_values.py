"""The values of a run's keys: what fits, and how an error line shows what does not."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from compeft_fl.errors import ConfigError
from compeft_fl.printable import printable
from compeft_fl.reduction.rules import AUTO

__all__ = ["Key", "Scalar", "checked", "json_object", "key", "shown", "suggestion"]

Scalar: TypeAlias = bool | int | float | str
"""What Flower takes as the value of a key."""

SCALE_RULES: Final = ("mean", "norm")


@dataclass(frozen=True)
class Key:
    """One key as a person sees it.

    Parameters
    ----------
    name : str
        The key as it is written in a file or on the command line.
    kind : str
        ``"text"``, ``"integer"``, ``"number"``, ``"true or false"`` or ``"rule or number"``.
    default : Scalar
        What holds where nothing else is said.
    help : str
        One line.
    choices : tuple of str
        The values that are taken; empty where any value of the kind is.
    """

    name: str
    kind: str
    default: Scalar
    help: str
    choices: tuple[str, ...] = ()


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return the end of an error line about an unknown name: the nearest one, or all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f': did you mean "{near[0]}"?'
    return "; choices: " + ", ".join(known)


def checked(name: str, value: Any, meta: Mapping[str, Any]) -> Scalar:
    """Return `value` as the key's type, or raise with the key, the value and what fits."""
    kind: str = meta["kind"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "rule or number":
        if not number and value not in SCALE_RULES:
            raise ConfigError(
                f'{name}: expected "mean", "norm" or a number over 0, found {shown(value)}'
            )
        if number and not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{name}: expected a finite number over 0, found {shown(value)}")
        return value if isinstance(value, str) else float(value)
    if kind == "number or auto":
        if value == AUTO:
            return AUTO
        if not number:
            raise ConfigError(f'{name}: expected a number or "auto", found {shown(value)}')
        _check_range(name, value, meta)
        return float(value)
    fits = {
        "text": isinstance(value, str),
        "integer": number and isinstance(value, int),
        "number": number,
        "true or false": isinstance(value, bool),
    }[kind]
    if not fits:
        raise ConfigError(f"{name}: expected {kind}, found {shown(value)}")
    if isinstance(value, str) and not _is_text(value):
        raise ConfigError(f"{name}: expected no control characters, found {shown(value)}")
    choices = meta["choices"]
    if choices and value not in choices:
        listed = ", ".join(choice or '""' for choice in choices)
        raise ConfigError(f"{name}: {shown(value)} is none of {listed}")
    if number:
        _check_range(name, value, meta)
        return float(value) if kind == "number" else int(value)
    return str(value) if kind == "text" else bool(value)


def _is_text(value: str) -> bool:
    """Is this text that files and terminals take: no controls, no halves of characters?"""
    return all(c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cs"} for c in value)


def _check_range(name: str, value: float, meta: Mapping[str, Any]) -> None:
    low, high, above = meta["low"], meta["high"], meta["above"]
    if isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{name}: expected a number, found {shown(value)}")
    if math.isfinite(value) and low <= value <= high and value > above:
        return
    bounds = []
    if above > -math.inf:
        bounds.append(f"over {above:g}")
    if low > -math.inf:
        bounds.append(f"at least {low:g}")
    if high < math.inf:
        bounds.append(f"at most {high:g}")
    raise ConfigError(f"{name}: expected {' and '.join(bounds) or 'a number'}, found {value}")


def json_object(name: str, text: str) -> dict[str, Any]:
    """Return a key's text as a JSON object; empty where there is none."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: expected a JSON object, found {text}")
    return value


def shown(value: object) -> str:
    """A value in an error line."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    return printable(f'"{value}"' if isinstance(value, str) else repr(value), 200)


def key(
    default: Scalar,
    help: str,
    *,
    kind: str | None = None,
    choices: Iterable[str] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """Return a dataclass field that carries how its value is checked, see `checked`.

    `low` and `high` are the ends of the range, both included; `above` is a lower end left out.
    """
    if kind is None:
        kind = {bool: "true or false", int: "integer", float: "number", str: "text"}[type(default)]
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "kind": kind,
            "choices": tuple(choices),
            "low": low,
            "high": high,
            "above": above,
        },
    )
