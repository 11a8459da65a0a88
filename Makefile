# Every target sets up what it needs. Nothing is assumed but Python >= 3.11 with pip and venv.
#
#   make demo       train a QP layer on mini-Sudoku puzzles, draw what it learned
#   make test       all tests but the slow ones, with the coverage of diffopt/ (at least 95 %)
#   make slow       the slow tests
#   make mutations  plant faults in the core one at a time; each must be caught by a test (MUTATIONS="lanes": some)
#   make sanitize   run the compiled CPU executor under sanitizers, from a C++ program (2 minutes)
#   make sanitize-suite   its tests from Python, with a library compiled with sanitizers (some minutes)
#   make transforms write the tables of docs/transforms.md anew, from the cases that the tests run
#   make accuracy   the worst errors of x and of all gradients against an exact reference, and of float32, into docs/accuracy.md
#   make hard       check every claim on 100,000 random hard problems, and write what came of it into docs/accuracy.md (3 minutes)
#   make maros      write the table of Maros-Meszaros problems in docs/accuracy.md anew
#   make lint       format, lint and types
#   make coverage   make test, then the lines that the measurement leaves out
#   make cpu        compile the CPU executor into build/cpu/; the targets that solve anything do this first
#   make bench      time diffopt beside other solvers, in .venv-bench (10 minutes; BENCH_OPTIONS="--quick": 3)
#   make bench-profile   where the time goes: the CPU executor compiled with counters, phase by phase (4 minutes)
#   make bench-cuda time the CUDA executor on this machine's device, with a PYTHON that has torch for CUDA and cuda-core
#   make sanitize-cuda   its tests under compute-sanitizer (memcheck, racecheck, synccheck), likewise, with pytest too
#   make docs       build the documentation site into site/
#   make clean      remove what these targets made, .venv included

PYTHON ?= python3
JOBS ?= 2
DEMO_OPTIONS ?=
BENCH_OPTIONS ?=
HARD_OPTIONS ?= --write

VENV := .venv
BIN := $(VENV)/bin

# An unpinned torch would fetch gigabytes. (As a variable, the pins reach pip's own build environments too.)
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -qq --disable-pip-version-check

# Tests run in $(JOBS) processes, so each of them keeps to one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.PHONY: help cpu demo test slow mutations sanitize sanitize-suite transforms accuracy hard maros lint format coverage bench bench-scaling bench-profile bench-cuda sanitize-cuda docs clean
.NOTPARALLEL:

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "diffopt needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
			"Name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra: .venv/installed-test is newer than what it was installed from. The CPU executor is left to the
# rule below, which compiles it once for all extras, and again when a source changes.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing diffopt with the extra '$*' into $(VENV) (a minute or so) ..."
	@SKBUILD_CMAKE_DEFINE=DIFFOPT_CPU=OFF $(PIP_INSTALL) --editable '.[$*]'
	@touch $@

