PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
ARGS ?=
BENCHMARKS ?= start host mixture step overhead loop league

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help figures class-removal text-to-image test test-cpus test-lowest benchmark lint clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

figures: $(VENV)/figures.stamp ## draw the figures (ARGS="..." is passed on)
	$(BIN)/python -m figures $(ARGS)

class-removal: $(VENV)/models.stamp ## train networks on digits, sweep and plot (ARGS="--quick": shipped ones)
	$(BIN)/python -m dng_models.class_removal run $(ARGS)

text-to-image: $(VENV)/models.stamp ## prompts without something, in a laboratory (ARGS="--quick": under a minute)
	$(BIN)/python -m dng_models.text_to_image run $(ARGS)

test: $(VENV)/test.stamp ## run the tests (PYTEST_ARGS="-m slow" runs the long ones)
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 10 $(PYTEST_ARGS)

# What ATEN_CPU_CAPABILITY can make of this CPU, other than what it is; matrix products of an older
# one have other last bits.
OLDER_CPUS = from torch.backends.cpu import get_cpu_capability as own; \
	known = ["default", "avx2", "avx512"]; own = own().lower(); \
	print(*(known[: known.index(own)] if own in known else []))

test-cpus: $(VENV)/test.stamp ## run the tests of networks as on each older kind of CPU
	for cpu in $$($(BIN)/python -c '$(OLDER_CPUS)'); do \
		echo "ATEN_CPU_CAPABILITY=$$cpu"; \
		ATEN_CPU_CAPABILITY=$$cpu $(BIN)/python -m pytest -n 2 --dist loadfile -q \
			tests/models tests/figures tests/kernels/test_step.py $(PYTEST_ARGS) \
			|| exit 1; \
	done

test-lowest: ## run the tests on the lowest supported versions, in .venv-lowest (Python 3.11)
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[test]'
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile -o filterwarnings=default $(PYTEST_ARGS)

benchmark: $(VENV)/models.stamp ## time everything into benchmarks/out (ARGS="--quick", BENCHMARKS="mixture step")
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks $$name $(ARGS) || exit; done

lint: $(VENV)/dev.stamp ## check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## remove the environment, caches and drawn figures
	rm -rf $(VENV) $(VENV)-lowest build dist figures/out benchmarks/out .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find benchmarks dng_* figures tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Python 3.11 or newer is needed, and "$(PYTHON)" is not.' >&2; \
		echo 'Name one that is: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)' >&2; \
		exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/%.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
