"""Adapters beside a pool's own: one for each expert of a batch whose samples have several."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Final

from compeft_fl.adapters.live import LiveAdapter
from compeft_fl.errors import AdapterError

__all__ = ["Slot", "Slots"]

_PREFIX: Final = "expert-"


@dataclass(frozen=True)
class Slot:
    """An adapter of the model that experts are written into.

    Attributes
    ----------
    name : str
        By which ``adapter_names`` has it.
    live : LiveAdapter
    """

    name: str
    live: LiveAdapter


class Slots:
    """As many adapters as the largest batch has had experts; each takes what a dense one takes.

    Parameters
    ----------
    model : peft.PeftModel
    live : LiveAdapter
        The pool's own, which the others have settings, tensors and starts of.
    """

    def __init__(self, model: Any, live: LiveAdapter) -> None:
        self._model, self._live = model, live
        self._slots: list[Slot] = []

    def take(self, count: int) -> list[Slot]:
        """So many, made where there are fewer.

        Raises
        ------
        AdapterError
            A method whose layers do not take PEFT's names per sample.
        """
        kind = str(self._live.config["peft_type"])
        if kind != "LORA" or self._live.config.get("use_dora"):
            raise AdapterError(
                f"expected LoRA, for experts by sample, found {kind}"
                + (" with DoRA" if kind == "LORA" else "")
            )
        while len(self._slots) < count:
            self._slots.append(self._made(f"{_PREFIX}{len(self._slots)}"))
        return self._slots[:count]

    def _made(self, name: str) -> Slot:
        from peft import set_peft_model_state_dict

        config = copy.deepcopy(self._model.peft_config[self._live.name])
        config.inference_mode = True
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._model.add_adapter(name, config, autocast_adapter_dtype=False)
        set_peft_model_state_dict(self._model, dict(self._live.home), adapter_name=name)
        for parameter in trained:  # which PEFT may have frozen, as the new one is
            parameter.requires_grad_(True)
        live = LiveAdapter(self._model, name)
        live.inits = self._live.inits
        return Slot(name, live)
