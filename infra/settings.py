"""Environment variables, read here and nowhere else: addresses, paths and secrets only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast, get_args

from pydantic import SecretStr

from infra.config import Config
from infra.errors import ConfigError
from infra.filesystems import check_url
from infra.store_address import store_address

# Keep freed memory and back it with huge pages: a training step maps and unmaps hundreds of MB otherwise, for 1.2 times its time.
TRAINING_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
}

ExecutorName = Literal["local", "ray", "kubernetes"]
IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
RAY_JOBS_ADDRESS = "http://127.0.0.1:8265"


MIN_TOKEN_CHARS = 32


class Settings(Config):
    """Where this machine keeps things; never part of any identity."""

    home: Path
    """Folder of artifacts, runs and the local MLflow store (`SLIPWAY_HOME`, default `.slipway` here)."""
    tracking_uri: str
    """MLflow store (`MLFLOW_TRACKING_URI`, default sqlite in the home folder, by absolute path); holds no password."""
    artifact_root: str | None = None
    """Where runs keep files if MLflow's store is a database (`SLIPWAY_ARTIFACT_ROOT`, for example `s3://bucket/slipway`); default here."""
    api_key: SecretStr | None = None
    """Key that the commands send to a server that asks for one (`SLIPWAY_API_KEY`)."""
    signing_key: Path | None = None
    """File of the private key that signs promoted models (`SLIPWAY_SIGNING_KEY`); absent means one in `home`, made on first use."""
    ray_address: str | None = None
    """Running Ray cluster that training joins (`RAY_ADDRESS`, `auto` or `host:port`); absent means a Ray of this machine for each run."""

    store: str | None = None
    """Folder or bucket, by fsspec URL, where artifacts are for all machines to reach (`SLIPWAY_STORE`, for example `s3://bucket/slipway`);
    absent means that they stay on this machine."""
    executor: ExecutorName = "local"
    """Where programs run (`SLIPWAY_EXECUTOR`, or `--executor`): as subprocesses, as jobs of a Ray cluster, or as RayJobs on Kubernetes."""
    ray_jobs_address: str = RAY_JOBS_ADDRESS
    """Ray's Jobs API for `--executor ray` (`RAY_API_SERVER_ADDRESS`, as for Ray's own commands)."""
    ray_token: SecretStr | None = None
    """Key of a Ray cluster that asks for one, from where Ray's own commands take it: `RAY_AUTH_TOKEN`, the file that
    `RAY_AUTH_TOKEN_PATH` names, `~/.ray/auth_token`."""

    kubernetes_values: Path | None = None
    """Values of helm/training with which each RayJob is rendered (`SLIPWAY_KUBERNETES_VALUES`); absent means the chart's own."""

    @property
    def artifacts_dir(self) -> Path:
        """Content-addressed outputs of steps."""
        return self.home / "artifacts"

    @property
    def staging_dir(self) -> Path:
        """Outputs of steps that have not finished; a killed step resumes from here."""
        return self.home / "staging"

    @property
    def run_files_root(self) -> str | Path | None:
        """Where MLflow is to keep the files of runs; None where its server knows."""
        if self.tracking_uri.startswith(("http://", "https://")):
            return None
        return self.artifact_root or self.home / "mlartifacts"

    @property
    def api_keys_file(self) -> Path:
        """Where `slipway keys` keeps the keys' digests unless told otherwise."""
        return self.home / "api_keys.json"

    @property
    def signing_key_file(self) -> Path:
        """The private key, ed25519 in PEM; its public key lies beside it with the suffix `.pub`."""
        return self.signing_key or self.home / "keys" / "signing.pem"

    @property
    def runs_dir(self) -> Path:
        """One folder a run: resolved spec, logs, report."""
        return self.home / "runs"


def load_settings(executor: str | None = None) -> Settings:
    """The settings of this process's environment, `executor` before the one that it names.

    Raises ConfigError on a home that cannot be a folder, and on an executor or a store of a kind that there is not.
    """
    home = Path(os.environ.get("SLIPWAY_HOME") or ".slipway").expanduser().absolute()
    if home.exists() and not home.is_dir():
        raise ConfigError(f"SLIPWAY_HOME={home}: this is a file; a folder is needed.")
    named = f"--executor {executor}" if executor else f"SLIPWAY_EXECUTOR={os.environ.get('SLIPWAY_EXECUTOR')}"
    executor = executor or os.environ.get("SLIPWAY_EXECUTOR") or "local"
    if executor not in get_args(ExecutorName):
        raise ConfigError(f"{named}: one of {', '.join(get_args(ExecutorName))} is needed.")
    store = os.environ.get("SLIPWAY_STORE")
    if store and check_url(store, "SLIPWAY_STORE=") == "file" and "://" not in store:
        store = Path(store).expanduser().absolute().as_uri()  # programs that we start have other folders
    uri, secrets = store_address(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}", "MLFLOW_TRACKING_URI")
    os.environ.update(secrets)  # MLflow and PostgreSQL's client read them there, in the programs that we start too
    return Settings(
        home=home,
        tracking_uri=uri,
        artifact_root=os.environ.get("SLIPWAY_ARTIFACT_ROOT") or None,
        api_key=SecretStr(key) if (key := os.environ.get("SLIPWAY_API_KEY")) else None,
        signing_key=Path(path).expanduser().absolute() if (path := os.environ.get("SLIPWAY_SIGNING_KEY")) else None,
        ray_address=os.environ.get("RAY_ADDRESS") or None,
        store=store or None,
        executor=cast(ExecutorName, executor),
        ray_jobs_address=(os.environ.get("RAY_API_SERVER_ADDRESS") or RAY_JOBS_ADDRESS).rstrip("/"),
        ray_token=_ray_token(),
        kubernetes_values=Path(path).expanduser().absolute() if (path := os.environ.get("SLIPWAY_KUBERNETES_VALUES")) else None,
    )


