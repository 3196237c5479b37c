# The image of Ray's head, workers and jobs alike.
#   docker build --tag minilm:0.1.0 .                                              PyTorch with CUDA
#   docker build --tag minilm:0.1.0-cpu --build-arg TORCH_OPTIONS="--index-url https://download.pytorch.org/whl/cpu" .
FROM python:3.11-slim

# wget: KubeRay's probes
RUN apt-get update && apt-get install --yes --no-install-recommends wget && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home minilm

WORKDIR /app
ARG TORCH_OPTIONS=""
COPY requirements.lock ./
RUN python -m pip install --no-cache-dir --no-deps $TORCH_OPTIONS "$(grep '^torch==' requirements.lock)"
RUN python -m pip install --no-cache-dir --requirement requirements.lock

COPY pyproject.toml README.md ./
COPY minilm minilm
COPY orchestrator orchestrator
COPY model model
COPY data data
COPY recipes recipes
RUN python -m pip install --no-cache-dir --no-deps . && python -m pip check

ENV MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/minilm
CMD ["minilm", "--help"]
