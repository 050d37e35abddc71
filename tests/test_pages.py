"""The pages: code that runs, commands that exist, links that lead somewhere, figures that stand."""

from __future__ import annotations

import doctest
import importlib.metadata
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from compeft_fl.cli.main import _parser
from compeft_fl.mod import CompressionMod

ROOT = Path(__file__).resolve().parent.parent
FRONT_DOOR = "README.md"
FOLDERS = ("compeft_fl", "proto", "simulations", "strategies")
PAGES = [
    name
    for name in (
        FRONT_DOOR,
        "CHANGELOG.md",
        *(str(file.relative_to(ROOT)) for each in FOLDERS for file in (ROOT / each).rglob("*.md")),
    )
    if not name.startswith("compeft_fl/strategies/")  # the link
]
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
RESULTS = ROOT / "simulations" / "results"
FIGURES = TEXT["simulations/results/README.md"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OF_OTHERS = {"cd", "docker", "export", "git"}
LONGEST = 150


def blocks(name, language):
    """A page's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT[name], re.MULTILINE | re.DOTALL)


def pages_with(language):
    return [name for name in PAGES if blocks(name, language)]


def anchors(text):
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_front_door_is_short():
    assert len(TEXT[FRONT_DOOR].splitlines()) <= LONGEST


@pytest.mark.parametrize("name", pages_with("python"))
@pytest.mark.usefixtures("examples_leave_nothing")
def test_the_python_of_a_page_runs(name):
    for block in blocks(name, "python"):
        if ">>>" in block:
            test = doctest.DocTestParser().get_doctest(block, {}, name, name, 0)
            assert test.examples
            assert doctest.DocTestRunner(verbose=False).run(test).failed == 0
        else:
            exec(compile(block, name, "exec"), {})


def check_command(words):
    """A command of a page: does it exist, and does it take these arguments?"""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program == "make":
        assert arguments[0] in TARGETS, words
    elif program == "compeft-fl":
        assert callable(_parser().parse_args(arguments).handler), words
    elif program == "python":
        script = ROOT / arguments[0]
        options = [word for word in arguments if word.startswith("--")]
        assert [o for o in options if f'"{o}"' not in script.read_text(encoding="utf-8")] == []
    elif program == "pip":
        assert arguments[0] == "install", words
        for extras in re.findall(r"\[(.*)\]", " ".join(arguments)):
            assert set(extras.split(",")) <= set(EXTRAS), words
    elif program not in OF_OTHERS:
        known = {entry.name for entry in importlib.metadata.entry_points(group="console_scripts")}
        assert program in known, words


@pytest.mark.parametrize("name", pages_with("sh"))
def test_the_commands_of_a_page_exist(name):
    for block in blocks(name, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                check_command(words[: words.index("&&")])
                words = words[words.index("&&") + 1 :]
            if words:
                check_command(words)


@pytest.mark.parametrize("name", PAGES)
def test_commands_within_sentences_exist(name):
    prose = re.sub(r"^```.*?^```$", "", TEXT[name], flags=re.MULTILINE | re.DOTALL)
    for command in re.findall(r"`((?:make|compeft-fl|python) [^`]*)`", prose):
        program, first, *_ = command.split()
        if program == "make":
            assert first in TARGETS, command
        elif program == "python":
            assert first.startswith("-") or (ROOT / first).is_file(), command
        elif re.fullmatch(r"[a-z]+", first):
            known = next(iter(_parser()._subparsers._group_actions)).choices
            assert first in known, command


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name):
    prose = re.sub(r"^```.*?^```$", "", TEXT[name], flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", PAGES)
def test_no_page_promises_what_no_index_has(name):
    assert not re.search(r"pip install (-\S+ )*'?compeft-fl", TEXT[name])


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_left_to_fill_in(name):
    assert re.findall(r"<!--.*|TODO.*|FIXME.*", TEXT[name]) == []


def test_the_mod_s_keywords_are_those_of_its_page():
    table = re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT["strategies/README.md"], re.MULTILINE)
    keywords = inspect.signature(CompressionMod).parameters
    assert {name for name, _ in table} == set(keywords)
    for name, default in table:
        expected = keywords[name].default
        assert default == ("-" if expected is None else f"`{expected!r}`".replace("'", '"')), name


# --- figures ----------------------------------------------------------------------------------


def test_each_file_of_results_has_its_question_and_command():
    rows = [line.split(" | ") for line in FIGURES.splitlines() if line.count(" | ") == 2]
    named = {}
    for question, command, files in rows[1:]:
        for file in re.findall(r"\]\((\w+\.\w+)\)", files):
            assert question.rstrip().endswith("?")
            named[file] = command.strip("` ")
    here = {file.name for file in RESULTS.iterdir() if file.suffix in (".md", ".png")}
    assert here - set(named) == {"README.md", "accuracy.png"}
    for file, command in named.items():
        said = (RESULTS / file).read_text("utf-8").splitlines()[0] if file.endswith("md") else ""
        assert not said.startswith("`") or said.startswith(f"`{command}`"), file


def rows_of_figures(name):
    """Each row of a page's tables that has figures, with the file of results that it is from."""
    found, file = [], None
    for line in TEXT[name].splitlines():
        links = re.findall(r"\]\(simulations/results/(\w+\.md)\)", line)
        file = links[0] if links else file
        if line.startswith("|") and re.search(r"\d", line):
            found.append((re.sub(r"\[.*", "", line), file))
    return found


def test_the_figures_of_the_front_door_are_those_of_the_results():
    rows = [row for row in rows_of_figures(FRONT_DOOR) if row[1]]
    assert len(rows) > 15
    for line, file in rows:
        measured = (RESULTS / file).read_text(encoding="utf-8").replace(",", "")
        for number in re.findall(r"\d+(?:\.\d+)?", line.replace(",", "")):
            there = re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", measured)
            assert there, f"{number} of {line} is not in {file}"


def test_what_a_run_prints_is_shown_alike():
    (shown,) = blocks(FRONT_DOOR, "text")
    (whole,) = blocks("simulations/README.md", "text")
    assert [line for line in shown.splitlines() if line not in whole] == []
