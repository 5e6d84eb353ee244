"""fastbn.show_config, and the command line that prints it and times fastbn against NumPy."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import __main__ as cli
from fastbn import _kernels, baseline, config, threads


@pytest.fixture(autouse=True)
def default_threads():
    fastbn.set_num_threads(None)
    yield
    fastbn.set_num_threads(None)


def python(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "FASTBN_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=inherited | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


# show_config


def test_show_config_as_dicts():
    fastbn.empty_output_cache()
    y = fastbn.FrozenBatchNorm(*np.ones((2, 4), np.float32))(np.ones((1, 4, 1 << 16), np.float32))
    size = y.nbytes
    assert fastbn.show_config("dicts")["output_memory"] == {"held": 0, "limit": 256 << 20}
    del y
    found = json.loads(json.dumps(fastbn.show_config(mode="dicts")))
    assert size <= found["output_memory"].pop("held") < 2 * size
    assert found == {
        "version": fastbn.__version__,
        "numpy": np.__version__,
        "isa": _kernels.get_isa(),
        "supported_isas": list(_kernels.supported_isas()),
        "openmp": _kernels.openmp and {"version": _kernels.openmp, "library": _kernels.openmp_library()},
        "threads": dict(zip(("count", "reason"), threads.explain_num_threads(), strict=True)),
        "sharing": {
            "wait_policy": threads.wait_policy(),
            **dict(zip(("shared", "alone", "lost"), _kernels.sharing(), strict=True)),
        },
        "caches": dict(zip(("L2", "last_level", "last_level_cpus"), _kernels.caches(), strict=True)),
        "output_memory": {"limit": 256 << 20},
    }
    fastbn.empty_output_cache()


def test_show_config_prints(capsys, monkeypatch):
    fastbn.empty_output_cache()
    monkeypatch.setattr(config, "explain_num_threads", lambda: (3, "CPU affinity"))
    monkeypatch.setattr(_kernels, "caches", lambda: (512 << 10, 6 << 20, 4))
    monkeypatch.setattr(_kernels, "openmp", 201511)
    monkeypatch.setattr(_kernels, "openmp_library", lambda: "/lib/libgomp.so.1")
    monkeypatch.setattr(_kernels, "sharing", lambda: (70, 8, 2))
    monkeypatch.setattr(config, "wait_policy", lambda: "patiently")
    assert fastbn.show_config() is None
    expected = f"""\
