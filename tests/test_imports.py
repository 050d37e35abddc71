"""Imports of large packages: no garbage is looked for meanwhile, and nothing else is put aside."""

from __future__ import annotations

import gc
import sys
import types

import pytest

from compeft_fl.app.imports import at_once


@pytest.fixture
def unfrozen():
    """Whatever a test has put aside is garbage's again."""
    yield
    gc.unfreeze()


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
