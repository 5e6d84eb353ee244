"""How gunicorn runs app.py: the network is loaded once, then two workers are forked from it.

Workers tell their metrics by files in a folder that they share, so that GET /metrics, which reaches only one
of them, answers for all.
"""

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from uvicorn_worker import UvicornWorker

chdir = str(Path(__file__).parent)
sys.path.insert(0, chdir)
import metric_files  # noqa: E402

wsgi_app = "app:app"
bind = "127.0.0.1:8000"
preload_app = True
control_socket_disable = True  # it would be one for all services of a user

workers = int(os.environ.get("WEB_CONCURRENCY", 2))
if workers < 1:  # gunicorn would take connections, and nobody would answer
    sys.exit(f"WEB_CONCURRENCY, the number of workers, must be at least 1, got {workers}; unset, it is 2")


class Worker(UvicornWorker):
    CONFIG_KWARGS = UvicornWorker.CONFIG_KWARGS | {"http": "protocol:Protocol"}


worker_class = Worker

# prometheus_client looks for the folder when it is imported, which therefore comes later. A reload keeps the
# folder; a start has none, or one with files of an earlier run.
if "prometheus_client" not in sys.modules:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="fastbn-metrics-")
    metric_files.folder().mkdir(parents=True, exist_ok=True)
    metric_files.remove()


def child_exit(server: Any, worker: Any) -> None:
    metric_files.inherit(worker.pid)


def on_exit(server: Any) -> None:
    metric_files.remove()
    with suppress(OSError):  # it holds what is not ours
        metric_files.folder().rmdir()
