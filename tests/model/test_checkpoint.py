"""Loading quantized checkpoints without a Trainer."""

import copy

import lightning as L
import pytest
import torch

from lq_plugin import PTQ, QAT, PlanError, load_checkpoint, prepare, remove
from lq_plugin.errors import ExportError
from tests.callbacks.conftest import Data, Module


@pytest.fixture
def fitted(tmp_path):
    L.seed_everything(0, verbose=False)
    module = Module()
    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    trainer = L.Trainer(callbacks=[QAT("w4 lsq a4 ema")], max_epochs=1, enable_checkpointing=False, **options)
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    return module.eval(), tmp_path


def test_bit_equal_from_every_kind_of_file(fitted):
    module, folder = fitted
    x = Data().x
    for name, plan in (("full.ckpt", None), ("weights.ckpt", "w4 lsq a4 ema"), ("state.pt", "w4 lsq a4 ema")):
        fresh = Module()
        load_checkpoint(fresh, folder / name, plan)
        assert torch.equal(fresh.eval()(x), module(x))


def test_what_cannot_be_loaded_is_explained(fitted):
    _, folder = fitted
    with pytest.raises(PlanError, match="holds no plan"):
        load_checkpoint(Module(), folder / "weights.ckpt")
    torch.save(Module().state_dict(), folder / "float.pt")
    with pytest.raises(PlanError, match="float checkpoint"):
        load_checkpoint(Module(), folder / "float.pt", "w4 lsq a4 ema")
    with pytest.raises(RuntimeError, match="size mismatch|Missing key|Unexpected key"):
        load_checkpoint(Module(), folder / "full.ckpt", "w4a4")


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"state_dict": {}, "callbacks": {"PTQ": PTQ("w8a8")}}, tmp_path / "code.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        load_checkpoint(Module(), tmp_path / "code.ckpt")


class Sized(L.LightningModule):
    """Built from what `save_hyperparameters` keeps; its last layer in `configure_model`."""

    def __init__(self, width, depth=1, loss=None):
        super().__init__()
        self.save_hyperparameters(ignore="loss")
        self.loss = loss
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, width), *(torch.nn.Linear(width, width) for _ in range(depth))
        )
        self.last = None

    def configure_model(self):
        self.last = self.last or torch.nn.Linear(self.hparams.width, 2)

    def forward(self, x):
        return self.last(self.net(x))

    def validation_step(self, x, batch_idx):
        self(x)


class OneArgument(Sized):
    def __init__(self, settings):
        super().__init__(settings["width"])
        self._hparams.clear()
        self.save_hyperparameters(settings)

    def configure_model(self):
        self.last = self.last or torch.nn.Linear(7, 2)


def saved_by_a_trainer(module, folder):
    data = torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=8)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[PTQ("w4a8", dataloader=data)], default_root_dir=folder, **quiet
    )
    trainer.validate(module, data, verbose=False)
    trainer.save_checkpoint(folder / "sized.ckpt")
    return module.eval()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    "make", [lambda: Sized(7, depth=2), lambda: OneArgument({"width": 7})], ids=["arguments", "one mapping"]
)
def test_a_class_is_built_with_its_hyper_parameters(make, tmp_path):
    module, x = saved_by_a_trainer(make(), tmp_path), torch.randn(5, 8)
    loaded = load_checkpoint(type(module), tmp_path / "sized.ckpt")
    assert type(loaded) is type(module)
    assert torch.equal(loaded.eval()(x), module(x))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_class_that_lacks_arguments_says_which(tmp_path):
    module = saved_by_a_trainer(Sized(7), tmp_path)
    assert load_checkpoint(Sized, tmp_path / "sized.ckpt", loss="mine").loss == "mine"
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint(Sized, tmp_path / "sized.ckpt", width=9)

    class Other(Sized):
        def __init__(self, network):
            super().__init__(7)

    with pytest.raises(
        PlanError, match=r"Other cannot be built with the hyper-parameters.*'network'.*save_hyperparameters"
    ):
        load_checkpoint(Other, tmp_path / "sized.ckpt")
    with pytest.raises(PlanError, match="width: arguments are for a class"):
        load_checkpoint(module, tmp_path / "sized.ckpt", width=7)


def test_to_onnx_of_a_quantized_module_names_the_function_that_writes_it():
    module = Module()
    prepare(module, "w8a8")
    with pytest.raises(ExportError, match="lq_plugin.export.export_onnx"):
        module.to_onnx("model.onnx", Data().x[:2])
    copied = copy.deepcopy(module)
    remove(copied)
    assert copied.to_onnx.__func__ is L.LightningModule.to_onnx

    class Own(Module):
        def to_onnx(self, *args):
            return "mine"

    module = Own()
    prepare(module, "w8a8")
    assert module.to_onnx() == "mine"


@pytest.mark.filterwarnings("ignore:Found keys that are not in the model")
def test_lightnings_load_from_checkpoint_names_the_remedy(fitted):
    module, folder = fitted
    for options, kind in (({}, RuntimeError), ({"strict": False}, PlanError)):
        with pytest.raises(kind, match=r"lq_plugin\.load_checkpoint\(Module, path\)"):
            Module.load_from_checkpoint(folder / "full.ckpt", **options)

    class Prepared(Module):
        """Prepares itself, so that the checkpoint fits."""

        def configure_model(self):
            super().configure_model()
            prepare(self, "w4 lsq a4 ema")

    loaded = Prepared.load_from_checkpoint(folder / "full.ckpt")
    x = Data().x
    assert torch.equal(loaded.eval()(x), module(x))
