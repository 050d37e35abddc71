"""What comes up: each reply of a round checked on its own, and read, without side effects."""

from __future__ import annotations

import itertools
import re
import reprlib
from dataclasses import dataclass

from flwr.app import Message, MetricRecord, RecordDict

from compeft_fl.errors import CompeftError, MalformedError, ParameterError
from compeft_fl.exchange.protocol import Answer
from compeft_fl.exchange.records import (
    CARRIED_KEY,
    EXCHANGE_KEY,
    LOGGER,
    NUMPY_STYPE,
    array_records,
    find_answer,
    find_update,
    metric_records,
)
from compeft_fl.server.privacy import mods_hint
from compeft_fl.wire.messages import STYPE

__all__ = ["MAX_WEIGHT", "Reply", "describe", "one_line", "received", "update_of", "weight_of"]

MAX_WEIGHT = 1e12  # no client has more examples; plausible lies are another matter
MIN_WEIGHT = 1e-30  # below, sums of weighted values would be lost in rounding to 0
MAX_BESIDE = 1 << 20  # bytes of records beside an Update
_MAX_REASON = 400  # characters of a reason in the log
_MAX_READ = 1 << 16
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_KEYS = itertools.count()


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply as it came; the stages of a round hand it on.

    Attributes
    ----------
    node_id : int
        The node that was asked, whatever the reply says of its sender.
    message : flwr.app.Message
    num_bytes : int
        Of its Arrays, whatever they are worth.
    key : int
        Its own among all replies of this process.
    question : flwr.app.Message, optional
        The message that it answers, as it was sent; None where that is not known.
    answer : Answer, optional
        What the node says of itself.
    problem : str, optional
        Why it is no use, as far as that shows without reading its Update.
    is_second : bool
        A reply to a message that has one.
    """

    node_id: int
    message: Message
    num_bytes: int
    key: int
    question: Message | None = None
    answer: Answer | None = None
    problem: str | None = None
    is_second: bool = False


def received(message: Message, question: Message | None, answered: set[str]) -> Reply:
    """Look at a reply that has come: is it one at all, and what does it say of its node?

    Parameters
    ----------
    message : flwr.app.Message
    question : flwr.app.Message, optional
        What it answers.
    answered : set of str
        The ids of this round's messages that have a reply; this one's is added.

    Returns
    -------
    Reply
        What is wrong with it is in its ``problem``; nothing is raised.
    """
    metadata = message.metadata
    is_second = bool(metadata.reply_to_message_id) and metadata.reply_to_message_id in answered
    answered.add(metadata.reply_to_message_id)
    # Replies that Flower makes for a node that is gone carry the server's id as their sender.
    node_id = question.metadata.dst_node_id if question else metadata.src_node_id
    num_bytes, answer, problem = 0, None, None
    try:
        _check(message, is_second)
        num_bytes = num_array_bytes(message.content)
        _check_beside(message.content)
        answer = find_answer(message.content)
    except CompeftError as error:
        problem = describe(error)
    except Exception as error:
        # No client may stop the round, not even by way of a mistake of this program.
        LOGGER.exception("an unexpected error while looking at the reply of node %d", node_id)
        problem = describe(error)
    return Reply(node_id, message, num_bytes, next(_KEYS), question, answer, problem, is_second)


def _check(message: Message, is_second: bool) -> None:
    """Raise for what is no answer at all."""
    if is_second:
        raise MalformedError("expected one reply to a message, found a second")
    if message.has_error():
        reason = one_line(f"error reply, code {message.error.code}: {message.error.reason}")
        raise CompeftError(reason + _hint(reason))
    if not message.has_content():
        raise MalformedError("expected a reply with content, found none")


def _hint(reason: str) -> str:
    """What to do about a ClientApp, or a mod, that was given an Update and wants arrays."""
    if STYPE not in reason:
        return mods_hint(reason)
    return (
        "; it was given an Update and wants arrays: put CompressionMod into the client, "
        "as the first of its mods"
    )


def _check_beside(content: RecordDict) -> None:
    """Raise for a reply that brings an Update, and far more that nobody asked for."""
    found = find_update(content)
    if found is None:
        return
    # Carried tensors have a limit of their own. Nothing is made bigger to be measured.
    others = (record.count_bytes() for key, record in content.items() if key != CARRIED_KEY)
    beside = sum(others) - sum(map(len, found[1]))
    if beside > MAX_BESIDE:
        raise MalformedError(
            f"expected at most {MAX_BESIDE} bytes of records beside the Update, found {beside}"
        )


def num_array_bytes(content: RecordDict) -> int:
    """The bytes of all Arrays of a message."""
    return sum(
        len(array.data) for record in array_records(content).values() for array in record.values()
    )


def update_of(content: RecordDict) -> tuple[str, tuple[bytes, ...]]:
    """The Update of a reply: the key of its ArrayRecord, and the bytes of its parts.

    Raises
    ------
    MalformedError
        None, or more than one.
    """
    found = find_update(content)
    if found is not None:
        return found
    stypes = {each.stype for rec in array_records(content).values() for each in rec.values()}
    what = "plain arrays" if NUMPY_STYPE in stypes else "none"
    hint = "put CompressionMod into the client: ClientApp(mods=[CompressionMod()])"
    if EXCHANGE_KEY in content:
        hint = "CompressionMod is there; a mod before it may have replaced it"
        if what == "none":
            hint = "the train function returned no ArrayRecord"
    raise MalformedError(f"expected an Update in the reply, found {what}; {hint}")


def weight_of(content: RecordDict, weighted_by_key: str) -> tuple[str, MetricRecord, float]:
    """A reply's one MetricRecord, its key, and the weight in it.

    Raises
    ------
    MalformedError
        Not exactly one MetricRecord.
    ParameterError
        A weight that is missing, no number, or not between `MIN_WEIGHT` and `MAX_WEIGHT`.
    """
    records = metric_records(content)
    if len(records) != 1:
        raise MalformedError(f"expected one MetricRecord in the reply, found {len(records)}")
    key, metrics = next(iter(records.items()))
    weight = metrics.get(weighted_by_key)
    if not isinstance(weight, int | float) or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
        raise ParameterError(
            f"expected a weight in [{MIN_WEIGHT:g}, {MAX_WEIGHT:g}] under {weighted_by_key!r} "
            f"of the metrics, found {reprlib.repr(weight)}"
        )
    return key, metrics, float(weight)


def describe(error: Exception) -> str:
    """The error's class, where it says more than the message, and the message."""
    return str(error) if type(error) is CompeftError else f"{type(error).__name__}: {error}"


def one_line(text: str) -> str:
    """A reason for the log: what clients write can be long, in colour, and have line breaks.

    Of a long one, its beginning and its end: Python's tracebacks end with the error.
    """
    text = " ".join(_COLOUR.sub("", text[:_MAX_READ]).split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    half = _MAX_REASON // 2
    return text if len(text) <= _MAX_REASON else f"{text[:half]} ... {text[-half:]}"
