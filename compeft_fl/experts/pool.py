"""Many experts in memory, and one model that answers as any of them.

>>> pool = ExpertPool(model, store="HOST:PORT", memory="2 GiB")   # doctest: +SKIP
>>> with pool.use("sections"):                                    # doctest: +SKIP
...     model.generate(...)
"""

from __future__ import annotations

import functools
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compeft_fl.adapters import Adapter, StoredUpdate, load_folder, read_update, restore
from compeft_fl.adapters.live import Kind, LiveAdapter
from compeft_fl.adapters.meaning import check_same
from compeft_fl.adapters.merge import check_comparable, check_mergeable
from compeft_fl.adapters.starts import tag_of
from compeft_fl.errors import ParameterError
from compeft_fl.experts.cache import parse_size
from compeft_fl.experts.held import Held, Recipe
from compeft_fl.experts.merged import Merged
from compeft_fl.experts.shelf import Load, Shelf
from compeft_fl.experts.slots import Slots
from compeft_fl.experts.source import Source
from compeft_fl.printable import quoted
from compeft_fl.task_vector import TaskVector

if TYPE_CHECKING:
    from compeft_fl.experts.client import ExpertClient

__all__ = ["ExpertPool"]


class ExpertPool:
    """Experts as updates in memory, decoded straight into a model when they are used.

    What the model holds when the pool is made is its home state: each `use` ends by putting back
    what was there before, bit for bit. A model has one pool at a time, and is not trained while an
    expert is in it. All methods may be called from any thread; `use` waits until no other thread
    uses the model.

    Parameters
    ----------
    model : peft.PeftModel
        With an adapter of the experts' settings: one of them, or what they were trained from.
    store : str or ExpertClient, optional
        ``"HOST:PORT"`` of a store of experts, from which unknown names are fetched.
    memory : int or str
        The most bytes of experts in memory: ``"2 GiB"``. Where they need more, those that were
        used least lately are kept as streams of bytes in place of bit masks, and then are only
        loaded again when they are used.
    adapter_name : str
        Of the model's adapter that experts are written into.
    init : path or Adapter, optional
        The adapter before training, where experts are relative to it and the model holds another.
    any_base : bool
        Take an expert whose configuration names another base model than the model's: the same
        weights in another folder. Digests are compared all the same, where they are known.
    base_digest : str
        Of the base's weights (`compeft_fl.adapters.base_digest`), where it is known already.

    Raises
    ------
    AdapterError
        A model without such an adapter, or one whose state is not what is trained.
    ParameterError
        A size that is none.
    """

    def __init__(
        self,
        model: Any,
        store: str | ExpertClient | None = None,
        *,
        memory: int | str = "1 GiB",
        adapter_name: str = "default",
        init: str | os.PathLike[str] | Adapter | None = None,
        any_base: bool = False,
        base_digest: str = "",
    ) -> None:
        self._shelf = Shelf(parse_size(memory))
        if init is not None and not isinstance(init, Adapter):
            init = load_folder(init)
        self._live = LiveAdapter(model, adapter_name, init)
        self._model = model
        self._in_model = threading.RLock()
        self._source = Source(store, model, self._live, self._in_model, base_digest)
        self._any_base = any_base
        self._kinds: dict[Kind, Kind] = {}
        self._configs: dict[str, dict[str, Any]] = {}
        self._table = threading.Lock()  # of the two above, and the one below
        self._fetching: dict[str, threading.Lock] = {}
        self._slots = Slots(model, self._live)
        self._active: str | Recipe | None = None

    # --- members ----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._shelf)

    def __contains__(self, name: object) -> bool:
        return name in self._shelf

    def names(self) -> list[str]:
        """The names of all members, sorted."""
        return self._shelf.names()

    @property
    def memory(self) -> int:
        """The most bytes of experts in memory."""
        return self._shelf.memory

    @property
    def nbytes(self) -> int:
        """The bytes of experts in memory."""
        return self._shelf.nbytes

    def held(self, name: str) -> Held | None:
        """How an expert is in memory; None: it is not, or is merged from others that are."""
        return self._shelf.held(name)

    def reference(self, name: str) -> str:
        """Which version of an expert of the store this is: ``NAME@VERSION``; else the name."""
        return self._source.reference(name)

    @property
    def active(self) -> str | Recipe | None:
        """What the model answers as at present; None: as it did when the pool was made."""
        return self._active

    def forms(self) -> dict[str, str]:
        """How each member is held: ``"streams"``, ``"masks"``, ``"dense"``, ``"merged"``, ``""``.

        ``""``: not in memory; it is loaded again when it is used.
        """
        return self._shelf.forms()

    def add(self, name: str, source: str | os.PathLike[str] | StoredUpdate) -> None:
        """Take an expert under a name; one of that name is replaced.

        Parameters
        ----------
        name : str
        source : path or StoredUpdate
            A ``.compeft`` file. It is read again where its memory was needed for others. What is
            given as a StoredUpdate stays in memory.

        Raises
        ------
        AdapterError, LayoutError
            Another base model, other settings, other tensors, or a start that is not at hand.
        WireError
            A file that a decoder rejects.
        ParameterError
            No room: what is in memory could not be loaded again.
        """
        load = None
        if not isinstance(source, StoredUpdate):
            path = Path(source)
            load, source = (lambda: read_update(path)), read_update(path)
        self._put(name, source, load)

    def fetch(self, name: str) -> None:
        """Take the newest version of an expert of that name from the store, whether held or not.

        Raises
        ------
        ExpertError
            No such expert, or a store that cannot be reached.
        AdapterError, LayoutError, ParameterError
            As `add`.
        """
        stored, reference, same_base = self._source.pull(name, self.names)
        again = functools.partial(self._source.pull, reference, self.names)
        self._put(name, stored, lambda: again()[0], any_base=same_base)

    def merge(
        self,
        name: str,
        members: Mapping[str, float] | Recipe,
        method: str = "average",
        *,
        scaling: float | None = None,
        tie: str | None = None,
    ) -> Recipe:
        """Take a merged expert under a name: it is computed from its members when it is used.

        Parameters
        ----------
        name : str
        members : mapping of str to float, or Recipe
            Names with weights.
        method, scaling, tie
            As `Recipe`.

        Raises
        ------
        ParameterError
            A member that is merged itself, or settings that the method does not have.
        AdapterError, LayoutError
            Members that don't mean the same.
        """
        recipe = (
            members
            if isinstance(members, Recipe)
            else Recipe.of(members, method, scaling=scaling, tie=tie)
        )
        self.check(recipe)
        self._shelf.put_recipe(name, recipe)
        return recipe

    def remove(self, name: str) -> None:
        """Forget an expert; unknown names are none already."""
        self._shelf.drop(name)

    # --- use --------------------------------------------------------------------------------------

    @contextmanager
    def use(self, expert: str | Recipe) -> Iterator[Any]:
        """The model as an expert, and after that as it was, bit for bit.

        Within one thread a use may stand inside another. Other threads wait.

        Parameters
        ----------
        expert : str or Recipe
            A member, a reference in the store, or a merge of such that needs no name.

        Yields
        ------
        peft.PeftModel
            The model.

        Raises
        ------
        ExpertError
            No such expert, or a store that cannot be reached.
        CompeftError
            As `add` and `merge`.
        """
        self._ready(expert)
        with self._in_model:
            before = self._active
            self._write(expert)
            try:
                yield self._model
            finally:
                self._back_to(before)

    def swap(self, expert: str | Recipe | None) -> None:
        """Make the model an expert for good; None: what it was when the pool was made.

        For a server that asks which expert comes next, and not for how long. Raises as `use`.
        """
        if expert is not None:
            self._ready(expert)
        with self._in_model:
            if expert is None:
                self._back_to(None)
            else:
                self._write(expert)

    @contextmanager
    def mixed(self, experts: Sequence[str | Recipe | None]) -> Iterator[tuple[Any, list[str]]]:
        """The model, for one batch whose samples are answered as different experts.

        Each expert of the batch is written into an adapter of its own, which stays in the model for
        the next batch: `Slots`. For LoRA; the model has to be in its evaluation mode.

        Parameters
        ----------
        experts : sequence of str, Recipe or None
            Of each sample; None: what the model is without a batch.

        Yields
        ------
        (peft.PeftModel, list of str)
            The model, and what its ``adapter_names`` have to be, for ``forward`` and ``generate``.

        Raises
        ------
        AdapterError
            A method whose layers take no names.
        CompeftError
            As `use`.
        """
        different = list(dict.fromkeys(each for each in experts if each is not None))
        for each in different:
            self._ready(each)
        with self._in_model:
            self._live.check_apart()
            slots = dict(zip(different, self._slots.take(len(different)), strict=True))
            for each, slot in slots.items():
                self._write_into(slot.live, each)
            own = self._live.name
            yield self._model, [own if e is None else slots[e].name for e in experts]

    def export(self, expert: str | Recipe) -> StoredUpdate:
        """An expert as an update, as if it had been read from a file; a merged one is dense.

        Raises
        ------
        CompeftError
            As `use`.
        """
        self._ready(expert)
        recipe = self._recipe(expert)
        if recipe is None:
            assert isinstance(expert, str)
            return self._held(expert).stored()
        merged = self._merged(recipe)
        kind, values = merged.kind, merged.values()
        if (extra := merged.start_weight - 1) != 0:
            values = values + np.float32(extra) * self._live.start_values(kind, merged.carried)
        update = TaskVector(kind.layout, values)
        update.check_finite()
        return StoredUpdate(update, merged.config, kind.start, "dense", 0, 0, merged.carried)

    def adapter(self, expert: str | Recipe) -> Adapter:
        """An expert as an adapter that `compeft_fl.adapters.save_folder` writes.

        Raises
        ------
        CompeftError
            As `use`.
        """
        stored = self.export(expert)
        kind = self._kind(stored)
        init = None
        if stored.needs_init:
            init = Adapter(stored.config, self._live.start_state(kind, stored.carried))
        return restore(stored, init)

    def _write(self, expert: str | Recipe) -> None:
        self._live.check_apart()
        before = self._active
        try:
            self._write_into(self._live, expert)
        except BaseException:
            self._back_to(before)  # nobody is left with half of an expert
            raise
        self._active = expert

    def _write_into(self, live: LiveAdapter, expert: str | Recipe) -> None:
        if (recipe := self._recipe(expert)) is not None:
            merged = self._merged(recipe)
            live.write_tensors(merged.kind, merged.on_device, merged.carried, merged.start_weight)
            return
        assert isinstance(expert, str)
        held = self._held(expert)
        if held.is_dense:
            live.write_tensors(held.kind, held.on_device, held.carried)
        else:
            live.write_ternary(held.kind, held.ternary(), held.carried)

    def _back_to(self, expert: str | Recipe | None) -> None:
        self._active = None
        if expert is None:
            self._live.restore()
        else:
            self._write(expert)

    # --- merging ----------------------------------------------------------------------------------

    def _recipe(self, expert: str | Recipe) -> Recipe | None:
        if isinstance(expert, Recipe):
            return expert
        member = self._shelf.find(expert)
        return None if member is None else member.recipe

    def check(self, recipe: Recipe) -> None:
        """Raise where a recipe's members cannot be merged as it says; as `merge` does."""
        first: StoredUpdate | None = None
        for name, _ in recipe.members:
            self._ready(name)
            if self._recipe(name) is not None:
                raise ParameterError(f"expected members that are not merged, found {quoted(name)}")
            stored = self._held(name).stored()
            check_mergeable(stored, recipe.method)
            if first is not None:
                check_comparable(first, stored, any_base=True)
            first = first or stored

    def _merged(self, recipe: Recipe) -> Merged:
        members = [(self._held(name), weight) for name, weight in recipe.members]
        return Merged(recipe, members, self._shelf.unpacked)

    # --- what is in memory ------------------------------------------------------------------------

    def _ready(self, expert: str | Recipe) -> None:
        """Have an expert, and what it is merged from, in memory or known to be loadable."""
        names = [name for name, _ in expert.members] if isinstance(expert, Recipe) else [expert]
        for name in names:
            member = self._shelf.find(name)
            if member is not None and member.recipe is not None:
                if isinstance(expert, Recipe):
                    raise ParameterError(
                        f"expected members that are not merged, found {quoted(name)}"
                    )
                self._ready(member.recipe)
            elif member is None or member.held is None:
                with self._table:
                    lock = self._fetching.setdefault(name, threading.Lock())
                with lock:
                    if self._shelf.held(name) is not None:  # another thread was first
                        continue
                    if member is not None and member.load is not None:
                        self._put(name, member.load(), member.load, any_base=True)
                    else:
                        self.fetch(name)

    def _held(self, name: str) -> Held:
        while (held := self._shelf.held(name)) is None:  # given up again, for others, meanwhile
            self._ready(name)
        return held

    def _kind(self, stored: StoredUpdate) -> Kind:
        start = stored.start or tag_of(stored.config, stored.update.layout)[0]
        kind = Kind(stored.update.layout, start)
        with self._table:
            return self._kinds.setdefault(kind, kind)

    def _put(
        self, name: str, stored: StoredUpdate, load: Load | None, *, any_base: bool = False
    ) -> None:
        check_same(self._live.config, stored.config, any_base=any_base or self._any_base)
        kind = self._kind(stored)
        self._live.check(kind, stored.carried)
        text = json.dumps(stored.config, sort_keys=True)
        with self._table:
            config = self._configs.setdefault(text, stored.config)
        self._shelf.put(name, Held(stored, kind, config), load)
