"""Every kind of module and feature of training that is recorded: one row of docs/coverage.md each.

test_coverage_table runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from coverage_models import (
    Applied,
    Attention,
    Bag,
    ChannelNorm,
    Checkpointed,
    Heads,
    Own,
    Pairs,
    Rms,
    ScaledEmbedding,
    Seen,
    TimeMajor,
    WithLoss,
    added,
    autocast,
    bart,
    bert,
    checkpointed_llama,
    deberta,
    direct,
    evaluated,
    folded,
    folded_by_token,
    gpt2,
    in_place,
    llama,
    lora,
    lstm,
    mamba,
    mixtral,
    mlp,
    noisy,
    prompted,
    replaced,
    resnet,
    scaled,
    swin,
    t5,
    tied_twice,
    vit,
    wav2vec2,
    whisper,
)
from networks import Net
from references import (
    Batch,
    Loss,
    counted,
    images,
    labelled,
    language,
    masked,
    own,
    packed,
    packed_ids,
    pairs,
    pairs_found,
    prompts,
    sentences,
    seq2seq,
    sounds,
    speech,
    squares,
    squares_of_packed,
    squares_on_axis_1,
    tokens,
    vectors,
    words,
)
from torch import nn
from torch.nn.utils import parametrizations

SAMPLES = [11, 5, 8]
IDS = [[11, 2, 5, 7], [4, 8, 11, 0]]

FLOAT64, FLOAT32, HALF = 1e-12, 1e-5, 1e-2


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        options: of `Store.record`, and of `references.recorded`.
        around: what the forward pass runs in.
        found: it is proved where the batch is.
        warns: the record does not tell samples apart, and says so: its sum alone is compared.
        passes: what modules do not show is recorded by a backward pass of each sample, and a warning says so.
    """

    group: str
    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[], list[Batch]]
    loss: Loss = squares
    options: dict[str, Any] = field(default_factory=dict)
    around: Callable[[], Any] | None = None
    limit: float = FLOAT32
    found: bool = False
    warns: str = ""
    passes: bool = False

    @property
    def how(self) -> str:
        """How its gradients are recorded."""
        if self.warns:
            return "warned: sum compared"
        if self.passes or self.options.get("capture") == "per-sample":
            return "one more backward pass for each recorded sample"
        if self.options.keys() & {"batch_axis", "packed"}:
            return "declared"
        return "found" if self.found else "modules"


BY_SAMPLE = {"capture": "per-sample"}

