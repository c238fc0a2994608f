"""Models of `benchmarks.targets`, their plans, and their float files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import deploy_models
from lq_plugin import QuantPlan, Rule
from lq_plugin.demo.cifar10 import load_images, normalize
from lq_plugin.demo.resnet import load_resnet
from lq_plugin.export import executorch_file, litert_file

#: Of activations; integer runtimes round what layers read, what sums read, and the result.
ACTIVATION = "uint8 affine mse"
VOCABULARY, LENGTH = 1024, 64


class MobileNet(nn.Module):
    """Inverted residuals with depthwise convolutions and hard-swish on CIFAR-10's images, as MobileNetV3 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.blocks = nn.ModuleList(
            [_block(16, 64, 24, 2), _block(24, 96, 24, 1), _block(24, 96, 40, 2), _block(40, 160, 40, 1)]
        )
        self.head = nn.Sequential(nn.Conv2d(40, 128, 1, bias=False), nn.BatchNorm2d(128), nn.Hardswish())
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = x + y if y.shape == x.shape else y
        return self.classifier(self.head(x).mean((2, 3)))


def _block(inputs: int, hidden: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(),
        nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(),
        nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Calibration batches, and test inputs with their classes where the model has been trained."""

    calibration: Sequence[Tensor]
    test: Tensor
    classes: Tensor | None


@dataclass(frozen=True)
class Case:
    """A model, a plan, and the targets that it goes to.

    Args:
        model: its name.
        plan: the name of the plan.
        weight: spec of all layers' weights.
        targets: names, with the runtime after a colon where there are several.
        rules: further rules, for targets that compute sums and results in integers.
        quantized_inputs: inputs of layers have 8 bits.
    """

    model: str
    plan: str
    weight: str
    targets: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    quantized_inputs: bool = True

    def quant_plan(self, target: str, runtime: str | None = None) -> QuantPlan:
        """The plan for one target.

        Files of ONNX have no step of the result, and their means are float. OpenVINO leaves out the rounding between a
        convolution and a sum (examples/runtimes.md), so its plan has none.
        """
        activation = {"input": ACTIVATION} if self.quantized_inputs else {}
        whole = target in ("executorch", "litert")
        rules = [rule for rule in self.rules if whole or (rule.output is None and rule.match != "mean_0")]
        rules = [] if "openvino" in (target, runtime) else rules
        return QuantPlan([Rule("*", weight=self.weight, **activation), *rules])


_CNN = ("onnx:onnxruntime", "onnx:openvino", "openvino", "tensorrt:onnxruntime", "executorch", "litert")
_RESNET = (
    Rule("layer*.add_0", input=ACTIVATION), Rule("mean_0", input=ACTIVATION), Rule("linear", output=ACTIVATION)
)  # fmt: skip
_MOBILE = (
    Rule("add_*", input=ACTIVATION), Rule("type:hardswish", input=ACTIVATION), Rule("mean_0", input=ACTIVATION),
    Rule("classifier", output=ACTIVATION),
)  # fmt: skip
_GGUF = ("gguf:gguf", "gguf:xllamacpp")
_FLOAT = (Rule("type:Embedding", weight="float"), Rule("*lm_head", weight="float"))


def _language_model(plan: str, weight: str, *targets: str) -> Case:
    return Case("llama", plan, weight, targets, _FLOAT, quantized_inputs=False)


CASES = (
    Case("resnet20", "W8A8", "int8 per_channel mse", _CNN, _RESNET),
    Case("resnet20", "W4A8", "int4 per_channel mse", _CNN, _RESNET),
    Case("mobilenet", "W8A8", "int8 per_channel mse", _CNN, _MOBILE),
    _language_model("int4 groups", "int4 group32 mse", "compressed-tensors", "mlx"),
    _language_model("Q4_0", "q4_0", *_GGUF),
    _language_model("Q8_0", "q8_0", *_GGUF),
    _language_model("MXFP4", "mxfp4", "compressed-tensors", *_GGUF, "mlx"),
    _language_model("ternary", "tq2_0", *_GGUF),
)  # fmt: skip


def build(name: str, data: Path, images: int) -> tuple[nn.Module, Data]:
    """A float model in evaluation mode and its data."""
    torch.manual_seed(0)
    if name == "llama":
        tokens = torch.randint(0, VOCABULARY, (8, LENGTH))
        return _llama(), Data([tokens[:4]], tokens, None)
    calibration = normalize(load_images(data, "train", 0, 256)[0])
    pixels, classes = load_images(data, "test", 0, images)
    if name == "resnet20":
        model: nn.Module = load_resnet(data / "resnet_cifar10/resnet20_jpeg.safetensors")
        return model.eval(), Data(calibration.split(128), normalize(pixels), classes)
    model = MobileNet().train()
    with torch.no_grad():
        for _ in range(20):  # running statistics of random weights
            model(calibration)
    return model.eval(), Data(calibration.split(128), normalize(pixels), None)


class _Logits(nn.Module):
    """A language model that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return _Logits(LlamaForCausalLM(config)).eval()


def float_runner(target: str, runtime: str | None, model: nn.Module, x: Tensor) -> Callable[[Tensor], Any] | None:
    """The float model in the target's runtime, for batches shaped as `x`; None where files of it are not written."""
    if target in ("onnx", "tensorrt", "openvino"):
        from lq_plugin.export import OpenVINOSession, onnx_session

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float.onnx"
            deploy_models.export_float(deploy_models.folded(model, x), x.expand(2, *x.shape[1:]), path)
            openvino = "openvino" in (target, runtime)
            session: Any = OpenVINOSession(path, threads=1) if openvino else onnx_session(path, threads=1)
        return lambda value: session.run(None, {"x": value.numpy()})
    if target not in ("executorch", "litert"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "float"
        if target == "executorch":
            executorch_file.float_executorch(deploy_models.folded(model, x), (x,), path)
            return executorch_file.open_executorch(path, threads=1).run
        litert_file.float_litert(deploy_models.folded(model, x), (x,), path)
        return litert_file.open_litert(path, threads=1).run
