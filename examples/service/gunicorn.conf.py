"""How gunicorn runs app.py: the network is loaded once, then two workers are forked from it.

Workers tell their metrics by files in a folder that they share, so that GET /metrics, which reaches only one
of them, answers for all.
"""

import os
import shutil
import tempfile
from pathlib import Path

chdir = str(Path(__file__).parent)
wsgi_app = "app:app"
bind = "127.0.0.1:8000"
preload_app = True
workers = int(os.environ.get("WEB_CONCURRENCY", 2))
worker_class = "uvicorn_worker.UvicornWorker"
control_socket_disable = True  # it would be one for all services of a user

# prometheus_client looks for it when it is imported, so that must come later. A reload keeps the folder.
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="fastbn-metrics-")


def child_exit(server, worker):
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(worker.pid)


def on_exit(server):
    shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)
