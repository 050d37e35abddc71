"""What is known of one version of an expert, as a value, as a message and as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from dataclasses import dataclass, field
from typing import Any

from compeft_fl.adapters import parse_config
from compeft_fl.errors import ExpertError
from compeft_fl.experts.names import (
    Reference,
    check_digest,
    check_metrics,
    check_name,
    check_tags,
)
from compeft_fl.experts.v1 import experts_pb2

__all__ = ["Expert", "Found", "from_message", "reference_message", "to_message"]

MAX_CONFIG: int = 1 << 20  # characters of a configuration that travels with what is known


@dataclass(frozen=True)
class Expert:
    """One version of an expert.

    Attributes
    ----------
    name : str
    version : int
        From 1 on.
    digest : str
        The SHA-256 of the ``.compeft`` file, 64 hexadecimal digits.
    size : int
        Of the file, in bytes.
    base_model : str
        As the adapter's configuration has it; empty where it does not say it.
    base_digest : str
        Of the base's weights, as whoever pushed it gave it; empty: not known.
    config : dict
        PEFT's ``adapter_config.json``; empty in lists.
    tags, metrics : dict
    created : float
        Seconds since 1970.
    num_parameters : int
    density : float
        The share of parameters that are not 0.
    codec : str
    start : str
        What the update is relative to: ``"0"``, ``"1"``, or ``"blake2b:"`` and a digest.
    layout_id : str
        32 hexadecimal digits.
    """

    name: str
    version: int
    digest: str
    size: int
    base_model: str = ""
    base_digest: str = ""
    config: dict[str, Any] = field(default_factory=dict, compare=False)
    tags: dict[str, str] = field(default_factory=dict, compare=False)
    metrics: dict[str, float] = field(default_factory=dict, compare=False)
    created: float = 0.0
    num_parameters: int = 0
    density: float = 0.0
    codec: str = ""
    start: str = ""
    layout_id: str = ""

    @property
    def reference(self) -> str:
        """``NAME@VERSION``."""
        return f"{self.name}@{self.version}"

    @property
    def method(self) -> str:
        """The PEFT method; empty in lists."""
        return str(self.config.get("peft_type", ""))

    def to_json(self) -> dict[str, Any]:
        """What ``--json`` prints, and what a cache keeps."""
        return dataclasses.asdict(self)

    @functools.cached_property
    def listed(self) -> Any:
        """The protobuf message that lists have, without the configuration; made once."""
        return _message(self, "")


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes
    ----------
    expert : Expert
    similarity : float or None
        The cosine of the signs, in -1 .. 1, where it was searched by similarity.
    """

    expert: Expert
    similarity: float | None = None


def to_message(expert: Expert, *, config: bool = True) -> Any:
    """An expert as the protobuf message; without its configuration for lists."""
    if not config:
        return expert.listed
    return _message(expert, json.dumps(expert.config, ensure_ascii=False))


def _message(expert: Expert, config: str) -> Any:
    return experts_pb2.Expert(
        name=expert.name,
        version=expert.version,
        digest=bytes.fromhex(expert.digest),
        size=expert.size,
        base_model=expert.base_model,
        base_digest=expert.base_digest,
        config=config,
        tags=expert.tags,
        metrics=expert.metrics,
        created_ms=round(1000 * expert.created),
        num_parameters=expert.num_parameters,
        density=expert.density,
        codec=expert.codec,
        start=expert.start,
        layout_id=bytes.fromhex(expert.layout_id),
    )


def from_message(message: Any) -> Expert:
    """The expert of a protobuf message, each field checked: a server may be anybody's.

    Raises
    ------
    ParameterError, AdapterError, ExpertError
        A field that cannot be.
    """
    if not message.version or len(message.layout_id) not in (0, 16):
        raise ExpertError(f"expected a version and a layout's id, found {message.version}")
    if len(message.config) > MAX_CONFIG:
        raise ExpertError(
            f"expected at most {MAX_CONFIG} characters of configuration, found "
            f"{len(message.config)}"
        )
    return Expert(
        name=check_name(message.name),
        version=message.version,
        digest=check_digest(message.digest.hex()),
        size=message.size,
        base_model=message.base_model,
        base_digest=message.base_digest,
        config=parse_config(message.config) if message.config else {},
        tags=check_tags(message.tags),
        metrics=check_metrics(message.metrics),
        created=message.created_ms / 1000,
        num_parameters=message.num_parameters,
        density=message.density if math.isfinite(message.density) else 0.0,
        codec=message.codec,
        start=message.start,
        layout_id=message.layout_id.hex(),
    )


def reference_message(reference: Reference) -> Any:
    """A reference as the protobuf message."""
    return experts_pb2.Reference(
        name=reference.name, version=reference.version, digest=reference.digest
    )
