"""What PyTorch asks of a device: which cards there are, their queues, generators and memory."""

from __future__ import annotations

import pytest
import torch

import cnmix.torch_mlu
import cnmix.torch_mlu.core.mlu_model as ct
from cnmix.torch_mlu.card import library


def test_a_card_that_is_gone_is_an_error_and_not_the_end() -> None:
    ct.set_device(1)
    try:
        with ct.device(0):
            cnmix.torch_mlu.install(cards=1)
        assert ct.current_device() == 0
        cnmix.torch_mlu.install(cards=2)
        ct.set_device(1)
        cnmix.torch_mlu.install(cards=1)
        with pytest.raises(RuntimeError, match="no card mlu:1"):
            torch.zeros(1, device="mlu")
        with pytest.raises(RuntimeError, match="no card mlu:1"):
            library().exchange(1)
    finally:
        ct.set_device(0)


@pytest.mark.parametrize("index", [2, 100])
def test_no_way_leads_to_a_card_that_is_not_there(index: int) -> None:
    message = f"no card mlu:{index}: this process has 2"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cnmix_card.card(torch.ones(3), index)
    with pytest.raises(RuntimeError, match=message):
        torch.accelerator.current_stream(f"mlu:{index}")
    with pytest.raises(RuntimeError, match=message):
        torch.Stream(device=f"mlu:{index}")
    with pytest.raises(RuntimeError, match=message):
        torch.Generator(f"mlu:{index}")
    with pytest.raises(RuntimeError, match=message):
        ct.set_stream(torch.Stream(stream_id=1, device_index=index, device_type=ct.current_queue().device_type))
    for wrong in (-1, -3, 2**40):
        with pytest.raises(RuntimeError, match=f"no card mlu:{wrong}"):
            torch.ops.cnmix_card.card(torch.ones(3), wrong)


def test_torch_accelerator_sees_it() -> None:
    x = torch.zeros(1000, device="mlu")
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.memory_allocated() == torch.accelerator.memory_reserved() == ct.memory_allocated()
    assert torch.accelerator.max_memory_allocated() == ct.max_memory_allocated() >= x.nbytes
    assert torch.accelerator.get_memory_info() == ct.mem_get_info()
    assert torch.accelerator.memory_allocated("mlu:1") == ct.memory_allocated(1)


def test_a_tensor_is_kept_for_a_queue() -> None:
    x = torch.zeros(2, device="mlu")
    x.record_stream(ct.Queue())  # as scripts do that fetch ahead
    assert x.tolist() == [0, 0]
