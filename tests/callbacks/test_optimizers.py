"""Learned ranges beside the user's own optimizer code: unseen by it, adopted afterwards, trained and resumed."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lq_plugin import QAT
from lq_plugin.callbacks import qat as qat_module
from lq_plugin.model.prepare import quantizers
from lq_plugin.native import available
from tests.callbacks.conftest import Module, ResumableLoader

pytestmark = [pytest.mark.filterwarnings("ignore:The dirpath has changed")]
PLANS = ["w4 lsq a4 lsq", "int4 per_channel / uint4 pact", "ttq", "kmeans2"]


def ranges(module):
    return {f"{q.name}.{name}": p for q in quantizers(module) for name, p in q.named_parameters()}


def named(module):
    conv = {id(p) for p in module.net.conv.parameters()}
    parts = [[p for p in module.parameters() if (id(p) in conv) is inside] for inside in (True, False)]
    return torch.optim.AdamW(
        [{"params": p, "name": name} for p, name in zip(parts, ("stem", "rest"), strict=True)], 1e-3
    )


def sorted_into_two(module):
    """Each parameter is in one of two lists by the type of its module, or this fails."""
    decay, rest = set(), set()
    for name, part in module.named_modules():
        for key, _ in part.named_parameters(recurse=False):
            plain = key == "bias" or isinstance(part, torch.nn.BatchNorm2d)
            chosen = rest if plain else decay if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d)) else set()
            chosen.add(f"{name}.{key}")
    known = dict(module.named_parameters())
    assert known.keys() == decay | rest
    groups = [
        {"params": [known[k] for k in sorted(names)], "weight_decay": d} for names, d in ((decay, 0.1), (rest, 0.0))
    ]
    return torch.optim.AdamW(groups, 1e-3)


def with_names(module):
    return torch.optim.SGD(module.named_parameters(), 1e-2, momentum=0.9, weight_decay=0.1)


def matrices(kind):
    def make(module):
        return kind([p for p in module.parameters() if p.ndim == 2])

    return make


muon = matrices(lambda parameters: torch.optim.Muon(parameters, lr=0.02))
lbfgs = matrices(lambda parameters: torch.optim.LBFGS(parameters, lr=0.01, max_iter=2))


@pytest.mark.filterwarnings("ignore:.*'uint4 pact' has no levels there")
@pytest.mark.parametrize("optimizers", [named, sorted_into_two, with_names])
@pytest.mark.parametrize("plan", PLANS)
def test_groups_of_their_own(plan, optimizers, trainer, data, tmp_path):
    logger, seen = CSVLogger(tmp_path), []

    def configure(module):
        seen.extend(name for name, _ in module.named_parameters() if "quantizer" in name)
        return optimizers(module)

    module = Module(optimizers=configure)
    fit = trainer(QAT(plan), LearningRateMonitor(), logger=logger, max_epochs=1)
    fit.fit(module, datamodule=data)
    assert not seen
    assert "configure_optimizers" not in module.__dict__
    groups = fit.optimizers[0].param_groups
    names = [group.get("name") for group in groups]
    ours = {id(p) for p in ranges(module).values()}
    held = {id(p) for group in groups for p in group["params"] if "learned_ranges" in str(group.get("name"))}
    assert held == ours
    assert all(
        id(p) not in ours for group in groups if "learned_ranges" not in str(group.get("name")) for p in group["params"]
    )
    if optimizers is named:
        assert names == ["stem", "rest", "stem_learned_ranges", "rest_learned_ranges"]
    decays = {group["weight_decay"] for group in groups if "learned_ranges" in str(group.get("name"))}
    assert 0 in decays if "pact" not in plan else decays == {groups[0]["weight_decay"]}


def run(trainer, data, folder, optimizers, resume=None, **options):
    L.seed_everything(1, verbose=False)
    module = Module(optimizers=optimizers)
    keep = ModelCheckpoint(
        folder / ("whole" if resume is None else "resumed"), filename="{step}", save_top_k=-1, every_n_train_steps=3
    )
    fit = trainer(QAT("w4 lsq a4 lsq"), keep, enable_checkpointing=True, **options)
    fit.fit(module, datamodule=data, ckpt_path=resume, weights_only=None if resume is None else False)
    return module, fit


@pytest.mark.parametrize("optimizers", [muon, lbfgs])
def test_where_the_optimizer_takes_matrices_or_one_group_alone(optimizers, trainer, data, tmp_path):
    """Every range is trained, by something that can; a resumed run ends bit-equal."""
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)
    start = {}

    class Remember(L.Callback):
        def on_train_start(self, trainer, pl_module):
            start.update({name: p.detach().clone() for name, p in ranges(pl_module).items()})

    first = Module(optimizers=optimizers)
    trainer(QAT("w4 lsq a4 lsq"), Remember(), max_epochs=1).fit(first, datamodule=data)
    assert len(start) == 9
    assert all(not torch.equal(p, start[name]) for name, p in ranges(first).items() if name.endswith("scale"))
    module, fit = run(trainer, data, tmp_path, optimizers)
    count = sum(len(group["params"]) for group in fit.optimizers[0].param_groups)
    assert count == (1 if optimizers is muon else 10)
    again, _ = run(trainer, data, tmp_path, optimizers, tmp_path / "whole" / "step=3.ckpt")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in module.state_dict().items())


class WarmUp:
    """A scheduler as timm's: it keeps a value for each group, and writes to as many groups as there are values."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.base_values = [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]
        self.warmup_steps = [value / 10 for value in self.base_values]

    def step(self, epoch):
        for group, slope in zip(self.optimizer.param_groups, self.warmup_steps, strict=False):
            group["lr"] = (epoch + 1) * slope

    def state_dict(self):
        return {"base_values": self.base_values, "warmup_steps": self.warmup_steps}

    def load_state_dict(self, state):
        vars(self).update(state)


