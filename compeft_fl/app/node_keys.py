"""Keys by which nodes differ: their rank, their link, and what of the adapter is trained.

A node is of a tier: ``tier`` of its node config, a number from 0 on, or else its ``partition-id``,
dealt in turn. ``ranks`` and ``links`` of the run's config have a value for each tier;
``lora-rank`` and ``link-mbps`` of the node config are before them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.adapters.lora_ranks import lora_settings
from compeft_fl.app.config_values import json_object, shown
from compeft_fl.errors import CompeftError, ConfigError, ParameterError
from compeft_fl.parts.ranks import check_rank
from compeft_fl.reduction.rates import Rate

if TYPE_CHECKING:
    from compeft_fl.app.config import AppConfig

__all__ = [
    "TRAINABLE", "check_nodes", "freeze", "link_of", "of_rank", "rank_of", "ranks_of",
    "same_run", "tensor_rules", "tiers_of",
]  # fmt: skip

TRAINABLE: Final = ("all", "B")

# The factor that starts at random; of an embedding that is B.
_STAYS: Final = ("*lora_A*", "*lora_embedding_B*")


def ranks_of(config: AppConfig) -> tuple[int, ...]:
    """The ranks of ``ranks``, by tier; empty: all nodes have the same.

    Raises
    ------
    ConfigError
    """
    try:
        return tuple(check_rank(int(part)) for part in _parts(config.ranks))
    except (ValueError, CompeftError):
        raise ConfigError(
            f"ranks: expected ranks by tier, as 2,4,8, found {shown(config.ranks)}"
        ) from None


def tiers_of(config: AppConfig) -> tuple[float, ...]:
    """The densities and bits of ``upload-tiers``; empty: the strategy's own.

    Raises
    ------
    ConfigError
    """
    found = _numbers("upload-tiers", config.upload_tiers)
    try:
        for tier in found:
            Rate.of_tier(tier)
    except ParameterError as error:
        raise ConfigError(f"upload-tiers: {error}") from None
    return found


def check_nodes(config: AppConfig) -> None:
    """Raise ConfigError where these keys do not fit each other or the rest of the run."""
    ranks, links = ranks_of(config), _numbers("links", config.links)
    tiers_of(config)
    if any(not 0 < link < _FASTEST for link in links):
        raise ConfigError(f"links: expected Mbit/s over 0 by tier, found {shown(config.links)}")
    largest = config.peft.get("r")
    if ranks and (config.peft_method.lower() != "lora" or not isinstance(largest, int)):
        raise ConfigError(f"ranks: expected peft-method lora, found {config.peft_method}")
    if ranks and max(ranks) != largest:
        raise ConfigError(f"ranks: expected {largest} (peft.r) as the largest, found {max(ranks)}")
    if config.trainable == "B" and config.peft_method.lower() != "lora":
        raise ConfigError(f"trainable: expected peft-method lora for B, found {config.peft_method}")
    for name, given in (("ranks", bool(ranks)), ("upload-seconds", config.upload_seconds > 0)):
        if given and not config.compressed:
            raise ConfigError(f"{name}: expected a strategy that reads Updates, found fedavg")
    if config.rank_merge == "product" and ranks and config.strategy != "average":
        raise ConfigError(
            f"rank-merge: expected strategy average for product, found {config.strategy}"
        )
    if config.upload_seconds > 0 and config.codec.startswith("dense"):
        raise ConfigError(f"upload-seconds: expected no dense codec, found {config.codec}")


def rank_of(config: AppConfig, node_config: Mapping[str, Any]) -> int:
    """A node's rank; 0: all of the server's.

    Raises
    ------
    ConfigError
        A tier or a rank of the node config that is none.
    """
    ranks = ranks_of(config)
    if not ranks:
        return 0
    if "lora-rank" in node_config:
        rank = node_config["lora-rank"]
        if rank not in ranks or isinstance(rank, bool):
            raise ConfigError(
                f"lora-rank of the node config: expected one of {config.ranks}, found {rank!r}"
            )
        return int(rank)
    return ranks[_tier(node_config, len(ranks))]


def link_of(config: AppConfig, node_config: Mapping[str, Any]) -> float | None:
    """The speed of a node's link in Mbit/s; None: nobody says.

    Raises
    ------
    ConfigError
        A tier that is none.
    """
    if "link-mbps" in node_config:  # the mod checks it
        return None
    links = _numbers("links", config.links)
    return links[_tier(node_config, len(links))] if links else None


def tensor_rules(config: AppConfig) -> dict[str, str]:
    """What is not trained, for `compeft_fl.parts.tensor_policy.TensorPolicy`."""
    return dict.fromkeys(_STAYS, "left") if config.trainable == "B" else {}


def freeze(network: Any, config: AppConfig) -> None:
    """Have the factors that are not trained stay as they are."""
    if config.trainable == "B":
        for name, parameter in network.named_parameters():
            if any(fnmatchcase(name, pattern) for pattern in _STAYS):
                parameter.requires_grad_(False)


def of_rank(config: AppConfig, rank: int) -> AppConfig:
    """The configuration of a node of a rank, whose adapter is a part of the run's.

    Raises
    ------
    ConfigError
        LoRA's options that have no meaning at another rank.
    """
    if not rank or rank == config.peft.get("r"):
        return config
    further = json_object("peft-options", config.peft_options)
    try:
        cut = lora_settings({**config.peft, **further}, rank)
    except CompeftError as error:
        raise ConfigError(f"ranks: {error}") from None
    peft = {name: cut[name] for name in config.peft}
    options = {name: value for name, value in cut.items() if name not in config.peft}
    return dataclasses.replace(
        config, peft=peft, peft_options=json.dumps(options) if options else "", ranks=""
    )


def same_run(one: AppConfig, other: AppConfig) -> bool:
    """Are these of one run, for nodes of its ranks?"""
    plain: dict[str, Any] = {"peft": {}, "peft_options": "", "ranks": ""}
    return dataclasses.replace(one, **plain) == dataclasses.replace(other, **plain)


def _tier(node_config: Mapping[str, Any], count: int) -> int:
    tier = node_config.get("tier")
    if tier is None:
        return int(node_config.get("partition-id", 0)) % count
    if isinstance(tier, bool) or not isinstance(tier, int) or not 0 <= tier < count:
        raise ConfigError(f"tier of the node config: expected 0 .. {count - 1}, found {tier!r}")
    return tier


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")] if text.strip() else []


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in _parts(text))
    except ValueError:
        raise ConfigError(f"{name}: expected numbers by comma, found {shown(text)}") from None


_FASTEST: Final = 1e6  # Mbit/s
