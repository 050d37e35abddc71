#!/usr/bin/env python
"""Kill the SuperLink in the middle of a run, start it again, and see whether the run completes.

    python simulations/deploy/try_superlink_restart.py [key=value ...]

Two SuperNodes on loopback, TLS and authentication on, as `make deploy` starts them: the SuperLink
keeps its state in a database file, and the ServerApp is a child of a flower-superexec, not of the
SuperLink. The SuperLink is killed with SIGKILL when the first reply of round 1 has come, stays away
for some seconds and comes back on the same ports and database. Exit code 0: the run completed.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compeft_fl.app import deploy
from compeft_fl.results.journal import PROGRESS_FILE
from compeft_fl.runs import launch
from compeft_fl.runs.scenario import Scenario

_QUICK = ("num-supernodes=2", "rounds=3", "local-steps=4", "limit-rows=120")
_AWAY_SECONDS = 10.0


def main() -> int:
    """Run it, and say what happened."""
    started = time.monotonic()
    killed: list[float] = []

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="compeft-restart-") as name:
        folder = Path(name)
        scenario = Scenario.load(None, [*_QUICK, *sys.argv[1:]]).with_run(run_dir=name)
        num_nodes = int(scenario.simulation["num-supernodes"])
        environment = launch._offline(scenario.config)
        with deploy.Deployment(folder, environment, num_nodes=num_nodes) as deployment:

            def on_event(event: dict[str, Any]) -> None:
                say(" ".join(f"{key}={value}" for key, value in event.items() if key != "time"))
                if event["event"] == "reply" and not killed:
                    killed.append(time.monotonic())
                    deployment.stop_superlink(hard=True)
                    say(f"SuperLink killed (kill -9); away for {_AWAY_SECONDS:g} s")
                    time.sleep(_AWAY_SECONDS)
                    deployment.start_superlink()
                    say("SuperLink back, on the same database")

            for index in range(num_nodes):
                deployment.start_node(index)
            launch.write_app(deployment.home / "app", scenario.config)
            run_id = deployment.submit(deployment.home / "app")
            events = launch._Events(folder / PROGRESS_FILE, on_event)
            status, details = deploy._follow(deployment, run_id, events)
            events.read()
        say(f"the run is {status} {details}".rstrip())
        if not status.endswith("completed"):
            for log in sorted(folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}")
    return 0 if killed and status == "finished:completed" and events.ended else 1


if __name__ == "__main__":
    sys.exit(main())
