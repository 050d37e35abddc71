"""Which settings give an adapter's tensors meaning: PEFT's own classes, method by method."""

from __future__ import annotations

import dataclasses
import enum

import adapter_kinds
import pytest

from compeft_fl.adapters import peft_settings
from compeft_fl.adapters.meaning import changes_base, check_known, check_same, settings
from compeft_fl.errors import AdapterError

pytest.importorskip("peft")

METHODS = sorted(peft_settings.METHODS)
OLD = {"enable_lora", "merge_weights"}  # what PEFT 0.2 wrote


def defaults(method):
    """PEFT's defaults of a method's settings, as JSON has them."""
    found = {}
    for field in dataclasses.fields(adapter_kinds.methods()[method]):
        value = field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if isinstance(value, enum.Enum):
            value = value.value
        found[field.name] = None if value in ({}, [], dataclasses.MISSING) else value
    return found


def test_each_of_pefts_methods_and_settings_is_known():
    assert set(adapter_kinds.methods()) == set(METHODS)
    for method in METHODS:
        known = peft_settings.METHODS[method]
        written = defaults(method)
        unknown = set(written) - set(known.meaning) - known.training - peft_settings.FREE
        assert unknown <= set(peft_settings.BASE), method
        places = set(peft_settings.PLACES)
        assert set(known.meaning) | known.training <= set(written) | OLD | places, method
        assert not set(known.meaning) & known.training
        for key, default in known.meaning.items():
            if key not in OLD and key in written:
                assert written[key] == default, (method, key)


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_setting_has_pefts_default(method):
    check_same({"peft_type": method}, {**defaults(method), "peft_type": method})


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "another"


@pytest.mark.parametrize("method", METHODS)
def test_another_setting_that_gives_meaning_is_refused_by_its_name(method):
    known = peft_settings.METHODS[method]
    for key, default in {**peft_settings.BASE, **known.meaning}.items():
        value = "another" if key in peft_settings.INITS else another(default)
        one = {"peft_type": method}
        for switch, wanted in known.only_with.get(key, ()) and [known.only_with[key]]:
            one[switch] = True if wanted is None else wanted
        with pytest.raises(AdapterError, match=rf"^differ in {key}: "):
            check_same(one, {**one, key: value})
        check_same({**one, key: value}, {**one, key: value})


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_training_and_places_may_differ(method):
    known = peft_settings.METHODS[method]
    free = (known.training | peft_settings.FREE) - set(known.meaning) - {"peft_type"}
    check_same({"peft_type": method}, {"peft_type": method, **dict.fromkeys(free, "another")})


def test_a_setting_that_is_not_used_may_differ():
    check_same({"peft_type": "LORA"}, {"peft_type": "LORA", "qalora_group_size": 99})
    check_same({"peft_type": "OFT", "eps": 1}, {"peft_type": "OFT"})


def test_ways_to_draw_a_start_mean_the_same_and_pissa_does_not():
    lora = {"peft_type": "LORA"}
    for value in (False, "gaussian", "eva", "orthogonal", None):
        check_same(lora, {**lora, "init_lora_weights": value})
        assert changes_base({**lora, "init_lora_weights": value}) is None
    for value, changed in (("pissa", "same"), ("olora", "same"), ("pissa_niter_4", "own")):
        with pytest.raises(AdapterError, match=f"differ in init_lora_weights: True and {value}"):
            check_same(lora, {**lora, "init_lora_weights": value})
        assert changes_base({**lora, "init_lora_weights": value}) == changed


def test_one_meaning_said_in_several_ways():
    lora = {"peft_type": "LORA", "lora_alpha": 16}
    same = {"lora_alpha": 16.0, "rank_pattern": None, "alpha_pattern": {}, "revision": "main"}
    check_same({**lora, "rank_pattern": {}}, {**lora, **same})
    tied = {"peft_type": "UNILORA", "target_modules": ["a", "b"]}
    check_same(tied, {**tied, "target_modules": ["b", "a"]})
    with pytest.raises(AdapterError, match="differ in target_modules"):
        check_same(tied, {**tied, "target_modules": ["a", "c"]})


def test_what_a_later_peft_adds_is_refused_until_it_is_known():
    with pytest.raises(AdapterError, match="known, found peft_type 'NEXT'"):
        check_known({"peft_type": "NEXT"})
    later = {"peft_type": "LORA", "next_scaling": 2}
    for one, other in (
        (later, later),
        (later, {"peft_type": "LORA"}),
        ({"peft_type": "LORA"}, later),
    ):
        with pytest.raises(AdapterError, match="LORA that are known, found 'next_scaling'"):
            check_same(one, other)
    with pytest.raises(AdapterError, match="next_scaling"):
        settings(later)


def test_base_models_of_two_names_are_one_only_where_a_person_says_so():
    one = {"peft_type": "IA3", "base_model_name_or_path": "org/model"}
    other = {**one, "base_model_name_or_path": "/models/model"}
    for pair in ((one, other), (one, {"peft_type": "IA3"})):
        with pytest.raises(AdapterError, match="differ in base_model_name_or_path"):
            check_same(*pair)
        check_same(*pair, any_base=True)
