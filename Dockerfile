# docker build -t cellfast .
# With the CUDA part: docker build -t cellfast --build-arg BUILD=nvidia/cuda:13.0.0-devel-ubuntu24.04 .  (run it with --gpus all)
ARG BUILD=python:3.12-slim-bookworm

FROM ${BUILD} AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ python3 python3-venv && rm -rf /var/lib/apt/lists/*
COPY . /src
# The wheel serves every Python from 3.10 on, whichever builds it.
RUN python3 -m venv /build \
 && /build/bin/pip install --no-cache-dir "torch>=2.10" "setuptools>=77" wheel ninja packaging numpy \
 && /build/bin/pip wheel --no-deps --no-build-isolation -w /wheels /src

FROM python:3.12-slim-bookworm
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -r /wheels
# Loops compiled by numba are kept here; mount a volume to keep them longer than the container.
ENV CELLFAST_CACHE=/var/cache/cellfast
RUN mkdir -m 1777 /var/cache/cellfast
WORKDIR /data
ENTRYPOINT ["cellfast"]
CMD ["--help"]
