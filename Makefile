# run · test · lint · lab · docs · bench · soak: each makes .venv first if it is not there
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# a tool that tries the hub at run time should fail at once, not hang
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: run test lab docs bench soak format lint lock readme dockerfile tinker-server

run: .venv  ## the self-improving loop on the embedded model and the shipped poems
	$(BIN)/poetry-iter run loop

test: .venv  ## notebooks and package agree, the notebooks' own tests, then pytest
	$(BIN)/python tests/check_clean.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs/lib --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: .venv  ## kills, faults and nonsense, for some hours: make soak ARGS="--kills 12 --files 2000 --only loop"
	$(BIN)/python tests/soak.py $(ARGS)

lab: .venv  ## JupyterLab in nbs/
	$(BIN)/jupyter lab --notebook-dir nbs

docs: .venv  ## the docs site, from the notebooks and their outputs: docs/_build/html/index.html
	$(BIN)/sphinx-build -q -W --keep-going -j auto -c docs -d docs/_build/doctrees . docs/_build/html
	@echo docs/_build/html/index.html

bench: .venv  ## speed as ratios, measured in one run
	for f in bench/*.py; do $(BIN)/python $$f || exit 1; done

readme: .venv  ## README.md from nbs/index.ipynb
	$(BIN)/python docs/readme.py

dockerfile:  ## cloud/Dockerfile from settings.ini
	$(PYTHON) cloud/dockerfile.py

tinker-server: .tinker-venv  ## an open Tinker server for the embedded model, on the CPU: TINKER_BASE_URL=http://127.0.0.1:8765 poetry-iter run loop -p engine=tinker
	.tinker-venv/bin/python cloud/tinker_server.py $(ARGS)

# 2.2 GB, three minutes; torch first, so that no other package chooses it
.tinker-venv:
	$(PYTHON) -m venv .tinker-venv.new
	.tinker-venv.new/bin/python -m pip install -q "$$(sed -n 's/^requirements = \(torch[^ ]*\).*/\1/p' settings.ini)"
	.tinker-venv.new/bin/python -m pip install -q "skyrl[tinker,jax]==0.3.0"
	mv .tinker-venv.new .tinker-venv

format: .venv
	$(BIN)/ruff format tests bench docs setup.py

lint: .venv  ## ruff, and pyright over the package
	$(BIN)/ruff check .
	$(BIN)/pyright

lock: .venv  ## requirements-lock.txt: the versions with which the tests pass
	(echo "# versions with which the tests passed, Python 3.11, Linux; made by: make lock"; \
	 $(BIN)/python -m pip list --format=freeze --exclude-editable | sed "s/+cpu$$//") > requirements-lock.txt

.venv: settings.ini setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip "setuptools<81" wheel
	$(BIN)/python -m pip install -q --no-compile "$$(sed -n 's/^requirements = \(torch[^ ]*\).*/\1/p' settings.ini)"
	$(BIN)/python -m pip install -q --no-compile -e ".[dev,lab,docs]"
	$(BIN)/python -m pip install -q --no-compile --no-deps $$(sed -n 's/^unsloth_requirements = //p' settings.ini)
	touch .venv
