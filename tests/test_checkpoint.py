import os
import pickle
import stat

import numpy as np
import pytest
import torch
from torch import nn

import cnmix
from cnmix import QuantizeConfig, checkpoint
from cnmix.nn import convert, quantized_modules


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def trained():
    model = make()
    convert(model, QuantizeConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def test_an_ordinary_pytorch_checkpoint(trained, tmp_path):
    model, optimizer = trained
    path = tmp_path / "runs" / "one" / "model.pt"
    checkpoint.save(path, model, optimizer, epoch=3, note="x", history=[1.0, {"a": torch.ones(2)}])
    data = torch.load(path, weights_only=True)
    assert set(data) == {"state_dict", "cnmix", "optimizer", "epoch", "note", "history"}
    plain = make()
    plain.load_state_dict(data["state_dict"], strict=True)
    assert list(data["state_dict"]) == list(plain.state_dict())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain.parameters(), model.parameters(), strict=True))
    assert data["cnmix"] == cnmix.state_dict(model)
    assert (data["epoch"], data["note"]) == (3, "x")
    assert os.listdir(path.parent) == ["model.pt"]
    read = checkpoint.load(path)
    assert set(read) == set(data)
    assert read["cnmix"] == data["cnmix"]


def test_loading_continues_the_run(trained, tmp_path):
    model, optimizer = trained
    checkpoint.save(str(tmp_path / "model.pt"), model, optimizer)
    data = checkpoint.load(str(tmp_path / "model.pt"))
    other = make()
    other.load_state_dict(data["state_dict"])
    convert(other, QuantizeConfig())
    cnmix.load_state_dict(data["cnmix"], other)
    other_optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other_optimizer.load_state_dict(data["optimizer"])
    x = torch.randn(8, 4)
    for each, its in ((model, optimizer), (other, other_optimizer)):
        its.zero_grad()
        each(x).square().mean().backward()
        its.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert cnmix.state_dict(model) == cnmix.state_dict(other)


def test_a_plain_model_and_a_wrapped_one(trained, tmp_path):
    checkpoint.save(tmp_path / "plain.pt", make())
    assert checkpoint.load(tmp_path / "plain.pt")["cnmix"]["models"] == [{"modules": {}}]
    checkpoint.save(tmp_path / "wrapped.pt", nn.DataParallel(trained[0]))
    data = checkpoint.load(tmp_path / "wrapped.pt")
    assert list(data["state_dict"]) == list(make().state_dict())
    assert list(data["cnmix"]["models"][0]["modules"]) == ["0", "2"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(share, trained, tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, trained[0])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model\.pt is truncated, or no PyTorch checkpoint"):
        checkpoint.load(path)


class Payload:
    def __reduce__(self):
        return (os.mkdir, (str(Payload.target),))


@pytest.mark.parametrize("kind", ["text", "numpy", "pickled class", "saved module", "saved object"])
def test_other_files_are_refused(kind, trained, tmp_path):
    path, Payload.target = tmp_path / "model.pt", tmp_path / "made"
    if kind == "text":
        path.write_text("lr: 0.1\n" * 100)
    elif kind == "numpy":
        np.save(tmp_path / "array.npy", np.ones(3))
        (tmp_path / "array.npy").rename(path)
    elif kind == "pickled class":
        path.write_bytes(pickle.dumps({"state_dict": Payload(), "cnmix": {}}))
    elif kind == "saved module":
        torch.save(trained[0], path)
    else:
        torch.save({"state_dict": Payload(), "cnmix": {}}, path)
    with pytest.raises(ValueError, match=r"model\.pt is truncated, or no PyTorch checkpoint"):
        checkpoint.load(path)
    assert not Payload.target.exists()


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path / "no" / "folder.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint") as caught:
            checkpoint.load(path)
        assert str(path) in str(caught.value)


NO_STATE = {"version": 1, "models": [], "loss_scalers": []}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {}, "epoch": 3}, "lacks cnmix and state_dict; it has epoch, model"),
        ({"state_dict": {}}, "lacks cnmix; it has state_dict"),
        ({"cnmix": NO_STATE}, "lacks state_dict; it has cnmix"),
        ({}, "lacks cnmix and state_dict"),
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({"state_dict": {}, "cnmix": {}}, "no cnmix state"),
        ({"state_dict": {}, "cnmix": {**NO_STATE, "version": 99}}, "upgrade cnmix"),
        ({"state_dict": {}, "cnmix": {**NO_STATE, "models": [{"modules": {"fc": {}}}]}}, "'fc'"),
        ({"state_dict": {}, "cnmix": {**NO_STATE, "models": [3]}}, "no cnmix state"),
        ({"state_dict": {}, "cnmix": {**NO_STATE, "models": 3}}, "cnmix state"),
        ({"state_dict": {}, "cnmix": 3}, "cnmix|int"),
    ],
)
def test_wrong_keys_are_refused(data, message, tmp_path):
    torch.save(data, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "model.pt")


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("present", [True, False])
def test_a_failing_save_leaves_what_was_there(error, present, trained, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    if present:
        checkpoint.save(path, trained[0], epoch=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def failing(data, file):
        file.write(b"PK" * 1000)
        raise error

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(type(error)):
        checkpoint.save(path, trained[0], epoch=2)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    if present:
        assert checkpoint.load(path)["epoch"] == 1


def test_what_cannot_be_pickled_leaves_what_was_there(trained, tmp_path):
    checkpoint.save(tmp_path / "model.pt", trained[0], epoch=1)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.save(tmp_path / "model.pt", trained[0], epoch=lambda: 2)
    assert os.listdir(tmp_path) == ["model.pt"]
    assert checkpoint.load(tmp_path / "model.pt")["epoch"] == 1


@pytest.mark.parametrize("name", ["state_dict", "cnmix"])
def test_reserved_names_are_refused(name, trained, tmp_path):
    with pytest.raises(ValueError, match=rf"\['{name}'\] are written by save itself"):
        checkpoint.save(tmp_path / "model.pt", trained[0], **{name: 1})
    assert not list(tmp_path.iterdir())


def test_saving_over_a_checkpoint_replaces_it(trained, tmp_path):
    for epoch in range(3):
        checkpoint.save(tmp_path / "model.pt", trained[0], epoch=epoch)
    assert checkpoint.load(tmp_path / "model.pt")["epoch"] == 2
    assert os.listdir(tmp_path) == ["model.pt"]


def test_the_file_has_the_usual_permissions(trained, tmp_path):
    torch.save({}, tmp_path / "usual.pt")
    checkpoint.save(tmp_path / "model.pt", trained[0])
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("usual.pt", "model.pt")]
    assert modes[0] == modes[1]


def test_settings_from_numpy_can_be_read_back(tmp_path):
    model = make()
    convert(model, QuantizeConfig(alpha=np.float64(0.05), bitwidth=np.int64(16)))
    checkpoint.save(tmp_path / "model.pt", model)
    data = checkpoint.load(tmp_path / "model.pt")
    assert data["cnmix"]["models"][0]["modules"]["0"]["settings"]["weight"]["alpha"] == 0.05


def test_saving_changes_nothing(trained, tmp_path):
    model, optimizer = trained
    before = cnmix.state_dict(model)
    checkpoint.save(tmp_path / "model.pt", model, optimizer)
    assert cnmix.state_dict(model) == before
    assert model.training
    assert [fqn for fqn, _ in quantized_modules(model)] == ["0", "2"]
