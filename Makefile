# Two commands are all a newcomer needs: `make demo` and `make test`. Each makes .venv by itself.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
RUNS ?= runs/demo
FIGURES ?= figures/demo

.PHONY: demo test check lint clean

demo: $(INSTALLED)
	$(BIN)/python -m linchain_analysis.sweep --demo --out $(RUNS)
	$(BIN)/python -m linchain_analysis.figures $(RUNS) --out $(FIGURES)

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

check: $(INSTALLED) lint
	$(BIN)/python -m pytest -n 2

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is made last, so an installation that was cut short is made again.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else 'Makefile: expected Python 3.11 to 3.13, got %d.%d; do: make PYTHON=python3.11' % v)"
	@echo "Installing into $(VENV); this takes a minute or two."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
