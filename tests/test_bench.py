"""The bench against peers: what is wrong is not timed, what chain rows read, what the summaries say."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
BENCH = Path(__file__).resolve().parents[1] / "bench"
if not BENCH.exists():
    pytest.skip("the tests were copied without bench/", allow_module_level=True)
if not sys.platform.startswith("linux"):
    pytest.skip("the bench looks at its threads in /proc", allow_module_level=True)


@pytest.fixture(scope="module")
def bench():
    """The modules of the bench, which find each other as its programs do."""
    sys.path.insert(0, str(BENCH))
    try:
        import busy
        import compare
        import pages
        import peers
        import report
        import tasks
    finally:
        sys.path.remove(str(BENCH))
    return {
        "busy": busy, "compare": compare, "pages": pages, "peers": peers, "report": report, "tasks": tasks
    }  # fmt: skip


@pytest.fixture
def tasks(bench):
    return bench["tasks"]


@pytest.fixture
def compare(bench):
    return bench["compare"]


@pytest.fixture
def report(bench):
    return bench["report"]


class Fixed:
    """A contestant that offers what it is given."""

    name, checked = "Fixed", True

    def __init__(self, make):
        self.make = make

    def candidates(self, task, layout):
        yield self.make(task)


def normalized(d, x):
    spread = [np.reshape(v, d.per_channel) for v in (d.running_mean, d.running_var, d.weight, d.bias)]
    mean, var, weight, bias = spread
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def test_contestants_of_every_installation_agree(bench, tasks, compare):
    """fastbn and NumPy against the oracle, in every operation and layout."""
    for shape in (3, 5, 2, 7), (6, 4), (2, 3, 4):
        oracles = {}
        for layout in tasks.user_layouts(shape):
            for op in tasks.OPS + tasks.MORE_OPS:
                task = tasks.Task(op, tasks.Data(shape, layout), True)
                oracle = oracles.setdefault(op, compare.Oracle(task))
                for kind in (bench["peers"].FastBN, bench["peers"].NumPy):
                    for candidate in kind(1).candidates(task, layout):
                        result = candidate.result(candidate.call())
                        assert oracle.disagreement(result, task.data.axis) is None, (kind.name, op, layout)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_data_of_a_dtype(tasks, dtype):
    data = tasks.Data((4, 3, 5), tasks.NHWC, dtype)
    assert {a.dtype for a in data.arrays} == {np.dtype(dtype)}
    assert {v.dtype for v in data.vectors} == {np.dtype("float64" if dtype == "float64" else "float32")}
    copy = tasks.Data((4, 3, 5), tasks.NCHW, dtype, like=data)
    np.testing.assert_array_equal(np.moveaxis(copy.x, 1, -1), data.x)
    assert not np.shares_memory(copy.x, data.x)


def test_a_wrong_result_is_not_timed(tasks, compare):
    task = tasks.Task("inference", tasks.Data((3, 5, 2, 7), tasks.NCHW), True)
    wrong = normalized(task.data, task.data.x)
    wrong[:, 2] += 0.5
    heard = []
    oracle = compare.Oracle(task)
    contestant = Fixed(lambda task: tasks.Candidate("so", lambda: wrong, lambda y: (y,)))
    assert compare.fastest(contestant, task, tasks.NCHW, oracle, heard.append) is None
    assert heard == ["Fixed (so), NCHW: 20.0% of its result 1 is wrong; not timed"]
    wrong[:, 2] -= 0.5
    assert compare.fastest(contestant, task, tasks.NCHW, oracle, heard.append).candidate.how == "so"


def test_a_contestant_that_raises_is_told(tasks, compare):
    def call():
        raise TypeError("x: dtype bfloat16, expected float32\nmore")

    task = tasks.Task("inference", tasks.Data((3, 5, 2, 7), tasks.NCHW), True)
    heard = []
    contestant = Fixed(lambda task: tasks.Candidate("so", call, lambda y: (y,)))
    assert compare.fastest(contestant, task, tasks.NCHW, None, heard.append) is None
    assert heard == ["Fixed (so), NCHW: x: dtype bfloat16, expected float32; not timed"]


@pytest.mark.parametrize("copies", [False, True])
def test_chain_rows_write_what_the_call_reads(tasks, compare, copies):
    """A contestant that copied its input before would be timed without reading what was written."""

    def make(task):
        x = task.data.x.copy() if copies else task.data.x
        return tasks.Candidate("so", lambda: normalized(task.data, x), lambda y: (y,))

    first = tasks.Data((3, 5, 2, 7), tasks.NCHW)
    sets = [
        tasks.Task("inference", d, True)
        for d in (first, *(tasks.Data((3, 5, 2, 7), tasks.NCHW, like=first),) * 2)
    ]
    heard = []
    entry = compare.fastest_in_chain(Fixed(make), sets, tasks.NCHW, compare.Oracle(sets[0]), heard.append)
    assert (entry is None) is copies
    assert bool(heard) is copies
    if entry:
        entry.take_turn()
        assert entry.samples[-1] > 0


def entry(contestant, layout, microseconds, **beside):
    quantiles = dict.fromkeys(("min", "q25", "median", "q75", "max"), microseconds)
    found = {"contestant": contestant, "layout": layout, "microseconds": quantiles}
    return found | ({"beside": beside} if beside else {})


def results(report, threads=2):
    """A row in which A was timed beside a fastbn of 10 and 20 us, and B beside one of 30."""
    entries = [
        entry("A", "NCHW", 20, **{"NCHW": 10, "channels-last": 20}),
        entry("A", "channels-last", 19, **{"NCHW": 10, "channels-last": 20}),
        entry("B", "NCHW", 45, NCHW=30),
        entry("B", "blocked", 27, NCHW=30),
        entry("memory limit", "NCHW", 5, NCHW=10),
        entry("fastbn", "NCHW", 10),
        entry("fastbn", "channels-last", 20),
    ]
    row = {"shape": [1, 256, 56, 56], "op": "training", "entries": entries, "interference": {}}
    return {
        "settings": {
            "command": "compare.py", "threads": threads, "dtype": "float32", "chain": False, "isa": None,
            "calls": "outputs preallocated", "date": "2026-01-01",
        },
        "machine": {"Model name": "CPU", "platform": "Linux"},
        "versions": {"A": "1"},
        "rows": [row],
        "notes": ["B (x): wrong"],
        "seconds": 1,
    }  # fmt: skip


def read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_summaries(report, tmp_path):
    report.write_csv(results(report), tmp_path)
    headings, *lines = read(tmp_path / "summary.csv")
    assert headings == ["threads", "operation", "layout", "peer", "ratio", "rows", "behind"]
    assert sorted(lines) == [
        ["2", "training", "NCHW", "A", "2.000", "1", "0"],
        ["2", "training", "NCHW", "B", "1.500", "1", "0"],
        ["2", "training", "NCHW", "best", "1.500", "1", "0"],
        ["2", "training", "blocked", "B", "0.900", "1", "1"],
        ["2", "training", "channels-last", "A", "0.950", "1", "1"],
        ["2", "training", "channels-last", "best", "0.950", "1", "1"],
    ]
    assert ["2", "note", "B (x): wrong"] in read(tmp_path / "about.csv")
    found = report.summary(results(report))
    assert [b["row"] for b in found["behind"]] == [
        "1x256x56x56 NCHW training",
        "1x256x56x56 channels-last training",
    ]


def test_summaries_keep_other_numbers_of_threads(report, tmp_path):
    report.write_csv(results(report, threads=2), tmp_path)
    before = read(tmp_path / "summary.csv")
    report.write_csv(results(report, threads=1), tmp_path)
    report.write_csv(results(report, threads=2), tmp_path)
    after = read(tmp_path / "summary.csv")
    assert [line for line in after if line[0] != "1"] == before
    assert len(after) == 2 * len(before) - 1


def test_chain_rows_and_dtypes_have_summaries_of_their_own(report, tmp_path):
    found = results(report)
    found["settings"] |= {"dtype": "bfloat16", "chain": True}
    report.write_csv(found, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "about-bfloat16-chain.csv",
        "summary-bfloat16-chain.csv",
    }


def test_pictures_of_the_figures_that_are_there(bench, report, tmp_path, monkeypatch):
    """The chart of any run; of a busy machine and of networks where their programs have left figures."""
    pytest.importorskip("matplotlib")
    pages = bench["pages"]
    monkeypatch.setattr(sys, "argv", ["pages.py", str(tmp_path)])
    report.write_csv(results(report), tmp_path)
    pages.main()
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md", ".png"}
    assert not (tmp_path / "busy.png").exists()

    contestants = {name: [10.4, 20, 30] for name in ("default", "one thread", "passive", "always shared")}
    rows = [
        {"shape": [2, 3], "operation": operation, "busy": others, "pause": pause} | contestants
        for operation in bench["busy"].OPERATIONS
        for others in (0, 2)
        for pause in (0, 0.01)
    ]
    bench["busy"].write_csv(tmp_path / "busy.csv", rows, contestants)
    (tmp_path / "networks.csv").write_text(
        "cpu,threads,batch,size,network,layout,precision,mode,plain,accelerated,ratio\n"
        "AMD EPYC 9,2,8,112,resnet18,NCHW,float32,training,120.0,100.0,1.200\n"
        "AMD EPYC 9,2,8,112,resnet18,NCHW,float32,evaluation,50.0,100.0,0.500\n"
    )
    pages.main()
    table = (tmp_path / "busy.md").read_text().replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert table[0] == "| operation | busy | every | fastbn | one thread | always shared out |"
    assert table[-1] == "| backward | 2 | 10 ms | 10 / 20 / 30 | 10 / 20 / 30 | 10 / 20 / 30 |"
    assert len(table) == 2 + len(rows)
    for picture in "busy", "networks":
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_the_program(tmp_path):
    command = [sys.executable, BENCH / "compare.py", "--quick", "--threads", "1", "--contestants", "numpy"]
    command += [
        "--shapes",
        "2x3x4x5",
        "--ops",
        "training",
        "--csv",
        tmp_path,
        "--json",
        tmp_path / "rows.json",
    ]
    root = str(BENCH.parent)
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [line[:4] for line in read(tmp_path / "summary.csv")[1:]] == [
        ["1", "training", layout, peer] for layout in ("NCHW", "channels-last") for peer in ("NumPy", "best")
    ]
