"""A language model with a PEFT adapter, causal or sequence-to-sequence, whole or in 4 or 8 bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn

from compeft_fl import adapters
from compeft_fl.adapters.base_digest import base_digest, check_base
from compeft_fl.app import embedded
from compeft_fl.app.config import AppConfig
from compeft_fl.app.node_keys import freeze
from compeft_fl.app.tasks import stored_peft
from compeft_fl.app.tasks.base import check_packages
from compeft_fl.app.tasks.devices import choose_device, choose_dtype
from compeft_fl.app.tasks.peft_network import quiet
from compeft_fl.app.tasks.peft_options import peft_config
from compeft_fl.errors import ConfigError
from compeft_fl.printable import one_line

__all__ = ["EMBEDDED_MODELS", "LanguageModel", "build", "load_base", "with_adapter"]

EMBEDDED_MODELS: Final[Mapping[str, Callable[[], Path]]] = MappingProxyType(
    {embedded.LANGUAGE_MODEL: functools.partial(embedded.path, embedded.LANGUAGE_MODEL)}
)
"""Language models that come with the package: name -> what gives their folder."""

_ENCODER: Final = "minilm"  # the default of task=classification


@dataclass
class LanguageModel:
    """A model with what belongs to it.

    Parameters
    ----------
    network : nn.Module
        A PEFT model, or a base model alone.
    tokenizer : transformers tokenizer
        With a pad token.
    seq2seq : bool
        Encoder and decoder; else causal.
    digest : bytes
        Of the base model's weights.
    """

    network: Any
    tokenizer: Any
    seq2seq: bool
    digest: bytes

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        device: torch.device = next(self.network.parameters()).device
        return device


def build(config: AppConfig) -> LanguageModel:
    """Return the model of a configuration, its adapter at the start that the seed gives.

    Raises
    ------
    ConfigError
        Where the model cannot be loaded, is no language model, or a PEFT option does not fit.
    MissingPackageError
        Where quantization is asked for and bitsandbytes is not installed.
    """
    from peft import get_peft_model, prepare_model_for_kbit_training

    model = load_base(config)
    device = model.device
    if config.quantization != "none":
        prepare: Any = prepare_model_for_kbit_training
        model.network = prepare(model.network, use_gradient_checkpointing=False)
    task_type = "SEQ_2_SEQ_LM" if model.seq2seq else "CAUSAL_LM"
    torch.manual_seed(config.seed)
    try:
        with quiet():
            model.network = get_peft_model(model.network, peft_config(config, task_type))
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"peft-method {config.peft_method} does not fit {config.model}: {one_line(error)}"
        ) from error
    _round_start(model.network)
    freeze(model.network, config)
    model.network.peft_config["default"].base_model_name_or_path = config.model
    for parameter in model.network.parameters():
        if parameter.requires_grad:  # prompts of prompt tuning; quantised weights stay
            parameter.data = parameter.data.to(device)
    return model


def _round_start(network: nn.Module) -> None:
    """Round the adapter's start to bfloat16, as PEFT does where the base model is in it.

    So the seed gives one start on a server in float32, a node in bfloat16, and one in 4 bits.
    """
    for parameter in network.parameters():
        if parameter.requires_grad:
            rounded = parameter.data.to(torch.bfloat16)
            parameter.data = rounded.to(torch.promote_types(parameter.dtype, torch.bfloat16))


def _keep_packing(network: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew on some CPUs when they are first used.

    Its kernel for that packing has no gradients, and what is trained after it was scored learns
    from wrong ones: with a warning, and no error (bitsandbytes 0.50).
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def with_adapter(config: AppConfig, folder: Path) -> LanguageModel:
    """Return the model of a configuration with the adapter of a folder, for use.

    Raises
    ------
    ConfigError
        Where the model cannot be loaded, or the adapter does not fit it.
    AdapterError
        Where the folder's files are missing or broken, or for another base model.
    """
    adapter = adapters.load_folder(folder)
    model = load_base(config)
    check_base(folder, model.digest)
    device, empty = model.device, None
    with quiet():
        if config.quantization != "none":
            with torch.device("meta"):
                empty = type(model.network)(model.network.config)
        model.network = stored_peft.load(model.network, adapter, folder, empty).eval()
    if config.quantization == "none":
        model.network.to(device)
    return model


def load_base(config: AppConfig) -> LanguageModel:
    """Return the base model of a configuration, and its tokenizer.

    Raises
    ------
    ConfigError
        Where it cannot be loaded, is no language model, or has neither a pad nor an end token.
    MissingPackageError
        Where quantization is asked for and bitsandbytes is not installed.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    check_packages(config)
    device, dtype = choose_device(config.device), choose_dtype(config)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    if config.quantization != "none":
        options |= {
            "quantization_config": _quantization(config.quantization, dtype),
            "device_map": {"": device},
        }
    if config.model == _ENCODER:
        raise ConfigError(
            f"model: the embedded {_ENCODER} is an encoder, which writes no text: take "
            f"{' or '.join(EMBEDDED_MODELS)} (embedded), a Hugging Face id or a folder"
        )
    own = EMBEDDED_MODELS.get(config.model)
    source = str(own()) if own else config.model
    try:
        with quiet():
            settings, tokenizer = _described(source, config)
            seq2seq = bool(settings.is_encoder_decoder)
            _check_kind(settings, config)
            kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
            network: nn.Module = kind.from_pretrained(source, **options)
    except ConfigError:
        raise
    except Exception as error:  # a stranger's files: pickles, odd configurations, missing modules
        hint = ""
        if "trust_remote_code" in str(error):
            hint = "it comes with Python code of its own, which trust-remote-code=true would run; "
        raise ConfigError(
            f'model: "{config.model}" cannot be loaded: {hint}{type(error).__name__}: '
            f"{one_line(error, 300)}"
        ) from error
    digest = base_digest(network)
    _keep_packing(network)
    if config.quantization == "none":
        network.to(device)
    _check_tokenizer(tokenizer, config)
    return LanguageModel(network, tokenizer, seq2seq, digest)


def _described(source: str, config: AppConfig) -> tuple[Any, Any]:
    """Return a model's settings and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    # Always said: where nothing is, transformers asks on the terminal, and takes any "y".
    trust = {"trust_remote_code": config.trust_remote_code}
    settings = AutoConfig.from_pretrained(source, **trust)
    return settings, AutoTokenizer.from_pretrained(source, **trust)


def _check_kind(settings: Any, config: AppConfig) -> None:
    """Raise ConfigError for models that do not write text, as encoders that fill in masks."""
    from transformers.models.auto import modeling_auto

    kind = settings.model_type
    causal = kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    says = any(getattr(settings, name, None) for name in ("is_decoder", "auto_map"))
    if settings.is_encoder_decoder or says or (causal and not masked):
        return
    raise ConfigError(
        f"model: {config.model} is no causal or sequence-to-sequence language model but an encoder "
        f"({kind}): take one that writes text, or task=classification"
    )


def _check_tokenizer(tokenizer: Any, config: AppConfig) -> None:
    """See that rows can be padded; padding is never learned, so that any token will do."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise ConfigError(
            f"model: the tokenizer of {config.model} has neither a pad token nor one that ends a "
            "text: set pad_token or eos_token in its tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.eos_token


def _quantization(name: str, dtype: torch.dtype) -> Any:
    """Return transformers' configuration of bitsandbytes: QLoRA's NF4 twice, or 8 bits."""
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    if name == "8bit":
        return make(load_in_8bit=True)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
