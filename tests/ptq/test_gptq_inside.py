"""GPTQ of the weights inside of an LSTM, a GRU, an RNN and an attention, whose inputs the module makes itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lq_plugin import calibrate, prepare
from lq_plugin.functional.error import sqnr_db
from lq_plugin.layers import QuantizedLayer
from lq_plugin.model import quantized_layers
from lq_plugin.ptq.gptq import gptq


class Sequences(nn.Module):
    """A recurrence over sequences of different lengths."""

    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.inner = getattr(nn, kind)(16, 24, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(x, torch.tensor([9, 7, 7, 4]), batch_first=True)
        return self.inner(packed)[0].data


class Cross(nn.Module):
    """Keys and values from another sequence."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x.flip(1)[:, :5] ** 2
        return self.inner(x, other, other.cos())[0]


CASES = {
    "LSTM": lambda: Sequences("LSTM", num_layers=2, bidirectional=True),
    "LSTM, projected": lambda: Sequences("LSTM", proj_size=12),
    "GRU": lambda: Sequences("GRU", num_layers=2),
    "RNN": lambda: Sequences("RNN"),
    "attention": Cross,
    "attention of other widths": lambda: Cross(kdim=16, vdim=16, add_bias_kv=True),
}


def inputs() -> torch.Tensor:
    return torch.randn(4, 9, 16) @ torch.randn(16, 16) / 4


@pytest.mark.parametrize("plan", ["w3 per_channel mse", "w3 per_channel mse a8 minmax"])
@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_rounded_to_less_error(name: str, plan: str) -> None:
    torch.manual_seed(0)
    model, batches = CASES[name]().eval(), [inputs() for _ in range(4)]
    with torch.no_grad():
        expected = model(batches[0])
    prepare(model, plan)
    calibrate(model, batches)
    nearest = copy.deepcopy(model)
    result = gptq(model, batches)
    assert not result.skipped
    assert set(result.layers) == {layer for layer, _ in quantized_layers(model)}
    assert all(fit.after < fit.before for fit in result.layers.values())
    with torch.no_grad():
        assert sqnr_db(expected, model(batches[0])) > sqnr_db(expected, nearest(batches[0]))


def rows_of(layer: QuantizedLayer, run: object) -> dict[int, torch.Tensor]:
    seen: dict[int, list[torch.Tensor]] = {}
    with layer.watching(lambda index, rows: seen.setdefault(index, []).append(rows.clone())), torch.no_grad():
        run()
    return {index: torch.cat(rows) for index, rows in seen.items()}


def test_what_a_hidden_states_weight_multiplies() -> None:
    """The outputs of torch's own LSTM, one step later, and 0 at first; of the layer above, those of the one below."""
    torch.manual_seed(0)
    lstm, x = nn.LSTM(6, 5, num_layers=2), torch.randn(7, 3, 6)
    with torch.no_grad():
        first = copy.deepcopy(nn.LSTM(6, 5))
        first.load_state_dict({key: value for key, value in lstm.state_dict().items() if key.endswith("_l0")})
        below, above = first(x)[0], lstm(x)[0]
    prepare(lstm, "w8")
    layers = dict(quantized_layers(lstm))
    for quantizer in (layer.weight_quantizer for layer in layers.values()):
        quantizer.set_enabled(False)
    zeros = torch.zeros(1, 3, 5)
    wanted = {
        "weight_ih_l0": x,
        "weight_hh_l0": torch.cat([zeros, below[:-1]]),
        "weight_ih_l1": below,
        "weight_hh_l1": torch.cat([zeros, above[:-1]]),
    }
    for name, rows in wanted.items():
        found = rows_of(layers[name], lambda: lstm(x))
        assert list(found) == [0]
        torch.testing.assert_close(found[0], rows.flatten(0, 1))


def test_query_key_and_value_have_inputs_of_their_own() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2)
    query, key, value = torch.randn(3, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    prepare(attention, "w8")
    layers = dict(quantized_layers(attention))
    found = rows_of(layers["in_proj_weight"], lambda: attention(query, key, value=value))
    for index, x in enumerate((query, key, value)):
        assert torch.equal(found[index], x.flatten(0, 1))
    weights = attention.out_proj.weight, attention.out_proj.bias
    with torch.no_grad():
        rows = rows_of(layers["out_proj"], lambda: attention(query, key, value))[0]
        for q in (layers["out_proj"].weight_quantizer,):
            q.set_enabled(False)
        y = nn.functional.linear(rows, *weights).view(3, 2, 8)
        torch.testing.assert_close(y, attention(query, key, value)[0])
