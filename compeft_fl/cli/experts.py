"""``compeft-fl experts``: its arguments, and what each command prints.

The rest is imported when a command is called.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl import codecs
from compeft_fl.cli.compose import add_compose
from compeft_fl.cli.experts_serve import add_serve, add_token
from compeft_fl.cli.tables import Table, say
from compeft_fl.compeft import SUPPORTS
from compeft_fl.errors import ExpertError, ParameterError
from compeft_fl.printable import printable
from compeft_fl.results.units import size

if TYPE_CHECKING:
    from compeft_fl.experts import Expert, ExpertClient

__all__ = ["add_parser", "client_of"]

_EPILOG: Final = """\
examples:
  compeft-fl experts serve --store experts
  compeft-fl experts push runs/latest/adapter sections --tag task=sections
  compeft-fl experts search sections
  compeft-fl experts pull sections --to sections-adapter
"""
_PUSH_EPILOG: Final = """\
SOURCE is an adapter folder, or a .compeft file of `compeft-fl compress`. Of a folder, all is kept,
in 11 bits a parameter or fewer. With the adapter before training (--init), what training changed is
compressed to --density; that start is pushed as well, once for all adapters that began there.

examples:
  compeft-fl experts push my-lora my-task --tag task=qa --metric accuracy=0.71
  compeft-fl experts push my-lora my-task --init my-lora-untrained --density 0.05
