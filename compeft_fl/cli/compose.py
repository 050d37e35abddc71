"""``compeft-fl experts compose``: its arguments, and LoraHub over experts of a store."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.cli.tables import Table, say
from compeft_fl.errors import AdapterError, ConfigError, LayoutError, ParameterError
from compeft_fl.printable import one_line

if TYPE_CHECKING:
    from compeft_fl.app.tasks.model import Classifier
    from compeft_fl.experts import Expert, ExpertClient, ExpertPool
    from compeft_fl.experts.composition import Composition

__all__ = ["add_compose"]

RECIPE_FILE: Final = "recipe.json"
_MOST_TAGS: Final = 28  # of the 32 that a version may have
_EPILOG: Final = """\
FILE has a few labelled examples, a JSON line each: {"text": ..., "label": ...}. Experts of the
store are combined by LoraHub (https://arxiv.org/abs/2307.13269): their weights, -1.5 to 1.5, are
searched for without gradients, until the loss on the examples is small. The classes' prototypes are
the means of the base model's embeddings of the examples. The result is an adapter folder, with its
recipe beside it in recipe.json; --push makes it an expert of the store, its recipe in its tags.

examples:
  compeft-fl experts compose few-shot.jsonl --candidates 20 -o composed
  compeft-fl experts compose few-shot.jsonl --search debian --push my-task
  compeft-fl experts compose few-shot.jsonl --experts sections,roles@2 --rule changes
"""


def add_compose(add: Callable[..., argparse.ArgumentParser], actions: Any) -> None:
    """Add ``compose`` to the commands of ``experts``; ``add`` makes one that has a server."""
    parser = add(actions, "compose", _compose, "combine experts for a few examples", _EPILOG)
    parser.add_argument("file", metavar="FILE", type=Path, help="a few labelled examples")
    chosen = parser.add_argument_group("which experts")
    chosen.add_argument(
        "--candidates", metavar="N", type=int, default=20, help="at most so many (20)"
    )
    chosen.add_argument("--search", metavar="WORDS", help="those that a search finds, best first")
    chosen.add_argument("--experts", metavar="NAME,...", help="these (default: any, at random)")
    parser.add_argument(
        "--rule",
        choices=("factors", "changes"),
        default="factors",
        help="what a weight multiplies: each tensor, as LoraHub has it (default), or what training "
        "changed",
    )
    parser.add_argument("--evaluations", metavar="N", type=int, default=40, help="default 40")
    parser.add_argument("--seed", type=int, default=0, help="of choice and search (0)")
    parser.add_argument("--model", default="minilm", help="the base model: minilm, or a folder")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="write a PEFT folder")
    parser.add_argument("--push", metavar="NAME", help="make it an expert of the store")
    parser.add_argument("--density", type=float, help="of what is pushed (default: all is kept)")


def _compose(options: argparse.Namespace) -> int:
    from compeft_fl.adapters import check_output
    from compeft_fl.app.tasks import few_shot
    from compeft_fl.cli.experts import client_of
    from compeft_fl.experts.composition import check_budget, compose

    check_budget(options.evaluations)
    if options.candidates < 1:
        raise ParameterError(f"expected candidates, found {options.candidates}")
    if options.output is not None:
        check_output(options.output)
    data = few_shot.examples(options.file)
    with client_of(options) as client, tempfile.TemporaryDirectory() as work:
        names = _candidates(client, options)
        classifier, pool, fitting = _ready(client, names, options, data, Path(work))
        loss = few_shot.loss_on(classifier.eval(), data.train)
        found = compose(
            pool, fitting, loss, rule=options.rule, evaluations=options.evaluations,
            seed=options.seed,
        )  # fmt: skip
        versions = {name: pool.reference(name) for name in fitting}
        pushed = _keep(client, pool, classifier, found, versions, options, Path(work))
    told = {
        **found.to_json(),
        "versions": versions,
        "output": None if options.output is None else str(options.output),
        "pushed": None if pushed is None else pushed.reference,
    }
    if options.json:
        print(json.dumps(told, indent=2))
        return 0
    table = Table(None, ["expert", "weight"], left=["expert"])
    for name, weight in sorted(found.recipe.members, key=lambda member: -abs(member[1])):
        table.add_row(name, f"{weight:+.3f}")
    table.print()
    say(
        f"loss on {len(data.train)} examples: {found.trials[0].loss:.3f} without experts, "
        f"{found.best.loss:.3f} with them, after {len(found.trials)} evaluations"
    )
    if options.output is not None:
        say(f"wrote {options.output}")
    if pushed is not None:
        say(f"pushed {pushed.reference}")
    return 0


def _candidates(client: ExpertClient, options: argparse.Namespace) -> list[str]:
    """References of experts to try, in the order in which they are wanted."""
    from compeft_fl.app.tasks.model import EMBEDDED_HUB_ID, EMBEDDED_MODEL

    if options.experts:
        return list(dict.fromkeys(name.strip() for name in options.experts.split(",")))
    base = EMBEDDED_HUB_ID if options.model == EMBEDDED_MODEL else options.model
    if options.search:
        most = min(100, 4 * options.candidates)
        found = [each.expert for each in client.search(options.search, base_model=base, limit=most)]
    else:
        found = [each for each in client.list() if each.base_model == base]
        random.Random(options.seed).shuffle(found)
    found = [each for each in found if each.tags.get("role") != "start"]
    if not found:
        raise AdapterError(f"expected experts of {base} in the store, found none")
    # Only experts of one start can be summed: those of the one that most have.
    start, _ = Counter(each.start for each in found).most_common(1)[0]
    return [each.name for each in found if each.start == start]


def _ready(
    client: ExpertClient, names: list[str], options: argparse.Namespace, data: Any, work: Path
) -> tuple[Classifier, ExpertPool, list[str]]:
    """A model as the first expert wants it, a pool over it, and the experts that fit it."""
    from compeft_fl.adapters import save_folder
    from compeft_fl.app.config import AppConfig
    from compeft_fl.app.tasks import model
    from compeft_fl.experts.held import Recipe
    from compeft_fl.experts.pool import ExpertPool

    first = client.pull(names[0])
    save_folder((first.start or first).adapter(), work / "start")
    config = AppConfig(model=options.model, head="prototype")
    classifier = model.build(config, data, work / "start")
    pool = ExpertPool(classifier.network, client, base_digest=classifier.base_digest.hex())
    fitting: list[str] = []
    for name in names:
        if len(fitting) == options.candidates:
            break
        try:
            pool.fetch(name)
            if fitting:
                pool.check(Recipe.of(dict.fromkeys((fitting[0], name), 1.0)))
            fitting.append(name)
        except (AdapterError, LayoutError, ConfigError) as error:
            print(f"left out {one_line(name, 100)}: {one_line(error, 300)}", file=sys.stderr)
    if not fitting:
        raise AdapterError(f"expected experts that fit {options.model}, found none")
    return classifier, pool, fitting


def _keep(
    client: ExpertClient,
    pool: ExpertPool,
    classifier: Classifier,
    found: Composition,
    versions: dict[str, str],
    options: argparse.Namespace,
    work: Path,
) -> Expert | None:
    """Write the result as a folder, and push it, as is asked for."""
    folder = options.output or work / "composed"
    folder.mkdir(parents=True, exist_ok=True)
    with pool.use(found.recipe):
        classifier.save(folder)
    text = json.dumps({**found.to_json(), "versions": versions}, indent=2) + "\n"
    (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
    if not options.push:
        return None
    members = sorted(found.recipe.members, key=lambda member: -abs(member[1]))[:_MOST_TAGS]
    tags = {"composed": f"lorahub-{found.rule}", "seed": str(found.seed)}
    for index, (name, weight) in enumerate(members):
        tags[f"expert.{index:02d}"] = f"{versions[name]} {weight:+.4f}"
    init = work / "start" if options.density is not None else None
    return client.push(
        folder, options.push, init=init, tags=tags, metrics={"few-shot-loss": found.best.loss},
        density=options.density,
    )  # fmt: skip
