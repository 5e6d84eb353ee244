"""Every loop of the kernels, by plan and schedule, without Python: right, and clean under sanitizers.

`make test-kernels` runs this. It also prints how much of the C the problems reach, by gcov.
"""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from problems import DRIVER, ROOT, assert_same, groups, jobs_of, objects_in, results_of, run  # noqa: E402

from fastbn import _kernels  # noqa: E402

ISAS = _kernels.supported_isas()
# Without what AddressSanitizer finds as well: inlined as the kernels are, that takes an hour to compile.
SANITIZERS = (
    "-fsanitize=address,undefined -fno-sanitize=null,alignment,object-size,pointer-overflow "
    "-fno-sanitize-recover=all -fno-omit-frame-pointer"
)


def build(folder, flags):
    """The driver, with objects built by setup.py's flags and these."""
    flagged = {"CC": "gcc", "CFLAGS": flags, "LDFLAGS": flags}
    run(sys.executable, "setup.py", "--quiet", "build_ext", "--debug", "-t", folder, "-b", folder, **flagged)
    strict = ["-O1", "-g", "-std=c11", "-Wall", "-Wextra", "-Werror", "-Isrc_c", *flags.split()]
    run("gcc", *strict, DRIVER, *objects_in(folder), "-lm", "-lpthread", "-o", folder / "driver")
    return folder / "driver"


@pytest.fixture(scope="module")
def sanitized():
    return build(ROOT / "build/kernels-sanitized", SANITIZERS)


@pytest.mark.parametrize("group", groups())
def test_right_and_clean(sanitized, tmp_path, monkeypatch, group):
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0")
    jobs = jobs_of(group)
    found = {}
    for isa in ISAS:
        (tmp_path / isa).mkdir()
        found[isa] = results_of([sanitized, isa], jobs, tmp_path / isa)
    for job, *results in zip(jobs, *found.values(), strict=True):
        try:
            for result in results:
                job.check(result)
            for result in results[2:]:
                assert_same(result, results[1])  # those with a fused multiply-add
        except AssertionError:
            print(job.case)
            raise


class Reached(NamedTuple):
    """How often the lines of a file ran, and the ways out of its branches, by line."""

    lines: Counter
    branches: dict

    def share(self):
        return sum(n > 0 for n in self.lines.values()) / len(self.lines)

    def missed(self):
        return sorted(line for line, n in self.lines.items() if n == 0)

    def one_sided(self):
        """The lines of branches of which a way out was never taken."""
        return sorted(line for line, ways in self.branches.items() if 0 in ways.values())


def reached_in(folder):
    """By file of src_c, all objects together: a line of a kernel is compiled for each instruction set."""
    files = {}
    for object_counts in folder.rglob("*.gcda"):
        command = ["gcov", "--branch-probabilities", "--json-format", "--stdout", object_counts]
        for file in json.loads(subprocess.check_output(command, cwd=ROOT))["files"]:
            where = file["file"].rpartition("src_c/")
            if not where[1]:
                continue
            reached = files.setdefault(where[2], Reached(Counter(), {}))
            for line in file["lines"]:
                number = line["line_number"]
                reached.lines[number] += line["count"]
                ways = reached.branches.setdefault(number, Counter())
                for i, way in enumerate(line["branches"]):
                    ways[i] += way["count"]
    return files


def test_how_much_is_reached(tmp_path, capsys):
    """By gcov: each branch of plan.c, all of schedule.c, nearly all of the kernels."""
    folder = ROOT / "build/kernels-coverage"
    shutil.rmtree(folder, ignore_errors=True)
    driver = build(folder, "--coverage")
    for group in groups():
        for isa in ISAS:
            where = tmp_path / f"{group}{isa}".replace(" ", "").replace(",", "")
            where.mkdir()
            for _ in results_of([driver, isa], jobs_of(group), where):
                pass
    # the same objects in the Python package: plans of other machines than the driver's, threads, kept memory
    shutil.copytree(ROOT / "fastbn", tmp_path / "fastbn", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    [extension] = (folder / "fastbn").glob("_kernels*.so")
    shutil.copy(extension, tmp_path / "fastbn")
    files = [f"tests/test_{name}.py" for name in ("plan", "extremes", "outputs", "threads", "busy", "fork")]
    run(sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files, cwd=tmp_path)
    files = reached_in(folder)
    with capsys.disabled():
        for name, reached in sorted(files.items()):
            rest = f", but {', '.join(map(str, reached.missed()))}" if reached.missed() else ""
            print(f"\n{reached.share():7.1%} of {len(reached.lines):4} lines of {name}{rest}", end="")
    assert not files["plan.c"].missed()
    assert not files["plan.c"].one_sided()
    assert not files["schedule.c"].missed()
    kernels = [reached for name, reached in files.items() if name.startswith("kernels/")]
    lines = sum(len(reached.lines) for reached in kernels)
    assert sum(reached.share() * len(reached.lines) for reached in kernels) > 0.95 * lines
