"""The kernels on AArch64, emulated: the same bits as with AVX2 on the same problems, and right by the oracle.

`make test-arm` runs this, and installs what it needs. setup.py compiles the kernels, with the flags it has;
driver.c runs them without Python.
"""

import platform
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from problems import DRIVER, ROOT, Job, assert_same, groups, objects_in, results_of, run

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="x86-64 only: what is compared with is AVX2"
)

TAG = sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]
ARM, NATIVE = ROOT / "build/aarch64", ROOT / "build/objects" / TAG


@pytest.fixture(scope="module")
def arm_build():
    """All of fastbn's C compiled for AArch64 as for any other machine; a warning is an error."""
    folder = ARM.relative_to(ROOT)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "-t", folder, "-b", folder]
    # Debian's pyconfig.h includes the target's own; this machine's has the same types
    config = Path(sysconfig.get_config_h_filename())
    native = config.parents[1] / str(sysconfig.get_config_var("MULTIARCH")) / config.parent.name / config.name
    if native.exists():
        stand_in = ARM / "include/aarch64-linux-gnu" / config.parent.name / config.name
        stand_in.parent.mkdir(parents=True, exist_ok=True)
        stand_in.write_text(f'#include "{native}"\n')
    flags = f"-Werror -I{ARM / 'include'}"
    cross = {"CC": "aarch64-linux-gnu-gcc", "CFLAGS": flags, "_PYTHON_HOST_PLATFORM": "linux-aarch64"}
    run(*build, **cross)
    return ARM


@pytest.fixture(scope="module")
def drivers(arm_build):
    """How to run the driver on each machine."""
    strict = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror"]
    for compiler, build, *link in (("aarch64-linux-gnu-gcc", ARM, "-static"), ("cc", NATIVE)):
        linked = [*strict, *link, "-Isrc_c", DRIVER, *objects_in(build), "-lm", "-lpthread"]
        run(compiler, *linked, "-o", build / "driver")
    return {"arm": ["qemu-aarch64", ARM / "driver", "baseline"], "avx2": [NATIVE / "driver", "avx2"]}


@pytest.mark.parametrize("group", groups())
def test_same_bits_as_avx2_and_right(drivers, tmp_path, group):
    jobs = [Job(case, seed) for seed, case in enumerate(groups()[group])]
    for name in drivers:
        (tmp_path / name).mkdir()
    arm, avx2 = (results_of(drivers[name], jobs, tmp_path / name) for name in ("arm", "avx2"))
    for job, ours, theirs in zip(jobs, arm, avx2, strict=True):
        try:
            assert_same(ours, theirs)
            job.check(ours)
        except AssertionError:
            print(job.case)
            raise
