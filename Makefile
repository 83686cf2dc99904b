# make demo: the main job on synthetic micrographs, from nothing to a report. make test: the tests.
PYTHON ?= python3
RANKS ?= 2
DEMO ?= demo
BIN := .venv/bin
STAMP := .venv/.installed
NANODIST := $(BIN)/python -m nanodist

.PHONY: help install demo test lint clean-demo

help:
	@echo "make demo    synthesise, pack, pretrain on $(RANKS) ranks, probe, export, report (10 to 20 minutes on 2 cores)"
	@echo "make test    run the tests"
	@echo "make lint    ruff, mypy and import-linter"

install: $(STAMP)

# Installed once; again only when what is to be installed changes.
$(STAMP): setup.cfg constraints.txt
	$(PYTHON) -c "import sys; sys.exit('nanodist needs Python 3.10 or newer') if sys.version_info < (3, 10) else None"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,launch,mpich,io,remote,export,measure,segment,dashboard,scattering,dev]'
	# What numba compiles of the views is kept, or the first processes that make views would each do it.
	$(BIN)/python -c "from nanodist.views.on_cpu import compiled; compiled()"
	touch $(STAMP)

$(DEMO)/synth/meta.csv: | $(STAMP)
	$(NANODIST) synth wires --out $(DEMO)/synth --micrographs 350 --size 128 --haadf-share 0.4 --seed 0 --workers 2

$(DEMO)/train/manifest.json: $(DEMO)/synth/meta.csv
	$(NANODIST) pack $(DEMO)/synth/images --labels folder --tile 128 --part train --out $(DEMO)/train

$(DEMO)/test/manifest.json: $(DEMO)/synth/meta.csv
	$(NANODIST) pack $(DEMO)/synth/images --labels folder --tile 128 --part test --out $(DEMO)/test

demo: $(STAMP) $(DEMO)/train/manifest.json $(DEMO)/test/manifest.json
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node $(RANKS) -m nanodist pretrain demo \
	    data.store=$(DEMO)/train run_dir=$(DEMO)/run
	$(NANODIST) probe $(DEMO)/run --store $(DEMO)/train --test-store $(DEMO)/test --out $(DEMO)/run/probe
	test -d $(DEMO)/export || $(NANODIST) export $(DEMO)/run --to $(DEMO)/export
	$(NANODIST) report $(DEMO)/run --out $(DEMO)/report.html
	@echo "report: $(abspath $(DEMO)/report.html)"

# In their order the files of tests/e2e come first, which are the longest.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

clean-demo:
	rm -rf $(DEMO)
