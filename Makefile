PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0
BUILD := pyproject.toml $(wildcard src/lilliput/kernels/*.[ch]pp) src/lilliput/kernels/CMakeLists.txt

.PHONY: demo test check clean
demo: .venv/demo.stamp  ## fit a real language model into half its memory and time per token, under ten minutes
	$(BIN)/lilliput fit

test: .venv/test.stamp  ## every test
	@# torch takes a worker down with it now and then; that ends a run, and a second one begins. Failures fail twice.
	$(PYTEST) || $(PYTEST)

check: .venv/dev.stamp  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Lilliput needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/demo.stamp: .venv/bin/python $(BUILD)
	$(BIN)/python -m pip install --quiet -e '.[zoo]'
	$(BIN)/lilliput zoo fetch smollm2-135m
	touch $@

.venv/test.stamp: .venv/bin/python $(BUILD)
	$(BIN)/python -m pip install --quiet -e '.[test]'
	$(BIN)/lilliput zoo fetch smollm2-135m fashion-mnist mobilenet-v2 digits
	touch $@

.venv/dev.stamp: .venv/bin/python $(BUILD)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
