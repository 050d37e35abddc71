"""A run's figures, round by round, in trackers: the key ``track = "tensorboard,wandb,..."``.

accelerate's trackers write them. Where nothing else is set up, everything stays on this machine, in
the run's folder: TensorBoard's event files in ``tensorboard``, Weights & Biases' offline run in
``wandb``, MLflow's store ``mlflow.db``, trackio's database in ``trackio``. Their own environment
variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...) come before that.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from compeft_fl.errors import MissingPackageError
from compeft_fl.exchange.ledger import Ledger, RoundTotals
from compeft_fl.exchange.records import LOGGER
from compeft_fl.printable import one_line
from compeft_fl.results.journal import RoundRecord

__all__ = ["PACKAGES", "Trackers", "check_installed"]

PACKAGES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tensorboard": "tensorboardX",
        "wandb": "wandb",
        "mlflow": "mlflow",
        "trackio": "trackio",
    }
)
"""What may be tracked with -> the package that it needs."""

_PROJECT: Final = "compeft-fl"


def check_installed(names: tuple[str, ...]) -> None:
    """Raise MissingPackageError for a tracker whose package is not installed."""
    for name in names:
        for package in ("accelerate", PACKAGES[name]):
            if importlib.util.find_spec(package) is None:
                raise MissingPackageError(
                    f"track: {name} needs {package}, which is not installed: pip install {package}"
                )


class Trackers:
    """Writes a run's figures by round.

    Parameters
    ----------
    names : tuple of str
        Of `PACKAGES`.
    folder : Path
        The run's folder.
    settings : mapping of str to bool, int, float or str
        All keys of the run, which trackers show beside its figures.

    Raises
    ------
    MissingPackageError
        A tracker's package is not installed.
    """

    def __init__(self, names: tuple[str, ...], folder: Path, settings: Mapping[str, Any]) -> None:
        check_installed(names)
        self._trackers: dict[str, Any] = {}
        for name in names:
            with self._forgiving(name):
                tracker = _started(name, folder)
                self._trackers[name] = tracker
                if name != "tensorboard":  # where it would be a run of its own
                    tracker.store_init_configuration(dict(settings))

    def write(self, server_round: int, record: RoundRecord, ledger: Ledger) -> None:
        """Write one round, and the bytes of all rounds up to it."""
        values = dict(_figures(server_round, record, ledger))
        for name, tracker in list(self._trackers.items()):
            with self._forgiving(name):
                tracker.log(values, step=server_round)

    def close(self) -> None:
        """Say that the run has ended."""
        for name, tracker in list(self._trackers.items()):
            with self._forgiving(name):
                tracker.finish()

    @contextmanager
    def _forgiving(self, name: str) -> Iterator[None]:
        """A tracker that fails (a full disk, a lost network) costs its figures, not the run."""
        try:
            yield
        except Exception as error:
            self._trackers.pop(name, None)
            LOGGER.warning("nothing more is written for %s: %s", name, one_line(error, 300))


def _figures(server_round: int, record: RoundRecord, ledger: Ledger) -> Iterator[tuple[str, float]]:
    """Yield names and values of a round."""
    scalars = {
        "test/accuracy": record.accuracy,
        "test/loss": record.loss,
        **{f"test/{name}": value for name, value in record.more.items()},
        "train/loss": record.train_loss,
        "round/seconds": record.seconds,
        "round/replies": record.replies,
        "round/set_aside": record.set_aside,
    }
    for name, value in scalars.items():
        if value is not None:
            yield name, value
    for direction in ("up", "down"):
        here = ledger.totals.get((server_round, direction), RoundTotals())
        before = [
            totals
            for (number, way), totals in ledger.totals.items()
            if way == direction and number <= server_round
        ]
        for what in ("raw_bytes", "payload_bytes", "message_bytes"):
            yield f"{direction}/{what}", getattr(here, what)
            yield f"{direction}_so_far/{what}", sum(getattr(t, what) for t in before)


def _started(name: str, folder: Path) -> Any:
    """Return accelerate's tracker of that name, at work."""
    from accelerate import PartialState, tracking

    PartialState()  # trackers log through it
    here = folder.absolute()
    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker("tensorboard", logging_dir=here)
    elif name == "wandb":
        if not (os.getenv("WANDB_MODE") or os.getenv("WANDB_API_KEY")):
            os.environ["WANDB_MODE"] = "offline"
        tracker = tracking.WandBTracker(_PROJECT, name=here.name, dir=str(here))
    elif name == "mlflow":
        os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{here / 'mlflow.db'}")
        tracker = tracking.MLflowTracker(_PROJECT, run_name=here.name)
    else:
        os.environ.setdefault("TRACKIO_DIR", str(here / "trackio"))
        tracker = tracking.TrackioTracker(_PROJECT, name=here.name)
    tracker.start()
    return tracker
