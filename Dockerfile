# The same install as `make install`, for Ray head and workers alike.
FROM python:3.11-slim

RUN apt-get update && apt-get install --yes --no-install-recommends git wget && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml README.md ./
COPY minilm minilm
COPY orchestrator orchestrator
COPY model model
COPY data data
COPY recipes recipes
RUN python -m pip install --no-cache-dir '.[remote]'
ENV MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false \
    RAY_USAGE_STATS_ENABLED=0
ENTRYPOINT []
CMD ["minilm", "--help"]
