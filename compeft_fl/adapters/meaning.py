"""What gives an adapter's tensors their meaning: which settings two adapters must share to merge.

The same numbers mean different changes with another ``alpha``, another seed of the places that
FourierFT trains, or another base model. Each setting of PEFT's configuration classes (PEFT 0.21;
a test compares) is one of three:

- it gives the tensors meaning, and is the same in both adapters; a setting that an older PEFT did
  not write has its default;
- it is of training only (dropout, schedules, what the start was drawn from), or says where tensors
  are, which their names say too: it may differ;
- this table does not know it, as it does not know what a later PEFT may add: refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from compeft_fl.adapters.peft_settings import BASE, FREE, INITS, METHODS, PLACES
from compeft_fl.errors import AdapterError

__all__ = ["base_model", "changes_base", "check_known", "check_same", "settings"]

# Starts of LoRA that take a part out of the base's weights, so that the factors are what is left
# out plus what was learned. The same each time: True. With these the base is the same for two
# adapters; with the others it is only where both have one start.
_FROM_BASE: Final[Mapping[str, bool]] = {
    "pissa": True,
    "olora": True,
    "pissa_niter": False,
    "corda": False,
    "loftq": False,
    "lora_ga": False,
}


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's settings that give its tensors meaning, each as one of all ways to say it.

    Raises
    ------
    AdapterError
        A method, or a setting of it, that this version does not know.
    """
    check_known(config)
    method = METHODS[str(config["peft_type"])]
    found = {"peft_type": config["peft_type"]}
    for key, default in {**BASE, **method.meaning}.items():
        value = _plain(config.get(key, default))
        if key in INITS and (value is None or isinstance(value, bool) or value in method.random):
            value = True
        if key in PLACES and isinstance(value, list):
            value = sorted(map(str, value))  # PEFT writes a set, in any order
        if key == "revision" and value is None:
            value = "main"
        found[key] = value
    for key, (switch, wanted) in method.only_with.items():
        used = found[switch] == wanted if wanted is not None else bool(found[switch])
        if not used:
            del found[key]
    return found


def check_known(config: Mapping[str, Any]) -> None:
    """Raise AdapterError where a method or a setting of it is not known: see `settings`."""
    name = str(config["peft_type"])
    method = METHODS.get(name)
    if method is None:
        raise AdapterError(
            f"expected a PEFT method whose settings are known, found peft_type {name!r}: what "
            "gives its tensors meaning is not known, so it cannot be merged or compared"
        )
    for key in config:
        if key not in method.meaning and key not in method.training | FREE and key not in BASE:
            raise AdapterError(
                f"expected settings of {name} that are known, found {key!r}: what it makes of the "
                "tensors is not known, so they cannot be merged or compared"
            )


def check_same(one: Mapping[str, Any], other: Mapping[str, Any], *, any_base: bool = False) -> None:
    """Raise AdapterError, with the setting's name, where two adapters' tensors don't mean the same.

    Parameters
    ----------
    one, other : mapping
        Contents of ``adapter_config.json``.
    any_base : bool
        Take the names of the base models for names of one: a model that lies in another folder.
    """
    check_known(one)
    check_known(other)
    if one["peft_type"] != other["peft_type"]:
        raise AdapterError(f"differ in peft_type: {one['peft_type']} and {other['peft_type']}")
    ours, theirs = settings(one), settings(other)
    for key in {**ours, **theirs}:
        if any_base and key in BASE:
            continue
        if ours.get(key) != theirs.get(key):
            raise AdapterError(f"differ in {key}: {ours.get(key)} and {theirs.get(key)}")


def changes_base(config: Mapping[str, Any]) -> str | None:
    """How an adapter's start was taken out of the base's weights, as PiSSA does; None: it was not.

    ``"same"``: the same each time, so that the base is the same for all such adapters. ``"own"``:
    by chance or from data, so that only adapters with one start have one base.
    """
    value = config.get("init_lora_weights", True)
    if not isinstance(value, str):
        return None
    name = "pissa_niter" if value.startswith("pissa_niter") else value.lower()
    if name not in _FROM_BASE:
        return None
    return "same" if _FROM_BASE[name] else "own"


def base_model(config: Mapping[str, Any]) -> str:
    """The name of the model that an adapter was made for; empty where it does not say."""
    value = config.get("base_model_name_or_path")
    return value if isinstance(value, str) else ""


def _plain(value: Any) -> Any:
    """A value as JSON has it, an empty collection or text as None."""
    if isinstance(value, Mapping):
        value = {str(key): _plain(item) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        value = [_plain(item) for item in value]
    return None if value in ("", {}, []) else value
