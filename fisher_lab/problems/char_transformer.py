"""A small causal transformer on English text: the topics of Python's own help.

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

# all of ASCII that can be printed, without the capitals: 70 characters
PRINTABLE = "".join(map(chr, range(32, 127)))
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ALPHABET = "\n" + PRINTABLE.translate(str.maketrans("", "", CAPITALS))


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
    python = ".".join(map(str, sys.version_info[:3]))
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
        python=python,
    )


class Attention(nn.Module):
    """Causal self-attention; its four Linear layers are applied at every position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions of x `[N, L, width]`."""
        N, L, width = x.shape
        q = self._by_head(self.query(x))
        k = self._by_head(self.key(x))
        v = self._by_head(self.value(x))
        scale = math.sqrt(width // self.heads)
        scores = q @ k.transpose(-1, -2) / scale  # [N, heads, L, L]
        everything = torch.ones(L, L, dtype=torch.bool, device=x.device)
        future = everything.triu(1)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = attention @ v
        joined = mixed.transpose(1, 2).reshape(N, L, width)
        return self.output(joined)

    def _by_head(self, x: Tensor) -> Tensor:
        """`[N, L, width]` -> `[N, heads, L, width / heads]`."""
        N, L, _ = x.shape
        return x.reshape(N, L, self.heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        wide = 2 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

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
        self.blocks = nn.Sequential()
        for _ in range(blocks):
            self.blocks.append(Block(width, heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        """Logits `[N, L, 70]` from indices `[N, L]`; a position sees itself and those before it."""
        L = characters.shape[-1]
        row = torch.arange(L, device=characters.device)
        # One row of positions per example, so that every use of the embedding belongs to an
        # example.
        positions = row.expand_as(characters)
        x = self.character(characters) + self.position(positions)
        stream = self.blocks(x)
        return self.head(self.norm(stream))


@standard_torch()
def text_examples(context: int) -> Dataset:
    """Pieces of the text, x `[N, context]` and y `[N, context]` one character further.

    The last tenth of the text is for tests.
    """
    from pydoc_data.topics import topics  # half a megabyte of text

    text = "\n".join(map(topics.__getitem__, sorted(topics)))
    index = dict(zip(ALPHABET, range(len(ALPHABET)), strict=True))
    space = index[" "]  # for what is not in the alphabet
    codes = torch.tensor([index.get(character, space) for character in text.lower()])
    generator = local_generator(SPLIT_SEED)
    cut = len(codes) * 9 // 10
    train = pieces(codes[:cut], 4000, context, generator)
    test = pieces(codes[cut:], 500, context, generator)
    sha256 = fingerprint(codes.to(torch.uint8))
    return Dataset(train, test, sha256)


def pieces(
    codes: Tensor, count: int, context: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` random pieces of a text `[length]`: x and y `[count, context]`."""
    starts = torch.randint(len(codes) - context, (count, 1), generator=generator)
    places = starts + torch.arange(context + 1)  # [count, context + 1]
    found = codes[places]
    x = found[:, :-1].contiguous()
    y = found[:, 1:].contiguous()
    return x, y
