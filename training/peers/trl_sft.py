"""TRL's `SFTTrainer` on the rows of a benchmark; run by path with a Python that has trl: `python trl_sft.py TASK.json RESULT.json`.

TRL tokenizes the conversations itself, with completion-only loss; its own training time is what counts. Gradient checkpointing is off,
because it would only make TRL slower. The held-out loss is taken over the same labelled tokens as ours.
"""

import json
import resource
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Reads the task, trains, writes the result."""
    with open(sys.argv[1], encoding="utf-8") as stream:
        task = json.load(stream)
    torch.set_num_threads(task["threads"])
    is_bf16 = task["precision"] == "bf16"
    model = AutoModelForCausalLM.from_pretrained(task["base_dir"], dtype=torch.bfloat16 if is_bf16 else torch.float32)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(task, is_bf16),
        train_dataset=Dataset.from_list(task["rows"]),
        processing_class=AutoTokenizer.from_pretrained(task["base_dir"]),
        peft_config=LoraConfig(
            r=task["rank"], lora_alpha=task["alpha"], lora_dropout=0.0, target_modules=task["target_modules"], task_type="CAUSAL_LM"
        ),
    )
    started, cpu_started = time.perf_counter(), time.process_time()
    trainer.train()
    seconds, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
    peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    loss = heldout_loss(trainer.model, task["heldout"])
    result = {"seconds": seconds, "cpu_s": cpu_s, "peak_rss_bytes": peak_rss_bytes, "heldout_loss": loss}
    with open(sys.argv[2], "w", encoding="utf-8") as stream:
        json.dump(result, stream)


def sft_config(task: dict[str, Any], is_bf16: bool) -> SFTConfig:
    """The settings of our own run, in TRL's words."""
    return SFTConfig(
        output_dir=task["output_dir"], num_train_epochs=task["epochs"], per_device_train_batch_size=task["batch_rows"],
        learning_rate=task["learning_rate"], lr_scheduler_type="cosine", warmup_steps=task["warmup_steps"], weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch", bf16=is_bf16, use_cpu=True, gradient_checkpointing=False, completion_only_loss=True,
        seed=0, max_length=512 if task["packing"] else None, packing=task["packing"],
        logging_steps=1000, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip


def heldout_loss(model: torch.nn.Module, rows: list[Any]) -> float:
    """Mean cross entropy over the labelled tokens of [ids, marks] rows."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, marks in rows:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
            chosen = torch.tensor(marks[1:], dtype=torch.bool)
            targets = torch.tensor(ids[1:])[chosen]
            total += float(torch.nn.functional.cross_entropy(logits[chosen], targets, reduction="sum"))
            count += len(targets)
    return total / count


if __name__ == "__main__":
    main()
