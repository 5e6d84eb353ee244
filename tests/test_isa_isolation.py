"""Instructions that a CPU may lack lie only behind the dispatcher: the built extension, disassembled.

That the file of an instruction set has flags of its own is not enough: of an inline function with external
linkage that two files contain the linker keeps one copy, and that may be the one with AVX.
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from collections import namedtuple
from pathlib import Path

import pytest

from fastbn import _kernels

TAG = sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]
OBJECTS = Path(__file__).parents[1] / "build/objects" / TAG
MAY_HAVE = {"avx2": {"AVX"}, "avx512": {"AVX", "AVX-512"}}  # what is not here: SSE2 alone
PARTS = [(p, e) for p in ("planes", "rows") for e in ("f32", "f64", "f16", "bf16")] + [
    ("terms", "f32"),
    ("terms", "f64"),
]


def isa_of(source):
    """The instruction set that a file such as planes_avx2_f32.c is compiled for."""
    name = Path(source).stem.split("_")
    return name[1] if len(name) == 3 else None


pytestmark = [
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 only"),
    pytest.mark.skipif(
        "ASAN_OPTIONS" in os.environ, reason="the sanitizer adds code of its own to every object"
    ),
    pytest.mark.skipif(not _kernels.__file__.endswith("linux-gnu.so"), reason="reads ELF files only"),
    pytest.mark.skipif(
        not (shutil.which("objdump") and shutil.which("readelf")), reason="binutils are not installed"
    ),
]

Symbol = namedtuple("Symbol", "name, source, kind, binding, section, start, end")


def output_of(*command):
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def symbols(file):
    """All symbols of the symbol table; local ones with the source that a FILE symbol before them names."""
    found, source = [], ""
    for line in output_of("readelf", "--wide", "--symbols", file).partition("'.symtab'")[2].splitlines():
        fields = line.split()
        if not re.match(r"\d+:", line.strip()) or len(fields) < 7:
            continue
        _, value, size, kind, binding, _, section, *name = fields
        name = name[0] if name else ""
        if kind == "FILE":
            source = name
        start = int(value, 16)
        local = source if binding == "LOCAL" else ""
        found.append(Symbol(name, local, kind, binding, section, start, start + int(size, 0)))
    return found


PREFIXES = r"(?:(?:66|67|f0|f2|f3|26|2e|36|3e|64|65) )*(?:4[0-9a-f] )?"
ENCODED = re.compile(PREFIXES + r"(62|c4|c5|0f 38|0f 3a)\b")
SSE3 = re.compile(r"addsub|hadd|hsub|movs[lh]dup|movddup|lddqu|fisttp|monitor|mwait|popcnt|\(bad\)")


def extension(code, text):
    """What an instruction needs that not every x86-64 has, or None.

    Told by the encoding: in 64-bit code, 62 begins EVEX instructions and nothing else, C4 and C5 VEX ones.
    """
    encoding = match[1] if (match := ENCODED.match(code)) else None
    if encoding is None:
        return "SSE3 or later" if SSE3.match(text) else None
    if encoding.startswith("0f"):
        return "SSSE3 or later"
    if encoding == "62" or text.startswith("k"):
        return "AVX-512"
    return "AVX" if text.startswith("v") else "BMI"


def extensions(file):
    """(extension, source, function, instruction) for each instruction of the file that needs an extension."""
    functions = sorted((s for s in symbols(file) if s.kind == "FUNC" and s.end), key=lambda s: s.start)
    if not functions:
        pytest.skip(f"{file} has been stripped of its symbols")
    found, i = [], 0
    for line in output_of("objdump", "--disassemble", "--wide", file).splitlines():
        address, _, instruction = line.partition(":\t")
        code, _, text = instruction.partition("\t")
        if not text or (needs := extension(code, text)) is None:
            continue
        address = int(address, 16)
        while i < len(functions) and functions[i].end <= address:
            i += 1
        inside = i < len(functions) and functions[i].start <= address
        name, source = functions[i][:2] if inside else ("no function", "")
        found.append((needs, source, name, f"{address:x}: {text}"))
    return found


def strangers(found):
    return [each for each in found if each[0] not in MAY_HAVE.get(isa_of(each[1]), ())]


def ways_in(objects):
    """(object, symbol) by which the code of an instruction set can be reached, other than its table."""
    found = []
    for file in objects:
        if isa_of(file) not in MAY_HAVE:
            continue
        for s in symbols(file):
            tables = f"bn_{file.stem}", f"bn_masked_{file.stem}"
            is_table = s.name in tables and (s.kind, s.binding) == ("OBJECT", "GLOBAL")
            if s.binding != "LOCAL" and s.section != "UND" and not is_table:
                found.append((file.stem, s.name))
        sections = output_of("readelf", "--wide", "--sections", file)
        found += [(file.stem, name) for name in re.findall(r" (\.(?:init|fini|ctors|dtors)\S*)", sections)]
    return found


def test_extension_uses_extensions_only_behind_the_dispatcher():
    found = extensions(_kernels.__file__)
    misplaced = strangers(found)
    assert not misplaced
    # what has been looked for is there
    assert {(needs, source) for needs, source, *_ in found} == {
        (needs, f"{part}_{isa}_{element}.c")
        for isa, may in MAY_HAVE.items()
        for needs in may
        for part, element in PARTS
    }


def test_objects_are_reached_by_their_tables_only():
    objects = sorted(OBJECTS.glob("*.o"))
    if not objects:
        pytest.skip(f"no objects in {OBJECTS}: fastbn was not built here")
    assert {f"{part}_{isa}_{e}" for isa in MAY_HAVE for part, e in PARTS} < {file.stem for file in objects}
    assert not ways_in(objects)


# ---- that these checks see what they are for

KERNELS = """
LINKAGE void scale(int *v) { for (int i = 0; i < 64; i++) v[i] = v[i] > 2 ? v[i] : 2; }
const struct { void (*run)(int *); } bn_loops_ISA_f32 = { scale };
"""
FLAGS = {"avx2": ["-mavx2"], "avx512": ["-mavx512f", "-mprefer-vector-width=512"], "other": []}


@pytest.fixture
def compiled(tmp_path):
    """Compiles loops_{avx2,avx512,other}_f32.c: the objects, and what is linked from them."""
    cc = shutil.which("cc") or pytest.skip("no C compiler is installed")

    def build(flags=FLAGS, linkage="static"):
        objects = []
        for isa in FLAGS:
            source = tmp_path / f"loops_{isa}_f32.c"
            source.write_text(KERNELS.replace("ISA", isa).replace("LINKAGE", linkage))
            objects.append(source.with_suffix(".o"))
            output_of(cc, "-O3", "-fPIC", *flags[isa], "-c", source, "-o", objects[-1])
        output_of(cc, "-shared", "-o", tmp_path / "linked.so", *objects)
        return objects, tmp_path / "linked.so"

    return build


def test_static_functions_of_one_name_are_told_apart(compiled):
    objects, linked = compiled()
    found = extensions(linked)
    assert {(needs, source, name) for needs, source, name, _ in found} >= {
        ("AVX", "loops_avx2_f32.c", "scale"),
        ("AVX-512", "loops_avx512_f32.c", "scale"),
    }
    assert not strangers(found)
    assert not ways_in(objects)


@pytest.mark.parametrize(
    ("isa", "flag", "needs"),
    [
        ("other", "-mavx", "AVX"),
        ("other", "-mavx512f", "AVX-512"),
        ("other", "-msse4.1", "SSSE3 or later"),
        ("avx2", "-mavx512vl", "AVX-512"),
    ],
)
def test_an_instruction_elsewhere_is_seen(compiled, isa, flag, needs):
    _, linked = compiled(FLAGS | {isa: [flag, "-mprefer-vector-width=512"]})
    seen = strangers(extensions(linked))
    assert (needs, f"loops_{isa}_f32.c", "scale") in {each[:3] for each in seen}
    assert {each[1] for each in seen} == {f"loops_{isa}_f32.c"}


def test_a_shared_function_is_seen(compiled):
    objects, linked = compiled(linkage="__attribute__((weak))")
    assert ways_in(objects) == [("loops_avx2_f32", "scale"), ("loops_avx512_f32", "scale")]
    seen = strangers(extensions(linked))
    assert "scale" in {each[2] for each in seen}
    assert {each[1] for each in seen} == {""}  # whichever copy the linker took, it belongs to no file


def test_code_that_runs_at_load_is_seen(compiled):
    constructor = "static volatile int i; __attribute__((constructor)) static void at_load(void) { i = 1; }"
    objects, _ = compiled(linkage=f"{constructor} static")
    assert {object for object, _ in ways_in(objects)} == {"loops_avx2_f32", "loops_avx512_f32"}


@pytest.mark.parametrize(
    ("code", "text", "needs"),
    [
        ("0f 58 c1", "addps  %xmm1,%xmm0", None),
        (
            "f3 0f bc c0",
            "tzcnt  %eax,%eax",
            None,
        ),  # elsewhere it is bsf, which does for what compilers use it
        ("f3 48 0f b8 c0", "popcnt %rax,%rax", "SSE3 or later"),
        ("66 41 0f 38 00 c0", "pshufb %xmm8,%xmm0", "SSSE3 or later"),
        ("f2 0f 7c c1", "haddps %xmm1,%xmm0", "SSE3 or later"),
        ("64 c5 f8 10 00", "vmovups %fs:(%rax),%xmm0", "AVX"),
        ("c4 e2 f3 f6 c2", "mulx   %rdx,%rcx,%rax", "BMI"),
        ("c5 f8 92 c8", "kmovw  %eax,%k1", "AVX-512"),
        ("62 f1 7c 48 58 c1", "vaddps %zmm1,%zmm0,%zmm0", "AVX-512"),
    ],
)
def test_extension_of_an_instruction(code, text, needs):
    assert extension(code, text) == needs
