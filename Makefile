# make train: fresh machine -> .venv -> the embedded default, trained and evaluated.   make test: the whole test suite.
PYTHON ?= python3
VENV := .venv

.PHONY: train test lint format clean

train: $(VENV)/.installed
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh run_train_multi.sh

test: $(VENV)/.installed-test lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) output

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt requirements-common.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -r requirements-test.txt
	touch $@
