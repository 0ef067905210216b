"""`python -m serving.harness --config F`: tasks of lm-evaluation-harness on a model as it will be served.

How likely a given answer is comes from the engine's own library, as in the certificate; free answers come from the engine itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from infra.chat import load_codec
from infra.contracts import ModelFacts, write_manifest
from infra.errors import ArtifactError, ConfigError
from infra.evaluation.harness import open_tasks, task_figures
from infra.evaluation.tasks import TASKS_NAME
from infra.files import write_json_atomic
from infra.process import Progress, run_program
from serving.config import ServeConfig
from serving.engines.base import Engine, Sampling
from serving.engines.registry import make_engine, verify_model
from serving.forced.opening import open_model
from serving.harness_config import HarnessJob

MAX_ANSWER_TOKENS = 256  # where a task says nothing: what the harness's other models take
SAMPLING_KEYS = ("temperature", "top_p", "top_k")


def run_tasks(job: HarnessJob) -> None:
    """Writes tasks.json. Raises ConfigError for a task that the harness does not have or whose rows it cannot read."""
    manifest = verify_model(job.model_dir, job.serve)
    if manifest.model is None:
        raise ArtifactError(f"{job.model_dir}: its manifest holds no model facts. Run the step that makes it again.")
    manager = open_tasks(job.tasks)
    model = ServedModel(job.model_dir, job.serve, manifest.model)
    figures = task_figures(model, job.tasks, manager, Progress(job.progress_file, "tasks").report)
    job.output_dir.mkdir(parents=True, exist_ok=True)
    write_json_atomic(job.output_dir / TASKS_NAME, figures)
    write_manifest(job.output_dir, "scores", job.provenance, parents={"model": manifest.digest})


class ServedModel(TemplateLM):  # type: ignore[misc]
    """A model of one engine, as the harness asks one.

    Making it raises ConfigError where the engine's library tells no whole distributions, ArtifactError where it cannot read the model.
    """

    def __init__(self, model_dir: Path, serve: ServeConfig, facts: ModelFacts) -> None:
        super().__init__()
        run = open_model(model_dir, serve)
        if run is None:
            raise ConfigError(
                f"evaluate.lm_eval: the engine {serve.engine!r} tells no probabilities of given answers. "
                "Set evaluate.lm_eval.on_served to false, or choose a format of another engine."
            )
        self._run, self._model_dir, self._serve, self._facts = run, model_dir, serve, facts
        self._codec = load_codec(model_dir)

    @property
    def eot_token_id(self) -> int:
        """The token that ends an answer."""
        return self._facts.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the BOS, or the end where the model has none."""
        bos = self._codec.special_tokens.get("bos_token")
        found = self._codec.tokenizer.token_to_id(bos) if bos else None
        return self.eot_token_id if found is None else int(found)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids as the tokenizer makes them by itself; a text that begins with the BOS gets no second one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._codec.token_text(self.prefix_token_id))
        return list(self._codec.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the context."""
        return [self._whole(text) for (text,) in (request.args for request in requests)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer a request, by an engine that is started for them; it decides how many run together."""
        return asyncio.run(self._answers([request.args for request in requests]))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return [self._likelihood(context, answer) for _, context, answer in requests]

    def _likelihood(self, context: Sequence[int], answer: Sequence[int]) -> tuple[float, bool]:
        """Of an answer, and whether each of its tokens is the likeliest; what is longer than the context loses its beginning."""
        ids = [*context, *answer][-self._facts.context_tokens :]
        wanted = numpy.asarray(ids[max(1, len(ids) - len(answer)) :])
        logprobs = self._run(ids, len(wanted))
        total = logprobs[numpy.arange(len(wanted)), wanted].sum(dtype=numpy.float64)
        return float(total), bool((logprobs.argmax(axis=-1) == wanted).all())

    def _whole(self, text: str) -> float:
        room = self._facts.context_tokens - 1  # beside the token that stands before a window
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, room, 1)
        return sum(self._likelihood(*make_disjoint_window(window))[0] for window in windows)

    async def _answers(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        engine = make_engine(self._model_dir, self._serve)
        await engine.start()
        try:
            return await asyncio.gather(*(self._answer(engine, text, given) for text, given in asked))
        finally:
            await engine.stop()

    async def _answer(self, engine: Engine, text: str, given: dict[str, Any]) -> str:
        kwargs = normalize_gen_kwargs(given, MAX_ANSWER_TOKENS)
        until = handle_stop_sequences(kwargs["until"], eos=None)
        room = self._facts.context_tokens - kwargs["max_gen_toks"]
        if room < 1:
            raise ConfigError(
                f"evaluate.lm_eval: a task asks for {kwargs['max_gen_toks']} tokens in a context of {self._facts.context_tokens}. "
                "Set max_gen_toks in the task's file."
            )
        chosen = {name: kwargs[name] for name in SAMPLING_KEYS if kwargs.get(name) is not None}
        sampling = Sampling(max_tokens=kwargs["max_gen_toks"], stop_ids=self._facts.stop_ids, **chosen)
        return str(postprocess_generated_text(await self._said(engine, self.tok_encode(text)[-room:], sampling, until), until, None))

    async def _said(self, engine: Engine, ids: Sequence[int], sampling: Sampling, until: Collection[str]) -> str:
        """What the engine says until one of the texts stands in it."""
        made: list[int] = []
        async with aclosing(engine.generate(ids, sampling)) as chunks:
            async for chunk in chunks:
                made += chunk.ids
                if any(stop in self._codec.decode(made) for stop in until if stop):
                    break
        return self._codec.decode(made)


if __name__ == "__main__":
    run_program(HarnessJob, run_tasks)
