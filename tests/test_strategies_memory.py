"""The server's memory does not grow with the number of clients."""

from __future__ import annotations

import contextlib
import gc
import tracemalloc
import weakref

import numpy as np
import pytest
import tiny
from bad_replies import BAD_REPLIES
from flwr.app import ConfigRecord
from local_grid import LocalGrid

from compeft_fl.errors import NoUsableReplyError
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import ComPEFTAverage, ComPEFTTaskArithmetic, ComPEFTTies


class Watched(LocalGrid):
    """Counts the replies that are alive whenever another one is about to be made."""

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        self.alive = [ref for ref in getattr(self, "alive", []) if ref() is not None]
        self.most = max(getattr(self, "most", 0), len(self.alive))
        for reply in replies:
            self.alive.append(weakref.ref(reply))
            if reply.has_content():
                self.alive += [weakref.ref(record) for record in reply.content.values()]
        return replies


@pytest.mark.parametrize("fault", [None, "cut off", "nan values", "no mod", "an error reply"])
def test_no_reply_is_alive_when_the_next_one_is_pulled(fault):
    make = BAD_REPLIES[fault][0] if fault else None
    grid = Watched(
        tiny.client_app(CompressionMod()),
        6,
        fault=(lambda node, reply: make(reply)) if make else None,
    )
    strategy = ComPEFTTies(fraction_evaluate=0.0)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(NoUsableReplyError) if fault else contextlib.nullcontext():
            strategy.start(grid, tiny.arrays(), num_rounds=1)
    finally:
        gc.enable()
    assert grid.most == 0


@pytest.mark.parametrize("kind", [ComPEFTAverage, ComPEFTTaskArithmetic, ComPEFTTies])
def test_memory_does_not_grow_with_the_number_of_clients(kind):
    size = 200_000
    state = {"w": np.zeros(size, np.float32)}

    def change(arrays, context):
        return {"w": arrays["w"] + np.float32(0.01) * (np.arange(size) % context.node_id == 0)}

    def peak(nodes: int) -> int:
        app = tiny.client_app(CompressionMod(codec="dense"), train=change)
        grid = LocalGrid(app, nodes)
        strategy = kind(fraction_evaluate=0.0)
        messages = list(strategy.configure_train(1, tiny.arrays(state), ConfigRecord(), grid))
        replies = list(grid.send_and_receive(messages))

        def one_by_one():
            while replies:
                yield replies.pop()

        gc.collect()
        tracemalloc.start()
        try:
            strategy.aggregate_train(1, one_by_one())
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # imports and compiles
    few, many = peak(6), peak(16)  # the first four wait
    assert few > 8 * size
    assert many < few + 2 * size  # ten more replies: less than half of one
