"""Imports of large packages: no garbage is looked for meanwhile, and nothing else is put aside."""

from __future__ import annotations

import functools
import gc
import sys
import types

import pytest
import torch
from heap import put_aside_as_before

from compeft_fl.app import imports
from compeft_fl.app.imports import at_once, import_peft


@pytest.fixture
def unfrozen():
    with put_aside_as_before():
        yield


@pytest.mark.parametrize(("modules", "frozen"), [(300, True), (3, False)])
def test_what_large_packages_hold_is_no_garbage(modules, frozen, monkeypatch, unfrozen):
    before = gc.get_freeze_count()
    with at_once():
        assert not gc.isenabled()
        for number in range(modules):
            monkeypatch.setitem(sys.modules, f"large.{number}", types.ModuleType("large"))
    assert gc.isenabled()
    assert (gc.get_freeze_count() > before) == frozen


def test_a_failed_import_leaves_the_collector_at_work(unfrozen):
    with pytest.raises(ImportError), at_once():
        import no_such_package  # noqa: F401
    assert gc.isenabled()


def test_who_has_stopped_the_collector_keeps_it_stopped():
    gc.disable()
    try:
        with at_once():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_compiled_while_peft_is_imported_is_so_at_its_first_call(unfrozen):
    asked = []

    def compiler(function, **options):
        asked.append(options)
        return lambda *arguments, **more: ("compiled", function(*arguments, **more))

    @functools.partial(imports._compiled_later, compiler, dynamic=False)
    def double(value, *, plus=0):
        """Twice a value."""
        return 2 * value + plus

    assert asked == []
    assert double.__doc__ == "Twice a value."
    assert [double(3), double(4, plus=1)] == [("compiled", 6), ("compiled", 9)]
    assert asked == [{"dynamic": False}]  # once
    # As a decorator with options; what is no function is left to the compiler, at once.
    half = imports._compiled_later(compiler, dynamic=True)(lambda value: value / 2)
    assert (half(4), asked[1:]) == (("compiled", 2.0), [{"dynamic": True}])
    imports._compiled_later(compiler, print)
    assert len(asked) == 3


@pytest.mark.parametrize("installed", [True, False])
def test_torch_s_compiler_is_back_after_peft(installed, monkeypatch, unfrozen):
    compiler = torch.compile
    if installed:
        import_peft()
    else:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError):
            import_peft()
    assert torch.compile is compiler
