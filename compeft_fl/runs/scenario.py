"""Scenario files: a run's keys and the size of its simulation, in one flat TOML file.

::

    [run]                        # the app's keys, see `compeft_fl.app.config`
    rounds = 10
    strategy = "ties"

    [simulation]                 # Flower's names of a simulation's settings
    num-supernodes = 10
    client-resources-num-cpus = 1
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Self

from compeft_fl.app.config import AppConfig, Scalar, parse_assignment, suggestion
from compeft_fl.app.config_values import shown
from compeft_fl.app.exchange_keys import as_given
from compeft_fl.errors import ConfigError
from compeft_fl.printable import one_line

__all__ = ["SIMULATION_DEFAULTS", "SIMULATION_HELP", "Scenario"]

SIMULATION_DEFAULTS: Final[Mapping[str, int | float]] = MappingProxyType(
    {
        "num-supernodes": 10,
        "client-resources-num-cpus": 1,
        "client-resources-num-gpus": 0.0,
    }
)
"""What a simulation is where its file says nothing."""

SIMULATION_HELP: Final[Mapping[str, str]] = MappingProxyType(
    {
        "num-supernodes": "simulated nodes",
        "client-resources-num-cpus": "cores of a node at work: so many work at a time as fit",
        "client-resources-num-gpus": "part of a GPU of a node at work, such as 0.25",
    }
)


@dataclass(frozen=True)
class Scenario:
    """A run and its simulation, checked.

    Parameters
    ----------
    config : AppConfig
        The run's keys.
    simulation : mapping of str to number
        Flower's settings of the simulation, as for ``flwr run --federation-config``.
    """

    config: AppConfig
    simulation: Mapping[str, int | float]

    @classmethod
    def load(cls, file: Path | None = None, assignments: Sequence[str] = ()) -> Self:
        """Return a scenario of a file (or of the defaults) and ``key=value`` overrides.

        ``min-nodes`` is the number of simulated nodes where it is not given.

        Raises
        ------
        ConfigError
            Where the file is missing or no TOML, or holds an unknown key or a value that does not
            fit; likewise for an override.
        """
        run, simulation = ({}, {}) if file is None else _read(file)
        if file is not None:
            run.setdefault("scenario", file.stem)
        return cls.of(run, simulation, assignments)

    @classmethod
    def of(
        cls, run: Mapping[str, Scalar], simulation: Mapping[str, Any], assignments: Sequence[str]
    ) -> Self:
        """Return a scenario of its two tables and ``key=value`` overrides; see `load`."""
        run, simulation = dict(run), dict(simulation)
        for assignment in assignments:
            key, value = parse_assignment(assignment)
            (simulation if key in SIMULATION_DEFAULTS else run)[key] = value
        settings = _checked_simulation(simulation)
        run.setdefault("min-nodes", int(settings["num-supernodes"]))
        for key in ("data", "model"):  # the app runs in another folder
            if isinstance(path := run.get(key), str) and Path(path).exists():
                run[key] = str(Path(path).absolute())
        return cls(AppConfig.from_run_config(run), settings)

    def to_plain(self) -> dict[str, Any]:
        """Return what `of` takes, as JSON can hold it."""
        return {"run": as_given(self.config), "simulation": dict(self.simulation)}

    def with_run(self, **changes: Any) -> Scenario:
        """Return the scenario with some fields of its configuration changed."""
        keys = {name.replace("_", "-"): value for name, value in changes.items()}
        config = AppConfig.from_run_config({**as_given(self.config), **keys})
        return Scenario(config, self.simulation)


def _read(file: Path) -> tuple[dict[str, Scalar], dict[str, Any]]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"scenario: {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, thousands of digits or brackets
        raise ConfigError(f"scenario: {file} is no TOML: {one_line(error, 200)}") from None
    for name, table in tables.items():
        if name not in ("run", "simulation") or not isinstance(table, dict):
            raise ConfigError(f"scenario: {file} has [{name}]; choices: [run], [simulation]")
    return _flat(tables.get("run", {})), tables.get("simulation", {})


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Return a TOML table's values under dotted keys, as Flower does."""
    flat: dict[str, Scalar] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _checked_simulation(given: Mapping[str, Any]) -> dict[str, int | float]:
    for key, value in given.items():
        if key not in SIMULATION_DEFAULTS:
            raise ConfigError(f'unknown key "{key}"{suggestion(key, SIMULATION_DEFAULTS)}')
        whole = isinstance(SIMULATION_DEFAULTS[key], int)
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not fits or not (1 if whole else 0) <= value < 2**31:
            kind = "a whole number over 0" if whole else "a number of at least 0"
            raise ConfigError(f"{key}: expected {kind}, found {shown(value)}")
    return {**SIMULATION_DEFAULTS, **given}
