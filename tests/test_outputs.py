"""Memory of dropped outputs: used again, within bounds, and never while anything still refers to it.

No other is kept."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from operations import not_sanitized

import fastbn
from fastbn import _kernels, outputs

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def cache():
    """A cache of 64 MB that is empty before and after."""
    fastbn.set_output_cache(0)
    fastbn.set_output_cache(64 * MEGABYTE)
    yield
    fastbn.set_output_cache(0)
    fastbn.set_output_cache(256 * MEGABYTE)


def normalizer(channels=4):
    zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    return fastbn.FrozenBatchNorm(zeros, ones, eps=0.0)


def images(megabytes, value=1.0):
    return np.full((megabytes, 4, 256, 256), value, np.float32)


def held():
    return _kernels.output_memory()[0]


def test_dropped_output_is_used_again():
    bn, x = normalizer(), images(1)
    y = bn(x)
    address = y.ctypes.data
    del y
    assert held() >= x.nbytes
    y = bn(x)
    assert y.ctypes.data == address
    assert held() == 0


@pytest.mark.parametrize(
    "make", [lambda x, bn: fastbn.batch_norm(x, None, None, training=True), lambda x, bn: bn(x)]
)
def test_outputs_own_aligned_writable_memory(make):
    y = make(images(1), normalizer())
    assert y.flags.owndata
    assert y.flags.writeable
    assert y.ctypes.data % 4096 == 0


def test_memory_lives_as_long_as_a_view():
    bn, x = normalizer(), images(1, 3.0)
    view = bn(x)[0, 1, 2:5, ::7]
    others = [bn(images(1, float(i))) for i in range(5)]
    np.testing.assert_array_equal(view, 3.0)
    assert all((y == i).all() for i, y in enumerate(others))


def test_smaller_output_wastes_at_most_an_eighth():
    bn = normalizer()
    y = bn(np.ones((8, 4, 256, 256), np.float32))
    big = y.ctypes.data
    del y
    half = bn(np.ones((4, 4, 256, 256), np.float32))
    assert half.ctypes.data != big
    nearly = bn(np.ones((8, 4, 256, 250), np.float32))
    assert nearly.ctypes.data == big


def test_never_more_than_the_limit_is_kept():
    bn = normalizer()
    ys = [bn(images(16, i)) for i in range(6)]
    addresses = [y.ctypes.data for y in ys]
    while ys:
        del ys[0]
        assert held() <= 64 * MEGABYTE
    assert held() == 64 * MEGABYTE
    assert bn(images(16)).ctypes.data in addresses[2:], "the oldest are given back first"


def test_output_larger_than_the_limit_is_not_kept():
    fastbn.set_output_cache(4 * MEGABYTE)
    normalizer()(images(8))
    assert held() == 0


def test_small_outputs_are_left_to_numpy():
    normalizer()(np.ones((2, 4, 8, 8), np.float32))
    assert held() == 0


def test_empty_and_switch_off():
    bn = normalizer()
    bn(images(2))
    assert fastbn.empty_output_cache() == 2 * MEGABYTE
    assert held() == 0
    bn(images(2))
    assert held() == 2 * MEGABYTE
    fastbn.set_output_cache(0)
    assert held() == 0
    bn(images(2))
    assert held() == 0


def test_array_that_outlives_the_switch_off_is_freed():
    y = normalizer()(images(2))
    fastbn.set_output_cache(0)
    del y
    assert held() == 0


@pytest.mark.parametrize(("bad", "error"), [(-1, ValueError), (1 << 63, ValueError), (1.5, TypeError)])
def test_bad_limit(bad, error):
    with pytest.raises(error, match="max_bytes"):
        fastbn.set_output_cache(bad)


def test_output_can_be_resized():
    y = normalizer()(images(1, 5.0))
    n = y.size
    y.resize(2 * n, refcheck=False)
    assert (y[:n] == 5.0).all()
    assert (y[n:] == 0.0).all()


def test_numpy_goes_on_with_its_own_allocator():
    before = np.empty(0)
    normalizer()(images(1))
    name = np._core.multiarray.get_handler_name
    assert name(np.empty(1)) == name(before)


def test_stress_many_threads_never_share_memory():
    """Each thread keeps outputs and views of them for a while, and finds its own values in them."""
    bn = normalizer()
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        kept = []
        for i in range(150):
            value = np.float32(seed * 1000 + i)
            y = bn(np.full((1, 4, 128, int(rng.integers(120, 140))), value, np.float32))
            kept.append((y[0, 3, 5:] if i % 3 == 0 else y, value))
            del y
            if len(kept) > 4:
                array, expected = kept.pop(int(rng.integers(len(kept))))
                if not (array == expected).all():
                    failures.append((seed, i))
        failures.extend((seed, "kept") for array, expected in kept if not (array == expected).all())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert held() <= 64 * MEGABYTE


SHORT_OF_MEMORY = """
import resource
import numpy as np, fastbn
fastbn.set_num_threads(1)
fastbn.set_output_cache(1 << 30)
ones = np.ones(4, "f4")
bn = fastbn.FrozenBatchNorm(ones, ones)
image = np.lib.stride_tricks.as_strided(ones, (6, 4, 4 << 20), (0, 0, 0))
ys = [bn(image[:1]) for _ in range(4)]
C = 3 << 20
rows, vector, doubles = np.ones((2, C), "f4"), np.ones(C, "f4"), np.ones(2 * C, "f4")[::2]
stats = fastbn.batch_stats(rows)
del ys
kept = fastbn._kernels.output_memory()[0]
assert kept >= 256 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), -1))
y = {call}
assert fastbn._kernels.output_memory()[0] < kept
"""


@not_sanitized
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is that of Linux")
@pytest.mark.parametrize(
    "call",
    [
        "bn(image[:2])",
        "fastbn.batch_norm_forward(image[:2])",
        "fastbn.batch_stats(rows)",
        "fastbn.batch_norm(rows, vector, vector, out=rows)",
        "fastbn.batch_norm_backward(rows, rows, stats)",
        "fastbn.batch_norm_forward(rows, doubles, out=rows)",
        "fastbn.FrozenBatchNorm(vector, vector, copy=False)",
        "bn(image[:1])\ny.resize(6 << 22, refcheck=False)",
    ],
)
def test_kept_memory_goes_before_an_allocation_fails(call):  # case 34
    code = SHORT_OF_MEMORY.replace("{call}", call)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_fork():
    """Parent and child go on with memory of their own, as copy-on-write has it."""
    code = """
