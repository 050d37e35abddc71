"""What ``compeft-fl run`` shows: a live bar, a line for each round, and a table in the end."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from compeft_fl.app.config import AppConfig, keys
from compeft_fl.app.exchange_keys import COMPRESSED_PREFIX
from compeft_fl.app.imports import at_once, import_peft
from compeft_fl.app.server_app import build_strategy, run_folder
from compeft_fl.app.tasks.base import check_packages
from compeft_fl.app.tasks.tables import check_file
from compeft_fl.errors import ConfigError
from compeft_fl.printable import one_line, printable
from compeft_fl.results import overhead, report, units
from compeft_fl.results.trackers import check_installed
from compeft_fl.runs import launch
from compeft_fl.runs.scenario import SIMULATION_DEFAULTS, SIMULATION_HELP, Scenario
from compeft_fl.server.checkpoint import alone_in
from compeft_fl.strategies import RoundCounts

__all__ = ["resume", "run", "show_keys"]

Launcher: TypeAlias = Callable[[Scenario, Path, Callable[[dict[str, Any]], None]], launch.Outcome]

SCENARIO_FILE: Final = "scenario.json"
FAILED: Final = 1
BAD_CONFIG: Final = 2
_BY_SIGNAL: Final = 128


class _Stopped(BaseException):
    """A signal asks for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run(
    arguments: Sequence[str],
    out: Path | None = None,
    *,
    launcher: Launcher = launch.simulate,
    command: str = "run",
) -> int:
    """Run a scenario with its overrides, show how it goes, and return the exit code.

    Parameters
    ----------
    arguments : sequence of str
        A scenario file, ``key=value``, or both.
    out : Path, optional
        The folder for results.
    launcher : callable
        What runs it: `compeft_fl.runs.launch.simulate` or another of that form.
    command : str
        The name of the command line's command, for messages.

    Raises
    ------
    ConfigError
        Where an argument, a key or a value does not fit.
    """
    scenario = _scenario(arguments)
    if out is not None:
        scenario = scenario.with_run(out=str(out))
    _check(scenario.config)
    folder = run_folder(scenario.config)
    folder.mkdir(parents=True)
    (folder / SCENARIO_FILE).write_text(json.dumps(scenario.to_plain(), indent=1) + "\n")
    return _go(scenario, folder, launcher, command)


