"""Numbers as people read them."""

from __future__ import annotations


def gibibytes(size: float) -> str:
    """``12.55 GiB``, or MiB where that reads better."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """``1:02:03``, or ``4.5 s`` below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d} min"
