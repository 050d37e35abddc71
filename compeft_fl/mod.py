"""The Flower client mod; this is the path to import it from.

>>> from compeft_fl.mod import CompressionMod
>>> mod = CompressionMod(density=0.1)
"""

from __future__ import annotations

from compeft_fl.client.mod import CompressionMod

__all__ = ["CompressionMod"]
