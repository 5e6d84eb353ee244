"""How many threads are used by default, and why; what importing the library does not do."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastbn
from fastbn import _kernels, threads

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
needs_openmp = pytest.mark.skipif(_kernels.openmp is None, reason="built without OpenMP")

VARIABLES = ("OMP_NUM_THREADS", "FASTBN_NUM_THREADS")


@pytest.fixture(autouse=True)
def nothing_decided(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    threads.set_num_threads(None)
    yield
    threads.set_num_threads(None)


@pytest.fixture
def machine(monkeypatch):
    """Set what the machine offers: machine(cpus=..., quota=...), and what OpenMP allows."""

    def describe(cpus=8, quota=None, openmp=4096):
        kernels = SimpleNamespace(openmp="some runtime", openmp_threads=lambda: openmp)
        monkeypatch.setattr(threads, "_kernels", kernels)
        monkeypatch.setattr(threads, "count_cpus", lambda: cpus)
        monkeypatch.setattr(threads, "_cgroup_quota", lambda: quota)

    return describe


def run_python(code, *options, **environment):
    """Standard output of `code` in a fresh interpreter that has none of our variables but `environment`."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        env=inherited | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# What decides


@pytest.mark.parametrize(
    ("cpus", "quota", "omp", "ours", "count", "reason"),
    [
        (8, None, None, None, 8, "CPU affinity"),
        (8, 0.5, None, None, 1, "cgroup CPU quota of 0.5"),  # case 25
        (8, 1.0, None, None, 1, "cgroup CPU quota of 1"),
        (8, 1.5, None, None, 2, "cgroup CPU quota of 1.5"),
        (8, 100.0, None, None, 8, "CPU affinity"),
        (8, None, "3", None, 3, "OMP_NUM_THREADS"),
        (8, None, "4,3,2", None, 4, "OMP_NUM_THREADS"),
        (8, None, " 5 ", None, 5, "OMP_NUM_THREADS"),
        (8, None, "64", None, 8, "CPU affinity"),
        (8, None, None, "6", 6, "FASTBN_NUM_THREADS"),
        (8, None, "3", "6", 3, "OMP_NUM_THREADS"),
        (8, None, "6", "3", 3, "FASTBN_NUM_THREADS"),
        (8, 2.0, "6", "3", 2, "cgroup CPU quota of 2"),
        (8, None, "", " ", 8, "CPU affinity"),  # an empty variable counts as unset
        (4096, None, None, None, 1024, "upper limit of fastbn"),
    ],
)
def test_the_least_limit_decides(machine, monkeypatch, cpus, quota, omp, ours, count, reason):
    machine(cpus, quota)
    for variable, value in zip(VARIABLES, (omp, ours), strict=True):
        if value is not None:
            monkeypatch.setenv(variable, value)
    assert threads.explain_num_threads() == (count, reason)
    assert threads.get_num_threads() == count


@pytest.mark.parametrize(
    ("quota", "omp", "ours", "processes", "count", "reason"),
    [
        (None, None, None, 1, 8, "CPU affinity"),
        (None, None, None, 3, 2, "8 CPUs shared by 3 ranks"),
        (None, None, None, 9, 1, "8 CPUs shared by 9 ranks"),
        (3.5, None, None, 2, 2, "4 CPUs shared by 2 ranks"),
        (None, "6", None, 2, 6, "OMP_NUM_THREADS"),
        (None, None, "6", 2, 6, "FASTBN_NUM_THREADS"),
        (None, "", " ", 2, 4, "8 CPUs shared by 2 ranks"),
    ],
)
def test_ranks_share_cpus_unless_told_how_many(
    machine, monkeypatch, quota, omp, ours, processes, count, reason
):
    machine(8, quota)
    for variable, value in zip(VARIABLES, (omp, ours), strict=True):
        if value is not None:
            monkeypatch.setenv(variable, value)
    monkeypatch.setattr(threads, "_sharers", 1)
    assert threads.get_num_threads() >= count  # and not for good
    threads.share_cpus(processes)
    assert threads.explain_num_threads() == (count, reason)
    threads.set_num_threads(5)
    assert threads.get_num_threads() == 5
    threads.set_num_threads(None)
    assert threads.explain_num_threads() == (count, reason)


