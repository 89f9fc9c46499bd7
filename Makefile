# make train: a GPT on real text, its optimizer state sharded over two processes.  make test: every test.
# make train TRAIN_ARGS="--save-every 100 --resume": the same, from where it was interrupted.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# An editable install holds the native modules: build them again when a source of theirs changes.
NATIVE := setup.py pyproject.toml constraints.txt pyzero/ops/build_spec.py $(wildcard pyzero/csrc/*.* pyzero/csrc/*/*)

# Processes of `make train`: one per GPU, two without.
NPROC = $(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count() or 2)")

.PHONY: train resume test test-quick lint format bench profile gpu gpu-quick clean

train: $(VENV)/.examples
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) examples/train_gpt.py $(TRAIN_ARGS)

# The picture in docs/checkpoints.md: a run on two ranks, and one that is killed, goes on on three, is killed again, goes on on one.
ON = $(BIN)/torchrun --standalone --nproc-per-node
RUN = examples/train_gpt.py --no-baseline --layers 2 --width 128 --steps 400
PARTS = $(RUN) --out runs/parts --save-every 50
resume: $(VENV)/.examples
	rm -rf runs/parts
	$(ON) 2 $(RUN) --out runs/whole
	! $(ON) 2 $(PARTS) --kill-at 170
	! $(ON) 3 $(PARTS) --resume --kill-at 290
	$(ON) 1 $(PARTS) --resume --over runs/whole
	cp runs/parts/resume.png docs/resume.png

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The ops without their emulators, and of the optimizer its norm and its bits; see CONTRIBUTING.md.
QUICK := tests/ops tests/build/test_build_spec.py tests/engine/test_config.py tests/gradients/test_norm.py \
	tests/optimizer/test_optimizer.py::test_sharded_equals_unsharded_bit_for_bit

test-quick: $(VENV)/.test
	$(BIN)/python -m pytest -q -m "not slow and not cuda" -k "not triton and not shim" $(QUICK) $(PYTEST_ARGS)

# What README, docs/measured.md and docs/scaling.md quote: make bench BENCH_ARGS="--out benchmarks/results/cpu"
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks --quick $(BENCH_ARGS)

profile: $(VENV)/.test
	$(BIN)/python -m benchmarks.profile_step

# On a machine with a GPU, with the packages that $(PYTHON) has: kernels, tests, benchmarks, compute-sanitizer.
gpu gpu-quick:
	$(PYTHON) tests/support/gpu_check.py $(if $(findstring quick,$@),--quick) $(if $(GPU_LIMIT_S),--limit-s $(GPU_LIMIT_S))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p pyzero
	git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.h' | xargs $(BIN)/clang-format -i

$(VENV)/.dev: export PYZERO_BUILD := none

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(NATIVE) | $(BIN)/python
	$(INSTALL) -e ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info pyzero/*.so
