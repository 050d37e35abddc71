"""Keys of the exchange: names of strategies, and settings that hold where none are given.

What is sent has two presets. ``lean``: low-rank signs in the bytes of density 0.08 both ways, and
in runs of more than four rounds a step of the server of 1.5 and a learning rate that falls to a
tenth. ``compeft``: ternary updates in Golomb codes as in the paper, a tenth of the parameters up
and a fifth down. Figures of both: ``simulations/results/``, levers.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from compeft_fl import codecs
from compeft_fl.codecs.auto import AUTO
from compeft_fl.errors import ConfigError
from compeft_fl.server.downlink_options import FEW

if TYPE_CHECKING:
    from compeft_fl.app.config import AppConfig
    from compeft_fl.app.config_values import Scalar

__all__ = [
    "COMPRESSED_PREFIX", "DOWNLINK_CODECS", "PRESETS", "STRATEGIES", "STRATEGY_CHOICES",
    "UPLINK_CODECS", "as_given", "complete", "of_preset",
]  # fmt: skip

COMPRESSED_PREFIX: Final = "compressed:"
STRATEGIES: Final = ("average", "task-arithmetic", "ties", "fedavg")
STRATEGY_CHOICES: Final = (*STRATEGIES, f"{COMPRESSED_PREFIX}NAME")
_WITH_A_STEP: Final = STRATEGIES[:3]

# "": of the preset.
UPLINK_CODECS: Final = (*(name for name in codecs.names() if name != "steps"), AUTO, "")
DOWNLINK_CODECS: Final = (
    *(name for name in codecs.names() if codecs.get(name).ternary or name == "factored"), AUTO, ""
)  # fmt: skip

PRESETS: Final = ("auto", "lean", "compeft")

_LEAN: Final[Mapping[str, Any]] = {
    "codec": "factored",
    "density": 0.08,
    "downlink_codec": "factored",
    "downlink_density": 0.08,
    "server_learning_rate": 1.5,
    "schedule": "cosine",
}
_COMPEFT: Final[Mapping[str, Any]] = {
    "codec": "golomb",
    "density": 0.1,
    "downlink_codec": "golomb",
    "server_learning_rate": 1.0,
    "schedule": "constant",
}
_FEW_ROUNDS: Final = 4  # in which a learning rate that falls leaves little to learn with
_RANK: Final = 8
_FALL: Final = 0.1  # of the learning rate, where a preset has it fall

# What says how updates are written: with one of these a run is no longer the one measured.
_OF_UPDATES: Final[Mapping[str, Any]] = {
    "codec": "",
    "density": 0.0,
    "downlink_codec": "",
    "downlink_density": 0.0,
    "downlink": "compressed",
    "scale": "mean",
    "downlink_scale": "mean",
    "support": "best",
    "downlink_support": "best",
    "error_feedback": True,
    "upload_seconds": 0.0,
    "ranks": "",
    "trainable": "all",
}


def of_preset(config: AppConfig) -> dict[str, Any]:
    """The fields that a configuration leaves to its preset, with their values.

    ``auto`` is ``lean`` where that was measured to be the better one, and nothing else is said of
    how updates are written: a LoRA adapter of a classifier of rank 8 or more, on linear layers and
    without ``peft-options``, strategy average, and at least half of the nodes in each round.
    Elsewhere it is ``compeft``: of rank 1 or 2 low-rank signs lose what was learnt.

    Examples
    --------
    >>> from compeft_fl.app.config import AppConfig
    >>> AppConfig().codec, AppConfig(strategy="ties").codec, AppConfig(preset="compeft").density
    ('factored', 'golomb', 0.1)
    """
    lean = config.preset == "lean" or (config.preset == "auto" and _is_measured(config))
    settings = dict(_LEAN if lean else _COMPEFT)
    if config.rounds <= _FEW_ROUNDS:
        settings |= {"server_learning_rate": 1.0, "schedule": "constant"}
    if config.strategy not in _WITH_A_STEP:
        settings["server_learning_rate"] = 1.0
    given = {name: getattr(config, name) for name in settings}
    found = {name: value for name, value in settings.items() if not given[name]}
    if found.get("schedule") == "cosine" and not config.min_learning_rate:
        found["min_learning_rate"] = _FALL * config.learning_rate
    return found


def _is_measured(config: AppConfig) -> bool:
    return (
        config.task == "classification"
        and config.peft_method.lower() == "lora"
        and not config.peft_options
        and _number(config.peft.get("r")) >= _RANK
        and "embed" not in str(config.peft.get("target_modules", ""))
        and config.strategy == "average"
        and config.fraction_train >= FEW
        and all(getattr(config, name) == usual for name, usual in _OF_UPDATES.items())
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def complete(config: AppConfig) -> None:
    """Give a new configuration what it leaves to its preset.

    Raises
    ------
    ConfigError
        No such strategy, or one without a step that is given one; a learning rate that would rise.
    """
    has_step = config.server_learning_rate not in (0, 1) or config.server_momentum > 0
    _check_strategy(config.strategy, has_step)
    filled = of_preset(config)
    for name, value in filled.items():
        object.__setattr__(config, name, value)
    object.__setattr__(config, "filled", tuple(filled))
    if config.schedule == "cosine" and config.min_learning_rate > config.learning_rate:
        raise ConfigError(
            f"min-learning-rate: expected at most learning-rate ({config.learning_rate:g}), "
            f"found {config.min_learning_rate:g}"
        )


def as_given(config: AppConfig) -> dict[str, Scalar]:
    """The keys of a run without those that its preset gave."""
    flat = config.to_run_config()
    return {key: flat[key] for key in flat if key.replace("-", "_") not in config.filled}


def _check_strategy(strategy: str, has_step: bool) -> None:
    """Raise ConfigError unless there is such a strategy, with a step where it is given one."""
    named = strategy.startswith(COMPRESSED_PREFIX) and len(strategy) > len(COMPRESSED_PREFIX)
    if strategy not in STRATEGIES and not named:
        choices = (*STRATEGIES, "compressed:NAME with a strategy of flwr.serverapp.strategy")
        raise ConfigError(f'strategy: "{strategy}" is none of {", ".join(choices)}')
    if has_step and strategy not in _WITH_A_STEP:
        raise ConfigError(
            "server-learning-rate and server-momentum are settings of average, task-arithmetic and "
            f"ties, found strategy {strategy}: take compressed:FedAvgM, with strategy-options"
        )