@pytest.mark.parametrize("value", ["many", "0", "-2", "1.5", ",4", "1e3", "9" * 5000])
def test_senseless_omp_num_threads_is_ignored_with_a_warning(machine, monkeypatch, value):
    machine(cpus=8)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.warns(RuntimeWarning, match="OMP_NUM_THREADS=.* is ignored"):
        assert threads.get_num_threads() == 8
    assert threads.get_num_threads() == 8  # and says so once


@pytest.mark.parametrize("value", ["many", "0", "-2", "1.5", "4,2", "1025", "9" * 5000])
def test_senseless_fastbn_num_threads_is_an_error(machine, monkeypatch, value):
    machine(cpus=8)
    monkeypatch.setenv("FASTBN_NUM_THREADS", value)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"FASTBN_NUM_THREADS must be .* from 1 to 1024, got .*unset it"):
            threads.get_num_threads()
    monkeypatch.setenv("FASTBN_NUM_THREADS", "4")
    assert threads.get_num_threads() == 4


def test_the_default_is_looked_up_once(machine, monkeypatch):
    machine(cpus=8)
    assert threads.get_num_threads() == 8
    machine(cpus=4)
    monkeypatch.setenv("FASTBN_NUM_THREADS", "2")
    assert threads.get_num_threads() == 8
    threads.set_num_threads(None)
    assert threads.get_num_threads() == 2


def test_the_limit_of_openmp_is_looked_up_at_each_call(machine):
    for openmp, expected in [(3, 3), (8, 8), (1, 1), (64, 8)]:
        machine(cpus=8, openmp=openmp)
        assert threads.get_num_threads() == expected
    machine(cpus=8, openmp=3)
    assert threads.explain_num_threads() == (3, "OpenMP's limit for this thread")
    threads.set_num_threads(5)
    assert threads.get_num_threads() == 5


def test_a_serial_build_has_one_thread(machine, monkeypatch):
    machine(cpus=8)
    monkeypatch.setattr(threads._kernels, "openmp", None)
    assert threads.explain_num_threads() == (1, "built without OpenMP")
    threads.set_num_threads(4)
    assert threads.explain_num_threads() == (1, "built without OpenMP")
    threads.set_num_threads(1)
    assert threads.explain_num_threads() == (1, "set_num_threads")


@pytest.mark.parametrize(
    ("cpus", "chosen", "num_threads", "warned"),
    [
        (8, None, None, 1),
        (1, None, None, 0),
        (1, None, 2, 1),
        (8, None, 1, 0),
        (8, 1, None, 0),
        (1, 4, None, 1),
    ],
)
def test_a_serial_build_warns_once_where_threads_would_have_been_used(
    machine, monkeypatch, cpus, chosen, num_threads, warned
):
    machine(cpus=cpus)
    for module in (_kernels, threads._kernels):
        monkeypatch.setattr(module, "openmp", None)
    monkeypatch.setattr(threads, "_warned_of_serial", False)
    threads.set_num_threads(chosen)
    small, large = (np.ones((rows, 1 << 10), np.float32) for rows in (2, 256))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastbn.batch_norm_forward(small, num_threads=num_threads)
        assert not caught
        for _ in range(2):
            fastbn.batch_norm_forward(large, num_threads=num_threads)
    assert [each.category for each in caught] == [RuntimeWarning] * warned
    assert all("without OpenMP" in str(each.message) for each in caught)


# set_num_threads


