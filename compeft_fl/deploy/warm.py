"""Keeps in memory what a client process needs, so that a message costs a fork and not a start.

Flower starts a fresh ``flwr-clientapp`` for every message, and finds it on PATH. Here is a program
of that name to be put in front: it asks a process that has imported Flower, torch, transformers and
peft already, and has built the run's model, to fork one that goes on with the same arguments,
environment and output. That is a process of its own for every message as before, but a warm one.
Where anything is amiss, the program in front starts the real one instead.

A fork sees the ``compeft_fl`` that is installed, also where an app's bundle brings another one.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from compeft_fl.app.imports import at_once, import_peft

__all__ = ["PROGRAM", "THREADS", "load_kernels", "run", "serve", "write_program"]

PROGRAM: Final = "flwr-clientapp"
THREADS: Final = {"MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""Variables for the process that serves: threads do not survive a fork."""

_PRELOADED: Final = (
    "compeft_fl.app.client_app",
    "compeft_fl.app.tasks.training",
)
_ACCEPTED: Final = b"+"
_LENGTH_BYTES: Final = 4
_ATOMIC_BYTES: Final = select.PIPE_BUF
_PIPE_BYTES: Final = 1 << 20  # more than a pipe holds
_TERM_SECONDS: Final = 5

# What runs in front: a few modules of the standard library, since it is started for every message.
_FRONT: Final = """\
#!{python} -IS
import json, os, socket, sys
request = json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode()
answer = b""
with socket.socket(socket.AF_UNIX) as server:
    try:
        server.connect({socket!r})
        socket.send_fds(server, [len(request).to_bytes({length}, "big")], [1, 2])
        server.sendall(request)
        answer = server.recv(1)
    except OSError:
        pass
    if answer == {accepted!r}:
        code = server.recv(1)
        sys.exit(code[0] if code else 1)
os.execv({real!r}, [{real!r}, *sys.argv[1:]])
"""


def write_program(folder: Path, address: Path, path: str | None = None) -> bool:
    """Write the program in front into a folder, and return whether this can work here.

    Parameters
    ----------
    folder : Path
        To be put first on the SuperNode's PATH.
    address : Path
        The Unix socket of `serve`; at most about 100 characters.
    path : str, optional
        Where to look for the real ``flwr-clientapp``; default: PATH.

    Returns
    -------
    bool
        False, and nothing is written: no ``flwr-clientapp``, or a system that does not fork.
    """
    here = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "") if path is None else path
    real = shutil.which(PROGRAM, path=os.pathsep.join([path, here]))
    if real is None or not hasattr(os, "fork") or not hasattr(socket, "send_fds"):
        return False
    program = folder / PROGRAM
    text = _FRONT.format(
        python=sys.executable,
        socket=str(address),
        length=_LENGTH_BYTES,
        accepted=_ACCEPTED,
        real=real,
    )
    program.write_text(text, encoding="utf-8")
    program.chmod(0o700)
    return True


