"""README and the pages of docs/: programs run and print what they say, sessions answer as shown, commands are
right, nothing is left out."""

import doctest
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SERVICE = ROOT / "examples" / "service"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md")}

OTHERS = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/service/README.md")
TEXTS = PAGES | {name: (ROOT / name).read_text(encoding="utf-8") for name in OTHERS if (ROOT / name).exists()}

pytestmark = pytest.mark.skipif(not PAGES, reason="the tests were copied without docs/")
whole = pytest.mark.skipif(
    not (ROOT / "Makefile").exists(), reason="the tests were copied without the rest of the checkout"
)

# Pages that another file of tests names, as `"docs" / "page.md"`, have their programs run there.
OTHER_TESTS = "\n".join(
    file.read_text(encoding="utf-8")
    for file in Path(__file__).parent.rglob("test_*.py")
    if file.name != "test_docs.py"
)


def blocks(kind):
    """The pages with fenced blocks of this kind, and these blocks."""
    found = {name: re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) for name, text in PAGES.items()}
    return {name: texts for name, texts in found.items() if texts}


PROGRAMS = {page: texts for page, texts in blocks("python").items() if f'"{page}"' not in OTHER_TESTS}
SESSIONS = blocks("{doctest}")

# What the programs of a page print, where that is to be judged.
PRINTED = {
    "production/workers.md": r"two callers do \d\.\d\d times the work of one\n",
    "guides/training.md": r"(?P<percent>\d+)% of the points are told right\n",
    "guides/masks.md": r"15 values a channel are real, 60 are not 0\n",
    "guides/onnx.md": r"(largest difference: .*\n){2}evaluator: .* ms\nONNX Runtime: .* ms\n",
}
DIFFERENCE = r"largest difference: .*\n"


def run(program, folder):
    """What a program prints that a new Python runs, from a file, as a reader does; fastbn must not warn."""
    libraries = set(re.findall(r"^(?:import|from) (\w+)", program, re.MULTILINE))
    for library in libraries:
        if not importlib.util.find_spec(library):
            pytest.skip(f"{library} is not installed")
    environment = dict(os.environ, PYTHONPATH=str(Path(fastbn.__file__).parents[1]))
    if "keras" in libraries and "KERAS_BACKEND" not in os.environ:
        backends = [name for name in ("torch", "jax", "tensorflow") if importlib.util.find_spec(name)]
        if not backends:
            pytest.skip("Keras has no backend here")
        environment["KERAS_BACKEND"] = backends[0]
    file = folder / "program.py"
    file.write_text(program)
    command = [sys.executable, "-W", "error:::fastbn", file]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(PROGRAMS))
def test_programs_run(page, tmp_path):
    """Those of a page in one file, from the first to the last."""
    printed = run("\n".join(PROGRAMS[page]), tmp_path)
    expected = PRINTED.get(page, DIFFERENCE if page.startswith("guides/") else r"(.*\n)*")
    match = re.fullmatch(expected, printed)
    assert match, printed
    differences = re.findall(r"largest difference: (.*)", printed)
    assert all(float(difference) < 2e-5 for difference in differences), printed
    assert int(match.groupdict().get("percent", 100)) >= 95


@whole
@pytest.mark.parametrize("which", ["inference", "PyTorch", "training"])
def test_programs_of_the_readme_print_what_stands_below(which, tmp_path):
    """Each alone, to the last digit, but for a share that arithmetic may move by one of the 256."""
    found = re.findall(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)*)", TEXTS["README.md"], re.DOTALL)
    program, shown = dict(zip(["inference", "PyTorch", "training"], found, strict=True))[which]
    printed = run(program, tmp_path)
    shown = re.sub("^    ", "", shown, flags=re.MULTILINE)
    assert re.sub(r"9[5-9]%", "SHARE", printed) == re.sub(r"9[5-9]%", "SHARE", shown)


@pytest.mark.parametrize("page", sorted(SESSIONS))
def test_sessions_answer_as_shown(page):
    names = {"__name__": page}
    for session in SESSIONS[page]:
        test = doctest.DocTestParser().get_doctest(session, names, page, page, 0)
        runner = doctest.DocTestRunner()
        runner.run(test, clear_globs=False)
        assert runner.summarize(verbose=False).failed == 0
        names.update(test.globs)