def test_set_num_threads_rules_over_everything(machine, monkeypatch):
    machine(cpus=2, quota=0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads.set_num_threads(7)
    assert threads.explain_num_threads() == (7, "set_num_threads")
    threads.set_num_threads(None)
    assert threads.explain_num_threads() == (1, "cgroup CPU quota of 0.5")


@pytest.mark.parametrize("n", [0, -1, 1025, 2**70])
def test_set_num_threads_out_of_range(machine, n):
    machine(cpus=8)
    threads.set_num_threads(3)
    with pytest.raises(ValueError, match=f"n must be from 1 to 1024, got {n}"):
        threads.set_num_threads(n)
    assert threads.get_num_threads() == 3


@pytest.mark.parametrize("n", [2.0, "2", [2]])
def test_set_num_threads_of_another_type(machine, n):
    machine(cpus=8)
    with pytest.raises(TypeError, match=r"n must be an integer or None, got (float|str|list)"):
        threads.set_num_threads(n)
    assert threads.get_num_threads() == 8


# Quotas of cgroups: trees of files such as the kernel shows, written to tmp_path

V2 = "0::/"
V1 = "3:cpuset:/other\n4:cpu,cpuacct:/"


def v1_files(quota, period=100000):
    return {"cpu.cfs_quota_us": f"{quota}\n", "cpu.cfs_period_us": f"{period}\n"}


def v2_file(text):
    return {"cpu.max": f"{text}\n"}


def quota_of(tmp_path, cgroup, mounts, directories):
    """_cgroup_quota where /proc/self holds `cgroup` and `mounts` (root, mount point, type, options)."""
    for directory, files in directories.items():
        (tmp_path / directory).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / directory / name).write_text(text)
    lines = ["21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw"]
    for root, point, kind, options in mounts:
        escaped = str(tmp_path / point).replace("\\", r"\134").replace(" ", r"\040")
        lines.append(f"30 21 0:26 {root} {escaped} rw,nosuid shared:9 master:2 - {kind} {kind} {options}")
    (tmp_path / "cgroup").write_text(cgroup + "\n")
    (tmp_path / "mountinfo").write_text("\n".join(lines) + "\n")
    return threads._cgroup_quota(tmp_path)


def test_cgroup_memory(tmp_path):
    """The least of all around, of either version; "max" and what is missing are none."""
    mounts = [
        ("/", "cg", "cgroup2", "rw"),
        ("/", "mem", "cgroup", "rw,memory"),
        ("/", "cpu", "cgroup", "rw,cpu"),
    ]
    directories = {
        "cg": {},
        "cg/a": {"memory.max": "3000\n"},
        "cg/a/b": {"memory.max": "max\n"},
        "mem": {"memory.limit_in_bytes": "9223372036854771712\n"},
        "mem/c": {"memory.limit_in_bytes": "5000\n"},
        "cpu/c": {"memory.limit_in_bytes": "1\n"},
    }
    for groups, expected in [
        ("0::/a/b", 3000),
        ("4:memory:/c", 5000),
        ("4:memory:/c\n0::/a/b", 3000),
        ("4:memory:/", 9223372036854771712),
        ("3:cpu:/c", None),
    ]:
        quota_of(tmp_path, groups, mounts, directories)
        assert threads.cgroup_memory(tmp_path) == expected
    assert threads.cgroup_memory(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("text", "quota"),
    [
        ("50000 100000", 0.5),
        ("150000 100000", 1.5),
        ("400000 200000", 2.0),
        ("max 100000", None),
        ("", None),
        ("50000", None),
        ("0 0", None),
        ("many 100000", None),
    ],
)
def test_v2_quota(tmp_path, text, quota):
    assert quota_of(tmp_path, V2, [("/", "cg", "cgroup2", "rw")], {"cg": v2_file(text)}) == quota


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        (v1_files(50000), 0.5),
        (v1_files(300000, 200000), 1.5),
        (v1_files(-1), None),
        (v1_files("nonsense"), None),
        ({"cpu.cfs_quota_us": "50000\n"}, None),
        ({}, None),
    ],
)
def test_v1_quota(tmp_path, files, quota):
    assert quota_of(tmp_path, V1, [("/", "cg/cpu", "cgroup", "rw,cpu,cpuacct")], {"cg/cpu": files}) == quota


