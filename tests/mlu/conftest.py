from collections.abc import Iterator

import pytest

import cnmix.torch_mlu


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    """Puts the emulation in place, and takes the cards away again: other tests of this process find none."""
    cnmix.torch_mlu.install(cards=2, strict=False, card_name="MLU370")
    yield
    cnmix.torch_mlu.install(cards=0, strict=False, card_name="MLU370")
