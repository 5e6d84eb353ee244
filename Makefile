# Everything a developer runs, on a machine with only Python and a C compiler: each target first brings .venv up to date.
# The extension is built in place, so that what is tested, timed and shown is always the present sources.

PYTHON ?= python3
VENV := .venv
PY := $(abspath $(VENV))/bin/python
export PATH := $(abspath $(VENV))/bin:$(PATH)
PIP := $(PY) -m pip --quiet --disable-pip-version-check
# The strings of a list in pyproject.toml that is written in one line.
listed = $(shell sed -n 's/^$(1) = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
C_PROGRAMS = $(wildcard bench/*.c tests/*/*.c)
C_SOURCES = $(wildcard src_c/*.[ch] src_c/*/*.h bench/*.cpp) $(C_PROGRAMS)
PYTHON_INCLUDE = $(shell $(PY) -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))')

.PHONY: help demo serve load test test-slow test-aarch64 test-arm test-kernels test-noavx test-portable test-races \
    test-service lint format dev bench bench-peers bench-networks bench-scaling sanitize docs wheel release build torch \
    emulators chromium tsan wrk
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# Where nothing is built yet, what the examples need is compiled: float32 on this CPU. make test adds the rest. They
# multiply small matrices, for which threads of OpenBLAS only wait.
CPU = $(shell uname -m | grep -q x86_64 && { grep -qsw avx512vl /proc/cpuinfo && echo avx512 || grep -osw -m1 avx2 /proc/cpuinfo; } | head -1)
QUICK = $(if $(wildcard fastbn/_kernels*.so),$(shell grep -ls FASTBN_FLOAT32_ALONE build/objects/*/_kernels.flags),yes)
demo: export FASTBN_BUILD_ISAS := $(or $(FASTBN_BUILD_ISAS),$(if $(QUICK),$(or $(CPU),baseline)))
demo: export FASTBN_BUILD_ELEMENTS := $(or $(FASTBN_BUILD_ELEMENTS),$(if $(QUICK),f32))
demo: export OPENBLAS_NUM_THREADS = 1
demo: export PYTHONPATH = $(CURDIR)
demo: $(VENV)/demo.stamp build ## run the example programs: tables here, pictures in build/demo
	$(PY) examples/first_layer.py
	@$(PY) examples/claims.py --short depth dropout >build/claims.txt & \
	    $(PY) examples/digits_mlp.py; status=$$?; wait $$! && cat build/claims.txt && exit $$status

serve: $(VENV)/service.stamp build ## start the reference service: draw a digit at http://127.0.0.1:8000
	cd examples/service && exec gunicorn

load: $(VENV)/service.stamp build wrk ## load the reference service, with fastbn and with NumPy: latencies, requests/s
	$(PY) examples/service/load.py $(LOAD)

# COVERAGE=1 for both, one after the other, tells how much of the Python layer they reach, and wants 95 %. It takes half as
# long again.
test: $(VENV)/test.stamp $(VENV)/demo.stamp torch build ## run the test suite, but for what takes long
	$(PY) -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 \
	    $(if $(COVERAGE),--cov --cov-report= --cov-fail-under=0)

test-slow: $(VENV)/test.stamp $(VENV)/demo.stamp torch build ## run what make test leaves out: packages, programs of the pages, long searches
	$(PY) -m pytest -m slow $(if $(COVERAGE),--cov --cov-append --cov-report=term)

test-arm: $(VENV)/test.stamp build emulators ## test that the kernels on AArch64 (emulated) give the same bits as with AVX2
	$(PY) -m pytest tests/emulated/check_cpus.py -k aarch64

test-portable: $(VENV)/test.stamp build emulators ## test the kernels of other CPUs: 32-bit ARM, riscv64, s390x, ppc64le (emulated)
	$(PY) -m pytest tests/emulated/check_cpus.py -k "not aarch64"

test-aarch64: $(VENV)/test.stamp emulators ## build the wheel for AArch64, and run the core of the test suite on it (emulated)
	$(PY) -m pytest -s tests/emulated/check_aarch64.py

test-kernels: $(VENV)/test.stamp build ## test the kernels without Python, under sanitizers, and how much of them is reached
	$(PY) -m pytest tests/kernels/check_kernels.py

test-noavx: $(VENV)/test.stamp build emulators ## run a part of the test suite on a CPU without AVX (emulated)
	$(PY) -m pytest tests/emulated/check_noavx.py

test-service: $(VENV)/service.stamp build ## test the reference service, under load and in a browser
	@$(MAKE) --no-print-directory -k chromium wrk || echo "The tests that need them will be SKIPPED"
	$(PY) -m pytest tests/service/check_service.py

test-races: $(VENV)/test.stamp tsan ## look for data races between the threads of the kernels (clang, ThreadSanitizer)
	$(PY) -m pytest tests/races/check_races.py

