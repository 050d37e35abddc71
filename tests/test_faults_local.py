"""`make faults`: broken state, full disks, other starts and hostile replies, in one process.

A whole federation each time, of the real strategy, mod and messages; the full disks are real ones.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from bad_replies import BAD_REPLIES
from local_grid import LocalGrid, node_ids
from test_exchange import NODES, N, flat, grid_of, start

from compeft_fl.app import client_app, server_app
from compeft_fl.mod import CompressionMod
from compeft_fl.strategies import CheckpointFolder, Checkpointing, ComPEFTAverage, DownlinkOptions

pytestmark = pytest.mark.faults
HERE = Path(__file__).parent


def line_of(caplog, *words: str) -> str:
    """The first line of the log with these words; it must be there."""
    lines = [record.getMessage() for record in caplog.records]
    found = [line for line in lines if all(word in line for word in words)]
    assert found, "\n".join(lines)
    return found[0]


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


DAMAGES = {"truncated": truncated, "with a flipped bit": flipped}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_of_a_node(damage, caplog, fault_seen):
    def evaluate(server_round, record):
        if server_round == 2:
            root = Path(os.environ["COMPEFT_FL_STATE_DIR"]) / strategy._broadcaster.federation
            (file,) = (root / f"0-of-{N}").glob("*.safetensors")
            file.write_bytes(DAMAGES[damage](file.read_bytes()))

    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    start(strategy, grid_of(), 4, evaluate_fn=evaluate)
    counts = strategy.observer.train
    assert [count.replies for count in counts.values()] == [N] * 4
    assert [count.resyncs for count in counts.values()] == [0, 0, 1, 0]
    fault_seen(
        f"a node's state file {damage}", line_of(caplog, "the node's state is lost", "damaged"),
        "the node is sent the adapter within the round, and takes part; what it had left to send "
        "is lost",
    )  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(damage, tmp_path, monkeypatch, caplog, fault_seen):
    """The nodes are a round ahead of the checkpoint before it; the run goes on and ends."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    random.seed(5)
    first = ComPEFTAverage(fraction_evaluate=0.0)
    start(first, grid_of(), 3, checkpointing=Checkpointing(folder))
    newest = folder.files()[0]
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    second = ComPEFTAverage(fraction_evaluate=0.0)
    result = start(second, grid_of(), 4, checkpointing=Checkpointing(folder, resume=True))
    assert set(second.observer.train) == {3, 4}
    assert [count.replies for count in second.observer.train.values()] == [N, N]
    assert np.isfinite(flat(result.arrays)).all()
    fault_seen(
        f"a checkpoint {damage}, the run resumed", line_of(caplog, "is passed over"),
        "goes on from the one before it",
    )  # fmt: skip


# A whole federation whose nodes cannot keep what they know: argv is a folder and a number of bytes.
_FULL = """
import logging, os, resource, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[3], os.path.dirname(sys.argv[3])]
home, limit = Path(sys.argv[1]), int(sys.argv[2])
os.environ["FEDERATION_FOLDER"] = str(home)
os.environ["COMPEFT_FL_STATE_DIR"] = str(home / "state")
import numpy as np
import plain_federation
from compeft_fl.exchange.records import LOGGER
from compeft_fl.strategies import RoundCounts
from local_grid import LocalGrid
LOGGER.handlers = [logging.StreamHandler(sys.stdout)]
LOGGER.propagate = False
counts = RoundCounts()
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
result = plain_federation.federate(LocalGrid(plain_federation.client_app, 2), counts, timeout=20)
print("replies", [each.replies for each in counts.train.values()], bool(np.isfinite(result).all()))
print("sent", [each.down_bytes for each in counts.train.values()])
"""


