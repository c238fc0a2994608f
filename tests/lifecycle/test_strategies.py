"""Strategies and precisions of the Trainer: what works equals one way of training, and what does not says so before
training."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.utils.parametrizations import weight_norm

from lq_plugin import PTQ, QAT, PlanError, QuantPlan, Rule, prepare
from lq_plugin.callbacks.trainer.sharding import refuse_unsupported
from lq_plugin.model import quantizers
from tests.callbacks.conftest import Data, Module

#: Every way a range is found: learned, estimated once an epoch, by moving average, at the first batch; and of an
#: operation.
PLAN = QuantPlan(
    [
        Rule("net.conv", weight="int4 per_channel lsq", input="int4 lsq"),
        Rule("net.conv2", weight="int4 per_channel mse", input="uint8 affine percentile:99.9"),
        Rule("net.fc", weight="int4 group4", input="uint8 affine ema:0.5"),
        Rule("net.add_0", input="int8 ema:0.5"),
    ]
)
ROOT = Path(__file__).parents[2]


class Plain(Module):
    """Without batch norms, whose statistics are each rank's own under FSDP2."""

    def __init__(self):
        super().__init__()
        self.net.bn = self.net.bn2 = torch.nn.Identity()


class Sharded(Plain):
    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not isinstance(self, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net.conv2, mesh=mesh)
            fully_shard(self, mesh=mesh)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fit(folder, strategy, epochs, resume=None, write=None):
    """Entry of the processes: trains, and writes the state that each rank has in the end."""
    L.seed_everything(0, verbose=False)
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if strategy == "fsdp2" else "ddp"
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=sharded, callbacks=[QAT(PLAN)], max_epochs=epochs, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    module = (Sharded if strategy == "fsdp2" else Plain)()
    trainer.fit(module, datamodule=Data(batch_size=8), ckpt_path=resume)
    state = {key: whole(value).clone() for key, value in module.state_dict().items()}
    torch.save(state, f"{folder}/{write or strategy}{trainer.global_rank}.pt")
    if write == "half":
        trainer.save_checkpoint(f"{folder}/half.ckpt")


