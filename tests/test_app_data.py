from __future__ import annotations

import json

import numpy as np
import pytest

from compeft_fl.app.config import AppConfig
from compeft_fl.app.embedded import build_debian_sections as debian
from compeft_fl.app.tasks import data
from compeft_fl.errors import ConfigError


@pytest.fixture(scope="module")
def sections() -> data.TextData:
    return data.load(AppConfig())


def test_the_embedded_sections(sections):
    sizes = len(sections.train), len(sections.validation), len(sections.test)
    assert sizes == (3998, 557, 1110)
    assert len(sections.labels) == 12
    assert sections.labels == tuple(sorted(sections.labels))
    for rows in (sections.train, sections.validation, sections.test):
        assert set(rows.classes) == set(range(12))
        assert len(rows.texts) == len(rows.groups) == len(rows.classes)
        assert all(rows.texts)


def test_no_source_package_is_in_two_splits(sections):
    train, validation, test = (
        set(rows.groups) for rows in (sections.train, sections.validation, sections.test)
    )
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_the_embedded_file_is_what_its_script_makes():
    rows = [debian.Row(**row) for row in embedded_rows()]
    assert {row.label for row in rows} == debian.SECTIONS
    assert all(debian.split_of(row.source) == row.split for row in rows)
    assert len({row.text for row in rows}) == len(rows)


def embedded_rows() -> list[dict[str, str]]:
    from importlib import resources

    file = resources.files("compeft_fl.app") / "embedded" / "debian-section.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        ("debian-section", 12, (3998, 557, 1110)),
        ("debian-role", 6, (1679, 243, 478)),
        ("debian-interface", 6, (1089, 183, 355)),
        ("debian-lang", 7, (1224, 170, 362)),
    ],
)
def test_the_embedded_tasks(name, classes, sizes):
    found = data.load(AppConfig(data=name))
    assert len(found.labels) == classes
    assert (len(found.train), len(found.validation), len(found.test)) == sizes
    assert not set(found.train.groups) & set(found.test.groups)


# --- files and data sets ----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(tiny_rows, tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    renamed = [
        {"body": row["text"], "kind": row["label"], "part": row["split"]} for row in tiny_rows
    ]
    write(path, renamed)
    found = data.load(
        AppConfig(data=str(path), text_column="body", label_column="kind", split_column="part")
    )
    assert found.labels == ("animals", "colours", "numbers")
    assert (len(found.train), len(found.validation), len(found.test)) == (240, 60, 60)
    assert found.train.texts[0] == tiny_rows[0]["text"]
    assert found.labels[found.train.classes[1]] == tiny_rows[1]["label"]


