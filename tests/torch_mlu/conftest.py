from collections.abc import Iterator

import pytest

import cnmix.torch_mlu


@pytest.fixture(autouse=True, scope="session")
def emulation() -> None:
    """Puts the emulation in place, for this process until it ends."""
    cnmix.torch_mlu.install(cards=2, strict=False, card_name="MLU370")


@pytest.fixture(autouse=True)
def settings_as_before() -> Iterator[None]:
    """Lets a test change the settings."""
    yield
    cnmix.torch_mlu.install(cards=2, strict=False, card_name="MLU370")
