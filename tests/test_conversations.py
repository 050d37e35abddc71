"""Instructions: the shapes they come in, rows that are none, and what a model reads of them."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
from language_models import pairs, save_llama, write_rows

from compeft_fl.app.config import AppConfig
from compeft_fl.app.tasks import conversations
from compeft_fl.app.tasks.conversations import Conversation, Turn
from compeft_fl.app.tasks.formatting import IGNORED, Formatter
from compeft_fl.app.tasks.partition import partition
from compeft_fl.errors import ConfigError

PAIR = {"prompt": "say hi", "response": "hi"}
MESSAGES = {
    "messages": [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "hi"}]
}
ALPACA = {"instruction": "say it", "input": "hi", "output": "hi"}


@pytest.fixture
def load(tmp_path):
    """The data of rows, in a file of some kind."""

    def load(rows, suffix=".jsonl", **changes):
        path = tmp_path / f"rows{suffix}"
        if suffix == ".jsonl":
            write_rows(path, rows)
        elif suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(path)
        config = AppConfig(task="instruction", data=str(path), **{"partition": "iid", **changes})
        return conversations.load(config)

    return load


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of models with and without a chat template."""
    from transformers import AutoTokenizer

    folders = {chat: tmp_path_factory.mktemp("models") for chat in (True, False)}
    return {
        chat: AutoTokenizer.from_pretrained(save_llama(folder, chat=chat))
        for chat, folder in folders.items()
    }


@pytest.fixture
def written(tokenizers):
    """What a model reads of a conversation, and what it learns."""

    def written(conversation, *, chat=True, seq2seq=False, **changes):
        config = AppConfig(task="instruction", **{"max_length": 512, **changes})
        tokenizer = tokenizers[chat]
        formatter = Formatter(tokenizer, config, seq2seq=seq2seq)
        (row,) = formatter.encode([conversation])
        learned = [int(i) for i in row.labels if i != IGNORED]
        prompt = tokenizer.decode(formatter.prompt(conversation))
        return tokenizer.decode(row.input_ids), tokenizer.decode(learned), prompt

    return written


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("row", [PAIR, MESSAGES, ALPACA], ids=["pair", "messages", "alpaca"])
def test_three_shapes_in_three_kinds_of_files(load, row, suffix):
    as_written = {
        name: json.dumps(value) if suffix == ".csv" and name == "messages" else value
        for name, value in row.items()
    }
    found = load([as_written] * 20, suffix)
    assert [len(split) for split in (found.train, found.validation, found.test)] == [15, 1, 4]
    first = found.train.rows[0]
    assert first.response == "hi"
    assert first.turns[0].content == ("say it\n\nhi" if row is ALPACA else "say hi")
    assert first.where == "row 1 of train"


def test_columns_of_other_names(load):
    rows = [{"question": "q", "answer": "a"}] * 20
    found = load(rows, prompt_column="question", response_column="answer")
    assert found.train.rows[0].turns == (Turn("user", "q"), Turn("assistant", "a"))


def test_kinds_go_to_nodes_unevenly(load):
    rows = load(pairs(400), partition="dirichlet", alpha=0.1).train
    config = AppConfig(task="instruction", alpha=0.1)
    parts = partition(rows, 4, config)
    assert sorted(np.concatenate(parts)) == list(range(len(rows)))
    shares = [np.mean([rows.groups[i] == "sound" for i in part]) for part in parts]
    assert max(shares) - min(shares) > 0.5


def test_kinds_stay_together(load):
    rows = load(pairs(400), partition="column").train
    parts = partition(rows, 2, AppConfig(task="instruction", partition="column"))
    assert [len({rows.groups[i] for i in part}) for part in parts] == [1, 1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "answer": "b"}], r'response-column: .* no column "response"'),
        ([{"instruction": "a", "answer": "b"}], r'data: .* no column "output" for the response'),
        ([{"text": "a"}], r'expected columns "prompt" and "response", or "messages".*found text'),
        ([PAIR, {**PAIR, "response": " "}], "row 2 of train: expected a response, found none"),
        ([PAIR, {**PAIR, "response": None}], "row 2 of train: expected a response, found none"),
        ([PAIR, {**PAIR, "prompt": ""}], "row 2 of train: expected a prompt, found none"),
        ([{**ALPACA, "output": ""}], "row 1 of train: expected a response, found none"),
        ([{"messages": []}], "row 1 of train: expected a list of messages"),
        ([{"messages": "no JSON"}], "row 1 of train: expected messages as JSON"),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            "row 1 of train: expected messages that end with the assistant's response, found user",
        ),
        (
            [{"messages": [{"role": "boss", "content": "a"}]}],
            "expected a role of system, user, assistant, tool, found 'boss'",
        ),
        ([{"messages": [{"who": "user"}]}], "expected messages with role and content"),
    ],
)
def test_rows_that_are_none_are_named(load, rows, message):
    with pytest.raises(ConfigError, match=message):
        load(rows)


