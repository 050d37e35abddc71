"""Deployments of real processes on loopback: the bytes add up, and nothing stays behind."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import stat
import subprocess
import sys
import time
from collections import Counter
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import yaml
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from compeft_fl.deploy import warm
from compeft_fl.deploy.credentials import write_credentials
from compeft_fl.deploy.deployment import deploy, speaks_grpc
from compeft_fl.deploy.relay import Link
from compeft_fl.errors import ConfigError
from compeft_fl.exchange.ledger import read_ledger
from compeft_fl.runs.scenario import Scenario

RECIPES = Path(__file__).parents[1] / "simulations" / "deploy"


@pytest.mark.deploy
@pytest.mark.timeout(600)
def test_a_run_with_tls_completes_and_leaves_nothing(tiny_data: Path, tiny_model: Path, tmp_path):
    scenario = Scenario.load(
        RECIPES / "loopback.toml",
        [
            "num-supernodes=2",
            "rounds=1",
            "local-steps=1",
            f"data={tiny_data}",
            f"model={tiny_model}",
        ],
    )
    processes: set[psutil.Process] = set()
    listening: set[int] = set()

    def on_event(event: dict) -> None:
        for child in psutil.Process().children(recursive=True):
            processes.add(child)
            with contextlib.suppress(psutil.NoSuchProcess):  # a client that has ended meanwhile
                listening.update(
                    c.laddr.port for c in child.net_connections("tcp") if c.status == "LISTEN"
                )

    outcome = deploy(scenario, tmp_path, on_event, link=Link())
    assert outcome.completed, outcome.detail + _logs(tmp_path)
    _check_that_the_ledger_adds_up(tmp_path)
    # The SuperLink's, one of its own for gRPC, and one of each node.
    assert len(listening) >= (4 if speaks_grpc() else 3)
    assert not [process for process in processes if _runs(process)]
    still = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == "LISTEN"}
    assert not listening & still


def test_credentials_say_what_they_are_for(tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    write_credentials(folder, ["fl.example.org", "10.0.0.1"], num_nodes=2)
    authority = x509.load_pem_x509_certificate((folder / "node-0" / "ca.crt").read_bytes())
    server = x509.load_pem_x509_certificate((folder / "server" / "server.crt").read_bytes())
    policy = PolicyBuilder().store(Store([authority]))
    policy.build_server_verifier(x509.DNSName("fl.example.org")).verify(server, [])
    policy.build_server_verifier(x509.IPAddress(ip_address("10.0.0.1"))).verify(server, [])
    with pytest.raises(VerificationError):
        policy.build_server_verifier(x509.DNSName("elsewhere.example.org")).verify(server, [])
    private = {"ca.key", "server.key", "superexec.secret", "node.key"}
    for file in (file for file in folder.rglob("*") if file.is_file()):
        assert bool(stat.S_IMODE(file.stat().st_mode) & 0o077) == (file.name not in private)
    assert {file.name for file in (folder / "node-0").iterdir()} == {"ca.crt", "node.key"}
    keys = {file.read_text().split()[1] for file in (folder / "admin").glob("*.pub")}
    assert len(keys) == 2


def test_credentials_are_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="never overwritten"):
        write_credentials(tmp_path, ["localhost"], num_nodes=1)
    assert not list(tmp_path.iterdir())


def test_a_client_starts_cold_where_nothing_keeps_it_warm(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / warm.PROGRAM).write_text("#!/bin/sh\necho cold $1\nexit 7\n", encoding="utf-8")
    (real / warm.PROGRAM).chmod(0o700)
    text = _front(tmp_path, real)
    done = subprocess.run([text, "--token"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "cold --token\n")


@pytest.mark.deploy
@pytest.mark.timeout(600)
def test_a_warm_client_is_the_real_one(tmp_path: Path) -> None:
    """Its arguments, output, folder and exit code; and each is a process of its own."""
    server = subprocess.Popen(
        [sys.executable, "-m", "compeft_fl.deploy.warm", tmp_path / "socket"],
        env={"PATH": "", **warm.THREADS},
        stderr=subprocess.PIPE,
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "socket").exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert warm.write_program(tmp_path, tmp_path / "socket")
        program = tmp_path / warm.PROGRAM
        for _ in range(2):
            done = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert "Run a Flower ClientApp" in done.stdout
        done = subprocess.run([program, "--nonsense"], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "--token" in done.stderr
        assert server.poll() is None
        psutil.wait_procs(psutil.Process(server.pid).children(recursive=True))  # all end
    finally:
        server.terminate()
        server.communicate()


@pytest.mark.parametrize("name", ["compose.server.yaml", "compose.node.yaml"])
def test_compose_files_mount_what_the_script_makes(name: str, tmp_path: Path) -> None:
    write_credentials(tmp_path / "credentials", ["localhost"], num_nodes=1)
    made = {file.name for file in (tmp_path / "credentials").rglob("*") if file.is_file()}
    services = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))["services"]
    words = [word for service in services.values() for word in service["command"]]
    mounted = {word.rpartition("/")[2] for word in words if "=/credentials/" in word}
    assert mounted
    assert mounted <= made
    assert "--insecure" not in words


def test_every_recipe_keeps_the_control_port_to_this_machine() -> None:
    """Who reaches it can run code: the guide says so, and no recipe opens it."""
    guide = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert "has its public certificate can run code on the server and\n  on all nodes" in guide
    hosts = re.findall(r"flower-superlink .*--host (\S+)", guide)
    assert hosts == ["127.0.0.1"]
    assert re.findall(r'^ *address = "(\S+)"', guide, re.MULTILINE) == ["127.0.0.1:8000"]
    services = yaml.safe_load((RECIPES / "compose.server.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert [port for port in ports if port.endswith(":8000")] == ["127.0.0.1:8000:8000"]


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended; what has ended may wait for init to look."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _check_that_the_ledger_adds_up(folder: Path) -> None:
    """Payload <= message <= socket: in each direction, for each node, and in all."""
    ledger = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["ledger"]
    layers = []
    for way in ("uplink", "downlink"):
        (payload,), (message,), (on_socket,) = (
            ledger[f"{way}_{layer}_bytes"] for layer in ("payload", "message", "socket")
        )
        assert payload <= message <= on_socket < message + 100_000
        layers.append((payload, message, on_socket))
    assert layers[0][0] > 0
    payload, message, on_socket = map(sum, zip(*layers, strict=True))
    assert 0 < payload < message < on_socket
    messages: Counter[tuple[int, str]] = Counter()
    for _, transfer in read_ledger(folder / "ledger.csv"):
        messages[transfer.node, transfer.direction] += transfer.message_bytes
    sockets: Counter[tuple[int, str]] = Counter()
    with (folder / "sockets.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["round"] == "1":
                sockets[int(row["node"]), row["direction"]] += int(row["socket_bytes"])
    assert len(messages) == 2 * 2
    assert set(messages) == set(sockets)
    assert all(messages[each] < sockets[each] for each in messages)


def _front(folder: Path, real: Path) -> Path:
    """Write the program in front of `real`, with a socket that nobody serves."""
    assert warm.write_program(folder, folder / "nobody", str(real))
    return folder / warm.PROGRAM


def _logs(folder: Path) -> str:
    return "\n".join(
        f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in folder.glob("*.log")
    )
