"""The extension as it was built, on an emulated CPU without AVX.

`make test-noavx` runs this, and installs what it needs. That the baseline keeps to SSE2 is for
test_isa_isolation.py to show: this CPU has SSE4.2, because NumPy's wheels ask for that much.
"""

import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="x86-64 only: runs the extension built here"
)

ROOT = Path(__file__).parents[2]


def emulated(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", "Nehalem", *map(str, command)],
        cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    print(done.stdout, done.stderr, sep="\n")
    return done


def test_this_cpu_has_no_avx(tmp_path):
    source = tmp_path / "avx.c"
    source.write_text('int main(int n, char **v) { (void)v; if (n > 1) __asm__("vzeroall"); return 0; }')
    subprocess.run(["cc", source, "-o", tmp_path / "avx"], check=True)
    assert emulated(tmp_path / "avx").returncode == 0
    assert emulated(tmp_path / "avx", "now").returncode == -signal.SIGILL


def test_baseline_is_taken():  # case 24
    code = "from fastbn import _kernels; print(_kernels.get_isa(), _kernels.supported_isas())"
    assert emulated(sys.executable, "-c", code, FASTBN_ISA="").stdout == "baseline ('baseline',)\n"


def test_asking_for_avx2_is_an_import_error():
    done = emulated(sys.executable, "-c", "import fastbn", FASTBN_ISA="avx2")
    assert done.returncode == 1
    assert "ImportError: FASTBN_ISA: this CPU and build offer baseline; got 'avx2'" in done.stderr


def test_a_build_without_the_baseline_is_an_import_error(tmp_path):
    objects = "build/objects/" + sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]
    for name in ("fastbn", "src_c", objects):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, tmp_path)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(build, cwd=tmp_path, env=os.environ | {"FASTBN_BUILD_ISAS": "avx2"}, check=True)
    done = emulated(sys.executable, "-c", "import fastbn", FASTBN_ISA="", cwd=tmp_path)
    assert done.returncode == 1
    assert "ImportError: fastbn was built for some instruction sets alone (FASTBN_BUILD_ISAS)" in done.stderr


def test_results():
    # Threads are left out: they are no matter of the instruction set, and slow here.
    suite = "tests/test_forward.py tests/test_backward.py -q -p no:cacheprovider"
    chosen = ["-m", "not slow", "-k", "not ranks and not out"]
    done = emulated(sys.executable, "-m", "pytest", *suite.split(), *chosen, FASTBN_ISA="")
    assert done.returncode == 0
    assert "skipped" not in done.stdout
