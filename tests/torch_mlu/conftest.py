import pytest

import cnmix.torch_mlu

SETTINGS = {"cards": 2, "strict": False, "card_name": "MLU370"}


@pytest.fixture(scope="session", autouse=True)
def emulated_card():
    cnmix.torch_mlu.install(**SETTINGS)


@pytest.fixture(autouse=True)
def settings_as_before(emulated_card):
    yield
    cnmix.torch_mlu.install(**SETTINGS)
