# make run | make test | make bench | make install
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Threads that wait spin for some microseconds only: two training processes would slow one another tenfold otherwise.
export GOMP_SPINCOUNT ?= 20000
export GRADIO_ANALYTICS_ENABLED := False

.PHONY: run test bench install install-dev lint clean

run: install
	$(PY) app.py

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	# torch first and alone: its exact pin decides which build the others meet.
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

install-dev: $(VENV)/.installed-dev

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

test: install-dev
	$(PY) -m ruff check .
	$(PY) -m pytest

bench: install-dev
	$(PY) -m benchmarks

lint: install-dev
	$(PY) -m ruff check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
