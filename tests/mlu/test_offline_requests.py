"""``ct.save_as_cambricon``: the next trace leaves an offline model."""

from pathlib import Path

import pytest
import torch
from traced_networks import images, made, quantized

from cnmix.inference.offline import OfflineModel
from cnmix.torch_mlu.core import mlu_model as ct
from cnmix.torch_mlu.settings import configure, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield
    configure(core_number=1, core_version="", input_format=0, offline_model="")


@pytest.mark.parametrize("device", ["cpu", "mlu"])
@pytest.mark.parametrize(("dtype", "qconfig"), [("int8", {"per_channel": True}), ("int16", None)])
def test_a_trace_leaves_the_file(device, dtype, qconfig):
    x = images(4, 3, 16, 16)
    model = quantized(made(norms=True), x, dtype, qconfig)
    ct.set_core_version("MLU270")
    ct.set_core_number(16)
    ct.set_input_format(2)
    ct.save_as_cambricon("yolov3")
    traced = torch.jit.trace(model.to(device), x.to(device), check_trace=False)
    assert [path.name for path in Path().iterdir()] == ["yolov3.cambricon"]
    assert not settings().offline_model
    offline = OfflineModel("yolov3.cambricon")
    assert (offline.name, offline.core_number, offline.core_version, offline.batch_size) == ("yolov3", 16, "MLU270", 4)
    assert offline.metadata == {"input_format": "2"}
    for found, expected in zip(offline(x), traced.to("mlu")(x.mlu()), strict=True):
        assert torch.equal(found, expected.cpu())
    torch.jit.trace(model, x.mlu(), check_trace=False)
    assert len([*Path().iterdir()]) == 1


def test_the_card_is_the_core_version_where_none_is_set():
    ct.save_as_cambricon("net.cambricon")
    torch.jit.trace(made(), images())
    offline = OfflineModel("net.cambricon")
    assert (offline.core_number, offline.core_version, offline.batch_size) == (1, "MLU370", 2)


def test_what_cannot_be_one_raises_and_takes_the_request_back():
    ct.save_as_cambricon("net")
    with pytest.raises(ValueError, match="which needs a model and its inputs"):
        torch.jit.trace(lambda x: x + 1, images())
    assert not settings().offline_model

    class Several(torch.nn.Module):
        def forward(self, x):
            return x[x > 0.5]

    ct.save_as_cambricon("net")
    with pytest.raises(ValueError, match=r"net\.cambricon cannot be made of Several: "):
        torch.jit.trace(Several(), images(), check_trace=False)
    assert not [*Path().iterdir()]
