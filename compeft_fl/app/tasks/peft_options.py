"""The keys of a PEFT method, as PEFT's own configuration."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

from compeft_fl.app.config import AppConfig, suggestion
from compeft_fl.app.tasks import whole_network
from compeft_fl.app.tasks.peft_network import quiet
from compeft_fl.errors import ConfigError

__all__ = ["peft_config"]

_NAMES: Final = re.compile(r"[\w.\-]+(,\s*[\w.\-]+)*")
_LIST_OPTIONS: Final = frozenset(
    {
        "exclude_modules",
        "feedforward_modules",
        "modules_to_save",
        "target_modules",
        "target_parameters",
    }
)


def peft_config(config: AppConfig, task_type: str | None = None) -> Any:
    """Return the `peft.PeftConfig` of a configuration's method and options.

    Options left empty stay PEFT's own; options at the app's default that the method does not have
    (``r`` for IA3) are left out.

    Parameters
    ----------
    config : AppConfig
    task_type : str, optional
        PEFT's name for what the model does; default: by the task and its head.

    Raises
    ------
    ConfigError
        Where the method, an option or its value is none of PEFT's.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config

    methods = {kind.value.lower(): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    method = config.peft_method.lower()
    if method not in methods:
        if method in whole_network.METHODS:
            raise ConfigError(f"peft-method {method}: task=instruction trains adapters only")
        raise ConfigError(f'peft-method: no method "{method}"{suggestion(method, methods)}')
    known = {
        field.name
        for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[methods[method]])
        if field.name not in ("peft_type", "task_type", "inference_mode")
    }
    defaults = AppConfig().peft
    options: dict[str, Any] = {}
    for name, value in (*config.peft.items(), *config.further_peft_options().items()):
        if name not in known:
            if name in defaults and value == defaults[name]:
                continue
            raise ConfigError(
                f"peft.{name}: {method} has no such option{suggestion(name, sorted(known))}"
            )
        if value == "":
            continue
        options[name] = _as_list(value) if name in _LIST_OPTIONS else value
    if task_type is None:
        encoder = "SEQ_CLS" if config.head == "linear" else "FEATURE_EXTRACTION"
        task_type = encoder if config.task == "classification" else "CAUSAL_LM"
    try:
        with quiet():
            return get_peft_config(
                {"peft_type": methods[method], "task_type": task_type, **options}
            )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"peft-method {method}: {error}") from error


def _as_list(value: Any) -> Any:
    """Return names by comma as a list; a regular expression, as PEFT takes it, as it is."""
    if not isinstance(value, str) or value == "all-linear" or not _NAMES.fullmatch(value):
        return value
    return [part.strip() for part in value.split(",")]
