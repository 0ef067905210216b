# The MLflow server, with the drivers of PostgreSQL and S3.
#   docker build -f infra/images/tracking.Dockerfile -t slipway-tracking:0.1.0 .
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS packages
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY infra/locks/tracking.txt /opt/locks/
RUN python -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-deps --require-hashes -r /opt/locks/tracking.txt
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
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/slipway /opt/slipway
# The root is read-only in a pod: the home folder and /tmp are mounted, and what libraries keep in a home goes to /tmp.
ENV PATH=/opt/venv/bin:${PATH} \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SLIPWAY_HOME=/var/lib/slipway \
    MLFLOW_DISABLE_TELEMETRY=true
USER 10001:10001
WORKDIR /var/lib/slipway
# What the image is for must import, or there is no image.
RUN slipway --version \
    && mlflow --version \
    && python -c "import boto3, flask_wtf, psycopg, psycopg_binary, mlflow.server, mlflow.store.tracking.sqlalchemy_store"
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "infra.healthcheck", "http://127.0.0.1:5000/health"]
ENTRYPOINT ["mlflow"]
CMD ["server", "--host", "0.0.0.0", "--port", "5000", "--workers", "1", "--backend-store-uri", "sqlite:////var/lib/slipway/mlflow.db"]
