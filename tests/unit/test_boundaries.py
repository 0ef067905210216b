"""The floors, held at run time as import-linter holds them in the text."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "peft", "ray", "openvino", "openvino_genai", "optimum", "nncf", "mlflow", "pandas", "numpy"}
LIGHT_MODULES = [
    "pipelines.cli",
    "pipelines.commands",
    "pipelines.cluster.connect",
    "pipelines.keys",
    "pipelines.pipeline",
    "pipelines.status",
    "training.config",
    "serving.config",
    "infra.chat",
    "infra.registry",
    "infra.tracking",
    "infra.evaluation.scorers",
]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_light_module_in_fresh_process_imports_nothing_heavy(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert module in loaded
    assert HEAVY.isdisjoint(loaded)


def test_program_that_starts_training_loads_no_torch() -> None:
    # Its workers do; a second of import in the driver and in Ray Train's controller each would delay the first step by both.
    code = (
        "import sys, training.finetune, ray.train.v2.api.data_parallel_trainer; print('ray.train' in sys.modules, 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["True", "False"]


def test_help_in_fresh_process_imports_no_pipeline_code() -> None:
    # `slipway --help` answers in 0.3 s only while the commands' own imports stay inside them.
    code = "import sys, pipelines.cli; print('pydantic' in sys.modules, 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]