def test_every_public_name_is_in_the_reference():
    listed = set(re.findall(r"^   ([\w.]+)$", PAGES["reference/index.md"], re.MULTILINE))
    public = {name for name in fastbn.__all__ if name not in ("distributed", "interop")}
    for module in ("distributed", "interop"):
        public |= {f"{module}.{name}" for name in getattr(fastbn, module).__all__}
    assert listed - {"interop.onnx.BatchNormalization"} == public


def test_every_environment_variable_is_in_the_reference():
    sources = [ROOT / "setup.py", *(ROOT / "fastbn").rglob("*.p[xy]*")]
    read = {
        name for source in sources for name in re.findall(r"[\"'](FASTBN_[A-Z_]+)[\"']", source.read_text())
    }
    assert len(read) >= 4
    assert read == set(re.findall(r"^\| `(FASTBN_\w+)", PAGES["reference/environment.md"], re.MULTILINE))


@whole
def test_paths_that_pages_name_are_there():
    """Commands and sentences of the pages name files of the checkout."""
    folders = "bench|docs|examples|fastbn|src_c|tests"
    for page, text in TEXTS.items():
        for path in re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", text):
            assert (ROOT / path).exists(), f"{page} names {path}"


@whole
def test_make_targets_that_pages_name_are_there():
    makefile = (ROOT / "Makefile").read_text()
    for page, text in TEXTS.items():
        for target in re.findall(r"(?:`|^    )make ([a-z0-9-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page} names make {target}"


COMMAND = r"(?:\w+=\S+ )*(?:\.venv/bin/)?(?:python|pytest|pip|gunicorn)(?: [^`]*)?"


def commands(*programs):
    """The words of the commands in lines and sentences that call one of these programs."""
    for text in TEXTS.values():
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        found = re.findall(r"^    (.*)$|`([^`]+)`", text, re.MULTILINE)
        for command in (line or inline for line, inline in found):
            if not re.fullmatch(COMMAND, command):
                continue
            if "[--" in command:  # a usage
                command = re.sub(r"[\[\]]| \.\.\.", "", command)
            words = shlex.split(command, comments=True)
            words = [word for word in words if not re.match(r"\w+=", word)]  # of the environment
            if words and words[0].removeprefix(".venv/bin/") in programs:
                yield words[1:]


def test_commands_of_fastbn_do_something():
    asked = {tuple(words[2:]) for words in commands("python") if words[:2] == ["-m", "fastbn"]}
    assert {words[0] for words in asked if words} == {"info", "bench", "plan", "--version"}
    for words in asked - {()}:
        quick = ["--shape", "2x3x4x4", "--seconds", "0.001"] if words[0] == "bench" else []
        quick += ["2x3x4x4"] if words == ("plan",) else []  # a sentence that is about the command
        done = subprocess.run(
            [sys.executable, "-m", "fastbn", *words, *quick], capture_output=True, text=True
        )
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout


def labels(text):
    """What stands in the left column, in front of the values of a machine."""
    return [re.split(r"  +", line)[0] for line in text.splitlines() if "  " in line]


@pytest.mark.parametrize(
    ("page", "first", "command"),
    [
        ("deployment.md", "    fastbn  ", ["info"]),
        ("performance.md", "    machine ", ["plan", "32x256x56x56", "--op", "training", "--layout", "nhwc"]),
    ],
    ids=["info", "plan"],
)
def test_what_fastbn_prints_has_the_lines_that_are_shown(page, first, command):
    shown = re.search(rf"^{first}(?:.*\n)(?:    .*\n)*", PAGES[page], re.MULTILINE)[0]
    command = [sys.executable, "-m", "fastbn", *command]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(labels(printed)) > 5
    assert labels(re.sub("^    ", "", shown, flags=re.MULTILINE)) == labels(printed)


def test_commands_of_timeit_time_something():
    asked = [words for words in commands("python") if words[:2] == ["-m", "timeit"]]
    assert asked
    for words in asked:
        command = [sys.executable, *words[:2], "-n", "1", *words[2:]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "best of" in done.stdout, done.stderr


@whole
@pytest.mark.slow
def test_commands_run_programs_that_know_their_options():
    asked = {}
    for words in commands("python"):
        if words and re.fullmatch(r"(bench|examples)/.*\.py", words[0]):
            asked.setdefault(words[0], set()).update(word for word in words[1:] if word.startswith("--"))
    assert {"bench/busy.py", "examples/claims.py"} < set(asked)
    for program, options in asked.items():
        done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True)
        if "ModuleNotFoundError" in done.stderr:
            continue  # an extra that is not installed
        assert done.returncode == 0, done.stderr
        assert all(option in done.stdout for option in options), (program, options)


@whole
def test_commands_of_pytest_name_tests():
    asked = list(commands("pytest"))
    assert len(asked) >= 8
    for words in asked:
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), words


