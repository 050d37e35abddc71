"""Instructions with their responses: from the columns of a table to rows of turns.

Three shapes are read: a prompt and a response; ``messages``, a list of turns with ``role`` and
``content``; and Alpaca's ``instruction``, ``input`` and ``output``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compeft_fl.app.config import AppConfig, suggestion
from compeft_fl.app.tasks.tables import Table, load_tables, three_splits
from compeft_fl.errors import ConfigError
from compeft_fl.printable import quoted

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ROLES", "Conversation", "Conversations", "Instructions", "Turn", "load"]

ROLES: Final = ("system", "user", "assistant", "tool")
_ALPACA: Final = ("instruction", "input", "output")


@dataclass(frozen=True)
class Turn:
    """What one side says.

    Parameters
    ----------
    role : str
        One of `ROLES`; what ``assistant`` says is learned.
    content : str
    """

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the last is the response.

    Parameters
    ----------
    turns : tuple of Turn
    where : str
        Split and row in the data, for errors.
    shape : str
        ``pair``, ``messages`` or ``alpaca``.
    alpaca : (str, str)
        Of that shape: the instruction, and the input that it is about.
    """

    turns: tuple[Turn, ...]
    where: str = ""
    shape: str = "pair"
    alpaca: tuple[str, str] = ("", "")

    @property
    def response(self) -> str:
        """The last turn."""
        return self.turns[-1].content


@dataclass(frozen=True)
class Conversations:
    """Rows of a split.

    Parameters
    ----------
    rows : tuple of Conversation
    groups : tuple of str
        Each row's value of the partition column; empty where there is none.
    """

    rows: tuple[Conversation, ...]
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def classes(self) -> NDArray[np.int64]:
        """What a Dirichlet partition is uneven in: the value of the partition column."""
        if not self.groups:
            return np.zeros(len(self.rows), np.int64)
        return np.unique(np.asarray(self.groups), return_inverse=True)[1].astype(np.int64)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> Conversations:
        """Return the rows at `indices`, in that order."""
        return Conversations(
            tuple(self.rows[i] for i in indices),
            tuple(self.groups[i] for i in indices) if self.groups else (),
        )


@dataclass(frozen=True)
class Instructions:
    """The splits of an instruction task.

    Parameters
    ----------
    train, validation, test : Conversations
        Rows to train on (partitioned over the nodes), to choose with, and to score.
    """

    train: Conversations
    validation: Conversations
    test: Conversations


def load(config: AppConfig) -> Instructions:
    """Return the data that the configuration names.

    Raises
    ------
    ConfigError
        Where the file, a column, a split or the data set does not exist, a split is empty, or a
        row is not what it should be: the error names it.
    """
    rows = {name: _read(name, table, config) for name, table in load_tables(config).items()}
    return Instructions(*three_splits(rows, config))


def _read(split: str, table: Table, config: AppConfig) -> Conversations:
    """Return a split's rows."""
    make, columns = _shape(table, config)
    groups: tuple[str, ...] = ()
    if config.partition_column in table:
        groups = tuple(str(value) for value in table[config.partition_column])
    elif config.partition != "iid":
        raise ConfigError(
            f'partition-column: {config.data} has no column "{config.partition_column}"'
            f"{suggestion(config.partition_column, table)}; partition=iid needs none"
        )
    rows = zip(*(table[column] for column in columns), strict=True)
    made = [make(f"row {index} of {split}", *values) for index, values in enumerate(rows, 1)]
    return Conversations(tuple(made), groups)


def _shape(table: Table, config: AppConfig) -> tuple[Callable[..., Conversation], list[str]]:
    """Return what makes a conversation of a row, and of which columns."""
    prompt, response, messages = (
        config.prompt_column,
        config.response_column,
        config.messages_column,
    )
    if messages in table:
        return _of_messages, [messages]
    if prompt in table and response in table:
        return _of_pair, [prompt, response]
    instruction, given, output = _ALPACA
    if instruction in table and output in table:
        columns = [instruction, output, given]
        return _of_alpaca, columns if given in table else columns[:2]
    if prompt in table or instruction in table:
        wanted = response if prompt in table else output
        key = "response-column" if prompt in table else "data"
        raise ConfigError(
            f'{key}: {config.data} has no column "{wanted}" for the response'
            f"{suggestion(wanted, table)}"
        )
    raise ConfigError(
        f'data: expected columns "{prompt}" and "{response}", or "{messages}", or "{instruction}" '
        f'and "{output}", found {", ".join(table)} in {config.data}: set prompt-column and '
        "response-column, or messages-column"
    )


def _of_pair(where: str, prompt: Any, response: Any) -> Conversation:
    turns = Turn("user", _text(where, "prompt", prompt)), _response(where, response)
    return Conversation(turns, where)


def _of_alpaca(where: str, instruction: Any, output: Any, given: Any = "") -> Conversation:
    instruction = _text(where, "instruction", instruction)
    given = "" if given is None else str(given).strip()
    asked = Turn("user", f"{instruction}\n\n{given}" if given else instruction)
    return Conversation((asked, _response(where, output)), where, "alpaca", (instruction, given))


def _of_messages(where: str, messages: Any) -> Conversation:
    if isinstance(messages, str):  # as CSV holds it
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise ConfigError(
                f"data: {where}: expected messages as JSON, found other text"
            ) from None
    if not isinstance(messages, Sequence) or not messages:
        raise ConfigError(f"data: {where}: expected a list of messages, found {quoted(messages)}")
    turns = [_turn(where, message) for message in messages]
    if turns[-1].role != "assistant" or len(turns) < 2:
        raise ConfigError(
            f"data: {where}: expected messages that end with the assistant's response, found "
            f"{', '.join(turn.role for turn in turns[-3:])}"
        )
    return Conversation((*turns[:-1], _response(where, turns[-1].content)), where, "messages")


def _turn(where: str, message: Any) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise ConfigError(
            f"data: {where}: expected messages with role and content, found {quoted(message)}"
        )
    role = message["role"]
    if role not in ROLES:
        raise ConfigError(
            f"data: {where}: expected a role of {', '.join(ROLES)}, found {quoted(role)}"
        )
    content = message["content"]
    if not isinstance(content, str):
        raise ConfigError(f"data: {where}: expected text in {role}'s message, found none")
    return Turn(role, content)


def _text(where: str, what: str, value: Any) -> str:
    if value is None or not str(value).strip():
        raise ConfigError(f"data: {where}: expected a {what}, found none: leave the row out")
    return str(value)


def _response(where: str, value: Any) -> Turn:
    return Turn("assistant", _text(where, "response", value))