def write(path, rows) -> None:
    from datasets import Dataset

    dataset = Dataset.from_list(rows)
    if path.suffix == ".csv":
        dataset.to_csv(path)
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_data_set_by_name(tiny_rows, tmp_path, monkeypatch):
    """A folder stands in for a name on the Hub: both go through `datasets.load_dataset`."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        rows = [{"text": r["text"], "label": r["label"]} for r in tiny_rows if r["split"] == split]
        write(folder / f"{name}.jsonl", rows)
    found = data.load(AppConfig(data=str(folder), validation_split="validation", partition="iid"))
    assert (len(found.train), len(found.validation), len(found.test)) == (192, 60, 48)


def test_numbers_serve_as_labels(tmp_path):
    write(tmp_path / "rows.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(40)])
    found = data.load(AppConfig(data=str(tmp_path / "rows.jsonl")))
    assert found.labels == ("0", "1")


def test_rows_without_text_or_label_are_left_out(tmp_path):
    rows = [{"text": f"t{i}", "label": str(i % 2), "split": "train"} for i in range(40)]
    rows += [{"text": None, "label": "0", "split": "train"}]
    rows += [{"text": "", "label": "1", "split": "train"}]
    rows += [{"text": "lost", "label": None, "split": "train"}]
    write(tmp_path / "rows.jsonl", rows)
    found = data.load(AppConfig(data=str(tmp_path / "rows.jsonl")))
    assert len(found.train) + len(found.validation) + len(found.test) == 40


def test_missing_splits_are_cut_off_the_training_rows(tmp_path, tiny_rows):
    path = tmp_path / "rows.jsonl"
    write(path, [{"text": str(i), "label": row["label"]} for i, row in enumerate(tiny_rows)])
    config = AppConfig(data=str(path))
    found, again = data.load(config), data.load(config)
    parts = [set(rows.texts) for rows in (found.train, found.validation, found.test)]
    assert [len(part) for part in parts] == [260, 28, 72]
    assert len(set.union(*parts)) == len(tiny_rows)
    assert found.test.texts == again.test.texts
    assert data.load(AppConfig(data=str(path), seed=1)).test.texts != found.test.texts


def test_rows_can_be_limited(tiny_data):
    found = data.load(AppConfig(data=str(tiny_data), limit_rows=30))
    assert (len(found.train), len(found.validation), len(found.test)) == (30, 30, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "no.jsonl"}, "data: no file no.jsonl"),
        ({"text_column": "txt"}, 'text-column: .* has no column "txt": did you mean "text"'),
        ({"label_column": "class"}, 'label-column: .* has no column "class"; choices: text, label'),
        (
            {"partition": "column", "partition_column": "sorce"},
            'partition-column: .* has no column "sorce": did you mean "source"',
        ),
        ({"train_split": "trian"}, 'train-split: no split "trian": did you mean "train"'),
        ({"label_column": "split", "train_split": "train"}, None),
    ],
)
def test_what_is_missing_is_named(tiny_data, changes, message):
    config = AppConfig(**{"data": str(tiny_data), **changes})
    if message is None:  # an odd choice of label works as well
        assert data.load(config).labels == ("test", "train", "val")
        return
    with pytest.raises(ConfigError, match=message):
        data.load(config)


def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"\n[3\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"rows\.jsonl cannot be read as \.jsonl"):
        data.load(AppConfig(data=str(path)))


def test_an_unknown_data_set_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r'data: "debian-sections" is no file .*did you mean'):
        data.load(AppConfig(data="debian-sections"))


def test_one_class_is_too_few(tmp_path):
    write(tmp_path / "rows.jsonl", [{"text": f"t{i}", "label": "a"} for i in range(40)])
    with pytest.raises(ConfigError, match=r"at least two classes are needed, found \['a'\]"):
        data.load(AppConfig(data=str(tmp_path / "rows.jsonl")))


# --- partitions -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "column"])
@pytest.mark.parametrize("num_nodes", [1, 3, 10])
def test_a_partition_covers_every_row_once(sections, kind, num_nodes):
    config = AppConfig(partition=kind)
    parts = data.partition(sections.train, num_nodes, config)
    assert len(parts) == num_nodes
    assert min(map(len, parts)) >= config.min_rows
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(sections.train)))
    again = data.partition(sections.train, num_nodes, config)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_another_seed_gives_another_partition(sections, kind):
    first = data.partition(sections.train, 4, AppConfig(partition=kind))
    second = data.partition(sections.train, 4, AppConfig(partition=kind, seed=43))
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_iid_parts_are_of_one_size(sections):
    sizes = [len(part) for part in data.partition(sections.train, 7, AppConfig(partition="iid"))]
    assert max(sizes) - min(sizes) <= 1


def skew(sections, alpha: float) -> float:
    """The part of a node's rows that its largest class has, on average."""
    parts = data.partition(sections.train, 10, AppConfig(alpha=alpha))
    return float(np.mean([np.bincount(sections.train.classes[p]).max() / len(p) for p in parts]))


def test_a_small_alpha_makes_nodes_differ(sections):
    assert skew(sections, 0.1) > skew(sections, 0.3) > skew(sections, 100.0)
    assert skew(sections, 100.0) < 0.15


def test_every_node_gets_rows_however_uneven_the_draw(sections):
    rows = sections.train.take(range(120))
    parts = data.partition(rows, 10, AppConfig(alpha=0.01, min_rows=12))
    assert [len(part) for part in parts] == [12] * 10


