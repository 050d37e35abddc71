"""After Flower's custom-mods: mods of an app's own, which look at messages and at the context."""

from __future__ import annotations

import time
from typing import Any

from flwr.app import Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from flower_apps import quickstart_pytorch

norms: list[float] = []  # of the weights that the mod saw come back


def parameter_size_mod(msg: Message, context: Context, call_next: Any) -> Message:
    """Looks at ordinary weights, on the way in and out."""
    for record in msg.content.array_records.values():
        assert sum(record[key].numpy().size for key in record) > 4000
    reply = call_next(msg, context)
    for record in reply.content.array_records.values():
        norms.append(float(sum((record[key].numpy() ** 2).sum() for key in record)))
    return reply


def time_mod(msg: Message, context: Context, call_next: Any) -> Message:
    """Keeps something in the context, from message to message."""
    started = time.time()
    reply = call_next(msg, context)
    seen = context.state.metric_records.get("time_mod", MetricRecord({"messages": 0}))
    seen["messages"] += 1
    context.state["time_mod"] = seen
    assert time.time() >= started
    return reply


def client_app(*mods: Any) -> ClientApp:
    return quickstart_pytorch.client_app(*mods, parameter_size_mod, time_mod)


main, strategy = quickstart_pytorch.main, quickstart_pytorch.strategy
