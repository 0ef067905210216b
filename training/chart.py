"""The values of the chart helm/training, but for the spec, which is of a floor above (pipelines/training_chart.py)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from infra.kube import (
    ChartValues,
    Image,
    KubeModel,
    Monitor,
    RayNetworkPolicy,
    Resources,
    Scheduling,
    ServiceAccount,
    Toleration,
)
from infra.kube_stores import ArtifactStore, Tracking
from infra.kube_types import OPTIONAL_NAME_PATTERN, OptionalName, Quantity
from infra.kube_volumes import MountedClaim, Storage
from training.config import Workers

RAY_NAME_CHARS = 47
"""Longest name that KubeRay takes: it adds to it what makes the names of pods."""
_TIMES = r"(\*|[0-9A-Za-z]+(-[0-9A-Za-z]+)?)(/[0-9]+)?"
CRON_PATTERN = rf"^(@(hourly|daily|weekly|monthly|yearly|annually|midnight)|{_TIMES}(,{_TIMES})*( {_TIMES}(,{_TIMES})*){{4}})?$"
MODULE_PATTERN = r"^[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)+$"
PATH_PATTERN = r"^([A-Za-z0-9_@.-]+/)*[A-Za-z0-9_@.-]+$"
QueueName = Annotated[str, Field(max_length=63, pattern=OPTIONAL_NAME_PATTERN)]


class RayPod(Scheduling):
    """A pod of Ray."""

    resources: Resources = Resources()
    """Of its container; GPUs are named under `limits`, such as `nvidia.com/gpu: 1`."""


class WorkerPod(RayPod):
    """The pods that training is spread over."""

    workers_per_pod: int = Field(1, ge=1, le=64)
    """Workers of Ray Train in one pod, such as one a GPU; `rayJob.numWorkers` over this is the number of pods."""


class EnginePod(RayPod):
    """A pod in which a candidate answers, as the server that would serve it does."""

    image: Image
    """Image with this engine."""


class Home(Storage):
    """Volume of the driver's home: the runs, and artifacts that it need not fetch from the store again."""

    enabled: bool = False
    """Whether it outlives the driver's pod; if not, the next driver takes from the store what it goes on with."""


class Signing(KubeModel):
    """The key with which the driver signs what it promotes; servers take only what a key signed that they trust."""

    existing_secret: OptionalName = ""
    """Secret with the keys `signing.pem` and `signing.pub`, as `.slipway/keys` holds them. Empty means a key that the driver makes in its
    home, and that ends with it."""


class RayJob(KubeModel):
    """One heavy step as a RayJob of KubeRay: `python -m MODULE` in a Ray cluster of its own. The kubernetes executor sets this."""

    enabled: bool = False
    """Whether there is one."""
    name: str = Field("", max_length=RAY_NAME_CHARS, pattern=r"^([a-z]([-a-z0-9]*[a-z0-9])?)?$")
    """Name of the RayJob; empty means the release's."""
    module: str = Field("training.finetune", pattern=MODULE_PATTERN)
    """The program."""
    job: str = Field("", pattern=f"{PATH_PATTERN}|^$")
    """Its configuration's path in the store, such as `staging/train-0123456789abcdef/config.json`."""
    engine: str = Field("", pattern=r"^[a-z0-9_]*$")
    """Engine that the program opens, a key of `engines`; empty means none."""
    num_workers: Workers | None = None
    """Workers of Ray Train, a number or `[min, max]`; absent means a program of one process, which gets a pod alone (`solo`)."""
    submission_mode: Literal["K8sJobMode", "HTTPMode"] = "K8sJobMode"
    """Who hands the program to Ray: a pod, which shows its log, or the operator itself."""
    submitter_backoff_limit: int = Field(3, ge=0, le=100)
    """How often the pod that hands it over is started again; the program is not begun twice by that."""
    backoff_limit: int = Field(2, ge=0, le=100)
    """How often a failed Ray cluster is made again; training goes on from its last checkpoint in the store."""
    active_deadline_seconds: int = Field(7 * 86400, ge=1)
    """Longest time of the whole job."""
    pre_running_deadline_seconds: int | None = Field(None, ge=1)
    """Longest time until the program runs; absent means that it may wait for nodes as long as the job may take."""
    ttl_seconds_after_finished: int = Field(30, ge=0)
    """How long a finished job's Ray cluster stays, GPUs included, where no driver is left to delete it; the RayJob itself stays in any
    case."""
    suspend: bool = False
    """Made but not begun; Kueue sets it itself."""
    queue_name: QueueName = ""
    """Kueue's LocalQueue; empty means that Kueue has no part in it."""
    queue_priority_class: QueueName = ""
    """Kueue's WorkloadPriorityClass."""


