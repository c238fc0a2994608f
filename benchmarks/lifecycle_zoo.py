"""Models of transformers, timm and torch_geometric, made small by a configuration, for `benchmarks.lifecycle_models`.

Nothing is downloaded. One row a model: its classes in transformers, what is small about it, and what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from torch import Tensor, nn

WIDTH = 32
VOCABULARY = 64
#: Sides of the images, in pixels.
SIDE = 32


class Answers(nn.Module):
    """A model of transformers that takes its inputs by position and answers with one tensor."""

    def __init__(self, model: nn.Module, names: Sequence[str], answer: str = "logits") -> None:
        super().__init__()
        self.model, self.answer = model, answer
        self.names = tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        answer: Tensor = getattr(self.model(**dict(zip(self.names, inputs, strict=True))), self.answer)
        return answer


def hf() -> Any:
    """Returns the package transformers; not by a plain import, as type checkers need not find what is optional."""
    return import_module("transformers")


def hugging_face(
    model: str, config: str, names: Sequence[str], answer: str = "logits", **fields: Any
) -> Callable[[], nn.Module]:
    """Returns what builds a model of transformers.

    Args:
        model, config: names of its classes.
        names: of its inputs, in the order of the case's.
        answer: what of its output is looked at.
        fields: of the configuration.
    """
    return lambda: Answers(getattr(hf(), model)(getattr(hf(), config)(**fields)), names, answer)


def timm(name: str, **fields: Any) -> Callable[[], nn.Module]:
    """Returns what builds a model of timm with ten classes."""
    return lambda: import_module("timm").create_model(name, pretrained=False, num_classes=10, **fields)


def geometric() -> nn.Module:
    """A network of torch_geometric's linear layers, which are no `nn.Linear`."""
    linear = import_module("torch_geometric.nn").Linear
    return nn.Sequential(linear(16, WIDTH), nn.ReLU(), linear(WIDTH, 10))


SIZE: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH
}  # fmt: skip
_TEXT = {**SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 0}
_LABELS = {**_TEXT, "num_labels": 10}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 2 * WIDTH,
    "decoder_ffn_dim": 2 * WIDTH, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "use_cache": False,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_IMAGE = {**SIZE, "image_size": SIDE, "patch_size": 8, "num_labels": 10}
_STAGES = {"hidden_sizes": (16, 32), "depths": (1, 1), "num_labels": 10}
_AUDIO = {
    **SIZE, "vocab_size": VOCABULARY, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False, "layerdrop": 0.0, "pad_token_id": 0,
}  # fmt: skip
_IDS, _MASKED = ("input_ids",), ("input_ids", "attention_mask")
_CLASSIFIER = "ForSequenceClassification"

