"""Memory of outputs that have been dropped, kept for the next ones.

A fresh 100 MB array costs more in page faults than the kernel that fills it. So the memory of an output is
not given back when the last reference to it (a view is one) goes, but handed out again where another output
of about that size is made; ``y = bn(x)`` in a loop then costs what ``bn(x, out=y)`` costs. Only outputs of
256 KB and more take part.
"""

from __future__ import annotations

import contextlib
import operator
import os
import re

from fastbn import _kernels
from fastbn.threads import cgroup_memory

MOST_BY_DEFAULT = 256 << 20
_SIZE = "([0-9]+)(?:([kmgt])?(?:i?b)?)"


def set_output_cache(max_bytes: int) -> None:
    """Set how much memory of dropped outputs is kept; what is kept beyond that is given back at once.

    Until this is called it is what the environment variable ``FASTBN_OUTPUT_CACHE`` says, such as 33554432,
    32M or 32MiB; without it 1/32 of the machine's memory or of the least limit of the process's cgroups, and
    256 MiB at most. A single output that is larger is not kept at all.

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
    return _kernels.give_back()


def _from_environment() -> None:
    text = os.environ.get("FASTBN_OUTPUT_CACHE", "").strip()
    if not text:
        _kernels.set_output_limit(min(_memory() // 32, MOST_BY_DEFAULT))
        return
    found = re.fullmatch(_SIZE, text, re.IGNORECASE)
    try:
        if not found:
            raise ValueError(text)
        set_output_cache(
            int(found[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[(found[2] or "").lower()]
        )
    except ValueError:
        raise ImportError(
            f"FASTBN_OUTPUT_CACHE must be a number of bytes from 0 on, or with a unit, as 512k, 32M, 1G or "
            f"64MiB, got {text!r}; correct it or unset it"
        ) from None


def _memory() -> int:
    """Bytes of memory that this process can have, or as many as it does not matter where nothing tells."""
    limits = [MOST_BY_DEFAULT * 32]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limits.append(cgroup_memory() or 0)
    return min(limit for limit in limits if limit > 0)


_from_environment()
