"""From a run to a store: every k-th round's adapter as a version of one name.

Whoever has a version is sent what has changed since (`compeft_fl.experts.catch_up`). A store that
is away or full costs versions, each a line in the log, and never the run: what is pushed goes up
beside the rounds, and where one takes longer than k rounds, only the newest waits.
"""

from __future__ import annotations

import logging
import math
import re
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from compeft_fl.errors import AdapterError, CompeftError
from compeft_fl.experts.client import ExpertClient
from compeft_fl.experts.names import MAX_ENTRIES, MAX_KEY, check_name, check_tags

__all__ = ["Publisher"]

_OTHER: Final = re.compile(r"[^A-Za-z0-9._-]+")
_LAST_SECONDS: Final = 600.0  # that a run waits at its end for its last version


@dataclass(frozen=True)
class _Waiting:
    server_round: int
    folder: tempfile.TemporaryDirectory[str]
    metrics: dict[str, float]


class Publisher:
    """Pushes adapters of a run, in a thread of its own.

    Parameters
    ----------
    server : str
        HOST:PORT of a server of experts; token and certificate are those of the environment.
    name : str
    every : int
        Rounds between two versions; the last round's is always one.
    rounds : int
        Of the run.
    save : callable
        Writes the adapter as it is now into a folder. It is called at once, for the start of
        tensors that begin at weights of the base model, and by `offer`.
    tags : mapping, optional
    logger : logging.Logger
        What could not be pushed, and why.

    Raises
    ------
    ExpertError, ParameterError
        The server does not answer, or lets nobody in; so that it shows before the first round.
    """

    def __init__(
        self, server: str, name: str, every: int, rounds: int,
        save: Callable[[Path], object], *, tags: Mapping[str, str] | None = None,
        logger: logging.Logger,
    ) -> None:  # fmt: skip
        self._name, self._every, self._rounds = check_name(name), every, rounds
        self._tags, self._logger, self._save = check_tags(tags or {}), logger, save
        self._client = ExpertClient(server)
        self._start = tempfile.TemporaryDirectory(prefix="compeft-fl-")
        try:
            self._client.list(limit=1)
            save(Path(self._start.name))
        except BaseException:
            self._end()
            raise
        self._waiting: _Waiting | None = None
        self._over = False
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="experts-push", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End; where all went well, when the last version is pushed."""
        with self._news:
            self._over = True
            self._news.notify()
        self._thread.join(_LAST_SECONDS if kind is None else 0.0)
        if self._thread.is_alive():
            self._logger.warning("the last version of %s is not yet pushed: given up", self._name)
        self._end()

    def _end(self) -> None:
        self._client.close()
        self._start.cleanup()

    def offer(self, server_round: int, metrics: Mapping[str, float]) -> None:
        """Push the adapter as it is after a round, if it is its turn.

        Parameters
        ----------
        server_round : int
            0 is the start, which is none of the versions.
        metrics : mapping of str to float
        """
        if not server_round or (server_round % self._every and server_round != self._rounds):
            return
        folder = tempfile.TemporaryDirectory(prefix="compeft-fl-")
        self._save(Path(folder.name))
        with self._news:
            if self._waiting is not None:
                self._left_out(self._waiting, "the one before it is still on its way")
                self._waiting.folder.cleanup()
            self._waiting = _Waiting(server_round, folder, _named(metrics))
            self._news.notify()

    def _left_out(self, waiting: _Waiting, why: object) -> None:
        self._logger.warning(
            "round %d's adapter is no version of %s: %s", waiting.server_round, self._name, why
        )

    def _work(self) -> None:
        while True:
            with self._news:
                while self._waiting is None and not self._over:
                    self._news.wait()
                waiting, self._waiting = self._waiting, None
            if waiting is None:
                return
            try:
                self._push(waiting)
            except (CompeftError, OSError) as error:
                self._left_out(waiting, error)
            finally:
                waiting.folder.cleanup()

    def _push(self, waiting: _Waiting) -> None:
        tags = {**self._tags, "round": str(waiting.server_round)}
        folder, start = Path(waiting.folder.name), Path(self._start.name)
        given: dict[str, Any] = {"tags": tags, "metrics": waiting.metrics}
        try:
            expert = self._client.push(folder, self._name, **given)
        except AdapterError:  # tensors that start from the base's weights
            expert = self._client.push(folder, self._name, init=start, codec="steps", **given)
        self._logger.info("round %d's adapter is %s", waiting.server_round, expert.reference)


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    """Figures under names that a store takes, as many as it takes: those of a run are free."""
    finite = {key: value for key, value in metrics.items() if math.isfinite(value)}
    named = {_OTHER.sub(".", key)[:MAX_KEY].strip("._-"): finite[key] for key in finite}
    return dict([(key, value) for key, value in named.items() if key][:MAX_ENTRIES])
