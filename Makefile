# make demo          from a bare clone: environment, phantoms, VAE, U-Net, new MRIs, t-SNE
# make test          the tests, minutes on two cores; FULL=1: all of them
# make lint          ruff puts right what it can, mypy reads the types
# make lock          the newest versions that requirements*.txt allow, into the lock files that make installs from
# make bench-env     .venv-bench: what the benchmarks' peers need
PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
DEMO := checkpoints/demo

.PHONY: demo test lint lock bench-env clean
.DELETE_ON_ERROR:

demo: $(DEMO)/report.txt
	@cat $(DEMO)/report.txt

# Each line resumes or skips what is done, so an interrupted demo goes on where it stopped.
$(DEMO)/report.txt: | $(BIN)/ready
	$(PY) pre_train.py demo
	$(PY) train.py demo
	$(PY) predict.py demo --class-name AD NC --num-images 192 --guidance 1.25 --reject-copies --out $(DEMO)/new
	$(PY) tsne.py demo
	@{ echo; echo "The demo is done. All of it is synthetic: phantoms drawn by phantom.py, and images generated from them."; \
	   echo; echo "Ventricle fraction, measured by thresholding, in the training phantoms:"; \
	   $(PY) phantom.py cache/phantoms-v3-64/train --measure; \
	   echo "and in the generated images:"; $(PY) phantom.py $(DEMO)/new --measure; echo; \
	   echo "Pictures (report.html has most of them on one page; python app.py --run demo opens one to play with):"; \
	   for f in report.html new/grid.png new/denoising.gif vae/reconstructions.gif diffusion/samples.gif \
	   diffusion/curves.png tsne/tsne.png; do echo "  $(DEMO)/$$f"; done; } > $@.tmp
	@mv $@.tmp $@

test: $(BIN)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	FULL=$(FULL) $(PY) -m pytest -q

lint: $(BIN)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# uv, inside the environment, installs in seconds what pip takes minutes for. Compiled once, torch imports twice as fast.
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) has no venv module: apt install python3-venv, or name another with make PYTHON=..."; exit 2; }
	$(BIN)/pip install -q --disable-pip-version-check uv

INSTALL := $(BIN)/uv pip install -q --compile-bytecode

$(BIN)/ready: requirements.lock | $(BIN)/uv
	$(INSTALL) --python $(PY) -r requirements.lock
	@touch $@

$(BIN)/ready-dev: requirements-dev.lock $(BIN)/ready
	$(INSTALL) --python $(PY) -r requirements-dev.lock
	@touch $@

bench-env: .venv-bench/ready

.venv-bench/ready: requirements-bench.lock | $(BIN)/uv
	$(BIN)/uv venv -q --allow-existing --python $(PY) .venv-bench
	$(INSTALL) --python .venv-bench/bin/python -r requirements-bench.lock
	@touch $@

# Linux, macOS and Python 3.10 to 3.13 in one file each.
LOCK := $(BIN)/uv pip compile -q --upgrade --universal --python-version 3.10 --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make lock"

lock: | $(BIN)/uv
	$(LOCK) requirements.txt -o requirements.lock
	$(LOCK) requirements-dev.txt -c requirements.lock -o requirements-dev.lock
	$(LOCK) requirements-bench.txt -o requirements-bench.lock

clean:
	rm -rf .venv .venv-bench cache $(DEMO)