def test_a_partition_needs_its_column(load):
    with pytest.raises(ConfigError, match=r'partition-column: .* no column "source"'):
        load([PAIR] * 20, partition="dirichlet")


# --- what a model reads -----------------------------------------------------------------------


def conversation(*turns, **more) -> Conversation:
    roles = ["user", "assistant"] * len(turns)
    made = tuple(Turn(role, text) for role, text in zip(roles, turns, strict=False))
    return Conversation(made, "row 7 of train", **more)


def test_the_loss_is_on_the_response_alone(written):
    text, learned, prompt = written(conversation("say hi", "hi"))
    assert learned == "hi<eos>"
    assert text == prompt + learned
    assert prompt == "<|user|>\nsay hi<|assistant|>\n"


def test_each_of_the_assistants_turns_is_learned(written):
    text, learned, prompt = written(conversation("a?", "b", "c?", "d", shape="messages"))
    assert learned == "b<eos>d<eos>"
    assert text.endswith("<|assistant|>\nd<eos>")
    assert prompt + "d<eos>" == text


def test_without_a_chat_template_prompt_and_response_are_as_they_are(written):
    text, learned, prompt = written(conversation("2 + 2 = ", "4"), chat=False)
    assert (text, learned, prompt) == ("2 + 2 = 4<eos>", "4<eos>", "2 + 2 = ")


def test_alpaca_has_its_headings(written):
    made = conversation("say it\n\nhi", "hi!", shape="alpaca", alpaca=("say it", "hi"))
    text, learned, _ = written(made, chat=False)
    assert "### Instruction:\nsay it\n\n### Input:\nhi\n\n### Response:\nhi!<eos>" in text
    assert learned == "hi!<eos>"
    text, _, _ = written(conversation("say hi", "hi"), chat=True, template="alpaca")
    assert text.endswith("### Instruction:\nsay hi\n\n### Response:\nhi<eos>")


def test_encoder_and_decoder_get_prompt_and_response(written):
    text, learned, prompt = written(conversation("say hi", "hi"), seq2seq=True)
    assert (text, learned, prompt) == ("say hi<eos>", "hi<eos>", "say hi<eos>")


def test_a_long_response_is_cut_off_and_a_long_prompt_refused(written):
    text, learned, prompt = written(conversation("say a", "a" * 900), max_length=64)
    assert len(prompt) < len(text) < 200
    assert set(learned) == {"a"}
    with pytest.raises(ConfigError, match=r"row 7 of train: the prompt has 9\d\d tokens"):
        written(conversation("a" * 900, "b"), max_length=64)


def test_messages_need_a_chat_template(written):
    chat = conversation("a", "b", shape="messages")
    with pytest.raises(ConfigError, match=r"row 7 of train: messages need a chat template"):
        written(chat, chat=False)
    with pytest.raises(ConfigError, match=r"the tokenizer of minilm has no chat template"):
        written(chat, chat=False, template="chat")
    assert written(chat, chat=False, template="plain")[0] == "ab<eos>"
    several = dataclasses.replace(chat, turns=chat.turns * 2)
    with pytest.raises(ConfigError, match=r"expected one prompt and one response .* found 4 turns"):
        written(several, chat=False, template="plain")


def test_a_template_that_fails_is_named(tokenizers):
    tokenizer = tokenizers[True]
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    try:
        formatter = Formatter(tokenizer, AppConfig(task="instruction"))
        with pytest.raises(ConfigError, match=r"row 7 of train: the chat template .* no such role"):
            formatter.encode([conversation("a", "b")])
    finally:
        tokenizer.chat_template = before
