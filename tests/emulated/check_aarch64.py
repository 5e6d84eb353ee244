"""The wheel for AArch64, built and tested on an emulated one, with Debian's Python and NumPy's own wheel.

`make test-aarch64` runs this, and installs what it needs. Python is emulated; the compiler that it calls is
not, because that takes a tenth of the time. What is downloaded is kept in build/aarch64, and nothing of this
machine is changed.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="x86-64 only: elsewhere emulators are slow"
)

ROOT = Path(__file__).parents[2]
HERE = ROOT / "build/aarch64"
DEBIAN, SITE, RUN = HERE / "debian", HERE / "site", HERE / "run"
PYTHON = HERE / "python"

PACKAGES = (
    "python3.11", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libpython3.11-dev",
    "libc6", "libgcc-s1", "libstdc++6", "libgomp1", "zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0",
    "liblzma5", "libuuid1",
)  # fmt: skip
NEEDED = (
    "numpy>=2", "Cython>=3.1", "setuptools>=77",
    "hypothesis", "ml_dtypes", "pytest>=8", "rich", "threadpoolctl",
)  # fmt: skip
CORE = ("accuracy", "layouts", "determinism", "errors", "fork", "forward", "backward", "threads")


def run(*command, cwd=ROOT, **environment):
    command = list(map(str, command))
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, timeout=3000,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, f"exit status {done.returncode} of {' '.join(command)}"
    return done.stdout


def debian_packages(folder):
    """Debian's packages for AArch64, by lists of their own."""
    for name in ("lists/partial", "archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()
    signed = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"  # Ubuntu does not know it by itself
    (folder / "sources.list").write_text(f"deb {signed} http://deb.debian.org/debian bookworm main\n")
    options = {
        "APT::Architecture": "arm64", "APT::Architectures::": "arm64", "APT::Sandbox::User": "root",
        "Dir::Etc::sourcelist": folder / "sources.list", "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": folder / "lists", "Dir::State::status": folder / "status",
        "Dir::Cache": folder, "Dir::Cache::archives": folder / "archives",
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    run(*apt, "update")
    # of a version that has gone from the servers in the meantime nothing is left behind
    shutil.rmtree(folder / "debs", ignore_errors=True)
    (folder / "debs").mkdir()
    run(*apt, "download", *PACKAGES, cwd=folder / "debs")
    return sorted((folder / "debs").glob("*.deb"))


def download():
    """Python of AArch64 with NumPy and what else the tests import, unless it is here."""
    if PYTHON.exists():
        return
    for package in debian_packages(HERE / "apt"):
        run("dpkg-deb", "--extract", package, DEBIAN)
    platforms = [f"--platform=manylinux{version}_aarch64" for version in ("2014", "_2_27", "_2_28")]
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--target", SITE, "--only-binary", ":all:",
        *platforms, "--python-version", "3.11", "--implementation", "cp", *NEEDED,
    )  # fmt: skip
    (SITE / "sitecustomize.py").write_text(f"import sys\n\nsys.executable = {str(PYTHON)!r}\n")
    start = f'exec qemu-aarch64 -L {DEBIAN} {DEBIAN}/usr/bin/python3.11 "$@"'
    PYTHON.write_text(f'#!/bin/sh\nexport PYTHONPATH="$PYTHONPATH${{PYTHONPATH:+:}}{SITE}"\n{start}\n')
    PYTHON.chmod(0o755)


@pytest.fixture(scope="module")
def emulated():
    """An emulated Python with NumPy, which programs of its own start again as sys.executable."""
    try:
        download()
    except AssertionError as failed:
        pytest.skip(f"what this needs could not be downloaded: {failed}")
    assert run(PYTHON, "-c", "import platform; print(platform.machine())") == "aarch64\n"
    return PYTHON


@pytest.fixture(scope="module")
def wheel(emulated):
    headers = DEBIAN / "usr/include"
    for folder in ("dist", "lib"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    run(
        emulated, "setup.py", "--quiet", "build", "--build-lib", HERE / "lib",
        "bdist_wheel", "--dist-dir", HERE / "dist", "--bdist-dir", HERE / "bdist",
        CC="aarch64-linux-gnu-gcc", CPPFLAGS=f"-I{headers} -I{headers / 'python3.11'}",
    )  # fmt: skip
    [wheel] = (HERE / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder with the wheel and the tests alone, so that what is imported there is the wheel."""
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    shutil.unpack_archive(wheel, RUN, "zip")
    shutil.copytree(ROOT / "tests", RUN / "tests")
    shutil.copy(ROOT / "pyproject.toml", RUN)
    return RUN


def test_wheel_is_one_of_aarch64(wheel):
    assert wheel.name.endswith("-cp311-cp311-linux_aarch64.whl")
    assert "_aarch64" in run(sys.executable, "-m", "auditwheel", "show", wheel)
    assert wheel.stat().st_size < 3 << 20


ROOM = """
static __thread char room[512] __attribute__((tls_model("initial-exec")));
char *address(void);
char *address(void) { return room; }
"""
FILL = """
import ctypes, sys
try:
    for library in sys.argv[1:]:
        ctypes.CDLL(library)
except OSError as error:
    assert "static TLS block" in str(error)
"""


def test_no_room_for_thread_local_variables(emulated, installed, tmp_path):
    """Libraries that take all of what glibc keeps for those that are loaded late; a reason, and two cures."""
    (tmp_path / "room.c").write_text(ROOM)
    libraries = [tmp_path / f"{i}.so" for i in range(8)]
    for library in libraries:
        run("aarch64-linux-gnu-gcc", "-shared", "-fPIC", tmp_path / "room.c", "-o", library)
    late = f"{FILL}\ntry:\n    import fastbn\nexcept ImportError as error:\n    print(error)"
    assert "import fastbn before them" in run(emulated, "-c", late, *libraries, cwd=installed)
    assert not run(emulated, "-c", f"import fastbn\n{FILL}\nimport fastbn", *libraries, cwd=installed)
    more = {"QEMU_SET_ENV": "GLIBC_TUNABLES=glibc.rtld.optional_static_tls=8192"}
    assert not run(emulated, "-c", late, *libraries, cwd=installed, **more)


def test_core_of_the_test_suite(emulated, installed):
    pytest_quick = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "--durations=10"]
    files = [f"tests/test_{name}.py" for name in CORE]
    run(emulated, *pytest_quick, *files, cwd=installed, OMP_NUM_THREADS="2")
