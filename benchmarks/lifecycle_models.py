"""Small models of every kind that users bring, with random weights and data: what `benchmarks.lifecycle` runs.

Models of transformers, timm and PEFT are built from a configuration; nothing is downloaded. They need
`pip install lq_plugin[models]`; the others need nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from benchmarks.lifecycle_nets import ConvNeXt, MobileNet, Shared, Symmetric, TiedLanguageModel, Wrapper
from benchmarks.lifecycle_zoo import HUGGING_FACE, SIDE, SIZE, TIMM, VOCABULARY, WIDTH, geometric, hugging_face
from lq_plugin import QuantPlan, Rule
from lq_plugin.demo.resnet import CifarResNet

SAMPLES = 32
#: What all of them are quantized with.
PLAN = QuantPlan.parse("w8a8")

Inputs = tuple[Tensor, ...]
Draw = Callable[[torch.Generator], Inputs]


@dataclass(frozen=True)
class Case:
    """One model.

    Args:
        name: for the table.
        build: the float model; it maps `inputs` to logits (or whatever it answers).
        inputs: tensors of `SAMPLES` rows.
        package: what must be installed.
        adapt: changes the model once it is quantized: a LoRA that comes later, say.
        plan: how it is quantized.
        macs: multiply-accumulates of one sample, counted by hand.
        products: those of products of activations, which are float under `w8a8`.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Draw
    package: str | None = None
    adapt: Callable[[nn.Module], nn.Module] | None = None
    plan: QuantPlan = PLAN
    macs: int | None = None
    products: int = 0


def _floats(*shape: int) -> Draw:
    return lambda generator: (torch.randn(SAMPLES, *shape, generator=generator),)


def _tokens(length: int = 12, masked: bool = False, decoder: int = 0) -> Draw:
    def draw(generator: torch.Generator) -> Inputs:
        tensors = [torch.randint(0, VOCABULARY, (SAMPLES, length), generator=generator)]
        if masked:
            lengths = torch.randint(length // 2, length + 1, (SAMPLES, 1), generator=generator)
            tensors.append((torch.arange(length) < lengths).long())
        if decoder:
            tensors.append(torch.randint(0, VOCABULARY, (SAMPLES, decoder), generator=generator))
        return tuple(tensors)

    return draw


def _mel() -> Draw:
    def draw(generator: torch.Generator) -> Inputs:
        tokens = torch.randint(0, VOCABULARY, (SAMPLES, 6), generator=generator)
        return torch.randn(SAMPLES, 8, 24, generator=generator), tokens

    return draw


def _padded(length: int = 10) -> Draw:
    def draw(generator: torch.Generator) -> Inputs:
        x = torch.randn(SAMPLES, length, WIDTH, generator=generator)
        lengths = torch.randint(length // 2, length + 1, (SAMPLES, 1), generator=generator)
        return x, torch.arange(length) >= lengths

    return draw


def _attention() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        y, _ = net.attention(x, x, x, need_weights=False)
        return net.head((x + y).mean(1))

    return Wrapper(forward, attention=nn.MultiheadAttention(WIDTH, 4, batch_first=True), head=nn.Linear(WIDTH, 10))


def _encoder() -> nn.Module:
    def forward(net: Any, x: Tensor, padding: Tensor) -> Tensor:
        y = net.encoder(x, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1)
        return net.head((y * kept).sum(1) / kept.sum(1))

    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
    return Wrapper(forward, encoder=nn.TransformerEncoder(layer, 2), head=nn.Linear(WIDTH, 10))


def _recurrent(kind: type[nn.Module], features: int, **options: Any) -> Callable[[], nn.Module]:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(net.rnn(x)[0][:, -1])

    return lambda: Wrapper(forward, rnn=kind(16, WIDTH, batch_first=True, **options), head=nn.Linear(features, 10))


def _cell() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = net.cell(step, state)
        return net.head(state[0])

    return Wrapper(forward, cell=nn.LSTMCell(16, WIDTH), head=nn.Linear(WIDTH, 10))


def _bags() -> nn.Module:
    def forward(net: Any, tokens: Tensor) -> Tensor:
        half = tokens.shape[1] // 2
        return net.product(net.bag(tokens[:, :half]), net.bag(tokens[:, half:]))

    return Wrapper(forward, bag=nn.EmbeddingBag(VOCABULARY, WIDTH), product=nn.Bilinear(WIDTH, WIDTH, 10))


def _conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 16, 5, 2, dilation=2), nn.ReLU(),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def _conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 16, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, 1, 1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1),
    )  # fmt: skip