@pytest.mark.parametrize("kind", ["limit", "tmpfs"])
def test_a_full_disk_for_the_nodes_state(kind, tmp_path, fault_seen):
    run = [sys.executable, "-c", _FULL, str(tmp_path)]
    (tmp_path / "state").mkdir()
    if kind == "limit":
        command = [*run, "10000", str(HERE)]
    else:
        mount = f"mount -t tmpfs -o size=16k none {tmp_path / 'state'}"
        own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
        try:
            able = subprocess.run([*own, mount], capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            able = False
        if not able:
            pytest.skip("no file systems of one's own here")
        command = [*own, f'{mount} && exec "$@"', "sh", *run, "0", str(HERE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "replies [2, 2, 2, 2] True" in done.stdout, done.stdout + done.stderr
    wanted = "File too large" if kind == "limit" else "No space left on device"
    lines = [line for line in done.stdout.splitlines() if "cannot be written" in line]
    assert lines
    assert wanted in lines[0]
    sent = done.stdout.rpartition("sent ")[2]
    sizes = [int(size) for size in sent.strip(" []\n").split(",")]
    assert sizes == sorted(sizes)  # each time the start and all that came after it
    assert sizes[-1] > 2000
    fault_seen(
        "no room for a node's state: " + ("`ulimit -f`" if kind == "limit" else "a small tmpfs"),
        lines[0], "the node takes part; it is sent the start and all after it each round, and "
        "drops what it did not send",
    )  # fmt: skip


STARTS = {
    "another seed": lambda context: tiny.adapter(seed=9),
    "another layout": lambda context: {"w": np.zeros(3, np.float32)},
}


@pytest.mark.parametrize("other", STARTS)
def test_a_client_that_starts_elsewhere(other, caplog, fault_seen):
    honest = CompressionMod(density=0.2, initial_adapter=lambda context: tiny.adapter())
    mod = CompressionMod(density=0.2, initial_adapter=STARTS[other])
    apps = dict.fromkeys(NODES, tiny.client_app(honest)) | {NODES[0]: tiny.client_app(mod)}
    seeded = DownlinkOptions(first_contact="seed")
    strategy = ComPEFTAverage(fraction_evaluate=0.0, downlink=seeded)
    random.seed(5)
    result = start(strategy, LocalGrid(apps, N), 2)
    assert [(c.replies, c.resyncs) for c in strategy.observer.train.values()] == [(N, 1), (N, 0)]
    random.seed(5)
    os.environ["COMPEFT_FL_STATE_DIR"] += "-plain"
    plain = start(ComPEFTAverage(fraction_evaluate=0.0, downlink=seeded), grid_of(honest), 2)
    np.testing.assert_array_equal(flat(result.arrays), flat(plain.arrays))
    fault_seen(
        f"a client with {other}", line_of(caplog, "is sent what it lacks"),
        "it is sent the server's start within the round; the bytes of the undisturbed run",
    )  # fmt: skip


def test_a_client_with_another_base_model(tiny_config, tiny_model, tmp_path, caplog, fault_seen):
    """Wider than the others': the digest tells, as it does where only weights are others."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    wide = tmp_path / "wide"
    config = BertConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(wide)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(wide)
    own = dataclasses.replace(tiny_config, run_dir=str(tmp_path / "run"), min_nodes=3)
    grid = LocalGrid(client_app.app, 3, run_config=own.to_run_config())
    other = dataclasses.replace(own, model=str(wide)).to_run_config()
    grid.contexts[node_ids(3)[0]].run_config = other
    context = dataclasses.replace(
        grid.contexts[node_ids(3)[1]], node_id=0, node_config={}, run_config=own.to_run_config()
    )
    server_app.app(grid, context)
    said = line_of(caplog, "is set aside")
    assert "expected the base model that the server has" in said
    assert "the same weights and the same quantization everywhere" in said
    fault_seen(
        "a client with another base model", said,
        "its replies are set aside; the others' rounds go on. So with one of the same shapes and "
        "other weights",
    )  # fmt: skip


HOSTILE = {
    "NaN values": "nan values",
    "a NaN scale": "a nan scale",
    "10^9 declared parameters": "a billion declared parameters",
    "garbage under a right checksum": "garbage under a checksum",
    "another layout": "another layout inline",
    "an update to another version": "another base version",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_reply(what, caplog, fault_seen):
    make, _ = BAD_REPLIES[HOSTILE[what]]

    def fault(node, reply):
        return make(reply) if node == NODES[0] else [reply]

    random.seed(5)
    strategy = ComPEFTAverage(fraction_evaluate=0.0)
    result = start(strategy, grid_of(fault=fault), 1)
    assert strategy.observer.train[1].replies == N - 1
    os.environ["COMPEFT_FL_STATE_DIR"] += "-plain"
    apps = dict.fromkeys(NODES[1:], tiny.client_app(CompressionMod(density=0.2)))
    without = start(ComPEFTAverage(fraction_evaluate=0.0), LocalGrid(apps, N - 1), 1)
    np.testing.assert_allclose(flat(result.arrays), flat(without.arrays), rtol=1e-6)
    fault_seen(
        f"a reply with {what}", line_of(caplog, "is set aside"),
        "the adapter of a round in which the node was not asked",
    )  # fmt: skip