# gcc compiles everything, because some of its warnings need that, with objects of its own, as its flags are others; of
# clang it is the syntax. What gcc has built is what the stub of the kernels is compared with.
lint: $(VENV)/lint.stamp ## check style, types, and C warnings (gcc and clang)
	ruff check
	ruff format --check
	cython-lint fastbn
	clang-format --dry-run -Werror $(C_SOURCES)
	mypy
	@mkdir -p build
	@set -e; for cc in gcc clang; do \
	    if command -v $$cc >/dev/null; then \
	        echo "== $$cc -Wall -Wextra -Werror"; \
	        $$cc -std=c11 -Wall -Wextra -Werror -fopenmp -fsyntax-only -Isrc_c $(PYTHON_INCLUDE) $(C_PROGRAMS); \
	    else echo "== $$cc is not installed: its warnings were NOT checked"; fi; \
	done
	@if command -v clang >/dev/null; then \
	    CC=clang LDSHARED=true CFLAGS="-Werror -fsyntax-only" \
	    $(PY) setup.py --quiet build_ext -t build/lint-clang -b build/lint-clang >build/lint-clang.log 2>&1 || \
	    { cat build/lint-clang.log; exit 1; }; fi
	@if command -v gcc >/dev/null; then \
	    CC=gcc CFLAGS=-Werror \
	    $(PY) setup.py --quiet build_py -d build/lint build_ext -t build/lint-gcc -b build/lint >build/lint-gcc.log 2>&1 || \
	    { cat build/lint-gcc.log; exit 1; }; \
	    cd build/lint && echo "fastbn._kernels.(Operands|__(test|.*_cython)__)" | \
	    $(PY) -m mypy.stubtest --mypy-config-file ../../pyproject.toml --allowlist /dev/stdin fastbn._kernels; \
	else echo "== Without gcc the stub of the kernels was NOT checked"; fi

format: $(VENV)/lint.stamp ## rewrite Python and C in the project's style
	ruff check --fix
	ruff format
	clang-format -i $(C_SOURCES)

bench: $(VENV)/bench.stamp build ## time fastbn against NumPy and print the ratios
	$(PY) bench/ratios.py

# What the site shows is made by PAGES=docs/performance.
PAGES = build/bench
ALL = $(shell nproc)
GOMP := build/bench/onednn-gomp
bench-peers: $(VENV)/peers.stamp build ## time fastbn against other libraries, with one thread and with all: report, CSV, chart
	test -e $(GOMP)/lib/libdnnl.so.3 || $(PIP) install --no-deps --ignore-installed --prefix $(GOMP) \
	    onednn-cpu-gomp==2023.2.0 onednn-devel-cpu-gomp==2023.2.0
	$(PY) bench/compare.py --threads 1 --few --csv $(PAGES)
	$(PY) bench/compare.py --threads $(ALL) --csv $(PAGES) --markdown build/bench/peers.md --plots $(PAGES)
	$(PY) bench/pages.py $(PAGES)

bench-networks: $(VENV)/networks.stamp build ## time networks of torchvision with PyTorch's batch norms and with fastbn's
	$(PY) bench/networks.py

bench-scaling: $(VENV)/bench.stamp build ## time fastbn with 1, 2, 4 ... all CPUs
	$(PY) bench/scaling.py --csv $(PAGES)/scaling.csv --plot $(PAGES)/scaling.png

# In a copy, so that no object is ever mixed with those of an ordinary build; of the instruction sets two, whose loops are
# the same, because the sanitizers make compiling slow.
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/test.stamp ## run the quick tests under AddressSanitizer and UndefinedBehaviorSanitizer (gcc)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r setup.py pyproject.toml fastbn src_c tests docs $(SANITIZED)
	cd $(SANITIZED) && FASTBN_BUILD_ISAS="baseline avx2" CC=gcc CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(PY) setup.py --quiet build_ext --inplace --debug
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 timeout 3000 $(PY) -m pytest -m "not slow" --ignore tests/test_build.py

docs: $(VENV)/docs.stamp build ## build the site into build/docs: warnings and broken links are errors
	rm -rf build/docs docs/reference/generated
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going --doctree-dir build/doctrees docs build/docs
	$(PY) -m sphinx --quiet --fail-on-warning --builder doctest --doctree-dir build/doctrees docs build/doctest
	@echo "Open build/docs/index.html"

