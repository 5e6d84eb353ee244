"""What this installation of fastbn is, and what it does with this machine."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np

from fastbn import _kernels
from fastbn.threads import explain_num_threads, wait_policy


@overload
def show_config(mode: Literal["stdout"] = "stdout") -> None: ...


@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...


def show_config(mode: str = "stdout") -> dict[str, Any] | None:
    """Tell instruction set, OpenMP runtime, threads and why that many, cache sizes and output memory held.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print it, or return it. As in :func:`numpy.show_config`.

    Returns
    -------
    dict or None
        With ``mode="dicts"``: the strings ``"version"``, ``"numpy"`` and ``"isa"``, the list
        ``"supported_isas"``, and the dicts ``"openmp"`` (None in a build without it), ``"threads"`` (of the
        calling thread), ``"sharing"`` (how idle threads wait, and how many calls were shared out among
        threads, took longer for it, or went alone instead), ``"caches"`` and ``"output_memory"``. Sizes are
        in bytes; all can be written as JSON.

    Raises
    ------
    ValueError
        If `mode` is another, or the environment variable ``FASTBN_NUM_THREADS`` is senseless.
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f'mode must be "stdout" or "dicts", got {mode!r}')
    from fastbn import __version__

    count, reason = explain_num_threads()
    l2, last, sharing = _kernels.caches()
    held, limit = _kernels.output_memory()
    waiting, (shared, alone, lost) = wait_policy(), _kernels.sharing()
    config = {
        "version": __version__,
        "numpy": np.__version__,
        "isa": _kernels.get_isa(),
        "supported_isas": list(_kernels.supported_isas()),
        "openmp": _kernels.openmp and {"version": _kernels.openmp, "library": _kernels.openmp_library()},
        "threads": {"count": count, "reason": reason},
        "sharing": {"wait_policy": waiting, "shared": shared, "alone": alone, "lost": lost},
        "caches": {"L2": l2, "last_level": last, "last_level_cpus": sharing},
        "output_memory": {"held": held, "limit": limit},
    }
    if mode == "dicts":
        return config
    cpus = f"{sharing} CPU{'s' * (sharing > 1)}"
    openmp = f"{_kernels.openmp}, {_kernels.openmp_library() or 'of an unknown library'}"
    print(
        f"fastbn           {__version__}, NumPy {np.__version__}",
        f"instruction set  {config['isa']}, of {', '.join(_kernels.supported_isas())}",
        f"OpenMP           {openmp if _kernels.openmp else 'none'}",
        f"threads          {count}: {reason}",
        f"wait policy      {waiting}",
        f"calls            {shared} shared out, {lost} of them late; {alone} went alone instead",
        f"caches           L2 {_mebibytes(l2)}, last level {_mebibytes(last)} for {cpus}",
        f"output memory    {_mebibytes(held)} held for the next outputs, {_mebibytes(limit)} at most",
        sep="\n",
    )
    return None


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.4g} MiB"
