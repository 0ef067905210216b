"""A few answers of the model as it is during training, for people to read beside the losses."""

from __future__ import annotations

from typing import Any

from infra.answers import PROMPTS_NAME, read_prompts
from infra.chat import load_codec
from infra.contracts import read_manifest
from training import generate
from training.config import FinetuneJob
from training.loop import Trainer

MAX_NEW_TOKENS = 48


class Samples:
    """The first held-out prompts, answered anew at each evaluation; none where workers hold parts of the model only."""

    def __init__(self, job: FinetuneJob) -> None:
        facts = read_manifest(job.base_dir).model
        assert facts is not None
        self._codec, self._stop_ids = load_codec(job.base_dir), facts.stop_ids
        self._prompts = read_prompts(job.tokens_dir, job.train.sample_rows)

    def table(self, trainer: Trainer) -> dict[str, list[Any]]:
        """Columns step, prompt, expected and answer."""
        model: Any = trainer.model.causal_model
        trainer.model.eval()
        answers = generate.greedy_answers(model, [prompt.ids for prompt in self._prompts], self._stop_ids, MAX_NEW_TOKENS)
        return {
            "step": [trainer.step] * len(answers),
            "prompt": [self._codec.decode(prompt.ids) for prompt in self._prompts],
            "expected": [prompt.expected for prompt in self._prompts],
            "answer": [self._codec.decode(ids) for ids, _ in answers],
        }


def open_samples(job: FinetuneJob, trainer: Trainer) -> Samples | None:
    """Samples where they are wanted, somebody can see them and this worker can compute them alone."""
    wanted = job.train.sample_rows and job.tracking and (job.tokens_dir / PROMPTS_NAME).stat().st_size
    return Samples(job) if wanted and trainer.layout.rank == 0 and not trainer.layout.is_split else None