@pytest.mark.parametrize(
    ("outer", "middle", "own", "quota"),
    [("max", "max", "200000", 2), ("max", "100000", "200000", 1), ("50000", "max", "max", 0.5)],
)
def test_v2_least_quota_up_to_the_root(tmp_path, outer, middle, own, quota):
    directories = {
        "cg": {},  # the real root has no cpu.max
        "cg/a": v2_file(f"{outer} 100000"),
        "cg/a/b": v2_file(f"{middle} 100000"),
        "cg/a/b/c": v2_file(f"{own} 100000"),
        "cg/a/b/c/d": v2_file("1000 100000"),  # below us: not ours
        "cg/x": v2_file("1000 100000"),  # beside us: not ours
    }
    assert quota_of(tmp_path, "0::/a/b/c", [("/", "cg", "cgroup2", "rw")], directories) == quota


@pytest.mark.parametrize(("outer", "own", "quota"), [(-1, 200000, 2), (100000, 200000, 1), (50000, -1, 0.5)])
def test_v1_least_quota_up_to_the_root(tmp_path, outer, own, quota):
    directories = {"cg": v1_files(-1), "cg/a": v1_files(outer), "cg/a/b": v1_files(own)}
    assert quota_of(tmp_path, "4:cpu:/a/b", [("/", "cg", "cgroup", "rw,cpu")], directories) == quota


def test_container_without_its_own_cgroup_namespace(tmp_path):
    """The path is the host's, and the mount shows only the part of the hierarchy below the container."""
    directories = {"cg": v1_files(250000), "cg/inner": v1_files(-1)}
    mounts = [("/docker/abc", "cg", "cgroup", "rw,cpu")]
    assert quota_of(tmp_path, "4:cpu:/docker/abc/inner", mounts, directories) == 2.5


def test_mount_of_another_part_of_the_hierarchy(tmp_path):
    directories = {"own": v2_file("300000 100000"), "other": v2_file("50000 100000")}
    mounts = [("/docker/other", "other", "cgroup2", "rw"), ("/docker/own", "own", "cgroup2", "rw")]
    assert quota_of(tmp_path, "0::/docker/own", mounts, directories) == 3


def test_a_path_that_is_not_there_leaves_the_groups_around_it(tmp_path):
    directories = {"cg": v2_file("200000 100000")}
    assert quota_of(tmp_path, "0::/gone/away", [("/", "cg", "cgroup2", "rw")], directories) == 2


def test_hybrid_hierarchies(tmp_path):
    """Controllers in v1, processes also in an empty v2: the quota is where the cpu controller is."""
    mounts = [
        ("/", "cg/cpuset", "cgroup", "rw,cpuset"),  # cpuset is not cpu
        ("/", "cg/cpu", "cgroup", "rw,cpu"),
        ("/", "cg/unified", "cgroup2", "rw"),
    ]
    directories = {
        "cg/cpuset/c": v1_files(1000),
        "cg/cpu/c": v1_files(50000),
        "cg/unified/u": {"cgroup.procs": ""},
    }
    assert quota_of(tmp_path, "2:cpu:/c\n3:cpuset:/s\n0::/u", mounts, directories) == 0.5
    assert quota_of(tmp_path, "2:cpu:/c", mounts, directories) == 0.5


def test_mount_point_with_a_space_and_a_backslash(tmp_path):
    directories = {"c g\\x": v2_file("50000 100000")}
    assert quota_of(tmp_path, V2, [("/", "c g\\x", "cgroup2", "rw")], directories) == 0.5


@pytest.mark.parametrize("missing", ["cgroup", "mountinfo"])
def test_no_proc(tmp_path, missing):
    assert quota_of(tmp_path, V2, [("/", "cg", "cgroup2", "rw")], {"cg": v2_file("50000 100000")}) == 0.5
    (tmp_path / missing).unlink()
    assert threads._cgroup_quota(tmp_path) is None


