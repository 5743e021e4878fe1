# Two commands do everything on a machine with Python 3.11-3.13, pip, git and make:
#   make run     sets up, then quantizes the embedded default
#   make test    sets up, then runs the tests
PYTHON ?= python3
BIN := .venv/bin
SETUP := .venv/.complete

.PHONY: run test test-all docs screenshots check format setup clean

run: setup
	$(BIN)/quantflow run

test: setup
	$(BIN)/pytest -m "not slow"

test-all: setup
	$(BIN)/pytest

# docs/recipe.md and docs/report.md, from the descriptions in the code.
docs: setup
	$(BIN)/python docs/reference.py

# The browser tests take them again (Debian: apt-get install chromium chromium-driver).
screenshots: setup
	QUANTFLOW_SCREENSHOTS=docs $(BIN)/pytest tests/flows/hosting/test_dashboard_browser.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

setup: $(SETUP)

# uv, because it picks matching builds of torch and torchvision. Bytecode is compiled once, here: after that, torch and
# Prefect import in half the time. A migrated database for Prefect saves each new home 6 seconds. The marker is written
# last, so that an interrupted set-up is done again.
$(SETUP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --editable ".[dev]"
	$(BIN)/python -m flows.hosting.database
	touch $(SETUP)

clean:
	rm -rf .venv
