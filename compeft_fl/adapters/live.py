"""The adapter that a PEFT model answers with: its tensors, written in place and put back.

An expert is a start plus an update (`compeft_fl.adapters.starts`). It is written tensor by tensor
into the model's own memory; ternary updates on the CPU go there nonzero by nonzero, by
`compeft_fl.kernels.cpu_write`. What the model held before is kept as it is, so that putting it back
is exact to the bit.
"""

from __future__ import annotations

import enum
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compeft_fl.adapters.folders import Adapter, check_direct, parse_config
from compeft_fl.adapters.live_runs import write_runs
from compeft_fl.adapters.starts import resized_start, start_of
from compeft_fl.errors import AdapterError, LayoutError, NonFiniteError
from compeft_fl.printable import quoted
from compeft_fl.task_vector import Layout, TensorSpec

if TYPE_CHECKING:
    import torch

    from compeft_fl.kernels.cpu_write import Target

__all__ = ["Kind", "LiveAdapter", "Ternary", "model_config"]


@dataclass(frozen=True)
class Ternary:
    """A ternary update as the writer takes it.

    Attributes
    ----------
    scales : ndarray of float32, shape (tensors,)
    into : callable
        Takes a `Target`, and puts the start and the nonzeros there.
    masks : callable
        Gives the two bit masks, for tensors that are not in the CPU's memory or not written by
        patterns of bits.
    """

    scales: NDArray[np.float32]
    into: Callable[[Target], None]
    masks: Callable[[], tuple[Any, Any]]


@dataclass(frozen=True)
class Kind:
    """What experts have in common that differ in their values alone; one object for all of them.

    Attributes
    ----------
    layout : Layout
        Of the tensors in the task vector.
    start : str
        The tag of `compeft_fl.adapters.starts.Start`.
    """

    layout: Layout
    start: str

    @functools.cached_property
    def start_value(self) -> float | None:
        """The one number that all tensors start from; None: they start from a `LiveAdapter`'s."""
        return None if self.start.startswith("blake2b:") else float(self.start)


