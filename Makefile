# make quickstart | test | lint | wheel | clean
#
# The first call makes .venv and fills it from requirements.lock; later calls use it as it is and
# reach for no network until the lock, pyproject.toml or the version change.
#
#   PYTHON=python3.12      the interpreter that .venv is made from
#   GLAC_PYTHON=python3    use this ready environment instead; nothing is made or installed
#   WORKERS=0              interpreter tests in one process (default: two)
#   PYTEST_ARGS="-k name"  more arguments for both pytest runs

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
VENV := .venv

ifeq ($(strip $(GLAC_PYTHON)),)
RUN := $(VENV)/bin/python
READY := $(VENV)/.project
else
RUN := $(GLAC_PYTHON)
READY :=
endif

.PHONY: quickstart test lint wheel clean
.DEFAULT_GOAL := quickstart

quickstart: $(READY)
	@$(RUN) -m glac quickstart

# Triton chooses between compiler and interpreter once, at import, hence two processes. Both always
# run, and each ends with pytest's own summary line.
test: $(READY)
	@status=0; \
	$(RUN) -m pytest -m "not interpreter" $(PYTEST_ARGS) || status=$$?; \
	TRITON_INTERPRET=1 $(RUN) -m pytest -m interpreter -n $(WORKERS) $(PYTEST_ARGS) \
		tests/interpreter || status=$$?; \
	exit $$status

lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

# dist/glac-*.whl with packs for every listed GPU inside: what users of these GPUs install. Packs are
# build products, so no commit holds them; a second call compiles only what has changed. Until `make
# clean`, kernels of this checkout come from them too, after those of GLAC_PACK_PATH and the cache.
wheel: $(READY)
	@$(RUN) -m glac build --shipped
	@rm -rf build
	@$(RUN) -m pip --disable-pip-version-check wheel --no-deps --no-build-isolation --no-index \
		--wheel-dir dist .
	@rm -rf build

# A half-filled environment has no stamp, so the next call takes up where this one stopped.
$(VENV)/.locked: requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.lock
	@touch $@

$(VENV)/.project: $(VENV)/.locked pyproject.toml glac/__init__.py
	$(VENV)/bin/python -m pip install --disable-pip-version-check \
		--no-deps --no-build-isolation --no-index -e .
	@touch $@

clean:
	rm -rf $(VENV) build dist glac/packs glac.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
