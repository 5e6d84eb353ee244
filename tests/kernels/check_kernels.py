"""Every loop of the kernels, by plan and schedule, without Python: right, and clean under sanitizers.

`make test-kernels` runs this. It also prints how much of the C the problems reach, by gcov.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from problems import DRIVER, ROOT, Job, assert_same, groups, objects_in, results_of, run  # noqa: E402

from fastbn import _kernels  # noqa: E402

ISAS = _kernels.supported_isas()
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"


def build(folder, flags):
    """The driver, with objects built by setup.py's flags and these."""
    cross = {"CC": "gcc", "CFLAGS": flags, "LDFLAGS": flags}
    run(sys.executable, "setup.py", "--quiet", "build_ext", "--debug", "-t", folder, "-b", folder, **cross)
    strict = ["-O1", "-g", "-std=c11", "-Wall", "-Wextra", "-Werror", "-Isrc_c", *flags.split()]
    run("gcc", *strict, DRIVER, *objects_in(folder), "-lm", "-lpthread", "-o", folder / "driver")
    return folder / "driver"


@pytest.fixture(scope="module")
def sanitized():
    return build(ROOT / "build/kernels-sanitized", SANITIZERS)


@pytest.mark.parametrize("group", groups())
def test_right_and_clean(sanitized, tmp_path, group):
    cases = list(enumerate(groups()[group]))
    jobs = [Job(case, seed) for seed, case in cases[:: 1 if len(cases) < 200 else 4]]
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


def test_how_much_is_reached(tmp_path, capsys):
    """By gcov: all of plan.c and schedule.c, and nearly all of the kernels."""
    folder = ROOT / "build/kernels-coverage"
    shutil.rmtree(folder, ignore_errors=True)
    driver = build(folder, "--coverage")
    for group, cases in groups().items():
        jobs = [Job(case, seed) for seed, case in enumerate(cases)][::3]
        for isa in ISAS:
            where = tmp_path / f"{group}{isa}".replace(" ", "").replace(",", "")
            where.mkdir()
            for _ in results_of([driver, isa], jobs, where):
                pass
    reached = {}
    for file in folder.rglob("*.gcda"):
        done = run("gcov", "--no-output", "--object-directory", file.parent, file, LC_ALL="C")
        for file, share, lines in re.findall(
            r"File '(?:.*/)?src_c/(\S+)'\nLines executed:([\d.]+)% of (\d+)", done.stdout
        ):
            reached.setdefault(file, []).append((float(share), int(lines)))
    with capsys.disabled():
        for file, shares in sorted(reached.items()):
            print(f"\n{max(shares)[0]:6.1f} % of {max(shares)[1]:4} lines of {file}", end="")
    assert max(reached["plan.c"])[0] > 90
    assert max(reached["schedule.c"])[0] > 99
    kernels = [max(shares) for file, shares in reached.items() if file.startswith("kernels/")]
    assert sum(share * lines for share, lines in kernels) / sum(lines for _, lines in kernels) > 95


if "ASAN_OPTIONS" not in os.environ:
    os.environ["ASAN_OPTIONS"] = "detect_leaks=0"
