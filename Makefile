# `make` lists the targets. Everything runs in .venv, which is built once and rebuilt when the dependencies change.

PYTHON  ?= python3
THREADS ?= 2

VENV      := .venv
VPYTHON   := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TORCH     := torch==2.14.1 torchvision==0.29.1
DEMO      := bundles/msd_heart

.DEFAULT_GOAL := help
.PHONY: help install demo test check docs format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install the project into it

# torch first and alone: pip then takes the release the project is tested with.
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(VPYTHON) || $(PYTHON) -m venv $(VENV)
	$(VPYTHON) -m pip install $(TORCH)
	$(VPYTHON) -m pip install -e ".[dev]"
	touch $@

demo: export OMP_NUM_THREADS = $(THREADS)
demo: $(INSTALLED) ## train and evaluate the heart bundle on embedded defaults (THREADS=2)
	$(VPYTHON) -m monai.bundle run training --config_file $(DEMO)/configs/train.json
	$(VPYTHON) -m monai.bundle run \
		--config_file "['$(DEMO)/configs/train.json','$(DEMO)/configs/evaluate.json']"
	@echo
	@echo "student:     $(DEMO)/models/model.pt"
	@echo "test scores: $(DEMO)/eval/metrics.json (summary), $(DEMO)/eval/per_case.csv (each case)"
	@echo "run record:  $(DEMO)/eval/run.json (data, teachers, decisions), $(DEMO)/eval/history.csv (each epoch)"

test: export OMP_NUM_THREADS = 1
test: export MKL_NUM_THREADS = 1
test: $(INSTALLED) ## run the test suite
	$(VPYTHON) -m pytest -n 2 --dist loadfile

check: $(INSTALLED) ## format check, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED) ## build the documentation site into build/site, warnings are errors
	$(VPYTHON) -m mkdocs build --strict

format: $(INSTALLED) ## format the code and apply the linter's safe fixes
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(INSTALLED) ## run the benchmarks
	$(VPYTHON) benchmarks/results.py

clean: ## remove build products and tool caches; .venv, trained students and teacher caches stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
