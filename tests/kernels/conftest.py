from collections.abc import Iterator

import pytest

from cnmix.kernels import native


@pytest.fixture(scope="module", params=["compiled", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests with the compiled part and without it."""
    original = native.library
    if request.param == "compiled":
        if original() is None:
            pytest.skip(native.describe())
        yield request.param
        return
    native.library = lambda: None
    yield request.param
    native.library = original