import os, numpy as np, fastbn
bn = fastbn.FrozenBatchNorm(np.zeros(4, "f4"), np.ones(4, "f4"), eps=0.0)
kept = bn(np.full((2, 4, 256, 256), 7, "f4"))
bn(np.full((2, 4, 256, 256), 8, "f4"))
pid = os.fork()
value = 1.0 if pid else 2.0
ys = [bn(np.full((2, 4, 256, 256), value, "f4")) for _ in range(3)]
ok = all((y == value).all() for y in ys) and (kept == 7).all()
if not pid:
    os._exit(0 if ok else 1)
assert os.waitpid(pid, 0)[1] == 0 and ok
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_fork_while_threads_make_outputs():
    """No child finds the lock of the kept outputs held, nor them half-changed."""
    code = """
import os, signal, threading
import numpy as np, fastbn
bn = fastbn.FrozenBatchNorm(np.zeros(4, "f4"), np.ones(4, "f4"), eps=0.0)
def right(value):
    return (bn(np.full((1, 4, 128, 130 + value % 8), value, "f4")) == value).all()
right(0) # looks up the number of threads, in a dict that a free-threaded Python would lock
failures, done = [], threading.Event()
def work(value):
    while not done.is_set():
        if not right(value):
            failures.append(value)
threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
for thread in threads:
    thread.start()
for value in range(40):
    pid = os.fork()
    if not pid:
        signal.alarm(20)
        os._exit(0 if all(right(value) for _ in range(5)) else 1)
    if os.waitpid(pid, 0)[1]:
        failures.append(pid)
done.set()
for thread in threads:
    thread.join()
assert not failures
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("channels", "calls"), [(1 << 17, 20), (16, 10000)])
def test_calls_keep_no_memory(channels, calls):
    """Little work and much: what a call holds meanwhile is 14 MB here and 10 KB there."""
    pytest.importorskip("resource")
    code = f"""
