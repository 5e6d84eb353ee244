"""Parallel calls after a fork: no hang, the same bits, and proof that the cure is what prevents the hang."""

import os
import re
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest

from fastbn import _kernels

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform"),
    pytest.mark.skipif(_kernels.openmp is None, reason="built without OpenMP"),
]

# Every program runs in a fresh interpreter, so that nothing but its own calls has started a pool of threads.
# Its children have an alarm set, which ends those that hang.
PRELUDE = """
import hashlib, os, signal, sys, threading
import numpy as np
import fastbn
from fastbn import threads

x = np.random.default_rng(0).standard_normal((8, 64, 56, 56), dtype=np.float32)

def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None

def digest(_=None):
    y, stats = fastbn.batch_norm_forward(x, num_threads=2)
    return hashlib.sha256(y.tobytes() + stats.mean.tobytes() + stats.var.tobytes()).hexdigest()

def first_digest():
    \"\"\"The digest of a thread's first parallel call, which must start a thread or prove nothing.\"\"\"
    before = tasks()
    result = digest()
    assert before is None or tasks() > before
    return result

def fork_and_call(expected, seconds=10):
    \"\"\"Exit status of a child that makes a parallel call; minus SIGALRM if it hangs.\"\"\"
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(seconds)
            os._exit(0 if digest() == expected else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run(program):
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + program],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_fork():
    program = """
expected = first_digest()
print(fork_and_call(expected), digest() == expected, fork_and_call(expected))
"""
    assert run(program) == ["0", "True", "0"]


def test_fork_of_a_forked_child():
    program = """
expected = first_digest()
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit(3 if digest() != expected else fork_and_call(expected))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(program) == ["0"]


def test_fork_before_the_first_parallel_call():
    program = """
child = os.fork()
if child == 0:
    signal.alarm(20)
    expected = first_digest()
    os._exit(fork_and_call(expected))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(program) == ["0"]


def test_fork_from_a_second_thread():
    """Each Python thread has a pool of its own: one forks with its pool running, one without any."""
    program = """
expected = first_digest()
statuses = []
def with_pool():
    first_digest()
    statuses.append(fork_and_call(expected))
def without_pool():
    statuses.append(fork_and_call(expected))
for target in (with_pool, without_pool):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
print(*statuses, digest() == expected)
"""
    assert run(program) == ["0", "0", "True"]


def test_fork_while_other_threads_are_inside_parallel_regions():
    program = """
expected = first_digest()
done = threading.Event()
wrong = []
def work():
    while not done.is_set():
        if digest() != expected:
            wrong.append(1)
workers = [threading.Thread(target=work) for _ in range(2)]
for worker in workers:
    worker.start()
statuses = {fork_and_call(expected) for _ in range(10)}
done.set()
for worker in workers:
    worker.join()
print(*statuses, len(wrong))
"""
    assert run(program) == ["0", "0"]


def test_multiprocessing_fork_pool():
    program = """
import multiprocessing
expected = first_digest()
with multiprocessing.get_context("fork").Pool(2, signal.alarm, (20,)) as pool:
    digests = pool.map_async(digest, range(4)).get(timeout=20)
print(set(digests) == {expected}, digest() == expected)
"""
    assert run(program) == ["True", "True"]


def test_process_pool_executor():
    program = """
import concurrent.futures, multiprocessing
expected = first_digest()
context = multiprocessing.get_context("fork")
with concurrent.futures.ProcessPoolExecutor(2, context, signal.alarm, (20,)) as pool:
    digests = list(pool.map(digest, range(4)))
print(set(digests) == {expected}, digest() == expected)
"""
    assert run(program) == ["True", "True"]


# A module whose import makes a parallel call, as that of a service which warms up when it is loaded.
SERVICE = (
    PRELUDE
    + """
expected, importer = first_digest(), os.getpid()

def answer(_=None):
    return digest() == expected, "forked" if os.getpid() != importer else "imported here"

def application(environ, start_response):
    start_response("200 OK", [])
    return [repr(answer()).encode()]
"""
)


@pytest.fixture
def service(tmp_path, monkeypatch):
    """The module `service` can be imported, here and in all processes that are started."""
    (tmp_path / "service.py").write_text(SERVICE)
    path = filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))


@pytest.mark.parametrize(("method", "how"), [("spawn", "imported here"), ("forkserver", "forked")])
def test_multiprocessing_by_other_methods(service, method, how):
    """What is preloaded into a fork server has used its threads before it forks."""
    program = f"""
import concurrent.futures, multiprocessing
import service
context = multiprocessing.get_context({method!r})
context.set_forkserver_preload(["service"])
with context.Pool(2, signal.alarm, (30,)) as pool:
    answers = pool.map_async(service.answer, range(4)).get(timeout=30)
with concurrent.futures.ProcessPoolExecutor(2, context, signal.alarm, (30,)) as pool:
    answers += pool.map(service.answer, range(4))
print(*set(answers), sep="|")
"""
    assert " ".join(run(program)) == str((True, how))


def test_gunicorn_preload(service):
    """The master imports the service, its workers are forks."""
    pytest.importorskip("gunicorn")
    options = ["--preload", "--workers=2", "--bind=127.0.0.1:0", "--timeout=60", "service:application"]
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "gunicorn", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as master:
        try:
            log = iter(master.stderr.readline, "")
            address = next(filter(None, (re.search(r"Listening at: (\S+)", line) for line in log)))[1]
            for _ in range(4):
                with urlopen(address, timeout=20) as response:
                    assert response.read().decode() == str((True, "forked"))
        finally:
            master.terminate()
            master.communicate(timeout=60)


FORK_IN_C = """
import ctypes
libc = ctypes.PyDLL(None)  # which does not let go of the GIL: a server in C would take it in the child

def fork_in_c_and_call(fork, expected, seconds=10):
    child = fork()
    if child == 0:
        signal.alarm(seconds)
        os._exit(0 if digest() == expected else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def test_a_fork_in_c():
    """Case 31: a server that forks without telling Python, as uWSGI does."""
    program = """
expected = first_digest()
print(fork_in_c_and_call(libc.fork, expected), digest() == expected)
"""
    assert run(FORK_IN_C + program) == ["0", "True"]


def test_a_hook_before_the_fork_that_calls():
    program = """
os.register_at_fork(before=digest)
expected = first_digest()
print(fork_and_call(expected))
os.register_at_fork(before=digest)
print(fork_and_call(expected))
"""
    assert run(program) == ["0", "0"]


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.uname().machine != "x86_64",
    reason="the number of a system call",
)
def test_without_the_cure_the_child_hangs():
    """A fork that the C library does not know of calls no handlers."""
    program = """
expected = first_digest()
gnu = "/libgomp" in open("/proc/self/maps").read()
print(gnu, fork_in_c_and_call(lambda: libc.syscall(57), expected, seconds=2) if gnu else None)
"""
    gnu, status = run(FORK_IN_C + program)
    if gnu == "False":
        pytest.skip("only GNU OpenMP needs the cure")
    assert int(status) == -signal.SIGALRM