def in_two_processes(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.lifecycle.test_strategies", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def state(folder, name, rank):
    return torch.load(folder / f"{name}{rank}.pt", weights_only=True)


def states_equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.slow
def test_fsdp2_trains_as_ddp_does(tmp_path):
    """Ranges of all kinds are equal on all ranks, bit for bit, and those of DDP up to the order of sums."""
    for strategy in ("fsdp2", "ddp"):
        in_two_processes(tmp_path, strategy, 2)
        assert states_equal(state(tmp_path, strategy, 0), state(tmp_path, strategy, 1))
    mine, theirs = state(tmp_path, "fsdp2", 0), state(tmp_path, "ddp", 0)
    assert mine.keys() == theirs.keys()
    for key in [key for key in mine if "quantizer" in key]:
        torch.testing.assert_close(
            mine[key], theirs[key], rtol=0.02, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert float(mine["net.conv.input_quantizer.scale"]) != 1.0


@pytest.mark.slow
def test_fsdp2_resumes(tmp_path):
    in_two_processes(tmp_path, "fsdp2", 2)
    in_two_processes(tmp_path, "fsdp2", 1, "", "half")
    in_two_processes(tmp_path, "fsdp2", 2, tmp_path / "half.ckpt", "resumed")
    assert not states_equal(state(tmp_path, "half", 0), state(tmp_path, "fsdp2", 0))
    for rank in range(2):
        assert states_equal(state(tmp_path, "resumed", rank), state(tmp_path, "fsdp2", rank))


class SaveState(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{self.folder}/spawned{trainer.global_rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [True, False], ids=["prepared", "not prepared"])
def test_the_module_that_spawned_processes_train_copies_of(prepared, tmp_path, capfd):
    """Prepared before, it ends as the trained copies, bit for bit; otherwise it is float, and that is said.

    While a range is not used yet (its schedule begins later), DDP does not miss its gradient.
    """
    plan = QuantPlan(
        [Rule("*", weight="int4 lsq", input="int4 lsq")], {"weights_start": "step 2", "activations_start": "step 3"}
    )
    L.seed_everything(0, verbose=False)
    module, data = Module(), Data(batch_size=8)
    if prepared:
        prepare(module, plan)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", callbacks=[QAT(plan), SaveState(str(tmp_path))],
        max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    copies = [state(tmp_path, "spawned", rank) for rank in range(2)]
    learned = {key for key in copies[0] if "running" not in key}  # batch norms see their own rank's batches
    assert all(torch.equal(copies[0][key], copies[1][key]) for key in learned)
    assert any(float((copies[0][key] != 1).sum()) for key in learned if key.endswith("weight_quantizer.scale"))
    said = "the module that fit was called with stays float" in capfd.readouterr().err
    assert said is not prepared
    if prepared:
        assert states_equal(module.state_dict(), copies[0])
        fresh = Module()
        prepare(fresh, plan)
        fresh.load_state_dict(copies[0])
        with torch.no_grad():
            assert torch.equal(module.eval()(data.x), fresh.eval()(data.x))
    else:
        assert not quantizers(module)
        assert all(torch.equal(value, copies[0][key]) for key, value in module.state_dict().items())


def test_fsdp_of_lightning_is_refused_before_training():
    """On CPU by Lightning; elsewhere by us."""
    with pytest.raises(ValueError, match="requires a GPU accelerator"):
        L.Trainer(accelerator="cpu", strategy="fsdp", logger=False)
    with pytest.raises(
        PlanError, match=r"under FSDPStrategy \(supported: DDP, and ModelParallelStrategy .* flattens weights"
    ):
        refuse_unsupported(SimpleNamespace(strategy=FSDPStrategy()), Module())


@pytest.mark.parametrize(
    ("callback", "named"),
    [
        (QAT("w4a8", distill=0.5), "distillation"),
        (PTQ("w4a8"), "phase fold_batch_norm"),
        (QAT("w4a8"), None),
        (PTQ("w4a8", phases=["calibrate"]), None),
    ],
)
def test_what_needs_the_whole_model_is_refused_where_it_is_split(callback, named, monkeypatch):
    monkeypatch.setattr("lq_plugin.callbacks.trainer.sharding._sharded", lambda module: iter([module]))
    found = SimpleNamespace(strategy=ModelParallelStrategy())
    if named is None:
        refuse_unsupported(found, Module(), callback.needs_whole_model())
        return
    with pytest.raises(PlanError, match=f"{named}: needs the whole model, which is split over processes"):
        refuse_unsupported(found, Module(), callback.needs_whole_model())


@pytest.mark.parametrize("callback", [QAT, PTQ])
def test_weights_that_are_not_there_are_refused(callback, trainer, data):
    with torch.device("meta"):
        module = Module()
    run = trainer(callback("w4a8"))
    # Lightning then moves the module to the CPU, which torch refuses.
    with pytest.raises(NotImplementedError, match="meta tensor") as found:
        (run.fit if callback is QAT else run.validate)(module, datamodule=data)
    assert isinstance(found.value.__context__, PlanError)
    assert "net.conv.weight is on the meta device, it has no values yet" in str(found.value.__context__)
    assert not quantizers(module)


def test_tensor_parallel_layers_are_refused(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        module = Module()
        for axis in ("tensor_parallel", "data_parallel"):
            module.net.fc.weight = torch.nn.Parameter(
                distribute_tensor(module.net.fc.weight.detach(), mesh[axis], [Replicate()])
            )
            found = SimpleNamespace(strategy=ModelParallelStrategy())
            if axis == "data_parallel":
                refuse_unsupported(found, module)
                continue
            with pytest.raises(PlanError, match=r"net.fc.weight is split by tensor parallelism"):
                refuse_unsupported(found, module)
            module = Module()
    finally:
        dist.destroy_process_group()


def test_parametrized_layers_that_are_split_stay_float_with_the_reason(tmp_path):
    """By `fully_shard` on the layer itself, or on a module around it."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
        net = torch.nn.Sequential(*(weight_norm(torch.nn.Linear(4, 4)) for _ in range(2)), torch.nn.Linear(4, 4))
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
        ledger = prepare(net, "w4a8")
        assert [entry.name for entry in ledger.quantized] == ["2"]
        assert "is not the class that torch made for that" in ledger["0"].reason
        assert ledger["1"].reason == "its weight is parametrized, and split over processes"
    finally:
        dist.destroy_process_group()


def test_16_mixed_on_cpu_is_what_lightning_makes_of_it(trainer, data):
    """Lightning has no float16 on a CPU: it warns and trains in bfloat16, and so do we."""
    states = []
    for precision in ("bf16-mixed", "16-mixed"):
        L.seed_everything(0, verbose=False)
        module = Module()
        if precision == "16-mixed":
            with pytest.warns(
                UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'"
            ):
                run = trainer(QAT("w4a8"), precision=precision)
        else:
            run = trainer(QAT("w4a8"), precision=precision)
        run.fit(module, datamodule=data)
        states.append(module.state_dict())
    assert states_equal(*states)


if __name__ == "__main__":
    folder, strategy, epochs, *rest = sys.argv[1:]
    fit(folder, strategy, int(epochs), rest[0] or None if rest else None, rest[1] if rest else None)
