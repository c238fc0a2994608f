"""Target `compressed-tensors`: transformers loads its folders and computes what was trained."""

import json
import logging
import re
import shutil
import sys
from types import ModuleType

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lq_plugin import QAT, Export, QuantPlan, Rule, calibrate, prepare
from lq_plugin.commands.export import run_export
from lq_plugin.errors import ExportError, PlanError
from lq_plugin.export import export_model, verify
from lq_plugin.export.planned import plan_for, refuse_for_target
from lq_plugin.export.request import Request
from lq_plugin.export.target import TARGETS
from lq_plugin.functional.grouping import blocks
from lq_plugin.model import quantized_layers
from tests.export.test_cli import composed

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from compressed_tensors.quantization import QuantizationConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

# Its own: enumerations that torch registers twice.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore:Failed to load")
TOKENS = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))
NAME = "compressed-tensors"
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def llama(dtype=FLOAT32, **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(**sizes | heads | changes)
    torch.manual_seed(0)
    # Not `.to(dtype)`, which makes bfloat16 also of the rotary frequencies: transformers loads these as float32.
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def quantized(*rules, dtype=FLOAT32, **changes):
    model = llama(dtype, **changes)
    prepare(model, QuantPlan([Rule(match, weight=weight, input=act or "float") for match, weight, act in rules]))
    calibrate(model, [TOKENS])
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")


def exported(model, path):
    """The model as transformers loads its folder, after a forward pass."""
    size = export_model(model, path, target=NAME)
    assert size == sum(file.stat().st_size for file in path.iterdir())
    again = loaded(path)
    logits(again)
    return again


EQUAL = {
    "int4 groups": [("*proj", "int4 group32", None)],
    "int8 channels": [("*proj", "int8 per_channel", None)],
    "int8 tensor": [("*proj", "int8 mse", None)],
    "int2": [("*proj", "int2 group16 octav", None)],
    "int3": [("*proj", "int3 group16", None)],
    "int5 narrow": [("*proj", "int5 per_channel narrow", None)],
    "integer scales": [("*proj", "int4 group16:4", None)],
    "int4 affine": [("*proj", "int4 group32 affine", None)],
    "uint4 affine": [("*proj", "uint4 group32 affine", None)],
    "uint8 affine": [("*proj", "uint8 per_channel affine", None)],
    "uint4": [("*proj", "uint4 per_channel", None)],
    "w8a8": [("*proj", "int8 per_channel", "int8")],
    "w8a8 tensor": [("*proj", "int8", "int8 percentile:99.9")],
    "w4a8": [("*proj", "int4 per_channel", "int8 mse")],
    "tokens": [("*proj", "int8 per_channel", "int8 per_token affine dynamic")],
    "w4a8 tokens": [("*proj", "int4 group32", "uint8 per_token affine dynamic")],
    "fp8": [("*proj", "fp8 per_channel", None)],
    "fp8 squares": [("*proj", "fp8 block32", None)],
    "fp8 inputs": [("*proj", "fp8", "fp8 percentile:99.9")],
    "fp8 tokens": [("*proj", "fp8 per_channel", "fp8 per_token dynamic")],
    "fp8 tensor at run time": [("*proj", "fp8 per_channel", "fp8 dynamic")],
    "fp8 squares and groups": [("*proj", "fp8 block32", "fp8 group32 dynamic")],
    "mxfp4 rceil": [("*proj", "mxfp4:rceil", None)],
    "mxfp4 mse": [("*proj", "mxfp4:mse", None)],
    "head": [("*proj", "int4 group32", None), ("lm_head", "int4 group32", None)],
    "mixed": [("*mlp*", "int4 group32", None), ("*attn*", "int8 per_channel", "int8"), ("lm_head", "int8", None)],
    "mixed floats": [("*mlp*", "int4 group32", None), ("*attn*", "fp8", "fp8 per_token dynamic")],
}


@pytest.mark.parametrize("rules", EQUAL.values(), ids=EQUAL)
def test_logits_are_those_of_training(rules, tmp_path):
    model = quantized(*rules)
    trained, config = logits(model), model.config.to_dict()
    again = exported(model, tmp_path / "model")
    assert torch.equal(logits(again), trained)
    assert torch.equal(logits(model), trained)
    assert model.config.to_dict() == config
    assert verify(model, tmp_path / "model", [TOKENS], target=NAME).bit_equal


SMALL_FLOATS = {
    "mxfp4": [("*proj", "mxfp4", None)],
    "nvfp4 four over six": [("*q_proj", "nvfp4:four_six", None)],
    "mxfp4 and nvfp4": [("*mlp*", "mxfp4", None), ("*attn*", "nvfp4", None)],
}


@pytest.mark.parametrize("rules", SMALL_FLOATS.values(), ids=SMALL_FLOATS)
def test_small_floats_of_bfloat16_models(rules, tmp_path):
    model = quantized(*rules, dtype=BFLOAT16)
    assert torch.equal(logits(exported(model, tmp_path / "model")), logits(model))


def scales_in_bfloat16(model):
    """Ends the search for ranges with scales that bfloat16 has."""
    for _, layer in quantized_layers(model):
        quantizer = layer.weight_quantizer
        scale, zero_point = quantizer.qparams(blocks(layer.weight.detach().float(), quantizer.spec.granularity))
        quantizer.fix(scale.bfloat16().float(), zero_point)


@pytest.mark.parametrize("spec", ["int4 group32", "int8 per_channel"])
def test_scales_of_bfloat16_models_are_read_in_bfloat16(spec, tmp_path):
    """The file has them in float32; transformers and vLLM make them bfloat16, which moves a weight by 1/256 at most."""
    model = quantized(("*proj", spec, None), dtype=BFLOAT16)
    modules = dict(exported(model, tmp_path / "model").named_modules())
    differ = 0
    for name, layer in quantized_layers(model):
        mine, theirs = layer.quantized_weight(), modules[name].weight
        differ += int((mine != theirs).sum())
        # Half a unit in the last place of the scale, and of each of the two products.
        torch.testing.assert_close(theirs.float(), mine.float(), rtol=3 * 2**-8, atol=0)
    assert differ
    scales_in_bfloat16(model)
    assert torch.equal(logits(exported(model, tmp_path / "model")), logits(model))
    # In float32 nothing is rounded.
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=FLOAT32)
    assert torch.equal(logits(again), logits(model.float()))


