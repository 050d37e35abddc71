"""``compeft-fl chat``: reads its arguments here, and imports the rest when it is called."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.printable import printable

if TYPE_CHECKING:
    from compeft_fl.app.chat import Chat

__all__ = ["add_parser", "run"]

_DESCRIPTION: Final = """\
Ask a language model with the adapter that a run has left.

FOLDER is a run's, or an adapter's. Without --prompt each line of the standard input is a prompt;
/new forgets what was said, and Ctrl-D ends.
"""
_EPILOG: Final = """\
examples:
  compeft-fl chat runs/latest
  compeft-fl chat runs/latest --prompt "Write the synopsis of the package gzip."
  compeft-fl chat runs/latest/adapter --base --prompt "and without the adapter?"
"""
_MUCH: Final = 1 << 20  # characters of an answer's piece that are shown


def add_parser(commands: Any) -> None:
    """Add ``chat`` to the command line's subparsers."""
    parser = commands.add_parser(
        "chat",
        help="ask a model with a run's adapter",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="of a run or an adapter")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, and stop")
    parser.add_argument("--model", metavar="NAME", help="the base model, where it lies elsewhere")
    parser.add_argument("--base", action="store_true", help="ask the base model alone, to compare")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    parser.add_argument(
        "--quantization",
        choices=("none", "4bit", "8bit"),
        help="of the base model (default: as it was trained on)",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=_positive, default=256, help="of an answer (default 256)"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=_temperature,
        default=0.0,
        help="0 (default): always the most likely token",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the model brings"
    )
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    """Do what the parsed arguments of ``chat`` say and return the exit code."""
    from compeft_fl.app.chat import Chat, adapter_folder, stored_config

    folder = adapter_folder(options.folder)
    config = stored_config(
        folder,
        model=options.model,
        device=options.device,
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code or None,
    )
    chat = Chat(
        folder,
        config,
        _say,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        without=options.base,
    )
    if options.prompt is not None:
        _answer(chat, options.prompt)
        return 0
    _converse(chat)
    return 0


def _converse(chat: Chat) -> None:
    """Answer the lines of the standard input."""
    on_terminal = sys.stdin.isatty()
    while True:
        if on_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        prompt = line.strip()
        if prompt == "/new":
            chat.turns.clear()
        elif prompt:
            _answer(chat, prompt)


def _answer(chat: Chat, prompt: str) -> None:
    chat.ask(prompt)
    print(flush=True)


def _say(text: str) -> None:
    """Show a piece of an answer; what a terminal would act on is escaped."""
    print(printable(text, _MUCH, keep="\n\t"), end="", flush=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {number}")
    return number


def _temperature(text: str) -> float:
    number = float(text)
    if not 0 <= number < 100:
        raise argparse.ArgumentTypeError(f"expected 0 to 100, found {text}")
    return number
