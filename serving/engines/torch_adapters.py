"""Low-rank products beside the linear layers of a transformers model: y = x W^T + (x A^T) (scale B)^T, one adapter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from serving.adapter_files import PEFT_PREFIX, AdapterFiles
from serving.limits import LAYERS

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A^T (in, rank) and scale B^T (rank, out) by the module's name."""


class AdapterLayers:
    """The linear layers of `model`, each of which adds the product of the adapter that is put on."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._factors: Factors = {}
        self._names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in LAYERS]
        for name in self._names:
            model.get_submodule(name).register_forward_hook(partial(self._add, name))

    def load(self, files: AdapterFiles) -> Factors:
        """An adapter in the model's precision, where the model is. Raises ValueError where one of its tensors changes no layer."""
        tensors, modules = load_file(files.weights), files.modules
        if unknown := sorted(modules - set(self._names)):
            raise ValueError(f"it changes {unknown[:3]}, which this model lacks")
        place: dict[str, Any] = {"device": self._model.device, "dtype": self._model.dtype}
        stems = {module: f"{PEFT_PREFIX}{module}.lora_" for module in modules}
        return {
            module: (tensors[f"{stem}A.weight"].to(**place).t(), (files.scale * tensors[f"{stem}B.weight"]).to(**place).t())
            for module, stem in stems.items()
        }

    @contextmanager
    def put_on(self, factors: Factors) -> Iterator[None]:
        """The model answers with this adapter while the block runs."""
        self._factors = factors
        try:
            yield
        finally:
            self._factors = {}

    def _add(self, name: str, _module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if name not in self._factors:
            return output
        a, b = self._factors[name]
        product: Tensor = (inputs[0].to(a.dtype) @ a) @ b
        return output + product.to(output.dtype)
