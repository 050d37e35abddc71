"""Flower strategies that read ComPEFT's Updates. Import them from `compeft_fl.strategies`."""

from __future__ import annotations

from strategies.average import ComPEFTAverage
from strategies.broadcast import DownlinkOptions
from strategies.checkpoint import Checkpoint, CheckpointFolder
from strategies.compeft_strategy import ComPEFTStrategy
from strategies.compressed import Compressed
from strategies.observer import RoundCount, RoundCounts, RoundObserver, TransferObserver
from strategies.rounds import Checkpointing
from strategies.streaming_grid import ReplyStream, StreamingGrid
from strategies.task_arithmetic import ComPEFTTaskArithmetic
from strategies.ties import ComPEFTTies
from strategies.transfers import Transfers

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
