"""How many threads, and why.

The default is decided at the first call that is big enough to be shared out, not at import, and then kept.
Also here: what the kernels ask about a process before they start its threads.
"""

from __future__ import annotations

import contextlib
import math
import operator
import os
import re
import warnings
from typing import TYPE_CHECKING

from fastbn import _kernels

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_THREADS = 1024

_SERIAL = (1, "built without OpenMP")

_chosen: tuple[int, str] | None = None  # by set_num_threads: the count and why
_default: tuple[int, str] | None = None  # None until it is asked for
_sharers = 1  # processes on the same CPUs that want to divide them
_warned_of_fewer = _warned_of_serial = False


def get_num_threads() -> int:
    """Number of threads that a call uses which is big enough and gives no ``num_threads=``.

    Unless :func:`set_num_threads` said otherwise it is the least of

    - the CPUs this process may run on: its affinity, which cpusets and ``taskset`` narrow; that of its main
      thread, whichever thread asks,
    - the CPU quota of its cgroup (v1 or v2) and of all around it, rounded up: 0.5 gives 1, 1.5 gives 2,
    - the environment variable ``OMP_NUM_THREADS``, of a list its first number,
    - the environment variable ``FASTBN_NUM_THREADS``,
    - of CPUs that a :class:`fastbn.distributed.SyncBatchNorm` shares with other ranks its part, unless one of
      these variables is set, and
    - 1024,

    all looked up once, when it is first needed, and

    - what OpenMP allows the calling thread, looked up at each call: threadpoolctl sets it.

    In a build without OpenMP it is 1. A call takes one thread all the same where other calls of the process
    have the CPUs just then, or where sharing its work did not pay lately: see "A busy machine" in
    docs/deployment.md.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If ``FASTBN_NUM_THREADS`` is not a whole number from 1 to 1024.

    Warns
    -----
    RuntimeWarning
        If ``OMP_NUM_THREADS`` is not a whole number above 0. It is ignored then, as OpenMP itself ignores it.
    """
    return explain_num_threads()[0]


def explain_num_threads() -> tuple[int, str]:
    """Number of threads as :func:`get_num_threads` gives it, and what decided it.

    Returns
    -------
    count : int
    reason : str
        Such as ``"CPU affinity"`` or ``"cgroup CPU quota of 1.5"``.
    """
    global _default
    if _chosen is not None:
        return _chosen
    default = _default
    if default is None:
        default = _default = _look_up()
    allowed = _kernels.openmp_threads()
    return (allowed, "OpenMP's limit for this thread") if allowed < default[0] else default


def set_num_threads(n: int | None) -> None:
    """Set the number of threads for all calls of this process that give no ``num_threads=``.

    It is taken as it is, as ``num_threads=`` is: nothing that limits the default limits it. A build without
    OpenMP goes on with one thread.

    Parameters
    ----------
    n : int or None
        From 1 to 1024, or None for the default that :func:`get_num_threads` describes, looked up anew.

    Raises
    ------
    TypeError
        If `n` is neither an integer nor None.
    ValueError
        If `n` is out of range.
    """
    global _chosen, _default
    if n is None:
        _chosen = _default = None
        return
    try:
        count = operator.index(n)
    except TypeError:
        raise TypeError(f"n must be an integer or None, got {type(n).__name__}") from None
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(f"n must be from 1 to {MAX_THREADS}, got {count}")
    _chosen = _SERIAL if _kernels.openmp is None and count > 1 else (count, "set_num_threads")


def share_cpus(processes: int) -> None:
    """Take so many processes to run on the CPUs of this one, and divide these where nobody says how many."""
    global _sharers, _default
    _sharers, _default = processes, None


def warn_if_serial(num_threads: int | None) -> None:
    """Warn once if a call with this ``num_threads=`` would have used threads, had the build OpenMP."""
    global _warned_of_serial
    if _warned_of_serial:
        return
    if num_threads is not None:
        would = num_threads > 1
    elif _chosen is not None:
        would = _chosen is _SERIAL
    else:
        would = _least_limit()[0] > 1
    if would:
        _warned_of_serial = True
        warnings.warn(
            "fastbn was built without OpenMP and uses one thread only. To use more, install a compiler with "
            "OpenMP (gcc, or clang with libomp) and build again without FASTBN_NO_OPENMP: pip install "
            "--force-reinstall --no-deps --no-cache-dir --no-binary fastbn fastbn. To keep one thread and "
            "hear no more of it: fastbn.set_num_threads(1)",
            RuntimeWarning,
            stacklevel=2,
        )


def count_cpus() -> int:
    """CPUs that the process may use: the affinity of its main thread, which that of others may differ from.

    Where OpenMP has bound threads to places (``OMP_PROC_BIND``, ``OMP_PLACES``, ``GOMP_CPU_AFFINITY``) their
    affinity tells the place, and what OpenMP found before counts.
    """
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(os.getpid())), _kernels.openmp_cpus())
    return os.cpu_count() or 1  # macOS and Windows do not tell


def stack_bytes() -> int:
    """Size of the stacks of OpenMP's threads if the environment sets it, else 0."""
    for name in "OMP_STACKSIZE", "GOMP_STACKSIZE":
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*([BKMG]?)\s*", os.environ.get(name, ""), re.IGNORECASE)
        if found:
            return int(found[1]) << {"B": 0, "": 10, "K": 10, "M": 20, "G": 30}[found[2].upper()]
    return 0


def wait_policy() -> str:
    """How OpenMP's threads wait for the next call, in words."""
    if _kernels.openmp is None:
        return "no threads that wait"
    for name in "GOMP_SPINCOUNT", "OMP_WAIT_POLICY":
        if name in os.environ:
            return f"{name}={os.environ[name]}"
    from fastbn import _short_spin

    if _short_spin:
        return "threads spin for some tens of microseconds, then sleep"
    return "as another library found OpenMP, which it loaded before fastbn: threads may spin for milliseconds"


