"""A LoRA resolver for vLLM: a name that the server does not know is fetched from a store.

vLLM finds it by the entry point ``vllm.general_plugins`` and asks it for each unknown model name
(``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``). `VARIABLES` are its settings. vLLM keeps what it has
resolved under a name for ever; so that a name does not go stale, the resolver keeps the request
objects that it has handed out, asks the store every few seconds for a newer version, and points
them to it: another path and another number, which is another adapter to vLLM. Requests that are
being answered go on with the version that they began with, as the engine is another process. A name
with a version or a digest (``sections@3``) never changes.

vLLM imports this in all of its processes, and some of those trip over llvmlite (0.32: "has no
attribute 'get'"): nothing that this module imports may import numba.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from compeft_fl.errors import CompeftError, ParameterError
from compeft_fl.printable import one_line, quoted

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from compeft_fl.experts.client import ExpertClient

__all__ = ["VARIABLES", "Resolver", "Settings", "register"]

VARIABLES: Final = {
    "COMPEFT_FL_EXPERTS_SERVER": "the store, HOST:PORT; unset: no resolver",
    "COMPEFT_FL_EXPERTS_TOKEN": "the token that it asks for",
    "COMPEFT_FL_EXPERTS_CA": "a PEM file: TLS, with a server that this signs for",
    "COMPEFT_FL_EXPERTS_CACHE": "the folder of fetched experts",
    "COMPEFT_FL_VLLM_FOLDERS": "where folders for vLLM are written (a temporary folder)",
    "COMPEFT_FL_VLLM_REFRESH": "seconds between looks for newer versions (2; 0: never)",
    "COMPEFT_FL_VLLM_BASE": "the base model's name in experts, where the served one has another",
}

_LOG: Final = logging.getLogger("vllm.compeft_fl")  # under vLLM's own, so that it is shown
_FIRST_ID: Final = 1 << 24  # vLLM counts its own adapters from 1


@dataclass(frozen=True)
class Settings:
    """What `VARIABLES` say.

    Raises
    ------
    ParameterError
        A number that is none.
    """

    folders: Path | None = None
    refresh: float = 2.0
    base: str = ""

    @classmethod
    def from_environment(cls) -> Settings:
        """Read them."""
        text = os.environ.get("COMPEFT_FL_VLLM_REFRESH", "2")
        try:
            refresh = float(text)
        except ValueError:
            refresh = -1.0
        if not 0 <= refresh < 1e6:
            raise ParameterError(
                f"expected seconds in COMPEFT_FL_VLLM_REFRESH, found {quoted(text)}"
            )
        folders = os.environ.get("COMPEFT_FL_VLLM_FOLDERS", "")
        return cls(
            Path(folders) if folders else None, refresh, os.environ.get("COMPEFT_FL_VLLM_BASE", "")
        )


class _UnservedError(CompeftError):
    """An expert that this server does not answer as, and why."""


@dataclass
class _Given:
    """A request object that vLLM keeps, and the version that it points to."""

    request: LoRARequest
    digest: str
    base: str


class Resolver:
    """Answers vLLM's question for a name; see the module.

    It has vLLM's interface, ``vllm.lora.resolver.LoRAResolver``, and does not derive from it, so
    that it can be imported where vLLM is not installed.

    Parameters
    ----------
    settings : Settings
    client : ExpertClient, optional
        Default: made of the environment when a name is first asked for, since vLLM registers its
        resolvers in processes that never ask.
    """

    def __init__(self, settings: Settings, client: ExpertClient | None = None) -> None:
        self._settings, self._own = settings, client
        self._given: dict[str, _Given] = {}
        self._ids: Iterator[int] = itertools.count(_FIRST_ID)
        self._watch: asyncio.Task[None] | None = None

    @functools.cached_property
    def _client(self) -> ExpertClient:
        from compeft_fl.experts.client import ExpertClient

        return self._own or ExpertClient()

    @functools.cached_property
    def _folders(self) -> Path:
        return self._settings.folders or Path(tempfile.mkdtemp(prefix="compeft-fl-vllm-"))

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request for an expert; None, which vLLM makes a 404 of, where there is none."""
        from vllm.lora.request import LoRARequest

        base = self._settings.base or base_model_name
        try:
            digest, folder = await asyncio.to_thread(self._fetch, lora_name, base)
        except (CompeftError, OSError) as error:
            _LOG.warning("expert %s: %s", quoted(lora_name), one_line(error))
            return None
        request = LoRARequest(
            lora_name=lora_name, lora_int_id=next(self._ids), lora_path=str(folder)
        )
        if "@" not in lora_name and self._settings.refresh:
            self._given[lora_name] = _Given(request, digest, base)
            if self._watch is None or self._watch.done():
                self._watch = asyncio.create_task(self._follow())
        _LOG.info("expert %s: version %s", lora_name, digest[:12])
        return request

    async def _follow(self) -> None:
        """Point what was handed out to newer versions, as they come."""
        while True:
            await asyncio.sleep(self._settings.refresh)
            for name, given in list(self._given.items()):
                try:
                    newest, _ = await asyncio.to_thread(self._client.describe, name)
                    if newest.digest == given.digest:
                        continue
                    reference = f"{name}@{newest.digest}"
                    digest, folder = await asyncio.to_thread(self._fetch, reference, given.base)
                except (CompeftError, OSError) as error:  # what is served goes on being served
                    _LOG.warning("expert %s: no newer version: %s", name, one_line(error))
                    continue
                # Another number too: vLLM takes an adapter that it has loaded by its number.
                given.request.lora_path, given.request.lora_int_id = str(folder), next(self._ids)
                given.digest = digest
                _LOG.info("expert %s: now version %s", name, digest[:12])

    def _fetch(self, reference: str, base: str) -> tuple[str, Path]:
        """An expert's digest, and the folder that vLLM loads."""
        pulled = self._client.pull(reference)
        expert = pulled.expert
        if expert.base_model != base:
            raise _UnservedError(
                f"expected an expert of base model {quoted(base)}, found {expert.reference} of "
                f"{quoted(expert.base_model)}"
            )
        folder = self._folders / expert.digest
        if not folder.is_dir():
            self._folders.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=self._folders, prefix="."))
            try:
                pulled.save(partial / "adapter")
                (partial / "adapter").rename(folder)
            except OSError:
                if not folder.is_dir():  # another process was first
                    raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return expert.digest, folder


def register() -> None:
    """Register the resolver with vLLM, if a store is named: what the entry point calls."""
    if not os.environ.get("COMPEFT_FL_EXPERTS_SERVER"):
        return
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    resolver: Any = Resolver(Settings.from_environment())
    LoRAResolver.register(Resolver)
    LoRAResolverRegistry.register_resolver("compeft-fl", resolver)
