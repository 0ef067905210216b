# Serving by vLLM on GPUs, or by torch what bitsandbytes quantized, as nodes of a Ray cluster. CUDA's libraries come with the packages; the
# driver is the node's.
#   docker build -f infra/images/serve-gpu.Dockerfile -t slipway-serve-gpu:0.1.0 .
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY infra/locks/serve-gpu.txt /opt/locks/
RUN python -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-deps --require-hashes -r /opt/locks/serve-gpu.txt
COPY pyproject.toml README.md /opt/slipway/
COPY helm/ /opt/slipway/helm/
COPY infra/ /opt/slipway/infra/
COPY pipelines/ /opt/slipway/pipelines/
COPY serving/ /opt/slipway/serving/
COPY training/ /opt/slipway/training/
RUN /opt/venv/bin/python -m pip install --no-deps --no-build-isolation --editable /opt/slipway \
    && /opt/venv/bin/python -m compileall -q /opt/slipway

FROM ${PYTHON_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# KubeRay starts Ray by bash, and its own probes call wget; Triton compiles a launcher by gcc when an engine starts. Debian keeps only the
# newest version of a package, so none is named here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 slipway \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/slipway --create-home --shell /usr/sbin/nologin slipway
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/slipway /opt/slipway
# The root is read-only in a pod: the home folder and /tmp are mounted, and what libraries keep in a home goes to /tmp.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SLIPWAY_HOME=/var/lib/slipway
USER 10001:10001
WORKDIR /var/lib/slipway
# What the image is for must import, or there is no image. vLLM itself wants a GPU for some of its modules; those that are asked of it here
# do without.
RUN slipway --version \
    && ray --version \
    && python -c "import infra.filesystems, infra.remote, ray.dashboard.optional_deps, ray.job_submission, ray.serve" \
    && python -c "import serving.app, serving.predict, serving.score, serving.engines.vllm, serving.engines.torch_steps" \
    && python -c "import accelerate, bitsandbytes, serving.batch.worker, serving.otlp" \
    && python -c "import torch, vllm.version; assert torch.version.cuda, torch.__version__"
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-m", "infra.healthcheck", "http://127.0.0.1:8000/health"]
ENTRYPOINT ["python", "-m", "serving.app"]
CMD ["--config", "/etc/slipway/serving/config.yaml"]
