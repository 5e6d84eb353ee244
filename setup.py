"""Build the C core: one object per instruction set, each with its own flags, linked into one extension."""

import os
import re
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, OptionError
from setuptools.modified import newer_group

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The instruction sets: (flags of gcc and clang, flags of MSVC). Nothing but their kernels is compiled with
# these, so no instruction that a CPU may lack is reached before the dispatcher has looked at the CPU.
BASELINE = {"baseline": ([], [])}
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_64 = {"avx2": (AVX2, ["/arch:AVX2"]), "avx512": (AVX512, ["/arch:AVX512"])}
# Compiled for every instruction set and these elements; terms are the same where lanes are of float32.
ELEMENTS = ("f32", "f64", "f16", "bf16")
KERNELS = {"rows": ELEMENTS, "planes": ELEMENTS, "terms": ("f32", "f64")}
ABSENT = """#include "kernels.h"
extern const bn_loops bn_{name}, bn_masked_{name};
const bn_loops bn_{name} = {{0}}, bn_masked_{name} = {{0}};
"""  # of an element that is not built, and that _kernels.pyx then refuses

# -ffp-contract=off: the kernels say where a multiply-add is fused, so that every compiler gives equal bits.
# Not c11: with that gcc for s390x computes float in double.
GNU_FLAGS = ["-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
GNU_OPTIMIZE = {False: ["-O3", "-g0"], True: ["-O1", "-g"]}  # by --debug; -g would double the time of a build
# For our own C, not for what Cython writes. Nothing is thrown through it: tables for that only take room.
GNU_OWN = ["-Wall", "-Wextra", "-fno-asynchronous-unwind-tables"]
DEPENDENCIES = ["-MMD"]  # written beside each object: which files it includes
# So that boards of 512 MB can build: gcc collects its garbage more often, for a tenth more time.
FRUGAL = ["--param", "ggc-min-expand=20", "--param", "ggc-min-heapsize=32768"]
MEMORY = 300 << 20  # bytes that one compiler takes then
MSVC_FLAGS = ["/O2", "/std:c11", "/fp:precise"]

# (compile flags, link flags): the first pair that compiles and links a program is taken.
GNU_OPENMP = [
    (["-fopenmp"], ["-fopenmp"]),
    (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),  # Apple clang, with LLVM's runtime installed beside it
]
MSVC_OPENMP = [(["/openmp"], [])]
OPENMP_PROBE = "#include <omp.h>\nint probe(void);\nint probe(void) { return omp_get_max_threads(); }\n"

# Flags of CC, CFLAGS, CPPFLAGS and LDFLAGS that would make a wrong library. Unsafe mathematics changes
# results, and gcc that links with it changes the arithmetic of the whole process. Instructions belong to the
# files above.
IGNORED = re.compile(
    r"-(Ofast|ff(ast-math|inite-math-only|p-model=.*|p-contract=.*)|funsafe-math-optimizations|fassociative-math"
    r"|freciprocal-math|fno-signed-zeros|fapprox-func|fcx-limited-range|fsingle-precision-constant"
    r"|fdenormal-fp-math(-f32)?=.*|m(arch|cpu|tune|fpmath)=.*|mdaz-ftz|mrecip(=.*)?"
    r"|m(no-)?(avx|sse|ssse|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|adx|xop|aes|vaes|sha|gfni|vpclmul|pclmul|amx).*)"
)

DISPATCH = os.path.join("src_c", "dispatch.c")  # which alone has to know what instruction sets are built
HEADERS = glob("src_c/*.h") + glob("src_c/*/*.[ch]")


def compilers_at_once():
    """One for each CPU that this process may use, as far as the machine's memory goes."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return cpus
    return max(1, min(cpus, memory // (2 * MEMORY)))


def included(name):
    """The files that an object includes: as the compiler wrote them down, else all there may be."""
    told = Path(name).with_suffix(".d")
    if not told.exists():
        return HEADERS
    words = re.findall(r"(?:\\.|\S)+", told.read_text().replace("\\\n", " ").partition(":")[2])
    return [word.replace("\\ ", " ") for word in words]


class BuildKernels(build_ext):
    def initialize_options(self):
        super().initialize_options()
        # Shared by installing, packaging and building in place, not by several Pythons.
        self.build_temp = f"build/objects/{sysconfig.get_config_var('EXT_SUFFIX').split('.')[1]}"

    def finalize_options(self):
        super().finalize_options()
        # the objects of sources in it go where their paths say, which must not be absolute
        self.build_temp = os.path.relpath(self.build_temp)

    def run(self):
        """Build when no other build of this checkout for this Python is at work."""
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with open(Path(self.build_temp, "lock"), "w") as lock:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()

    def ignore_flags(self):
        """Take from the compiler's commands what would make a wrong library, and say so."""
        ignored = {}  # a set that keeps the order
        for name in self.compiler.executables:
            command = getattr(self.compiler, name, None)
            if command:
                ignored |= dict.fromkeys(filter(IGNORED.fullmatch, command))
                kept = [flag for flag in command if not IGNORED.fullmatch(flag)]
                setattr(self.compiler, name, kept)
        if ignored:
            self.warn(
                f"fastbn ignores {' '.join(ignored)} of CC, CFLAGS, CPPFLAGS, LDFLAGS or Python's own flags: "
                "its results must be exact, and it chooses instructions when it is imported"
            )

    def build_extension(self, ext):
        self.ignore_flags()
        msvc = self.compiler.compiler_type == "msvc"
        flags = MSVC_FLAGS if msvc else GNU_FLAGS + GNU_OPTIMIZE[bool(self.debug)]
        openmp_compile, openmp_link = self.find_openmp(MSVC_OPENMP if msvc else GNU_OPENMP)
        for optional in (DEPENDENCIES, FRUGAL):
            if not msvc and self.builds("int probe;\n", ["-Werror", *optional]):
                flags = flags + optional
        own_flags = flags if msvc else flags + GNU_OWN

        # of each source its flags; first what takes longest
        float32_alone = self.float32_alone()
        translated = cythonize([ext], quiet=True, force=self.force, build_dir=self.build_temp)[0].sources
        macros = ["-DFASTBN_FLOAT32_ALONE=1"] if float32_alone else []
        sources = dict.fromkeys(translated, flags + openmp_compile + macros)
        isas = BASELINE | (X86_64 if self.plat_name.endswith(("x86_64", "amd64")) else {})
        chosen = self.chosen(isas)
        for isa in chosen:
            gnu, visual = isas[isa]
            own = own_flags + (visual if msvc else gnu)
            sources |= dict.fromkeys(self.kernels_for(isa, float32_alone), own)
        sources |= dict.fromkeys(sorted(glob("src_c/*.c")), own_flags)
        sources[DISPATCH] = own_flags + [f"-DFASTBN_HAVE_{isa.upper()}=1" for isa in chosen]

        with ThreadPoolExecutor(compilers_at_once()) as pool:
            ext.extra_objects = list(pool.map(lambda own: self.compile_changed(*own, ext), sources.items()))
        # what is left is to link
        ext.sources = []
        ext.depends = [*ext.extra_objects, self.remember("link", openmp_link, ext.extra_objects)]
        ext.extra_link_args = openmp_link
        super().build_extension(ext)

    def find_openmp(self, candidates):
        if os.environ.get("FASTBN_NO_OPENMP", "0") in ("", "0"):
            for compile_flags, link_flags in candidates:
                if self.builds(OPENMP_PROBE, compile_flags, link_flags):
                    return compile_flags, link_flags
            reason = "the compiler cannot build an OpenMP program"
        else:
            reason = "FASTBN_NO_OPENMP is set"
        self.warn(f"fastbn is built WITHOUT OpenMP and will use one thread only: {reason}")
        return [], []

    def builds(self, code, compile_flags, link_flags=None):
        """Whether a program compiles, and links where there are flags for that."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(code)
            try:
                objects = self.compiler.compile([str(source)], folder, extra_postargs=compile_flags)
                if link_flags is not None:
                    self.compiler.link_shared_object(objects, f"{source}.out", extra_postargs=link_flags)
            except (CompileError, LinkError):
                return False
        return True

    def chosen(self, isas):
        """The instruction sets to build: all, or, to be quick, those that FASTBN_BUILD_ISAS names."""
        names = os.environ.get("FASTBN_BUILD_ISAS", "").split() or list(isas)
        unknown = [name for name in names if name not in isas]
        if unknown:
            raise OptionError(
                f"FASTBN_BUILD_ISAS must name some of {', '.join(isas)}, got {' '.join(unknown)}"
            )
        return names

    def float32_alone(self):
        """Whether the kernels of other elements are left out, to be quick."""
        names = os.environ.get("FASTBN_BUILD_ELEMENTS", "").split()
        if names not in ([], ["f32"]):
            raise OptionError(f"FASTBN_BUILD_ELEMENTS must be f32 or unset, got {' '.join(names)}")
        return names == ["f32"]

    def kernels_for(self, isa, float32_alone):
        """Files that make the kernels' sources those of one instruction set and element, with own symbols."""
        files = []
        for part, element in ((part, element) for part, elements in KERNELS.items() for element in elements):
            text = (
                f"#define FASTBN_ISA {isa}\n#define FASTBN_ELEMENT {element}\n"
                f'#define FASTBN_ELEMENT_FILE "elements/{element}.h"\n#include "kernels/{part}.c"\n'
            )
            if float32_alone and element != "f32" and part != "terms":  # float64 is what others merge in
                text = ABSENT.format(name=f"{part}_{isa}_{element}")
            files.append(self.write(f"{part}_{isa}_{element}.c", text))
        return files

    def compile_changed(self, source, flags, ext):
        """The object of a source, compiled unless it is newer than all it is made from."""
        [name] = self.compiler.object_filenames([source], output_dir=self.folder_of(source))
        flags_file = self.remember(Path(source).stem, flags, ext.define_macros)
        if self.force or newer_group([source, "setup.py", flags_file, *included(name)], name, "newer"):
            self.compiler.compile(
                [source], self.folder_of(source), ext.define_macros, ext.include_dirs, self.debug,
                extra_postargs=flags,
            )  # fmt: skip
        return name

    def folder_of(self, source):
        """Where the paths of objects begin: sources that are written by us lie in the folder of objects."""
        return "" if source.startswith(self.build_temp) else self.build_temp

    def remember(self, name, *flags):
        """Write flags and compiler to a file, if they changed: what depends on it is then built again."""
        commands = [getattr(self.compiler, command, None) for command in ("compiler_so", "linker_so")]
        return self.write(f"{name}.flags", repr((commands, flags)))

    def write(self, name, text):
        """A file in build_temp of this text, written anew if it changed."""
        file = Path(self.build_temp, name)
        if not file.exists() or file.read_text() != text:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return str(file)


kernels = Extension(
    "fastbn._kernels",
    ["fastbn/_kernels.pyx"],
    include_dirs=["src_c", numpy.get_include()],
    define_macros=[
        ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
        ("NPY_TARGET_VERSION", "NPY_1_25_API_VERSION"),  # runs with every NumPy since 1.25
    ],
)


def readme():
    """README.md as PyPI shows it, where paths of the checkout would lead nowhere."""
    text = Path("README.md").read_text(encoding="utf-8") if os.path.exists("README.md") else ""
    text = text.replace(
        "](docs/performance/", "](https://raw.githubusercontent.com/fastbn/fastbn/main/docs/performance/"
    )
    return re.sub(r"\]\((?!https?:)", "](https://github.com/fastbn/fastbn/blob/main/", text)


setup(
    ext_modules=[kernels],
    cmdclass={"build_ext": BuildKernels},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
