# The same few verbs for everyone. `make demo` and `make test` need only Python 3.11, git and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Most of a story is waiting for processes, so two at a time nearly halve the suite's wall time on two cores.
TEST_PROCESSES ?= 2
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup check format test soak demo up bench clean help

help:  ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.run-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing comfyfleet and its engine into $(VENV) (once)"
	@$(PIP) -e '.[worker,control,engine]'
	@touch $@

$(VENV)/.dev-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing comfyfleet with everything its tests need into $(VENV) (once)"
	@$(PIP) -e '.[worker,control,engine,postgres,ray,test,check]'
	@touch $@ $(VENV)/.run-ready

# The real `vastai` client pins much of its world, so it lives in an environment of its own.
$(VENV)-vastai/.ready: constraints-vastai.txt
	@$(PYTHON) -m venv $(VENV)-vastai
	@$(VENV)-vastai/bin/pip install --quiet --disable-pip-version-check -c constraints-vastai.txt vastai
	@touch $@

setup: $(VENV)/.dev-ready $(VENV)-vastai/.ready  ## virtual environments with everything

check: $(VENV)/.dev-ready  ## format, lint, types, imports, module size: before every commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_house_rules.py

format: $(VENV)/.dev-ready  ## rewrite what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: setup  ## the whole suite, as CI runs it
	$(BIN)/python -m pytest -m "not soak" -n $(TEST_PROCESSES) --dist worksteal $(ARGS)

soak: setup  ## the long fault hunts
	$(BIN)/python -m pytest -m soak $(ARGS)

demo: $(VENV)/.run-ready  ## the documents' two requests on this machine, end to end
	@$(BIN)/python -m comfyfleet demo $(ARGS)

up: $(VENV)/.run-ready  ## leave the whole system running on this machine
	@$(BIN)/python -m comfyfleet up $(ARGS)

bench: setup  ## measure, against a bare baseline in the same run
	$(BIN)/python -m bench $(ARGS)

clean:  ## remove what the other targets made here
	rm -rf $(VENV) $(VENV)-vastai build dist demo-output .mypy_cache .ruff_cache .pytest_cache
