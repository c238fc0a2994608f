"""Quantized weights that the model's own code reads as float, past their layers.

What a module's forward reads is lent to it quantized (`lq_plugin.layers.lent_weights`). Left are weights that cannot be
lent, and reads in other methods (`self.encoder.weight` in a `validation_step`, or in a forward that is called as
`self.forward(x)`). They are found in the code of the model without running it, so that a file can hold what the model
computes with. Names made at run time (`getattr(layer, name)`), weights kept in lists and compiled code do not show
there: `raw_reads` sees them while the model runs on a batch.
"""

from __future__ import annotations

from torch import nn

from lq_plugin.layers import CONTAINER, QuantizedLayer, WeightLender, readers_of_weights, weight_key
from lq_plugin.layers.reads_in_code import code_reads, own_code, owner_read
from lq_plugin.model.prepare import quantized_layers

#: Where an evaluation begins.
_ENTRIES = ("forward", "validation_step", "test_step", "predict_step")


def weights_read_past_layers(model: nn.Module) -> dict[str, str]:
    """Returns keys (in the state dict) of quantized weights that are read as float past their layers, and where.

    Those that the model's code reads, and those that `raw_reads` has seen an operation read.

    >>> import lq_plugin
    >>> __name__ = "my_project"  # the code of libraries is not looked at
    >>> class Tied(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.encoder = nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return self.encoder(x) @ self.encoder.weight.data
    >>> net = Tied()
    >>> _ = lq_plugin.prepare(net, "w4")
    >>> weights_read_past_layers(net)
    {'encoder.weight': 'Tied.forward'}
    """
    owners: dict[tuple[int, str], str] = {}
    noted: dict[str, str] = {}
    lent: dict[str, list[int]] = {}
    readers = readers_of_weights(model)
    for name, layer in quantized_layers(model):
        if layer.weight_quantizer is not None:
            key = weight_key(name, layer)
            holding, _, attribute = key.rpartition(".")
            owners[id(model.get_submodule(holding)), attribute] = key
            if isinstance(layer, WeightLender):
                lent[key] = [id(module) for module in readers.get(layer, ())]
            if layer.read_past_by is not None:
                noted[key] = layer.read_past_by
    attributes = {attribute for _, attribute in owners}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) or f".{CONTAINER}." in f".{name}.":
            continue
        below = {id(inner) for inner in module.modules()}
        kind = getattr(type(module), "float_class", type(module)).__name__
        outside = set(own_code(module, _ENTRIES[1:]))
        for function in own_code(module, _ENTRIES):
            for read in code_reads(function) if attributes else ():
                owner = None if read.path is None else owner_read(module, read.path)
                for (holder, kept), key in owners.items():
                    known = holder == id(owner) if read.path is not None else holder in below
                    if kept != read.attribute or not known or holder == id(module):
                        continue
                    if function in outside or id(module) not in lent.get(key, ()):
                        found.setdefault(key, f"{kind}.{function.__name__}")
    return noted | found
