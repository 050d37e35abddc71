"""The embedded instructions and the scripts that make them, on a small archive."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from compeft_fl.app import embedded
from compeft_fl.app.embedded import build_debian_instructions as instructions
from compeft_fl.app.embedded import debian_archive, train_debian_lm
from compeft_fl.app.embedded.build_debian_sections import split_of
from compeft_fl.errors import ConfigError

PACKAGES = """\
Package: alpha
Source: alpha-source (1.0)
Depends: libc6 (>= 2.35), python3:any | python3-all, libc6 (<< 3)
Section: contrib/net
Description: tools for the networks of Alpha
Description-md5: 11
Tag: implemented-in::c, role::program,
 interface::commandline

Package: alpha
Version: 2
Section: doc
Description: an older one

Package: beta
Description: nobody says more
"""
TRANSLATIONS = """\
Package: alpha
Description-md5: 11
Description-en: tools for the networks of Alpha
 They ask, answer and measure, over wires
 and without, for as long as it takes.
 .
 There are:
  - a list
  - of two
"""
ALPHA, BETA = debian_archive.read_lists(PACKAGES, TRANSLATIONS)


def test_what_the_archive_says():
    assert ALPHA.name == "alpha"
    assert ALPHA.source == "alpha-source"
    assert ALPHA.section == "net"
    assert ALPHA.synopsis == "tools for the networks of Alpha"
    assert ALPHA.description == (
        "They ask, answer and measure, over wires and without, for as long as it takes.\n\n"
        "There are:\n - a list\n - of two"
    )
    assert ALPHA.depends == ("libc6", "python3")
    assert ALPHA.tags == ("implemented-in::c", "interface::commandline", "role::program")
    assert ALPHA.split == split_of("alpha-source")
    assert BETA == ("beta", "beta", "", "nobody says more", "", (), ())


def test_a_package_is_asked_about_in_five_ways():
    rows = instructions.build([ALPHA, BETA])
    assert {row.kind: row.response for row in rows} == {
        "depends": "libc6, python3",
        "language": "C",
        "role": "program",
        "section": "net",
        "synopsis": "tools for the networks of Alpha",
    }
    prompts = {row.kind: row.prompt for row in rows}
    assert "tools for the networks" not in prompts["synopsis"]  # it is the answer
    question, about = prompts["role"].split("\n\n")
    assert question == "What is the role of this package?"
    assert about.startswith("alpha: tools for the networks of Alpha. They ask, answer")
    assert all(row.split == ALPHA.split for row in rows)


def test_what_has_two_answers_or_none_is_not_asked():
    tags = ("implemented-in::c", "implemented-in::perl", "role::TODO")
    package = ALPHA._replace(tags=tags, depends=("libghc-base-dev-4.15.1.0-6a406",), section="odd")
    assert [row.kind for row in instructions.build([package])] == ["synopsis"]


def test_descriptions_end_with_a_sentence():
    text = "One sentence is here. " + "Another that goes on. " * 40
    (row,) = instructions.build([ALPHA._replace(description=text, tags=(), depends=(), section="")])
    assert row.prompt.endswith("that goes on.")
    assert len(row.prompt) < instructions.LONGEST + 100


def test_answers_and_sources_are_capped(monkeypatch):
    monkeypatch.setattr(instructions, "ROWS_OF_A_KIND", {"train": 20, "val": 20, "test": 20})
    many = [
        ALPHA._replace(
            name=f"p{i}", source=f"s{i // 4}", description=f"{ALPHA.description} {i} of many."
        )
        for i in range(400)
    ]
    rows = instructions.build(many)
    answers = Counter((row.kind, row.split, row.response) for row in rows)
    assert max(answers.values()) == 3  # 0.15 of 20
    assert max(Counter((row.source, row.kind) for row in rows).values()) <= 2
    assert instructions.build(reversed(many)) == rows  # whatever the order of the packages


def test_the_embedded_instructions():
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(embedded.path("debian-instructions.parquet")).to_pylist()
    assert len(rows) == 9858
    counts = Counter((row["kind"], row["split"]) for row in rows)
    assert {kind for kind, _ in counts} == set(instructions.KINDS)
    assert all(counts[kind, "train"] >= 1490 for kind in instructions.KINDS)
    assert all(counts[kind, "test"] >= 277 for kind in instructions.KINDS)
    assert all(row["split"] == split_of(row["source"]) for row in rows)
    assert all(row["prompt"].strip() and row["response"].strip() for row in rows)
    assert len({(row["kind"], row["prompt"]) for row in rows}) == len(rows)


def test_lists_that_are_not_there_are_one_line(tmp_path, capsys):
    apt = ["--apt", f"Dir::State::lists={tmp_path}"]
    code = instructions.main(["-o", str(tmp_path / "x.parquet"), *apt])
    said = capsys.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert "apt" in said


def test_a_bundle_finds_the_installed_files(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "__init__.py"))
    installed = tmp_path / "site" / "compeft_fl" / "app" / "embedded"
    installed.mkdir(parents=True)
    (installed / "x.bin").write_bytes(b"x")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert embedded.path("x.bin") == installed / "x.bin"
    with pytest.raises(ConfigError, match=r"expected y\.bin in the installed package"):
        embedded.path("y.bin")


# --- the language model -------------------------------------------------------------------------


def held_out_texts() -> list[str]:
    """Descriptions of held-out packages, from the questions on them, as the model is trained on."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(embedded.path("debian-instructions.parquet")).to_pylist()
    return [
        f"<|begin|>{row['package']}: {row['response']}\n\n" + row["prompt"].partition("\n\n")[2]
        for row in rows
        if row["kind"] == "synopsis" and row["split"] == "test"
    ]