def run(command: Sequence[str]) -> int:
    """Run a SuperNode with warm clients until it ends, and return its exit code.

    SIGTERM, Ctrl-C and a closed terminal are passed on to it; where this process is killed, it and
    what its clients are forked from end too.

    Parameters
    ----------
    command : sequence of str
        ``flower-supernode`` and its arguments.
    """
    with tempfile.TemporaryDirectory(prefix="compeft-warm-") as name, ExitStack() as stack:
        folder = Path(name)  # only this user can enter it
        tell = _guarded(folder, stack)
        environment = dict(os.environ)
        if write_program(folder, folder / "socket"):
            environment["PATH"] = os.pathsep.join([name, os.environ.get("PATH", "")])
            server = subprocess.Popen(
                [sys.executable, "-m", "compeft_fl.deploy.warm", str(folder / "socket")],
                env={**os.environ, **THREADS},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(server.wait)
            stack.callback(server.terminate)
            tell(server.pid)
        else:
            print(f"compeft-fl warm: clients start cold: no {PROGRAM} here", file=sys.stderr)
        node = subprocess.Popen(command, env=environment, start_new_session=True)
        tell(node.pid)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup asks for that
            before = signal.signal(number, lambda *_: node.terminate())
            stack.callback(signal.signal, number, before)
        code = node.wait()
    return code if code >= 0 else 128 - code


def _guarded(folder: Path, stack: ExitStack) -> Callable[[int], None]:
    """Start what ends this node where this process is killed; give the way to tell it of ids."""
    try:
        import psutil

        from compeft_fl.runs.guardian import Guardian
    except ImportError:  # an extra: an app of one's own may do without
        return lambda pid: None
    guardian = Guardian(folder)
    stack.callback(guardian.leave)

    def tell(pid: int) -> None:
        with suppress(psutil.Error):
            guardian.tell([psutil.Process(pid)])

    return tell


def serve(address: Path) -> NoReturn:
    """Import what clients need, then fork one for each request, until the process is ended.

    Parameters
    ----------
    address : Path
        A Unix socket to make, in a folder that only this user can enter.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)  # from now on the program in front waits rather than starts another
        default_threads = _preload()
        news, news_of_forks = os.pipe()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
        while True:
            ready, _, _ = select.select([listener.fileno(), news], [], [])
            if news in ready:
                _prepare(os.read(news, _PIPE_BYTES).splitlines()[-1])
            if listener.fileno() in ready:
                connection, _ = listener.accept()
                # What a fork inherits is no garbage: to look through it costs seconds, and memory.
                gc.freeze()
                if os.fork() == 0:
                    listener.close()
                    os.close(news)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    code = 1
                    try:
                        code = _answer(connection, news_of_forks, default_threads)
                    finally:
                        os._exit(code)  # see `_client`
                connection.close()


def _preload() -> int:
    """Import; return the number of threads that torch would use by itself."""
    with at_once():
        for module in _PRELOADED:
            with suppress(ImportError):  # an app of one's own may do without some
                import_module(module)
        with suppress(ImportError):  # and without peft
            import_peft()
        _entry_point()
    load_kernels()
    if "torch" not in sys.modules:
        return 0
    import torch

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    torch.set_num_threads(1)
    return threads or os.cpu_count() or 1


def load_kernels() -> None:
    """Compress and restore a few numbers: what is compiled for that is loaded at its first use."""
    import numpy as np

    from compeft_fl import Layout, TaskVector, compress, decode, encode
    from compeft_fl.task_vector import TensorSpec

    layout = Layout([TensorSpec("w", (64,), "f32")])
    update = compress(TaskVector(layout, np.arange(64, dtype=np.float32)), 0.1, "mean")
    decode(encode(update)).to_task_vector()


def _entry_point() -> Callable[[], object]:
    """Return what ``flwr-clientapp`` calls."""
    (found,) = entry_points(group="console_scripts", name=PROGRAM)
    return cast(Callable[[], object], found.load())


def _answer(connection: socket.socket, news: int, default_threads: int) -> int:
    """Fork the client, and pass on its exit code; end it where nobody waits for it any more."""
    head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, 2)
    length = int.from_bytes(head, "big")
    request = b""
    while len(request) < length:
        part = connection.recv(length - len(request))
        if not part:
            return 1
        request += part
    arguments, environment, folder = json.loads(request)
    alive, alive_of_client = os.pipe()
    client = os.fork()
    if client == 0:
        connection.close()
        os.close(alive)
        for descriptor, number in zip(descriptors, (1, 2), strict=True):
            os.dup2(descriptor, number)
        _client(arguments, environment, folder, news, default_threads)
    os.close(alive_of_client)
    connection.sendall(_ACCEPTED)
    ready, _, _ = select.select([connection.fileno(), alive], [], [])
    if alive not in ready:  # the program in front was ended, and so is what it stands for
        os.kill(client, signal.SIGTERM)
        ready, _, _ = select.select([alive], [], [], _TERM_SECONDS)
        if not ready:
            os.kill(client, signal.SIGKILL)
    _, status = os.waitpid(client, 0)
    code = os.waitstatus_to_exitcode(status)
    with suppress(OSError):
        connection.sendall(bytes([code if 0 <= code < 256 else 1]))
    return 0


def _client(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    news: int,
    default_threads: int,
) -> NoReturn:
    """Be ``flwr-clientapp``, and end the process."""
    sys.argv[:] = arguments
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if default_threads:
        import torch

        with suppress(ValueError):
            torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", default_threads)))
    code: object = 1
    try:
        code = _entry_point()()
    except SystemExit as stop:
        code = stop.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        _tell(news)
        # Python's own end would take apart all that was inherited: two seconds, for nothing.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _tell(news: int) -> None:
    """Tell the process that serves which run's model and data this client has built."""
    from compeft_fl.app import client_app

    if client_app._prepared and client_app._prepared[0].task.device.type == "cpu":
        line = json.dumps(client_app._prepared[0].config.to_run_config()).encode() + b"\n"
        if len(line) <= _ATOMIC_BYTES:
            os.write(news, line)


def _prepare(line: bytes) -> None:
    """Build model and data of a run as a client told, for the forks to come."""
    from compeft_fl.app import client_app
    from compeft_fl.app.config import AppConfig

    config: dict[str, Any] = json.loads(line)
    with suppress(Exception):  # the clients will say what is wrong
        client_app._prepare(AppConfig.from_run_config(config))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