def test_files_of_another_kind(tmp_path):
    (tmp_path / "cgroup").write_bytes(b"\xff\xfe nonsense\n\n0::\n")
    (tmp_path / "mountinfo").write_bytes(b"\n1 2 3\n - cgroup2\n\xff - cgroup2 a b\n")
    assert threads._cgroup_quota(tmp_path) is None


# The same for real

COUNT = "from fastbn import threads; print(*threads.explain_num_threads())"


@linux_only
@needs_openmp
def test_real_affinity():
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert run_python(pin + COUNT) == "1 CPU affinity"


@linux_only
@needs_openmp
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_PROC_BIND": "true"},
        {"OMP_PLACES": "cores", "OMP_PROC_BIND": "close"},
        {"OMP_PLACES": "threads"},
        {"GOMP_CPU_AFFINITY": "0-1"},
    ],
    ids=str,
)
def test_bound_threads_do_not_hide_cpus(environment):
    """Case 52."""
    assert run_python(COUNT, **environment) == run_python(COUNT)


@linux_only
@needs_openmp
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_pinned_thread_that_asks_first_decides_for_itself_alone():
    """Case 52."""
    code = """
import os, threading
import fastbn
def pinned():
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    fastbn.get_num_threads()
thread = threading.Thread(target=pinned)
thread.start(), thread.join()
print(*fastbn.threads.explain_num_threads())
"""
    assert run_python(code) == run_python(COUNT)


