import os
import sys
from pathlib import Path
from pydoc_data import topics

import pytest
import torch
from torch.nn import functional as F

import cnmix

TINY = {"width": 8, "heads": 2, "depth": 2, "context": 6}


@pytest.fixture(scope="module")
def datasets(text):
    return text.load()


@pytest.fixture
def shipped(text, monkeypatch):
    """Puts texts in place of those that ship with Python."""

    def put(reference, licence=""):
        monkeypatch.setattr(topics, "topics", reference)
        monkeypatch.setattr(text, "read_licence", lambda: licence)

    return put


def characters(dataset):
    """Returns what windows that do not overlap were cut from."""
    tokens, following = dataset.tensors
    return torch.cat([tokens[0, :1], following.flatten()])


class TestTransformer:
    @pytest.mark.parametrize("depth", [1, 3])
    def test_parameters(self, text, depth):
        net = text.Transformer(width=8, heads=2, depth=depth, context=6)
        linear = {"query": (8, 8), "key": (8, 8), "value": (8, 8), "output": (8, 8), "fc1": (32, 8), "fc2": (8, 32)}
        blocks = {}
        for block in range(depth):
            for name, shape in linear.items():
                blocks |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
            for name in ("norm1", "norm2"):
                blocks |= {f"blocks.{block}.{name}.weight": (8,), f"blocks.{block}.{name}.bias": (8,)}
        assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == {
            "token.weight": (96, 8),
            "position.weight": (6, 8),
            **blocks,
            "norm.weight": (8,),
            "norm.bias": (8,),
            "head.weight": (96, 8),
            "head.bias": (96,),
        }

    def test_forward(self, text):
        torch.manual_seed(0)
        net = text.Transformer(**TINY)
        for norm in (module for module in net.modules() if isinstance(module, torch.nn.LayerNorm)):
            torch.nn.init.normal_(norm.weight)  # fresh ones hardly change a value
        tokens = torch.randint(96, (3, 6))
        x = net.token.weight[tokens] + net.position.weight
        later = torch.ones(6, 6, dtype=torch.bool).triu(1)
        for block in net.blocks:
            normed = block.norm1(x)
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                query, key, value = (layer(normed)[..., part] for layer in (block.query, block.key, block.value))
                weights = (query @ key.transpose(1, 2) / 4**0.5).masked_fill(later, -torch.inf).softmax(-1)
                heads.append(weights @ value)
            x = x + block.output(torch.cat(heads, -1))
            x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        output = net(tokens)
        assert output.dtype == torch.float32
        assert output.shape == (3, 6, 96)
        torch.testing.assert_close(output, net.head(net.norm(x)))

    @pytest.mark.parametrize("changed", range(6))
    def test_no_position_sees_a_later_one(self, text, changed):
        torch.manual_seed(0)
        net = text.Transformer(**TINY)
        before = torch.randint(96, (2, 6))
        after = before.clone()
        after[:, changed] = (after[:, changed] + 1) % 96
        same = torch.isclose(net(before), net(after), rtol=1e-5, atol=1e-6).all(-1).all(0)
        assert same.tolist() == [position < changed for position in range(6)]

    def test_shorter_and_longer_input(self, text):
        net = text.Transformer(**TINY)
        tokens = torch.randint(96, (2, 7))
        torch.testing.assert_close(net(tokens[:, :3]), net(tokens[:, :6])[:, :3])
        with pytest.raises(ValueError, match="the input has 7 characters, over the context of 6"):
            net(tokens)

    def test_every_parameter_learns(self, text):
        net = text.Transformer(**TINY)
        tokens = torch.arange(12).view(2, 6)
        F.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())

    def test_dropout_is_for_training(self, text):
        net = text.Transformer(**TINY, dropout=0.5)
        tokens = torch.arange(6).view(1, 6)
        assert not torch.equal(net(tokens), net(tokens))
        net.eval()
        assert torch.equal(net(tokens), net(tokens))

    @pytest.mark.parametrize("name", ["width", "heads", "depth", "context"])
    @pytest.mark.parametrize("value", [0, -3, 2.5, True, "8", None])
    def test_refused_sizes(self, text, name, value):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value!r}"):
            text.Transformer(**{name: value})

    def test_refused_heads(self, text):
        with pytest.raises(ValueError, match="width must be a multiple of heads, got width 128 and heads 3"):
            text.Transformer(heads=3)

    @pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, float("nan"), True, "0.5", None])
    def test_refused_dropout(self, text, dropout):
        with pytest.raises(ValueError, match=f"dropout must be a number from 0 to below 1, got {dropout!r}"):
            text.Transformer(dropout=dropout)


