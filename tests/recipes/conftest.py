import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load_recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"recipe_{name.replace('/', '_')}", RECIPES / f"{name}.py")
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


@pytest.fixture(scope="session")
def yolov3() -> SimpleNamespace:
    """The files of the folder, which import each other as scripts do, by plain names that others may have too."""
    names = ("compare", "data", "detection", "loss", "model", "pictures", "train", "weights")
    sys.path.insert(0, str(RECIPES / "yolov3"))
    try:
        files = {name: importlib.import_module(name) for name in names}
        files["test"] = load_recipe("yolov3/test")  # `test` is Python's own tests
    finally:
        sys.path.remove(str(RECIPES / "yolov3"))
        for name in names:
            sys.modules.pop(name, None)
    return SimpleNamespace(**files)
