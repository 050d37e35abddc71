"""What a pool has in memory: experts by name, within a number of bytes; the least used go."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from compeft_fl.adapters import StoredUpdate
from compeft_fl.errors import ParameterError
from compeft_fl.experts.held import Held, Recipe

__all__ = ["Load", "Shelf"]

Load = Callable[[], StoredUpdate]


@dataclass
class Member:
    """A name: what is in memory of it, and what brings it back where nothing is.

    Attributes
    ----------
    held : Held or None
    load : callable or None
        None: it is nowhere else, and stays in memory.
    recipe : Recipe or None
        Of a merged expert, which has nothing of its own in memory.
    """

    held: Held | None
    load: Load | None
    recipe: Recipe | None = None


class Shelf:
    """Experts in memory; threads may share it.

    Parameters
    ----------
    memory : int
        The most bytes.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.nbytes = 0
        self._members: OrderedDict[str, Member] = OrderedDict()  # the least lately used first
        self._table = threading.RLock()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: object) -> bool:
        return name in self._members

    def names(self) -> list[str]:
        """All names, sorted."""
        with self._table:
            return sorted(self._members)

    def forms(self) -> dict[str, str]:
        """How each is held; see `compeft_fl.experts.pool.ExpertPool.forms`."""
        with self._table:
            return {
                name: "merged" if m.recipe else m.held.form if m.held else ""
                for name, m in sorted(self._members.items())
            }

    def find(self, name: str) -> Member | None:
        """What is known of a name."""
        with self._table:
            return self._members.get(name)

    def held(self, name: str) -> Held | None:
        """An expert, if it is in memory; it counts as used."""
        with self._table:
            member = self._members.get(name)
            if member is None or member.held is None:
                return None
            self._members.move_to_end(name)
            return member.held

    def put(self, name: str, held: Held, load: Load | None) -> None:
        """Take an expert; one of that name is replaced.

        Raises
        ------
        ParameterError
            No room: what is in memory could not be loaded again. One of that name stays.
        """
        with self._table:
            replaced = self.drop(name)
            try:
                self._make_room(held)
            except ParameterError:
                if replaced is not None:
                    self._keep(name, replaced)
                raise
            self._keep(name, Member(held, load))

    def put_recipe(self, name: str, recipe: Recipe) -> None:
        """Take a merged expert; one of that name is replaced."""
        with self._table:
            self.drop(name)
            self._members[name] = Member(None, None, recipe)

    def drop(self, name: str) -> Member | None:
        """Forget a name, and return what it was."""
        with self._table:
            member = self._members.pop(name, None)
            if member is not None and member.held is not None:
                self.nbytes -= member.held.nbytes
            return member

    def unpacked(self, held: Held) -> Held:
        """An expert with its masks kept, where there is room for them."""
        with self._table:
            if held.form == "streams" and self.nbytes + held.masks_bytes <= self.memory:
                before = held.nbytes
                held.unpack()
                self.nbytes += held.nbytes - before
        return held

    def _keep(self, name: str, member: Member) -> None:
        self._members[name] = member
        self.nbytes += member.held.nbytes if member.held is not None else 0

    def _make_room(self, held: Held) -> None:
        """Pack, and then give up, what was used least lately, until a new expert fits."""
        if self.nbytes + held.nbytes <= self.memory:
            return
        held.pack()
        for member in self._members.values():
            if self.nbytes + held.nbytes <= self.memory:
                return
            if member.held is not None and member.held.form != "streams":
                before = member.held.nbytes
                member.held.pack()
                self.nbytes += member.held.nbytes - before
        for member in self._members.values():
            if self.nbytes + held.nbytes <= self.memory:
                return
            if member.held is not None and member.load is not None:
                self.nbytes -= member.held.nbytes
                member.held = None
        if self.nbytes + held.nbytes > self.memory:
            raise ParameterError(
                f"expected room for {held.nbytes} bytes, found {self.nbytes} of {self.memory} "
                "taken by experts that are nowhere else: give the pool more memory, or add files"
            )
