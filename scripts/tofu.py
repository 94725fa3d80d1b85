"""Workloads of TOFU's shape, trained and unlearned by OpenUnlearning's own trainers.

The facts of invented authors (`workloads.py`) are written down as TOFU's are, a question and an answer a row, with a
tokenizer that knows their words. `src/train.py` of a checkout then fine-tunes with `TIMRecorder`, twice without what is
to be forgotten (`finetune`, whose batches are full again, and in an order of their own), and unlearns with the
checkout's own methods: their settings are those that they come with, their rate is the fine-tuning's.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from authors import Row, facts, numbered
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from workloads import MODELS, Trained, Workload, answering, begin

import timstore

METHODS = ("SimNPO", "NPO", "GradDiff", "GradAscent", "RMU")
WORKLOADS = (
    Workload("tofu", "adamw", 1e-3, 2, "authors", 64, 640, 4, aside=True),
    Workload("tofu", "adamw", 2e-3, 5, "authors", 64, 640, 5, aside=True),
    Workload("tofu", "adamw", 1e-3, 3, "authors", 8, 640, 6, aside=True),
)
PADDING, END, UNKNOWN = "<pad>", "</s>", "<unk>"
BATCH = 32  # the checkout's 8 rows at a time, 4 times before a step


@dataclass(frozen=True)
class Checkout:
    """A checkout of OpenUnlearning, and the Python that its `src/train.py` runs with."""

    path: Path
    python: str

    def run(self, folder: Path, *options: str) -> None:
        """Train into a folder.

        Raises:
            RuntimeError: with the last lines of what it said.
        """
        python = os.path.abspath(shutil.which(self.python) or self.python)
        command = [python, "-W", "ignore", str(self.path.resolve() / "src" / "train.py"), *options]
        answer = subprocess.run(
            [*command, f"paths.output_dir='{folder}'", f"task_name={folder.name}"],
            capture_output=True,
            text=True,
            cwd=folder.parent,
        )
        if answer.returncode:
            raise RuntimeError("\n".join([" ".join(command), *answer.stderr.splitlines()[-12:]]))


def trained(workload: Workload, folder: Path, checkout: Checkout) -> Trained:
    """Train and unlearn, or find what was made."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    texts = [[(question, [*answer, END]) for question, answer in rows] for rows in facts(workload.rows, workload.seed)]
    data, kept = answering(workload, texts), workload.kept_in(folder)
    model = begin(workload, data, folder)
    if not (kept / "complete").exists():
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        model.save_pretrained(kept / "base")
        _write_tokenizer(kept / "base", numbered(texts))
        _write(kept, texts[1], workload)
        _run_all(checkout, kept, workload)
        (kept / "complete").touch()
    store = kept / "trajectories.tim"
    with timstore.open(store, "r") as opened:
        ids = [sample for (sample,) in opened.sql("SELECT DISTINCT sample FROM records ORDER BY sample").fetchall()]
    return Trained(data, store, ids, {name: _loaded(model, kept / name) for name in (*MODELS, *METHODS)})


def _write(kept: Path, rows: Sequence[Row], workload: Workload) -> None:
    """Write the rows and the splits of them; the tokenizer's end is added when they are read."""
    told = [{"question": " ".join(question), "answer": " ".join(answer[:-1])} for question, answer in rows]
    splits = {"full": told, "forget": told[-workload.forgotten :], "retain": told[: -workload.forgotten]}
    for name, held in splits.items():
        (kept / f"{name}.json").write_text("\n".join(map(json.dumps, held)))


def _write_tokenizer(kept: Path, numbers: dict[str, int]) -> None:
    words = {PADDING: 0, **numbers, UNKNOWN: len(numbers) + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(kept / "tokenizer.json"))
    # Its class by the name that every version of transformers knows.
    told = {"pad_token": PADDING, "eos_token": END, "unk_token": UNKNOWN, "tokenizer_class": "PreTrainedTokenizerFast"}
    (kept / "tokenizer_config.json").write_text(json.dumps(told))


def _run_all(checkout: Checkout, kept: Path, workload: Workload) -> None:
    def rows(part: str, dataset: str, split: str) -> list[str]:
        place = f"{part}.{dataset}.args.hf_args"
        return [f"{place}.path=json", f"~{place}.name", f"+{place}.data_files='{kept}/{split}.json'"]

    tuning = [
        *_settings(kept, "base", workload.rate, warm_up=workload.rows // BATCH),
        f"trainer.args.num_train_epochs={workload.epochs}",
    ]
    part = "trainer.method_args.samples"
    recording = ["trainer=TIMRecorder", f"trainer.method_args.tim_output_dir='{kept}'"]
    recording += [f"+data/datasets@{part}=TOFU_QA_forget", *rows(part, "TOFU_QA_forget", "forget")]
    checkout.run(kept / "trained", *recording, *tuning, *rows("data.train", "TOFU_QA_full", "full"))
    for seed, name in enumerate(MODELS[1:]):
        retained = rows("data.train", "TOFU_QA_full", "retain")
        checkout.run(kept / name, "trainer=finetune", f"trainer.args.seed={seed}", *tuning, *retained)
    for method in METHODS:
        unlearning = ["--config-name=unlearn.yaml", f"trainer={method}"]
        unlearning += _settings(kept, "trained", workload.rate, warm_up=workload.forgotten // BATCH)
        if method == "RMU":  # its default is a layer of a larger model
            unlearning.append(r"trainer.method_args.module_regex=model\.layers\.1")
        splits = [*rows("data.forget", "TOFU_QA_forget", "forget"), *rows("data.retain", "TOFU_QA_retain", "retain")]
        checkout.run(kept / method, *unlearning, *splits)


def _settings(kept: Path, start: str, rate: float, warm_up: int) -> list[str]:
    """Return what all trainings here have in common."""
    template = {"user_start_tag": "''", "user_end_tag": "' '", "asst_start_tag": "''", "asst_end_tag": "''"}
    return [
        "model=Llama-3.2-1B-Instruct",
        f"model.model_args.pretrained_model_name_or_path='{kept}/{start}'",
        "model.model_args.attn_implementation=sdpa",
        "model.model_args.torch_dtype=float32",
        f"model.tokenizer_args.pretrained_model_name_or_path='{kept}/base'",
        "model.template_args.apply_chat_template=false",
        "model.template_args.system_prompt_with_special_tokens=''",
        *(f"model.template_args.{name}={value}" for name, value in template.items()),
        "~eval",
        *(f"trainer.args.{name}=false" for name in ("bf16", "bf16_full_eval", "do_eval", "eval_on_start")),
        "trainer.args.eval_strategy=no",
        "trainer.args.report_to=none",
        "+trainer.args.use_cpu=true",
        "+trainer.args.disable_tqdm=true",
        f"trainer.args.learning_rate={rate}",
        f"+trainer.args.warmup_steps={warm_up}",
        "trainer.args.weight_decay=0.01",
        "trainer.args.optim=adamw_torch",
    ]


def _loaded(like: nn.Module, folder: Path) -> nn.Module:
    model = type(like)(like.config)
    state = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model
