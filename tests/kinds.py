"""What kind a test is of, told from what it uses, so that nobody has to remember to say so.

`make test-fast` leaves out what starts processes, builds or trains models, runs federations in
process, or takes long. A
test does so where a name that stands for it occurs in the test's own code, in its fixtures', or in
that of the helpers of this folder which these use.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

NAMES = {
    "processes": {
        "Deployment",
        "FlowerSession",
        "ProcessFamily",
        "multiprocessing",
        "run_jobs",
        "serving",
        "subprocess",
        "warm",
    },
    "models": {"Harness", "logistic", "minilm", "peft", "tiny_model", "torch", "transformers"},
    "long": {"LocalGrid", "bench_scale", "peak_memory", "tracemalloc"},
}
STARTS_FLOWER = ("ray", "deploy", "slow_faults")
HERE = Path(__file__).parent


def mark(item: pytest.Item) -> None:
    """Give a test the marks of its kinds; those that start Flower run one after the other."""
    starts_flower = any(item.get_closest_marker(name) for name in STARTS_FLOWER)
    names = _names(item)
    for kind, of_kind in NAMES.items():
        if names & of_kind:
            item.add_marker(kind)
    if starts_flower:
        item.add_marker("processes")
        item.add_marker(pytest.mark.xdist_group("flower"))


def longest_first(items: list[pytest.Item]) -> None:
    """Put what starts Flower in front, then files with most tests of a kind, then those with most.

    Workers take them in this order: at the end there is little to wait for.
    """
    slow: Counter[Path] = Counter()
    size = Counter(item.path for item in items)
    for item in items:
        slow[item.path] += any(item.get_closest_marker(kind) for kind in NAMES)
    items.sort(  # which leaves a file's tests as they are
        key=lambda item: (
            item.get_closest_marker("xdist_group") is None,
            -slow[item.path],
            -size[item.path],
            item.path,
        )
    )


def is_of_models(file: Path) -> bool:
    """Whether a file of tests imports PEFT, which takes seconds, or is about the app's models."""
    peft = r"^(import|from) (peft|transformers)\b|^(peft = )?pytest.importorskip\(.peft"
    models = r"^from compeft_fl\.app\.tasks import .*\bmodel\b"
    return re.search(f"{peft}|{models}", file.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _names(item: pytest.Item) -> set[str]:
    """All names in the code of a test, its fixtures, and the helpers that they use."""
    fixtures = [definition.func for each in _fixtures(item) for definition in each]
    names = _reached(getattr(item, "function", None), *fixtures)
    return names | set(getattr(item, "fixturenames", ()))


@functools.cache
def _reached(*things: object) -> frozenset[str]:
    """The names in some code and in that of the helpers that it uses, and that these use."""
    names: set[str] = set()
    waiting, seen = list(things), set()
    while waiting:
        if (thing := waiting.pop()) not in seen:
            seen.add(thing)
            here, helpers = _uses(thing)
            names |= here
            waiting += helpers
    return frozenset(names)


@functools.cache
def _uses(thing: object) -> tuple[frozenset[str], tuple[object, ...]]:
    """The names in some code, and the functions and classes of this folder that it uses."""
    thing = inspect.unwrap(thing)  # type: ignore[arg-type]
    if isinstance(thing, type):
        parts = [value for value in vars(thing).values() if isinstance(value, types.FunctionType)]
        return frozenset(), (*parts, *(base for base in thing.__mro__[1:] if _is_ours(base)))
    if not isinstance(thing, types.FunctionType):
        return frozenset(), ()
    names = _code_names(thing.__code__)
    known = [thing.__globals__[name] for name in names if name in thing.__globals__]
    modules = [value for value in known if isinstance(value, types.ModuleType)]
    known += [vars(each)[name] for each in modules for name in names & set(vars(each))]
    return frozenset(names), tuple(value for value in known if _is_ours(value))


def _fixtures(item: pytest.Item) -> list:
    info = getattr(item, "_fixtureinfo", None)
    return [] if info is None else list(info.name2fixturedefs.values())


def _code_names(code: types.CodeType) -> set[str]:
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*(_code_names(part) for part in inner))


def _is_ours(value: object) -> bool:
    if not isinstance(value, types.FunctionType | type):
        return False
    file = getattr(sys.modules.get(value.__module__), "__file__", None)
    return file is not None and HERE in Path(file).parents