"""


def add_parser(commands: Any) -> None:
    """Add ``experts`` to the command line's subparsers."""
    parser = commands.add_parser(
        "experts",
        help="keep compressed adapters in a store, and fetch them over slow links",
        description="A store of compressed adapters, served over gRPC, and what is fetched of it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_serve(actions)
    add_token(actions)

    push = _add(actions, "push", _push, "make an adapter the next version of a name", _PUSH_EPILOG)
    push.add_argument("source", metavar="SOURCE", type=Path, help="an adapter folder, or a file")
    push.add_argument("name", metavar="NAME", help="letters, digits, '.', '_' and '-'")
    push.add_argument("--init", metavar="DIR", type=Path, help="the adapter before training")
    push.add_argument("--tag", metavar="KEY=VALUE", action="append", default=[], help="a tag")
    push.add_argument("--metric", metavar="KEY=N", action="append", default=[], help="a figure")
    push.add_argument("--base-digest", default="", help="of the base model's weights")
    push.add_argument("--density", type=float, help="the part of the parameters to keep")
    push.add_argument("--scale", type=_number_or_name, default="norm", help="as for compress")
    push.add_argument("--support", choices=SUPPORTS, default="fixed", help="as for compress")
    push.add_argument("--codec", choices=codecs.names(), help="how it is written")

    pull = _add(actions, "pull", _pull, "fetch an adapter, or find it in the cache")
    pull.add_argument("reference", metavar="NAME[@VERSION|@DIGEST]", help="default: the newest")
    pull.add_argument("--to", metavar="DIR", type=Path, help="write a PEFT folder there")
    pull.add_argument("--force", action="store_true", help="also into a folder that holds files")
    pull.add_argument("--offline", action="store_true", help="ask no server")

    _add(actions, "list", _list, "list the newest version of each name")

    search = _add(actions, "search", _search, "find adapters")
    search.add_argument("words", metavar="WORD", nargs="*", help="in names, tags and base models")
    search.add_argument("--tag", metavar="KEY=VALUE", action="append", default=[], help="a tag")
    search.add_argument("--base", metavar="MODEL", default="", help="its base model")
    search.add_argument("--like", metavar="NAME", default="", help="by similarity of signs to it")
    search.add_argument("--limit", metavar="N", type=int, default=20, help="at most (20)")

    describe = _add(actions, "describe", _describe, "show what is known of an adapter")
    describe.add_argument("reference", metavar="NAME[@VERSION|@DIGEST]")

    add_compose(_add, actions)

    delete = _add(actions, "delete", _delete, "remove a version, or all of a name")
    delete.add_argument("reference", metavar="NAME[@VERSION]")

    check = _add(actions, "check", _check, "compare every file of a store with its digest")
    check.add_argument("--store", metavar="DIR", type=Path, help="a folder that no server has open")


def _add(
    actions: Any, name: str, handler: Callable[[Any], int], summary: str, text: str = ""
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    parser.add_argument("--json", action="store_true", help="print JSON")
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--server", metavar="HOST:PORT", help="COMPEFT_FL_EXPERTS_SERVER, or 127.0.0.1:8191"
    )
    server.add_argument(
        "--token-file", metavar="FILE", type=Path, help="a token; or COMPEFT_FL_EXPERTS_TOKEN"
    )
    server.add_argument(
        "--ca", metavar="FILE",
        help='TLS: the certificate of its authority, or "system"; COMPEFT_FL_EXPERTS_CA',
    )  # fmt: skip
    server.add_argument(
        "--cache", metavar="DIR", type=Path, help="COMPEFT_FL_EXPERTS_CACHE, or the user's own"
    )
    server.add_argument("--cache-size", metavar="SIZE", default="8 GiB", help="default 8 GiB")
    return parser


# --- what they do -----------------------------------------------------------------------------


@contextlib.contextmanager
def client_of(options: argparse.Namespace) -> Iterator[ExpertClient]:
    """The client that a command's arguments ask for."""
    from compeft_fl.experts import ExpertClient

    token = None
    if options.token_file is not None:
        token = options.token_file.read_text(encoding="utf-8", errors="replace").strip()
    with ExpertClient(
        options.server, token=token, ca=options.ca, cache=options.cache,
        cache_bytes=options.cache_size, offline=getattr(options, "offline", False),
    ) as client:  # fmt: skip
        yield client


def _push(options: argparse.Namespace) -> int:
    tags = dict(_pairs("--tag", options.tag))
    metrics = {key: _number(key, text) for key, text in _pairs("--metric", options.metric)}
    with client_of(options) as client, _progress(f"push {options.name}") as progress:
        expert = client.push(
            options.source, options.name, init=options.init, tags=tags, metrics=metrics,
            base_digest=options.base_digest, progress=progress, density=options.density,
            scale=options.scale, support=options.support, codec=options.codec,
        )  # fmt: skip
    if options.json:
        return _print_json(expert.to_json())
    say(f"pushed {expert.reference}: {size(expert.size)}, digest {expert.digest[:12]}")
    return 0


def _pull(options: argparse.Namespace) -> int:
    from compeft_fl.adapters import check_output

    if options.to is not None:
        check_output(options.to, force=options.force)
    with client_of(options) as client, _progress(f"pull {options.reference}") as progress:
        pulled = client.pull(options.reference, progress=progress)
        if options.to is not None:
            pulled.save(options.to, force=options.force)
    where = pulled.path if options.to is None else options.to
    if options.json:
        told = {"path": str(where), "transferred": pulled.transferred}
        return _print_json(pulled.expert.to_json() | told)
    fetched = "from the cache" if pulled.from_cache else f"{size(pulled.transferred)} fetched"
    say(f"{pulled.expert.reference} ({fetched}): {where}")
    return 0


def _list(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        experts = client.list()
    if options.json:
        return _print_json([expert.to_json() for expert in experts])
    _print_table(experts)
    return 0


def _search(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        found = client.search(
            " ".join(options.words), tags=dict(_pairs("--tag", options.tag)),
            base_model=options.base, like=options.like, limit=options.limit,
        )  # fmt: skip
    if options.json:
        rows = [each.expert.to_json() | {"similarity": each.similarity} for each in found]
        return _print_json(rows)
    similarities = [each.similarity for each in found] if options.like else None
    _print_table([each.expert for each in found], similarities)
    return 0


def _describe(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        expert, versions = client.describe(options.reference)
    told = expert.to_json()
    if options.json:
        return _print_json(told | {"versions": [each.to_json() for each in versions]})
    table = Table(None, ["", expert.reference], left=("", expert.reference))
    for key, value in told.items():
        if key not in ("name", "version"):
            table.add_row(key.replace("_", " "), _shown(key, value))
    table.print()
    print()
    _print_table(versions)
    return 0


def _shown(key: str, value: Any) -> str:
    if key == "created":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if key == "config":
        return json.dumps({k: v for k, v in value.items() if v not in (None, {}, [])})
    if isinstance(value, Mapping):
        return _joined(value) or "-"
    return f"{value:,}" if isinstance(value, int) else str(value) or "-"


def _delete(options: argparse.Namespace) -> int:
    with client_of(options) as client:
        count = client.delete(options.reference)
    if options.json:
        return _print_json({"versions": count})
    say(f"deleted {options.reference}: {count} version{'s' * (count != 1)}")
    return 0


def _check(options: argparse.Namespace) -> int:
    with _progress("check", bytes_=False) as progress:
        if options.store is None:
            with client_of(options) as client:
                count, problems = client.check(progress)
        else:
            count, problems = _check_store(options.store, progress)
    if options.json:
        _print_json({"checked": count, "problems": problems})
    else:
        for problem in problems:
            say(problem)
    if problems:
        raise ExpertError(f"{len(problems)} of {count} files and names are not as they should be")
    if not options.json:
        say(f"{count} files are what their digests say")
    return 0


def _check_store(folder: Path, progress: Callable[[int, int], object]) -> tuple[int, list[str]]:
    from compeft_fl.experts.store import Store

    if not (folder / "index.sqlite").is_file():
        raise ExpertError(f"{folder}: expected a store, found none")
    problems: list[str] = []
    count = 0
    with Store(folder, tidy=False) as store:
        for count, total, found in store.check():
            problems += [printable(each) for each in found]
            progress(count, total)
    return count, problems


# --- printing ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress(what: str, *, bytes_: bool = True) -> Iterator[Callable[[int, int], object]]:
    """A bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TransferSpeedColumn,
    )

    columns = [DownloadColumn(), TransferSpeedColumn()] if bytes_ else [MofNCompleteColumn()]
    with Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), *columns,
        console=Console(stderr=True), transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task(printable(what, 40), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_json(value: Any) -> int:
    print(json.dumps(value, indent=2, sort_keys=True))  # what does not print is escaped
    return 0


def _print_table(
    experts: Sequence[Expert], similarities: Sequence[float | None] | None = None
) -> None:
    if not experts:
        say("none found")
        return
    columns = ["expert", "base model", "parameters", "density", "size", "pushed", "tags"]
    if similarities is not None:
        columns.insert(1, "similarity")
    table = Table(None, columns, left=("expert", "base model", "pushed", "tags"))
    for index, expert in enumerate(experts):
        row = [
            expert.reference,
            expert.base_model or "-",
            f"{expert.num_parameters:,}",
            f"{expert.density:.3g}",
            size(expert.size),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(expert.created)),
            _joined({**expert.tags, **{k: f"{v:g}" for k, v in expert.metrics.items()}}),
        ]
        if similarities is not None:
            row.insert(1, f"{similarities[index] or 0.0:.4f}")
        table.add_row(*row)
    table.print()


def _joined(pairs: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(pairs.items()))


def _pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    found = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ParameterError(f"{option}: expected KEY=VALUE, found {printable(text, 80)!r}")
        found.append((key, value))
    return found


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ParameterError(
            f"--metric {key}: expected a number, found {printable(text, 80)!r}"
        ) from None


def _number_or_name(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
