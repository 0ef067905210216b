"""What one replica can do, as measured: tokens/s by number of streams, and on what it was. `curves.yaml` holds those that come along."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from pydantic import Field, model_validator

from infra.config import Config, load, load_yaml, parse
from infra.errors import ConfigError
from serving.autoscaling.machine import Speed

CURVES_FILE = Path(__file__).with_name("curves.yaml")


class Curve(Config):
    """One engine with one model on one kind of replica."""

    engine: str
    model: str
    hardware: str
    """What one replica ran on."""
    source: str
    """Who measured it, how, and when."""
    cpus_per_replica: float = Field(gt=0)
    """Cores that one replica had for itself."""
    gpus_per_replica: int = Field(0, ge=0)
    tokens_per_s: dict[int, float] = Field(min_length=1)
    """New tokens a second of all streams together, by the number of streams at once."""
    prompt_tokens_per_s: float = Field(gt=0)
    """How fast prompts are read that no cache holds."""
    cold_start_s: float | None = Field(None, gt=0)
    """From asking for a replica to its first answer, with the model on disk; absent where nobody measured it."""
    max_running_requests: int = Field(64, ge=1)
    """Requests that one replica decodes together, `serve.max_running_requests`."""
    node: str
    """The kind of node, of those in `curves.yaml`, that a plan counts in unless told otherwise."""

    @model_validator(mode="after")
    def _check_points(self) -> Curve:
        points = sorted(self.tokens_per_s.items())
        if points[0][0] != 1 or any(rate <= 0 for _, rate in points):
            raise ValueError(f"tokens_per_s is {self.tokens_per_s}. One stream, and more than 0 tokens/s for each number, are needed.")
        if slower := next((later for (_, rate), later in pairwise(points) if later[1] < 0.8 * rate), None):
            raise ValueError(
                f"tokens_per_s falls to {slower[1]} at {slower[0]} streams. Measure again on a quiet machine, or leave it out."
            )
        return self

    @property
    def speed(self) -> Speed:
        """The same for the simulator."""
        return Speed(
            tokens_per_s=tuple(sorted(self.tokens_per_s.items())),
            prompt_tokens_per_s=self.prompt_tokens_per_s,
            cold_start_s=self.cold_start_s or Speed().cold_start_s,
            num_places=self.max_running_requests,
        )


class Node(Config):
    """One kind of machine of a cluster."""

    cpus: float = Field(gt=0)
    """Cores of it."""
    gpus: int = Field(0, ge=0)
    """GPUs of it."""
    reserved_cpus: float = Field(1.0, ge=0)
    """Cores for the node's own agents and Ray's, which no replica gets."""
    usd_per_hour: float | None = Field(None, ge=0)
    """Its price; absent means that none is told."""

    def num_replicas(self, curve: Curve) -> int:
        """Replicas that fit on one; 0 where none does."""
        by_cpus = max(0, int((self.cpus - self.reserved_cpus) / curve.cpus_per_replica + 1e-9))
        return min(by_cpus, self.gpus // curve.gpus_per_replica) if curve.gpus_per_replica else by_cpus


class Measured(Config):
    """What `curves.yaml` holds."""

    nodes: dict[str, Node]
    curves: dict[str, Curve]

    @model_validator(mode="after")
    def _check_nodes(self) -> Measured:
        if unknown := sorted({curve.node for curve in self.curves.values()} - self.nodes.keys()):
            raise ValueError(f"curves name the nodes {', '.join(unknown)}, and there are {', '.join(self.nodes)}.")
        return self


def read_measured() -> Measured:
    """The curves and nodes that come along."""
    return parse(Measured, load_yaml(CURVES_FILE), str(CURVES_FILE))


def find_curve(named: str, measured: Measured) -> tuple[str, Curve]:
    """A curve by name, or from a file that `slipway bench curve` wrote. Raises ConfigError where it is neither."""
    if named in measured.curves:
        return named, measured.curves[named]
    path = Path(named)
    if path.suffix not in (".yaml", ".yml", ".json"):
        known = ", ".join(measured.curves)
        raise ConfigError(f"--curve {named}: there are {known}. Name one of them, or a file that `slipway bench curve` wrote.")
    if not path.is_file():
        raise ConfigError(f"--curve {named}: no such file. `slipway bench curve --url URL --output {named}` measures one.")
    curve = load(Curve, path)
    if curve.node not in measured.nodes:
        raise ConfigError(f"{path}: node is {curve.node!r}, and there are {', '.join(measured.nodes)}. Set it to one of them.")
    return path.stem, curve