import resource
import numpy as np, fastbn
x, out = np.ones((2, 2, {channels}), "f4")
mean, var = np.zeros({channels}, "f4"), np.ones({channels}, "f4")
def peak(calls):
    for _ in range(calls):
        stats = fastbn.batch_stats(x)
        fastbn.batch_norm(x, mean, var, training=True, out=out)
        fastbn.batch_norm_backward(x, x, stats, out=out)
        fastbn.batch_norm(x, mean, var, out=out)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
first = peak(3)
assert peak({calls}) < 1.2 * first
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_emptying_in_many_threads_leaves_the_limit_as_it_is():
    """It is one step: between two, another thread would find the cache switched off and keep it so."""
    before = _kernels.output_memory()[1]
    start, seen = threading.Barrier(4), set()

    def work():
        start.wait()
        for _ in range(20000):
            fastbn.empty_output_cache()
            seen.add(_kernels.output_memory()[1])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert seen == {before}


@pytest.mark.parametrize(
    ("memory", "cgroup", "expected"),
    [
        (64 << 30, None, 256 << 20),
        (2 << 30, None, 64 << 20),
        (64 << 30, 512 << 20, 16 << 20),
        (1 << 30, 512 << 20, 16 << 20),
        (256 << 20, 512 << 20, 8 << 20),
        (64 << 30, (1 << 63) - 4096, 256 << 20),  # what version 1 has for no limit
        (None, 512 << 20, 16 << 20),
        (None, None, 256 << 20),
        (-4096, None, 256 << 20),
    ],
)
def test_default_follows_the_memory(monkeypatch, memory, cgroup, expected):
    def sysconf(name):
        if memory is None:
            raise ValueError("unrecognized configuration name")
        return {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": memory // 4096}[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    monkeypatch.setattr(outputs, "cgroup_memory", lambda: cgroup)
    monkeypatch.delenv("FASTBN_OUTPUT_CACHE", raising=False)
    outputs._from_environment()
    assert _kernels.output_memory()[1] == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("32M", 32 << 20),
        ("1G", 1 << 30),
        ("64MiB", 64 << 20),
        ("1k", 1 << 10),
        ("1K", 1 << 10),
        ("2mb", 2 << 20),
        (" 1T ", 1 << 40),
        ("100b", 100),
        ("4096", 4096),
        *((bad, None) for bad in ("32X", "M", "1.5G", "32 M M", "-1", "1e6", "0x10", "99999999T", "9" * 30)),
    ],
)
def test_sizes_with_units(monkeypatch, value, expected):
    monkeypatch.setenv("FASTBN_OUTPUT_CACHE", value)
    if expected is None:
        before = _kernels.output_memory()[1]
        with pytest.raises(
            ImportError, match=r"FASTBN_OUTPUT_CACHE must be .*, as 512k, 32M, 1G or 64MiB, got"
        ):
            outputs._from_environment()
        assert _kernels.output_memory()[1] == before
    else:
        outputs._from_environment()
        assert _kernels.output_memory()[1] == expected


@pytest.mark.parametrize(
    ("value", "ok"), [("0", True), ("1000000", True), ("", True), ("-1", False), ("2X", False)]
)
def test_environment(value, ok):
    code = "import fastbn; print(fastbn._kernels.output_memory()[1])"
    environment = {**os.environ, "FASTBN_OUTPUT_CACHE": value}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if ok:
        assert int(run.stdout) == int(value or min(outputs._memory() // 32, 256 * MEGABYTE))
    else:
        assert run.returncode != 0
        assert "FASTBN_OUTPUT_CACHE" in run.stderr