fastbn           {fastbn.__version__}, NumPy {np.__version__}
instruction set  {_kernels.get_isa()}, of {", ".join(_kernels.supported_isas())}
OpenMP           201511, /lib/libgomp.so.1
threads          3: CPU affinity
wait policy      patiently
calls            70 shared out, 2 of them late; 8 went alone instead
caches           L2 0.5 MiB, last level 6 MiB for 4 CPUs
output memory    0 MiB held for the next outputs, 256 MiB at most
"""
    assert capsys.readouterr().out == expected

    monkeypatch.setattr(_kernels, "openmp", None)
    monkeypatch.setattr(_kernels, "caches", lambda: (512 << 10, 6 << 20, 1))
    fastbn.show_config()
    expected = expected.replace("201511, /lib/libgomp.so.1", "none")
    expected = expected.replace("4 CPUs", "1 CPU")
    assert capsys.readouterr().out == expected


@pytest.mark.skipif(_kernels.openmp is None, reason="built without OpenMP")
def test_the_openmp_library_is_a_file_of_that_kind():
    assert os.path.exists(_kernels.openmp_library())
    assert "omp" in os.path.basename(_kernels.openmp_library())


def test_show_config_in_another_mode():
    with pytest.raises(ValueError, match=r'mode must be "stdout" or "dicts", got \'yaml\''):
        fastbn.show_config("yaml")


# python -m fastbn


def test_info():
    done = python("-m", "fastbn", "info", FASTBN_NUM_THREADS="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"fastbn           {fastbn.__version__}, NumPy")
    assert json.loads(python("-m", "fastbn", "info", "--json").stdout)["isa"] in _kernels.supported_isas()


@pytest.mark.parametrize("value", ["abc", "0", "1025", "-1", "2.5"])
def test_a_senseless_number_of_threads_is_told_at_import(value):
    done = python("-c", "import fastbn", FASTBN_NUM_THREADS=value)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the environment variable FASTBN_NUM_THREADS must be a whole number")
    assert repr(value) in last
    assert "During handling" not in done.stderr
    assert python("-c", "import fastbn", FASTBN_NUM_THREADS=" ").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--shape", "32"], "two or more lengths of at least 1, such as 32x64x56x56, got '32'"),
        (["bench", "--shape", "8x0x2"], "got '8x0x2'"),
        (["bench", "--shape", "8x-1"], "got '8x-1'"),
        (["bench", "--threads", "0"], "expected a number from 1 to 1024, got '0'"),
        (["bench", "--threads", "1", "1025"], "got '1025'"),
        (["bench", "--threads", "two"], "got 'two'"),
        (["bench", "--seconds", "-1"], "expected a finite number of at least 0, got '-1'"),
        (["bench", "--seconds", "nan"], "got 'nan'"),
        (["bench", "--seconds", "inf"], "got 'inf'"),
        (["bench", "--seconds", "long"], "got 'long'"),
        ([], "required: command"),
    ],
)
def test_senseless_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


QUICK = ["bench", "--seconds", "0", "--shape", "2x3x4x5", "1x6"]


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(cli, "PAUSE", 0)
    monkeypatch.setattr(cli, "SAMPLE", 1e-4)


def test_bench_as_json(capsys, no_pause):
    cli.main([*QUICK, "--threads", "1", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["version"] == fastbn.__version__
    rows = [(row["shape"], row["operation"]) for row in found["results"]]
    of_first = [([2, 3, 4, 5], operation) for operation in ("inference+relu", "training", "backward")]
    assert rows == [*of_first, ([1, 6], "inference+relu")]  # one value per channel cannot be trained on
    for row in found["results"]:
        assert [entry["threads"] for entry in row["fastbn"]] == [1, 3]
        for entry in row["fastbn"]:
            assert math.isclose(entry["speedup"], row["numpy_us"] / entry["us"], rel_tol=0.01)


def test_bench_as_a_table(capsys, no_pause):
    pytest.importorskip("rich")
    fastbn.set_num_threads(2)
    cli.main(QUICK)
    printed = capsys.readouterr().out
    headings = "NumPy", "fastbn, 1 thread", "fastbn, 2 threads" if _kernels.openmp else ""
    for part in (*headings, "2x3x4x5", "1x6", "backward", "geometric mean"):
        assert part in printed


def test_bench_without_rich(monkeypatch, capsys, no_pause):
    """The same table with NumPy alone."""
    for module in [name for name in sys.modules if name.split(".")[0] == "rich"] + ["rich"]:
        monkeypatch.setitem(sys.modules, module, None)
    cli.main([*QUICK, "--threads", "1", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Batch norm: microseconds")
    assert lines[1].split()[-6:] == ["fastbn,", "1", "thread", "fastbn,", "3", "threads"]
    names = [line.split()[:2] for line in lines[2:6]]
    assert names == [["2x3x4x5", name] for name in ("inference+relu", "training", "backward")] + [
        ["1x6", "inference+relu"]
    ]
    assert lines[6].startswith("geometric mean")
    assert lines[7].startswith(f"fastbn {fastbn.__version__}")


@pytest.fixture
def fake_times(monkeypatch):
    """Let the bench measure 1 ms of NumPy, and of fastbn what is given, by turns, in ms."""

    def give(*turns):
        turns = iter(turns)
        monkeypatch.setattr(cli, "_medians", lambda calls, seconds: [1e-3, *(1e-3 * t for t in next(turns))])

    return give


BENCHES = ["rich", "plain", "json"]


def bench(how, monkeypatch, capsys, *options):
    """What is printed by each way of printing, on one line."""
    if how == "rich":
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich", None)
    cli.main([*QUICK, *options, *(["--json"] if how == "json" else [])])
    printed = capsys.readouterr().out
    return json.loads(printed) if how == "json" else " ".join(printed.split())


@pytest.mark.parametrize("how", BENCHES)
def test_bench_says_when_threads_wait_for_each_other(how, monkeypatch, capsys, fake_times):
    fake_times((0.1, 0.2, 0.05), (0.1, 0.05, 40.0), (0.1, 0.1, 0.14), (0.1, 0.15, 0.1))
    printed = bench(how, monkeypatch, capsys, "--threads", "1", "2", "4")
    note = printed["note"] if how == "json" else printed[printed.index("In 2 of 4 rows") :]
    assert note.startswith("In 2 of 4 rows several threads took more than 1.5 times as long as one: ")
    assert "threads waited for each other, because other work has the CPUs" in note
    assert note.endswith('See "A busy machine" in docs/deployment.md.')
    page = Path(__file__).parents[1] / "docs" / "deployment.md"
    assert "\n## A busy machine\n" in page.read_text()


@pytest.mark.parametrize("how", BENCHES)
@pytest.mark.parametrize("counts", ["1 2", "2 4", "1"])
def test_bench_says_nothing_where_they_do_not(how, counts, monkeypatch, capsys, fake_times):
    times = {"1 2": (0.1, 0.149), "2 4": (0.1, 0.9), "1": (0.1,)}[counts]
    fake_times(*[times] * 4)
    printed = bench(how, monkeypatch, capsys, "--threads", *counts.split())
    assert printed["note"] is None if how == "json" else "busy" not in printed


@pytest.mark.parametrize("how", BENCHES)
def test_small_speedups_are_not_printed_as_0(how, monkeypatch, capsys, fake_times):
    fake_times((0.4, 1.0), (0.5, 2.3), (0.6, 23.0), (0.7, 4e4))
    printed = bench(how, monkeypatch, capsys, "--threads", "1", "2")
    if how == "json":
        found = [row["fastbn"][1]["speedup"] for row in printed["results"]]
        assert found == pytest.approx([1, 1 / 2.3, 1 / 23, 1 / 4e4], rel=1e-3)
    else:
        for text in "400.0 2.5", "1,000.0 1.0", "2,300.0 0.43", "23,000.0 0.043", "40,000,000.0 2.5e-05":
            assert text in printed
        assert " 0.0 " not in printed
        assert "0.026" in printed  # their geometric mean


@pytest.mark.parametrize("shape", ["100000x100000x100", "99999999999x99999999999x9"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_bench_of_too_large_a_shape(shape, options):
    done = python("-m", "fastbn", "bench", "--shape", shape, *options)
    assert done.returncode == 1
    assert done.stderr.startswith(f"python -m fastbn bench: --shape {shape} takes ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_bench_out_of_memory(monkeypatch):
    def fail(shape):
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(cli, "_Problem", fail)
    with pytest.raises(SystemExit, match="python -m fastbn bench: Unable to allocate"):
        cli.main([*QUICK, "--json"])


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["bench", "--seconds", "0"]])
def test_a_closed_pipe(arguments):
    if arguments[0] == "bench":
        arguments = [*arguments, "--shape", "1x6"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "fastbn", *arguments],
            stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (1, "")  # rich ends its line


def test_an_interrupt(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_bench", interrupt)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench"])
    assert stop.value.code == 130


def test_version(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastbn {fastbn.__version__}\n"


def test_the_command_by_its_name(capsys, monkeypatch):
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.scripts]\nfastbn = "fastbn.__main__:main"\n' in project
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fastbn", "bench", "--seconds", "-1"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "\nfastbn bench: error: argument --seconds" in capsys.readouterr().err


def test_bench_with_disagreeing_results(monkeypatch, no_pause):
    right = baseline.training_forward

    def wrong(x, *args, out, **how):
        right(x, *args, out=out, **how)
        out[-1, -1] += 0.01

    monkeypatch.setattr(baseline, "training_forward", wrong)
    with pytest.raises(AssertionError, match=r"training of \(2, 3, 4, 5\): fastbn and NumPy"):
        cli.main([*QUICK, "--json"])


def test_calls_take_turns_and_warm_up(monkeypatch):
    """The clock advances by what the calls say they take; sleeping takes none."""
    now, made = 0.0, []

    def call(name, seconds):
        def made_call():
            nonlocal now
            now += seconds.pop(0) if isinstance(seconds, list) else seconds
            made.append(name)

        return made_call

    monkeypatch.setattr(cli.time, "perf_counter", lambda: now)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: made.append("pause"))
    monkeypatch.setattr(cli, "SAMPLE", 2.0)
    # of a: the first call, and three times a call that warms up and the one that counts
    a = [2.0, 9.0, 3.0, 9.0, 5.0, 9.0, 1.0]
    assert cli._medians([call("a", a), call("b", 1.0)], 0) == [3.0, 1.0]
    turn = ["pause", "a", "a", "pause", "b", "b", "b", "b"]
    assert made == ["a", "b", *turn, *turn, *turn]
