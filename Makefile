# Two commands do all the set-up: `make run` (the main job) and `make test`.
# A site's own MPI: make run MPIEXEC=/path/to/mpiexec

PYTHON  ?= python3
RANKS   ?= 4
EPOCHS  ?= 10
RUNS    ?= runs
JOBS    ?= 2

# With the site's mpiexec the virtual environment gets no MPI of its own, and mpi4py loads the library beside mpiexec.
ifdef MPIEXEC
VENV      ?= .venv-site
EXTRAS    := plot
SITE_LIBS := $(abspath $(dir $(MPIEXEC))/../lib)
export LD_LIBRARY_PATH := $(SITE_LIBS)$(if $(LD_LIBRARY_PATH),:$(LD_LIBRARY_PATH))
else
VENV      ?= .venv
EXTRAS    := mpich,plot
MPIEXEC   := $(abspath $(VENV)/bin/mpiexec)
endif

BIN      := $(VENV)/bin
TRAIN    := $(MPIEXEC) -n $(RANKS) $(BIN)/qnewton-mpi train --replicas $(RANKS) --epochs $(EPOCHS) --overwrite
# Under mpiexec no rank sees the terminal; make does.
PROGRESS := $(shell if [ -t 2 ]; then echo bar; else echo lines; fi)
export MPIEXEC
# Open MPI: 4 ranks on a machine with fewer cores.
export OMPI_MCA_rmaps_base_oversubscribe := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe

.PHONY: help run test test-quick coverage test-slurm lint docs reference bench bench-peers bench-workloads bench-batches clean

help:  ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  with MPIEXEC=/path/to/mpiexec a site's own MPI; RANKS=$(RANKS) EPOCHS=$(EPOCHS) PYTHON=$(PYTHON)"

run: $(VENV)/.installed  ## Train the default method and tuned SGD on the embedded images; draw NLL against epochs
	$(TRAIN) --method kronecker --progress $(PROGRESS) --output $(RUNS)/kronecker.h5
	$(TRAIN) --method sgd --lr 0.5 --progress $(PROGRESS) --output $(RUNS)/sgd.h5
	$(BIN)/qnewton-mpi plot $(RUNS)/kronecker.h5 $(RUNS)/sgd.h5 --output $(RUNS)/nll.png --overwrite

test: $(VENV)/.installed-dev  ## Run the whole test suite: one process, then under mpiexec on 1, 2, 3 and 4 ranks
	$(BIN)/python -m pytest -q --durations=10 --ignore=tests/slurm
	for ranks in 1 2 3 4; do echo "-- $$ranks rank(s)"; $(MPIEXEC) -n $$ranks $(BIN)/python -m pytest -q tests/mpi || exit 1; done

test-quick: $(VENV)/.installed-dev  ## Run what starts no processes of its own, on one process: two minutes at most
	$(BIN)/python -m pytest -q -m "not slow" --durations=5 --ignore=tests/slurm

coverage: $(VENV)/.installed-dev  ## Tell which lines of the core, of parallel and of training the tests of this process and of two ranks run
	COVERAGE_FILE=.coverage.1 $(BIN)/coverage run -m pytest -q --ignore=tests/slurm
	$(MPIEXEC) -n 2 $(BIN)/coverage run -p -m pytest -q tests/mpi
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

test-slurm: $(VENV)/.installed-dev  ## Prove the batch scripts on a SLURM of two virtual nodes (root; slurm-wlm, munge)
	$(BIN)/python -m pytest -q tests/slurm

lint: $(VENV)/.installed-dev  ## Check style (ruff) and types (mypy, strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## Build the documents as a site, docs/_build/html/index.html; a warning is an error
	$(BIN)/python -m sphinx -E -n -W --keep-going -q -d docs/_build/doctrees docs docs/_build/html

reference: $(VENV)/.installed  ## Write what the program itself tells: the tables of options and keys in docs/reference/, slurm/
	$(BIN)/python docs/reference.py
	$(BIN)/qnewton-mpi slurm slurm --overwrite

bench: $(VENV)/.installed-dev  ## Time steps against one Allreduce, the convnet's gradients beside PyTorch's
	$(MPIEXEC) -n $(RANKS) $(BIN)/qnewton-mpi bench

bench-peers: $(VENV)/.installed-peers  ## Time steps of the default beside DistributedDataParallel's: AdamW, Muon, SOAP
	$(MPIEXEC) -n 2 $(BIN)/python -m benchmarks.ddp $(if $(DATA),--data-dir $(DATA))

bench-workloads: $(VENV)/.installed-peers  ## The default beside tuned peers on all workloads (hours); JOBS, DATA (folder)
	$(BIN)/python -m benchmarks.workloads suite --jobs $(JOBS) $(if $(DATA),--data-dir $(DATA))
	$(BIN)/python -m benchmarks.workloads table --output docs/explanation/workloads.md

bench-batches: $(VENV)/.installed-peers  ## Steps to a fixed loss for batches of 256 to 16,384 (2 hours); JOBS, DATA
	$(BIN)/python -m benchmarks.batches suite --jobs $(JOBS) $(if $(DATA),--data-dir $(DATA))
	$(BIN)/python -m benchmarks.batches table --output docs/explanation/batches.md

clean:  ## Remove the virtual environments, the built site, and what the runs left
	rm -rf .venv .venv-site .venv-gpu docs/_build $(RUNS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS),dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS),docs]'
	touch $@

$(VENV)/.installed-peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS),peers]'
	touch $@
