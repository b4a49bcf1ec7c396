# make train: fresh machine -> .venv -> the embedded default, trained and evaluated.   make test: the whole test suite.
# With an NVIDIA driver, .venv gets the GPU build of Paddle; `make gpu CUDA=126` chooses its CUDA version.
PYTHON ?= python3
VENV := .venv
PIP = $(VENV)/bin/python -m pip install -q --disable-pip-version-check
CUDA ?= $(shell $(PYTHON) tools/_cuda.py)
# requirements-gpu.txt as arguments of pip, with the index of CUDA
INSTALL_GPU = $(PIP) $$(sed -e '/^\#/d' -e 's,/cu[0-9]*/,/cu$(CUDA)/,' requirements-gpu.txt)
INSTALL = $(if $(CUDA),$(INSTALL_GPU),$(PIP) -r requirements.txt)

.PHONY: train install ops gpu test check-device lint format clean

train: install
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh run_train_multi.sh

install: $(VENV)/.installed

ops: install
	$(VENV)/bin/python tools/build_ops.py

gpu: | $(VENV)/bin/python
	@test -n "$(CUDA)" || { echo "error: nvidia-smi names no CUDA version: give it, as in 'make gpu CUDA=126'." >&2; exit 2; }
	$(VENV)/bin/python -m pip uninstall -q -y paddlepaddle paddlepaddle-gpu
	$(INSTALL_GPU)
	touch $(VENV)/.installed

test: $(VENV)/.installed-test lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

check-device: install
	$(VENV)/bin/python tools/check_device.py

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/hadolint docker/Dockerfile

format: $(VENV)/.installed-test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) output

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt requirements-gpu.txt requirements-common.txt | $(VENV)/bin/python
	$(INSTALL)
	touch $@

$(VENV)/.installed-test: requirements-test.txt requirements-deploy.txt $(VENV)/.installed
	$(PIP) -r requirements-test.txt -r requirements-deploy.txt
	touch $@
