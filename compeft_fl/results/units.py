"""Numbers as a person reads them."""

from __future__ import annotations

__all__ = ["percent", "size"]


def percent(value: float | None) -> str:
    """Return a part of 1 as a person reads it."""
    return "-" if value is None else f"{100 * value:.1f} %"


def size(num_bytes: float) -> str:
    """Return a number of bytes as a person reads it, in powers of 1000.

    Examples
    --------
    >>> size(812), size(36_500), size(2_949_120)
    ('812 B', '36.5 kB', '2.95 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
