"""A run's accuracy and bytes for TensorBoard: the key ``tensorboard = true``.

Event files go to ``tensorboard`` in the run's folder: ``tensorboard --logdir runs`` shows all runs.
They are written by tensorboardX, which is an extra (``pip install 'compeft-fl[tensorboard]'``).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final

from compeft_fl.errors import ConfigError
from compeft_fl.exchange.ledger import Ledger, RoundTotals
from compeft_fl.exchange.records import LOGGER
from compeft_fl.results.journal import RoundRecord

__all__ = ["Board"]

FOLDER: Final = "tensorboard"


class Board:
    """Writes a run's scalars by round.

    Parameters
    ----------
    folder : Path
        The run's folder.

    Raises
    ------
    ConfigError
        tensorboardX is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "tensorboard: tensorboardX is not installed: pip install 'compeft-fl[tensorboard]'"
            ) from None
        self._broken = False
        self._writer: Any = SummaryWriter(str(folder / FOLDER), write_to_disk=True)

    def write(self, server_round: int, record: RoundRecord, ledger: Ledger) -> None:
        """Write one round, and the bytes of all rounds up to it."""
        scalars = {
            "test/accuracy": record.accuracy,
            "test/loss": record.loss,
            "train/loss": record.train_loss,
            "round/seconds": record.seconds,
            "round/replies": record.replies,
            "round/set_aside": record.set_aside,
        }
        for direction in ("up", "down"):
            here = ledger.totals.get((server_round, direction), RoundTotals())
            before = [
                totals
                for (number, way), totals in ledger.totals.items()
                if way == direction and number <= server_round
            ]
            for what in ("raw_bytes", "payload_bytes", "message_bytes"):
                scalars[f"{direction}/{what}"] = getattr(here, what)
                scalars[f"{direction}_so_far/{what}"] = sum(getattr(t, what) for t in before)
        if self._broken:
            return
        try:
            for name, value in scalars.items():
                if value is not None:
                    self._writer.add_scalar(name, value, server_round)
            self._writer.flush()
        except OSError as error:  # a full disk, say: the run goes on without
            self._broken = True
            LOGGER.warning("nothing more is written for TensorBoard: %s", error)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._writer.close()
