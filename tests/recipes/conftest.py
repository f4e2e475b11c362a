import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def mnist() -> ModuleType:
    return load_recipe("mnist")


@pytest.fixture(scope="session")
def digits() -> ModuleType:
    return load_recipe("digits")


@pytest.fixture(scope="session")
def text() -> ModuleType:
    return load_recipe("text")


@pytest.fixture(scope="session")
def imagenet() -> ModuleType:
    return load_recipe("imagenet")