MODULES = [
    Case(
        "Linear",
        "2-D, with dropout and an activation in place",
        lambda: Net(
            nn.Linear(9, 16), nn.ReLU(inplace=True), nn.LayerNorm(16), nn.Dropout(0.3), nn.Linear(16, 4, bias=False)
        ),
        vectors(9),
    ),
    Case(
        "Linear",
        "3-D, changed in place",
        lambda: Applied(in_place, first=nn.Linear(6, 8), second=nn.Linear(8, 3)),
        vectors(5, 6),
    ),
    Case("Linear", "called several times, weight tied to another's", tied_twice, vectors(7)),
    Case("Linear", "`forward` replaced on the instance", lambda: Net(replaced(), nn.Linear(5, 2)), vectors(6)),
    Case(
        "Linear",
        "attention; the bias of the keys gets rounding alone",
        lambda: Net(nn.Linear(6, 8), Heads()),
        vectors(5, 6),
    ),
    Case("Conv1D of transformers, positions (1, T)", "GPT-2, tied embedding", gpt2, tokens(60, 12), language),
    Case("Embedding", "padding_idx", lambda: Bag(nn.Embedding(20, 6, padding_idx=0)), words),
    Case("Embedding", "a subclass that scales, as Gemma's", lambda: Bag(ScaledEmbedding(20, 6, padding_idx=0)), words),
    Case("LayerNorm", "", lambda: Net(nn.Linear(6, 7), nn.LayerNorm(7)), vectors(5, 6)),
    Case(
        "LayerNorm",
        "returns a permuted view, as ConvNeXt's",
        lambda: Net(nn.Unflatten(2, (6, 1)), nn.Conv2d(5, 4, 1), ChannelNorm(4)),
        vectors(5, 6),
    ),
    Case("RMSNorm", "torch's", lambda: Net(nn.Linear(6, 7), nn.RMSNorm(7)), vectors(5, 6)),
    Case("RMSNorm", "Llama's and T5's", lambda: Net(nn.Linear(6, 7), Rms(7, 0)), vectors(5, 6)),
    Case("RMSNorm", "Gemma's (1 + w)", lambda: Net(nn.Linear(6, 7), Rms(7, 1)), vectors(5, 6)),
    Case("GroupNorm", "", lambda: Net(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), vectors(3, 6, 6)),
    Case("Conv1d", "", lambda: Net(nn.Conv1d(5, 3, 2), nn.ReLU(inplace=True), nn.Conv1d(3, 2, 3)), vectors(5, 6)),
    Case("Conv2d", "as factors", lambda: Net(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 9, 3)), vectors(3, 7, 7)),
    Case(
        "Conv2d",
        "dense; groups, dilation, padding modes",
        lambda: Net(nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 4, 3, groups=2, dilation=2)),
        vectors(4, 8, 8),
    ),
    Case(
        "Conv2d",
        "a small network: GroupNorm, stride, Flatten, Linear",
        lambda: Net(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.GELU(),
            nn.Conv2d(8, 4, 3, stride=2),
            nn.Flatten(),
            nn.Linear(36, 5),
        ),
        vectors(3, 8, 8),
    ),
    Case("Conv3d", "", lambda: Net(nn.Conv3d(2, 4, 2, padding=1)), vectors(2, 4, 5, 4)),
    Case(
        "MultiheadAttention",
        "self attention in an encoder layer, dropout",
        lambda: Net(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)),
        vectors(5, 8),
    ),
    Case("MultiheadAttention", "cross attention", Attention, vectors(5, 8)),
    Case("MultiheadAttention", "keys and values of other widths", lambda: Attention(kdim=6, vdim=6), vectors(5, 8)),
    Case("Bare parameters", "class token and positions of a ViT, with dropout", vit, images),
    Case(
        "Bare parameters",
        "a scale at the top of the model",
        lambda: Applied(scaled, layer=nn.Linear(6, 6), scale=nn.Parameter(torch.rand(6))),
        vectors(6),
    ),
    Case(
        "A layer of one's own",
        "one of its parameters is not used",
        lambda: Net(Own(lambda self, x: x * self.used, "used", "unused"), nn.Linear(6, 2)),
        vectors(5, 6),
    ),
    Case(
        "A layer of one's own",
        "a bias: its gradient is a view of what came in",
        lambda: Net(nn.Linear(6, 6), *(Own(lambda self, x: x + self.bias, "bias") for _ in range(2)), nn.Linear(6, 6)),
        vectors(5, 6),
    ),
    Case("A layer of one's own", "with dropout in it", lambda: Net(Own(noisy, "weight", dropout=0.5)), vectors(5, 6)),
    Case(
        "Tied weights",
        "Llama, masked prompt tokens, padding",
        lambda: llama(tie_word_embeddings=True),
        tokens(60, 12, padded=True),
        language,
    ),
    Case("Tied weights", "not tied", llama, tokens(60, 12), language),
    Case("Tied biases", "BERT for masked tokens", bert, tokens(60, 12, padded=True), masked),
    Case("LoRA (peft)", "Llama, adapters alone are recorded", lambda: lora(llama()), tokens(60, 12), language),
    Case(
        "LoRA (peft)",
        "GPT-2",
        lambda: lora(gpt2(), target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        tokens(60, 12),
        language,
    ),
    Case("DoRA (peft)", "Llama", lambda: lora(llama(), use_dora=True), tokens(60, 12), language),
    Case("BatchNorm", "in eval mode (ResNet)", lambda: resnet(False), images),
    Case(
        "Positions (1, T)",
        "added to what a Linear makes of each token",
        lambda: Applied(added, inner=nn.Linear(6, 8), places=nn.Embedding(7, 8), out=nn.Linear(8, 2)),
        vectors(5, 6),
    ),
    Case(
        "Buffers that change in each forward pass",
        "spectral norm in front of a Linear",
        lambda: Net(nn.Linear(6, 6), nn.utils.spectral_norm(nn.Linear(6, 2), n_power_iterations=100)),
        vectors(5, 6),
        passes=True,
    ),
]

PER_SAMPLE = [
    Case("LSTM", "", lstm, vectors(5, 6), passes=True),
    Case("LSTM", "`capture='per-sample'`: without a warning", lstm, vectors(5, 6), options=BY_SAMPLE),
    Case("Relative-bias tables", "T5", t5, seq2seq, masked, passes=True),
    Case("Relative-bias tables", "Swin, layers left out at random", swin, images, passes=True),
    Case("Mixture of experts", "Mixtral: experts and router", mixtral, tokens(60, 8), language, passes=True),
    Case("Direct use of a weight", "", lambda: Applied(direct, layer=nn.Linear(6, 6)), vectors(5, 6), passes=True),
    Case(
        "A weight that is computed",
        "weight norm, as a parametrization",
        lambda: Net(parametrizations.weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 2)),
        vectors(5, 6),
        passes=True,
    ),
    Case("Prompt tuning (peft)", "", prompted, tokens(60, 12), prompts, passes=True),
    Case("P-tuning (peft)", "", lambda: prompted(encoder_hidden_size=8), tokens(60, 12), prompts, passes=True),
    Case("BART", "", bart, seq2seq, masked, passes=True),
    Case("Whisper", "", whisper, speech, masked, passes=True),
    Case("DeBERTa", "", deberta, sentences, passes=True),
    Case("Mamba", "", mamba, tokens(60, 8), language, passes=True),
    Case("wav2vec 2.0", "", wav2vec2, sounds, passes=True),
]

