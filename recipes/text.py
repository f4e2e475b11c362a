"""The texts that ship with Python itself, character by character: a small decoder-only transformer, and the data.

Text is the language reference that `help()` prints (`pydoc_data.topics`, in every CPython) and, where the installation
has it, the licence. Nothing is downloaded. The language reference differs between versions of Python, patch releases
included, and so do loss and accuracy: compare numbers of one version only.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

# The newline and printable ASCII. The few other characters in the texts, typographic quotes and dashes, are left out.
VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))


class Block(nn.Module):
    """Causal self-attention, then two linear layers with GELU, each behind a layer normalisation and a skip connection.

    Args:
        width: features of a position, a multiple of `heads`.
        heads: attention heads.
        dropout: share of features zeroed in training before they are added to the skip connection.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        # Three layers rather than one: query, key and value have gradients of different sizes, so each gets a format.
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps features (N, T, width) to features of the same shape and dtype."""
        normed = self.norm1(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.output(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class Transformer(nn.Module):
    """A decoder-only transformer on characters, with learned positions and normalisation before each sublayer.

    Args:
        width: features of a position, at least 1 and a multiple of `heads`.
        heads: attention heads in a block, at least 1.
        depth: blocks, at least 1.
        context: characters that it can look back on, its own included, at least 1; as long as the data's windows.
        dropout: share of features zeroed in training, after the embedding and in each block, from 0 to below 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, width: int = 128, heads: int = 4, depth: int = 2, context: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        for name, value in {"width": width, "heads": heads, "depth": depth, "context": context}.items():
            _check_at_least_1(name, value)
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got width {width} and heads {heads}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout must be a number from 0 to below 1, got {dropout!r}")
        self.context = context
        self.token = nn.Embedding(len(VOCABULARY), width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        """Predicts the character after each position from those up to it.

        Args:
            tokens: indices into the vocabulary, int64, shape (N, T), T at most `context`.

        Returns:
            Logits of the next characters, float32, shape (N, T, 96).

        Raises:
            ValueError: the input is longer than the context.
        """
        length = tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"the input has {length} characters, over the context of {self.context}: give the network and the "
                "data the same context"
            )
        x = self.token(tokens) + self.position(torch.arange(length, device=tokens.device))
        return self.head(self.norm(self.blocks(self.dropout(x))))


def load(context: int = 64, stride: int = 64, test_share: float = 0.1) -> tuple[TensorDataset, TensorDataset]:
    """Cuts the texts into windows of characters, the last share of the language reference for the test.

    Args:
        context: characters in a window, at least 1.
        stride: characters from the start of one training window to the next, at least 1. Windows of the test set
            do not overlap, so that a character counts once.
        test_share: share of the language reference's characters in the test set, above 0 and below 1.

    Returns:
        The training and the test set. Each holds the characters of its windows, int64, shape (N, context), and the
        characters after them, int64, the same shape: indices into `VOCABULARY`.

    Raises:
        ModuleNotFoundError: this Python lacks `pydoc_data`.
        ValueError: an argument is out of its range, or no window fits into one of the sets.
    """
    _check_at_least_1("context", context)
    _check_at_least_1("stride", stride)
    if isinstance(test_share, bool) or not isinstance(test_share, int | float) or not 0 < test_share < 1:
        raise ValueError(f"test_share must be a number above 0 and below 1, got {test_share!r}")
    reference, licence = encode(read_reference()), encode(read_licence())
    split = len(reference) - round(test_share * len(reference))
    # In front, and after the split: with a licence or without, the test set is the same.
    train, test = torch.cat([licence, reference[:split]]), reference[split:]
    if min(len(train), len(test)) <= context:
        raise ValueError(
            f"context {context} and test_share {test_share!r} leave {len(train)} characters to train on and "
            f"{len(test)} to test on, each needs more than the context"
        )
    return _windows(train, context, stride), _windows(test, context, context)


def read_reference() -> str:
    """Returns Python's language reference: the topics of `help()` by name, each paragraph once.

    Several topics are parts of others, word for word; with those a test set would hold what was trained on.
    """
    # Here, so that the network can be had where a distribution has left this module out.
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].strip().split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    return "\n\n".join(paragraphs.values())


def read_licence() -> str:
    """Returns Python's licence, or an empty text where the installation has none."""
    library = Path(os.__file__).parent
    for file in (library / "LICENSE.txt", library.parent / "LICENSE.txt"):  # the latter on Windows
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="ignore") + "\n\n"
    return ""


def encode(text: str) -> Tensor:
    """Returns the text's characters as indices into the vocabulary, int64, without those that are not in it."""
    indices = {character: index for index, character in enumerate(VOCABULARY)}
    return torch.tensor([indices[character] for character in text if character in indices], dtype=torch.int64)


def _windows(characters: Tensor, context: int, stride: int) -> TensorDataset:
    """Returns the whole windows (N, context) that start every `stride` characters, and the characters after them."""
    windows = characters.unfold(0, context + 1, stride)
    return TensorDataset(windows[:, :-1], windows[:, 1:])


def _check_at_least_1(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
