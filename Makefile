# make demo   from a bare clone: environment, phantoms, VAE, U-Net, new MRIs, t-SNE
# make test   the tests
PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
DEMO := checkpoints/demo

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(DEMO)/report.txt
	@cat $(DEMO)/report.txt

# Each line resumes or skips what is done, so an interrupted demo goes on where it stopped.
$(DEMO)/report.txt: | $(BIN)/ready
	$(PY) pre_train.py demo
	$(PY) train.py demo
	$(PY) predict.py demo --class-name AD NC --num-images 128 --reject-copies --out $(DEMO)/new
	$(PY) tsne.py demo
	@{ echo; echo "The demo is done. All of it is synthetic: phantoms drawn by phantom.py, and images generated from them."; \
	   echo; echo "Ventricle fraction, measured by thresholding, in the training phantoms:"; \
	   $(PY) phantom.py cache/phantoms-64/train --measure; \
	   echo "and in the generated images:"; $(PY) phantom.py $(DEMO)/new --measure; echo; \
	   echo "Pictures (report.html has most of them on one page; python app.py --run demo opens one to play with):"; \
	   for f in report.html new/grid.png new/denoising.gif vae/reconstructions.gif diffusion/samples.gif \
	   diffusion/curves.png tsne/tsne.png; do echo "  $(DEMO)/$$f"; done; } > $@.tmp
	@mv $@.tmp $@

test: $(BIN)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PY) -m pytest -q

lint: $(BIN)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv, inside the environment, installs in seconds what pip takes minutes for. Compiled once, torch imports twice as fast.
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.10 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv || { echo "error: $(PYTHON) has no venv module: apt install python3-venv, or name another with make PYTHON=..."; exit 2; }
	$(BIN)/pip install -q --disable-pip-version-check uv

$(BIN)/ready: requirements.txt | $(BIN)/uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(PY) -r requirements.txt
	@touch $@

$(BIN)/ready-dev: requirements-dev.txt $(BIN)/ready
	$(BIN)/uv pip install -q --compile-bytecode --python $(PY) -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv cache $(DEMO)
