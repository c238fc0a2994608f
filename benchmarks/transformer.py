"""A pretrained transformer and its data, both out of packages of PyPI: the third kind of model for `ptq_accuracy`.

    python -m benchmarks.ptq_accuracy --model transformer --json out.json

The model is the masked language model of rxnfp 0.1.0 (MIT; Schwaller et al., "Mapping the space of chemical reactions
using attention-based neural networks", Nature Machine Intelligence 2021): BERT with 12 layers of width 256 that was
trained on reactions written as SMILES. The reactions are those of the 50,000 patents in synrbl 1.0.6's source (MIT).
Nothing of either package runs: pip only fetches their files into `benchmarks/.cache/transformer`.
"""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

CACHE = Path(__file__).parent / ".cache" / "transformer"
MODEL, MODEL_FOLDER = "rxnfp==0.1.0", "rxnfp/models/transformers/bert_pretrained"
DATA, DATA_FILE = "synrbl==1.0.6", "synrbl-1.0.6/Data/Raw_data/USPTO/USPTO_50K.csv"
#: A token is an atom in brackets, an element, a bond, a ring number or another sign of SMILES (Schwaller et al., 2018).
TOKEN = re.compile(r"\[[^\]]+\]|%\([0-9]{3}\)|%[0-9]{2}|Br|Cl|>>|[BCNOSPFIbcnosp|().=#\-+\\/:~@?>*$0-9]")
LONGEST = 128
MASKED = 0.15
#: Reactions of a calibration set, of the test set, and of a batch.
CALIBRATION, TEST, BATCH_SIZE = 128, 500, 32


@dataclass(frozen=True)
class Masked:
    """A batch of masked reactions.

    Args:
        inputs: keyword arguments of the model, `[N, L]` each.
        chosen: bool `[N, L]`, the places that are masked.
        tokens: what stood there `[sum(chosen)]`.
    """

    inputs: dict[str, Tensor]
    chosen: Tensor
    tokens: Tensor


def load_transformer() -> tuple[nn.Module, dict[str, int], list[str]]:
    """Returns the model in evaluation mode, its vocabulary, and all reactions once each in a fixed random order."""
    with zipfile.ZipFile(_fetched(MODEL, "*.whl")) as wheel:
        config = json.loads(wheel.read(f"{MODEL_FOLDER}/config.json"))
        weights = io.BytesIO(wheel.read(f"{MODEL_FOLDER}/pytorch_model.bin"))
        lines = wheel.read(f"{MODEL_FOLDER}/vocab.txt").decode().splitlines()
    model = bert(config)
    # The head that tells whether two sentences follow each other, and what only it reads, are not used.
    unused = ("bert.pooler.", "cls.seq_relationship.")
    state = {k: v for k, v in torch.load(weights, weights_only=True).items() if not k.startswith(unused)}
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    model.load_state_dict(state)
    with tarfile.open(_fetched(DATA, "*.tar.gz")) as source:
        member = source.extractfile(DATA_FILE)
        assert member is not None
        found = [row["reactions"] for row in csv.DictReader(io.TextIOWrapper(member, encoding="utf-8"))]
    reactions = list(dict.fromkeys(found))
    order = torch.randperm(len(reactions), generator=torch.Generator().manual_seed(0)).tolist()
    return model, {token: index for index, token in enumerate(lines)}, [reactions[index] for index in order]


def bert(config: dict[str, object]) -> nn.Module:
    """Returns transformers' masked language model of a configuration, in evaluation mode."""
    from transformers import BertConfig, BertForMaskedLM

    known = BertConfig().to_dict()
    return BertForMaskedLM(BertConfig(**{key: value for key, value in config.items() if key in known})).eval()


def _fetched(requirement: str, pattern: str) -> Path:
    """Returns the file of a package's one version, which pip brings the first time."""
    name = requirement.partition("==")[0]
    folder = CACHE / name
    if not list(folder.glob(pattern)):
        kind = "--no-binary" if pattern.endswith(".gz") else "--only-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind, name, "--dest", str(folder)]
        if code := subprocess.run([*command, requirement]).returncode:
            raise SystemExit(f"{requirement} was not fetched: pip ended with exit code {code}")
    return next(folder.glob(pattern))