def test_without_affinity_all_cpus_count(monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, expected in (12, 12), (None, 1):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert threads.count_cpus() == expected


@needs_openmp
def test_real_environment():
    assert run_python(COUNT, OMP_NUM_THREADS="1,2", FASTBN_NUM_THREADS="1") in (
        "1 OMP_NUM_THREADS",
        "1 CPU affinity",
    )
    assert run_python("import fastbn, os; os.environ['FASTBN_NUM_THREADS'] = '1'\n" + COUNT).startswith("1 ")


@linux_only
@needs_openmp
@pytest.mark.parametrize(
    ("quota", "expected"), [(50000, "1 cgroup CPU quota of 0.5"), (100000, "1 cgroup CPU quota of 1")]
)
def test_real_cgroup(quota, expected):
    """A group of our own with a quota, and a process in it: case 25."""
    v1 = Path("/sys/fs/cgroup/cpu")
    group = (v1 if v1.is_dir() else Path("/sys/fs/cgroup")) / f"fastbn-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        try:
            if v1.is_dir():
                (group / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (group / "cpu.max").write_text(f"{quota} 100000")
            join = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
            run_python(join)
        except OSError as error:
            pytest.skip(f"no quota can be set: {error}")
        assert run_python(join + COUNT) == expected
    finally:
        group.rmdir()


# What importing does not do, and what the kernels make of the count

TASKS = "import os\ndef tasks(): return len(os.listdir('/proc/self/task'))\n"
BIG_CALL = """
import numpy as np
x = np.ones((8, 64, 56, 56), np.float32)
mean, var = np.zeros(64, np.float32), np.ones(64, np.float32)
def big_call(**keywords): return fastbn.batch_norm(x, mean, var, **keywords)
"""


@linux_only
def test_importing_starts_no_thread_and_hooks_nothing():
    code = """
import numpy
before, hooks = tasks(), []
os.register_at_fork = lambda **hook: hooks.append(hook)
import fastbn
print(tasks() - before, len(hooks))
"""
    assert run_python(TASKS + code) == "0 0"


def test_importing_loads_nothing_that_numpy_has_not_loaded():
    """Which is what makes importing slow. -S: an editable installation may load more at the start."""
    code = """
import sys, numpy
before = set(sys.modules)
import fastbn
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    path = os.pathsep.join([str(Path(threads.__file__).parents[1]), *filter(None, sys.path)])
    found = set(run_python(code, "-S", PYTHONPATH=path).split())
    assert {name for name in found if "cython" not in name} - {"__future__"} == {"fastbn"}


@linux_only
@needs_openmp
def test_the_count_is_what_the_kernels_start():
    code = f"""
import fastbn
{BIG_CALL}
before = tasks()
fastbn.set_num_threads(1); big_call(); print(tasks() - before)
fastbn.set_num_threads(3); big_call(); print(tasks() - before)
big_call(); big_call(num_threads=4); print(tasks() - before)
"""
    assert run_python(TASKS + code).split("\n") == ["0", "2", "3"]


@linux_only
@needs_openmp
@pytest.mark.parametrize(
    ("environment", "started"), [({"OMP_THREAD_LIMIT": "3"}, 2), ({"OMP_MAX_ACTIVE_LEVELS": "0"}, 0)], ids=str
)
def test_openmp_may_start_fewer_than_were_asked_for(environment, started):
    code = """
import numpy as np, fastbn
values = np.random.default_rng(0).standard_normal((3, 4, 30, 30, 100), np.float32)
def training(x, axis, num_threads):
    running = np.zeros((2, x.shape[axis]), np.float32)
    y, stats = fastbn.batch_norm_forward(x, axis=axis, num_threads=num_threads)
    fastbn.batch_norm(x, *running, training=True, axis=axis, num_threads=num_threads)
    grads = fastbn.batch_norm_backward(x, y, stats, axis=axis, num_threads=num_threads)
    return [a.tobytes() for a in (y, stats.mean, stats.var, running, *grads[:3])]
for x, axis in (values[0], -1), (np.moveaxis(values[1], -1, 1).copy(), 1), (values[2, :1, :1], -1):
    before = tasks()
    shared = training(x, axis, 7)  # 100 channels: two are left over
    same = shared == training(x, axis, 1)
    print(tasks() - before or "no", "more:", "same" if same else "other", "bits")
"""
    first, *others = run_python(TASKS + code, **environment).split("\n")
    assert first == f"{started or 'no'} more: same bits"
    assert others == ["no more: same bits"] * 2


@needs_openmp
def test_a_senseless_setting_is_told_by_the_call_that_needs_it():
    """If it came to be after the import, which tells of those before it."""
    code = f"""
import fastbn, os
os.environ["FASTBN_NUM_THREADS"] = "lots"
{BIG_CALL}
fastbn.batch_norm(x[:1, :, :1, :1], mean, var)
big_call(num_threads=2)
try: big_call()
except ValueError as error: print(error)
"""
    assert "FASTBN_NUM_THREADS must be" in run_python(code)


@linux_only
@needs_openmp
def test_threadpoolctl_sees_and_limits_them():
    pytest.importorskip("threadpoolctl")
    code = f"""
import fastbn
from fastbn import threads
from threadpoolctl import threadpool_info, threadpool_limits
threads.count_cpus, threads._cgroup_quota = lambda: 8, lambda: None
{BIG_CALL}
print([os.path.realpath(pool["filepath"]) for pool in threadpool_info() if pool["user_api"] == "openmp"])
print(os.path.realpath(fastbn._kernels.openmp_library()))
before = tasks()
with threadpool_limits(3, user_api="openmp"):
    with threadpool_limits(1):
        big_call(); print(*threads.explain_num_threads(), tasks() - before)
    with threadpool_limits(1, user_api="openmp"):
        big_call(); print(*threads.explain_num_threads(), tasks() - before)
    with threadpool_limits(1, user_api="blas"):
        print(*threads.explain_num_threads())
    big_call(); print(*threads.explain_num_threads(), tasks() - before)
"""
    pools, ours, *counts = run_python(TASKS + code).split("\n")
    assert ours in pools
    reason = "OpenMP's limit for this thread"
    assert counts == [f"1 {reason} 0", f"1 {reason} 0", f"3 {reason}", f"3 {reason} 2"]