# The compiled CPU executor, where diffopt looks for it in a source tree: by CMake if there is one, otherwise by $(CXX) alone.
# Without a C++ compiler it is left out, which only `make cpu` itself calls an error.
CPU := diffopt/solvers/cpu
build/cpu/built: CMakeLists.txt $(wildcard $(CPU)/*)
	@rm -rf build/cmake
	@if cmake --version >/dev/null 2>&1; then \
		echo "Compiling the CPU executor with CMake ..."; \
		cmake -S . -B build/cmake -G "Unix Makefiles" >/dev/null && \
		cmake --build build/cmake --parallel $(JOBS) >/dev/null; \
	elif command -v $(firstword $(CXX)) >/dev/null; then \
		echo "Compiling the CPU executor with $(CXX) ..."; mkdir -p build/cpu; \
		all=$$(sed -n 's/^all //p' $(CPU)/variants.txt); \
		sed '/^#/d; /^all /d' $(CPU)/variants.txt | while read -r name flags; do \
			library=build/cpu/libdiffopt_cpu_$$name.so; rm -f $$library; \
			[ -z "$$flags" ] || echo '#include <immintrin.h>' | $(CXX) $$flags -x c++ -fsyntax-only - 2>/dev/null || continue; \
			$(CXX) $(CXXFLAGS) $$all $$flags -fPIC -shared -pthread $(CPU)/executor.cpp -o $$library $(LDFLAGS) || exit 1; \
		done && touch $@; \
	else \
		echo "No C++ compiler: the compiled CPU executor is left out, torch operations do the work."; \
	fi

cpu: build/cpu/built
	@test -f build/cpu/built

# Waiting threads sleep instead of spinning: spinning halves the speed where another process wants the cores.
demo: $(VENV)/installed-examples build/cpu/built
	OMP_WAIT_POLICY=passive $(BIN)/python examples/sudoku.py --output output $(DEMO_OPTIONS)

test: $(VENV)/installed-test build/cpu/built
	$(PYTEST) -m "not slow" --cov --cov-report=term

slow: $(VENV)/installed-test build/cpu/built
	$(PYTEST) -m slow

mutations: $(VENV)/installed-test build/cpu/built
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutations.py $(MUTATIONS)

# Memory errors and undefined behaviour, with registers of two widths; data races.
sanitize:
	@printf '%s\n' "address,undefined baseline" "address,undefined avx2" "thread baseline" | \
		CXX="$(CXX)" xargs -P $(JOBS) -n 2 sh tests/solvers/cpu/sanitize.sh

# (The runtimes come first, as they must; Python's own leaks are not ours. One test measures time, which sanitizers take.)
SANITIZE_VARIANT ?= avx2
sanitize-suite: $(VENV)/installed-test
	CXX="$(CXX)" sh tests/solvers/cpu/sanitize.sh address,undefined $(SANITIZE_VARIANT) library
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 DIFFOPT_CPU_LIBRARY=$(CURDIR)/build/sanitize/libdiffopt_cpu_$(SANITIZE_VARIANT).so \
		$(PYTEST) -m "not slow" -k "(pdipm or cpu_executor) and not pdipm-torch and not interrupted" \
		tests/test_contract.py tests/solvers/test_cpu_*.py

transforms: $(VENV)/installed-test build/cpu/built
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/test_transforms.py

accuracy: $(VENV)/installed-test build/cpu/built
	OMP_NUM_THREADS=1 $(BIN)/python tests/accuracy.py

hard: $(VENV)/installed-test build/cpu/built
	OMP_NUM_THREADS=1 $(BIN)/python tests/hard.py $(HARD_OPTIONS)

maros: $(VENV)/installed-test build/cpu/built
	PYTHONPATH=.:tests OMP_NUM_THREADS=1 $(BIN)/python tests/test_maros.py

coverage: test
	@echo "Lines that need a GPU and are not measured:"
	@grep -rn "pragma: cuda" diffopt --include="*.py" || echo "  none"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peers, in an environment of their own. One that cannot be installed has rows that say so.
PEERS := qpth moreau proxsuite qpax jax cvxpylayers daqp piqp clarabel scipy gurobipy
.venv-bench/installed: benchmarks/constraints.txt
	$(PYTHON) -m venv .venv-bench
	@echo "Installing other solvers into .venv-bench (two minutes or so) ..."
	@install() { PIP_CONSTRAINT=benchmarks/constraints.txt \
		.venv-bench/bin/python -m pip install -qq --disable-pip-version-check "$$@"; }; \
	install torch==2.13.0 numpy matplotlib && { install $(PEERS) || \
		for peer in $(PEERS); do install $$peer || echo "$$peer cannot be installed"; done; }
	@touch $@

bench: .venv-bench/installed build/cpu/built
	.venv-bench/bin/python -m benchmarks.run $(BENCH_OPTIONS)

bench-scaling: .venv-bench/installed build/cpu/built
	.venv-bench/bin/python -m benchmarks.scaling $(BENCH_OPTIONS)

bench-profile: .venv-bench/installed build/cpu/built
	CXX="$(CXX)" .venv-bench/bin/python -m benchmarks.profile $(BENCH_OPTIONS)

# On machines with a device the Python that has torch for it is no environment of ours: $(PYTHON) itself serves.
bench-cuda:
	@$(PYTHON) -c 'import torch' 2>/dev/null || { \
		echo "make bench-cuda needs a Python with torch for CUDA and cuda-core, which '$(PYTHON)' is not:" \
			"make bench-cuda PYTHON=..."; exit 1; }
	PYTHONPATH=. $(PYTHON) -m benchmarks.cuda $(BENCH_OPTIONS)

sanitize-cuda:
	@PYTHON="$(PYTHON)" sh tests/solvers/cuda/sanitize.sh

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-bench build dist site output *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
