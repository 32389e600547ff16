"""A causal language model of transformers: etude race docs/examples/causal_lm.py adamw muon "adamw + dyt"."""

import pydoc_data.topics

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from etude.race import Task, data

CONTEXT = 64


def next_token(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token given those before it, one value per example. logits: [b, t, v], tokens: [b, t]."""
    return nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").mean(1)


def task(seed: int) -> Task:
    blocks = data.byte_blocks(pydoc_data.topics.topics.values(), CONTEXT)  # Python's own help pages, byte by byte
    train, valid, test = (
        {"input_ids": part, "labels": part} for part in torch.split(blocks, [len(blocks) - 400, 200, 200])
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=CONTEXT, use_cache=False)
    )  # fmt: skip
    return Task(model, train, valid, next_token, steps=200, batch=16, test=test, name="nats per byte")
