# Everything a developer runs, on a machine with only Python and a C compiler: each target first brings .venv up to date.
# The extension is built in place, so that what is tested, timed and shown is always the present sources.

PYTHON ?= python3
VENV := .venv
PY := $(abspath $(VENV))/bin/python
export PATH := $(abspath $(VENV))/bin:$(PATH)
PIP := $(PY) -m pip --quiet --disable-pip-version-check
BUILD_REQUIRES := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
C_PROGRAMS = $(wildcard bench/*.c tests/*/*.c)
C_SOURCES = $(wildcard src_c/*.[ch] src_c/*/*.h bench/*.cpp) $(C_PROGRAMS)
PYTHON_INCLUDE = $(shell $(PY) -c 'import sysconfig; print("-I" + sysconfig.get_path("include"))')

.PHONY: help demo serve load test test-arm test-noavx test-races test-service lint format dev bench bench-peers \
    bench-scaling sanitize wheel build torch emulators chromium tsan wrk
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/demo.stamp build ## run the example programs: tables here, pictures in build/demo
	$(PY) examples/first_layer.py
	$(PY) examples/digits_mlp.py

serve: $(VENV)/service.stamp build ## start the reference service: draw a digit at http://127.0.0.1:8000
	cd examples/service && exec gunicorn

load: $(VENV)/service.stamp build wrk ## load the reference service, with fastbn and with NumPy: latencies, requests/s
	$(PY) examples/service/load.py $(LOAD)

test: $(VENV)/test.stamp torch build ## run the test suite and print the coverage of the Python layer
	$(PY) -m pytest --cov --cov-report=term

test-arm: $(VENV)/test.stamp build emulators ## test that the kernels on AArch64 (emulated) give the same bits as with AVX2
	$(PY) -m pytest tests/emulated/check_arm.py

test-noavx: $(VENV)/test.stamp build emulators ## run a part of the test suite on a CPU without AVX (emulated)
	$(PY) -m pytest tests/emulated/check_noavx.py

test-service: $(VENV)/service.stamp build ## test the reference service, under load and in a browser
	@$(MAKE) --no-print-directory -k chromium wrk || echo "The tests that need them will be SKIPPED"
	$(PY) -m pytest tests/service/check_service.py

test-races: $(VENV)/test.stamp tsan ## look for data races between the threads of the kernels (clang, ThreadSanitizer)
	$(PY) -m pytest tests/races/check_races.py

lint: $(VENV)/lint.stamp ## check style, types and C warnings (gcc and clang)
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
	        CC=$$cc CFLAGS=-Werror $(PY) setup.py --quiet build_ext -t build/lint-$$cc -b build/lint-$$cc >build/lint-$$cc.log; \
	    else echo "== $$cc is not installed: its warnings were NOT checked"; fi; \
	done

format: $(VENV)/lint.stamp ## rewrite Python and C in the project's style
	ruff check --fix
	ruff format
	clang-format -i $(C_SOURCES)

bench: $(VENV)/bench.stamp build ## time fastbn against NumPy and print the ratios
	$(PY) bench/ratios.py

bench-peers: $(VENV)/peers.stamp build ## time fastbn against PyTorch, oneDNN, TensorFlow, JAX, ONNX Runtime, OpenVINO
	$(PY) bench/compare.py

bench-scaling: $(VENV)/bench.stamp build ## time fastbn with 1, 2, 4 ... all CPUs
	$(PY) bench/scaling.py

# In a copy, so that no object is ever mixed with those of an ordinary build.
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(VENV)/test.stamp ## run the quick tests under AddressSanitizer and UndefinedBehaviorSanitizer (gcc)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r setup.py pyproject.toml fastbn src_c tests docs $(SANITIZED)
	cd $(SANITIZED) && CC=gcc CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(PY) setup.py --quiet build_ext --inplace --debug
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 timeout 1200 $(PY) -m pytest -m "not slow" --ignore tests/test_build.py

wheel: $(VENV)/test.stamp ## build the sdist, and the wheel from the sdist, into dist/
	$(PY) -m build
	@ls -l dist

# ---- what the targets above stand on

dev: $(VENV)/python.stamp ## build for one instruction set alone, to try a change: make dev ISA=avx2
	FASTBN_BUILD_ISAS=$(if $(filter baseline,$(ISA)),none,$(ISA)) $(PY) setup.py --quiet build_ext --inplace

build: $(VENV)/python.stamp
	@mkdir -p build
	@$(PY) setup.py --quiet build_ext --inplace >build/build.log || { cat build/build.log; exit 1; }

# $(call debian,CHECK,PACKAGES): what pip does not bring. Installed where that is possible, else asked for.
define debian
	@( $(1) ) >/dev/null 2>&1 || \
	{ test "$$(id -u)" = 0 && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(2) >/dev/null; } || \
	{ echo "Please install these packages of Debian and Ubuntu: $(2)"; exit 1; }
endef
have = for program in $(1); do command -v $$program || exit 1; done

emulators:
	$(call debian,$(call have,aarch64-linux-gnu-gcc qemu-aarch64 qemu-x86_64),gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)

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

# .venv/test.stamp and the like: this checkout is installed there, in place, with the extra of that name.
$(VENV)/%.stamp: $(VENV)/python.stamp
	@echo "Installing fastbn[$*] into $(VENV)"
	@PYTHONWARNINGS=ignore $(PIP) install --no-build-isolation --editable '.[$*]'
	@touch $@

$(VENV)/python.stamp: pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PIP) install --upgrade pip $(BUILD_REQUIRES)
	@touch $@
