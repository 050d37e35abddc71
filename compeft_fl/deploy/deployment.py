"""Runs the app between processes of their own: a SuperLink and SuperNodes on loopback, over gRPC.

With a Flower later than 1.39, whose SuperNodes do not speak it, over HTTP.

What `simulations/deploy/README.md` does on several machines, with the same programs and flags:
TLS, SuperNode authentication, a database, and process isolation on the server, so that a run goes
on after the SuperLink was restarted.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from compeft_fl.app.config import Scalar
from compeft_fl.deploy import counted, warm
from compeft_fl.deploy.credentials import write_credentials
from compeft_fl.deploy.relay import Link, Relay
from compeft_fl.results.journal import PROGRESS_FILE
from compeft_fl.runs import launch
from compeft_fl.runs.launch import LOG_FILE, FlowerError, FlowerSession, Outcome
from compeft_fl.runs.scenario import Scenario

__all__ = ["Deployment", "deploy", "speaks_grpc"]

_HOST: Final = "127.0.0.1"
_CONNECTION: Final = "compeft-fl"
_SERVER_PROGRAM: Final = "flwr-serverapp"
_START_SECONDS: Final = 90.0
_LOOK_SECONDS: Final = 0.2
_ASK_SECONDS: Final = 60.0
_LEAVE_SECONDS: Final = 5.0
_LAST_LINES_SECONDS: Final = 5.0
_SETTINGS: Final = {
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # 1 s by default, twice per message
}


class Deployment(FlowerSession):
    """A SuperLink on free loopback ports, and as many SuperNodes as are started; a context manager.

    The SuperLink runs from the beginning. Its ServerApps are started by a ``flower-superexec`` of
    their own (``--isolation process``), and its state is in a database file: with both, a run
    survives `stop_superlink` and `start_superlink`.

    Parameters
    ----------
    folder : Path
        For the logs of all processes.
    environment : mapping of str to str, optional
        Variables beside those of this process.
    num_nodes : int
        SuperNodes that can be started.
    secure : bool
        TLS on every connection and SuperNode authentication, with keys made for the occasion.
        Without, everything is readable on the way: for looking at bytes only.
    warm : bool
        Fork clients from a process that holds what they need, see `compeft_fl.deploy.warm`.
    link : Link, optional
        Put a relay between the nodes and the SuperLink, which counts their bytes and passes them
        on as over such a link.

    Attributes
    ----------
    relay : Relay or None
    node_ids : dict of int to int
        Flower's ids of the nodes, where they are known beforehand: those that authenticate.

    Raises
    ------
    FlowerError
        Where a process does not start.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        *,
        num_nodes: int,
        secure: bool = True,
        warm: bool = True,
        link: Link | None = None,
    ) -> None:
        super().__init__(folder / launch.SUPERLINK_LOG_FILE, {**_SETTINGS, **(environment or {})})
        self.folder = folder
        self.num_nodes = num_nodes
        self.credentials = self.home / "credentials" if secure else None
        self.superlink: subprocess.Popen[bytes] | None = None
        self._warm = warm
        self._node_path = ""
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.node_ids: dict[int, int] = {}
        self.api_port, self.fleet_port, *self._node_ports = _free_ports(2 + num_nodes)
        if not speaks_grpc():
            self.fleet_port = self.api_port
        self.relay = None if link is None else Relay(self.fleet_port, num_nodes, link)

    def submit(self, app: Path, federation: Mapping[str, Scalar] | None = None) -> str:
        """Start a run of the app in a folder and return its id; see `FlowerSession.submit`."""
        if federation:
            return super().submit(app, federation)
        answer = self._flwr("run", str(app), _CONNECTION)
        if not answer.get("run-id"):
            raise FlowerError(f"Flower does not take the app: {launch._reason(answer)}")
        return str(answer["run-id"])

    def close(self) -> None:
        """End every process, nodes first, while there is a server to take leave of."""
        nodes = [process for name, process in self._processes.items() if name.startswith("node-")]
        try:
            for process in nodes:
                process.terminate()
            until = time.monotonic() + _LEAVE_SECONDS
            for process in nodes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:
            try:
                super().close()
            finally:
                if self.relay is not None:
                    self.relay.close()

    def start_superlink(self) -> None:
        """Start the SuperLink on its ports and its database, and wait until it answers.

        Raises
        ------
        FlowerError
            Where it does not start.
        """
        command = ["flower-superlink", "--host", _HOST, "--port", str(self.api_port)]
        if speaks_grpc():
            command += ["--fleet-api-type", "grpc-rere"]
            command += ["--fleet-api-address", f"{_HOST}:{self.fleet_port}"]
        command += ["--database", str(self.home / "superlink.db"), "--isolation", "process"]
        if self.credentials is None:
            command += ["--insecure"]
        else:
            server = self.credentials / "server"
            command += ["--ssl-ca-certfile", str(server / "ca.crt")]
            command += ["--ssl-certfile", str(server / "server.crt")]
            command += ["--ssl-keyfile", str(server / "server.key"), "--enable-supernode-auth"]
            command += ["--superexec-auth-secret-file", str(server / "superexec.secret")]
        self.superlink = self._start_process("superlink", command)
        until = time.monotonic() + _START_SECONDS
        while self.superlink.poll() is None and time.monotonic() < until:
            if self._answers():
                return
            time.sleep(0.1)
        raise FlowerError(
            f"the SuperLink does not start; {self.log} ends: {launch.last_line(self.log)}"
        )

    def stop_superlink(self, *, hard: bool = False) -> None:
        """End the SuperLink alone, as a crash (``kill -9``) where `hard`."""
        process = self._processes.pop("superlink", None)
        if process is not None:
            process.kill() if hard else process.terminate()
            process.wait()

    def start_node(self, index: int, fleet_port: int | None = None) -> subprocess.Popen[bytes]:
        """Start the SuperNode of partition `index`.

        It connects to `fleet_port` where that is given, or to the relay where there is one.

        Raises
        ------
        FlowerError
            Where the SuperLink does not take the node's key.
        """
        if fleet_port is None:
            fleet_port = self.fleet_port if self.relay is None else self.relay.ports[index]
        # Nodes share this machine, and each would otherwise use all of its cores at once.
        threads = max(1, (os.cpu_count() or 1) // self.num_nodes)
        command = ["env", f"OMP_NUM_THREADS={threads}", f"FLWR_HOME={self.home / f'node-{index}'}"]
        command += [f"PATH={self._node_path}", "flower-supernode"]
        command += ["--grpc-rere"] if speaks_grpc() else []
        command += ["--superlink", f"{_HOST}:{fleet_port}"]
        command += ["--host", _HOST, "--port", str(self._node_ports[index])]
        command += ["--node-config", f"partition-id={index} num-partitions={self.num_nodes}"]
        if self.credentials is None:
            command += ["--insecure"]
        else:
            node = self.credentials / f"node-{index}"
            command += ["--root-certificates", str(node / "ca.crt")]
            command += ["--auth-supernode-private-key", str(node / "node.key")]
        return self._start_process(f"node-{index}", command)

    def check(self) -> None:
        """Raise where a process of the deployment has ended by itself.

        Raises
        ------
        FlowerError
            With the last line of its log.
        """
        for name, process in self._processes.items():
            if process.poll() is not None and name != "warm":  # clients do without, then
                log = self.folder / f"{name}.log"
                raise FlowerError(
                    f"{name} ended with code {process.returncode}; {log} ends: "
                    f"{launch.last_line(log)}"
                )

    def _start(self) -> None:
        """Start all of the server, and register the nodes."""
        if self.credentials is not None:
            write_credentials(self.credentials, [_HOST, "localhost"], self.num_nodes)
        self._write_connection()
        if self.relay is not None:
            self.relay.open()
        try:
            self.start_superlink()
        except FileNotFoundError:
            raise FlowerError("flower-superlink is not on PATH: is Flower installed?") from None
        command = ["flower-superexec", "--runtime-api-address", f"{_HOST}:{self.api_port}"]
        if self.credentials is None:
            command += ["--insecure"]
        else:
            server = self.credentials / "server"
            command += ["--root-certificates", str(server / "ca.crt")]
            command += ["--superexec-auth-secret-file", str(server / "superexec.secret")]
        self._start_process("superexec", command)
        self._keep_clients_warm()
        for index in range(self.num_nodes if self.credentials is not None else 0):
            self._register(index)

    def _keep_clients_warm(self) -> None:
        """Start what clients are forked from, and say where nodes find them."""
        path = launch._environment(self.home, {})["PATH"]
        folder = self.home / "warm"
        folder.mkdir(mode=0o700)
        if self._warm and warm.write_program(folder, folder / "socket", path):
            variables = [f"{name}={value}" for name, value in warm.THREADS.items()]
            serve = [sys.executable, "-m", "compeft_fl.deploy.warm", str(folder / "socket")]
            self._start_process("warm", ["env", *variables, *serve])
            path = os.pathsep.join([str(folder), path])
        self._node_path = path

    def _register(self, index: int) -> None:
        assert self.credentials is not None
        public = self.credentials / "admin" / f"node-{index}.pub"
        answer = self._flwr("supernode", "register", str(public), _CONNECTION)
        if not answer.get("node-id"):
            raise FlowerError(f"node {index} cannot be registered: {launch._reason(answer)}")
        self.node_ids[index] = int(answer["node-id"])

    def _write_connection(self) -> None:
        """Tell Flower's command line where the SuperLink is."""
        secure = (
            "insecure = true"
            if self.credentials is None
            else f'root-certificates = "{self.credentials / "admin" / "ca.crt"}"'
        )
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
            f'address = "{_HOST}:{self.api_port}"\n{secure}\n',
            encoding="utf-8",
        )

    def _start_process(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        process = self.family.start(command, self.folder / f"{name}.log")
        self._processes[name] = process
        return process

    def _answers(self) -> bool:
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        scheme = "http"
        if self.credentials is not None:
            authority = str(self.credentials / "admin" / "ca.crt")
            context = ssl.create_default_context(cafile=authority)
            handlers.append(urllib.request.HTTPSHandler(context=context))
            scheme = "https"
        opener = urllib.request.build_opener(*handlers)
        try:
            with opener.open(f"{scheme}://{_HOST}:{self.api_port}/health", timeout=1):
                return True
        except OSError:
            return False


def speaks_grpc() -> bool:
    """Return whether the SuperNodes of the installed Flower speak gRPC: later ones speak HTTP."""
    return tuple(int(part) for part in metadata.version("flwr").split(".")[:2]) < (1, 40)


def deploy(
    scenario: Scenario,
    folder: Path,
    on_event: Callable[[dict[str, Any]], None],
    *,
    link: Link | None = None,
) -> Outcome:
    """Run a scenario with TLS on loopback; return when it has ended and all is gone.

    Parameters
    ----------
    scenario : Scenario
        What to run; its ``num-supernodes`` is the number of SuperNodes.
    folder : Path
        The run's folder, which exists; the app writes its results there, and Flower its logs.
    on_event : callable
        Called with every event of ``progress.jsonl`` as it comes, see
        `compeft_fl.results.journal`.
    link : Link, optional
        Count the bytes of each node, as over such a link, see `compeft_fl.deploy.counted`.

    Raises
    ------
    FlowerError
        Where a process does not start, or ends before the run does.
    """
    scenario = scenario.with_run(run_dir=str(folder.absolute()))
    num_nodes = int(scenario.simulation["num-supernodes"])
    events = launch._Events(folder / PROGRESS_FILE, on_event)
    environment = launch._offline(scenario.config)
    with Deployment(folder, environment, num_nodes=num_nodes, link=link) as deployment:
        for index in range(num_nodes):
            deployment.start_node(index)
        app = deployment.home / "app"
        launch.write_app(app, scenario.config)
        run_id = deployment.submit(app)
        log = deployment.stream_log(run_id, folder / LOG_FILE)
        status, details = _follow(deployment, run_id, events)
        with contextlib.suppress(subprocess.TimeoutExpired):
            log.wait(_LAST_LINES_SECONDS)
    if deployment.relay is not None:
        counted.write(folder, deployment.relay, deployment.node_ids)
    events.read()
    if status == launch.COMPLETED and events.ended:
        return Outcome(True)
    reason = events.error or details or launch.last_line(folder / LOG_FILE)
    return Outcome(False, " ".join(reason.split()) or f"Flower says {status}")


def _follow(deployment: Deployment, run_id: str, events: launch._Events) -> tuple[str, str]:
    """Pass on events until the run has finished; return its status.

    Asking Flower takes a second of a core, so it is asked when the ServerApp's process is gone
    before it came to its end, and now and then.
    """
    seen, asked = False, time.monotonic()
    while True:
        events.read()
        deployment.check()
        alive = deployment.family.running(_SERVER_PROGRAM)
        gone = seen and not alive
        seen = seen or alive
        if gone:
            events.read()
            if events.ended:
                return launch.COMPLETED, ""
        if gone or time.monotonic() - asked > _ASK_SECONDS:
            asked = time.monotonic()
            status, details = deployment.status(run_id)
            if status.startswith("finished") or status == "unknown":
                return status, details
        time.sleep(_LOOK_SECONDS)


def _free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that are free, all different."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((_HOST, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
