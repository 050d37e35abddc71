"""Flower strategies that read ComPEFT's Updates; this is the path to import them from.

>>> from compeft_fl.strategies import ComPEFTTies
>>> strategy = ComPEFTTies(scaling=0.4, min_train_nodes=2)
"""

from __future__ import annotations

from strategies import (
    Checkpoint,
    CheckpointFolder,
    Checkpointing,
    ComPEFTAverage,
    ComPEFTStrategy,
    ComPEFTTaskArithmetic,
    ComPEFTTies,
    Compressed,
    DownlinkOptions,
    ReplyStream,
    RoundCount,
    RoundCounts,
    RoundObserver,
    StreamingGrid,
    TransferObserver,
    Transfers,
)

__all__ = [
    "Checkpoint",
    "CheckpointFolder",
    "Checkpointing",
    "ComPEFTAverage",
    "ComPEFTStrategy",
    "ComPEFTTaskArithmetic",
    "ComPEFTTies",
    "Compressed",
    "DownlinkOptions",
    "ReplyStream",
    "RoundCount",
    "RoundCounts",
    "RoundObserver",
    "StreamingGrid",
    "TransferObserver",
    "Transfers",
]
