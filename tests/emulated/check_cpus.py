"""The kernels on other CPUs, emulated, and portable.h's on this one: the bits, and right by the oracle.

`make test-arm` runs this for AArch64, `make test-portable` for the others; they install what it needs.
setup.py compiles the kernels, with the flags it has; driver.c runs them without Python.
"""

import platform
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from problems import DRIVER, ROOT, assert_same, groups, jobs_of, objects_in, results_of, run

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="x86-64 only: what is compared with are its kernels"
)

VOCABULARY = DRIVER.with_name("vocabulary.c")
NATIVE = ROOT / "build/objects" / sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]


class Target(NamedTuple):
    compiler: str
    platform: str
    emulator: str
    same_as: dict  # its instruction sets: those of x86-64 with the same bits
    one_of: int = 1  # so many problems
    order: str = "<"
    long: int = 8  # bytes
    flags: str = ""


# A CPU with a fused multiply-add has the bits of AVX2, one that rounds twice those of SSE2.
FUSED, TWICE = {"baseline": "avx2"}, {"baseline": "baseline"}
TARGETS = {
    "aarch64": Target("aarch64-linux-gnu-gcc", "linux-aarch64", "qemu-aarch64", FUSED),
    "armhf": Target("arm-linux-gnueabihf-gcc", "linux-armv7l", "qemu-arm", TWICE, 4, long=4),
    "riscv64": Target("riscv64-linux-gnu-gcc", "linux-riscv64", "qemu-riscv64", FUSED, 8),
    "s390x": Target("s390x-linux-gnu-gcc", "linux-s390x", "qemu-s390x", FUSED, 4, order=">"),
    "ppc64le": Target("powerpc64le-linux-gnu-gcc", "linux-ppc64le", "qemu-ppc64le", FUSED, 8),
    "x86-64": Target("gcc", "linux-x86_64", "", TWICE | {"avx2": "avx2"}, 4, flags="-DFASTBN_PORTABLE"),
}


def sizes_of(target, folder):
    """Flags for a header before all others: Python's configuration with the sizes that differ on that CPU."""
    config = Path(sysconfig.get_config_h_filename())
    native = config.parents[1] / str(sysconfig.get_config_var("MULTIARCH")) / config.parent.name / config.name
    text = f'#include "{native if native.exists() else config}"\n#undef _GNU_SOURCE\n#define _GNU_SOURCE\n'
    for name in ("LONG", "SIZE_T", "TIME_T", "UINTPTR_T", "VOID_P"):
        text += f"#undef SIZEOF_{name}\n#define SIZEOF_{name} {target.long}\n"
    # Debian's pyconfig.h includes that of the CPU, from a folder of the CPU's name
    stand_in = folder / target.compiler.removesuffix("-gcc") / config.parent.name / config.name
    stand_in.parent.mkdir(parents=True, exist_ok=True)
    stand_in.write_text(text)
    return f"-I{folder} -include {stand_in}"


SETUP_WITHOUT_CYTHON = """
import sys
import setuptools
from distutils.core import run_setup

setup = run_setup("setup.py", sys.argv[1:], stop_after="commandline")
setup.ext_modules[0].sources = []
setup.run_commands()
"""


def driver_of(folder, compiler, *link):
    strict = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", *link, "-Isrc_c"]
    run(compiler, *strict, DRIVER, *objects_in(folder), "-lm", "-lpthread", "-o", folder / "driver")
    return folder / "driver"


@cache
def native_driver():
    return driver_of(NATIVE, "cc")


@cache
def driver_for(name):
    """The C of fastbn compiled as for any other machine, and the driver; a warning is an error."""
    target, folder = TARGETS[name], Path("build/emulated", name)
    # -O1, because single numbers in place of vectors take -O3 minutes
    quick = [] if name == "aarch64" else ["--debug"]
    flags, isas = f"-Werror {target.flags}", " ".join(target.same_as)
    if target.emulator:
        flags += f" {sizes_of(target, ROOT / folder / 'include')}"
    run(
        sys.executable, "-c", SETUP_WITHOUT_CYTHON,
        "--quiet", "build_ext", "-t", folder, "-b", folder, *quick,
        CC=target.compiler, CFLAGS=flags, _PYTHON_HOST_PLATFORM=target.platform, FASTBN_BUILD_ISAS=isas,
    )  # fmt: skip
    return driver_of(ROOT / folder, target.compiler, "-static")


@pytest.mark.parametrize("group", groups())
@pytest.mark.parametrize("name", TARGETS)
def test_same_bits_as_here_and_right(tmp_path, name, group):
    target = TARGETS[name]
    jobs = jobs_of(group, target.one_of)
    emulator = [target.emulator] if target.emulator else []
    for isa, same in target.same_as.items():
        ours = results_of([*emulator, driver_for(name), isa], jobs, tmp_path, target.order)
        theirs = results_of([native_driver(), same], jobs, tmp_path)
        for job, there, here in zip(jobs, list(ours), theirs, strict=True):
            try:
                assert_same(there, here)
                job.check(there)
            except AssertionError:
                print(job.case)
                raise


# ---- the words of simd.h, one by one, of all elements

COUNT = 1 << 16  # as in vocabulary.c
ELEMENTS = {"f32": np.float32, "f64": np.float64, "f16": np.float16, "bf16": np.uint16}
HERE = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "baseline": []}


def vocabulary(element, compiler, flags, start, order, values, folder):
    """What the words make of the values, as bits; those of a NaN, which are the CPU's own, are all ones."""
    strict = ["-std=gnu11", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Isrc_c", "-static"]
    element_file = f'-DFASTBN_ELEMENT_FILE="elements/{element}.h"'
    run(compiler, *strict, *flags, element_file, VOCABULARY, "-lm", "-o", folder / "vocabulary")
    values.astype(values.dtype.newbyteorder(order)).tofile(folder / "values")
    run(*start, folder / "vocabulary", folder / "values", folder / "results")
    bits = np.fromfile(folder / "results", values.dtype.newbyteorder(order)).astype(values.dtype)
    if element == "bf16":
        bits[bits & 0x7FFF > 0x7F80] = 0xFFFF
        return bits
    results = bits.view(ELEMENTS[element])
    bits[np.isnan(results)] = np.iinfo(bits.dtype).max
    return bits


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("name", TARGETS)
def test_words(tmp_path, name, element):
    target, size = TARGETS[name], np.dtype(ELEMENTS[element]).itemsize
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1 << 8 * size, 3 * COUNT, np.dtype(f"u{size}"), endpoint=False)
    if size == 2:
        values[:COUNT] = np.arange(COUNT)  # all there are
    else:  # half of them of a size that does not overflow, and what is special
        values[::2] = rng.standard_normal(values[::2].size).astype(ELEMENTS[element]).view(values.dtype)
        special = [0.0, 1.0, 6.0, np.finfo(ELEMENTS[element]).smallest_subnormal, np.inf, np.nan]
        special = np.array(special + [-v for v in special], ELEMENTS[element]).view(values.dtype)
        values[rng.integers(0, values.size, 20000)] = rng.choice(special, 20000)
    emulator = [target.emulator] if target.emulator else []
    for isa, same in target.same_as.items():
        flags = [*target.flags.split(), *([] if target.emulator else HERE[isa])]
        there = vocabulary(element, target.compiler, flags, emulator, target.order, values, tmp_path)
        here = vocabulary(element, "cc", HERE[same], [], "=", values, tmp_path)
        assert there.size == here.size
        words = sorted({int(i) // COUNT for i in np.flatnonzero(there != here)})
        assert not words, f"with {isa} these words of vocabulary.c differ, counted from 0: {words}"