class TestLoad:
    def test_sizes_and_types(self, text, datasets):
        for dataset, least in zip(datasets, (4000, 400), strict=True):
            assert isinstance(dataset, torch.utils.data.TensorDataset)
            assert len(dataset) >= least
            for values in dataset.tensors:
                assert values.dtype == torch.int64
                assert values.shape == (len(dataset), 64)
                assert values.min() >= 0
                assert values.max() < len(text.VOCABULARY)

    def test_targets_are_the_characters_after(self, datasets):
        for dataset in datasets:
            tokens, following = dataset.tensors
            assert torch.equal(tokens[:, 1:], following[:, :-1])

    def test_split_is_the_text_once(self, text, datasets):
        train, test = map(characters, datasets)
        licence, reference = text.encode(text.read_licence()), text.encode(text.read_reference())
        split = len(licence) + len(reference) - round(0.1 * len(reference))
        before, after = torch.cat([licence, reference]).tensor_split([split])
        assert 0 <= len(before) - len(train) < 64  # what is left over of a window
        assert 0 <= len(after) - len(test) < 64
        assert torch.equal(train, before[: len(train)])
        assert torch.equal(test, after[: len(test)])

    @pytest.mark.parametrize(("stride", "starts"), [(1, range(86)), (3, range(0, 86, 3)), (7, range(0, 86, 7))])
    def test_windows(self, text, shipped, stride, starts):
        reference = "".join(chr(33 + index % 90) for index in range(100))
        shipped({"only": reference})
        train, test = text.load(context=4, stride=stride)
        tokens = text.encode(reference)
        assert train.tensors[0].tolist() == [tokens[start : start + 4].tolist() for start in starts]
        assert test.tensors[0].tolist() == [tokens[start : start + 4].tolist() for start in (90, 94)]

    def test_licence_is_trained_on_and_never_tested_on(self, text, shipped):
        for licence in ("", "x" * 50):
            shipped({"only": "ab" * 50}, licence)
            train, test = text.load(context=4, stride=4)
            assert torch.equal(characters(train)[:50], text.encode(licence or "ab" * 25))
            assert torch.equal(characters(test), text.encode("ababababa"))

    def test_a_paragraph_stands_once(self, text, shipped):
        shipped({"b": "First.\n\n   Second\n   line.", "a": "Second line.\n\nThird.\n", "c": "First."})
        assert text.read_reference() == "Second line.\n\nThird.\n\nFirst."

    def test_encode(self, text):
        assert text.encode("\n ~“ß\té").tolist() == [0, 1, 95]
        assert text.encode("").dtype == torch.int64
        assert len(set(text.VOCABULARY)) == len(text.VOCABULARY) == 96

    @pytest.mark.parametrize("place", ["lib/python3/LICENSE.txt", "lib/LICENSE.txt", None])
    def test_licence(self, text, monkeypatch, tmp_path, place):
        (tmp_path / "lib" / "python3").mkdir(parents=True)
        monkeypatch.setattr(os, "__file__", str(tmp_path / "lib" / "python3" / "os.py"))
        if place is not None:
            Path(tmp_path, place).write_bytes(b"PSF \xff LICENSE")
        assert text.read_licence() == ("" if place is None else "PSF  LICENSE\n\n")

    def test_python_without_the_reference(self, text, monkeypatch):
        monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
        with pytest.raises(ModuleNotFoundError, match=r"pydoc_data\.topics"):
            text.load()

    @pytest.mark.parametrize("name", ["context", "stride"])
    @pytest.mark.parametrize("value", [0, -1, 0.5, True, "64", None])
    def test_refused_sizes(self, text, name, value):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value!r}"):
            text.load(**{name: value})

    @pytest.mark.parametrize("share", [0, 1, 0.0, 1.0, -0.5, 2, float("nan"), True, "0.25", None])
    def test_refused_share(self, text, share):
        with pytest.raises(ValueError, match=f"test_share must be a number above 0 and below 1, got {share!r}"):
            text.load(test_share=share)

    @pytest.mark.parametrize("share", [0.1, 0.9])
    def test_refused_empty_set(self, text, shipped, share):
        shipped({"only": "ab" * 50})
        with pytest.raises(ValueError, match=f"context 10 and test_share {share} leave .* each needs more than the"):
            text.load(context=10, test_share=share)


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_a_few_steps_learn(text, datasets, level):
    torch.set_num_threads(1)  # on products this small more would wait for each other; put back by tests/conftest.py
    torch.manual_seed(0)
    net = text.Transformer(width=32, heads=2, depth=1)
    net, optimizer = cnmix.initialize(net, torch.optim.AdamW(net.parameters(), lr=1e-2), opt_level=level)
    train, test = datasets
    for step in range(40):
        tokens, following = train[step * 16 : step * 16 + 16]
        optimizer.zero_grad()
        loss = F.cross_entropy(net(tokens).flatten(0, 1), following.flatten())
        with cnmix.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        optimizer.step()
    net.eval()
    tokens, following = test[:100]
    with torch.no_grad():
        loss = F.cross_entropy(net(tokens).flatten(0, 1), following.flatten())
    counts = torch.bincount(following.flatten()).double()
    frequency = counts[counts > 0] / counts.sum()
    assert loss < -(frequency * frequency.log()).sum()  # more than how often each character comes
