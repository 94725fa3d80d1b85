"""What recording costs where a GPU trains: a Llama of 1.24 billion weights in bfloat16, against the bare loop.

The shape is that of Llama 3.2 1B: width 2,048, inner 8,192, 16 layers, 128,256 words, tied; untrained, on sequences of
the standard library, with AdamW, clipping and batches of 8 sequences. Columns as bench_record.py has them. What is done
once, in the first steps and in `close()`, weighs more here than in a real run, which takes thousands of steps: "later
steps" are those from the thirteenth on. "1 of 64": one sequence in every eighth batch is recorded.

Run: python scripts/bench_gpu.py (three minutes on an H100, with 20 GB of its memory and of disk; --quick --device cpu:
a small one on the processor, to see that it runs)
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_record import CASES, Case, recorded, row
from language import PRE_TRAINING, VOCABULARY, Tokenizer, source
from loops import BATCH, Run, Work, timed
from measuring import arguments, disk_bytes, show
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

FEW: dict[str, Case] = {
    "bare loop": CASES["bare loop"],
    "timstore, nothing to record": CASES["timstore, nothing to record"],
    "timstore, 1 of 64": recorded(lambda count: range(0, count, 64)),
}
MORE: dict[str, Case] = {**FEW, **{name: CASES[name] for name in ("timstore, 1 of 8", "timstore, all 8")}}
# Tokens of a sequence, steps, cases.
SETTINGS: list[tuple[int, int, dict[str, Case]]] = [(64, 30, MORE), (512, 24, FEW)]
# The third proof of a recording comes before the twelfth step, the next one after the hundredth.
SETTLED = 12


def llama(device: str, quick: bool) -> Callable[[], nn.Module]:
    def new() -> nn.Module:
        config = LlamaConfig(
            vocab_size=VOCABULARY if quick else 128_256,
            hidden_size=256 if quick else 2048,
            intermediate_size=1024 if quick else 8192,
            num_hidden_layers=2 if quick else 16,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            use_cache=False,
        )
        with torch.device(device):
            return LlamaForCausalLM(config).to(torch.bfloat16).train()

    return new


def logits(model: nn.Module, tokens: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens, **more).logits
    return found


def sequences(length: int, count: int) -> torch.Tensor:
    """Return so many sequences, or as many as there are."""
    text = source(PRE_TRAINING)
    tokens = torch.tensor(Tokenizer(text, VOCABULARY).encode(text))
    return tokens[: len(tokens) // length * length].view(-1, length)[:count]


def measured(setting: str, work: Work, cases: dict[str, Case], repeats: int, disk: Path) -> Iterator[dict[str, Any]]:
    """Yield a row per case, as soon as it is measured."""
    trained = sum(one.numel() for one in work.begin()[0].parameters())
    timed(lambda: cases["bare loop"](replace(work, steps=3, moments=[]), disk))
    plain: list[Run] = []
    for name, case in cases.items():
        runs, sizes = [], []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=disk) as folder:
                run = timed(lambda case=case, at=Path(folder): case(work, at))
                sizes.append(disk_bytes(Path(folder)))
            run.later_seconds = work.later_seconds
            runs.append(run)
        plain = plain or runs
        yield row(setting, name, work.steps, trained, runs, plain, sizes)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, help="of every measurement (30 and 24; --quick: 15)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="to record in")
    given = parser.parse_args()
    if given.device != "cpu" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --quick --device cpu shows whether the script runs")
    rows = []
    for length, usual, cases in SETTINGS:
        steps = given.steps or (15 if given.quick else usual)
        tokens = sequences(length, steps * BATCH)
        work = Work(llama(given.device, given.quick), logits, tokens, steps, device=given.device, settled=SETTLED)
        for one in measured(f"Llama 1B, {length} tokens", work, cases, given.repeats, given.folder):
            print(one, file=sys.stderr)
            rows.append(one)
    name = torch.cuda.get_device_name() if given.device != "cpu" else "no GPU"
    show(f"Cost of recording on a GPU: {name}, torch {torch.__version__}", rows, as_json=given.json)


if __name__ == "__main__":
    main()
