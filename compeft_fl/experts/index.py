"""The index of a store: which names there are, their versions, and what is said of each.

One SQLite file in WAL mode: many read while one writes, and a transaction is on the disk when its
call returns (``synchronous=FULL``), so a kill or a power cut at any moment loses nothing that was
acknowledged. Words are found by FTS5, in names, tags and base models of each name's newest version.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from compeft_fl.errors import ExpertError, UnknownExpertError
from compeft_fl.experts.connections import Connections
from compeft_fl.experts.expert import Expert
from compeft_fl.experts.kept import Kept
from compeft_fl.experts.names import Reference
from compeft_fl.experts.schema import FORMAT, SCHEMA
from compeft_fl.experts.sketches import SIZE, bits, cosines, distances

__all__ = ["Index"]

_WORD: Final = re.compile(r"\w+")
_MAX_WORDS: Final = 16
_NEAREST: Final = 100  # by the signs of their sketches; these are compared by all of them
_AT_A_TIME: Final = 500  # rows of one question
_MAX_LAYOUTS: Final = 64  # whose versions' signs are kept in memory, 256 bytes each
_MAX_ANSWERS: Final = 1000  # to searches, that are kept: rows of some kilobytes at most
_SHOWN_BYTES: Final = 64 << 20  # of versions as searches show them
_EACH: Final = 3 << 10  # bytes of one and its message, without what its pusher may write
_TRIES: Final = 3  # of a search while versions are deleted
_COLUMNS: Final = (
    "n.name, v.version, v.digest, v.size, v.base_model, v.base_digest, v.tags, v.metrics, "
    "v.created, v.num_parameters, v.density, v.codec, v.start, v.layout_id"
)


_Signs = tuple[int, NDArray[np.int64], NDArray[np.uint64]]  # as of a write, of rows


class Index:
    """The index of a store; threads share it, and its few connections.

    Parameters
    ----------
    file : Path
        Is made where it is missing.

    Raises
    ------
    ExpertError
        A file that is none of ours, or of a later version of this package.
    """

    def __init__(self, file: Path) -> None:
        self._connections = Connections(file)
        self._rows = self._connections.rows
        self._lock = threading.Lock()
        self._likes: dict[str, _Signs] = {}
        self._answers: dict[tuple[str, tuple[str | int, ...]], tuple[int, list[int]]] = {}
        self._shown = Kept(self._read, _size, _SHOWN_BYTES)
        self._reading, self._comparing = threading.Lock(), threading.Lock()
        self._writes = 0
        self._last_row = 0
        with self._connections.writer() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            if found == 0 and not connection.execute("SELECT * FROM sqlite_master").fetchall():
                connection.executescript(
                    f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;"
                )
            elif found != FORMAT:
                raise ExpertError(
                    f"{file}: expected an index of version {FORMAT}, found version {found}"
                )

    def close(self) -> None:
        """Close its connections."""
        self._connections.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One writer's transaction; what was read before it is no longer all."""
        with self._connections.transaction() as connection:
            yield connection
        with self._lock:  # before whoever wrote it hears of it
            self._writes += 1
            self._answers.clear()

    # --- writing ------------------------------------------------------------------------------

    def add(self, expert: Expert, sketch: NDArray[np.int8]) -> Expert:
        """Name a version: the next of its name. What `expert.version` says is not asked."""
        tags = " ".join(f"{key} {value}" for key, value in sorted(expert.tags.items()))
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO names (name, next) VALUES (?, 1) ON CONFLICT DO NOTHING",
                (expert.name,),
            )
            name_id, version = connection.execute(
                "SELECT id, next FROM names WHERE name = ?", (expert.name,)
            ).fetchone()
            (highest,) = connection.execute("SELECT coalesce(max(id), 0) FROM versions").fetchone()
            # SQLite gives the number of a row that was deleted to another; what is kept in memory
            # by it would be the other's.
            row = self._last_row = 1 + max(highest, self._last_row)
            connection.execute(
                "INSERT INTO versions (id, name_id, version, digest, size, base_model, "
                "base_digest, config, tags, metrics, created, num_parameters, density, codec, "
                "start, layout_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    row, name_id, version, expert.digest, expert.size, expert.base_model,
                    expert.base_digest, json.dumps(expert.config, ensure_ascii=False),
                    json.dumps(expert.tags), json.dumps(expert.metrics), expert.created,
                    expert.num_parameters, expert.density, expert.codec, expert.start,
                    expert.layout_id,
                ),
            )  # fmt: skip
            connection.execute("INSERT INTO sketches VALUES (?, ?)", (row, sketch.tobytes()))
            connection.executemany(
                "INSERT INTO tags VALUES (?, ?, ?)",
                [(row, key, value) for key, value in expert.tags.items()],
            )
            connection.execute(
                "UPDATE names SET next = ?, newest = ? WHERE id = ?", (version + 1, row, name_id)
            )
            connection.execute("DELETE FROM words WHERE rowid = ?", (name_id,))
            connection.execute(
                "INSERT INTO words (rowid, name, tags, base_model) VALUES (?, ?, ?, ?)",
                (name_id, _split(expert.name), tags, _split(expert.base_model)),
            )
        (found,) = self._found("v.id = ?", row, config=True)
        return found

    def remove(self, name: str, version: int = 0) -> tuple[int, list[str]]:
        """Forget a version, or all of a name: how many those are, and digests no longer needed.

        Raises
        ------
        UnknownExpertError
        """
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT v.id, v.digest, n.id FROM versions v JOIN names n ON n.id = v.name_id "
                "WHERE n.name = ? AND (? = 0 OR v.version = ?)", (name, version, version),
            ).fetchall()  # fmt: skip
            if not rows:
                raise UnknownExpertError(f"no expert {Reference(name, version)}")
            name_id = rows[0][2]
            connection.execute("UPDATE names SET newest = NULL WHERE id = ?", (name_id,))
            connection.executemany("DELETE FROM versions WHERE id = ?", [(row[0],) for row in rows])
            newest = connection.execute(
                "SELECT id, tags, base_model FROM versions WHERE name_id = ? "
                "ORDER BY version DESC LIMIT 1", (name_id,),
            ).fetchone()  # fmt: skip
            connection.execute("DELETE FROM words WHERE rowid = ?", (name_id,))
            if newest is not None:
                tags = " ".join(f"{k} {v}" for k, v in sorted(json.loads(newest[1]).items()))
                connection.execute("UPDATE names SET newest = ? WHERE id = ?", (newest[0], name_id))
                connection.execute(
                    "INSERT INTO words (rowid, name, tags, base_model) VALUES (?, ?, ?, ?)",
                    (name_id, _split(name), tags, _split(newest[2])),
                )
            return len(rows), [
                digest
                for digest in sorted({row[1] for row in rows})
                if not connection.execute(
                    "SELECT 1 FROM versions WHERE digest = ? LIMIT 1", (digest,)
                ).fetchone()
            ]

    # --- reading ------------------------------------------------------------------------------

    def find(self, reference: Reference) -> Expert:
        """The version that a reference means, with its configuration.

        Raises
        ------
        UnknownExpertError
        """
        name = reference.name
        if reference.version:
            where, values = "n.name = ? AND v.version = ?", (name, reference.version)
        elif reference.digest:
            where = "n.name = ? AND v.digest >= ? AND v.digest <= ?"
            values = (name, reference.digest, reference.digest + "g")  # type: ignore[assignment]
        else:
            where, values = "n.name = ? AND v.id = n.newest", (name,)  # type: ignore[assignment]
        found = self._found(where, *values, order="v.version DESC", config=True)
        if not found:
            raise UnknownExpertError(f"no expert {reference}")
        if len({expert.digest for expert in found}) > 1:
            raise UnknownExpertError(f"{reference}: more than one digest begins so")
        return found[0]

    def versions(self, name: str, limit: int = 100) -> list[Expert]:
        """The versions of a name, the newest first, without their configurations."""
        return self._found("n.name = ?", name, order="v.version DESC", limit=limit)

    def page(self, after: str, limit: int) -> list[Expert]:
        """The newest version of each name after one, by name."""
        return self._found("n.name > ? AND v.id = n.newest", after, order="n.name", limit=limit)

    def search(
        self, words: str, tags: Mapping[str, str], base_model: str, limit: int
    ) -> list[Expert]:
        """Newest versions that have all words, tags and the base model; the best match first."""
        terms = _WORD.findall(words)[:_MAX_WORDS]
        if words.strip() and not terms:
            return []
        where, values = _narrowed(tags, base_model)
        source, order = "names n", "n.name"
        if terms:
            source, order = "words w JOIN names n ON n.id = w.rowid", "w.rank, n.name"
            where.append("words MATCH ?")
            values.append(" ".join(f'"{term}"*' for term in terms))
        sql = (  # one row: for each that Python is handed, its threads take turns
            "SELECT json_group_array(id) FROM ("
            f"SELECT v.id FROM {source} JOIN versions v ON v.name_id = n.id AND v.id = n.newest "
            f"WHERE {' AND '.join(where)} ORDER BY {order} LIMIT ?)"
        )
        for _ in range(_TRIES):
            rows = self._answer(sql, (*values, limit))
            found = self._shown.values(rows)
            if len(found) == len(rows):  # none was deleted in between
                break
        return [found[row] for row in rows if row in found]

    def _answer(self, sql: str, values: tuple[str | int, ...]) -> list[int]:
        """The rows that a search finds; as it was found before, where nothing was written since."""
        with self._lock:
            kept, writes = self._answers.get((sql, values)), self._writes
        if kept is not None and kept[0] == writes:
            return kept[1]
        ((text,),) = self._rows(sql, *values)
        rows: list[int] = json.loads(text)
        with self._lock:
            while len(self._answers) >= _MAX_ANSWERS:
                self._answers.pop(next(iter(self._answers)))
            self._answers[sql, values] = (writes, rows)
        return rows

    def like(
        self, expert: Expert, tags: Mapping[str, str], base_model: str, limit: int
    ) -> list[tuple[Expert, float]]:
        """Newest versions of other names, by the similarity of their sketches to an expert's.

        Raises
        ------
        UnknownExpertError
            It was deleted meanwhile.
        """
        ids, signs = self._newest(expert.layout_id)
        if tags or base_model:
            narrowed, values = _narrowed(tags, base_model)
            rows = self._rows(
                "SELECT v.id FROM names n JOIN versions v ON v.id = n.newest "
                f"WHERE {' AND '.join(narrowed)}", *values,
            )  # fmt: skip
            allowed = np.isin(ids, np.array([row[0] for row in rows], np.int64))
            ids, signs = ids[allowed], signs[allowed]
        own = self._rows(
            "SELECT s.sketch FROM names n JOIN versions v ON v.name_id = n.id "
            "JOIN sketches s ON s.version_id = v.id WHERE n.name = ? AND v.version = ?",
            expert.name, expert.version,
        )  # fmt: skip
        if not own:
            raise UnknownExpertError(f"no expert {expert.reference}: it was deleted just now")
        given = np.frombuffer(own[0][0], np.int8)
        with self._comparing:  # one fills the way to memory
            order = np.argsort(distances(bits(given), signs), kind="stable")
        found = self._read_sketches(ids[order[: max(_NEAREST, 2 * limit)]].tolist())
        sketches = np.frombuffer(b"".join(row[1] for row in found), np.int8).reshape(-1, SIZE)
        similarities = cosines(given, sketches)
        best = np.argsort(-similarities, kind="stable")[: limit + 1].tolist()
        of_row = {found[at][0]: float(similarities[at]) for at in best}
        shown = self._shown.values(list(of_row))
        pairs = [(each, of_row[row]) for row, each in shown.items() if each.name != expert.name]
        return sorted(pairs, key=lambda pair: (-pair[1], pair[0].name))[:limit]

    def _read(self, rows: Sequence[int]) -> list[tuple[int, Expert]]:
        """The versions of some rows, without their configurations."""
        marks = ", ".join("?" * len(rows))
        found = self._rows(
            f"SELECT {_COLUMNS}, NULL, v.id FROM names n JOIN versions v ON v.name_id = n.id "
            f"WHERE v.id IN ({marks})", *rows,
        )  # fmt: skip
        return [(row[-1], _expert(row[:-1])) for row in found]

    def _read_sketches(self, rows: Sequence[int]) -> list[tuple[int, bytes]]:
        marks = ", ".join("?" * len(rows))
        return self._rows(f"SELECT * FROM sketches WHERE version_id IN ({marks})", *rows)

    def _newest(self, layout_id: str) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Newest versions of a layout, and the signs of their sketches, shape (n, 32).

        They stay here until something is written; what was read of a version once is not read anew.
        One thread reads them, and others wait for it.
        """
        with self._lock:
            kept, writes = self._likes.get(layout_id), self._writes
        if kept is None or kept[0] != writes:
            with self._reading:
                with self._lock:
                    kept, writes = self._likes.get(layout_id), self._writes
                if kept is None or kept[0] != writes:
                    kept = self._read_newest(layout_id, kept, writes)
        return kept[1], kept[2]

    def _read_newest(self, layout_id: str, kept: _Signs | None, writes: int) -> _Signs:
        narrowed, _ = _narrowed({}, "")
        rows = self._rows(
            "SELECT v.id FROM versions v JOIN names n ON n.newest = v.id "
            f"WHERE v.layout_id = ? AND {' AND '.join(narrowed)} ORDER BY v.id", layout_id,
        )  # fmt: skip
        ids = np.array([row[0] for row in rows], np.int64)
        signs = np.zeros((len(ids), SIZE // 64), np.uint64)
        missing = np.ones(len(ids), bool)
        if kept is not None and len(kept[1]):
            at = np.minimum(np.searchsorted(kept[1], ids), len(kept[1]) - 1)
            here = kept[1][at] == ids
            signs[here], missing = kept[2][at[here]], ~here
        for start in range(0, int(missing.sum()), _AT_A_TIME):
            places = np.flatnonzero(missing)[start : start + _AT_A_TIME]
            for row, content in self._read_sketches(ids[places].tolist()):
                signs[np.searchsorted(ids, row)] = bits(np.frombuffer(content, np.int8))
        with self._lock:
            while len(self._likes) >= _MAX_LAYOUTS:
                self._likes.pop(next(iter(self._likes)))
            self._likes[layout_id] = (writes, ids, signs)
        return writes, ids, signs

    def digests(self) -> set[str]:
        """The digests of all versions."""
        return {row[0] for row in self._rows("SELECT DISTINCT digest FROM versions")}

    def has(self, digest: str) -> bool:
        """Is there a version with these bytes?"""
        return bool(self._rows("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", digest))

    def num_bytes(self) -> int:
        """The size of all blobs that versions stand for."""
        sql = "SELECT coalesce(sum(size), 0) FROM (SELECT DISTINCT digest, size FROM versions)"
        return int(self._rows(sql)[0][0])

    def check(self) -> list[str]:
        """What SQLite finds wrong with its file; nothing where all is well."""
        rows = [row[0] for row in self._rows("PRAGMA integrity_check(10)")]
        return [f"the index: {row}" for row in rows if row != "ok"]

    def _found(
        self, where: str, *values: Any, order: str = "v.id", limit: int = 2, config: bool = False,
    ) -> list[Expert]:  # fmt: skip
        last = "v.config" if config else "NULL"
        rows = self._rows(
            f"SELECT {_COLUMNS}, {last} FROM names n JOIN versions v ON v.name_id = n.id "
            f"WHERE {where} ORDER BY {order} LIMIT ?", *values, limit,
        )  # fmt: skip
        return [_expert(row) for row in rows]


def _narrowed(tags: Mapping[str, str], base_model: str) -> tuple[list[str], list[Any]]:
    """Conditions for tags and a base model, and their values."""
    where, values = [], []
    if "role" not in tags:  # starts are found by their names alone
        where.append(
            "v.id NOT IN (SELECT version_id FROM tags WHERE key = 'role' AND value = 'start')"
        )
    for key, value in tags.items():
        where.append("v.id IN (SELECT version_id FROM tags WHERE key = ? AND value = ?)")
        values += [key, value]
    if base_model:
        where.append("v.base_model = ?")
        values.append(base_model)
    return where, values


def _split(text: str) -> str:
    """A name and its parts as words: ``sections_v2`` is found by ``v2`` as well."""
    return f"{text} {text.replace('_', ' ')}"


def _size(expert: Expert) -> int:
    """About how many bytes a version and its message take."""
    texts = [*expert.tags, *expert.tags.values(), *expert.metrics, expert.base_model]
    return _EACH + sum(100 + 4 * len(text) for text in texts)


def _mapping(text: str) -> dict[str, Any]:
    """Tags or metrics; a search reads many, and most have none."""
    return dict(json.loads(text)) if text != "{}" else {}


def _expert(row: Any) -> Expert:
    name, version, digest, size, base_model, base_digest, tags, metrics, created = row[:9]
    num_parameters, density, codec, start, layout_id, config = row[9:]
    return Expert(
        name=name,
        version=version,
        digest=digest,
        size=size,
        base_model=base_model,
        base_digest=base_digest,
        config=json.loads(config) if config else {},
        tags=_mapping(tags),
        metrics=_mapping(metrics),
        created=created,
        num_parameters=num_parameters,
        density=density,
        codec=codec,
        start=start,
        layout_id=layout_id,
    )
