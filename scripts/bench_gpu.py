"""What recording costs where a GPU trains: a Llama of 1.24 billion weights in bfloat16, against the bare loop.

The shape is that of Llama 3.2 1B: width 2,048, inner 8,192, 16 layers, 128,256 words, tied; untrained, on sequences of
the standard library, with AdamW, clipping and batches of 8 sequences. Columns as bench_record.py has them. What is done
once, at the first step and in `close()`, weighs more than in a real run, which takes thousands of steps: "later steps"
leaves it out. "1 of 64": one sequence in every eighth batch is recorded.

Run: python scripts/bench_gpu.py (five minutes on an H100, 30 GB of GPU memory and of disk; --quick --device cpu: a
small one on the processor, to see that it runs)
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_record import CASES, Case, compare, recorded
from language import PRE_TRAINING, VOCABULARY, Tokenizer, source
from loops import BATCH, Work
from measuring import arguments, show
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

FEW: dict[str, Case] = {
    "bare loop": CASES["bare loop"],
    "timstore, nothing to record": CASES["timstore, nothing to record"],
    "timstore, 1 of 64": recorded(lambda count: range(0, count, 64)),
    "timstore, 1 of 8": CASES["timstore, 1 of 8"],
}
ALL: dict[str, Case] = {**FEW, "timstore, all 8": CASES["timstore, all 8"]}
# Tokens of a sequence, steps, cases.
SETTINGS: list[tuple[int, int, dict[str, Case]]] = [(64, 60, ALL), (512, 30, FEW)]


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


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, help="of every measurement (60 and 30; --quick: 12)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="to record in")
    given = parser.parse_args()
    if given.device != "cpu" and not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --quick --device cpu shows whether the script runs")
    rows = []
    for length, usual, cases in SETTINGS:
        steps = given.steps or (12 if given.quick else usual)
        tokens = sequences(length, steps * BATCH)
        work = Work(llama(given.device, given.quick), logits, tokens, steps, device=given.device)
        rows += compare(f"Llama 1B, {length} tokens", work, given.repeats, cases, given.folder)
    name = torch.cuda.get_device_name() if given.device != "cpu" else "no GPU"
    show(f"Cost of recording on a GPU: {name}, torch {torch.__version__}", rows, as_json=given.json)


if __name__ == "__main__":
    main()
