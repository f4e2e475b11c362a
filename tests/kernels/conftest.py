from collections.abc import Iterator

import pytest

from cnmix.kernels import native

# The instructions that each way of multiplying takes: the compiled part's own product on tiles or vectors, and torch's
# int8 product with the compiled part around it.
ISA_OF = {"AMX": 4, "VNNI": 3, "int_mm": 2}
INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512", "VNNI", "AMX")


@pytest.fixture(scope="module", params=[*ISA_OF, "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a module's tests with every way of multiplying that this machine has; "torch" has no compiled part."""
    original = native.library
    if request.param == "torch":
        native.library = lambda: None
        yield request.param
        native.library = original
        return
    library = original()
    if library is None:
        pytest.skip(native.describe())
    best, wanted = library.cnmix_isa(-1), ISA_OF[request.param]
    if wanted > max(best, ISA_OF["int_mm"]):  # torch's product serves on every processor
        pytest.skip("this processor has not these instructions")
    library.cnmix_isa(wanted)
    yield request.param
    library.cnmix_isa(best)


@pytest.fixture(scope="module", params=range(len(INSTRUCTION_SETS)), ids=INSTRUCTION_SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a module's tests with every instruction set of the compiled part that this machine has."""
    library = native.library()
    if library is None:
        pytest.skip(native.describe())
    best = library.cnmix_isa(-1)
    if request.param > best:
        pytest.skip("this processor has not these instructions")
    library.cnmix_isa(request.param)
    yield request.param
    library.cnmix_isa(best)