def test_values_of_a_column_stay_together(sections):
    parts = data.partition(sections.train, 5, AppConfig(partition="column"))
    owners: dict[str, set[int]] = {}
    for node, part in enumerate(parts):
        for row in part:
            owners.setdefault(sections.train.groups[row], set()).add(node)
    assert all(len(nodes) == 1 for nodes in owners.values())


def test_too_few_rows_or_values_are_named(sections):
    with pytest.raises(ConfigError, match="3998 rows are too few for 1000 nodes with at least 8"):
        data.partition(sections.train, 1000, AppConfig())
    rows = data.Rows(("a",) * 90, np.zeros(90, np.int64), ("x", "y") * 45)
    config = AppConfig(partition="column")
    with pytest.raises(ConfigError, match=r'"source" has 2 values, too few for 3 nodes'):
        data.partition(rows, 3, config)
    lopsided = data.Rows(rows.texts, rows.classes, ("x",) * 88 + ("y",) * 2)
    with pytest.raises(ConfigError, match=r"a node gets 2 rows, fewer than min-rows=8"):
        data.partition(lopsided, 2, config)


def test_a_node_gets_its_part(tiny_data):
    config = AppConfig(data=str(tiny_data))
    loaded = data.load(config)
    rows = data.node_rows(loaded, {"partition-id": 1, "num-partitions": 3}, config)
    assert rows.texts == loaded.train.take(data.partition(loaded.train, 3, config)[1]).texts


@pytest.mark.parametrize(
    "node", [{}, {"partition-id": 0}, {"partition-id": 2, "num-partitions": 2}]
)
def test_a_node_must_know_its_part(tiny_data, node):
    config = AppConfig(data=str(tiny_data))
    with pytest.raises(ConfigError, match="needs partition-id and num-partitions"):
        data.node_rows(data.load(config), node, config)


# --- the script that makes the embedded file --------------------------------------------------

DUMP = """\
Package: alpha-tools
Version: 1
Section: net
Description: network tools of Alpha for the command line
Description-md5: 1

Package: liballoy-doc
Source: alloy (2.0)
Section: contrib/doc
Description: Documentation for liballoy, an allocator

Package: alloy-extra
Source: alloy
Section: doc
Description: documentation for, an Allocator

Package: shorty
Section: net
Description: shorty, net

Package: other
Section: libs
Description: a library that nobody asked for
"""


def test_packages_become_rows():
    assert [(row.text, row.label, row.source) for row in debian.build(debian.packages(DUMP))] == [
        ("network tools of for the command line", "net", "alpha-tools"),
        ("documentation for, an Allocator", "doc", "alloy"),  # the other is nearly the same
    ]


def test_sources_are_capped():
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}x" for i in range(90)]
    dump = "\n\n".join(
        f"Package: p{i}\nSource: s{i // 3}\nSection: net\nDescription: {word} and many more"
        for i, word in enumerate(words)
    )
    rows = debian.build(debian.packages(dump))
    assert len(rows) == 30 * debian.ROWS_OF_A_SOURCE


def test_sections_are_capped():
    words = [f"{chr(97 + i % 26)}{chr(97 + i // 26)}x" for i in range(600)]
    dump = "\n\n".join(
        f"Package: p{i}\nSection: {section}\nDescription: {section} {word} and many more"
        for i, word in enumerate(words)
        for section in ("net", "web")
    )
    rows = debian.build(debian.packages(dump))
    assert sum(row.label == "net" for row in rows) == debian.ROWS_OF_A_SECTION
    again = debian.build(reversed(list(debian.packages(dump))))
    assert again == rows  # whatever the order of the packages


def test_the_script_writes_and_compares(tmp_path, capsys):
    (tmp_path / "dump").write_text(DUMP, encoding="utf-8")
    arguments = ["--dump", str(tmp_path / "dump"), "-o", str(tmp_path / "rows.jsonl")]
    assert debian.main(arguments) == 0
    assert debian.main([*arguments, "--compare", str(tmp_path / "rows.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "2 rows, of which 2 are here as well" in out
    assert "rows of theirs in another split: 0" in out
