"""The command ``compeft-fl``: federations from one line, and adapter folders as small files.

`compeft_fl.cli.run` and `compeft_fl.cli.deploy` run federations, `compeft_fl.cli.bench` measures,
`compeft_fl.cli.state` clears what nodes remember, `compeft_fl.cli.chat` asks a model,
`compeft_fl.cli.experts` keeps and fetches adapters, and `compeft_fl.cli.adapters` does the rest.
What cannot be done is one line on stderr and exit code 2, whatever files and names hold.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import compeft_fl
from compeft_fl import codecs
from compeft_fl.cli import adapters, bench, chat, deploy, evaluate, experts, report, run, state
from compeft_fl.compeft import SUPPORTS
from compeft_fl.errors import CompeftError
from compeft_fl.merging.accumulators import TIE_RULES
from compeft_fl.printable import one_line, printable

__all__ = ["main"]

EXIT_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130
UNEXPECTED: Final = "unexpected"  # how a fault of this program's own begins
TRACEBACK_VARIABLE: Final = "COMPEFT_FL_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.

    Returns
    -------
    int
        0: done. 2: it cannot be done, and stderr says why. 130: interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(arguments)
        exit_code: int = options.handler(options)
        sys.stdout.flush()
        return exit_code
    except SystemExit as stop:  # argparse: --help, --version, or arguments that it does not take
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE) and not isinstance(error, CompeftError):
            raise
        command = arguments[0] if arguments else ""
        print(f"compeft-fl {printable(command, 40)}: error: {_described(error)}", file=sys.stderr)
        return EXIT_ERROR


def _described(error: Exception) -> str:
    """One line of what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return one_line(f"{where}{error.strerror}")
    if isinstance(error, MemoryError):
        return one_line(f"not enough memory: {error}".rstrip(": "))
    if isinstance(error, (CompeftError, OSError)):
        return one_line(error)
    return one_line(
        f"{UNEXPECTED} {type(error).__name__}: {error}; {TRACEBACK_VARIABLE}=1 shows where"
    )


