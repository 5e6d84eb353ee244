"""The kernels on other CPUs, emulated, and those of portable.h on this one: their bits, and right by the oracle.

`make test-arm` and `make test-portable` run this, and install what it needs. setup.py compiles the kernels, with the
flags it has; driver.c runs them without Python.
"""

import platform
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from problems import DRIVER, PARTS, ROOT, Job, assert_same, groups, results_of, run

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="x86-64 only: what is compared with are its kernels"
)

NATIVE = ROOT / "build/objects" / sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]


class Target(NamedTuple):
    compiler: str
    platform: str
    emulator: str  # "": none is needed
    isas: dict  # of its own: which of x86-64 has the same bits
    one_of: int = 1  # so many problems
    order: str = "<"
    long: int = 8  # bytes
    flags: str = ""


# Of CPUs with a fused multiply-add those of AVX2; of others, which round twice, those of SSE2. Without NEON of their own
# all are slow to emulate, and one of a few byte orders and widths is as good as another.
FUSED, TWICE = {"baseline": "avx2"}, {"baseline": "baseline"}
TARGETS = {
    "aarch64": Target("aarch64-linux-gnu-gcc", "linux-aarch64", "qemu-aarch64", FUSED),
    "armhf": Target("arm-linux-gnueabihf-gcc", "linux-armv7l", "qemu-arm", TWICE, 8, long=4),
    "riscv64": Target("riscv64-linux-gnu-gcc", "linux-riscv64", "qemu-riscv64", FUSED, 8),
    "s390x": Target("s390x-linux-gnu-gcc", "linux-s390x", "qemu-s390x", FUSED, 8, ">"),
    "ppc64le": Target("powerpc64le-linux-gnu-gcc", "linux-ppc64le", "qemu-ppc64le", FUSED, 8),
    "portable": Target(
        "gcc", "linux-x86_64", "", {"baseline": "baseline", "avx2": "avx2"}, 2, flags="-DFASTBN_PORTABLE"
    ),
}


def headers_of(target, folder):
    """Python's for another CPU: this machine's, with the sizes that differ. Debian's pyconfig.h includes the CPU's own."""
    config = Path(sysconfig.get_config_h_filename())
    native = config.parents[1] / str(sysconfig.get_config_var("MULTIARCH")) / config.parent.name / config.name
    sizes = "".join(
        f"#undef SIZEOF_{name}\n#define SIZEOF_{name} {target.long}\n"
        for name in ("LONG", "SIZE_T", "TIME_T", "UINTPTR_T", "VOID_P")
    )
    places = {folder / "include" / target.compiler.removesuffix("-gcc") / config.parent.name: native}
    if not native.exists():
        places = {folder / "include": config}
    for place, included in places.items():
        place.mkdir(parents=True, exist_ok=True)
        (place / config.name).write_text(f'#include "{included}"\n{sizes}')
    return folder / "include"


def build(name, target):
    """All of fastbn's C, compiled as for any other machine; a warning is an error."""
    folder = ROOT / "build/emulated" / name
    relative = folder.relative_to(ROOT)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "-t", relative, "-b", relative]
    flags = f"-Werror {target.flags}"
    if target.emulator:
        flags += f" -I{headers_of(target, folder)}"
    cross = {"CC": target.compiler, "CFLAGS": flags, "_PYTHON_HOST_PLATFORM": target.platform}
    run(*command, **cross, FASTBN_BUILD_ISAS="avx2" if name == "portable" else "")
    return folder
