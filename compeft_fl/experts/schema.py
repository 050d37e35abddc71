"""The tables of an index, in SQLite's words."""

from __future__ import annotations

from typing import Final

__all__ = ["FORMAT", "SCHEMA"]

FORMAT: Final = 2  # the file's ``user_version``
SCHEMA: Final = """
CREATE TABLE names (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    next INTEGER NOT NULL,              -- the number of its next version; never goes back
    newest INTEGER REFERENCES versions  -- none: all were deleted
);
CREATE TABLE versions (
    id INTEGER PRIMARY KEY,
    name_id INTEGER NOT NULL REFERENCES names,
    version INTEGER NOT NULL,
    digest TEXT NOT NULL,
    size INTEGER NOT NULL,
    base_model TEXT NOT NULL,
    base_digest TEXT NOT NULL,
    config TEXT NOT NULL,
    tags TEXT NOT NULL,
    metrics TEXT NOT NULL,
    created REAL NOT NULL,
    num_parameters INTEGER NOT NULL,
    density REAL NOT NULL,
    codec TEXT NOT NULL,
    start TEXT NOT NULL,
    layout_id TEXT NOT NULL,
    UNIQUE (name_id, version)
);
CREATE TABLE sketches ( -- apart, so that the rest is read without them
    version_id INTEGER PRIMARY KEY REFERENCES versions ON DELETE CASCADE,
    sketch BLOB NOT NULL
);
CREATE INDEX versions_layout ON versions (layout_id);
CREATE INDEX versions_digest ON versions (digest);
CREATE INDEX names_newest ON names (newest);
CREATE TABLE tags (
    version_id INTEGER NOT NULL REFERENCES versions ON DELETE CASCADE,
    key TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (key, value, version_id)
) WITHOUT ROWID;
CREATE INDEX tags_version ON tags (version_id);
CREATE VIRTUAL TABLE words USING fts5 (name, tags, base_model, tokenize = 'unicode61');
"""
