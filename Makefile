PYTHON ?= python3
BIN := .venv/bin
# Two tests at a time, a file in one process; threads that wait must not keep the others' cores.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
STAMP := .venv/.installed

.PHONY: help setup demo test test-all check golden benchmark pocket results findings docs clean

DATA ?= sets
# Of `results`: an encoder or run, the student of random teachers, a run whose checkpoints count, and
# what to measure of all of them.
MODELS = $(if $(STUDENT),--student $(STUDENT)) $(if $(CONTROL),--control $(CONTROL)) \
	$(if $(CURVE),--curve $(CURVE)) $(SUBJECTS)

help:  ## list what make can do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP)  ## install the package and everything it can use into .venv

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]"
	@touch $(STAMP)

demo: $(STAMP)  ## the whole idea on real photographs, less than 4 minutes on two cores
	$(BIN)/radio demo

test: check  ## checks, then the fast tests (real Ray, no network)
	$(PYTEST)

test-all: check  ## checks, then every test, the slow ones too
	$(PYTEST) -m "not gpu and not network"

check: $(STAMP)  ## ruff, mypy strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

golden: $(STAMP)  ## rewrite the golden losses after a change of numerics (look at the diff)
	$(BIN)/python tests/golden.py

benchmark: $(STAMP)  ## measure, one after the other, on the image sets in DATA (2.5 h), write docs/cluster_figures.md
	for name in step_overhead mosaic overlap memory recovery; do $(BIN)/python -m benchmarks.$$name || exit 1; done
	for name in streams codec chaos; do $(BIN)/python -m benchmarks.$$name --data $(DATA) || exit 1; done
	$(BIN)/python -m benchmarks.chaos --data $(DATA) --only teacher --workers 0 --faults 12 --steps 80
	$(BIN)/python -m benchmarks.cluster_page

pocket: $(STAMP)  ## train the pocket teachers anew on the image sets in DATA (hours)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[pocket]"
	$(BIN)/python -m teachers.pocket.recipes --data $(DATA)

results: $(STAMP)  ## measure teachers and student on the image sets in DATA, write docs/results.md
	$(BIN)/python -m benchmarks.quality --data $(DATA) $(MODELS)

findings: $(STAMP)  ## measure the papers' findings on the image sets in DATA, write docs/findings.md
	$(BIN)/python -m benchmarks.findings --data $(DATA)

docs: $(STAMP)  ## remake the generated parts of docs/ from the code
	$(BIN)/python docs/generate.py

clean:  ## remove the environment, caches and runs
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache runs dist
