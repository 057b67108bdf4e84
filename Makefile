# The commands that a person types. Everything is installed into .venv; nothing outside the checkout is touched, but for
# what some tests want of the system: see `make browser` and `make servers`.

PYTHON  ?= python3
VENV    ?= .venv
ORACLE  ?= .venv-oracle
SKY     ?= .venv-sky
LM_EVAL ?= .venv-lm-eval
RECIPE  ?= tiny
WORK    ?= scalellm-work
BIN     := $(VENV)/bin
SCALELLM = $(BIN)/scalellm

.DEFAULT_GOAL := help
.PHONY: help demo browser servers tools test test-oracle test-sky test-schema test-lm-eval check build serve lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(VENV)/.cpu: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "scalellm needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "This Python has no venv module: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,quantize,gateway,plot,fleet]'
	@touch $@

$(VENV)/.dev: $(VENV)/.cpu
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,quantize,import,dev]'
	@touch $@

demo: $(VENV)/.cpu  ## set everything up and run the main job on a small Llama: build, real Triton, answers
	$(BIN)/python scripts/demo.py

BROWSERS := chromium-headless-shell chromium google-chrome google-chrome-stable chrome

browser:  ## as root of a Debian: install its Chromium, in which the page is tested; without one those tests are skipped
	@for program in $(BROWSERS) "$$SCALELLM_CHROMIUM"; do command -v "$$program" >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing Chromium for the tests of the page"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-headless-shell; } >/dev/null 2>&1 && exit 0; \
	fi; \
	echo "No Chromium here: the tests of the page in a browser will be skipped"

TOOLS := .tools

$(TOOLS)/.debs:
	@mkdir -p $(TOOLS) && cd $(TOOLS) && if command -v apt-get >/dev/null; then \
	  echo "Taking promtool and the schema of compose files out of Debian's packages"; \
	  apt-get download -qq prometheus docker-compose >/dev/null 2>&1 \
	    || { apt-get update -qq && apt-get download -qq prometheus docker-compose; } >/dev/null 2>&1; \
	  for package in *.deb; do [ -f "$$package" ] && dpkg-deb --extract "$$package" . && rm "$$package"; done; \
	fi; true
	@if [ -x $(TOOLS)/usr/bin/promtool ]; then touch $@; \
	  else echo "No promtool here: some tests of \`deploy export\` will be skipped"; fi

tools: $(TOOLS)/.debs  ## promtool and the schema of compose files, out of Debian's packages, for the tests of `deploy export`

FLEET_PACKAGES := etcd-server nats-server iproute2 iptables

servers:  ## as root of a Debian: etcd, NATS and iproute2, for the tests over many hosts; without them those are skipped
	@PATH="$$PATH:/usr/sbin:/sbin"; \
	for program in etcd nats-server ip iptables; do command -v $$program >/dev/null || missing=yes; done; \
	[ -z "$$missing" ] && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing $(FLEET_PACKAGES) for the tests over many hosts"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(FLEET_PACKAGES); } >/dev/null 2>&1 && done=yes; \
	  [ -d /run/systemd/system ] && systemctl disable --now etcd nats-server >/dev/null 2>&1; \
	  [ -n "$$done" ] && exit 0; \
	fi; \
	echo "No etcd, NATS or iproute2 here: the tests over many hosts will be skipped"

test: $(VENV)/.dev browser servers tools  ## set everything up and run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

$(ORACLE)/.installed: pyproject.toml constraints-oracle.txt
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["oracle"], sep="\n")' \
	  > $(ORACLE)/requirements.txt
	$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oracle.txt -r $(ORACLE)/requirements.txt
	@touch $@

.oracle/stamp.json: tests/oracle/export_with_modelopt.py $(ORACLE)/.installed
	$(ORACLE)/bin/python tests/oracle/export_with_modelopt.py .oracle

test-oracle: $(VENV)/.dev .oracle/stamp.json  ## compare the quantizers with NVIDIA ModelOpt's own output, tensor by tensor
	SCALELLM_ORACLE=.oracle $(BIN)/python -m pytest tests/oracle

$(SKY)/.installed: pyproject.toml
	$(PYTHON) -m venv $(SKY)
	$(SKY)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["sky"], sep="\n")' \
	  > $(SKY)/requirements.txt
	$(SKY)/bin/python -m pip install --quiet --disable-pip-version-check -r $(SKY)/requirements.txt
	@touch $@

test-sky: $(VENV)/.dev $(SKY)/.installed  ## let SkyPilot itself read the tasks that build on a rented GPU, and the services of `deploy export`
	SCALELLM_SKY=$(abspath $(SKY))/bin/python $(BIN)/python -m pytest tests/hosts/test_sky_reader.py tests/exports/test_skyserve.py

test-schema: $(VENV)/.dev  ## let Schemathesis ask the gateway at length what its OpenAPI documents offer
	SCALELLM_SCHEMA_EXAMPLES=500 $(BIN)/python -m pytest tests/gateway/test_schema.py

$(LM_EVAL)/.installed: pyproject.toml
	$(PYTHON) -m venv $(LM_EVAL)
	$(LM_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev,quantize,lm-eval]'
	@touch $@

test-lm-eval: $(LM_EVAL)/.installed  ## run tasks of the lm-evaluation-harness itself on small checkpoints
	$(LM_EVAL)/bin/python -m pytest tests/quality/test_tasks.py

check: $(VENV)/.dev  ## style, types, layers, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

build: $(VENV)/.cpu  ## make build RECIPE=rtx4090: plan, quantize, build, emit the Triton model repository
	$(SCALELLM) build --recipe $(RECIPE) --work $(WORK)

serve: $(VENV)/.cpu  ## make serve RECIPE=tiny: launch Triton on what was built, and the gateway in front of it
	$(SCALELLM) serve --recipe $(RECIPE) --work $(WORK) --gateway

lock: $(VENV)/.dev $(ORACLE)/.installed  ## write constraints.txt and constraints-oracle.txt from what is installed
	$(BIN)/python scripts/lock.py constraints.txt
	$(ORACLE)/bin/python scripts/lock.py constraints-oracle.txt

clean:  ## remove the environment, the demo's model and everything built
	rm -rf $(VENV) $(ORACLE) $(SKY) $(LM_EVAL) $(TOOLS) .oracle .demo $(WORK)
