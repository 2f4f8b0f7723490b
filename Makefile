# Two commands: `make demo` and `make test`. Each sets up its own virtual environment first and is safe to run again.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OLDEST := .venv-oldest/bin
VLLM := .venv-vllm/bin
# One thread a process keeps small tests fast on few cores; the demo and the benchmark use all of them.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo models test test-newest test-oldest test-public test-architectures test-vllm test-gpu memcheck fuzz lint format docs bench-cpu load-test wheel clean

demo: .venv/.installed
	$(BIN)/python research/demo.py

# Downloads, checks and converts public models into outputs/models; MODELS="smollm2" makes one.
models: .venv/.installed
	$(BIN)/python research/public_models.py $(MODELS)

test: lint test-newest test-oldest

# Two processes, each of which runs every other file; what the second has to say comes when both are done.
test-newest: .venv/.installed
	@echo "== tests, newest supported transformers =="
	@log=$$(mktemp); \
	$(TEST_ENV) $(BIN)/python -m pytest -p no:cacheprovider --shard 2/2 >$$log 2>&1 & other=$$!; \
	$(TEST_ENV) $(BIN)/python -m pytest -p no:cacheprovider --shard 1/2; own=$$?; \
	wait $$other; other=$$?; cat $$log; rm -f $$log; exit $$((own + other))

# The parts that touch transformers and PEFT, at the other end of the supported range, in two processes as well.
test-oldest: .venv-oldest/.installed
	@echo "== integration tests, oldest supported transformers =="
	@$(TEST_ENV) $(OLDEST)/python -m pytest -p no:cacheprovider tests/hf tests/invariants --shard 1/2 & first=$$!; \
	$(TEST_ENV) $(OLDEST)/python -m pytest -p no:cacheprovider tests/hf tests/invariants --shard 2/2; second=$$?; \
	wait $$first && exit $$second

test-public: .venv/.installed
	@echo "== a public model: SmolLM2-135M-Instruct =="
	$(BIN)/python research/public_models.py smollm2
	$(TEST_ENV) $(BIN)/python -m pytest tests/public

# Every family of causal language models, shared by two processes; docs/architectures.md is held to what they find.
test-architectures: .venv/.installed
	@echo "== every architecture, tiny, against its unpatched model =="
	@$(TEST_ENV) $(BIN)/python -m pytest -p no:cacheprovider tests/architectures --shard 1/2 & first=$$!; \
	$(TEST_ENV) $(BIN)/python -m pytest -p no:cacheprovider tests/architectures --shard 2/2; second=$$?; \
	wait $$first && exit $$second

# The plug-in in engines of vLLM, on the CPU, in the two processes of the tests and over HTTP.
test-vllm: .venv-vllm/.installed
	@echo "== vLLM with gates =="
	@$(TEST_ENV) $(VLLM)/python -m pytest -p no:cacheprovider tests/vllm --shard 1/2 & first=$$!; \
	$(TEST_ENV) $(VLLM)/python -m pytest -p no:cacheprovider tests/vllm --shard 2/2; second=$$?; \
	wait $$first && exit $$second

# These two run with the Python at hand, which must have a CUDA build of torch.
test-gpu:
	python -m pytest tests/ops

memcheck:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
		python -m pytest tests/ops/test_block_sparse_attention_triton.py -k "padding or packed or unselected"

# Thousands of damaged arguments and files; the suite tries a hundred. SEERATTN_FUZZ_SEED begins elsewhere.
fuzz: .venv/.installed
	SEERATTN_FUZZ_TRIES=$${SEERATTN_FUZZ_TRIES:-2000} $(TEST_ENV) $(BIN)/python -m pytest tests/fuzz

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The manual as a site in outputs/site. --quiet would hide warnings from --strict as well. The variable silences an
# advertisement of the theme.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@! grep -rlE '<(script|link|img)[^>]*(src|href)="(https?:)?//' outputs/site || { echo "pages must need no other site"; exit 1; }

bench-cpu: .venv/.installed
	$(BIN)/python research/kernels/cpu.py

# Many requests at once on `seerattn serve`, and a server that is killed; about 15 minutes.
load-test: .venv/.installed
	$(TEST_ENV) $(BIN)/python research/serve_load.py

# Builds a wheel and a source archive into outputs/dist, and tries the wheel where nothing else is installed.
wheel: .venv/.installed
	rm -rf outputs/dist
	$(BIN)/python -m build --outdir outputs/dist .
	$(BIN)/python research/public_models.py smollm2
	$(BIN)/python research/try_wheel.py outputs/dist/*.whl

.venv/.installed: pyproject.toml requirements.txt
	@echo "== installing into .venv =="
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv-oldest/.installed: pyproject.toml requirements-oldest.txt
	@echo "== installing into .venv-oldest =="
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --upgrade pip
	$(OLDEST)/python -m pip install --quiet -r requirements-oldest.txt
	$(OLDEST)/python -m pip install --quiet --no-deps --editable .
	touch $@

# Of torchvision and its like only builds for CUDA are found, with which vLLM cannot be imported; text needs none.
.venv-vllm/.installed: pyproject.toml requirements-vllm.txt
	@echo "== installing into .venv-vllm =="
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/python -m pip install --quiet --upgrade pip
	$(VLLM)/python -m pip install --quiet -r requirements-vllm.txt
	$(VLLM)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/python -m pip install --quiet --no-deps --editable .
	touch $@

# Sources are read, not imported, so neither the package nor torch is installed here.
.venv-docs/.installed: pyproject.toml requirements-docs.txt
	@echo "== installing into .venv-docs =="
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --upgrade pip
	.venv-docs/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-vllm .venv-docs outputs
