# Set-up, demo, tests. `make demo` and `make test` work from a fresh clone with Python 3.10 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
PEERS := .peers
PIP = $(1)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check peers parity consumers benchmarks clean

demo: $(VENV)/.ready
	$(VENV)/bin/roundel demo

test: check

# Format, lint, types, floors, tests: the one command that CI runs.
check: $(VENV)/.ready
	$(VENV)/bin/ruff format --check src tests benchmarks tools
	$(VENV)/bin/ruff check src tests benchmarks tools
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --dist loadfile

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call PIP,$(VENV)) --constraint constraints.txt torch
	$(call PIP,$(VENV)) --constraint constraints.txt --editable '.[dev]'
	touch $@

# The tools that roundel is compared with, each in an environment of its own; never imported by ours.
peers: $(PEERS)/auto-round/.ready $(PEERS)/gptqmodel/.ready $(PEERS)/llmcompressor/.ready $(PEERS)/hqq/.ready \
    $(PEERS)/gguf/.ready $(PEERS)/mlx/.ready $(PEERS)/bnb/.ready $(PEERS)/lmeval/.ready $(PEERS)/triton/.ready \
    $(PEERS)/llama-cpp/.ready

$(PEERS)/auto-round/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/auto-round
	$(call PIP,$(PEERS)/auto-round) torch==2.13.0
	$(call PIP,$(PEERS)/auto-round) torch==2.13.0 auto-round==0.16.1 auto-round-lib==0.16.0 transformers==5.23.0 \
	    compressed-tensors==0.20.0 accelerate==1.15.0 numba==0.68.1
	touch $@

# GPTQModel asks for a newer torch than it needs, which would bring CUDA along; so its needs are named here.
$(PEERS)/gptqmodel/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/gptqmodel
	$(call PIP,$(PEERS)/gptqmodel) torch==2.13.0
	$(call PIP,$(PEERS)/gptqmodel) torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 optimum==2.3.0 torchao==0.18.0 \
	    datasets==5.2.0 defuser==0.0.28 device-smi==0.5.7 dill logbar==0.4.15 maturin ninja pillow protobuf pyarrow \
	    pypcre==0.6.4 requests threadpoolctl tokenicer==0.0.14 numba==0.68.1
	$(call PIP,$(PEERS)/gptqmodel) --no-deps gptqmodel==7.7.0
	touch $@

# llm-compressor takes transformers up to 5.17 only.
$(PEERS)/llmcompressor/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/llmcompressor
	$(call PIP,$(PEERS)/llmcompressor) torch==2.13.0
	$(call PIP,$(PEERS)/llmcompressor) torch==2.13.0 llmcompressor==0.14.0.1 compressed-tensors==0.19.0 \
	    transformers==5.17.0 accelerate==1.15.0 datasets==5.2.0
	touch $@

$(PEERS)/hqq/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/hqq
	$(call PIP,$(PEERS)/hqq) torch==2.13.0
	$(call PIP,$(PEERS)/hqq) torch==2.13.0 hqq==0.2.8.post1 transformers==5.23.0 accelerate==1.15.0
	touch $@

# llama.cpp as a wheel, whose library exports ggml's quantizer; and its reader of GGUF files.
$(PEERS)/gguf/.ready:
	$(PYTHON) -m venv $(PEERS)/gguf
	$(call PIP,$(PEERS)/gguf) xllamacpp==2026.10.11549 gguf==0.19.0 numpy==2.4.6
	touch $@

# llama.cpp's source, which the llama-cpp-python package carries: its converter, and its quantizer as a library.
$(PEERS)/llama-cpp/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/llama-cpp
	$(call PIP,$(PEERS)/llama-cpp) torch==2.13.0
	$(call PIP,$(PEERS)/llama-cpp) torch==2.13.0 transformers==5.23.0 sentencepiece==0.2.1 protobuf==7.36.2 \
	    requests==2.34.2 numpy==2.4.6 pyyaml cmake ninja
	cd $(PEERS)/llama-cpp && bin/python -m pip download --quiet --no-deps --no-binary :all: llama-cpp-python==0.3.36
	mkdir -p $(PEERS)/llama-cpp/llama.cpp
	tar -xzf $(PEERS)/llama-cpp/llama_cpp_python-0.3.36.tar.gz -C $(PEERS)/llama-cpp/llama.cpp --strip-components=3 \
	    llama_cpp_python-0.3.36/vendor/llama.cpp
	cd $(PEERS)/llama-cpp && export PATH="$$PWD/bin:$$PATH" && cmake -S llama.cpp -B build -G Ninja \
	    -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
	    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF && cmake --build build --target llama
	touch $@

$(PEERS)/mlx/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/mlx
	$(call PIP,$(PEERS)/mlx) 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.23.0
	touch $@

$(PEERS)/bnb/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/bnb
	$(call PIP,$(PEERS)/bnb) torch==2.13.0
	$(call PIP,$(PEERS)/bnb) torch==2.13.0 bitsandbytes==0.50.2 transformers==5.23.0 accelerate==1.15.0
	touch $@

# The library that runs tasks, with what roundel itself needs: here `roundel eval --tasks` is run in.
$(PEERS)/lmeval/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/lmeval
	$(call PIP,$(PEERS)/lmeval) --upgrade pip uv
	$(PEERS)/lmeval/bin/uv pip install --quiet --python $(PEERS)/lmeval/bin/python torch==2.13.0 'lm_eval[hf]==0.4.13' \
	    transformers==5.23.0 numba==0.68.1 click rich pyyaml
	touch $@

# Triton with what roundel itself needs: its kernels are interpreted and compiled here, which takes no card.
$(PEERS)/triton/.ready: constraints.txt
	$(PYTHON) -m venv $(PEERS)/triton
	$(call PIP,$(PEERS)/triton) torch==2.13.0
	$(call PIP,$(PEERS)/triton) torch==2.13.0 triton==3.9.0 numba==0.68.1 transformers==5.23.0 click rich pyyaml
	touch $@

# Bit for bit against auto-round, and our files in the runtimes that read them.
parity: $(VENV)/.ready peers
	$(VENV)/bin/python -m pytest tests/peers/test_auto_round.py tests/peers/test_ggml.py

consumers: $(VENV)/.ready peers
	$(VENV)/bin/python -m pytest tests/peers/test_consumers.py tests/peers/test_llm_compressor.py \
	    tests/peers/test_gguf_files.py tests/peers/test_gguf_models.py tests/peers/test_gguf_converter.py \
	    tests/peers/test_gguf_float_files.py

benchmarks: $(VENV)/.ready peers
	$(VENV)/bin/python benchmarks/model_free.py

clean:
	rm -rf $(VENV) $(PEERS) build dist src/*.egg-info