def resume(
    folder: Path, arguments: Sequence[str] = (), *, launcher: Launcher = launch.simulate
) -> int:
    """Go on with a run that was killed or failed, from its newest checkpoint.

    Parameters
    ----------
    folder : Path
        The run's folder.
    arguments : sequence of str
        ``key=value``, where it shall go on otherwise (more rounds, say).

    Raises
    ------
    ConfigError
        No folder of a run, one that has completed, or a key or a value that does not fit.
    StateError
        A server works in it.
    """
    try:
        plain = json.loads((folder / SCENARIO_FILE).read_text(encoding="utf-8"))
        run, simulation = dict(plain["run"].items()), dict(plain["simulation"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"expected the folder of a run, with {SCENARIO_FILE}: {folder}") from None
    if (folder / report.SUMMARY_FILE).exists() and not arguments:
        raise ConfigError(f"the run in {folder} has completed: give more rounds to go on")
    folder = folder.resolve()
    run = {**run, "resume": True, "run-dir": str(folder)}
    scenario = Scenario.of(run, simulation, arguments)
    _check(scenario.config)
    with alone_in(folder):  # what the ServerApp would say half a minute later
        pass
    return _go(scenario, folder, launcher, "run")


def _go(scenario: Scenario, folder: Path, launcher: Launcher, command: str) -> int:
    """Run, show, and say how it went."""
    report.link_latest(folder)
    started = time.perf_counter()
    try:
        with _signals(), _Live(scenario) as live:
            outcome = launcher(scenario, folder, live.on_event)
    except _Stopped as stopped:
        with suppress(OSError):  # the terminal may be gone
            print(printable(f"stopped; what there is lies in {folder}"), file=sys.stderr)
        return _BY_SIGNAL + stopped.number
    except launch.FlowerError as error:
        outcome = launch.Outcome(False, str(error))
    if not outcome.completed:
        detail = outcome.detail.removeprefix(f"{ConfigError.__name__}: ")
        print(one_line(f"compeft-fl {command}: error: {detail}"), file=sys.stderr)
        print(printable(f"Flower's log: {folder / launch.LOG_FILE}"), file=sys.stderr)
        return FAILED if detail == outcome.detail else BAD_CONFIG
    summary = json.loads((folder / report.SUMMARY_FILE).read_text(encoding="utf-8"))
    console = Console()
    console.print(report.table(summary))
    if (tasks := report.tasks_table(summary)) is not None:
        console.print(tasks)
    if "ledger" in summary:
        console.print(overhead.table(summary))
    seconds = time.perf_counter() - started
    where = escape(printable(folder))
    console.print(f"done in {seconds:.0f} s; results: {where}", soft_wrap=True)
    return 0


def show_keys() -> None:
    """Print every key, its default, its choices and what it means."""
    table = Table(title="keys of a run", title_justify="left")
    for header in ("key", "default", "meaning"):
        table.add_column(header, overflow="fold")
    for key in keys():
        choices = f" [{' | '.join(key.choices)}]" if key.choices else ""
        table.add_row(key.name, json.dumps(key.default), escape(key.help + choices))
    table.add_section()
    for name, default in SIMULATION_DEFAULTS.items():
        table.add_row(name, json.dumps(default), f"simulation: {SIMULATION_HELP[name]}")
    Console().print(table)


def _scenario(arguments: Sequence[str]) -> Scenario:
    files = [argument for argument in arguments if "=" not in argument]
    if len(files) > 1:
        raise ConfigError(f"expected one scenario file, found {' and '.join(files)}")
    assignments = [argument for argument in arguments if "=" in argument]
    return Scenario.load(Path(files[0]) if files else None, assignments)


def _check(config: AppConfig) -> None:
    """Raise now for what the app would raise half a minute later, where looking costs little."""
    check_file(config)
    if config.evaluate_tasks.strip():
        from compeft_fl.app.evaluation import require_harness  # imports torch

        require_harness()
    check_installed(config.trackers())
    check_packages(config)
    if config.strategy.startswith(COMPRESSED_PREFIX):
        build_strategy(config, RoundCounts())
    plain = AppConfig()
    if (config.peft_method, config.peft, config.peft_options) != (
        plain.peft_method,
        plain.peft,
        plain.peft_options,
    ):
        with at_once():
            from compeft_fl.app.tasks.model import peft_config

            import_peft()
            peft_config(config)


class _Live:
    """Shows events: on a terminal with a bar, elsewhere as lines; a context manager."""

    def __init__(self, scenario: Scenario) -> None:
        self._rounds = scenario.config.rounds
        self._round = 0
        self._nodes = 0
        self._replies = 0
        self._sent = 0
        self._dense = 0
        self._parameters = 0
        self._seconds = 0.0
        self._accuracy: float | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[news]}"),
            TimeElapsedColumn(),
            transient=True,
            refresh_per_second=4,
        )
        self._task: TaskID = self._progress.add_task("starting Flower", total=None, news="")

    def __enter__(self) -> _Live:
        self._console = self._progress.console
        self._say(f"starting Flower: {self._rounds} rounds")
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._progress.stop()

    def on_event(self, event: dict[str, Any]) -> None:
        """Show an event of ``progress.jsonl``."""
        kind = event["event"]
        if kind == "run":
            self._parameters = event["num_parameters"]
            self._update("scoring the start")
        elif kind == "sent" and event["kind"] == "train":
            if event["round"] != self._round:
                self._round = event["round"]
                self._nodes, self._replies, self._sent, self._dense = 0, 0, 0, 0
            self._nodes += event["nodes"]
            self._update(self._where(), total=self._nodes)
        elif kind == "reply" and event["kind"] == "train":
            self._replies += 1
            self._sent += event["bytes"]
            self._dense += 4 * self._parameters if event["bytes"] else 0
            if "reason" in event:
                self._say(f"  node {event['node']} is set aside: {event['reason']}")
            self._update(self._where(), completed=self._replies)
        elif kind == "score":
            self._score(event)

    def _where(self) -> str:
        return f"round {self._round}/{self._rounds}, nodes {self._replies}/{self._nodes}"

    def _score(self, event: dict[str, Any]) -> None:
        self._accuracy = event["accuracy"]
        line = (
            f"round {event['round']:>2}/{self._rounds}  "
            f"accuracy {units.percent(event['accuracy'])}  loss {event['loss']:.3f}"
        )
        if event["round"]:
            sent = units.size(self._sent)
            line += f"  {self._replies} nodes  {sent} up"
            if self._sent and self._dense:
                line += f" (1/{self._dense / self._sent:.3g} of dense)"
            line += f"  {units.size(event['down_payload'])} down"
            message = event["up_message"] + event["down_message"]
            line += f"  {units.size(message)} as messages"
            line += f"  {event['time'] - self._seconds:.0f} s"
        self._seconds = event["time"]
        self._say(line)
        tasks = [f"{name} {event[name]:.3f}" for name in event if report.TASK_MARK in name]
        if tasks:
            self._say("  " + ", ".join(tasks))

    def _update(
        self, description: str, *, total: int | None = None, completed: int | None = None
    ) -> None:
        news = f"{units.size(self._sent)} up" if self._sent else ""
        if self._accuracy is not None:
            news = f"accuracy {units.percent(self._accuracy)}  {news}"
        if total is not None:
            self._progress.reset(self._task, total=total)
        self._progress.update(self._task, description=description, completed=completed, news=news)

    def _say(self, line: str) -> None:
        line = printable(line, 2000)  # a reason or a name may be a node's own text
        self._console.print(escape(line), highlight=False, soft_wrap=True)


@contextmanager
def _signals() -> Iterator[None]:
    """Make Ctrl-C, SIGTERM and a closed terminal end the run in order; more of them wait."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # else nohup asks that a closed terminal ends nothing
    before = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
