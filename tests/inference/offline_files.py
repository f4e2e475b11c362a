"""Models for tests of offline models, and how their files are changed."""

import copy
import hashlib
import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import cnmix
from cnmix import QuantizeConfig, inference
from cnmix.nn import convert

SECONDS = 1.0  # within which a bad file is refused


class Everything(nn.Module):
    """A residual, a concatenation, pooling, upsampling and linear layers; returns a dict."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2)
        self.neck = nn.Conv2d(16, 6, 1)
        self.act = nn.LeakyReLU(0.1)
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 5)
        self.flat = nn.Linear(6 * 64, 4)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.body(x) + x)
        y = self.up(self.pool(x))
        y = self.act(self.neck(torch.cat([x, y], 1)))
        scores = self.fc(self.dropout(self.mean(y).flatten(1)))
        return {"scores": scores, "parts": (self.flat(y.flatten(1)), [y.sigmoid()])}


class Tokens(nn.Module):
    """What transformers are made of, with infinities in a mask."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.places = nn.Embedding(6, 8)
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.places(torch.arange(6))
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        scores = torch.einsum("bqd,bkd->bqk", q, k) / 8**0.5
        mask = torch.ones(6, 6).tril() == 0
        x = x + self.out(F.gelu(scores.masked_fill(mask, float("-inf")).softmax(-1) @ v))
        x = x + F.scaled_dot_product_attention(q, k, v)
        return self.head(x)


class Attending(nn.Module):
    """Attends from one sequence to another."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, x, y):
        key, value = self.key(y).chunk(2, -1)
        return F.scaled_dot_product_attention(self.query(x), key, value)


class Filtering(nn.Module):
    """Convolves by what it computes."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward(self, x):
        return F.conv2d(self.first(x), self.second.tanh() + 0.1, padding=1, groups=2)


class Experts(nn.Module):
    """Gives rows to one of three matrices each."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) / 4)

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        order = chosen.argsort(stable=True)
        ends = (chosen.unsqueeze(0) <= torch.arange(3).unsqueeze(1)).sum(1, dtype=torch.int32)
        return F.grouped_mm(x[order], self.experts, offs=ends)


class Kinds(nn.Module):
    """A product of each kind."""

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(8, 8, proj_size=4)
        self.attending, self.experts = Attending(), Experts()
        self.up = nn.Linear(4, 8)
        self.blur = nn.Parameter(torch.randn(2, 1, 3))

    def forward(self, x):
        y = self.up(self.memory(x)[0])
        y = F.conv1d(self.attending(x, y), self.blur * 0.5, padding=1, groups=2)
        return self.experts(y.flatten(0, 1))


def sequences(steps=4, rows=2, seed=0):
    return torch.randn(steps, rows, 8, generator=torch.Generator().manual_seed(seed))


def trained(make, inputs, **settings):
    """Trains a model for three steps; returns it as an integer model."""
    torch.manual_seed(0)
    model = make()
    convert(model, QuantizeConfig(**settings))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sum(each.square().mean() for each in leaves(model(*inputs))).backward()
        optimizer.step()
    saved = copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})
    return inference.load(make(), saved)


def leaves(result):
    return torch.utils._pytree.tree_leaves(result)


def images(n=2, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def parts(raw):
    """Returns a file's header, parsed, and its data."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header, data):
    """Returns a file with a header, and the digest that belongs to it, as one who means harm would write it."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and "sha256" in metadata:
        metadata["sha256"] = "0" * 64
    return sealed(json.dumps(header, separators=(",", ":")).encode(), data)


def sealed(text, data):
    """Returns a file with a header as it is written, filled up to eight bytes, and the digest that belongs to it."""
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text + data).hexdigest()
    text = re.sub(rb'"sha256":"0{64}"', b'"sha256":"' + digest.encode() + b'"', text)
    return len(text).to_bytes(8, "little") + text + data


def with_program(raw, change):
    """Returns a file whose program is what ``change`` makes of it, or has made it; digest and all."""
    header, data = parts(raw)
    program = json.loads(header["__metadata__"]["program"])
    changed = change(program)
    changed = program if changed is None else changed
    text = changed if isinstance(changed, str) else json.dumps(changed)
    header["__metadata__"]["program"] = text
    return joined(header, data)


def write(path, raw):
    Path(path).write_bytes(raw)
    return path
