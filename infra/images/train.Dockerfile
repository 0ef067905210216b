# Training, merging and quantizing, answers of the engine `torch`, and the nodes of a Ray cluster that does it.
#   docker build -f infra/images/train.Dockerfile -t slipway-train:0.1.0 .
#   docker build -f infra/images/train.Dockerfile -t slipway-train:0.1.0-gpu --build-arg TORCH=torch-cuda .
# The CPU build of torch lies on PyTorch's CPU index: name it with --build-arg PIP_EXTRA_INDEX_URL=...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG TORCH=torch-cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY infra/locks/${TORCH}.txt infra/locks/train.txt /opt/locks/
RUN python -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-deps --require-hashes -r /opt/locks/${TORCH}.txt \
    && /opt/venv/bin/python -m pip install --no-deps --require-hashes -r /opt/locks/train.txt
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
# KubeRay starts Ray by bash, and its own probes call wget. Debian keeps only the newest version of a package, so none is named here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
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
# What the image is for must import, or there is no image.
RUN slipway --version \
    && ray --version \
    && python -c "import infra.filesystems, infra.remote, ray.dashboard.optional_deps, ray.job_submission, ray.data, ray.train" \
    && python -c "import training.finetune, training.worker, training.merge, training.predict, training.score, training.data.rows" \
    && python -c "import serving.quantize.export, serving.quantize.openvino, serving.quantize.bnb" \
    && python -c "import serving.predict, serving.score, serving.engines.torch_steps, serving.forced.torch"
ENTRYPOINT ["python", "-m", "training.finetune"]
CMD ["--config", "/etc/slipway/training/config.yaml"]
