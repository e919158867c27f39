"""A small causal transformer that predicts the next character of English text: the topics of
Python's own help.

The text is `pydoc_data.topics`, which differs between Python versions: `data_sha256` tells which
one it was.
"""

import math
import sys

import torch
from torch import Tensor, nn

from fisher_lab.likelihoods import Categorical
from fisher_lab.problems.data import (
    SPLIT_SEED,
    Dataset,
    fingerprint,
    local_generator,
    standard_torch,
)
from fisher_lab.problems.registry import Problem, problem
from fisher_lab.problems.training import check_count, trained_problem

# 70 characters
ALPHABET = "\n" + "".join(chr(code) for code in range(32, 127) if not chr(code).isupper())


@problem
def char_transformer(
    width: int = 16,
    heads: int = 2,
    blocks: int = 1,
    context: int = 24,
    examples: int = 100,
    steps: int = 400,
    lr: float = 1e-2,
    batch: int = 50,
    seed: int = 0,
) -> Problem:
    """Causal transformer (Embedding, LayerNorm, attention from Linears) on the characters of
    English text; fisher="mc".

    The output has 70 classes at each of 24 positions, 1680 directions for every example: too many
    for the closed form, so the problem asks for the Monte-Carlo Fisher. Positions of an example are
    summed.

    Args:
        width: of the residual stream.
        heads: of each attention; divides `width`.
        blocks: number of transformer blocks.
        context: characters in an example.
        examples: number of measuring examples, at most 4000.
        steps: of training; 0 leaves the network at its start.
        lr: learning rate.
        batch: examples per step.
        seed: of the start and the order of the examples; the examples are always the same.

    Raises:
        ValueError: if `heads` does not divide `width`, or a setting is out of range.
    """
    check_count("width", width, 1, None, "a layer needs at least one unit")
    check_count("heads", heads, 1, width, "use one head")
    check_count("blocks", blocks, 1, None, "use one block")
    check_count("context", context, 1, 1000, "use a shorter context")
    if width % heads:
        raise ValueError(
            f"got heads={heads}, expected a divisor of width={width}: change one of them"
        )
    return trained_problem(
        lambda: Transformer(width, heads, blocks, context),
        Categorical(dim=-1),
        text_examples(context),
        fisher="mc",
        seed=seed,
        steps=steps,
        examples=examples,
        lr=lr,
        batch=batch,
        python=".".join(map(str, sys.version_info[:3])),
    )


class Attention(nn.Module):
    """Causal self-attention; its four Linear layers are applied at every position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of x `[N, L, width]`."""
        N, L, width = x.shape
        q, k, v = (
            f(x).reshape(N, L, self.heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)  # [N, heads, L, L]
        future = torch.ones(L, L, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        return self.output(mixed.transpose(1, 2).reshape(N, L, width))


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """One step of the stream x `[N, L, width]`."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Characters `[N, L]` -> logits of the next ones `[N, L, 70]`."""

    def __init__(self, width: int, heads: int, blocks: int, context: int) -> None:
        super().__init__()
        self.character = nn.Embedding(len(ALPHABET), width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        """Logits `[N, L, 70]` from indices `[N, L]`, each position seeing only those before it and
        itself.
        """
        # One row of positions per example, so that every use of the embedding belongs to an
        # example.
        positions = torch.arange(characters.shape[-1], device=characters.device).expand_as(
            characters
        )
        x = self.character(characters) + self.position(positions)
        return self.head(self.norm(self.blocks(x)))


@standard_torch()
def text_examples(context: int) -> Dataset:
    """Pieces of the text, x `[N, context]`, y `[N, context]` one character further; its last tenth
    is for tests.
    """
    from pydoc_data.topics import topics  # half a megabyte of text

    text = "\n".join(topics[key] for key in sorted(topics))
    index = {character: i for i, character in enumerate(ALPHABET)}
    codes = torch.tensor([index.get(character, index[" "]) for character in text.lower()])
    generator = local_generator(SPLIT_SEED)
    cut = len(codes) * 9 // 10
    train = pieces(codes[:cut], 4000, context, generator)
    return Dataset(
        train, pieces(codes[cut:], 500, context, generator), fingerprint(codes.to(torch.uint8))
    )


def pieces(
    codes: Tensor, count: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` random pieces of a text `[length]`: x and y `[count, context]`."""
    starts = torch.randint(len(codes) - context, (count, 1), generator=generator)
    found = codes[starts + torch.arange(context + 1)]
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()
