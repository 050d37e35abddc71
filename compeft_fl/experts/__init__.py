"""Experts: a store of compressed adapters, its service, a client with a cache, a pool in memory.

>>> from compeft_fl.experts import ExpertClient, ExpertPool
"""

from __future__ import annotations

from compeft_fl.experts.client import ExpertClient, PulledExpert
from compeft_fl.experts.expert import Expert, Found
from compeft_fl.experts.held import Recipe
from compeft_fl.experts.names import Reference
from compeft_fl.experts.pool import ExpertPool

__all__ = [
    "Expert",
    "ExpertClient",
    "ExpertPool",
    "Found",
    "PulledExpert",
    "Recipe",
    "Reference",
]