LAYOUTS = [
    Case("Batch on axis 1", "inside the model (nn.Transformer's own layout)", TimeMajor, vectors(5, 8), found=True),
    Case("Batch on axis 1", "as many tokens as samples", TimeMajor, vectors(4, 8), found=True),
    Case(
        "Batch on axis 1",
        "of the model's arguments, `batch_axis=1`",
        Seen,
        lambda: [{"x": torch.randn(5, 4, 6)} for _ in range(2)],
        squares_on_axis_1,
        {"batch_axis": 1},
    ),
    Case(
        "Flattened (B * T, d)",
        "",
        lambda: Applied(folded, layer=nn.Linear(6, 5), norm=nn.LayerNorm(5)),
        vectors(3, 6),
        found=True,
    ),
    Case(
        "Flattened (T * B, d)",
        "",
        lambda: Applied(folded_by_token, layer=nn.Linear(6, 5), norm=nn.LayerNorm(5)),
        vectors(3, 6),
        found=True,
    ),
    Case(
        "Packed rows",
        "an id for every token",
        lambda: Net(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)),
        packed,
        squares_of_packed,
        {"packed": [packed_ids(one) for one in IDS]},
    ),
]

TRAINING = [
    Case("Accumulation", "two micro-batches a step, as in every row of this page", llama, tokens(60, 12), language),
    Case(
        "A loss of the model's own",
        "a mean over samples",
        lambda: WithLoss(nn.functional.cross_entropy),
        labelled(),
        own(counted),
    ),
    Case(
        "A loss of the model's own",
        "a mean over tokens, fewer of them in one sample",
        lambda: WithLoss(lambda logits, labels: nn.functional.cross_entropy(logits.transpose(1, 2), labels)),
        labelled(3, ignored=True),
        own(counted),
    ),
    Case(
        "A loss of the model's own",
        "a sum over samples",
        lambda: WithLoss(lambda logits, labels: nn.functional.cross_entropy(logits, labels, reduction="sum")),
        labelled(),
        own(lambda labels: 1),
    ),
    Case(
        "A loss of the model's own",
        "Llama, masked prompt tokens",
        lambda: llama(attention_dropout=0.0),
        tokens(60, 12),
        own(lambda labels: counted(labels[:, 1:])),
    ),
    Case("Checkpointing", "not reentrant", lambda: Checkpointed(False), vectors(5, 6)),
    Case("Checkpointing", "reentrant", lambda: Checkpointed(True), vectors(5, 6)),
    Case("Checkpointing", "Llama, reentrant", lambda: checkpointed_llama(True), tokens(60, 12), language),
    Case("Checkpointing", "Llama, not reentrant", lambda: checkpointed_llama(False), tokens(60, 12), language),
    Case("autocast", "bfloat16, MLP with LayerNorm", mlp, vectors(9), around=autocast(torch.bfloat16), limit=HALF),
    Case(
        "autocast",
        "bfloat16, Llama",
        lambda: llama(attention_dropout=0.0),
        tokens(60, 12),
        language,
        around=autocast(torch.bfloat16),
        limit=HALF,
    ),
    Case("autocast", "float16 without a scaler", mlp, vectors(9), around=autocast(torch.float16), limit=HALF),
    Case(
        "autocast",
        "float16 with a GradScaler",
        mlp,
        vectors(9),
        around=autocast(torch.float16),
        limit=HALF,
        options={"scaler": "new"},
    ),
    Case(
        "bfloat16 weights",
        "MLP",
        lambda: mlp().bfloat16(),
        lambda: [{"x": one["x"].bfloat16()} for one in vectors(9)()],
        limit=HALF,
    ),
    Case(
        "bfloat16 weights",
        "Llama",
        lambda: llama(attention_dropout=0.0).bfloat16(),
        tokens(60, 12),
        language,
        limit=HALF,
    ),
    Case(
        "float16 weights",
        "MLP",
        lambda: mlp().half(),
        lambda: [{"x": one["x"].half()} for one in vectors(5, 9)()],
        limit=HALF,
    ),
    Case(
        "float64 weights",
        "MLP",
        lambda: mlp().double(),
        lambda: [{"x": one["x"].double()} for one in vectors(5, 9)()],
        limit=FLOAT64,
    ),
    Case(
        "Fused optimizer",
        "AdamW(fused=True)",
        mlp,
        vectors(9),
        options={
            "make_optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
        },
    ),
    Case("Evaluation between steps", "records nothing", mlp, vectors(9), options={"between": evaluated}),
]

WARNED = [
    Case("BatchNorm", "in training mode (ResNet)", lambda: resnet(True), images, warns="mixes the samples of a batch"),
    Case(
        "A loss of the model's own",
        "contrastive, the others of the batch as negatives",
        Pairs,
        pairs,
        pairs_found,
        warns="ties the samples",
    ),
]

CASES = {
    "Modules": MODULES,
    "By a backward pass of each sample": PER_SAMPLE,
    "Where the batch is": LAYOUTS,
    "Training": TRAINING,
    "Warnings": WARNED,
}
