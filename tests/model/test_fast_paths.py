"""Transformer encoders in evaluation must run their quantized layers."""

import copy

import pytest
import torch
from torch import nn

from lq_plugin import calibrate, prepare, remove
from lq_plugin.model import quantizers


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of the float model
@pytest.mark.parametrize("padding", [False, True])
def test_evaluation_computes_what_training_computes(padding):
    model = encoder()
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if padding else None
    plain = copy.deepcopy(model).eval()
    prepare(model, "w2a8")
    calibrate(model, [x], lambda batch: model(batch, src_key_padding_mask=mask))
    calls = []
    for quantizer in quantizers(model):
        quantizer.register_forward_hook(lambda module, args, out: calls.append(module.name))
    with torch.no_grad():
        evaluated = model.eval()(x, src_key_padding_mask=mask)
        in_eval = sorted(calls)
        calls.clear()
        trained = model.train()(x, src_key_padding_mask=mask)
        fused = plain(x, src_key_padding_mask=mask)
    assert in_eval == sorted(calls) == sorted(q.name for q in quantizers(model))
    valid = slice(None) if mask is None else ~mask
    torch.testing.assert_close(evaluated[valid], trained[valid])
    assert not torch.allclose(evaluated[valid], fused[valid], atol=1e-2)
    remove(model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask), fused, rtol=0, atol=0)
    assert vars(model.layers[0]).keys() == vars(plain.layers[0]).keys()
