"""The models of coverage_cases: one for each kind of module, layout and way to train."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils.checkpoint
import transformers
from networks import Net
from torch import nn


def whole(name: str, **options: Any) -> Any:
    return getattr(transformers, name)(**options)


def llama(**options: Any) -> nn.Module:
    config = whole(
        "LlamaConfig",
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        **{"attention_dropout": 0.1, **options},
    )
    model: nn.Module = transformers.LlamaForCausalLM(config).train()
    return model


def gpt2() -> nn.Module:
    config = whole(
        "GPT2Config", vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config).train()
    return model


def bert() -> nn.Module:
    config = whole(
        "BertConfig",
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model: nn.Module = transformers.BertForMaskedLM(config).train()
    return model


def t5() -> nn.Module:
    config = whole(
        "T5Config", vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model: nn.Module = transformers.T5ForConditionalGeneration(config).train()
    return model


def mixtral() -> nn.Module:
    config = whole(
        "MixtralConfig",
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=16,
    )
    model: nn.Module = transformers.MixtralForCausalLM(config).train()
    return model


_SMALL = dict(vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
_SMALL |= dict(decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24)


def bart() -> nn.Module:
    config = whole("BartConfig", **_SMALL, max_position_embeddings=16, decoder_start_token_id=2)
    model: nn.Module = transformers.BartForConditionalGeneration(config).train()
    return model


def whisper() -> nn.Module:
    config = whole(
        "WhisperConfig",
        **_SMALL,
        num_mel_bins=6,
        max_source_positions=8,
        max_target_positions=16,
        decoder_start_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model: nn.Module = transformers.WhisperForConditionalGeneration(config).train()
    return model


def deberta() -> nn.Module:
    config = whole(
        "DebertaV2Config",
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        relative_attention=True,
        position_buckets=4,
        pos_att_type=["p2c", "c2p"],
        num_labels=3,
    )
    model: nn.Module = transformers.DebertaV2ForSequenceClassification(config).train()
    return model


def swin() -> nn.Module:
    config = whole(
        "SwinConfig",
        image_size=8,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1],
        num_heads=[2, 2],
        window_size=2,
        drop_path_rate=0.3,
        num_labels=3,
    )
    model: nn.Module = transformers.SwinForImageClassification(config).train()
    return model


def mamba() -> nn.Module:
    config = whole("MambaConfig", vocab_size=60, hidden_size=16, state_size=4, num_hidden_layers=1)
    model: nn.Module = transformers.MambaForCausalLM(config).train()
    return model


def wav2vec2() -> nn.Module:
    config = whole(
        "Wav2Vec2Config",
        vocab_size=12,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=[8, 8],
        conv_stride=[4, 2],
        conv_kernel=[4, 3],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
    )
    model: nn.Module = transformers.Wav2Vec2ForCTC(config).train()
    return model


def prompted(**options: Any) -> nn.Module:
    """Prompts that are learned, before those of a Llama that stays as it is."""
    import peft

    kind = peft.PromptEncoderConfig if options else peft.PromptTuningConfig
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3, **options)
    model: nn.Module = peft.get_peft_model(llama(), config)
    return model.train()


def vit() -> nn.Module:
    config = whole(
        "ViTConfig",
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=5,
        hidden_dropout_prob=0.1,
    )
    model: nn.Module = transformers.ViTForImageClassification(config).train()
    return model


def resnet(training: bool) -> nn.Module:
    config = whole(
        "ResNetConfig", embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model: nn.Module = transformers.ResNetForImageClassification(config)
    return model.train(training)


def lora(base: nn.Module, **options: Any) -> nn.Module:
    import peft

    model: nn.Module = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then so is half of all gradients
            nn.init.normal_(parameter, std=0.1)
    return model.train()


class Applied(nn.Module):
    """A module and what is done with its output."""

    def __init__(self, forward: Callable[..., torch.Tensor], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self._applied = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._applied(self, x)


def in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = self.first(x)
    hidden += 1
    out: torch.Tensor = self.second(hidden.relu_())
    return out


def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.outer(self.inner(self.inner(x).tanh()).tanh())
    return out


def tied_twice() -> nn.Module:
    inner, outer = nn.Linear(7, 7), nn.Linear(7, 7)
    outer.weight = inner.weight
    return Applied(twice, inner=inner, outer=outer)


class Rms(nn.Module):
    """T5's and Llama's norm, written out."""

    def __init__(self, width: int, offset: float) -> None:
        super().__init__()
        self.weight, self._offset = nn.Parameter(torch.rand(width)), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self._offset + self.weight)


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * 3


class Bag(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.out = table, nn.Linear(6, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.table(input_ids).sum(1))
        return out


class Attention(nn.Module):
    """Cross attention, with keys and values of other widths or not."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True, **options)
        self.keys = nn.Linear(8, options.get("kdim", 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = self.keys(x[:, 1:])
        out: torch.Tensor = self.attention(x, keys, keys)[0]
        return out


class TimeMajor(nn.Module):
    """Layers that want the batch on axis 1, in a model that has it on axis 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.layer(x.transpose(0, 1))).transpose(0, 1)
        return out


def added(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Learned positions, looked up by one row of ids, beside embeddings."""
    out: torch.Tensor = self.out((self.inner(x) + self.places(torch.arange(x.shape[1])[None])).tanh())
    return out


def folded(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.norm(self.layer(x.flatten(0, 1)).tanh()).view(*x.shape[:2], -1)
    return out


def folded_by_token(self: Any, x: torch.Tensor) -> torch.Tensor:
    moved = x.transpose(0, 1)
    out: torch.Tensor = self.norm(self.layer(moved.flatten(0, 1)).tanh()).view(*moved.shape[:2], -1).transpose(0, 1)
    return out


def direct(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.layer(x) @ self.layer.weight
    return out


def scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.layer(x).tanh() * self.scale
    return out


def recurrent(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.head(self.lstm(x)[0])
    return out


def lstm(forward: Callable[..., torch.Tensor] = recurrent) -> nn.Module:
    return Applied(forward, lstm=nn.LSTM(6, 8, batch_first=True), head=nn.Linear(8, 2))


class Seen(nn.Module):
    """Sequence first, all through: the loss of a batch on axis 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 5), nn.LayerNorm(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.layer(x))
        return out


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.out, self._reentrant = nn.Linear(6, 8), nn.Linear(8, 2), reentrant
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8), nn.Dropout(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.utils.checkpoint.checkpoint(self.inner, self.first(x), use_reentrant=self._reentrant)
        out: torch.Tensor = self.out(hidden)
        return out


def checkpointed_llama(reentrant: bool) -> nn.Module:
    model: Any = llama(attention_dropout=0.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


def evaluated(model: nn.Module) -> None:
    """Between backward and the next batch: an evaluation in between leaves no trace."""
    with torch.no_grad():
        model.eval()(torch.randn(3, 9))
    model.train()


def autocast(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast(torch.get_default_device().type, dtype=dtype)


def mlp() -> nn.Module:
    return Net(nn.Linear(9, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 4))


class Heads(nn.Module):
    """Attention by four Linears; the bias of its keys has a gradient of rounding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class ChannelNorm(nn.LayerNorm):
    """Returns a permuted view, as ConvNeXt's does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Own(nn.Module):
    """Parameters and what is done with them and the input, in a module without children."""

    def __init__(self, forward: Callable[..., torch.Tensor], *names: str, dropout: float = 0.0) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Parameter(torch.rand(6)))
        self.dropout, self._applied = dropout, forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._applied(self, x)


def noisy(self: Any, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(x * self.weight, self.dropout, self.training)


def replaced() -> nn.Module:
    """A Linear that is one by its class alone."""
    doubled = nn.Linear(6, 5)
    plain = doubled.forward
    doubled.forward = lambda x: 2 * plain(x)  # type: ignore[method-assign]
    return doubled


def overwritten(self: Any, x: torch.Tensor) -> torch.Tensor:
    moved = x.clone()
    out: torch.Tensor = self.inner(moved)
    moved.mul_(2)
    return out + moved


def tabled(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = x + self.layer(self.table).sum(0)
    return out


def only_a_loss(self: Any, x: torch.Tensor) -> torch.Tensor:
    return recurrent(self, x).square().mean()


class WithLoss(nn.Module):
    """Returns its loss beside its logits, as transformers' models do."""

    def __init__(self, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self._loss = nn.Linear(6, 5), loss

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.layer(x)
        return SimpleNamespace(loss=self._loss(logits, labels), logits=logits)


class Pairs(nn.Module):
    """Finds each first half its second among those of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> SimpleNamespace:
        logits = self.first(x) @ self.second(y).T
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, torch.arange(len(x))), logits=logits)
