# `make` lists the targets. Everything runs in .venv, which is built once and rebuilt when the dependencies change.

PYTHON  ?= python3
THREADS ?= 2

VENV      := .venv
VPYTHON   := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TORCH     := torch==2.14.1 torchvision==0.29.1
DEMO      := kvasir_seg
OUT       := build/demo
CREW      := [{'name':'crew','kind':'crew','members':[{'encoder':'tf_efficientnet_lite1'}],'image_size':96,'images':768,'folds':2}]
SETTINGS  := --dataset_dir $(OUT)/Kvasir-SEG --cache_dir $(OUT)/cache --image_size 64 --labelled 6 \
             --split_fractions [0.5,0.1,0.4] --max_epochs 12 --val_interval 12 --recipe\#min_steps 1

LABEL_VENV      := .venv-label
LABEL_PYTHON    := $(LABEL_VENV)/bin/python
LABEL_INSTALLED := $(LABEL_VENV)/.installed
SITE_PACKAGES   := import sysconfig; print(sysconfig.get_path("purelib"))

.DEFAULT_GOAL := help
.PHONY: help install label-env demo test check bundles docs format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv and install the project into it

# torch first and alone: pip then takes the release the project is tested with.
$(INSTALLED): setup.cfg pyproject.toml
	test -x $(VPYTHON) || $(PYTHON) -m venv $(VENV)
	$(VPYTHON) -m pip install $(TORCH)
	$(VPYTHON) -m pip install -e ".[dev]"
	touch $@

label-env: $(LABEL_INSTALLED) ## create .venv-label: MONAI Label and what it needs, on top of .venv, which stays as it is

# Python adds the packages of .venv behind its own: a package of another version than there counts in this one only.
$(LABEL_INSTALLED): requirements/label.txt requirements/label-alone.txt $(INSTALLED)
	test -x $(LABEL_PYTHON) || $(VPYTHON) -m venv $(LABEL_VENV)
	$(VPYTHON) -c '$(SITE_PACKAGES)' \
		| sed 's|.*|import site; site.addsitedir("&")|' > "$$($(LABEL_PYTHON) -c '$(SITE_PACKAGES)')/project.pth"
	$(LABEL_PYTHON) -m pip install -r requirements/label.txt
	$(LABEL_PYTHON) -m pip install --no-deps -r requirements/label-alone.txt
	touch $@

demo: export OMP_NUM_THREADS = $(THREADS)
demo: export OMP_WAIT_POLICY = PASSIVE
demo: $(INSTALLED) ## few labels, a crew of teachers: undistilled against distilled student on phantoms (THREADS=2)
	$(VPYTHON) -c 'from amkd_monai.data.datasets import get_task; get_task("$(DEMO)").write_phantom("$(OUT)", count=150)'
	$(call arm,undistilled,none)
	$(call arm,distilled,$(CREW))
	@echo
	@$(VPYTHON) -m amkd_monai compare $(OUT)/undistilled $(OUT)/distilled
	@echo
	@echo "An interval that holds 0 shows no gain. These are generated images: a demonstration, not a result."
	@echo "report:   $(OUT)/distilled/report.html"
	@echo "students: $(OUT)/undistilled/model.pt, $(OUT)/distilled/model.pt"
	@echo "next:     source $(VENV)/bin/activate"
	@echo "          python -m amkd_monai new mybundle --data FOLDER_OF_IMAGES_AND_MASKS"

# Train and evaluate a student of the demonstration: $(1) names its folder, $(2) its teachers.
define arm
	@echo "== the $(1) student =="
	$(VPYTHON) -W ignore -m monai.bundle run training --config_file bundles/$(DEMO)/configs/train.json \
		--teachers "$(2)" $(SETTINGS) --output_dir $(OUT)/$(1) --ckpt_dir $(OUT)/$(1)
	$(VPYTHON) -W ignore -m monai.bundle run \
		--config_file "['bundles/$(DEMO)/configs/train.json','bundles/$(DEMO)/configs/evaluate.json']" \
		--teachers "$(2)" $(SETTINGS) --output_dir $(OUT)/$(1) --ckpt_dir $(OUT)/$(1)
endef

test: export OMP_NUM_THREADS = 1
test: export MKL_NUM_THREADS = 1
# Full-size teachers free and take gigabytes again and again: glibc keeps them, or the kernel zeroes them each time.
test: export MALLOC_MMAP_MAX_ = 0
test: export MALLOC_TRIM_THRESHOLD_ = 8589934592
test: $(INSTALLED) $(LABEL_INSTALLED) ## run the test suite, the MONAI Label server included
	$(VPYTHON) -m pytest -n 2 --dist loadscope --no-loadscope-reorder --max-worker-restart 0

bundles: $(INSTALLED) ## write the configs of all bundles from bundles/source
	$(VPYTHON) bundles/source/build.py

check: $(INSTALLED) ## format check, lint, types, layers of the package, bundles as their source says
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	PYTHONPATH=. $(VENV)/bin/lint-imports
	$(VPYTHON) bundles/source/build.py --check

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(INSTALLED) ## build the documentation site into build/site, warnings are errors
	$(VPYTHON) -m mkdocs build --strict

format: $(INSTALLED) ## format the code and apply the linter's safe fixes
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: export OMP_NUM_THREADS = 1
bench: $(INSTALLED) ## time a step, a start, the cache and the data path on one thread
	$(VPYTHON) benchmarks/short.py

clean: ## remove build products and tool caches; environments, trained students and teacher caches stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -not -path "./$(LABEL_VENV)/*" -prune -exec rm -rf {} +