def _weight_norm() -> nn.Module:
    convolution = weight_norm(nn.Conv1d(4, 16, 5, padding=2))
    return nn.Sequential(
        convolution, nn.ReLU(), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.Flatten(), weight_norm(nn.Linear(14 * 16, 32)),
        nn.ReLU(),
        nn.Linear(32, 10),
    )  # fmt: skip


def _parametrized() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(nn.Linear(16, WIDTH), nn.ReLU(), layer, nn.ReLU(), nn.Linear(WIDTH, 10))


def _spectral() -> nn.Module:
    return nn.Sequential(
        spectral_norm(nn.Conv2d(3, 8, 3, 2, 1)), nn.ReLU(), spectral_norm(nn.ConvTranspose2d(8, 8, 3, 1, 1)), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), orthogonal(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), nn.Linear(WIDTH, 10),
    )  # fmt: skip


def _lazy() -> nn.Module:
    model = nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(32),
        nn.ReLU(),
        nn.LazyLinear(10),
    )  # fmt: skip
    model(torch.zeros(2, 3, 12, 12))
    return model


def _mlp() -> nn.Module:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.down(F.relu(net.up(x)))))

    return Wrapper(forward, up=nn.Linear(16, WIDTH), down=nn.Linear(WIDTH, WIDTH), head=nn.Linear(WIDTH, 10))


#: QKᵀ and the product with V of 12 tokens.
_PRODUCTS = 2 * 12 * 12 * 32
_IDS, _MASKED = ("input_ids",), ("input_ids", "attention_mask")
CASES: tuple[Case, ...] = (
    Case("MultiheadAttention", _attention, _floats(10, WIDTH), macs=10 * 4 * 32 * 32 + 2 * 10 * 10 * 32 + 320,
         products=2 * 10 * 10 * 32),
    Case("TransformerEncoder, padded", _encoder, _padded(),
         macs=2 * (10 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 10 * 10 * 32) + 320, products=2 * 2 * 10 * 10 * 32),
    Case("LSTM", _recurrent(nn.LSTM, WIDTH, num_layers=2), _floats(10, 16),
         macs=10 * 4 * 32 * (16 + 32 + 32 + 32) + 320),
    Case("GRU, bidirectional", _recurrent(nn.GRU, 2 * WIDTH, bidirectional=True), _floats(10, 16),
         macs=10 * 2 * 3 * 32 * (16 + 32) + 640),
    Case("LSTM, projected", _recurrent(nn.LSTM, 12, proj_size=12), _floats(10, 16),
         macs=10 * (4 * 32 * (16 + 12) + 32 * 12) + 120),
    Case("LSTMCell in a loop", _cell, _floats(5, 16), macs=5 * 4 * 32 * (16 + 32) + 320),
    Case("EmbeddingBag, Bilinear", _bags, _tokens()),
    Case("Embedding, tied head", lambda: TiedLanguageModel(VOCABULARY, WIDTH), _tokens()),
    Case("Conv1d", _conv1d, _floats(4, 32), macs=32 * 16 * 4 * 5 + 12 * 16 * 16 * 5 + 160),
    Case("Conv3d", _conv3d, _floats(1, 8, 8, 8), macs=8**3 * 8 * 27 + 3**3 * 16 * 8 * 27 + 160),
    Case("ConvTranspose autoencoder", _autoencoder, _floats(1, 16, 16)),
    Case("MobileNet, depthwise", MobileNet, _floats(3, 16, 16)),
    Case("ConvNeXt", ConvNeXt, _floats(3, 16, 16)),
    Case("ResNet-8", lambda: CifarResNet(8), _floats(3, 32, 32)),
    Case("shared modules", lambda: Shared(WIDTH), _floats(WIDTH)),
    Case("weight_norm", _weight_norm, _floats(4, 16)),
    Case("parametrized", _parametrized, _floats(16)),
    Case("spectral_norm, orthogonal", _spectral, _floats(3, 12, 12)),
    Case("lazy modules", _lazy, _floats(3, 12, 12)),
)  # fmt: skip


