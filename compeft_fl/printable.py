r"""Text of others made fit for a terminal and a log: no control characters, and not too long.

Names, error texts and file names come from strangers. What a terminal acts on (escape sequences,
line ends, marks that turn the direction of writing) is shown as Python would escape it; what is
long is cut in its middle.
"""

from __future__ import annotations

import logging
from typing import Any, Final

__all__ = ["MAX_TEXT", "PrintableFilter", "one_line", "printable", "quoted"]

MAX_TEXT: Final = 900  # characters of an error's text
_MAX_NAME: Final = 80
_MAX_TRACEBACK: Final = 20_000


def printable(text: object, limit: int = MAX_TEXT, keep: str = "") -> str:
    r"""A text whose characters all print, of at most about ``limit`` characters.

    Parameters
    ----------
    text : object
        ``str()`` is taken of it.
    limit : int
        What is longer loses its middle, and says how long it was.
    keep : str
        Characters that stay though they do not print: line ends, say.

    Examples
    --------
    >>> printable("a\x1b[2Jb\u202ec")
    'a\\x1b[2Jb\\u202ec'
    >>> printable(40 * "name", limit=20)
    'namenamenamen ... (160 characters) ... mename'
    """
    text = _cut(text if isinstance(text, str) else str(text), limit)
    if text.isprintable():
        return text
    escaped = "".join(
        character if character.isprintable() or character in keep else _escaped(character)
        for character in text
    )
    return _cut(escaped, limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit + 40:  # the mark's own length
        return text
    head, tail = 2 * limit // 3, limit // 3
    return f"{text[:head]} ... ({len(text)} characters) ... {text[len(text) - tail :]}"


def _escaped(character: str) -> str:
    """As `repr` writes it; lone surrogates too, which no encoding takes."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def one_line(text: object, limit: int = MAX_TEXT) -> str:
    r"""A text on one line: any run of blanks and line ends is one blank.

    Examples
    --------
    >>> one_line("two\n  lines")
    'two lines'
    """
    text = text if isinstance(text, str) else str(text)
    return printable(" ".join(text.split()), limit)


def quoted(name: object) -> str:
    """A name of a stranger's in quotes, for an error's text: printable and short.

    Examples
    --------
    >>> quoted("lora_A")
    "'lora_A'"
    """
    return f"'{printable(name, _MAX_NAME)}'"


class PrintableFilter(logging.Filter):
    """Makes what a log line is given printable; the line's own form, and numbers, stay.

    Examples
    --------
    >>> logger = logging.getLogger("compeft_fl.example")
    >>> logger.addFilter(PrintableFilter())
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place, and let it pass."""
        if isinstance(record.args, tuple):
            record.args = tuple(_loggable(argument) for argument in record.args)
        if record.exc_info and not record.exc_text:
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text = printable(text, _MAX_TRACEBACK, keep="\n")
        return True


def _loggable(argument: Any) -> Any:
    if isinstance(argument, (int, float)) or argument is None:
        return argument
    return printable(argument, 4 * MAX_TEXT)
