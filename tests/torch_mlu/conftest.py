from collections.abc import Iterator

import pytest

import cnmix.torch_mlu


@pytest.fixture(scope="session", autouse=True)
def _emulation() -> None:
    cnmix.torch_mlu.install(cards=2, strict=False, card_name="MLU370")


@pytest.fixture(autouse=True)
def _settings_as_before() -> Iterator[None]:
    yield
    cnmix.torch_mlu.install(cards=2, strict=False, card_name="MLU370")
