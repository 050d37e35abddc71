"""``compeft-fl experts serve`` and ``token``: a server of experts, and who may use it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.cli.tables import Table, say
from compeft_fl.errors import ParameterError
from compeft_fl.printable import PrintableFilter

if TYPE_CHECKING:
    from compeft_fl.experts.serving import Tls

__all__ = ["add_serve", "add_token"]

_SERVE_EPILOG: Final = """\
On a loopback address anybody on this machine may read and write, in plain text. On any other, TLS
and tokens are a must. Without --cert and --key, an authority and a certificate are made once, in
STORE/tls; give STORE/tls/server/ca.crt to whoever connects (--ca).

examples:
  compeft-fl experts serve --store experts
  compeft-fl experts token add laptop --rights read,write --store experts
  compeft-fl experts serve --store experts --listen 0.0.0.0:8191 --name store.example.org
"""
_TOKEN_EPILOG: Final = """\
A token is shown once, when it is made; the store keeps its digest. One that is removed is refused
at once, also by a server that runs.

examples:
  compeft-fl experts token add laptop --rights read --days 90 --store experts
  compeft-fl experts token list --store experts
  compeft-fl experts token remove laptop --store experts
"""


def add_serve(actions: Any) -> None:
    """Add ``serve``."""
    parser = actions.add_parser(
        "serve",
        help="serve a store",
        description="Serve a store, until Ctrl-C.",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=_serve)
    parser.add_argument("--store", metavar="DIR", type=Path, required=True, help="is made")
    parser.add_argument(
        "--listen", metavar="HOST:PORT", default="127.0.0.1:8191", help="default 127.0.0.1:8191"
    )
    parser.add_argument("--cert", metavar="FILE", type=Path, help="a certificate chain, PEM")
    parser.add_argument("--key", metavar="FILE", type=Path, help="its key, PEM")
    parser.add_argument(
        "--name", metavar="HOST", action="append", default=[],
        help="a name or an address by which others reach it, for a certificate that is made",
    )  # fmt: skip
    parser.add_argument("--tls", action="store_true", help="on loopback, too")
    parser.add_argument("--tokens", action="store_true", help="on loopback, too")
    parser.add_argument(
        "--insecure", action="store_true", help="let other machines in without TLS and tokens"
    )
    parser.add_argument("--max-size", metavar="SIZE", default="1 TiB", help="of the store (1 TiB)")
    parser.add_argument(
        "--max-expert", metavar="SIZE", default="1 GiB", help="of one adapter's file (1 GiB)"
    )


def add_token(actions: Any) -> None:
    """Add ``token``."""
    parser = actions.add_parser(
        "token",
        help="say who may use a store",
        description="Make, list and remove a store's tokens.",
        epilog=_TOKEN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(handler=_token)
    parser.add_argument("action", choices=("add", "list", "remove"))
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="whose it is")
    parser.add_argument("--store", metavar="DIR", type=Path, required=True)
    parser.add_argument("--rights", default="read", help="read (default), or read,write")
    parser.add_argument("--days", type=float, default=90.0, help="until it expires (90)")


def _serve(options: argparse.Namespace) -> int:
    from compeft_fl.experts.cache import parse_size
    from compeft_fl.experts.protocol import is_loopback
    from compeft_fl.experts.serving import start
    from compeft_fl.experts.store import Limits

    host, colon, port = options.listen.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise ParameterError(f"--listen: expected HOST:PORT, found {options.listen!r}")
    secure = not is_loopback(host) and not options.insecure
    tls = None
    if secure or options.tls or options.cert or options.key:
        tls = _tls(options, host)
    with _log():
        server = start(
            options.store, host, int(port), tls=tls, tokens=secure or options.tokens,
            insecure=options.insecure,
            limits=Limits(
                max_expert_bytes=parse_size(options.max_expert),
                max_bytes=parse_size(options.max_size),
            ),
        )  # fmt: skip
        say(f"serving {options.store} on {server.address}" + (", TLS" if tls else ", plain text"))
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, _end)
        try:
            server.wait()
        except KeyboardInterrupt:
            server.stop()
    return 0


def _end(*_: object) -> None:
    """End the server; not by SIGINT, which a script's shell has its background jobs ignore."""
    raise KeyboardInterrupt


def _tls(options: argparse.Namespace, host: str) -> Tls:
    """The certificate that was given, or one of the store's own, made once."""
    from compeft_fl.experts.serving import Tls

    cert, key = options.cert, options.key
    if (cert is None) != (key is None):
        raise ParameterError("expected --cert and --key together, found one of them")
    if cert is None:
        from compeft_fl.deploy.credentials import write_credentials

        folder = options.store / "tls"
        if not folder.exists():
            names = [*options.name, *(["localhost", "127.0.0.1"] if not options.name else [])]
            if host not in ("0.0.0.0", "::", "[::]", *names):
                names.append(host.strip("[]"))
            options.store.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_credentials(folder, names, 0)
            say(f"made an authority and a certificate for {', '.join(names)} in {folder}")
        say(f"whoever connects needs {folder / 'server' / 'ca.crt'} (--ca)")
        cert, key = folder / "server" / "server.crt", folder / "server" / "server.key"
    return Tls(cert.read_bytes(), key.read_bytes())


@contextlib.contextmanager
def _log() -> Iterator[None]:
    """Show on stderr what the service logs."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(PrintableFilter())
    logger = logging.getLogger("compeft_fl.experts")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def _token(options: argparse.Namespace) -> int:
    from compeft_fl.experts.tokens import Tokens

    if (options.action == "list") == bool(options.name):
        raise ParameterError("expected a token's name with add and remove, and none with list")
    if options.action == "add":
        options.store.mkdir(mode=0o700, parents=True, exist_ok=True)
    tokens = Tokens(options.store)
    if options.action == "add":
        print(tokens.add(options.name, options.rights.split(","), options.days))
    elif options.action == "remove":
        tokens.remove(options.name)
    else:
        table = Table(None, ["token", "rights", "until"], left=("token", "rights", "until"))
        for each in tokens.all():
            until = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.expires))
            table.add_row(each.name, ", ".join(each.rights), until)
        table.print()
    return 0
