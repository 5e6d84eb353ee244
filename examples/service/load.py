"""Load the service on loopback by wrk, with batch norm by fastbn and by NumPy.

Two services run under gunicorn and are loaded in turns, so that a slow moment of the machine hits them alike.
Every answer is compared with the digits that the NumPy network reads. The exit status is 1 if one was wrong
or a status of 5xx.

    python examples/service/load.py [--seconds 10] [--rounds 2] [--images 16] [--kill-worker]
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import httpx
import network
import psutil
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from fastbn.typing import Array

Process: TypeAlias = "subprocess.Popen[bytes]"

HERE = Path(__file__).resolve().parent
UVICORN = ["app:app", "--http", "protocol:Protocol"]


@contextmanager
def serve(
    server: str = "gunicorn", batch_norm: str = "fastbn", log: int | IO[Any] = subprocess.DEVNULL
) -> Iterator[tuple[Process, str]]:
    """Run the service by gunicorn or by uvicorn alone; gives its process and its address, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = {
        "gunicorn": ["-m", "gunicorn", "--bind", f"127.0.0.1:{port}"],
        "uvicorn": ["-m", "uvicorn", *UVICORN, "--port", str(port), "--no-access-log"],
    }[server]
    environment = os.environ | {"BATCH_NORM": batch_norm}
    process = subprocess.Popen([sys.executable, *command], cwd=HERE, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address, process)
        yield process, address
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_for(address: str, process: Process, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/healthz").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"the service did not come up: {process.args!r} (exit status {process.poll()})")


def load(
    address: str,
    images: Array,
    *,
    seconds: float,
    requests: int,
    connections: int = 8,
    halfway: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Ask for `images` again and again; returns what load.lua counted, as a dict.

    It ends after `seconds` or so many `requests`, whichever comes first.
    """
    probabilities, _ = network.load("numpy")(images)
    right = json.dumps({"digits": probabilities.argmax(1).tolist()}, separators=(",", ":")).strip("{}")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as body:
        json.dump({"images": images.tolist()}, body)
        body.flush()
        options = ["-t", "1", "-c", str(connections), "-d", f"{seconds}s", "-s", str(HERE / "load.lua")]
        command = ["wrk", *options, f"{address}/predict", "--", body.name, right, str(requests)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wrk:
            time.sleep(seconds / 2)
            halfway()
            printed, _ = wrk.communicate(timeout=seconds + 30)
    counts: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return counts


def kill_worker(process: Process) -> None:
    """Kill a worker of gunicorn, as the kernel does where memory runs out."""
    os.kill(psutil.Process(process.pid).children()[0].pid, signal.SIGKILL)


def batch_norm_microseconds(address: str, by: str = "fastbn") -> float:
    """The mean of a request, since the service started."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    total, count = (
        next(
            float(line.split()[1])
            for line in lines
            if line.startswith(f'batch_norm_seconds_{part}{{by="{by}"}} ')
        )
        for part in ("sum", "count")
    )
    return 1e6 * total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=10, help="of each run, at most")
    parser.add_argument("--requests", type=int, default=100_000, help="of each run, at most")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each service")
    parser.add_argument("--images", type=int, default=16, help="in a request")
    parser.add_argument("--kill-worker", action="store_true", help="kill a worker in the middle of each run")
    options = parser.parse_args()
    images = load_digits().images[: options.images]

    table = Table(title=f"POST /predict with {options.images} images, 2 workers, 8 connections")
    table.add_column("")
    for title in ("requests/s", "p50", "p99", "batch norm", "dropped", "5xx", "wrong"):
        table.add_column(title, justify="right")
    failures = 0
    with ExitStack() as stack:
        services = {name: stack.enter_context(serve(batch_norm=name)) for name in ("fastbn", "numpy")}
        for _ in range(options.rounds):
            for name, (process, address) in services.items():
                run = load(
                    address,
                    images,
                    seconds=options.seconds,
                    requests=options.requests,
                    halfway=partial(kill_worker, process) if options.kill_worker else lambda: None,
                )
                failures += run["server_errors"] + run["wrong"]
                table.add_row(
                    name,
                    f"{run['answers'] / run['seconds']:.0f}",
                    f"{1e3 * run['p50']:.1f} ms",
                    f"{1e3 * run['p99']:.1f} ms",
                    f"{batch_norm_microseconds(address, name):.0f} µs",
                    *(str(run[count]) for count in ("connection_errors", "server_errors", "wrong")),
                )
    Console().print(table)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
