"""Memory of outputs that have been dropped, kept for the next ones.

A fresh 100 MB array costs more in page faults than the kernel that fills it. So the memory of an output is
not given back when the last reference to it (a view is one) goes, but handed out again where another output
of about that size is made; ``y = bn(x)`` in a loop then costs what ``bn(x, out=y)`` costs. Only outputs of
256 KB and more take part.
"""

from __future__ import annotations

import operator
import os

from fastbn import _kernels

DEFAULT_MAX_BYTES = 256 << 20


def set_output_cache(max_bytes: int) -> None:
    """Set how much memory of dropped outputs is kept; what is kept beyond that is given back at once.

    256 MiB, or the environment variable ``FASTBN_OUTPUT_CACHE``, until this is called. A single output that
    is larger is not kept at all.

    Parameters
    ----------
    max_bytes : int
        At least 0, in bytes; 0 switches the reuse off.

    Raises
    ------
    TypeError, ValueError
        If `max_bytes` is not an integer, or negative.
    """
    try:
        count = operator.index(max_bytes)
    except TypeError:
        raise TypeError(f"max_bytes must be an integer, got {type(max_bytes).__name__}") from None
    if not 0 <= count < 1 << 63:
        raise ValueError(f"max_bytes must be from 0 to 2**63 - 1, got {count}")
    _kernels.set_output_limit(count)


def empty_output_cache() -> int:
    """Give back all memory of dropped outputs; returns how many bytes that were."""
    held, limit = _kernels.output_memory()
    _kernels.set_output_limit(0)
    _kernels.set_output_limit(limit)
    return held


def _from_environment() -> None:
    text = os.environ.get("FASTBN_OUTPUT_CACHE", "").strip() or str(DEFAULT_MAX_BYTES)
    try:
        set_output_cache(int(text))
    except ValueError:
        raise ImportError(
            f"FASTBN_OUTPUT_CACHE must be a number of bytes from 0 on, got {text!r}; correct it or unset it"
        ) from None


_from_environment()