def test_schedulers_of_timm_reach_the_groups_of_learned_ranges(trainer, data):
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = named(self)
            return [optimizer], [WarmUp(optimizer)]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.current_epoch)

    fit = trainer(QAT("w4 lsq a4 lsq"), max_epochs=2)
    fit.fit(Scheduled(), datamodule=data)
    rates = {group["name"]: group["lr"] for group in fit.optimizers[0].param_groups}
    assert rates == pytest.approx(dict.fromkeys(rates, 2e-4))
    assert len(rates) > 2


def test_beside_muon_another_optimizer_takes_them(trainer, data):
    class Two(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            rest = [p for p in self.parameters() if p.ndim != 2]
            return muon(self), torch.optim.AdamW(rest, 1e-3, weight_decay=0.1)

    module = Two()
    fit = trainer(QAT("w4 lsq a4 lsq"), max_epochs=1)
    fit.fit(module, datamodule=data)
    assert len(fit.optimizers[0].param_groups) == 1
    assert {id(p) for p in fit.optimizers[1].param_groups[1]["params"]} == {id(p) for p in ranges(module).values()}
    assert fit.optimizers[1].param_groups[1]["weight_decay"] == 0


def test_a_checkpoint_whose_ranges_the_module_put_into_its_own_group_goes_on(trainer, data, tmp_path, monkeypatch):
    """Earlier versions showed ranges to `configure_optimizers`; such a run goes on bit-equal, with its momentum."""
    batches = list(data.train_dataloader())
    data.train_dataloader = lambda: ResumableLoader(batches)

    def plain(module):
        return torch.optim.SGD(module.parameters(), 1e-2, momentum=0.9)

    with monkeypatch.context() as before:
        before.setattr(qat_module, "hide_learned_ranges", lambda *_: None)
        module, fit = run(trainer, data, tmp_path, plain)
    assert len(fit.optimizers[0].param_groups) == 1
    path = tmp_path / "whole" / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("QAT"))
    del state["range_optimizers"]
    torch.save(checkpoint, path)
    again, fit = run(trainer, data, tmp_path, plain, path)
    assert len(fit.optimizers[0].param_groups) == 1
    assert all(torch.equal(again.state_dict()[key], value) for key, value in module.state_dict().items())
    assert len(run(trainer, data, tmp_path / "new", plain)[1].optimizers[0].param_groups) == 2


def test_a_configure_optimizers_of_the_instance_stays_its_own(trainer, data):
    module = Module()
    own = module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1e-2)
    trainer(QAT("w4 lsq"), max_epochs=1).fit(module, datamodule=data)
    assert module.configure_optimizers is own
    broken = Module(optimizers=lambda module: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(QAT("w4 lsq a4 lsq")).fit(broken, datamodule=data)
    assert "configure_optimizers" not in broken.__dict__
    assert len(ranges(broken)) == 9


class Table(L.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.table, self.head = torch.nn.Embedding(20, 8, sparse=True), torch.nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return self.head(self.table(batch[0])).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return self.kind([self.table.weight], 0.1)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.SparseAdam])
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.skipif(not available(), reason="needs a C++ compiler")
def test_scales_of_a_sparse_table_have_sparse_gradients(kind, trainer):
    """An optimizer other than SparseAdam steps them; SparseAdam gets no ranges."""
    seen, scales = set(), []
    for dense in (False, True):

        class Look(L.Callback):
            def on_after_backward(self, trainer, pl_module, dense=dense):
                seen.add((dense, pl_module.table.weight_quantizer.scale.grad.is_sparse))

            def on_train_start(self, trainer, pl_module, dense=dense):
                pl_module.table.weight_quantizer.sparse_gradients &= not dense

        module = Table(kind)
        index = torch.randint(0, 20, (16, 3), generator=torch.Generator().manual_seed(0))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(index), batch_size=4)
        qat = QAT({"rules": [{"match": "table", "weight": "int4 per_channel lsq"}]})
        trainer(qat, Look()).fit(module, loader, loader)
        scales.append(module.table.weight_quantizer.scale.detach())
    assert seen == {(False, kind is torch.optim.SGD), (True, False)}
    torch.testing.assert_close(*scales)
