"""Full fine-tuning: whole checkpoint folders to small files and back, piece by piece.

>>> from compeft_fl.full import compress_checkpoint, merge_checkpoints, restore_checkpoint
"""

from __future__ import annotations

from compeft_fl.full.compression import compress_checkpoint
from compeft_fl.full.files import StoredCheckpoint, is_checkpoint_file, read_checkpoint
from compeft_fl.full.folders import Checkpoint, is_checkpoint_folder, open_checkpoint
from compeft_fl.full.restoring import merge_checkpoints, restore_checkpoint

__all__ = [
    "Checkpoint",
    "StoredCheckpoint",
    "compress_checkpoint",
    "is_checkpoint_file",
    "is_checkpoint_folder",
    "merge_checkpoints",
    "open_checkpoint",
    "read_checkpoint",
    "restore_checkpoint",
]