class LiveAdapter:
    """The tensors of one adapter of a PEFT model.

    Parameters
    ----------
    model : peft.PeftModel
    adapter_name : str
    init : Adapter, optional
        The adapter before training, to which experts may be relative. What the model holds now is
        tried in any case.

    Raises
    ------
    AdapterError
        An adapter whose state is not what is trained (`compeft_fl.adapters.peft_state`).
    """

    def __init__(
        self, model: Any, adapter_name: str = "default", init: Adapter | None = None
    ) -> None:
        if not hasattr(model, "peft_config") or adapter_name not in model.peft_config:
            found = type(model).__name__ if not hasattr(model, "peft_config") else "others"
            raise AdapterError(f"expected a PEFT model with {quoted(adapter_name)}, found {found}")
        check_direct(model, adapter_name)
        self.config = model_config(model, adapter_name)
        self._model, self.name = model, adapter_name
        state = self._state()
        self._places = _places(model, state)
        self.made = [name for name in state if name not in self._places]
        # What PEFT makes of other parameters for its state, prompts, say, is put back as those.
        self._sources = _sources(model, adapter_name) if self.made else {}
        self.home = {name: tensor.detach().clone() for name, tensor in state.items()}
        self._source_values = {name: p.detach().clone() for name, p in self._sources.items()}
        self.inits: list[Adapter] = []
        if init is not None:
            self.offer_start(init)
        self._starts: dict[str, Mapping[str, Any]] = {}
        self._layers = [each for each in model.modules() if hasattr(each, "merged_adapters")]

    def _state(self) -> dict[str, Any]:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(
            self._model, adapter_name=self.name, save_embedding_layers=False
        )
        return {name: state[name] for name in sorted(state)}

    def offer_start(self, init: Adapter) -> None:
        """Know one more adapter before training, to which experts may be relative."""
        self.inits.append(resized_start(self.config, init))

    def start_state(self, kind: Kind, carried: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors that experts of a kind start from, on the CPU.

        Raises
        ------
        AdapterError
            They are not at hand.
        """
        return {name: tensor.cpu() for name, tensor in self._start(kind, carried).items()}

    def start_values(self, kind: Kind, carried: Mapping[str, Any]) -> NDArray[np.float32]:
        """The same as one flat float32 vector; of a start that is one number, that number."""
        if kind.start_value is not None:
            return np.broadcast_to(np.float32(kind.start_value), kind.layout.num_parameters)
        start = self._start(kind, carried)
        values = np.empty(kind.layout.num_parameters, np.float32)
        for tensor, where in kind.layout.slices():
            values[where] = start[tensor.name].cpu().float().numpy().reshape(-1)
        return values

    # --- what fits --------------------------------------------------------------------------------

    def check(self, kind: Kind, carried: Mapping[str, Any]) -> None:
        """Raise unless an expert's tensors are this adapter's, and its start is at hand.

        Raises
        ------
        LayoutError
            Other names or shapes.
        AdapterError
            A start that neither the model nor ``init`` is.
        """
        shapes = {tensor.name: tensor.shape for tensor in kind.layout.tensors}
        shapes |= {name: tuple(tensor.shape) for name, tensor in carried.items()}
        for name, tensor in self.home.items():
            if name not in shapes:
                raise LayoutError(f"expected the model's tensor {quoted(name)}, found none")
            if shapes.pop(name) != tuple(tensor.shape):
                raise LayoutError(
                    f"expected the model's shape {tuple(tensor.shape)}, found another in tensor "
                    f"{quoted(name)}"
                )
        if shapes:
            raise LayoutError(f"expected the model's tensors, found also {quoted(min(shapes))}")
        if kind.start_value is None:
            self._start(kind, carried)

    def _start(self, kind: Kind, carried: Mapping[str, Any]) -> Mapping[str, Any]:
        """The tensors that experts of a kind start from."""
        if kind.start not in self._starts:
            held = Adapter(self.config, {n: t.cpu() for n, t in self.home.items()})
            for candidate in (held, *self.inits):
                try:
                    found = start_of(self.config, kind.layout, candidate, carried)
                except LayoutError:
                    continue
                if found.tag == kind.start:
                    tensors = self.home if candidate is held else candidate.state
                    self._starts[kind.start] = _as_tensors(tensors)
                    break
            else:
                raise AdapterError(
                    "expected the adapter before training, to which the expert is relative, found "
                    "another in the model: load that one into it, or give it as init"
                )
        return self._starts[kind.start]

    # --- writing ----------------------------------------------------------------------------------

    def check_apart(self) -> None:
        """Raise AdapterError where the adapter is merged into the base's weights at present."""
        if any(self.name in layer.merged_adapters for layer in self._layers):
            raise AdapterError(
                "expected an adapter beside the base's weights, found it merged into them: "
                "unmerge_adapter() first"
            )

    def write_ternary(self, kind: Kind, update: Ternary, carried: Mapping[str, Any]) -> None:
        """Put a start plus a ternary update into the model."""
        import torch

        live = self._live(kind.layout)
        target = None if self.made else self._target(kind, update, live, carried)
        start: float | list[torch.Tensor]
        if kind.start_value is not None:
            start = kind.start_value
        else:
            tensors = self._start(kind, carried)
            start = [tensors[tensor.name] for tensor in kind.layout.tensors]
        with torch.no_grad():
            if target is None:
                to = [torch.empty_like(tensor) for tensor in live] if self.made else live
                write_runs(to, kind.layout, update.masks(), update.scales, start)
                if self.made:
                    names = [tensor.name for tensor in kind.layout.tensors]
                    made = dict(zip(names, to, strict=True))
                    self._load_state(made | _as_tensors(carried))
                    return
            else:
                update.into(target)
            self._write_carried(carried)

    def write_tensors(
        self,
        kind: Kind,
        change: Callable[[int, slice, Any], torch.Tensor],
        carried: Mapping[str, Any],
        start_weight: float = 1.0,
    ) -> None:
        """Put a start plus a change into the model, one tensor after the other.

        Parameters
        ----------
        kind : Kind
        change : callable
            Takes a tensor's index, its place in the flat vector and a device; gives float32 values.
        carried : mapping
            Tensors that are put in as they are.
        start_weight : float
            The start counts so much: LoraHub's rule weighs whole factors.

        Raises
        ------
        NonFiniteError
            A value that a tensor's data type does not hold.
        """
        import torch

        start = None if kind.start_value is not None else self._start(kind, carried)
        state: dict[str, torch.Tensor] = {}
        live = self._live(kind.layout)
        with torch.no_grad():
            for index, (tensor, where) in enumerate(kind.layout.slices()):
                to = live[index]
                values = change(index, where, to.device).view(to.shape)
                if start is None:
                    values = values + start_weight * (kind.start_value or 0.0)
                else:
                    values = values + start_weight * start[tensor.name].to(to.device).float()
                values = values.to(_torch_dtype(tensor.dtype)).to(to.dtype)
                if not bool(torch.isfinite(values).all()):
                    raise NonFiniteError(
                        f"expected values that {to.dtype} holds in tensor {quoted(tensor.name)}"
                    )
                if self.made:
                    state[tensor.name] = values
                else:
                    to.copy_(values)
            if self.made:
                self._load_state(state | _as_tensors(carried))
            else:
                self._write_carried(carried)

    def restore(self) -> None:
        """Put back what the model held when this was made, bit for bit."""
        import torch

        with torch.no_grad():
            for name, parameter in self._sources.items():
                parameter.copy_(self._source_values[name])
            if self._places:
                names = list(self._places)
                torch._foreach_copy_(
                    [self._tensor(name) for name in names], [self.home[name] for name in names]
                )

    @property
    def nbytes(self) -> int:
        """The memory of what is kept to be put back."""
        tensors = {**self.home, **{f"source {n}": t for n, t in self._source_values.items()}}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _tensor(self, name: str) -> torch.Tensor:
        holder, key = self._places[name]
        tensor: torch.Tensor = getattr(holder, key)
        return tensor.detach()

    def _live(self, layout: Layout) -> list[torch.Tensor]:
        if self.made:
            return [self.home[tensor.name] for tensor in layout.tensors]  # for device and dtype
        return [self._tensor(tensor.name) for tensor in layout.tensors]

    def _write_carried(self, carried: Mapping[str, Any]) -> None:
        for name, tensor in _as_tensors(carried).items():
            self._tensor(name).copy_(tensor)

    def _load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self._model, dict(state), adapter_name=self.name)

    def _target(
        self, kind: Kind, update: Ternary, live: list[torch.Tensor], carried: Mapping[str, Any]
    ) -> Target | None:
        """Where nonzeros go in memory; None where patterns of bits do not do."""
        import torch

        from compeft_fl.kernels.cpu_write import ADDED, NARROW, WIDE, Target

        for tensor, spec in zip(live, kind.layout.tensors, strict=True):
            if (
                not _is_here(tensor)
                or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16)
                or (kind.start_value is None and not _is_plain(tensor, spec))
            ):
                return None
        scales = torch.from_numpy(update.scales)
        if kind.start_value is None:
            start = self._start(kind, carried)
            froms = [start[tensor.name] for tensor in kind.layout.tensors]
            if not all(_is_here(each) and each.dtype == torch.float32 for each in froms):
                return None
            kinds = np.full(len(live), ADDED, np.uint8)
            plus, minus = _patterns(scales), _patterns(-scales)
            starts = np.array([each.data_ptr() for each in froms], np.uint64)
        else:
            kinds = np.array([WIDE if t.element_size() == 4 else NARROW for t in live], np.uint8)
            base = torch.full_like(scales, kind.start_value)
            plus, minus, bits = (
                _rounded(values, kind.layout, live)
                for values in (base + scales, base - scales, base)
            )
            starts = bits.astype(np.uint64)
        addresses = np.array([tensor.data_ptr() for tensor in live], np.uint64)
        if np.unique(addresses).size < addresses.size:
            return None  # two names of one tensor, as Lily has them: nothing may be added twice
        return Target(kind.layout.offsets, addresses, kinds, starts.astype(np.uint64), plus, minus)


