"""The files by which prometheus_client shares the metrics of several processes.

Each worker has its own, named after its process, and GET /metrics adds them up. Those of dead workers would
stay for ever; without them the totals would fall, as no counter may. So what a dead worker counted is added
to files that all dead ones share. A lock keeps readers from seeing that half done.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path


def folder() -> Path:
    return Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])


def all_files(process: int | str = "*") -> Iterator[Path]:
    for kind in ("counter", "gauge_*", "histogram", "summary"):
        yield from folder().glob(f"{kind}_{process}.db")


def remove() -> None:
    """Remove all, of this run or an earlier one."""
    for file in [*all_files(), folder() / "lock"]:
        file.unlink(missing_ok=True)


def hold() -> Iterator[None]:
    """A dependency of GET /metrics: while it is held, no file goes into that of the dead."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:  # one process, and no files
        yield
        return
    with open(folder() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def inherit(process: int) -> None:
    """Add what a dead process has counted to the files of all dead ones, in the place of its own."""
    from prometheus_client.mmap_dict import MmapedDict  # not before PROMETHEUS_MULTIPROC_DIR is set

    with open(folder() / "lock", "w") as lock:
        for _ in range(100):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # a reader
                time.sleep(0.01)
        else:
            return  # a reader hangs, and whoever watches over workers must not. The files go on to count.
        for file in all_files(process):
            kind = file.name.partition("_")[0]
            if kind != "gauge" and file.stat().st_size:  # a gauge tells of its process alone
                with closing(MmapedDict(folder() / f"{kind}_dead.db")) as dead:
                    for key, value, _, _ in MmapedDict.read_all_values_from_file(file):
                        dead.write_value(key, dead.read_value(key)[0] + value, 0)
            file.unlink()
