"""No two threads of the kernels reach the same memory, one of them writing, with nothing that orders them.

`make test-races` runs this, and installs what it needs. ThreadSanitizer looks at kernels that clang builds
for it, in an interpreter that is linked with it; LLVM's OpenMP tells it, by libarcher, what barriers and
regions order.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
RACE_FOUND = 66  # how ThreadSanitizer ends a process


def build(folder):
    """The extension, of the sources in `folder`."""
    environment = os.environ | {"CC": "clang", "CFLAGS": "-fsanitize=thread", "LDFLAGS": "-fsanitize=thread"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--debug"]
    subprocess.run(command, cwd=folder, env=environment, check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the sources, built, with an interpreter."""
    folder = tmp_path_factory.mktemp("races")
    for name in "fastbn", "src_c":
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "setup.py", folder)
    build(folder)
    of_python = sysconfig.get_config_var
    command = ["clang", "-fsanitize=thread", "-rdynamic", "-o", folder / "python", HERE / "python.c"]
    command += ["-I" + sysconfig.get_path("include"), "-L" + of_python("LIBDIR")]
    # whole, because a static one holds more than main needs
    command += ["-Wl,--whole-archive", "-lpython" + of_python("LDVERSION"), "-Wl,--no-whole-archive"]
    command += [
        "-Wl,-rpath," + of_python("LIBDIR"),
        *of_python("LIBS").split(),
        *of_python("SYSLIBS").split(),
    ]
    subprocess.run(command, check=True)
    if subprocess.run([folder / "python", "--version"]).returncode:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    return folder


def openmp_library(folder):
    """LLVM's, as the extension in `folder` is linked with it."""
    done = subprocess.run(["ldd", *folder.glob("fastbn/*.so")], capture_output=True, text=True, check=True)
    found = [line.split()[2] for line in done.stdout.splitlines() if "libomp" in line]
    if not found:
        pytest.skip("clang has no OpenMP library here: install libomp-dev")
    return Path(found[0]).resolve()


def watch(folder):
    """Run all_operations.py with the kernels in `folder`."""
    packages = Path(numpy.__file__).parents[1]
    environment = os.environ | {
        "PYTHONHOME": sys.base_prefix,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "tests", packages))),
        "OMP_WAIT_POLICY": "passive",
        "OMP_TOOL_LIBRARIES": str(openmp_library(folder).with_name("libarcher.so")),
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1:exitcode={RACE_FOUND}",
    }
    command = [folder / "python", HERE / "all_operations.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    print(done.stdout, done.stderr[:10000], sep="\n")
    return done


def test_no_races(folder):
    done = watch(folder)
    assert done.returncode == 0
    assert "libomp" in done.stdout


@pytest.mark.parametrize(
    ("file", "whole", "broken"),
    [
        ("fastbn/_kernels.pyx", "    bn_barrier()\n", "    pass\n"),
        ("src_c/workplace.c", "(size_t)me->member * s->owner_step", "0"),
    ],
    ids=["no barriers", "owners' coefficients where others' are"],
)
def test_races_are_found(folder, file, whole, broken):
    source = folder / file
    text = source.read_text()
    assert whole in text
    try:
        source.write_text(text.replace(whole, broken))
        build(folder)
        assert watch(folder).returncode == RACE_FOUND
    finally:
        source.write_text(text)