def warn_of_fewer(can: int, wanted: int) -> None:
    """Say, once, that the system does not let this process start the threads a call is to have."""
    global _warned_of_fewer
    if _warned_of_fewer:
        return
    _warned_of_fewer = True
    warnings.warn(
        f"only {can} of {wanted} threads can be had, and calls go on with these: the process has reached a "
        "limit of processes (ulimit -u, a container's pids limit) or of memory; raise it, or set "
        "FASTBN_NUM_THREADS",
        RuntimeWarning,
        stacklevel=2,
    )


def _look_up() -> tuple[int, str]:
    if _kernels.openmp is None:
        return _SERIAL
    return _least_limit()


def _least_limit() -> tuple[int, str]:
    limits = [(count_cpus(), "CPU affinity"), (MAX_THREADS, "upper limit of fastbn")]
    quota = _cgroup_quota()
    if quota is not None:
        limits.append((math.ceil(quota), f"cgroup CPU quota of {quota:g}"))
    omp = os.environ.get("OMP_NUM_THREADS", "").strip()
    if omp:
        count = _positive(omp.partition(",")[0])
        if count:
            limits.append((count, "OMP_NUM_THREADS"))
        else:
            warnings.warn(
                f"OMP_NUM_THREADS={omp!r} is ignored: expected a whole number above 0 or a list of them",
                RuntimeWarning,
                stacklevel=1,
            )
    asked_for = _asked_for()
    if asked_for is not None:
        limits.append((asked_for, "FASTBN_NUM_THREADS"))
    if _sharers > 1 and not omp and asked_for is None:
        cpus = min(limits, key=operator.itemgetter(0))[0]
        limits.append((max(1, cpus // _sharers), f"{cpus} CPUs shared by {_sharers} ranks"))
    return min(limits, key=operator.itemgetter(0))


def _asked_for() -> int | None:
    """What FASTBN_NUM_THREADS says."""
    text = os.environ.get("FASTBN_NUM_THREADS", "").strip()
    if not text:
        return None
    count = _positive(text)
    if not 1 <= count <= MAX_THREADS:
        raise ValueError(
            f"the environment variable FASTBN_NUM_THREADS must be a whole number from 1 to "
            f"{MAX_THREADS}, got {text!r}; correct it or unset it"
        )
    return count


def _positive(text: str) -> int:
    """The number in `text`, or 0 if there is none."""
    text = text.strip()
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else 0


# Strings, because importing fastbn is not to wait for their compilation, nor for pathlib.
_GROUP = r"(?m)^\d+:(?P<controllers>[^:\n]*):(?P<path>.*)$"
_MOUNT = r"(?m)^\S+ \S+ \S+ (?P<root>\S+) (?P<point>\S+) .*?- (?P<type>cgroup2?) \S+ (?P<options>\S+)$"


def _cgroup_quota(proc: str = "/proc/self") -> float | None:
    """Least CPU quota, in CPUs, of the process's cgroup and of all visible ones around it, or None."""
    quotas = (_quota(*found) for found in _cgroup_directories("cpu", proc))
    return min((quota for quota in quotas if quota is not None), default=None)


def cgroup_memory(proc: str = "/proc/self") -> int | None:
    """Least limit of memory, in bytes, of the process's cgroup and of all visible ones around it, or None."""
    limits = []
    for directory, is_v2 in _cgroup_directories("memory", proc):
        with contextlib.suppress(OSError, ValueError):  # no such controller here, or "max"
            limits.append(int(_read(directory, "memory.max" if is_v2 else "memory.limit_in_bytes")))
    return min(limits, default=None)


def _cgroup_directories(controller: str, proc: str) -> Iterator[tuple[str, bool]]:
    """Of the process's cgroup and of all visible ones around it; and whether they are of version 2.

    `proc` holds the files ``cgroup``, the process's path in each hierarchy, and ``mountinfo``, what part of
    which hierarchy is mounted where (man 7 cgroups, man 5 proc).
    """
    try:
        groups, mounts = _read(proc, "cgroup"), _read(proc, "mountinfo")
    except OSError:
        return
    paths = {}
    for group in re.finditer(_GROUP, groups):
        if not group["controllers"]:
            paths["cgroup2"] = group["path"]
        elif controller in group["controllers"].split(","):
            paths["cgroup"] = group["path"]
    for mount in re.finditer(_MOUNT, mounts):
        is_v2 = mount["type"] == "cgroup2"
        if mount["type"] not in paths or not (is_v2 or controller in mount["options"].split(",")):
            continue
        path, root = paths[mount["type"]], _unescape(mount["root"]).rstrip("/")
        if not f"{path}/".startswith(f"{root}/"):  # some other part of the hierarchy
            continue
        directory = _unescape(mount["point"])
        for part in path[len(root) :].split("/"):  # "" to begin with
            directory = os.path.join(directory, part)
            yield directory, is_v2


def _read(directory: str, name: str) -> str:
    with open(os.path.join(directory, name), encoding="utf-8", errors="surrogateescape") as file:
        return file.read()


def _unescape(path: str) -> str:
    """Undo the octal escapes of mountinfo (space, tab, newline, backslash)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _quota(directory: str, is_v2: bool) -> float | None:
    try:
        if is_v2:
            quota, period = _read(directory, "cpu.max").split()
        else:
            quota, period = (_read(directory, f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        cpus = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such controller here, or "max"
        return None
    return cpus if cpus > 0 else None  # v1 writes -1 for no limit


try:  # at import, rather than at the first call that is large enough to ask
    _asked_for()
except ValueError as error:
    raise ImportError(str(error)) from None
