import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from offline_files import (
    Attending,
    Everything,
    Experts,
    Filtering,
    Tokens,
    images,
    joined,
    parts,
    sealed,
    sequences,
    trained,
    with_program,
    write,
)
from torch import nn

from cnmix import inference
from cnmix.inference import OfflineModel
from cnmix.inference.allowed import ALLOWED
from cnmix.inference.names import CONVOLUTION, FILTER, GROUPED, LINEAR, MATMUL, RECURRENCE, STORED_WEIGHTS
from cnmix.inference.program import find_operator
from cnmix.nn.exported import FITTING


def same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        same(list(a.values()), list(b.values()))
    else:
        assert type(a) is type(b)
        for each, other in zip(a, b, strict=True):
            same(each, other)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("offline") / "everything.cambricon"
    model = trained(Everything, [images()])
    fused = inference.fuse(model, images())
    digest = fused.save(path, core_number=4, core_version="MLU270", metadata={"data": "shapes"})
    return model, fused, path, digest


def test_same_bits(saved):
    model, fused, path, digest = saved
    offline = OfflineModel(path, sha256=digest)
    for seed in range(3):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = model(x)
        same(expected, fused(x))
        same(expected, offline(x))
        same(expected, offline(x.to(memory_format=torch.channels_last)))
    broken = images()
    broken[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        assert torch.equal(model(broken)["scores"].isnan(), offline(broken)["scores"].isnan())


@pytest.mark.parametrize(
    ("make", "inputs", "settings"),
    [
        (Everything, [images()], {"bitwidth": 16}),
        (Everything, [images()], {"bitwidth": 31}),
        (Everything, [images(1)], {"rounding": "half_up"}),
        (Tokens, [torch.arange(12).view(2, 6) % 11], {}),
    ],
)
def test_other_formats_and_operators(make, inputs, settings, tmp_path):
    model = trained(make, inputs, **settings)
    fused = inference.fuse(model, *inputs)
    fused.save(tmp_path / "file.cambricon")
    expected = fused(*inputs)
    same(expected, OfflineModel(tmp_path / "file.cambricon")(*inputs))
    with torch.no_grad():
        same(model(*inputs), expected)


def transformer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


PRODUCTS = {  # a model, its inputs, settings, and the operators of its products
    "transformer": (transformer, [sequences()], {}, {LINEAR, MATMUL}),
    "attention": (Attending, [sequences(), sequences(seed=1)], {"per_entry": True}, {LINEAR, MATMUL}),
    "lstm": (lambda: nn.LSTM(8, 5, bidirectional=True), [sequences()], {}, {RECURRENCE}),
    "projection": (lambda: nn.LSTM(8, 5, proj_size=3), [sequences()], {"bitwidth": 31}, {RECURRENCE}),
    "gru": (lambda: nn.GRU(8, 5, 2), [sequences()], {"bitwidth": 16}, {RECURRENCE}),
    "filter": (Filtering, [images()], {}, {CONVOLUTION, FILTER}),
    "experts": (Experts, [sequences()[0]], {}, {LINEAR, GROUPED}),
    "zeros": (Attending, [torch.zeros(4, 2, 8) for _ in range(2)], {}, {LINEAR, MATMUL}),  # fit no position in training
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_functions_and_recurrent_layers(name, tmp_path):
    make, inputs, settings, operators = PRODUCTS[name]
    if name == "experts" and not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    model = trained(make, inputs, **settings)
    fused = inference.fuse(model, *inputs)
    fused.save(tmp_path / "file.cambricon")
    offline = OfflineModel(tmp_path / "file.cambricon")
    assert {step.operator for step in offline.program.steps} & set(STORED_WEIGHTS) == operators
    for factor in (1.0, -1.7):
        each = [factor * x for x in inputs]
        with torch.no_grad():
            expected = model(*each)
        same(expected, fused(*each))
        same(expected, offline(*each))
    if name == "zeros":
        each = [sequences(), sequences(seed=1)]
        with torch.no_grad():
            same(model(*each), offline(*each))
        formats = [step.arguments[3] for step in offline.program.steps if step.operator == LINEAR]
        assert all(each[1] == FITTING for each in formats)


def test_description(saved):
    _, _, path, digest = saved
    offline = OfflineModel(path)
    assert offline.inputs == [("x", (2, 3, 8, 8), torch.float32)]
    assert [each.shape for each in offline.outputs] == [(2, 5), (2, 4), (2, 6, 8, 8)]
    assert (offline.name, offline.batch_size, offline.core_number) == ("everything", 2, 4)
    assert (offline.core_version, offline.metadata, offline.digest) == ("MLU270", {"data": "shapes"}, digest)
    assert offline.size == os.path.getsize(path)
    assert not offline.training
    assert digest in repr(offline)


def test_weights_are_stored_once_and_as_integers(saved, tmp_path):
    _, _, path, _ = saved
    header, _ = parts(path.read_bytes())
    dtypes = [each["dtype"] for name, each in header.items() if name != "__metadata__"]
    assert dtypes.count("I8") == 5
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    net[2].weight = net[0].weight
    model = trained(lambda: net, [torch.ones(1, 256)])
    inference.fuse(model, torch.ones(1, 256)).save(tmp_path / "tied.cambricon")
    header, data = parts((tmp_path / "tied.cambricon").read_bytes())
    assert len(data) <= 2 * 256 * 256 + 2 * 4 * 256


def test_no_code_of_the_model_is_needed(saved, tmp_path):
    model, _, path, _ = saved
    script = f"""
import sys, torch
from cnmix.inference import OfflineModel
x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
torch.save(OfflineModel({str(path)!r})(x), {str(tmp_path / "out.pt")!r})
assert "offline_files" not in sys.modules
assert "torch._dynamo" not in sys.modules  # a second's import
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(inference.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    with torch.no_grad():
        same(model(images()), torch.load(tmp_path / "out.pt"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([images(1)], r"'everything' takes float32 \(2, 3, 8, 8\), got float32 \(1, 3, 8, 8\)"),
        ([images().double()], "got float64"),
        ([], "got nothing"),
        ([images(), images()], "got float32 .* and float32"),
        (["x"], "got str"),
    ],
)
def test_wrong_inputs(saved, inputs, message):
    with pytest.raises(ValueError, match=message):
        OfflineModel(saved[2])(*inputs)


def test_threads_share_a_model(saved):
    model, _, path, _ = saved
    offline = OfflineModel(path)
    with torch.no_grad():
        expected = model(images())
    results = []
    threads = [threading.Thread(target=lambda: results.append(offline(images()))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        same(expected, result)


def test_what_cannot_be_saved(saved, tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.erfinv(x)

    class Listed(nn.Module):
        def forward(self, x):
            return {1: x + 1}

    path = tmp_path / "none.cambricon"
    x = sequences()
    with pytest.raises(ValueError, match="one tensor as several inputs"):
        inference.fuse(Attending().eval(), x, x).save(path)
    with pytest.raises(ValueError, match=r"aten\.erfinv\.default, which an offline model cannot"):
        inference.fuse(Odd().eval(), torch.zeros(3)).save(path)
    with pytest.raises(ValueError, match="returns a dict: return tensors"):
        inference.fuse(Listed().eval(), torch.ones(3)).save(path)
    with pytest.raises(ValueError, match="its name must be a text"):
        saved[1].save(path, name="x\ny")
    with pytest.raises(ValueError, match="its core_number must be a number"):
        saved[1].save(path, core_number=-1)
    assert list(tmp_path.iterdir()) == []


def test_saving_leaves_what_was_there_when_it_fails(saved, tmp_path, monkeypatch):
    path = tmp_path / "kept.cambricon"
    saved[1].save(path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        saved[1].save(path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["kept.cambricon"]


def test_the_digest_is_what_the_format_says(saved):
    _, _, path, digest = saved
    header, data = parts(path.read_bytes())
    assert header["__metadata__"]["sha256"] == digest
    length = int.from_bytes(path.read_bytes()[:8], "little")
    text = path.read_bytes()[8 : 8 + length].replace(digest.encode(), b"0" * 64)
    assert sealed(text, data) == path.read_bytes()


def test_another_file_than_the_one_pinned(saved, tmp_path):
    with pytest.raises(ValueError, match=r"its digest is [0-9a-f]{64}, not the one asked for, '0{64}'"):
        OfflineModel(saved[2], sha256="0" * 64)

    def negate(program):
        program["steps"] = [
            {**step, "operator": "aten.neg.default"} if step["operator"] == "aten.relu.default" else step
            for step in program["steps"]
        ]

    path = write(tmp_path / "evil.cambricon", with_program(saved[2].read_bytes(), negate))
    OfflineModel(path)
    with pytest.raises(ValueError, match="not the one asked for"):
        OfflineModel(path, sha256=saved[3])


def test_newer_formats_say_what_reads_them(saved, tmp_path):
    header, data = parts(saved[2].read_bytes())
    header["__metadata__"] |= {"format_version": "7", "cnmix_version": "9.1.0"}
    with pytest.raises(ValueError, match=r"format version 7, and cnmix .* pip install 'cnmix>=9\.1\.0'"):
        OfflineModel(write(tmp_path / "newer.cambricon", joined(header, data)))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        OfflineModel(tmp_path / "none.cambricon")
    with pytest.raises(ValueError, match="it is no file"):
        OfflineModel(tmp_path)


def test_allowed_operators_only_compute():
    seeded = {"aten.scaled_dot_product_attention.default"}  # for dropout, which is refused
    for name in sorted(ALLOWED):
        operator = find_operator(name)
        assert not operator._schema.is_mutable, name
        assert torch.Tag.nondeterministic_seeded not in operator.tags or name in seeded, name


def test_json_is_canonical(saved):
    header, _ = parts(saved[2].read_bytes())
    text = header["__metadata__"]["program"]
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text


def test_a_file_has_the_mode_of_others(saved, tmp_path):
    (tmp_path / "other").touch()
    assert saved[2].stat().st_mode == (tmp_path / "other").stat().st_mode


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no offline model .*none"):
        OfflineModel(tmp_path / "none.cambricon")