# The wheel is built from the sdist, without network, and on Linux is then made to run on others than this one. That for
# AArch64 is built the same way by make test-aarch64.
wheel: $(VENV)/release.stamp ## build sdist and wheel as they are published, into dist/, and check them
	rm -rf dist build/dist build/wheel && mkdir -p build
	$(PY) -m build --sdist --no-isolation --outdir dist >build/sdist.log
	$(PIP) wheel --no-build-isolation --no-index --no-deps --wheel-dir build/dist dist/*.tar.gz
	@if [ "$$(uname)" = Linux ]; then $(PY) .ci/repair_wheel build/dist/*.whl dist && \
	    $(PY) -m auditwheel show dist/*.whl; \
	else cp build/dist/*.whl dist; fi
	$(PY) -m twine check --strict dist/*
	check-wheel-contents dist/*.whl
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip --quiet --disable-pip-version-check install dist/*.whl
	cd build/wheel && bin/python -m fastbn info && bin/python -m fastbn bench --shape 8x64x28x28 64x256 --seconds 0.05
	@ls -l dist

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' fastbn/__init__.py)
release: ## everything that a release takes, but for pushing the tag
	@test -z "$$(git status --porcelain)" || { echo "There are changes that are not committed"; exit 1; }
	@grep -q '^## $(VERSION) ' CHANGELOG.md || { echo "CHANGELOG.md has no section '## $(VERSION) (date)'"; exit 1; }
	@! git rev-parse --quiet --verify refs/tags/v$(VERSION) || { echo "The tag v$(VERSION) exists already"; exit 1; }
	$(MAKE) lint test test-slow docs wheel
	@echo "fastbn $(VERSION) is ready. A tag publishes it: git tag -s v$(VERSION) && git push origin v$(VERSION)"

# ---- what the targets above stand on

ELEMENTS = f32
dev: $(VENV)/python.stamp ## build for one instruction set and float32, to try a change: make dev ISA=avx2 [ELEMENTS=]
	FASTBN_BUILD_ISAS=$(ISA) FASTBN_BUILD_ELEMENTS=$(ELEMENTS) $(PY) setup.py --quiet build_ext --inplace

build: $(VENV)/python.stamp
	@$(COMPILE) || { cat build/build.log; exit 1; }

# $(call debian,CHECK,PACKAGES): what pip does not bring. Installed where that is possible, else asked for.
define debian
	@( $(1) ) >/dev/null 2>&1 || \
	{ test "$$(id -u)" = 0 && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(2) >/dev/null; } || \
	{ echo "Please install these packages of Debian and Ubuntu: $(2)"; exit 1; }
endef
have = for program in $(1); do command -v $$program || exit 1; done

CROSS = aarch64-linux-gnu arm-linux-gnueabihf riscv64-linux-gnu s390x-linux-gnu powerpc64le-linux-gnu
emulators:
	$(call debian,$(call have,$(addsuffix -gcc,$(CROSS)) qemu-aarch64 qemu-x86_64),\
	    $(addprefix gcc-,$(CROSS)) $(patsubst %,libc6-dev-%-cross,arm64 armhf riscv64 s390x ppc64el) qemu-user debian-archive-keyring)

chromium:
	$(call debian,$(call have,chromium chromedriver),chromium chromium-driver)

tsan: # clang alone does not bring ThreadSanitizer
	@mkdir -p build
	$(call debian,echo 'int main(void) { return 0; }' | clang -fsanitize=thread -fopenmp -x c - -o build/tsan,\
	    clang libclang-rt-dev libomp-dev)

wrk:
	$(call debian,$(call have,wrk),wrk)

torch:
	@$(MAKE) --no-print-directory $(VENV)/interop.stamp || \
	    echo "PyTorch, Keras and ONNX could not be installed: the tests that judge fastbn by them will be SKIPPED"

# Tools alone, which need nothing of fastbn built.
$(VENV)/lint.stamp $(VENV)/release.stamp: $(VENV)/python.stamp
	@echo "Installing the tools of make $(basename $(notdir $@)) into $(VENV)"
	@$(PIP) install --no-compile --group $(basename $(notdir $@))
	@touch $@

COMPILE = mkdir -p build && $(PY) setup.py --quiet build_ext --inplace >build/build.log

# .venv/test.stamp and the like: this checkout is installed there, in place, with the extra of that name. It is compiled
# while pip downloads; pip's own build waits for that one, and then has nothing to do.
$(VENV)/%.stamp: $(VENV)/python.stamp
	@echo "Installing fastbn[$*] into $(VENV)"
	@$(COMPILE) 2>&1 & PYTHONWARNINGS=ignore $(PIP) install --no-compile --no-build-isolation --editable '.[$*]'; \
	status=$$?; wait; exit $$status
	@touch $@

# The examples are run from the checkout, so their libraries are enough.
$(VENV)/demo.stamp: $(VENV)/python.stamp
	@echo "Installing what the examples need into $(VENV)"
	@$(COMPILE) 2>&1 & $(PIP) install --no-compile $(call listed,demo); status=$$?; wait; exit $$status
	@touch $@

$(VENV)/python.stamp: pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PIP) install --no-compile --upgrade pip $(call listed,requires)
	@touch $@