_LLAMA = {**SIZE, "num_key_value_heads": 2, "use_cache": False}


def _lora(model: nn.Module) -> nn.Module:
    peft: Any = import_module("peft")
    # Adapters that do something from the start; by default one of the two matrices is zero.
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))


#: Adapters that come after quantization stay float.
_BASE_ALONE = QuantPlan([*PLAN.rules, Rule("*.lora_*", weight="float", input="float")])

#: By what a model of transformers is given.
_GIVEN: dict[str, Draw] = {
    "text": _tokens(), "masked": _tokens(masked=True), "both": _tokens(masked=True, decoder=6),
    "image": _floats(3, SIDE, SIDE), "audio": _floats(256), "mel": _mel(),
}  # fmt: skip
#: Side of their images, where it is another one.
_SIDES = {"LeViT": 64}

CASES += (
    Case("BERT", hugging_face("BertForSequenceClassification", "BertConfig", _MASKED, vocab_size=VOCABULARY,
         num_labels=10, max_position_embeddings=16, **SIZE), _tokens(masked=True), "transformers",
         macs=2 * (12 * (4 * 32 * 32 + 2 * 32 * 64) + _PRODUCTS) + 32 * 32 + 32 * 10, products=2 * _PRODUCTS),
    Case("GPT-2", hugging_face("GPT2LMHeadModel", "GPT2Config", _IDS, vocab_size=VOCABULARY, n_positions=16,
         n_embd=WIDTH, n_layer=2, n_head=4, use_cache=False), _tokens(), "transformers",
         macs=2 * (12 * (4 * 32 * 32 + 2 * 32 * 128) + _PRODUCTS) + 12 * 32 * 64, products=2 * _PRODUCTS),
    Case("Llama", hugging_face("LlamaForCausalLM", "LlamaConfig", _IDS, vocab_size=VOCABULARY,
         max_position_embeddings=16, **_LLAMA), _tokens(), "transformers",
         macs=2 * (12 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + _PRODUCTS) + 12 * 32 * 64, products=2 * _PRODUCTS),
    Case("T5", hugging_face("T5ForConditionalGeneration", "T5Config", (*_MASKED, "decoder_input_ids"),
         vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=4,
         decoder_start_token_id=0, use_cache=False), _tokens(masked=True, decoder=6), "transformers"),
    Case("ViT", hugging_face("ViTForImageClassification", "ViTConfig", ("pixel_values",), image_size=16, patch_size=4,
         num_labels=10, **SIZE), _floats(3, 16, 16), "transformers",
         macs=16 * 32 * 48 + 2 * (17 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 17 * 17 * 32) + 32 * 10,
         products=2 * 2 * 17 * 17 * 32),
    *(
        Case(name, build, _floats(3, side, side) if (side := _SIDES.get(name)) else _GIVEN[given], "transformers")
        for name, given, build in HUGGING_FACE
    ),
    *(Case(name, build, _floats(3, side, side), "timm") for name, side, build in TIMM),
    Case("torch_geometric Linear", geometric, _floats(16), "torch_geometric", macs=16 * 32 + 32 * 10),
    Case("LoRA, then quantized", lambda: _lora(_mlp()), _floats(16), "peft"),
    Case("quantized, then LoRA", _mlp, _floats(16), "peft", _lora, _BASE_ALONE),
)  # fmt: skip
