"""Runs the app in Flower's simulation engine from one process, and leaves nothing behind.

A SuperLink of its own, with a private Flower home, on a free loopback port; the app is a folder
with nothing but a ``pyproject.toml`` that names the installed package's components, so that it does
not matter from where, or from what kind of installation, a run starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from compeft_fl import __version__
from compeft_fl.app.config import AppConfig, Scalar
from compeft_fl.app.embedded import LANGUAGE_MODEL
from compeft_fl.app.tasks.data import EMBEDDED
from compeft_fl.client import state_store
from compeft_fl.errors import CompeftError
from compeft_fl.results.journal import PROGRESS_FILE, event_of
from compeft_fl.runs.processes import ProcessFamily
from compeft_fl.runs.scenario import Scenario

__all__ = ["LOG_FILE", "FlowerError", "FlowerSession", "Outcome", "simulate"]

LOG_FILE: Final = "flower.log"
SUPERLINK_LOG_FILE: Final = "superlink.log"
COMPLETED: Final = "finished:completed"  # Flower's word for a run that came to its end
STATE_FOLDER: Final = "nodes"  # what the simulated nodes remember, for a run that is resumed

_CONNECTION: Final = "compeft-fl"
_SIMULATION_PROGRAM: Final = "flwr-simulation"
_START_SECONDS: Final = 90.0
_COMMAND_SECONDS: Final = 120.0
_LOOK_SECONDS: Final = 0.2
_ASK_SECONDS: Final = 60.0
_LAST_LINES_SECONDS: Final = 5.0
_SUPERLINK_ENDED: Final = "superlink:ended"  # beside Flower's own words for a run's status

_UNANSWERED: Final = 3  # times in a row that a SuperLink may know nothing of its run
_LONGEST_TEMPORARY: Final = 40  # Ray's sockets lie below, and a socket's path has 107 bytes

_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")

_QUIET: Final = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listen on the loopback interface only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",  # a worker per core that nobody would ask for anything
    "TOKENIZERS_PARALLELISM": "false",
}


class FlowerError(CompeftError):
    """Flower's processes cannot be started, or do not do what they are asked."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Parameters
    ----------
    completed : bool
        Whether Flower says that it was completed.
    detail : str
        Where it was not: why, in one line.
    """

    completed: bool
    detail: str = ""


class FlowerSession:
    """A SuperLink of one's own, and Flower's command line for it; a context manager.

    Parameters
    ----------
    log : Path
        File for the output of the SuperLink.
    environment : mapping of str to str, optional
        Variables beside those of this process.

    Raises
    ------
    FlowerError
        Where the SuperLink does not start.
    """

    def __init__(self, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.home = Path(tempfile.mkdtemp(prefix="cfl-", dir=_temporary_folder()))
        self.family = ProcessFamily(_environment(self.home, environment or {}), self.home)
        self.superlink: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.family.guard()
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the session and remove its folder."""
        self.family.end()
        shutil.rmtree(self.home, ignore_errors=True)
        self.family.unguard()

    def submit(self, app: Path, federation: Mapping[str, Scalar]) -> str:
        """Start a run of the app in a folder and return its id.

        Raises
        ------
        FlowerError
            Where Flower does not take it.
        """
        settings = " ".join(f"{key}={_toml_value(value)}" for key, value in federation.items())
        answer = self._flwr("run", str(app), _CONNECTION, "--federation-config", settings)
        if not answer.get("run-id"):
            raise FlowerError(f"Flower does not take the app: {_reason(answer)}")
        return str(answer["run-id"])

    def status(self, run_id: str) -> tuple[str, str]:
        """Return a run's status, such as ``finished:completed``, and Flower's details on it."""
        answer = self._flwr("list", _CONNECTION, "--run-id", run_id)
        runs = answer.get("runs") or [{}]
        return str(runs[0].get("status", "unknown")), str(runs[0].get("status-details", ""))

    def stream_log(self, run_id: str, log: Path) -> subprocess.Popen[bytes]:
        """Start to write what a run logs to a file; the process ends with the run."""
        return self.family.start(["flwr", "log", run_id, _CONNECTION, "--stream"], log)

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a command of ``flwr`` and return its JSON answer."""
        try:
            done = self.family.call(["flwr", *arguments, "--format", "json"], _COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            raise FlowerError(f"flwr {arguments[0]} took over {_COMMAND_SECONDS:g} s") from None
        try:
            answer = json.loads(done.stdout)
        except json.JSONDecodeError:
            said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
            raise FlowerError(f"flwr {arguments[0]} failed: {said[-1]}") from None
        return answer if isinstance(answer, dict) else {}

    def _start(self) -> None:
        """Start the SuperLink; another one where somebody was faster to take the port."""
        for _ in range(3):
            port = _free_port()
            config = (
                f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
                f'address = "127.0.0.1:{port}"\ninsecure = true\n'
            )
            (self.home / "config.toml").write_text(config, encoding="utf-8")
            command = ["flower-superlink", "--insecure", "--simulation"]
            try:
                self.superlink = process = self.family.start(
                    [*command, "--host", "127.0.0.1", "--port", str(port)], self.log
                )
            except FileNotFoundError:
                raise FlowerError(
                    "flower-superlink is not installed: pip install 'compeft-fl[simulation]'"
                ) from None
            until = time.monotonic() + _START_SECONDS
            while process.poll() is None and time.monotonic() < until:
                if _answers(port):
                    return
                time.sleep(0.1)
        raise FlowerError(f"the SuperLink does not start; {self.log} ends: {last_line(self.log)}")


def simulate(
    scenario: Scenario, folder: Path, on_event: Callable[[dict[str, Any]], None]
) -> Outcome:
    """Run a scenario in Flower's simulation engine; return when it has ended.

    Parameters
    ----------
    scenario : Scenario
        What to run.
    folder : Path
        The run's folder, which exists; the app writes its results there, and Flower's log.
    on_event : callable
        Called with every event of ``progress.jsonl`` as it comes, see
        `compeft_fl.results.journal`.

    Raises
    ------
    FlowerError
        Where Flower does not start or does not take the app.
    """
    scenario = scenario.with_run(run_dir=str(folder.absolute()))
    events = _Events(folder / PROGRESS_FILE, on_event)
    state = folder.absolute() / STATE_FOLDER
    environment = {**_offline(scenario.config), "COMPEFT_FL_STATE_DIR": str(state)}
    with FlowerSession(folder / SUPERLINK_LOG_FILE, environment) as session:
        app = session.home / "app"
        write_app(app, scenario.config)
        run_id = session.submit(app, dict(scenario.simulation))
        log = session.stream_log(run_id, folder / LOG_FILE)
        status, details = _follow(session, run_id, events)
        with contextlib.suppress(subprocess.TimeoutExpired):
            log.wait(_LAST_LINES_SECONDS)
    events.read()
    if status == COMPLETED and events.ended:
        state_store.clear(state)  # what the nodes remember: nobody goes on from it
        return Outcome(True)
    # What a ServerApp says whose SuperLink has ended follows from that.
    reason = details if status == _SUPERLINK_ENDED else events.error or details
    if not reason or reason == "N/A":
        reason = f"Flower says {status}; the log ends: {last_line(folder / LOG_FILE)}"
    return Outcome(False, " ".join(reason.split()))


def write_app(folder: Path, config: AppConfig) -> None:
    """Write a Flower app that consists of names: of this package's components, and the keys."""
    lines = [
        "[project]",
        'name = "compeft-fl-run"',
        f'version = "{__version__}"',
        'description = "One run of compeft-fl"',
        'license = "Apache-2.0"',
        "[tool.flwr.app]",
        'publisher = "compeft-fl"',
        "[tool.flwr.app.components]",
        'serverapp = "compeft_fl.app.server_app:app"',
        'clientapp = "compeft_fl.app.client_app:app"',
        "[tool.flwr.app.config]",
    ]
    lines += [f'"{key}" = {_toml_value(value)}' for key, value in config.to_run_config().items()]
    folder.mkdir()
    (folder / "pyproject.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def last_line(log: Path) -> str:
    """Return the last line of a log with something on it, without colours."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    plain = (_COLOUR.sub("", line).strip() for line in reversed(lines))
    return next((line for line in plain if line), "")


class _Events:
    """The lines of ``progress.jsonl`` as they come; of a run that is resumed, also the old ones.

    `ended` and `error` are of what is written from now on.
    """

    def __init__(self, path: Path, on_event: Callable[[dict[str, Any]], None]) -> None:
        self._path, self._on_event = path, on_event
        self._offset = 0
        self._old = path.stat().st_size if path.exists() else 0
        self.ended = False
        self.error = ""

    def read(self) -> None:
        for event in self._new():
            if self._offset > self._old and event["event"] == "end":
                self.ended = True
            elif self._offset > self._old and event["event"] == "error":
                self.ended, self.error = False, event["reason"]
            self._on_event(event)

    def _new(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                event = event_of(line)
                if event is not None:
                    yield event


def _follow(session: FlowerSession, run_id: str, events: _Events) -> tuple[str, str]:
    """Pass on events until the run has finished; return its status.

    Asking Flower takes a second of a core, so it is asked when the simulation's process is gone
    before its ServerApp came to its end, and now and then.
    """
    seen, asked, unanswered = False, time.monotonic(), 0
    while True:
        events.read()
        if session.superlink is not None and session.superlink.poll() is not None:
            return _SUPERLINK_ENDED, f"the SuperLink ended, exit code {session.superlink.poll()}"
        alive = session.family.running(_SIMULATION_PROGRAM)
        gone = seen and not alive
        seen = seen or alive
        if gone:
            events.read()
            if events.ended:  # the ServerApp came to its end: all that a run leaves is there
                return COMPLETED, ""
        if gone or time.monotonic() - asked > _ASK_SECONDS:
            asked = time.monotonic()
            status, details = session.status(run_id)
            unanswered = unanswered + 1 if status == "unknown" else 0
            if status.startswith("finished") or unanswered == _UNANSWERED:
                return status, details
        time.sleep(_LOOK_SECONDS)


def _environment(home: Path, more: Mapping[str, str]) -> dict[str, str]:
    environment = {**os.environ, **_QUIET, **more}
    environment["FLWR_HOME"] = str(home)
    environment["RAY_TMPDIR"] = str(home)
    environment.update({"COMPEFT_FL_STATE_DIR": str(home / "state"), **more})
    programs = Path(sys.executable).parent  # the SuperLink looks for its helpers on PATH
    environment["PATH"] = os.pathsep.join([str(programs), environment.get("PATH", "")])
    for name in ("NO_PROXY", "no_proxy"):
        before = environment.get(name, "")
        environment[name] = ",".join(filter(None, [before, "127.0.0.1,localhost"]))
    return environment


def _offline(config: AppConfig) -> dict[str, str]:
    """Keep off the network where everything is at hand."""
    local_model = config.model in ("minilm", LANGUAGE_MODEL) or Path(config.model).is_dir()
    local_data = config.data in EMBEDDED or Path(config.data).is_file()
    return {"HF_HUB_OFFLINE": "1"} if local_model and local_data else {}


def _temporary_folder() -> str | None:
    """Return a folder for temporary ones, with room for the paths of Ray's sockets."""
    folder = tempfile.gettempdir()
    return "/tmp" if len(folder) > _LONGEST_TEMPORARY and os.access("/tmp", os.W_OK) else folder


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=1):
            return True
    except OSError:
        return False


def _reason(answer: Mapping[str, Any]) -> str:
    return str(answer.get("error-message") or answer.get("error") or dict(answer))


def _toml_value(value: Scalar) -> str:
    return json.dumps(value)  # of these types the same in TOML