def model_config(model: Any, adapter_name: str = "default") -> dict[str, Any]:
    """The configuration of a model's adapter, as ``adapter_config.json`` would have it."""
    config = model.peft_config[adapter_name].to_dict()
    return parse_config(json.dumps(_plain(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset | list | tuple):
        items = [_plain(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if isinstance(value, enum.Enum):
        return value.value
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _places(model: Any, state: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Of each tensor of a state, the module that holds it and its name there.

    Not the tensor itself: a module that moves to another device gets others.
    """
    by_memory: dict[tuple[Any, ...], tuple[Any, str]] = {}
    for module in model.modules():
        for key, tensor in (
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ):
            by_memory.setdefault(_memory(tensor), (module, key))
    return {n: by_memory[_memory(t)] for n, t in state.items() if _memory(t) in by_memory}


def _memory(tensor: Any) -> tuple[Any, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _sources(model: Any, adapter_name: str) -> dict[str, Any]:
    """The parameters that PEFT makes a state of, where the state is not they themselves."""
    parts = [*model.named_parameters(), *model.named_buffers()]
    return {name: part for name, part in parts if adapter_name in name.split(".")}


def _as_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    return {name: torch.as_tensor(state[name]) for name in state}


def _torch_dtype(name: str) -> Any:
    import torch

    return {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]


def _is_here(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def _is_plain(tensor: torch.Tensor, spec: TensorSpec) -> bool:
    return tensor.element_size() == 4 and spec.dtype == "f32"


def _patterns(values: torch.Tensor) -> NDArray[np.uint32]:
    patterns: NDArray[np.uint32] = values.float().contiguous().numpy().view(np.uint32)
    return patterns


def _rounded(values: torch.Tensor, layout: Layout, live: list[torch.Tensor]) -> NDArray[np.uint32]:
    """Float32 values, one a tensor, as bits of the data type that the layout, then the model has.

    Raises
    ------
    NonFiniteError
        A value that the data type does not hold.
    """
    import torch

    patterns = np.empty(len(live), np.uint32)
    pairs = [(spec.dtype, tensor.dtype) for tensor, spec in zip(live, layout.tensors, strict=True)]
    for stored, dtype in set(pairs):
        rounded = values.float().to(_torch_dtype(stored)).to(dtype)
        chosen = np.array([pair == (stored, dtype) for pair in pairs])
        wrong = chosen & ~torch.isfinite(rounded).numpy()
        if wrong.any():
            name = layout.tensors[int(wrong.argmax())].name
            raise NonFiniteError(f"expected values that {dtype} holds in tensor {quoted(name)}")
        wide = dtype == torch.float32
        bits = rounded.view(torch.int32 if wide else torch.int16).numpy()
        patterns[chosen] = bits.view(np.uint32 if wide else np.uint16)[chosen]
    return patterns