@whole
def test_commands_of_pip_name_extras():
    pyproject = (ROOT / "pyproject.toml").read_text()
    extras = [
        extra for words in commands("pip") for word in words for extra in re.findall(r"fastbn\[(\w+)", word)
    ]
    assert {"torch", "dask", "mpi"} <= set(extras)
    assert all(re.search(rf"^{extra} = \[", pyproject, re.MULTILINE) for extra in extras)


def test_commands_of_gunicorn_start(tmp_path):
    pytest.importorskip("gunicorn")
    (tmp_path / "service.py").write_text("import fastbn\n\ndef application(environ, start): ...\n")
    asked = [words for words in commands("gunicorn") if "service:application" in words]
    assert len(asked) == 3
    for words in asked:
        done = subprocess.run(
            [sys.executable, "-m", "gunicorn", "--check-config", *words],
            cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


@whole
def test_tables_of_the_benchmarks_are_those_of_the_measurement(monkeypatch):
    """Nobody has changed a figure by hand, or measured anew and forgotten a file."""
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(ROOT / "bench")
    pages = importlib.import_module("pages")
    assert "\n".join(pages.tables(*pages.read(DOCS / "performance"))) == PAGES["performance/by_peer.md"]
    busy = pages.busy_table(pages.lines_of(DOCS / "performance" / "busy.csv"))
    assert "\n".join(busy) + "\n" == PAGES["performance/busy.md"]


# ---- the files of "Docker, systemd, Kubernetes"


@whole
def test_the_dockerfile_copies_what_there_is():
    text = (SERVICE / "Dockerfile").read_text().replace("\\\n", "")
    copied = [words for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for words in line.split()[:-1]]
    assert "examples/service" in copied
    assert all((ROOT / name).exists() for name in copied)
    pyproject = (ROOT / "pyproject.toml").read_text()
    for needed in re.search(r"pip wheel .* \. (.*)", text)[
        1
    ].split():  # they are what the service's extra has
        assert needed.strip('"') in pyproject


@whole
def test_the_unit_is_one_of_systemd(tmp_path):
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    text = (SERVICE / "fastbn-service.service").read_text()
    unit = tmp_path / "fastbn-service.service"
    unit.write_text(re.sub(r"^ExecStart=.*", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert unit.name not in done.stderr  # no complaint about a line of it


@whole
def test_kubernetes_would_take_the_file():
    validate = pytest.importorskip("kubernetes_validate")
    yaml = pytest.importorskip("yaml")
    kinds = []
    for document in yaml.safe_load_all((SERVICE / "kubernetes.yaml").read_text()):
        validate.validate(document, validate.latest_version(), strict=True)
        kinds.append(document["kind"])
    assert kinds == ["Deployment", "Service"]


@whole
def test_workers_times_threads_are_the_cpus():
    """Of all three files, which say the same."""
    docker, unit, kubernetes = (
        (SERVICE / name).read_text() for name in ("Dockerfile", "fastbn-service.service", "kubernetes.yaml")
    )
    assert "WEB_CONCURRENCY=2 FASTBN_NUM_THREADS=1 FASTBN_OUTPUT_CACHE=16M" in docker
    assert "WEB_CONCURRENCY=2 FASTBN_NUM_THREADS=1 FASTBN_OUTPUT_CACHE=16M" in unit
    assert "CPUQuota=200%" in unit
    assert re.search(r'WEB_CONCURRENCY, value: "2".*\n.*FASTBN_NUM_THREADS, value: "1"', kubernetes)
    assert 'requests: { cpu: "2"' in kubernetes


@whole
def test_the_citation_has_the_version_of_the_package():
    citation = ROOT / "CITATION.cff"
    assert re.search(r"^version: (.*)$", citation.read_text(), re.MULTILINE)[1] == fastbn.__version__