#: Name, what the model is given ("text", "masked", "both" for an encoder and a decoder, "image", "audio", "mel"), and
#: how it is built.
HUGGING_FACE: tuple[tuple[str, str, Callable[[], nn.Module]], ...] = (
    *(
        (name, "masked", hugging_face(f"{kind}{_CLASSIFIER}", f"{kind}Config", _MASKED, **{**_LABELS, **more}))
        for name, kind, more in (
            ("RoBERTa", "Roberta", {"max_position_embeddings": 34}),
            ("ALBERT", "Albert", {"embedding_size": 16}),
            ("ELECTRA", "Electra", {"embedding_size": 16}),
            ("DeBERTa v2", "DebertaV2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
            ("ModernBERT", "ModernBert", {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}),
            ("MPNet", "MPNet", {}),
        )
    ),
    (
        "DistilBERT",
        "masked",
        hugging_face(
            f"DistilBert{_CLASSIFIER}", "DistilBertConfig", _MASKED, vocab_size=VOCABULARY, dim=WIDTH, n_layers=2,
            n_heads=4, hidden_dim=2 * WIDTH, max_position_embeddings=32, num_labels=10,
        ),
    ),
    ("FNet", "text", hugging_face(f"FNet{_CLASSIFIER}", "FNetConfig", _IDS, **_TEXT, num_labels=10)),
    *(
        (name, "text", hugging_face(f"{kind}ForCausalLM", f"{config}Config", _IDS, **{**_DECODER, **more}))
        for name, kind, config, more in (
            ("Mistral", "Mistral", "Mistral", {"sliding_window": 8}),
            ("Qwen 3", "Qwen3", "Qwen3", {"head_dim": 8}),
            ("Gemma 3", "Gemma3", "Gemma3Text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}),
            ("Phi", "Phi", "Phi", {}),
            ("GPT-NeoX", "GPTNeoX", "GPTNeoX", {}),
            ("Cohere", "Cohere", "Cohere", {}),
            ("Mixtral", "Mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
            (
                "Qwen 2 MoE",
                "Qwen2Moe",
                "Qwen2Moe",
                {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                 "shared_expert_intermediate_size": 32},
            ),
            ("OLMoE", "Olmoe", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        )
    ),
    (
        "OPT",
        "text",
        hugging_face(
            "OPTForCausalLM", "OPTConfig", _IDS, **_TEXT, ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH, use_cache=False,
        ),
    ),
    *(
        (
            name,
            "text",
            hugging_face(
                f"{kind}ForCausalLM", f"{kind}Config", _IDS, vocab_size=VOCABULARY, hidden_size=WIDTH, use_cache=False,
                **more,
            ),
        )
        for name, kind, more in (
            ("BLOOM", "Bloom", {"n_layer": 2, "n_head": 4}),
            ("Falcon", "Falcon", {"num_hidden_layers": 2, "num_attention_heads": 4}),
            ("Mamba", "Mamba", {"num_hidden_layers": 2, "state_size": 8}),
            ("Mamba 2", "Mamba2", {"num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16,
                                   "n_groups": 2, "chunk_size": 8}),
            ("RWKV", "Rwkv", {"num_hidden_layers": 2, "context_length": 32}),
        )
    ),
    (
        "BART",
        "both",
        hugging_face("BartForConditionalGeneration", "BartConfig", (*_MASKED, "decoder_input_ids"), **_SEQ2SEQ),
    ),
    ("Marian", "both", hugging_face("MarianMTModel", "MarianConfig", (*_MASKED, "decoder_input_ids"), **_SEQ2SEQ)),
    (
        "Whisper",
        "mel",
        hugging_face(
            "WhisperForConditionalGeneration", "WhisperConfig", ("input_features", "decoder_input_ids"),
            **{key: value for key, value in _SEQ2SEQ.items() if key != "max_position_embeddings"}, num_mel_bins=8,
            max_source_positions=12, max_target_positions=16,
        ),
    ),
    ("wav2vec 2.0", "audio", hugging_face("Wav2Vec2ForCTC", "Wav2Vec2Config", ("input_values",), **_AUDIO)),
    ("HuBERT", "audio", hugging_face("HubertForCTC", "HubertConfig", ("input_values",), **_AUDIO)),
    *(
        (name, "image", hugging_face(f"{kind}ForImageClassification", f"{kind}Config", ("pixel_values",), **fields))
        for name, kind, fields in (
            ("DeiT", "DeiT", _IMAGE),
            ("DINOv2", "Dinov2", _IMAGE),
            ("BEiT", "Beit", {**_IMAGE, "use_relative_position_bias": True}),
            ("CLIP vision", "CLIP", {"vision_config": _IMAGE, "text_config": _TEXT, "num_labels": 10}),
            ("Swin", "Swin", {"image_size": SIDE, "patch_size": 4, "embed_dim": 16, "depths": (1, 1),
                              "num_heads": (2, 2), "window_size": 4, "num_labels": 10}),
            ("ConvNeXt v2", "ConvNextV2", {**_STAGES, "num_stages": 2}),
            ("ResNet", "ResNet", {**_STAGES, "embedding_size": 16, "layer_type": "basic"}),
            ("RegNet", "RegNet", {**_STAGES, "embedding_size": 16, "groups_width": 8}),
            ("SegFormer", "Segformer", {**_STAGES, "num_encoder_blocks": 2, "sr_ratios": (4, 2), "patch_sizes": (7, 3),
                                        "strides": (4, 2), "num_attention_heads": (1, 2), "mlp_ratios": (2, 2)}),
            ("PoolFormer", "PoolFormer", {**_STAGES, "num_encoder_blocks": 2, "patch_sizes": (7, 3), "strides": (4, 2),
                                          "padding": (2, 1)}),
            ("LeViT", "Levit", {"image_size": 64, "hidden_sizes": (32, 48, 64), "num_attention_heads": (2, 2, 2),
                                "depths": (1, 1, 1), "key_dim": (8, 8, 8), "num_labels": 10}),
            # At their own 0.02 nothing of the input is left after the layers, with batch norms that saw no data.
            ("MobileNetV2", "MobileNetV2", {"image_size": SIDE, "depth_multiplier": 0.25, "num_labels": 10,
                                            "initializer_range": 0.3}),
            ("MobileViT", "MobileViT", {"image_size": SIDE, "initializer_range": 0.3, "hidden_sizes": (16, 16, 16),
                                        "neck_hidden_sizes": (8, 8, 8, 16, 16, 16, 32), "num_labels": 10}),
        )
    ),
    (
        "DETR",
        "image",
        hugging_face(
            "DetrForObjectDetection", "DetrConfig", ("pixel_values",), d_model=WIDTH, encoder_layers=1,
            decoder_layers=1, encoder_ffn_dim=WIDTH, decoder_ffn_dim=WIDTH, encoder_attention_heads=4,
            decoder_attention_heads=4, num_queries=4, num_labels=10, dropout=0.0,
            backbone_config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
                             "layer_type": "basic", "out_features": ["stage2"]},
        ),
    ),
)  # fmt: skip

_PATCHES = {"img_size": SIDE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 4}
#: Name, the side of its images, and how it is built.
TIMM: tuple[tuple[str, int, Callable[[], nn.Module]], ...] = (
    ("timm ResNet-10", 64, timm("resnet10t")),
    ("timm MobileNetV3", 64, timm("mobilenetv3_small_050")),
    ("timm MobileNetV4", 64, timm("mobilenetv4_conv_small_035")),
    ("timm BiT below a ViT", SIDE, timm("vit_tiny_r_s16_p8_224", img_size=SIDE, depth=2)),
    ("timm NFNet", SIDE, timm("nf_regnet_b0")),
    ("timm BEiT", SIDE, timm("beit_base_patch16_224", **_PATCHES)),
    ("timm EVA-02", SIDE, timm("eva02_tiny_patch14_224", **{**_PATCHES, "mlp_ratio": 2.0})),
    ("timm MaxViT", 64, timm("maxvit_rmlp_pico_rw_256", img_size=64)),
    ("timm RepViT", 64, timm("repvit_m0_9")),
    ("timm LeViT", 224, timm("levit_128s")),
    ("timm ConvNeXt v2", SIDE, timm("convnextv2_atto")),
    ("timm EfficientNet", 64, timm("efficientnet_lite0")),
)