class Pipeline(Scheduling):
    """The driver: `slipway run` in a pod, which starts the heavy steps as RayJobs."""

    enabled: bool = False
    """Whether a Job runs the spec once, now."""
    resources: Resources = Resources()
    """Of its container; GPUs are named under `limits`, such as `nvidia.com/gpu: 1`."""
    schedule: str = Field("", pattern=CRON_PATTERN)
    """Cron times at which a CronJob runs it; empty means never."""
    time_zone: str = Field("Etc/UTC", pattern=r"^[A-Za-z0-9_+/-]+$")
    """In which `schedule` is read."""
    suspend: bool = False
    """Whether the CronJob pauses."""
    starting_deadline_seconds: int = Field(3600, ge=10)
    """How late a scheduled run may still begin."""
    backoff_limit: int = Field(3, ge=0, le=100)
    """How often a driver is started again that ended by exit code 75, or whose node was lost. Bad input (2) and a gate's refusal (3) end
    the Job at once."""
    active_deadline_seconds: int = Field(14 * 86400, ge=1)
    """Longest time of one run."""
    ttl_seconds_after_finished: int = Field(7 * 86400, ge=0)
    """How long a finished Job stays."""
    history: int = Field(3, ge=0, le=100)
    """Finished Jobs that the CronJob keeps of each kind."""
    service_account: ServiceAccount = ServiceAccount()
    """The driver's account: it may make, watch and delete RayJobs, and read pods and their logs, in its namespace."""
    run_again: str = Field("", max_length=63, pattern=r"^[A-Za-z0-9._-]*$")
    """Any new word here makes a new Job of the same spec."""
    arguments: list[str] = Field(default_factory=list)
    """More arguments of `slipway run`, such as `--set train.epochs=1`."""


def _engines() -> dict[str, EnginePod]:
    gpu = Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
    cpu_only = Resources(requests={"cpu": 4, "memory": "8Gi"}, limits={"cpu": 4, "memory": "8Gi"})
    with_gpu = Resources(requests={"cpu": 4, "memory": "24Gi"}, limits={"cpu": 4, "memory": "24Gi", "nvidia.com/gpu": 1})
    return {
        "openvino": EnginePod(image=Image(repository="slipway-serve-cpu"), resources=cpu_only),
        "torch": EnginePod(image=Image(repository="slipway-train"), resources=cpu_only),
        "vllm": EnginePod(image=Image(repository="slipway-serve-gpu"), resources=with_gpu, tolerations=[gpu]),
    }


class TrainingChart(ChartValues):
    """The values of helm/training."""

    network_policy: RayNetworkPolicy = RayNetworkPolicy()
    monitor: Monitor = Monitor()
    image: Image = Image(repository="slipway-train")
    """Image of Ray's head and workers: training and quantization."""
    pipeline_image: Image = Image(repository="slipway-pipeline")
    """Image of the driver."""
    store: ArtifactStore = ArtifactStore()
    tracking: Tracking = Tracking()
    volumes: list[MountedClaim] = Field(default_factory=list)
    """Volumes with datasets, base models or a hub's cache (`HF_HOME`), in driver and jobs alike."""
    signing: Signing = Signing()
    home: Home = Home()
    scratch: Quantity = "50Gi"
    """Disk of each Ray pod for its home: inputs, checkpoints, outputs."""
    head: RayPod = RayPod(resources=Resources(requests={"cpu": 1, "memory": "4Gi"}, limits={"memory": "4Gi"}))
    """Ray's head where there are workers; it computes nothing."""
    workers: WorkerPod = WorkerPod(resources=Resources(requests={"cpu": 4, "memory": "16Gi"}, limits={"memory": "16Gi"}))
    solo: RayPod = RayPod(resources=Resources(requests={"cpu": 4, "memory": "16Gi"}, limits={"memory": "16Gi"}))
    """The one pod of a program that is one process: merge, quantize, answers."""
    engines: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], EnginePod] = Field(default_factory=_engines)
    """The one pod of a program that opens an engine, by the engine's name."""
    ray_token: bool = True
    """Whether Ray asks for a token, which KubeRay makes, before it lets anyone run code or see its dashboard."""
    ray_job: RayJob = RayJob()
    pipeline: Pipeline = Pipeline(resources=Resources(requests={"cpu": "500m", "memory": "1Gi"}, limits={"memory": "2Gi"}))

    @model_validator(mode="after")
    def _can_travel(self) -> Self:
        problems = []
        if self.ray_job.enabled and not self.ray_job.job:
            problems.append("rayJob.enabled needs rayJob.job, the path of a configuration in the store.")
        if self.ray_job.engine and self.ray_job.engine not in self.engines:
            problems.append(f"rayJob.engine {self.ray_job.engine!r} is none of engines: {', '.join(self.engines)}.")
        if (self.pipeline.enabled or self.pipeline.schedule) and not self.tracking.uri:
            problems.append("tracking.uri is empty, and runs and models would end with the driver's pod. Name an MLflow server.")
        if (self.ray_job.enabled or self.pipeline.enabled or self.pipeline.schedule) and not self.store.url:
            problems.append("store.url is empty. Artifacts travel by it: give a URL, such as s3://bucket/slipway.")
        if problems:
            raise ValueError(" ".join(problems))
        return self
