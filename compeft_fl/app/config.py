"""The keys of the ready-made app: types, defaults, choices and what they mean, in one place.

Flower hands an app its configuration as a flat mapping (``context.run_config``): the values of
``[tool.flwr.app.config]`` in ``pyproject.toml``, overridden by ``--run-config``. `AppConfig` takes
that mapping, checks every key and value, and is what the rest of the app reads. The defaults here
are the canonical ones; ``pyproject.toml`` repeats them, because Flower lets nobody override a key
that is not written there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Self, cast

from compeft_fl.app import exchange_keys
from compeft_fl.app.config_values import Key, Scalar, checked, json_object, shown, suggestion
from compeft_fl.app.config_values import key as _key
from compeft_fl.app.node_keys import TRAINABLE, check_nodes
from compeft_fl.app.tasks import TASKS
from compeft_fl.compeft import SUPPORTS
from compeft_fl.errors import ConfigError
from compeft_fl.exchange.uplink import RESIDUAL_DECAY
from compeft_fl.reduction.rules import DOWN_ENERGY, ENERGY
from compeft_fl.results.trackers import PACKAGES as TRACKERS

__all__ = ["AppConfig", "Key", "Scalar", "keys", "parse_assignment", "suggestion"]

_PEFT_PREFIX: Final = "peft."
_PEFT_DEFAULTS: Final[Mapping[str, Scalar]] = MappingProxyType(
    {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "", "feedforward_modules": ""}
)
_PEFT_HELP: Final[Mapping[str, str]] = MappingProxyType(
    {
        "r": "rank of LoRA and its relatives",
        "lora_alpha": "LoRA's scaling, as alpha / r",
        "lora_dropout": "dropout in front of LoRA",
        "target_modules": "modules that get an adapter, by comma; empty: PEFT's own choice",
        "feedforward_modules": "IA3's feed-forward modules, by comma; empty: PEFT's own choice",
    }
)


@dataclass(frozen=True, kw_only=True)
class AppConfig:
    """Everything that a run of the ready-made app can be told, checked.

    Each field is a key with ``-`` for ``_``: ``batch_size`` is ``batch-size`` in files. `peft`
    holds the keys that begin with ``peft.``.

    Raises
    ------
    ConfigError
        Where a value is of the wrong type, out of range, or none of the choices.

    Examples
    --------
    >>> config = AppConfig.from_run_config({"rounds": 3, "strategy": "ties", "peft.r": 4})
    >>> config.rounds, config.strategy, config.peft["r"]
    (3, 'ties', 4)
    >>> AppConfig.from_run_config({"round": 3})
    Traceback (most recent call last):
    ...
    compeft_fl.errors.ConfigError: unknown key "round": did you mean "rounds"?
    """

    filled: ClassVar[tuple[str, ...]] = ()  # of an object: the fields that its preset gave

    scenario: str = _key("default", "name of the run, and of its folder")
    out: str = _key("runs", "folder under which a run makes its own")
    run_dir: str = _key("", "the run's own folder; empty: OUT/SCENARIO-TIME")
    seed: int = _key(42, "seed of the adapter's start, the partition and the batches", low=0)

    task: str = _key("classification", "what is trained", choices=TASKS)
    model: str = _key(
        "minilm",
        "base model: minilm, or for task=instruction debian-lm (both embedded), a Hugging Face id, "
        "or a folder",
    )
    trust_remote_code: bool = _key(
        False, "run the Python code that comes with the model, on server and nodes; nobody is asked"
    )
    head: str = _key(
        "prototype",
        "classifier on top: frozen class means of the base model, or a trained linear layer",
        choices=("prototype", "linear"),
    )
    quantization: str = _key(
        "none",
        "the base model in 4 or 8 bits, by bitsandbytes (task=instruction)",
        choices=("none", "4bit", "8bit"),
    )
    max_length: int = _key(64, "tokens after which a text is cut off", low=2)

    data: str = _key(
        "debian-section",
        "debian-section, -role, -interface, -lang, or for "
        "task=instruction debian-instructions (all embedded), a .jsonl, .csv or .parquet file, "
        "or a Hugging Face dataset",
    )
    data_config: str = _key("", "configuration of a Hugging Face dataset, where it has several")
    text_column: str = _key("text", "column of the text")
    label_column: str = _key("label", "column of the class")
    prompt_column: str = _key("prompt", "column of the prompt (task=instruction)")
    response_column: str = _key("response", "column of the response to it")
    messages_column: str = _key("messages", "column of a chat's turns, with role and content")
    template: str = _key(
        "auto",
        "how prompts are written: by the tokenizer's chat template, as Alpaca's, or as they are; "
        "auto: the first where there is one, else what the data's columns suggest",
        choices=("auto", "chat", "alpaca", "plain"),
    )
    long_prompts: str = _key(
        "refuse",
        "rows whose prompt leaves no room for a response within max-length",
        choices=("refuse", "drop"),
    )
    split_column: str = _key("split", "column of a file that names each row's split")
    train_split: str = _key("train", "name of the split to train on")
    validation_split: str = _key("val", "name of the split for calibration")
    test_split: str = _key("test", "name of the split that the server scores")
    limit_rows: int = _key(0, "use at most so many rows of each split; 0: all", low=0)
    limit_test_rows: int = _key(0, "score at most so many rows; 0: as limit-rows", low=0)

    partition: str = _key(
        "dirichlet", "how rows go to nodes", choices=("iid", "dirichlet", "column")
    )
    alpha: float = _key(0.3, "Dirichlet concentration: the smaller, the more uneven", above=0)
    partition_column: str = _key("source", "column whose values stay together (partition=column)")
    min_rows: int = _key(8, "rows that every node gets at least", low=1)

    peft_method: str = _key(
        "lora",
        "PEFT method: lora, ia3, or another of peft's names; full: all weights; bitfit: biases",
    )
    peft: Mapping[str, Scalar] = dataclasses.field(default_factory=lambda: _PEFT_DEFAULTS)
    peft_options: str = _key("", "any further options of the PEFT method, as a JSON object")

    trainable: str = _key(
        "all",
        "what of LoRA is trained and sent: all, or B alone, where A stays as the seed made it",
        choices=TRAINABLE,
    )
    ranks: str = _key(
        "", "ranks of nodes by tier, as 2,4,8, the largest of them peft.r; empty: all have peft.r"
    )
    rank_merge: str = _key(
        "auto",
        "how ranks merge: an entry by the nodes that have it (cover), or the products B A by an "
        "SVD; auto: products where strategy=average",
        choices=("auto", "cover", "product"),
    )

    learning_rate: float = _key(5e-3, "AdamW's learning rate", above=0)
    schedule: str = _key(
        "",
        "the learning rate over the rounds; cosine: down to min-learning-rate in the last; empty: "
        "of the preset (in up to four rounds constant)",
        choices=("constant", "cosine", ""),
    )
    min_learning_rate: float = _key(
        0.0, "where schedule=cosine ends; 0: at 0, or at a tenth if it is of the preset", low=0
    )
    weight_decay: float = _key(0.0, "AdamW's weight decay", low=0)
    batch_size: int = _key(16, "rows per step", low=1)
    accumulation: int = _key(
        1, "parts in which a step's rows are computed, to save memory (task=instruction)", low=1
    )
    checkpointing: bool = _key(False, "compute activations again to save memory (task=instruction)")
    local_steps: int = _key(20, "steps per node and round; 0: local-epochs decides", low=0)
    local_epochs: int = _key(1, "passes over the node's rows per round (local-steps=0)", low=1)
    device: str = _key("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    dtype: str = _key(
        "auto",
        "arithmetic of the base model; auto: bfloat16 on CUDA, float32 elsewhere",
        choices=("auto", "float32", "bfloat16", "float16"),
    )

    strategy: str = _key(
        "average",
        "how updates are merged; fedavg is Flower's own over dense links, "
        "compressed:NAME any strategy of flwr.serverapp.strategy over compressed uplinks",
    )
    strategy_options: str = _key("", "options of a compressed:NAME strategy, as a JSON object")
    scaling: float = _key(0.4, "factor lambda of ties and task-arithmetic", above=0)
    tie: str = _key(
        "zero", "ties: what a tied sign becomes", choices=("zero", "positive", "majority")
    )
    preset: str = _key(
        "auto",
        "what holds where codecs, densities, server-learning-rate and schedule are not given: "
        "lean, low-rank signs; compeft, ternary updates in Golomb codes; auto: lean for LoRA of "
        "rank 8 or more of a classifier, average and at least half of the nodes a round",
        choices=exchange_keys.PRESETS,
    )
    server_learning_rate: float = _key(
        0.0,
        "how far the global adapter goes along a round's merge; 1: all the way; 0: of the preset",
        low=0,
    )
    server_momentum: float = _key(0.0, "part of its last step in its next", low=0, high=0.99)
    density: str | float = _key(
        0.0,
        "greatest part of the parameters that an update keeps; auto: what keeps the part energy; "
        "0: of the preset",
        kind="number or auto",
        low=0,
        high=1,
    )
    energy: float = _key(
        ENERGY,
        "density=auto: part of an update's energy that is kept; more in the first rounds, and on "
        "nodes that are seldom asked",
        above=0,
        high=0.999,
    )
    scale: str | float = _key(
        "mean",
        "size of what is kept: mean, norm, or a number alpha, in units of sigma",
        kind="rule or number",
    )
    support: str = _key(
        "best",
        "which of the largest are kept: those that keep most energy, or exactly the density's",
        choices=SUPPORTS,
    )
    error_feedback: bool = _key(True, "keep on the node what was not sent, and send it later")
    residual_decay: float = _key(
        RESIDUAL_DECAY, "part of what was not sent that the next round adds; 1: all", low=0, high=1
    )
    codec: str = _key(
        "",
        "codec of the uplink; factored: low-rank signs, in the density's bytes; auto: whichever "
        "arrives first over a link of link-mbps; empty: of the preset",
        choices=exchange_keys.UPLINK_CODECS,
    )
    link_mbps: float = _key(
        10.0, "speed of a node's link in Mbit/s, by which codec auto chooses", above=0
    )

    links: str = _key(
        "", "speeds of nodes' links by tier in Mbit/s, as 1,10,100; empty: of the node configs"
    )
    upload_seconds: float = _key(
        0.0, "time within which each node's upload is to end, by its density; 0: density", low=0
    )
    upload_tiers: str = _key(
        "", "densities for that, and from 2 on bits a parameter, by comma; empty: the usual ones"
    )

    downlink: str = _key(
        "compressed",
        "what goes down: the change of the global adapter, compressed, or all of it",
        choices=("compressed", "dense"),
    )
    downlink_codec: str = _key(
        "",
        "codec of a change on the way down, where it is compressed; empty: of the preset",
        choices=exchange_keys.DOWNLINK_CODECS,
    )
    downlink_density: str | float = _key(
        0.0,
        "greatest part of the parameters that a change on the way down keeps, or auto; 0: of the "
        "preset, and of compeft 0.2, or 0.07 where fewer than half of the nodes train in a round",
        kind="number or auto",
        low=0,
        high=1,
    )
    downlink_energy: float = _key(
        DOWN_ENERGY,
        "downlink-density=auto: as energy, of a change on the way down",
        above=0,
        high=0.999,
    )
    downlink_scale: str | float = _key(
        "mean", "size of what is kept on the way down, as scale", kind="rule or number"
    )
    downlink_support: str = _key(
        "best", "which are kept on the way down, as support", choices=SUPPORTS
    )
    result: str = _key(
        "auto",
        "what is scored and saved: the server's own adapter, or what nodes have of it; auto: the "
        "nodes' where fewer than half of them train in a round",
        choices=("auto", "server", "nodes"),
    )

    rounds: int = _key(10, "rounds", low=0)
    min_nodes: int = _key(2, "nodes to wait for before a round", low=1)
    fraction_train: float = _key(1.0, "part of the nodes that train in a round", low=0, high=1)
    fraction_evaluate: float = _key(
        0.0, "part of the nodes that score the global adapter on their own rows", low=0, high=1
    )
    timeout: float = _key(3600.0, "seconds that a round waits for late replies", above=0)
    evaluate_tasks: str = _key(
        "", "tasks of lm-eval that the server puts to the model, by comma (task=instruction)"
    )
    evaluate_every: int = _key(5, "rounds from one such evaluation to the next", low=1)
    evaluate_limit: int = _key(100, "questions of each of its tasks; 0: all", low=0)
    budget_mb: float = _key(
        0.0, "MB both ways, of which the table says what is used; FlowerTune: 200000", low=0
    )
    track: str = _key(
        "", "trackers by comma: tensorboard, wandb, mlflow, trackio; by default in the run's folder"
    )
    push: str = _key("", "HOST:PORT of a store of experts that gets the adapter's versions")
    push_name: str = _key("", "their name there; empty: the scenario's")
    push_every: int = _key(1, "rounds between two versions; the last round's is always one", low=1)
    resume: bool = _key(False, "go on from the newest checkpoint in run-dir, where there is one")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name != "peft":
                value = checked(_name(field), getattr(self, field.name), field.metadata)
                object.__setattr__(self, field.name, value)
        for option, value in self.peft.items():
            large = isinstance(value, int) and value.bit_length() > 63
            if not isinstance(value, Scalar) or large:
                raise ConfigError(
                    f"{_PEFT_PREFIX}{option}: expected text, a number, true or false, "
                    f"found {shown(value)}"
                )
        object.__setattr__(self, "peft", MappingProxyType({**_PEFT_DEFAULTS, **self.peft}))
        exchange_keys.complete(self)
        self.trackers()
        check_nodes(self)
        json_object("peft-options", self.peft_options)
        json_object("strategy-options", self.strategy_options)

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Scalar]) -> Self:
        """Return the configuration of a flat mapping such as Flower's ``context.run_config``.

        Keys that are missing have their defaults.

        Raises
        ------
        ConfigError
            Where a key is unknown (with the nearest known one) or a value does not fit.
        """
        fields = {_name(field): field.name for field in dataclasses.fields(cls)}
        del fields["peft"]
        values: dict[str, Any] = {}
        peft: dict[str, Scalar] = {}
        for key, value in run_config.items():
            if key.startswith(_PEFT_PREFIX) and len(key) > len(_PEFT_PREFIX):
                peft[key.removeprefix(_PEFT_PREFIX)] = value
            elif key in fields:
                values[fields[key]] = value
            else:
                known = [*fields, *(_PEFT_PREFIX + option for option in _PEFT_DEFAULTS)]
                raise ConfigError(f'unknown key "{key}"{suggestion(key, known)}')
        return cls(**values, peft=peft)

    def to_run_config(self) -> dict[str, Scalar]:
        """Return the flat mapping of all keys; `from_run_config` takes it back."""
        flat: dict[str, Scalar] = {}
        for field in dataclasses.fields(self):
            if field.name == "peft":
                flat.update((_PEFT_PREFIX + option, value) for option, value in self.peft.items())
            else:
                flat[_name(field)] = getattr(self, field.name)
        return flat

    def further_peft_options(self) -> dict[str, Any]:
        """Return `peft_options` as a dict."""
        return json_object("peft-options", self.peft_options)

    def further_strategy_options(self) -> dict[str, Any]:
        """Return `strategy_options` as a dict."""
        return json_object("strategy-options", self.strategy_options)

    def trackers(self) -> tuple[str, ...]:
        """Return the names in `track`."""
        names = [name.strip() for name in self.track.split(",") if name.strip()]
        for name in names:
            if name not in TRACKERS:
                raise ConfigError(f'track: no tracker "{name}"{suggestion(name, TRACKERS)}')
        return tuple(dict.fromkeys(names))

    @property
    def compressed(self) -> bool:
        """Whether nodes send ComPEFT updates (all strategies but Flower's own FedAvg)."""
        return self.strategy != "fedavg"


def keys() -> list[Key]:
    """Return every key with its default and help, in the order of the files."""
    found: list[Key] = []
    for field in dataclasses.fields(AppConfig):
        if field.name == "peft":
            found += [
                Key(_PEFT_PREFIX + option, _kind_of(value), value, _PEFT_HELP[option])
                for option, value in _PEFT_DEFAULTS.items()
            ]
        else:
            meta = field.metadata
            choices = exchange_keys.STRATEGY_CHOICES if field.name == "strategy" else ()
            found.append(
                Key(
                    _name(field),
                    meta["kind"],
                    cast(Scalar, field.default),
                    meta["help"],
                    choices or meta["choices"],
                )
            )
    return found


def parse_assignment(text: str) -> tuple[str, Scalar]:
    """Return key and value of ``key=value`` as typed on a command line.

    The value is read as the key's kind asks for; quotes around a text may be left out.

    Raises
    ------
    ConfigError
        Where there is no ``=``. Whether key and value fit is checked by `AppConfig`.

    Examples
    --------
    >>> parse_assignment("rounds=3"), parse_assignment("model=org/name")
    (('rounds', 3), ('model', 'org/name'))
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f'expected key=value, found "{text}"')
    kinds = {key.name: key.kind for key in keys()}
    value = value.strip()
    literal: Any = value
    with contextlib.suppress(ValueError, RecursionError):  # no TOML, or thousands of digits
        literal = tomllib.loads(f"value = {value}")["value"]
    if kinds.get(name) == "text" and not (isinstance(literal, str) and literal != value):
        return name, value
    return name, literal if isinstance(literal, Scalar) else value


def _name(field: dataclasses.Field[Any]) -> str:
    return field.name.replace("_", "-")


def _kind_of(value: Scalar) -> str:
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[type(value)]
