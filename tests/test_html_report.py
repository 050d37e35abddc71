"""report.html: what is in it, and what a browser makes of it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compeft_fl.cli.main import main
from compeft_fl.results import html_report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
EVIL = "a</script><script>document.title='evil'</script>"


def summary(accuracy, up, seed):
    rounds = len(up)
    return {
        "scenario": "default",
        "rounds": rounds,
        "nodes": 2,
        "num_parameters": 1000,
        "accuracy": accuracy,
        "loss": [None] * (rounds + 1),
        "uplink_payload_bytes": up,
        "downlink_payload_bytes": [2 * value for value in up],
        "uplink_dense_bytes": [8000] * rounds,
        "downlink_dense_bytes": [8000] * rounds,
        "replies": [2] * rounds,
        "set_aside": [0] * rounds,
        "wall_seconds": 12.5,
        "config": {"seed": seed, "rounds": rounds, "run-dir": f"/x/{seed}", "model": EVIL},
        "ledger": {
            "uplink_payload_bytes": up,
            "uplink_message_bytes": [value + 50 for value in up],
            "downlink_payload_bytes": up,
            "downlink_message_bytes": up,
        },
    }


@pytest.fixture
def runs(tmp_path):
    found = []
    for name, accuracy, up, seed in (
        ("first", [0.5, 0.625, 0.75], [100, 90], 1),
        ("second", [0.5, None, 0.7], [1000, 900], 2),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary(accuracy, up, seed)))
        found.append(folder)
    return found


@pytest.fixture
def page(runs, tmp_path):
    path = tmp_path / "out" / "report.html"
    assert main(["report", *map(str, runs), "-o", str(path)]) == 0
    return path


def figures_of(page):
    (text,) = re.findall(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def test_tables_and_plots_have_the_runs_figures(page):
    text = page.read_text()
    by_bytes, by_round, by_layer = figures_of(page)
    assert [line["x"] for line in by_bytes["data"]] == [[300, 570], [3000, 5700]]
    assert by_round["data"][0]["y"] == [50.0, 62.5, 75.0]
    assert by_round["data"][0]["text"][1] == "first<br>round 1: 62.50 %<br>300 B"
    assert by_layer["data"][1]["y"] == [100, 0, 100, 0]
    assert 'data-value="75.0"' in text
    differing = text.partition("Settings that differ")[2].partition("</table>")[0]
    assert re.findall(r"<tr><td>([\w-]+)", differing) == ["seed"]


def test_ticks_have_room_and_a_run_has_one_colour(runs, tmp_path):
    by_bytes = html_report._by_bytes
    near, far = html_report.read_run(runs[0]), html_report.read_run(runs[1])
    assert by_bytes(["a"], [near])["layout"]["xaxis"]["dtick"] == "D2"
    many = dataclasses.replace(far, summary={**far.summary, "uplink_payload_bytes": [10**6, 10**6]})
    assert by_bytes(["a", "b"], [near, many])["layout"]["xaxis"]["dtick"] == 1
    both = [dataclasses.replace(run, by_node={"7": (3, 4)}) for run in (near, far)]
    bars = html_report._per_node(["a", "b"], both)["data"]
    colours = [bar["marker"]["color"] for bar in bars]
    assert colours == ["#0072b2", "#0072b280", "#d55e00", "#d55e0080"]
    assert [bar["name"] for bar in bars] == ["a, up", "a, down", "b, up", "b, down"]


def test_names_of_strangers_are_text_and_nothing_is_loaded(page, runs, tmp_path):
    told = summary([0.5, 0.6, 0.7], [1, 2], 3)
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({**told, "config": {"model": EVIL}}))
    evil = dataclasses.replace(html_report.read_run(folder), name=EVIL)
    html_report.write(page, [html_report.read_run(runs[0]), evil])
    text = re.sub(r'id="library">.*?</script>', "", page.read_text(), flags=re.DOTALL)
    assert EVIL not in text
    assert text.count("<script") == 3
    assert "&lt;/script&gt;" in text
    assert not re.search(r"https?://|src=", text)


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    for content in (None, "[]", '{"accuracy": 3}', "{"):
        if content is not None:
            (tmp_path / "summary.json").write_text(content)
        assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert not (tmp_path / "r.html").exists()


def test_a_run_alone_has_no_settings_that_differ(runs, tmp_path):
    html_report.write(tmp_path / "r.html", [html_report.read_run(runs[0])])
    assert "Settings that differ" not in (tmp_path / "r.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_draws_hovers_and_sorts_without_a_network(page, tmp_path):
    probe = """
<script>
addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });
const wait = setInterval(() => {
  if (!document.documentElement.dataset.drawn) return;
  clearInterval(wait);
  const place = document.querySelectorAll(".plot")[1];
  Plotly.Fx.hover(place, [{ curveNumber: 0, pointNumber: 2 }]);
  const table = document.querySelector("table");
  const order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join();
  const seen = [order()];
  table.tHead.rows[0].cells[4].firstChild.click();
  seen.push(order());
  table.tHead.rows[0].cells[4].firstChild.click();
  seen.push(order());
  setTimeout(() => {
    const hover = place.querySelector(".hoverlayer").textContent;
    const requests = performance.getEntriesByType("resource").map((each) => each.name);
    const found = { hover, seen, requests, plots: document.querySelectorAll(".main-svg").length,
                    wide: document.documentElement.scrollWidth, title: document.title };
    document.title = "FOUND" + JSON.stringify(found) + "DNUOF";
  }, 300);
}, 50);
</script>
"""
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
         "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", probed.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "data-error" not in done.stdout[:2000]
    assert "data-failed" not in done.stdout[:2000]
    told = re.findall(r"<title>FOUND(.*?)DNUOF</title>", done.stdout)
    found = json.loads(told[0].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert found["hover"] == "firstround 2: 75.00 %570 B"
    assert found["seen"] == ["first,second", "second,first", "first,second"]
    assert [each for each in found["requests"] if not each.startswith(("data:", "blob:"))] == []
    assert found["plots"] >= 3
    assert found["title"] == "compeft-fl: 2 runs"


def test_every_run_writes_its_own(tmp_path):
    from compeft_fl.results import report
    from compeft_fl.results.journal import RoundRecord, RunRecord

    record = RunRecord("mine", 2, 10, [RoundRecord(0.5, 1.0), RoundRecord(0.6, 0.9)], 3.0, {})
    report.write(tmp_path, record)
    assert "compeft-fl: " in Path(tmp_path / "report.html").read_text()
