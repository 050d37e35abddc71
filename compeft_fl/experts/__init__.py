"""Experts: a store of compressed adapters, its service, and a client with a cache.

>>> from compeft_fl.experts import ExpertClient
"""

from __future__ import annotations

from compeft_fl.experts.client import ExpertClient, PulledExpert
from compeft_fl.experts.expert import Expert, Found
from compeft_fl.experts.names import Reference

__all__ = ["Expert", "ExpertClient", "Found", "PulledExpert", "Reference"]
