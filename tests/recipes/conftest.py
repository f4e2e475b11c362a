import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
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
def translation() -> ModuleType:
    return load_recipe("translation")


@pytest.fixture(scope="session")
def bert() -> ModuleType:
    return load_recipe("bert")


@pytest.fixture(scope="session")
def imagenet() -> ModuleType:
    return load_recipe("imagenet")


@pytest.fixture(scope="session")
def crnn() -> ModuleType:
    return load_recipe("crnn")


@contextlib.contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Lets scripts import the files beside them by their plain names, which others may have too."""
    before = set(sys.modules)
    paths = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = paths
        for name in set(sys.modules) - before:
            file = Path(getattr(sys.modules[name], "__file__", None) or "/")
            if file.is_relative_to(RECIPES) or file.is_relative_to(folder):
                del sys.modules[name]


@pytest.fixture(scope="module")
def accuracy() -> Iterator[ModuleType]:
    with importing(RECIPES.parent / "benchmarks"):
        yield importlib.import_module("recipes_accuracy")


@pytest.fixture(scope="module")
def imagenet_test() -> Iterator[ModuleType]:
    with importing(RECIPES):
        yield load_recipe("imagenet_test")


@pytest.fixture(scope="module")
def yolov3() -> Iterator[SimpleNamespace]:
    names = ("compare", "data", "detection", "loss", "model", "pictures", "settings", "train", "weights")
    with importing(RECIPES / "yolov3"):
        files = {name: importlib.import_module(name) for name in names}
        files["test"] = load_recipe("yolov3/test")  # `test` is Python's own tests
        yield SimpleNamespace(**files)
