# The README's environment with CUDA: set up by scripts/environment.sh, as quickstart.sh and test.sh do.
# Build: docker build -t llava .
# Run:   docker run --gpus all --ipc host -it -v "$PWD/playground:/llava/playground" -v "$PWD/checkpoints:/llava/checkpoints" \
#            -v "$HOME/.cache/huggingface:/root/.cache/huggingface" llava bash scripts/v1_5/finetune_task_lora.sh
# torch brings its own CUDA libraries; the machine needs NVIDIA's driver (580 or newer) and container toolkit. g++ is for
# DeepSpeed's offload, which compiles its optimizer for the CPU, and for Triton.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN apt-get update && apt-get install -y --no-install-recommends g++ procps python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /llava
ENV VENV=/opt/venv PIP_NO_CACHE_DIR=1

# What the installation reads; packages are installed again only when these files change.
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY scripts/environment.sh scripts/install_packages.py scripts/
COPY llava/__init__.py llava/library_noise.py llava/original_names.py llava/
RUN DEVICE=cuda EXTRAS=train,quant && source scripts/environment.sh

COPY . .
ENV PATH=/opt/venv/bin:$PATH VENV=none
CMD ["bash"]