# --- arguments --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        text = one_line(f"{self.prog}: error: {message}")
        self.exit(EXIT_ERROR, f"{text} (see {self.prog} --help)\n")


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="compeft-fl",
        description="ComPEFT-compressed federated fine-tuning of PEFT adapters over Flower.",
    )
    version = f"%(prog)s {compeft_fl.__version__}"
    parser.add_argument("-V", "--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run.add_parser(commands)
    deploy.add_parsers(commands)
    chat.add_parser(commands)
    evaluate.add_parser(commands)
    bench.add_parser(commands)
    state.add_parser(commands)
    report.add_parser(commands)
    experts.add_parser(commands)
    _add_compress(commands)
    _add_decompress(commands)
    _add_inspect(commands)
    _add_merge(commands)
    _add_similarity(commands)
    return parser


def _add(
    commands: Any, name: str, handler: Callable[[Any], int], summary: str, text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=handler)
    return parser


_INIT_HELP = "the adapter as it was before training, a folder"
_MAX_PARAMETERS_HELP = "the most parameters of a file (default 2^24, or more by its size)"
_ANY_BASE_HELP = "the base models are one, whatever their names: a model that lies elsewhere"
_FORCE_HELP = "write into a folder that holds files already"


def _add_compress(commands: Any) -> None:
    parser = _add(
        commands,
        "compress",
        adapters.compress,
        "compress an adapter folder to one small file",
        """\
DIR is what PeftModel.save_pretrained writes. What is compressed is the difference to a start: the
folder given by --init, or else 1 for IA3 and 0 for LoRA, AdaLoRA, LoHa and LoKr. With 0, their
factors count with their random start, each compressed by itself, which leaves less for what was
learned: better save the adapter before training as well, and give that folder as --init.

cosine and error (the norm of what is lost, over the norm of all) compare the update with the
difference that was compressed. Without a start, the change's cosine compares the changes of the
weights. Integers, statistics and float64 are kept as they are.

Two folders with whole models, a base and its full fine-tuning: the difference between the two is
compressed, piece by piece. Of a tensor that has grown by rows (a vocabulary with added tokens) the
new rows are kept as they are; so is what the base does not have, or not so (a new head).

examples:
  compeft-fl compress my-lora -o my-lora.compeft
  compeft-fl compress base-model fine-tuned-model -o my-model.compeft
  compeft-fl compress my-lora -o my-lora.compeft --density 0.2 --scale 3 --init my-lora-untrained
""",
    )
    parser.add_argument(
        "folders",
        metavar="DIR",
        type=Path,
        nargs="+",
        help="an adapter folder; or two: a base model's, and that of its full fine-tuning",
    )
    _add_output(parser, "FILE", "the file to write, by custom named .compeft")
    parser.add_argument(
        "--density",
        metavar="P",
        type=float,
        help="the part of the parameters to keep (default 0.05)",
    )
    parser.add_argument(
        "--scale",
        type=_number_or_name,
        help='the size of what is kept: "norm" (default), "mean", or a number (of sigmas)',
    )
    parser.add_argument(
        "--support",
        choices=SUPPORTS,
        help='which of the largest are kept: "fixed" (default), exactly the density, as ComPEFT '
        'has it; or "best", of those the ones that keep most energy',
    )
    parser.add_argument(
        "--codec",
        default="golomb",
        choices=codecs.names(),
        help="how it is written (default golomb); the dense ones keep all parameters, and factored "
        "spends the bytes of the density on low-rank signs",
    )
    parser.add_argument("--init", metavar="DIR", type=Path, help=_INIT_HELP)


def _add_decompress(commands: Any) -> None:
    parser = _add(
        commands,
        "decompress",
        adapters.decompress,
        "restore an adapter folder from a file",
        """\
The folder loads with PeftModel.from_pretrained. A file that was made with --init needs it again,
and that of a whole model its base, from which it also takes what did not change (tokenizer).

examples:
  compeft-fl decompress my-lora.compeft -o restored
  compeft-fl decompress my-model.compeft --base base-model -o restored
""",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a .compeft file")
    _add_output(parser, "DIR", "the folder to write")
    _add_start(parser)
    parser.add_argument("--force", action="store_true", help=_FORCE_HELP)
    _add_limit(parser)


def _add_inspect(commands: Any) -> None:
    parser = _add(
        commands,
        "inspect",
        adapters.inspect,
        "show what is in files",
        """\
Bits per parameter are those of the encoded values; the bytes are the whole file's, with layout and
configuration. fp16/file and fp32/file: how many times larger all parameters are in 16 and in 32
bits. cosine and error: of the update, against what was compressed, where the file says it.

examples:
  compeft-fl inspect my-lora.compeft
  compeft-fl inspect --tensors *.compeft
""",
    )
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a .compeft file")
    parser.add_argument("--tensors", action="store_true", help="show each tensor as well")
    _add_limit(parser)


def _add_merge(commands: Any) -> None:
    parser = _add(
        commands,
        "merge",
        adapters.merge,
        "merge files into one adapter folder",
        """\
Only adapters whose tensors mean the same are merged: one method, one base model, one start, and the
same in all settings but those of training. A weight below 0 takes the opposite of an adapter's
change. LoRA and its relatives without --init: the sum is formed in one factor (B) over the mean of
the others, so that --scaling and signs count once.

examples:
  compeft-fl merge a.compeft b.compeft c.compeft --method ties -o merged
  compeft-fl merge a.compeft b.compeft --method task-arithmetic --scaling 0.5 -o merged
  compeft-fl merge a.compeft b.compeft --method average --weights 3,1 -o merged
  compeft-fl merge a.compeft b.compeft --method task-arithmetic --weights=1,-1 -o a-minus-b
""",
    )
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a .compeft file")
    parser.add_argument(
        "--method", required=True, choices=("ties", "average", "task-arithmetic"), help="the rule"
    )
    _add_output(parser, "DIR", "the folder to write")
    parser.add_argument(
        "--scaling", metavar="L", type=float, help="lambda of ties and task-arithmetic (default 1)"
    )
    parser.add_argument(
        "--tie",
        choices=TIE_RULES,
        help="ties: what a parameter becomes whose signs balance (default zero)",
    )
    parser.add_argument(
        "--weights",
        metavar="W,W,...",
        type=_numbers,
        help="one number per file, not 0 (default 1)",
    )
    _add_start(parser)
    parser.add_argument("--any-base", action="store_true", help=_ANY_BASE_HELP)
    parser.add_argument("--force", action="store_true", help=_FORCE_HELP)
    _add_limit(parser)


def _add_similarity(commands: Any) -> None:
    parser = _add(
        commands,
        "similarity",
        adapters.similarity,
        "show how much files agree, two by two",
        """\
cosine: of the angle between two updates. sign-agreement: of the parameters that both keep, the part
with one sign; 0.5 is chance, and - stands where no parameter is kept by both.

example:
  compeft-fl similarity a.compeft b.compeft c.compeft
""",
    )
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="a .compeft file")
    parser.add_argument(
        "--measure", choices=("cosine", "sign-agreement"), default="cosine", help="default cosine"
    )
    parser.add_argument("--any-base", action="store_true", help=_ANY_BASE_HELP)
    _add_limit(parser)


def _add_output(parser: argparse.ArgumentParser, metavar: str, text: str) -> None:
    parser.add_argument(
        "-o", "--output", metavar=metavar, type=Path, required=True, help=text, dest="output"
    )


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--init", "--base", metavar="DIR", type=Path, help=f"{_INIT_HELP}; or a whole model's base"
    )


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-parameters", metavar="N", type=int, help=_MAX_PARAMETERS_HELP)


def _number_or_name(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as in 3,1; found {text!r}") from None
