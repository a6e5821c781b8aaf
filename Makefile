# One command each; every target makes what it needs.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
# The environment is made anew when what it is made from changes.
STAMP := $(VENV)/.made-$(shell cat constraints.txt pyproject.toml | sha256sum | cut -c1-16)
RUN := $(VENV)/bin/python
export RAY_USAGE_STATS_ENABLED := 0
export RAY_DEDUP_LOGS := 1
export PYTHONPATH := $(CURDIR)

.PHONY: demo demo-elastic demo-tune test test-all lint docs browser pure gloo ray-tests long-tests chaos chaos-tests examples benchmark-save-stall benchmark-ray-stall benchmark-restore benchmark-recovery benchmark-goodput benchmark-growth benchmark-gpu-stall clean

demo: $(STAMP)
	$(RUN) examples/resume_digits.py

demo-elastic: $(STAMP)
	$(RUN) examples/elastic_gpt.py

demo-tune: $(STAMP)
	$(RUN) examples/tune_pbt.py

test: lint docs pure gloo ray-tests chaos-tests

test-all: test long-tests examples

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The site, in build/site. A link that leads nowhere is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build -q

# For the tests that look at a page. Debian's package; where there is another one, it is used.
BROWSER := $(or $(shell command -v chromium || command -v google-chrome),/usr/bin/chromium)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

browser: $(BROWSER)

/usr/bin/chromium:
	$(SUDO) apt-get -o Acquire::Retries=3 update -q
	$(SUDO) apt-get -o Acquire::Retries=3 install -y -q --no-install-recommends chromium

PURE := pure attacks storage cluster node cuda cli report
pure: $(STAMP) $(BROWSER)
	$(RUN) -m pytest -q -n auto --durations 10 $(PURE:%=tests/%)

gloo: $(STAMP)
	$(RUN) -m pytest -q -n auto -m "not long" --durations 10 tests/gloo

ray-tests: $(STAMP)
	$(RUN) -m pytest -q -m "not long" --durations 10 tests/ray

# What takes minutes and is next to something that `make test` plays.
long-tests: $(STAMP)
	$(RUN) -m pytest -q -m long tests/gloo tests/ray tests/chaos

# Some of a fixed dozen of what `chaos` plays; `long-tests` play the others.
chaos-tests: $(STAMP)
	$(RUN) -m pytest -q -m "not long" tests/chaos

# Faults at random moments: SEED is the first, RUNS how many, OUT a file for the table.
# With MEMORY=1 all of them with the memory tier, of which else a third have it.
# With TRACE, nodes come and go as that spot trace says.
SEED ?= 1
RUNS ?= 10
chaos: $(STAMP)
	$(RUN) -m tests.chaos --seed $(SEED) --runs $(RUNS) \
		$(if $(MEMORY),--memory) $(if $(OUT),--out $(OUT)) $(if $(TRACE),--trace $(TRACE))

examples: $(STAMP)
	$(RUN) -m pytest -q tests/examples

PEERS := $(RUN) -m pip install -q -c constraints.txt -r benchmarks/requirements.txt

# ARGS are the benchmark's own: make benchmark-restore ARGS="--megabytes 60 --cold"
benchmark-save-stall: $(STAMP)
	$(PEERS)
	$(RUN) benchmarks/save_stall.py $(ARGS)

benchmark-ray-stall: $(STAMP)
	$(PEERS)
	$(RUN) benchmarks/ray_stall.py $(ARGS)

benchmark-recovery: $(STAMP)
	$(RUN) benchmarks/recovery.py $(ARGS)

benchmark-goodput: $(STAMP)
	$(RUN) benchmarks/goodput.py $(ARGS)

benchmark-restore: $(STAMP)
	$(RUN) benchmarks/restore.py $(ARGS)

benchmark-growth: $(STAMP)
	$(RUN) benchmarks/growth.py $(ARGS)

benchmark-gpu-stall: $(STAMP)
	$(RUN) benchmarks/gpu_stall.py $(ARGS)

$(STAMP):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e '.[test,lint,docs]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
