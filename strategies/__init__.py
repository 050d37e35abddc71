"""Flower strategies that read ComPEFT's Updates. Import them from `compeft_fl.strategies`."""

from __future__ import annotations

from compeft_fl.server.bounds import ReplyBounds
from compeft_fl.server.checkpoint import Checkpoint, CheckpointFolder
from compeft_fl.server.downlink_options import DownlinkOptions
from compeft_fl.server.mixed_ranks import MixedRanks
from compeft_fl.server.observer import (
    BoundsObserver,
    RoundCount,
    RoundCounts,
    RoundObserver,
    TransferObserver,
)
from compeft_fl.server.rounds import Checkpointing
from compeft_fl.server.sign_agreement import SignAgreementFilter
from compeft_fl.server.streaming_grid import ReplyStream, StreamingGrid
from compeft_fl.server.transfers import Transfers
from compeft_fl.server.upload_budget import UploadBudget
from compeft_fl.strategies.average import ComPEFTAverage
from compeft_fl.strategies.compeft_strategy import ComPEFTStrategy
from compeft_fl.strategies.compressed import Compressed
from compeft_fl.strategies.task_arithmetic import ComPEFTTaskArithmetic
from compeft_fl.strategies.ties import ComPEFTTies

__all__ = [
    "BoundsObserver",
    "Checkpoint",
    "CheckpointFolder",
    "Checkpointing",
    "ComPEFTAverage",
    "ComPEFTStrategy",
    "ComPEFTTaskArithmetic",
    "ComPEFTTies",
    "Compressed",
    "DownlinkOptions",
    "MixedRanks",
    "ReplyBounds",
    "ReplyStream",
    "RoundCount",
    "RoundCounts",
    "RoundObserver",
    "SignAgreementFilter",
    "StreamingGrid",
    "TransferObserver",
    "Transfers",
    "UploadBudget",
]
