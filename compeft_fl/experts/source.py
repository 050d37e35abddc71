"""The store behind a pool: experts by name, of the model's own base."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from compeft_fl.adapters import StoredUpdate
from compeft_fl.adapters.base_digest import base_digest_under
from compeft_fl.adapters.live import LiveAdapter
from compeft_fl.errors import AdapterError, UnknownExpertError
from compeft_fl.printable import quoted

if TYPE_CHECKING:
    from compeft_fl.experts.client import ExpertClient
    from compeft_fl.experts.expert import Expert

__all__ = ["Source"]


class Source:
    """What a pool asks for experts that it does not hold.

    Parameters
    ----------
    store : str or ExpertClient, optional
        ``"HOST:PORT"``; None: there is none.
    model : peft.PeftModel
    live : LiveAdapter
        Is offered the starts that come along with experts.
    in_model : threading.RLock
        Held while the model's weights are read.
    base_digest : str
        Of the model's base, where it is known; else it is computed once an expert has one.
    """

    def __init__(
        self, store: str | ExpertClient | None, model: Any, live: LiveAdapter,
        in_model: threading.RLock, base_digest: str,
    ) -> None:  # fmt: skip
        self._client: Any = store
        if isinstance(store, str):
            from compeft_fl.experts.client import ExpertClient

            self._client = ExpertClient(store)
        self._model, self._live, self._in_model = model, live, in_model
        self._base_digest = base_digest
        self._references: dict[str, str] = {}

    def reference(self, name: str) -> str:
        """``NAME@VERSION`` of what was pulled; else the name."""
        return self._references.get(name, name)

    def pull(self, name: str, known: Callable[[], Sequence[str]]) -> tuple[StoredUpdate, str, bool]:
        """An expert of the store, the reference to this very version, and is its base known ours?

        Parameters
        ----------
        name : str
        known : callable
            Gives the names that there are without a store, for the error.

        Raises
        ------
        ExpertError
            No such expert, or a store that cannot be reached.
        AdapterError
            Its base model's digest is another.
        """
        if self._client is None:
            names = ", ".join(known()[:10]) or "none"
            raise UnknownExpertError(
                f"expected an expert of the pool ({names}), found {quoted(name)}"
            )
        pulled = self._client.pull(name)
        expert = pulled.expert
        if expert.base_digest:
            self._check_base(expert)
        if pulled.start is not None:
            self._live.offer_start(pulled.start.adapter())
        self._references[name] = expert.reference
        return pulled.read(), f"{expert.name}@{expert.digest}", bool(expert.base_digest)

    def _check_base(self, expert: Expert) -> None:
        with self._in_model:
            if not self._base_digest:
                self._base_digest = base_digest_under(self._model).hex()
        if expert.base_digest != self._base_digest:
            raise AdapterError(
                f"{expert.reference}: expected the model's base, digest {self._base_digest}, found "
                f"an expert of {quoted(expert.base_model)}, digest {expert.base_digest}"
            )
