"""What clients and servers of experts must say alike."""

from __future__ import annotations

import ipaddress
from typing import Final

__all__ = ["CHUNK_BYTES", "PROTOCOL", "PROTOCOL_KEY", "is_loopback"]

PROTOCOL: Final = 1
PROTOCOL_KEY: Final = "compeft-experts-protocol"
CHUNK_BYTES: Final = 128 << 10


def is_loopback(host: str) -> bool:
    """Is this an address that only this machine reaches?

    Examples
    --------
    >>> is_loopback("127.0.0.1"), is_loopback("[::1]"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