def test_nvfp4_is_read_in_bfloat16(tmp_path):
    """q · (s / G) rounded to bfloat16, where training has q · (s · g): ties may go the other way, nothing else."""
    for dtype in (FLOAT32, BFLOAT16):
        model = quantized(("*proj", "nvfp4", None), dtype=dtype)
        modules = dict(exported(model, tmp_path / "model").named_modules())
        differ = total = 0
        for name, layer in quantized_layers(model):
            mine, theirs = layer.quantized_weight(), modules[name].weight
            assert theirs.dtype == dtype
            torch.testing.assert_close(theirs.float(), mine.float(), rtol=2**-7, atol=0)
            differ += int((mine.bfloat16() != theirs.bfloat16()).sum())
            total += mine.numel()
        assert differ < 0.01 * total


def test_static_inputs_are_divided_by_their_scale(tmp_path):
    """round(x / s + z), where training has round(x · (1 / s)) + z: a level apart next to ties alone."""
    # Inputs of the last layer do not depend on it.
    model = quantized(("lm_head", "int8 per_channel", "uint8 affine"))
    again = exported(model, tmp_path / "model")
    seen = []
    for each in (model, again):
        each.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        logits(each)
    assert torch.equal(*seen)
    scale, zero_point = (value.double() for value in model.lm_head.input_quantizer.qparams())
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert stored["lm_head.input_scale"].item() == scale.item()
    assert stored["lm_head.input_zero_point"].item() == zero_point.item() - 128
    ties = (torch.arange(-90, 90) + 0.5) * scale.float()
    x = torch.cat([torch.linspace(-1.2, 1.2, 100_001), ties])
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    s, z = again.lm_head.input_scale, again.lm_head.input_zero_point
    theirs = fake_quantize(x, s, z, again.lm_head.quantization_scheme.input_activations)
    mine = model.lm_head.input_quantizer(x)
    level = x.double() / scale
    apart = ((mine - theirs).abs() > scale / 2).nonzero()
    assert 0 < len(apart) < 200
    assert all(abs(level[i] - level[i].floor() - 0.5) < 1e-4 for i in apart)
    assert ((mine - theirs).abs() < 1.01 * scale).all()