def test_the_language_model_is_as_good_as_its_card_says():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.path(embedded.LANGUAGE_MODEL)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert 5e6 < model.num_parameters() < 10e6
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    loss, size = 0.0, 0
    for text in held_out_texts()[:40]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            loss += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        size += len(text.encode())
    assert loss / size / np.log(2) < 1.6  # bits a byte; the card: 1.32 over all of them
    chat = [{"role": "user", "content": "What is x?"}, {"role": "assistant", "content": "y"}]
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert asked == "<|begin|><|user|>What is x?<|end|><|assistant|>"
    assert whole == f"{asked}y<|end|>"
    found = tokenizer.apply_chat_template(
        chat, return_dict=True, return_assistant_tokens_mask=True, return_tensors=None
    )
    ids = [i for i, m in zip(found["input_ids"], found["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(ids) == "y<|end|>"


def test_what_the_model_is_trained_on():
    packages = [
        ALPHA._replace(name=f"a{i}", source=f"s{i}", synopsis=f"tools of kind {i}")
        for i in range(40)
    ]
    seen = list(train_debian_lm.documents(packages))
    unseen = list(train_debian_lm.documents(packages, held_out=True))
    names = {package.name for package in packages if package.split != "test"}
    assert 0 < len(unseen) < len(seen) == len(names)
    assert all(text.startswith("<|begin|>") and text.endswith("<|end|>") for text in seen)
    asked = [text for text in seen if text.startswith("<|begin|><|user|>What is a")]
    assert 0 < len(asked) < len(seen)
    assert sum("They ask, answer" in text for text in seen) == train_debian_lm.REPEATS


def test_training_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Four steps in one call, and in two: the same weights, and a model that loads."""
    import torch
    from transformers import AutoModelForCausalLM

    for name, small in {"WIDTH": 16, "DEPTH": 1, "HEADS": 2, "INNER": 32, "ROWS": 2}.items():
        monkeypatch.setattr(train_debian_lm, name, small)
    monkeypatch.setattr(train_debian_lm, "CONTEXT", 8)
    monkeypatch.setattr(torch, "compile", lambda model: model)  # half a minute of a C++ compiler
    packages = [
        ALPHA._replace(name=f"a{i}", source=f"s{i}", description=f"{ALPHA.description} Of {i}.")
        for i in range(60)
    ]
    monkeypatch.setattr(debian_archive, "read", lambda apt: packages)
    weights = []
    for name, calls in (("one", [4]), ("two", [2, 4])):
        work = ["--work", str(tmp_path / name)]
        for steps in calls:
            fall = int(train_debian_lm.FALL * 5)
            monkeypatch.setattr(train_debian_lm, "FALL", fall / (steps + fall))
            assert train_debian_lm.main([*work, "--steps", str(steps + fall)]) == 0
            monkeypatch.setattr(train_debian_lm, "FALL", 0.2)
        output = tmp_path / f"{name}-model"
        assert train_debian_lm.main([*work, "--steps", "5", "--finish", "-o", str(output)]) == 0
        weights.append(AutoModelForCausalLM.from_pretrained(output).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "held_out_loss" in capsys.readouterr().out