def encode(reaction: str, vocabulary: dict[str, int]) -> list[int]:
    """Returns the token numbers of a reaction, between [CLS] and [SEP].

    Raises:
        ValueError: characters that are no SMILES.

    >>> encode("CBr>>[CH3-]", {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "C": 3, "Br": 4, ">>": 5, "[CH3-]": 6})
    [1, 3, 4, 5, 6, 2]
    """
    tokens = TOKEN.findall(reaction)
    if "".join(tokens) != reaction:
        raise ValueError(f"{reaction!r} holds characters that are no SMILES")
    unknown = vocabulary["[UNK]"]
    return [vocabulary["[CLS]"], *(vocabulary.get(token, unknown) for token in tokens), vocabulary["[SEP]"]]


def masked_batches(reactions: list[list[int]], vocabulary: dict[str, int], size: int, seed: int) -> list[Masked]:
    """Returns batches of reactions of alike length, with 15 % of their tokens masked.

    Args:
        reactions: token numbers of each.
        vocabulary: token numbers by token.
        size: reactions of a batch.
        seed: of the masks.
    """
    generator = torch.Generator().manual_seed(seed)
    ordered = sorted(reactions, key=len)
    result = []
    for start in range(0, len(ordered), size):
        rows = [torch.tensor(row) for row in ordered[start : start + size]]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=vocabulary["[PAD]"])
        real = tokens != vocabulary["[PAD]"]
        free = real & (tokens != vocabulary["[CLS]"]) & (tokens != vocabulary["[SEP]"])
        chosen = (torch.rand(tokens.shape, generator=generator) < MASKED) & free
        inputs = {"input_ids": tokens.masked_fill(chosen, vocabulary["[MASK]"]), "attention_mask": real.long()}
        result.append(Masked(inputs, chosen, tokens[chosen]))
    return result


def load_all(seeds: int) -> tuple[nn.Module, list[list[Masked]], list[Masked]]:
    """Returns the float model, the batches of each of `seeds` disjoint calibration sets, and those of the test set."""
    model, vocabulary, reactions = load_transformer()
    encoded = [row for row in (encode(r, vocabulary) for r in reactions) if len(row) <= LONGEST]
    needed = TEST + seeds * CALIBRATION
    if len(encoded) < needed:
        raise SystemExit(f"{needed} reactions are needed, there are {len(encoded)}")
    parts = [encoded[start : start + CALIBRATION] for start in range(TEST, needed, CALIBRATION)]
    calibration = [masked_batches(part, vocabulary, BATCH_SIZE, seed) for seed, part in enumerate(parts, start=1)]
    return model, calibration, masked_batches(encoded[:TEST], vocabulary, BATCH_SIZE, 0)


def predictions(model: nn.Module, batches: list[Masked]) -> Tensor:
    """Returns the log-probabilities `[masked tokens, vocabulary]` that a model gives to what is masked."""
    with torch.inference_mode():
        return torch.cat([model(**batch.inputs).logits[batch.chosen].double().log_softmax(-1) for batch in batches])


def scores(found: Tensor, reference: Tensor, tokens: Tensor) -> dict[str, float]:
    """Returns what a model's predictions are worth.

    Args:
        found: log-probabilities of the model `[M, V]`.
        reference: those of the float model.
        tokens: the right ones `[M]`.

    Returns:
        Accuracy and agreement with the float model's choice in percent, loss and divergence in nats a token.

    >>> p = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    >>> scores(p, p.flip(1), torch.tensor([0, 0]))["divergence"]  # 0.5 * (0 + 0.5 * ln 3)
    0.27465...
    """
    divergence = (reference.exp() * (reference - found)).sum(1).mean()
    return {
        "accuracy": 100.0 * float((found.argmax(1) == tokens).double().mean()),
        "agreement": 100.0 * float((found.argmax(1) == reference.argmax(1)).double().mean()),
        "loss": -float(found.gather(1, tokens[:, None]).mean()),
        "divergence": float(divergence),
    }