def test_symmetric_tokens_are_those_of_vllm(tmp_path):
    """max|x| / 127, where compressed-tensors' own forward pass has max|x| / 127.5."""
    model = quantized(("lm_head", "int8 per_channel", "int8 per_token narrow dynamic"))
    again = exported(model, tmp_path / "model")
    scheme = again.lm_head.quantization_scheme.input_activations
    assert (scheme.strategy, scheme.dynamic, scheme.symmetric) == ("token", True, True)
    x = torch.randn(2, 3, 64)
    largest = x.abs().amax(-1, keepdim=True)
    theirs, mine = {}, model.lm_head.input_quantizer(x)
    for levels in (127, 127.5):
        s = largest / levels
        theirs[levels] = (x / s).round().clamp(-128, 127) * s
    torch.testing.assert_close(mine, theirs[127])
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    found = forward_quantize(again.lm_head, x, "input", scheme)
    torch.testing.assert_close(found, theirs[127.5])
    # All else is the same: logits are near.
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0.02 * float(logits(model).abs().max()))


def test_a_file_read_by_hand(tmp_path):
    """Nibbles by numpy, without compressed-tensors; the range too."""
    model = quantized(("*proj", "int4 group32", None))
    export_model(model, tmp_path / "model", target=NAME)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    weight = model.model.layers[1].mlp.down_proj.weight.detach().numpy().astype(np.float64)
    name = "model.layers.1.mlp.down_proj.weight_"
    words = stored[name + "packed"].numpy().view(np.uint32)
    codes = np.stack([words >> 4 * i & 15 for i in range(8)], -1).reshape(weight.shape).astype(int) - 8
    groups = weight.reshape(64, 4, 32)
    scale = np.maximum(groups.max(-1) / 7, -groups.min(-1) / 8)
    np.testing.assert_allclose(stored[name + "scale"].numpy(), scale, rtol=1e-6)
    level = groups / scale[..., None]
    # float32 and float64 may part next to a tie.
    assert (np.abs(codes.reshape(level.shape) - level) <= 0.5 + 1e-4).all()
    assert stored[name + "shape"].tolist() == [64, 128]
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert QuantizationConfig.model_validate(config).ignore == ["lm_head"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "dequantize" not in config


def test_several_schemes_are_groups_of_names(tmp_path):
    model = quantized(*EQUAL["mixed"])
    export_model(model, tmp_path / "model", target=NAME)
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups
    found = {scheme.format: scheme for scheme in groups.values() if scheme.weights.num_bits == 8}
    assert config["format"] == "mixed-precision"
    assert len(groups) == 3
    assert found["pack-quantized"].targets == ["lm_head"]
    names = [f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkvo"]
    assert found["int-quantized"].targets == names
    assert found["int-quantized"].input_activations.strategy == "tensor"


@pytest.mark.parametrize("rules", [[("lm_head", "int8 per_channel", None)], [("*proj", "int4 group32", None)]])
def test_tied_heads(rules, tmp_path):
    """A quantized head is stored apart from the embedding that it shares its weight with, a float one is not."""
    model = quantized(*rules, tie_word_embeddings=True)
    again = exported(model, tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    apart = rules[0][0] == "lm_head"
    assert again.config.tie_word_embeddings is not apart
    assert model.config.tie_word_embeddings
    keys = load_file(tmp_path / "model" / "model.safetensors")
    parts = [f"lm_head.weight_{part}" for part in ("packed", "scale", "shape")]
    assert sorted(key for key in keys if key.startswith("lm_head")) == parts * apart
    assert "model.embed_tokens.weight" in keys


EXPERTS = {
    "mixtral": ("Mixtral", {"num_local_experts": 2}),
    "qwen": ("Qwen3Moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 16}),
    "oss": ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}),
}


def with_experts(kind, rules, layers=2):
    name, own = EXPERTS[kind]
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **own)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    prepare(model, QuantPlan([Rule(match, weight=weight) for match, weight in rules.items()]))
    calibrate(model, [TOKENS])
    return model


@pytest.mark.parametrize("kind", ["mixtral", "qwen"])
@pytest.mark.parametrize(
    ("experts", "attention", "groups"),
    [
        ("int4 group32 mse", "int4 group32 mse", 1),
        ("int3 per_channel", "fp8 per_channel", 2),
        ("fp8", "int8 per_channel", 2),
        ("int8 group16", "float", 1),
        ("int5", "int5 per_channel", 1),
    ],
)
def test_experts_are_packed_one_by_one(kind, experts, attention, groups, tmp_path):
    """A folder has codes and scales for each expert's matrices; transformers reads them to the same logits."""
    model = with_experts(kind, {"*.self_attn.*": attention, "*.experts.*": experts})
    loaded = exported(model, tmp_path / "model")
    assert torch.equal(logits(loaded), logits(model))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert not [key for key in stored if "quantize" in key]
    of_experts = {key for key in stored if ".experts." in key}
    count = 2 * (2 if kind == "mixtral" else 3) * 3
    assert len({key.rpartition(".")[0] for key in of_experts}) == count
    codes = [key for key in of_experts if key.endswith((".weight", ".weight_packed"))]
    assert len(codes) == len([key for key in of_experts if key.endswith(".weight_scale")]) == count
    assert {stored[key].dtype for key in codes} == {torch.float8_e4m3fn if experts == "fp8" else torch.int32}
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert len({json.dumps(group["weights"]) for group in config["config_groups"].values()}) == groups
    assert not [rule for rule in config["ignore"] if "expert" in rule]


def test_codes_of_an_expert_are_those_of_its_rows(tmp_path):
    """Unpacked by hand: the first matrix of `gate_up_proj` is `w1` above `w3`."""
    model = with_experts("mixtral", {"*.experts.*": "int4 group32"}, layers=1)
    want = model.model.layers[0].mlp.experts.gate_up_proj.detach()[1, 64:]
    exported(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    place = "model.layers.0.block_sparse_moe.experts.1.w3.weight_"
    words, scale = stored[f"{place}packed"], stored[f"{place}scale"]
    codes = torch.stack([(words >> (4 * i) & 15) - 8 for i in range(8)], -1).flatten(1)
    steps = want.view(64, 2, 32).abs().amax(2) / 7
    assert stored[f"{place}shape"].tolist() == [64, 64]
    levels = (want.view(64, 2, 32) / scale[..., None]).round().clamp(-8, 7).view(64, 64)
    assert torch.equal(codes, levels.int())
    assert (scale <= steps * 1.0001).all()


@pytest.mark.parametrize(
    ("kind", "rules", "message"),
    [
        (
            "oss",
            {"*.experts.*": "int4 group32"},
            "experts are held as .experts, outputs, inputs., here",
        ),
        ("qwen", {"*.experts.*": "mxfp4"}, "symmetric integers of 2 to 8 bits, or fp8; .* 'int4 group32'"),
        ("qwen", {"*.experts.*": "int4 affine"}, "affine.: experts are symmetric integers of 2 to 8 bits, or fp8;"),
        ("qwen", {"*.experts.*": "fp8 block32"}, "E4M3 with a scale for each channel; .* 'fp8 per_channel'"),
        ("qwen", {"*.experts.gate_up_proj": "int4"}, "all quantized or all float, here .*down_proj is float"),
        (
            "qwen",
            {"*.experts.*": "int4 group16", "*.1.mlp.experts.*": "int8 group16"},
            "one spec in a folder, got int4 group16, int8 group16",
        ),
        (
            "mixtral",
            {"*.gate.weight": "int4 group32"},
            "layers and of experts are held, not .* MixtralTopK",
        ),
    ],
)
def test_experts_that_a_folder_cannot_hold(kind, rules, message, tmp_path):
    model = with_experts(kind, rules)
    with pytest.raises(ExportError, match=message):
        export_model(model, tmp_path / "model", target=NAME)
    assert not (tmp_path / "model").exists()


def test_experts_stay_float(tmp_path):
    """Transformers holds the experts of a layer as parameters of three dims; in the file each is on its own again."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 2}
    models = {}
    for spec in ("fp8 per_channel", "int4 group32"):
        torch.manual_seed(0)
        models[spec] = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()
        prepare(models[spec], QuantPlan([Rule("*.self_attn.*_proj", weight=spec)]))
        calibrate(models[spec], [TOKENS])
    with pytest.raises(ExportError, match=r"experts for packed ones, and they stay float \(.*gate_up_proj, 4 in all\)"):
        export_model(models["int4 group32"], tmp_path / "model", target=NAME)
    model = models["fp8 per_channel"]
    assert torch.equal(logits(exported(model, tmp_path / "model")), logits(model))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    experts = {key for key in stored if ".experts." in key}
    assert len(experts) == 2 * 2 * 3
    assert all(stored[key].dtype == FLOAT32 for key in experts)
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    rules = [rule[3:] for rule in config["ignore"] if rule.startswith("re:")]
    assert all(any(re.match(rule, key) for rule in rules) for key in experts)


@pytest.mark.parametrize(
    ("match", "weight", "act", "message"),
    [
        ("*down_proj", "int4 group48 ragged", None, "rows of 128 are no whole groups of 48; .* 'int4 group32'"),
        ("*down_proj", "twn", None, "integers, fp8, nvfp4 and mxfp4; .* 'int4 group32'"),
        ("*down_proj", "kmeans4", None, "integers, fp8, nvfp4 and mxfp4; .* 'int4 group32'"),
        ("*down_proj", "fp8:e5m2", None, "holds E4M3; .* 'fp8 per_channel'"),
        ("*down_proj", "fp8 group32", None, "those of channels, of squares or of the tensor; .* 'fp8 per_channel'"),
        ("*down_proj", "fp8 block48", None, "64 rows of 128 are no whole squares of 48; .* 'fp8 per_channel'"),
        ("*down_proj", "fp8 block32", "fp8", "squares of a weight belong to groups of its input; .* 'fp8 per_ch"),
        ("*down_proj", "fp8", "int8", "fp8 is for weights next to float or fp8 inputs; .* 'int8 per_channel'"),
        ("*down_proj", "int8", "fp8", "integers are for weights next to float or integer inputs; .* 'fp8 per_ch"),
        ("*down_proj", "fp8", "fp8 per_channel", "one scale, or one for each token; .* 'fp8'"),
        ("*down_proj", "int8", "int8 per_token dynamic", "max.x. / 127, that of a narrow range; .* 'int8 per_token n"),
        ("*down_proj", "int8", "int8 dynamic", "one fixed scale, or one for each token"),
        ("*down_proj", "int12 per_channel", None, "2 to 8 bits; .* 'int8 per_channel'"),
        ("*down_proj", "int4 group32", "int8", "groups are for weights next to float inputs, or.* 'int4 per_channel'"),
        ("*down_proj", "uint8 affine", "int8", "a weight is symmetric; .* 'int8 per_channel'"),
        ("*down_proj", "nvfp4", "int8", "nvfp4 is for weights next to float inputs; .* 'int4 per_channel'"),
        ("*down_proj", "int8 per_channel", "int6", "integers of 8 bits, or fp8; .* 'int8'"),
        ("*down_proj", "int8 per_channel", "int8 narrow", "with a fixed scale have all levels; .* 'int8'"),
        ("*down_proj", "int8 per_channel", "int8 per_channel", "one fixed scale, or one for each token"),
        ("*down_proj", "float", "int8", "next to a quantized weight, this one is float"),
        ("*embed_tokens", "int8 per_channel", None, "cannot load packed embeddings"),
    ],
)
def test_what_a_folder_cannot_hold_is_refused_at_plan_time(match, weight, act, message):
    prepare(model := llama(), QuantPlan([Rule(match, weight=weight, input=act or "float")]))
    (fault, *others) = TARGETS[NAME].faults(Request(model=model))
    # The other side of a pair may be refused for it.
    assert len(others) <= 4
    with pytest.raises(ValueError, match=message):
        raise ValueError("\n".join([fault, *others]))


def test_plans_for_the_target_are_refused_before_any_work():
    tokens = plan_for(QuantPlan([Rule("*", input="uint8 per_token affine dynamic")]), NAME)
    assert str(tokens.rules[0].input) == "int8 per_token narrow dynamic"
    plan = plan_for(QuantPlan([Rule("*_proj", weight="nvfp4", input="uint8 affine")]), NAME)
    assert str(plan.rules[0].input) == "int8"
    prepare(model := llama(), plan)
    with pytest.raises(PlanError, match=r"target 'compressed-tensors' cannot hold .* under its plan: 14 faults"):
        refuse_for_target(model, plan)


def test_zero_points_of_few_outputs(tmp_path):
    """Those of 4 bits in several groups cannot be read back; other bits, or one group, can."""
    few = {"num_key_value_heads": 1, "head_dim": 8}
    (fault, _) = TARGETS[NAME].faults(Request(model=quantized(("*k_proj", "int4 group32 affine", None), **few)))
    assert "4-bit zero points of 8 outputs, 8 or fewer; the nearest that fits is 'int4 group32'" in fault
    for spec in ("int4 per_channel affine", "int3 group32 affine", "int5 group16 affine"):
        model = quantized(("*k_proj", spec, None), **few)
        assert torch.equal(logits(exported(model, tmp_path / "model")), logits(model))


def test_outputs_are_refused():
    prepare(model := llama(), QuantPlan([Rule("*down_proj", weight="int8", input="int8", output="int8")]))
    faults = TARGETS[NAME].faults(Request(model=model))
    assert len(faults) == 2
    assert all("outputs stay float" in fault for fault in faults)


@pytest.mark.parametrize("spec", ["int4 per_channel affine", "mxfp4"])
def test_what_transformers_reads_at_loading_only_is_one_scheme(spec):
    rules = [("*mlp*", spec, None), ("*attn*", "int8 per_channel", None)]
    model = quantized(*rules)
    (fault,) = TARGETS[NAME].faults(Request(model=model))
    assert "where all layers have one scheme; here are " in fault
    assert f"down_proj ({spec})" in fault or f"gate_proj ({spec})" in fault
    assert bool(TARGETS[NAME].faults(Request(model=quantized(*rules, dtype=BFLOAT16)))) is (spec != "mxfp4")


class Student(L.LightningModule):
    def __init__(self, teacher=False):
        super().__init__()
        self.net = llama(use_cache=False).train()
        self.teacher = llama().train().requires_grad_(False) if teacher else None

    def forward(self, tokens):
        return self.net(tokens).logits

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten())

    def validation_step(self, batch, batch_idx):
        return self.training_step(batch, batch_idx)

    def val_dataloader(self):
        return DataLoader(TensorDataset(TOKENS), 2)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def test_a_module_that_holds_one_is_trained_and_exported(tmp_path):
    module, path = Student(teacher=True), tmp_path / "model"
    plan = QuantPlan([Rule("net.*proj", weight="int4 per_channel lsq", input="uint8 affine ema")])
    loader = DataLoader(TensorDataset(TOKENS), 2)
    before = logits(module.net)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[QAT(plan, target=NAME), Export(path, target=NAME)], **QUIET
    )
    trainer.fit(module, loader)
    module.eval()
    # On the target's own grid: symmetric inputs.
    assert str(module.net.model.layers[0].mlp.up_proj.input_quantizer.spec) == "int8 ema"
    after = logits(loaded(path))
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(module.net))
    assert verify(module, path, [TOKENS], Student, target=NAME).bit_equal
    with pytest.raises(ExportError, match="makes a Linear with 0 models of the class LlamaForCausalLM"):
        verify(module, path, [TOKENS], lambda: nn.Linear(2, 2), target=NAME)


def test_the_command_writes_and_verifies_one(tmp_path, monkeypatch, caplog):
    class Data(L.LightningDataModule):
        val_dataloader = Student.val_dataloader

    project = ModuleType("text_project")
    project.Student, project.Data = Student, Data
    monkeypatch.setitem(sys.modules, "text_project", project)
    plan = "plan={rules: [{match: 'net.*proj', weight: int4 group32}]}"
    options = [f"to={NAME}", "~model", "~data", "+model={_target_: text_project.Student}",
               "+data={_target_: text_project.Data}", plan, "phases=[calibrate]", "verify=true"]  # fmt: skip
    with caplog.at_level(logging.INFO):
        path = run_export(composed(tmp_path, *options))
    assert path == tmp_path / "model"
    assert "bit-equal, agreement 1.0000" in caplog.text


def test_one_transformers_model_is_wanted(tmp_path):
    net = nn.Sequential(nn.Linear(32, 8))
    prepare(net, "int8 per_channel")
    calibrate(net, ())
    with pytest.raises(ExportError, match="Sequential holds no transformers model"):
        export_model(net, tmp_path / "model", target=NAME)
    both = nn.ModuleDict({name: quantized(("*proj", "int4 group32", None)) for name in ("a", "b")})
    with pytest.raises(ExportError, match=r"2 quantized transformers models: a \(LlamaForCausalLM\), b \(Llama"):
        export_model(both, tmp_path / "model", target=NAME)
    with pytest.raises(ExportError, match="1 transformers models, none of them quantized: itself"):
        export_model(llama(), tmp_path / "model", target=NAME)
    beside = nn.ModuleDict({"net": quantized(("*proj", "int4 group32", None)), "score": net})
    with pytest.raises(ExportError, match=r"score.0 is quantized and no part of net \(LlamaForCausalLM\)"):
        export_model(beside, tmp_path / "model", target=NAME)
    assert not list(tmp_path.iterdir())


def test_adapters_are_merged_first(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(transformers.PreTrainedModel, "is_gradient_checkpointing", False)  # PEFT's use of it warns
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config).eval()
    prepare(model, QuantPlan([Rule("*_proj*", weight="int4 group32"), Rule("*lora*", weight="float")]))
    calibrate(model, ())
    with pytest.raises(ExportError, match=r"adapters of PEFT are not merged .*merge_and_unload\(\).*'beside'"):
        export_model(model, tmp_path / "model", target=NAME)
    merged = model.merge_and_unload()
    assert torch.equal(logits(exported(merged, tmp_path / "model")), logits(merged))


def adapted(monkeypatch, *rules, **options):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(transformers.PreTrainedModel, "is_gradient_checkpointing", False)  # PEFT's use of it warns
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    model = peft.get_peft_model(llama(), config).eval()
    prepare(model, QuantPlan([Rule("*lora*", weight="float"), *rules]))
    calibrate(model, [TOKENS])
    return peft, model


@pytest.mark.parametrize("act", ["float", "int8"])
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "and a trained head"])
def test_adapters_beside_their_base(act, options, tmp_path, monkeypatch):
    """The folder is the base for transformers; with the adapters next to it, PEFT computes what was trained."""
    weight = "int4 group32" if act == "float" else "int8 per_channel"
    peft, model = adapted(monkeypatch, Rule("*layers*_proj*", weight=weight, input=act),
                          Rule("*lora*", weight="float", input="float"), **options)  # fmt: skip
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(1.5)
    wanted, path = logits(model), tmp_path / "model"
    size = export_model(model, path, target=NAME, adapters="beside")
    assert size == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    base = loaded(path)
    with model.disable_adapter():
        without = logits(model)
    assert torch.equal(logits(base), without) or options
    assert not torch.equal(wanted, without)
    again = peft.PeftModel.from_pretrained(base, path / "adapters").eval()
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(model), wanted)
    assert verify(model, path, [TOKENS], target=NAME).bit_equal
    # vLLM knows a layer's adapter by these names.
    names = load_file(path / "adapters" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert not any("quantizer" in name or "base_layer" in name for name in names)


def test_peft_wraps_packed_weights_after_a_forward_pass_alone(tmp_path, monkeypatch):
    """A row of examples/runtimes.md; fails when PEFT or transformers changes it."""
    peft, model = adapted(monkeypatch, Rule("*_proj*", weight="int4 group32"), Rule("*lora*", weight="float"))
    export_model(model, tmp_path / "model", target=NAME, adapters="beside")
    with pytest.raises(AttributeError, match="no attribute 'weight'"):
        peft.PeftModel.from_pretrained(loaded(tmp_path / "model"), tmp_path / "model" / "adapters")


def test_adapters_that_cannot_be_written_beside_are_refused(tmp_path, monkeypatch):
    _, model = adapted(monkeypatch, Rule("*_proj*", weight="int4 group4"))
    with pytest.raises(ExportError, match=r"q_proj\.lora_A\.default is quantized, and PEFT writes"):
        export_model(model, tmp_path / "model", target=NAME, adapters="beside")
    _, model = adapted(monkeypatch, Rule("*mlp*", weight="int4 group32"))
    model.add_adapter("second", model.peft_config["default"])
    with pytest.raises(ExportError, match=r"several adapters \(default, second\), a folder has one"):
        export_model(model, tmp_path / "model", target=NAME, adapters="beside")
    with pytest.raises(ExportError, match="adapters='beside', and LlamaForCausalLM has no adapters of PEFT"):
        export_model(quantized(("*proj", "int4 group32", None)), tmp_path / "m", target=NAME, adapters="beside")
    with pytest.raises(ExportError, match="adapters is 'merged' or 'beside', got 'both'"):
        export_model(model, tmp_path / "model", target=NAME, adapters="both")
    assert not list(tmp_path.iterdir())


def test_files_of_the_tokenizer_come_along(tmp_path):
    origin = tmp_path / "origin"
    llama().save_pretrained(origin)
    (origin / "tokenizer.json").write_text("{}")
    model = loaded(origin).eval()
    prepare(model, QuantPlan([Rule("*proj", weight="int4 group32")]))
    calibrate(model, ())
    again = exported(model, tmp_path / "model")
    assert torch.equal(logits(again), logits(model))
    assert (tmp_path / "model" / "tokenizer.json").read_text() == "{}"
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert len(modes) == 1


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    model, path = quantized(("*proj", "int4 group32", None)), tmp_path / "model"
    exported(model, path)
    (path / "notes.txt").write_text("of the first export")
    other = quantized(("*proj", "int8 per_channel", None))
    monkeypatch.setattr(type(other), "save_pretrained", lambda *args, **options: shutil.copy("/no/file", "/no/folder"))
    with pytest.raises(ExportError, match="cannot write .*model: No such file"):
        export_model(other, path, target=NAME)
    assert torch.equal(logits(loaded(path)), logits(model))
    monkeypatch.undo()
    assert torch.equal(logits(exported(other, path)), logits(other))
    assert not (path / "notes.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_other_folders_and_files_stay(tmp_path):
    model = quantized(("*proj", "int4 group32", None))
    folder, file = tmp_path / "mine", tmp_path / "file"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years")
    file.write_text("years")
    for path, what in ((folder, "a folder with files that no export wrote"), (file, "a file")):
        with pytest.raises(ExportError, match=f"it is {what}, give the name of a new folder"):
            export_model(model, path, target=NAME)
    assert (folder / "thesis.tex").read_text() == file.read_text() == "years"
    with pytest.raises(ExportError, match=r"writes a folder, give it a name without \.safetensors"):
        Export(tmp_path / "model.safetensors", target=NAME)
    with pytest.raises(ExportError, match="is no folder of a transformers model"):
        verify(model, folder, [TOKENS], target=NAME)
    (tmp_path / "empty").mkdir()
    exported(model, tmp_path / "empty")
