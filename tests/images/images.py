"""The images that there are, and what each holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "infra" / "images"
LOCKS = REPOSITORY / "infra" / "locks"


@dataclass(frozen=True)
class Image:
    """One of them."""

    name: str
    locks: tuple[str, ...]
    extras: tuple[str, ...]
    """Of pyproject: what the locks must satisfy beside the package's own needs."""
    absent: tuple[str, ...]
    """What must not be in it."""
    unimportable: dict[str, str]
    """Prefixes of our modules that need what it has not, and what that is; every other module of its packages imports."""
    packages: tuple[str, ...]
    serves: bool = False

    @property
    def file(self) -> Path:
        """Its Dockerfile."""
        return FOLDER / f"{self.name}.Dockerfile"


TORCH = {
    "serving.engines.torch": "torch",
    "serving.engines.sampler": "torch",
    "serving.engines.vllm": "torch",
    "serving.forced.torch": "torch",
}
NOWHERE = {"serving.peers": "a peer", "training.peers": "a peer", "serving.harness": "lm-eval", "training.harness": "lm-eval"}
IMAGES = (
    Image(
        "train",
        ("torch-cpu", "train"),
        ("train", "quantize"),
        ("vllm", "torchvision", "trl", "pytest", "llama_cpp"),
        NOWHERE,
        ("training", "serving.quantize", "infra"),
    ),
    Image(
        "serve-cpu",
        ("serve-cpu",),
        ("serve",),
        ("torch", "transformers", "vllm", "triton", "nncf", "optimum", "peft", "pytest"),
        {**NOWHERE, **TORCH},
        ("serving", "infra"),
        serves=True,
    ),
    Image(
        "serve-gpu",
        ("serve-gpu",),
        ("serve-vllm",),
        ("openvino", "openvino_genai", "nncf", "optimum", "peft", "pytest"),
        {
            **NOWHERE,
            "serving.engines.openvino_steps": "openvino",
            "serving.forced.openvino": "openvino",
            "serving.bench": "openvino",
            "serving.soak": "openvino",
        },
        ("serving", "infra"),
        serves=True,
    ),
    Image(
        "pipeline",
        ("pipeline",),
        ("kubernetes",),
        ("torch", "ray", "transformers", "openvino", "vllm", "pandas", "sklearn", "pytest"),
        {},
        ("pipelines", "infra", "training.config", "serving.config"),
    ),
    Image(
        "tracking",
        ("tracking",),
        (),
        ("torch", "ray", "transformers", "openvino", "vllm", "pytest"),
        {},
        ("infra",),
        serves=True,
    ),
)
