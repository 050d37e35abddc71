"""Coverage-guided fuzzing of updates by atheris, for `simulations/fuzz.py`.

    python simulations/fuzz_guided.py COUNT SEED LIMIT [FOLDER]

FOLDER is where atheris is installed, if that is elsewhere. The Python code that reads updates is
instrumented; what numba has compiled is not. Prints each outcome and how often it was seen; exit
code 3: atheris is not installed.
"""

from __future__ import annotations

import collections
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path


def main() -> None:
    """Run; libFuzzer ends the process."""
    count, seed, limit = (int(argument) for argument in sys.argv[1:4])
    sys.path[:0] = [str(Path(__file__).resolve().parent), *filter(None, sys.argv[4:])]
    warnings.simplefilter("ignore")
    try:
        import atheris
    except ImportError:
        sys.exit(3)
    with atheris.instrument_imports(include=["compeft_fl.wire", "compeft_fl.codecs"]):
        import compeft_fl.codecs
        import compeft_fl.wire.messages
    import fuzz_targets

    from compeft_fl.errors import CompeftError
    from compeft_fl.wire.messages import seal

    outcomes: collections.Counter[str] = collections.Counter()

    def report() -> None:
        for name, number in outcomes.items():
            print("outcome", name, number, flush=True)

    tried = 0

    def try_one(data: bytes) -> None:
        nonlocal tried
        for content in (data, seal(data)):  # the second: the sender is hostile
            try:
                fuzz_targets.read_update(content)
            except CompeftError as error:
                outcomes[type(error).__name__] += 1
            else:
                outcomes["read"] += 1
        tried += 1
        if tried == count // 2:  # libFuzzer ends without Python's own end
            report()

    with tempfile.TemporaryDirectory() as folder:
        for name in compeft_fl.codecs.names():
            for index, blob in enumerate(fuzz_targets.valid_updates(name)):
                (Path(folder) / f"{name}-{index}").write_bytes(blob[:-5])
                fuzz_targets.read_update(blob)  # compiles, before the limit
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + limit, held + limit))
        options = [f"-runs={count // 2}", f"-seed={seed + 1}", "-max_len=4096", "-rss_limit_mb=0"]
        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", folder], try_one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
