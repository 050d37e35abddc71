"""Small bytes and much work: what parts, padding and names can cost, with measured peaks."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from hostile import error_of, seal, valid
from local_grid import identify, set_metadata

import compeft_fl as cf
from compeft_fl import errors
from compeft_fl.exchange import records
from compeft_fl.exchange.node_state import NodeState
from compeft_fl.exchange.protocol import Offer, follow
from compeft_fl.exchange.replica import Replica, Shipment
from compeft_fl.mod import CompressionMod
from compeft_fl.wire import messages
from compeft_fl.wire.v1 import update_pb2

FLOOR = 1 << 24  # parameters that any update may have
MIB = 1 << 20


def zeros(d, layout_size=None, offset=0, metadata=None):
    """A Golomb update whose d parameters are all 0: some 70 bytes for each 2^24 of them."""
    message = update_pb2.Update(num_parameters=d, offset=offset)
    message.layout.tensors.add(name="w", shape=[layout_size or d], dtype=1)
    for key, value in (metadata or {}).items():
        message.metadata[key] = value
    blocks = -(-d // FLOOR)
    message.golomb.scales[:] = [1.0]
    message.golomb.block_size = FLOOR
    message.golomb.block_nonzeros[:] = [0] * blocks
    message.golomb.rice_parameters = bytes(blocks)
    return message


def peak_of(function, *arguments, **options):
    """What a call gives, or the WireError that it raises, and the most memory that it takes."""
    tracemalloc.start()
    try:
        try:
            found = function(*arguments, **options)
        except errors.WireError as error:
            found = error
        return found, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module", autouse=True)
def _warm():
    for body in ("golomb", "bitmask", "dense", "context"):
        cf.decode(seal(valid(body)))


def test_many_parts_are_weighed_together():
    """Each is as large as one message may be; together they are implausible."""
    for count in (2, 25, 400):
        parts = [seal(zeros(FLOOR, count * FLOOR, i * FLOOR)) for i in range(count)]
        error, peak = peak_of(messages.decode_parts, parts)
        assert type(error) is errors.ImplausibleSizeError
        assert str(count * FLOOR) in str(error)
        assert peak < MIB + 64 * sum(map(len, parts))
    update, peak = peak_of(messages.decode_parts, [seal(zeros(FLOOR))])
    assert update.num_nonzeros == 0
    assert peak < 1.5 * FLOOR / 4  # two mask bits each


def test_padding_is_not_bytes_of_a_body():
    """Metadata, unknown fields and lists written at length make nothing more plausible."""
    d = 8 * FLOOR
    padded = zeros(d, metadata={"k": "x" * 200_000})
    unknown = zeros(d).SerializeToString() + b"\xaa\x06\x80\xb5\x18" + bytes(400_000)  # field 101
    many = zeros(d)
    for index in range(2_000):
        many.layout.tensors.add(name=f"{index} {80 * 'n'}", shape=[0], dtype=1)
        many.golomb.scales.append(1.0)
    for message in (padded, many, unknown):
        blob = seal(message)
        for function in (cf.decode, cf.Ties().add):
            error, peak = peak_of(function, blob)
            assert type(error) is errors.ImplausibleSizeError
            assert peak < MIB + 20 * len(blob)


def test_max_parameters_opens_what_is_large_and_empty():
    d = FLOOR + 1
    blob = seal(zeros(d))
    assert cf.decode(blob, max_parameters=d).num_parameters == d
    error = error_of(cf.decode, blob, max_parameters=d - 1)
    assert type(error) is errors.ImplausibleSizeError
    assert type(error_of(cf.decode, seal(valid()), max_parameters=399)) is not None
    assert cf.decode(seal(valid()), max_parameters=400).num_parameters == 400


@pytest.mark.long
def test_a_density_of_a_thousandth_is_plausible_at_any_size():
    d = 3 * FLOOR
    values = np.zeros(d, np.float32)
    values[::1000] = 1
    update = cf.TernaryVector.from_task_vector(cf.TaskVector.from_dict({"w": values}))
    for codec in ("golomb", "bitmask"):
        assert cf.decode(cf.encode(update, codec)).num_nonzeros == update.num_nonzeros


def test_empty_parts_are_counted_and_cost_no_more_than_their_bytes():
    empty = [seal(zeros(0, 400, 0)) for _ in range(4095)]
    whole = seal(valid("bitmask"))
    body = valid("bitmask").layout
    parts = []
    for _ in range(4095):
        message = update_pb2.Update(num_parameters=0, layout=body)
        message.context.scales[:] = [0.5]
        parts.append(seal(message))
    update = messages.decode_parts([*parts, whole])
    assert update.num_nonzeros == cf.decode(whole).num_nonzeros
    for many in ([*parts, parts[0], whole], empty * 20):
        error, peak = peak_of(messages.decode_parts, many)
        assert isinstance(error, errors.CoverageError)
        assert "4096" in str(error) or "parameters" in str(error)
        assert peak < MIB + 20 * sum(map(len, many))


def test_a_writer_makes_no_more_parts_than_a_reader_takes():
    tau = cf.TaskVector.from_dict({"w": np.ones(4097 * 4, "f4")})
    with pytest.raises(errors.ParameterError, match="4096 parts"):
        messages.encode_parts(tau, "dense", max_body_bytes=64 + 4)


def test_errors_are_short_and_print_whatever_they_quote():
    name = "\x1b[2J\u202e\0" + "n" * 3_000_000
    for shape, dtype in (([1] * 33, 1), ([20, 15], 77), ([2**63] * 4, 1)):
        message = valid()
        message.layout.tensors[0].name = name
        message.layout.tensors[0].shape[:] = shape
        message.layout.tensors[0].dtype = dtype
        blob = seal(message)
        error, peak = peak_of(messages.decode, blob)
        assert isinstance(error, errors.WireError)
        assert str(error).isprintable()
        assert len(str(error)) < 500
        assert peak < 10 * len(blob)
    message = valid()
    message.layout.tensors[0].name = name
    error = error_of(cf.decode, seal(message), layout=cf.decode(seal(valid())).layout)
    assert "lora_A" in str(error)
    assert len(str(error)) < 500
    long = errors.LayoutError(3_000_000 * "x\x07\n")
    assert len(str(long)) < 1000
    assert str(long).replace("\n", "").isprintable()


def test_a_hundred_thousand_tensors():
    """What is kept per tensor is a name and a shape; a second tensor of a name ends the reading."""
    message = zeros(1)
    for index in range(100_000):
        message.layout.tensors.add(name=str(index), shape=[1], dtype=1)
    message.num_parameters = 100_001
    message.golomb.block_nonzeros[:] = [0]
    blob = seal(message)
    update, peak = peak_of(messages.decode, blob)
    assert len(update.layout.tensors) == 100_001
    assert peak < 60 * len(blob)
    twice = zeros(1)
    for _ in range(500_000):
        twice.layout.tensors.add(dtype=1)
    blob = seal(twice)
    error, peak = peak_of(messages.decode, blob)
    assert type(error) is errors.MalformedError
    assert peak < MIB + 4 * len(blob)


def test_a_snapshot_is_known_to_be_none_before_it_is_expanded():
    blob = seal(zeros(FLOOR))
    error, peak = peak_of(Replica.from_snapshot, [blob])
    assert "dense" in str(error)
    assert peak < MIB


def test_deltas_are_no_more_than_a_server_keeps():
    """A delta of 60 bytes costs a pass over the adapter: there are not a million of them."""
    replica = Replica(cf.Layout([cf.TensorSpec("w", (8,))]), np.zeros(8, np.float32), 0)
    blob = seal(zeros(8))
    with pytest.raises(errors.WireError, match="1024 deltas"):
        replica.advance([blob] * 1025, 1025)


def test_an_array_of_a_stock_client_takes_what_its_bytes_hold():
    """`numpy.load` takes memory for what a header claims, evaluates it, and opens archives."""

    def record(data):
        return ArrayRecord({"w\x1b": Array("float32", (2,), "numpy.ndarray", data)})

    def npy(header, data=b""):
        text = header.encode() + b"\n"
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data

    for array in (np.ones((2, 3), "f4"), np.array(2, "i8"), np.asfortranarray(np.eye(3)),
                  np.zeros((0, 3), "f4"), np.array([True])):  # fmt: skip
        state = records.to_state(ArrayRecord({"w": Array(array)}))
        assert np.array_equal(state["w"], array)
        assert (state["w"].dtype, state["w"].shape) == (array.dtype, array.shape)
        assert state["w"].flags.writeable
    archive = io.BytesIO()
    np.savez(archive, w=np.ones(3))
    plain = "{'descr': '%s', 'fortran_order': False, 'shape': %s}"
    for data in (
        npy(plain % ("<f4", f"({2**30},)"), bytes(8)),
        npy(plain % ("<f4", f"({2**62}, 4)"), bytes(8)),
        npy(plain % ("<f4", "(0, -1)")),
        npy(plain % ("<f4", "(" + "1," * 40 + ")"), bytes(4)),
        npy(plain % ("<f4", "(" * 5000)),
        npy(plain % ("|O", "(1,)"), bytes(8)),
        npy(plain % ("<f4", "(2,)"), bytes(9)),
        archive.getvalue(),
        b"",
    ):
        tracemalloc.start()
        try:
            with pytest.raises(errors.LayoutError, match=r"w\\x1b") as caught:
                records.to_state(record(data))
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()
        assert str(caught.value).isprintable()


def test_log_lines_hold_no_strangers_escapes(caplog):
    caplog.set_level("INFO", logger="flwr.compeft_fl")
    hostile = f"name{chr(27)}[2J\nforged line"
    records.LOGGER.warning("node %s sent %d bytes: %s", hostile, 7, errors.LayoutError(hostile))
    try:
        raise ValueError(hostile)
    except ValueError:
        records.LOGGER.exception("of %r", hostile)
    assert [record.getMessage() for record in caplog.records] == [
        "node name\\x1b[2J\\nforged line sent 7 bytes: name\\x1b[2J\\nforged line",
        "of 'name\\\\x1b[2J\\\\nforged line'",
    ]
    assert caplog.text.replace("\n", "").isprintable()


def test_a_node_gives_a_padded_update_back(tmp_path):
    """26 kB that claim 2 x 10^8 parameters: an error reply, and no memory."""
    node = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})
    blob = seal(zeros(12 * FLOOR, metadata={"k": "x" * 26_000}))
    identify()
    content = RecordDict({"arrays": records.update_record(blob, 12 * FLOOR)})
    message = set_metadata(Message(content, 7, "train"), message_id="m")
    mod = CompressionMod(state_dir=tmp_path)
    reply, peak = peak_of(mod, message, node, lambda message, context: pytest.fail("was called"))
    assert reply.has_error()
    assert "ImplausibleSizeError" in reply.error.reason
    assert peak < 2 * MIB


@pytest.mark.parametrize("kind", ["start", "deltas"])
def test_a_shipment_of_too_many_parts_is_not_looked_at(kind, monkeypatch):
    """100,000 empty parts in 2 MB took seconds."""
    layout = cf.Layout([cf.TensorSpec("w", (5,))])
    (blob,) = messages.encode_parts(cf.TaskVector(layout, np.zeros(5, np.float32)), "steps")
    known = NodeState().following(Replica(layout, np.zeros(5, np.float32), 0), None)
    for name in ("inspect", "open_update"):
        monkeypatch.delattr(f"compeft_fl.exchange.replica.{name}")
    monkeypatch.delattr("compeft_fl.exchange.protocol.inspect")
    offer = Offer("f" * 16, 1, bytes(16), b"")
    with pytest.raises(errors.ResyncError, match=r"expected at most .* found 100000"):
        follow(known, offer, Shipment(kind, (blob,) * 100_000))
