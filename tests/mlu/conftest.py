from collections.abc import Iterator

import pytest

import cnmix.torch_mlu
from cnmix.torch_mlu.settings import configure


@pytest.fixture(autouse=True)
def emulation() -> Iterator[None]:
    """Puts the emulation in place, and takes the cards away again: other tests of this process find none."""
    cnmix.torch_mlu.install(cards=2, strict=False, card_name="MLU370")
    configure(fuses=True)
    yield
    cnmix.torch_mlu.install(cards=0, strict=False, card_name="MLU370")