class ClusterAddresses(Config):
    """What gateways and replicas of a cluster must know of each other."""

    gateways: tuple[tuple[str, int], ...]
    """Where replicas make themselves known (`SLIPWAY_GATEWAYS`, `host:port`, several with commas): names, looked up again and again."""
    front_token: SecretStr
    """The secret by which they know each other (first line of the file that `SLIPWAY_FRONT_TOKEN_FILE` names)."""
    wake_url: str | None = None
    """Ray Serve's own address (`SLIPWAY_WAKE_URL`), for models that sleep while nobody asks; absent means that none does."""


def load_cluster_addresses() -> ClusterAddresses:
    """The addresses in this process's environment. Raises ConfigError where they are absent or of another form."""
    token_file = os.environ.get("SLIPWAY_FRONT_TOKEN_FILE", "")
    try:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"SLIPWAY_FRONT_TOKEN_FILE={token_file}: cannot be read ({error.strerror}). Name a file with the secret that gateways and "
            "replicas share; `openssl rand -hex 32` makes one."
        ) from error
    if len(token) < MIN_TOKEN_CHARS:
        raise ConfigError(
            f"{token_file}: {len(token)} characters. A secret of at least {MIN_TOKEN_CHARS} is needed: `openssl rand -hex 32`."
        )
    return ClusterAddresses(
        gateways=tuple(_host_and_port(text) for text in os.environ.get("SLIPWAY_GATEWAYS", "").split(",") if text),
        front_token=SecretStr(token),
        wake_url=os.environ.get("SLIPWAY_WAKE_URL") or None,
    )


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.strip().rpartition(":")
    if not (host and port.isdigit()):
        raise ConfigError(f"SLIPWAY_GATEWAYS has {text!r}: the form is host:port, for example slipway-gateways:8001.")
    return host.strip("[]"), int(port)


def kubeconfig_files() -> str:
    """Where clusters are described, as the kubectl of this environment finds it: one file, or several with the path separator between."""
    return os.environ.get("KUBECONFIG") or str(Path("~/.kube/config").expanduser())


def _ray_token() -> SecretStr | None:
    token = os.environ.get("RAY_AUTH_TOKEN")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not token and file.is_file():
        token = file.read_text(encoding="utf-8").strip()
    return SecretStr(token) if token else None


def traces_are_wanted() -> bool:
    """Whether OpenTelemetry's own variables name a collector of traces. Raises ConfigError where they ask for what is not spoken here."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    found = next(((name, value) for name in names if (value := os.environ.get(name))), None)
    is_disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if found is None or is_disabled:
        return False
    name, endpoint = found
    if not endpoint.startswith(("http://", "https://")):
        raise ConfigError(f"{name}={endpoint}: an address of OTLP over HTTP is needed, for example {name}=http://127.0.0.1:4318.")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = os.environ.get(name) or "http/protobuf"
        if protocol != "http/protobuf":
            raise ConfigError(f"{name}={protocol}: http/protobuf is what is spoken here. Unset it, and name the collector's port for HTTP.")
    return True


def child_environment(module: str = "training") -> dict[str, str]:
    """Environment for a program that we start, `python -m module`: this process's, and what `program_variables` adds.

    Only training gets its allocator settings: with them an engine of OpenVINO took 172 MB more after one request.
    In a Ray job OMP_NUM_THREADS is what Ray reserved for the entrypoint, 1, while the program is to use the machine.
    """
    left_out = {"OMP_NUM_THREADS"} if IN_RAY_JOB in os.environ else set()
    inherited = {name: value for name, value in os.environ.items() if TRAINING_ALLOCATOR.get(name) != value and name not in left_out}
    return {**inherited, **program_variables(), **(TRAINING_ALLOCATOR if module.split(".")[0] == "training" else {})}


def program_variables() -> dict[str, str]:
    """Variables that every program of ours runs with: no telemetry, no hub look-ups, no progress bars in logs."""
    return {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",  # 1024 by default, 0.25 GB after 40 steps of packs that differ in size; as fast
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # metric_stream.py tries for longer, and keeps figures on disk meanwhile
        "PYTHONUNBUFFERED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
