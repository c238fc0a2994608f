"""Small language models of transformers, and a task with five answers of different probability after each token."""

import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TOKENS = 64
_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": TOKENS,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "use_cache": False,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def language(kind="llama", **options):
    """Returns a model with random weights and random norms and biases, so that none of them can be forgotten."""
    torch.manual_seed(0)
    config, model = KINDS[kind]
    extra = {"sliding_window": None} if kind == "mistral" else {"head_dim": 64} if kind == "qwen3" else {}
    made = model(config(**(_SHAPE | extra | options))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif "lm_head" in name:
                parameter.mul_(6)
    return made


def tokens(count=2, length=8, seed=3):
    return torch.randint(0, TOKENS, (count, length), generator=torch.Generator().manual_seed(seed))


def answers():
    """Returns the probabilities of the next token, `[TOKENS, TOKENS]`."""
    generator = torch.Generator().manual_seed(5)
    after = torch.stack([torch.randperm(TOKENS, generator=generator)[:5] for _ in range(TOKENS)])
    table = torch.full((TOKENS, TOKENS), 1e-4)
    table.scatter_(1, after, torch.tensor([0.5, 0.24, 0.12, 0.07, 0.04]).expand(TOKENS, 5))
    return table / table.sum(1, keepdim=True)


class Language(LightningModule):
    """Learns `answers`."""

    def __init__(self, layers=1):
        super().__init__()
        self.net = language(num_hidden_layers=layers).train()
        self.register_buffer("table", answers(), persistent=False)

    def forward(self, x):
        return self.net(x).logits

    def loss(self, x):
        return F.cross_entropy(self(x).flatten(0, 1), self.table[x].flatten(0, 1))

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val/loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 2e-3)

    def train_dataloader(self):
        return DataLoader(tokens(1600, 12, seed=7), batch_size=16)

    def val_dataloader(self):
        return DataLoader(tokens(16, 12, seed=8), batch_size=16)
