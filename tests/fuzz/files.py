"""Packed files, checkpoints and plans."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from torch import Tensor

from lq_plugin import QAT, QuantPlan, load_checkpoint, prepare
from lq_plugin.export import load_packed
from lq_plugin.model.prepare import quantized_layers
from tests.callbacks.conftest import Data, Module
from tests.export.test_packed_hostile import net, packed_content, rewritten
from tests.fuzz.mutate import EXTREMES, mutated, other_leaf, other_text
from tests.fuzz.target import OTHER, SAME, Failure, Target
from tests.lifecycle import test_hostile_plans

#: Words of plans, of which many mutations stay plans.
SPECS = (
    "int2",
    "int4 per_channel",
    "uint8 affine",
    "int4 group4 ragged",
    "mxfp4",
    "kmeans2",
    "bwn",
    "twn",
    "float",
    "int8 lsq",
    "nvfp4",
)


def need_untouched(model: Any, before: dict[str, Tensor]) -> None:
    state = model.state_dict()
    if (
        quantized_layers(model)
        or state.keys() != before.keys()
        or any(not torch.equal(state[key], value) for key, value in before.items())
    ):
        raise Failure("it was refused, and the model is not as before")


class Loaded(Target):
    """A file that is read into a float model."""

    def fresh(self) -> Any:
        raise NotImplementedError

    def read(self, model: Any) -> None:
        raise NotImplementedError

    def use(self, case: Any) -> str:
        self.write(case)
        model = self.fresh()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            self.read(model)
        except Exception:
            need_untouched(model, before)
            raise
        if not quantized_layers(model):
            raise Failure("it was read, and nothing is quantized")
        with torch.no_grad():
            if any(
                layer.weight_quantizer is not None and layer.quantized_weight().isnan().any()
                for _, layer in quantized_layers(model)
            ):
                raise Failure("quantized weights are NaN")
            return SAME if self.output(model).equal(self.wanted) else OTHER

    def write(self, case: Any) -> None:
        raise NotImplementedError

    def output(self, model: Any) -> Tensor:
        return model.eval()(self.x)

    wanted: Tensor
    x: Tensor


class Packed(Loaded):
    name = "packed files"
    share = 2000
    legitimate = (
        "codes, scales or float numbers in the blob, places of the same sizes, or a plan that fits the same layers: "
        "another model"
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.content = packed_content(folder / "net.safetensors")
        self.x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
        model = self.fresh()
        self.read(model)
        self.wanted = self.output(model)

    def fresh(self) -> Any:
        return net().eval()

    def read(self, model: Any) -> None:
        load_packed(model, self.folder / "net.safetensors")

    def unmutated(self) -> Any:
        return copy.deepcopy(self.content)

    def mutated(self, rng: random.Random) -> Any:
        metadata, blob, table = copy.deepcopy(self.content)
        part = rng.choice(["table", "table", "table", "plan", "plan text", "metadata", "blob"])
        if part == "table":
            table = mutated(
                rng, table, words=[*SPECS, [0, [8], "float32"], [0, [8, 16], 4], "float16", "bool", "complex64"]
            )
        elif part == "plan":
            metadata["plan"] = json.dumps(mutated(rng, json.loads(metadata["plan"]), words=SPECS))
        elif part == "plan text":
            metadata["plan"] = clean(other_text(rng, metadata["plan"]))
        elif part == "metadata":
            changed = mutated(rng, metadata)
            metadata = {"plan": ""} | (
                {clean(key): clean(value) for key, value in changed.items()} if isinstance(changed, dict) else {}
            )
        else:
            blob = mutated_blob(rng, blob)
        return metadata, blob, table

    def write(self, case: Any) -> None:
        rewritten(case, self.folder / "net.safetensors", lambda metadata, blob, table: None)


def clean(value: Any) -> str:
    """A text that the header of a safetensors file can hold."""
    return str(value).encode("utf-8", "replace").decode()


def mutated_blob(rng: random.Random, blob: Any) -> Any:
    """Returns bytes with a number of 4 bytes replaced, a part cut out, or noise."""
    kind = rng.randrange(4)
    if kind == 0:
        return blob[: rng.randrange(len(blob))]
    if kind == 1:
        return np.concatenate([blob, blob[: rng.randrange(len(blob))]])
    start = rng.randrange(len(blob) // 4) * 4
    number = np.float32(rng.choice([0.0, -1.0, 1.0, 1e-45, 3e38, np.nan, np.inf, -np.inf]))
    new = np.frombuffer(number.tobytes(), np.uint8) if kind == 2 else np.frombuffer(rng.randbytes(4), np.uint8)
    blob[start : start + 4] = new[: len(blob) - start]
    return blob


def mutated_tensor(rng: random.Random, value: Any) -> Any:
    """Another tensor for a tensor, another leaf for any other leaf."""
    if not isinstance(value, Tensor) or rng.random() < 0.1:
        return other_leaf(rng, None if isinstance(value, Tensor) else value)
    if value.numel() == 0:
        return torch.zeros(3)
    flat = value.detach().clone().reshape(-1)
    kind = rng.randrange(6)
    if kind == 0:
        flat[rng.randrange(len(flat))] = rng.choice([0, 1] if flat.dtype == torch.bool else [0, -1, 2, 127])
        return flat.reshape(value.shape)
    if kind == 1 and flat.is_floating_point():
        flat[rng.randrange(len(flat))] = rng.choice([np.nan, np.inf, -np.inf, 1e30, 1e-45])
        return flat.reshape(value.shape)
    if kind == 2:
        return value.to(
            rng.choice(
                [torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.bfloat16]
            )
        )
    return rng.choice(
        [
            flat,
            flat[:0],
            flat[: len(flat) // 2],
            value[None],
            -value.float(),
            torch.zeros_like(value),
            value.to_sparse(),
        ]
    )


class Checkpoints(Loaded):
    name = "checkpoints"
    share = 1500
    legitimate = (
        "numbers, number types of the same shapes, or a plan with the same buffers: another model "
        "(weights may then be anything)"
    )
    errors = (RuntimeError,)  # of torch, for keys and shapes; `use` lets no other pass

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        L.seed_everything(0, verbose=False)
        self.path = folder / "qat.ckpt"
        fit = L.Trainer(
            accelerator="cpu", callbacks=[QAT("w4 lsq a4 ema")], max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        fit.fit(Module(), datamodule=Data())
        fit.save_checkpoint(self.path)
        content = torch.load(self.path, weights_only=True)
        # What belongs to Lightning alone is as in any checkpoint.
        keep = ("state_dict", "callbacks", "pytorch-lightning_version", "epoch", "global_step")
        self.content = {key: dict(content[key]) if key == "state_dict" else content[key] for key in keep}
        self.x = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        torch.save(self.content, self.path)
        model = self.fresh()
        self.read(model)
        self.wanted = self.output(model)
        self.float = Module().eval()

    def fresh(self) -> Any:
        return Module().eval() if not hasattr(self, "float") else copy.deepcopy(self.float)

    def read(self, model: Any) -> None:
        try:
            load_checkpoint(model, self.path)
        except RuntimeError as error:
            if "Error(s) in loading state_dict" not in str(error):
                raise Failure(f"RuntimeError: {error}") from error
            raise

    def unmutated(self) -> Any:
        return self.content

    def mutated(self, rng: random.Random) -> Any:
        content = dict(self.content)
        # The plan is small next to the tensors, and half of the cases are about it.
        part = rng.choice(["state_dict", "callbacks", "callbacks", "all"])
        if part == "all":
            return mutated(rng, content, mutated_tensor)
        content[part] = mutated(rng, content[part], mutated_tensor, SPECS if part == "callbacks" else ())
        return content

    def write(self, case: Any) -> None:
        torch.save(case, self.path)

    def use(self, case: Any) -> str:
        # NaN among the weights is what a diverged training has saved: it is loaded as it is.
        try:
            return super().use(case)
        except Failure as failure:
            if str(failure) == "quantized weights are NaN":
                return OTHER
            raise


class Plans(Target):
    name = "plan files"
    share = 2500
    legitimate = (
        "a changed number, word or pattern of a hand-written plan is another plan; it survives being written and read"
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "plan.yaml"
        # The same for the layers that there are.
        names = {"re:layer[12].*": "re:net.conv.*", "fc": "net.fc", "layer1.?": "net.conv?"}
        self.tree = yaml.safe_load(test_hostile_plans.PLAN)
        for rule in self.tree["rules"]:
            rule["match"] = names.get(rule["match"], rule["match"])
        self.tree["rules"][0]["weight"] = "int4 group3 ragged mse"
        self.tree["rules"][-1]["input"] = "mxfp4"
        self.plan = QuantPlan.from_dict(self.tree)
        self.model = Module()

    def unmutated(self) -> Any:
        return yaml.safe_dump(self.tree).encode()

    def mutated(self, rng: random.Random) -> Any:
        if rng.random() < 0.4:
            return test_hostile_plans.mutated(rng)
        tree = mutated(rng, self.tree, words=[*SPECS, *EXTREMES])
        return yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5, sort_keys=False).encode("utf-8", "surrogatepass")

    def use(self, case: Any) -> str:
        self.path.write_bytes(case)
        plan = QuantPlan.parse(self.path)
        if QuantPlan.from_dict(yaml.safe_load(plan.to_yaml())) != plan:
            raise Failure("written and read it is another plan")
        if plan == self.plan:
            return SAME
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        try:
            prepare(self.model, plan)
        except Exception:
            need_untouched(self.model, before)
            raise
        self.model = Module()
        return OTHER
