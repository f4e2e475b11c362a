"""Large tensors of ``native.empty``, whose memory is kept for the next."""

import copy
import gc
import io
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnmix.kernels import native, quantization

library = native.library()
pytestmark = pytest.mark.skipif(library is None, reason=native.describe())

DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.int64)
LARGE = 1 << 21  # bytes, from the pool


@pytest.fixture(autouse=True)
def nothing_idle() -> Iterator[None]:
    gc.collect()
    library.cnmix_release_memory()
    yield
    library.cnmix_release_memory()


def large(count: int = LARGE // 4) -> torch.Tensor:
    return native.empty((count,), torch.float32)


@given(
    st.lists(st.integers(1, 5), max_size=6),
    st.sampled_from(DTYPES),
    st.randoms(use_true_random=False),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_order_and_type_holds_its_values(others, dtype, random, ordered):
    # The first dimension makes it large; the order of the dimensions in memory is any.
    shape = [-(-LARGE // dtype.itemsize // math.prod(others)), *others]
    strides, inner = [0] * len(shape), 1
    for dim in random.sample(range(len(shape)), len(shape)):
        strides[dim], inner = inner, inner * shape[dim]
    x = native.empty(shape, dtype, strides if ordered else None)
    assert (tuple(x.shape), x.dtype, x.device.type, x.requires_grad) == (tuple(shape), dtype, "cpu", False)
    assert x.stride() == (tuple(strides) if ordered else torch.empty(shape, device="meta").stride())
    values = torch.arange(x.numel()).to(dtype).view(shape)
    assert torch.equal(x.copy_(values), values)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 1 << 40), (5,), ((1 << 18) - 1,), (1,) * 9, (1 << 20, *(1,) * 8)])
def test_small_tensors_and_those_of_many_dimensions_are_torchs(shape):
    x = native.empty(shape, torch.float32)
    assert (tuple(x.shape), x.dtype) == (shape, torch.float32)
    assert x.fill_(2.5).sum() == 2.5 * x.numel()


def test_eight_dimensions_are_the_most_that_are_kept():
    shape = (1 << 19, *(1,) * 7)
    place = native.empty(shape, torch.float32).data_ptr()
    x = native.empty(shape, torch.float32)
    assert x.data_ptr() == place
    assert x.shape == shape


def test_memory_serves_again_when_its_tensor_is_gone():
    x = large()
    place = x.data_ptr()
    assert large().data_ptr() != place
    del x
    assert large().data_ptr() == place
    # A little less fits too; much less would waste it, and more does not fit.
    assert large(LARGE // 4 - 100).data_ptr() == place
    kept = large(8 * LARGE)
    assert kept.data_ptr() != place
    assert large().data_ptr() == place


HOLDERS = {
    "view": lambda x: x.view(2, -1)[1],
    "slice": lambda x: x[5:6],
    "detached": lambda x: x.detach(),
    "storage": lambda x: x.untyped_storage(),
    "numpy": lambda x: x.numpy(),
    "graph": lambda x: (torch.ones_like(x, requires_grad=True) * x).sum(),
    "gradient": lambda x: setattr(p := torch.nn.Parameter(torch.zeros_like(x)), "grad", x) or p,
    "reinterpreted": lambda x: x.view(torch.int32),
    "exported": lambda x: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_not_given_away_while_anything_holds_it(holder):
    if holder == "numpy":
        pytest.importorskip("numpy")
    x = large().fill_(3.0)
    place, held = x.data_ptr(), HOLDERS[holder](x)
    del x
    gc.collect()
    others = [large().fill_(-1.0) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    if holder == "graph":
        held.backward()
    del others, held
    gc.collect()
    assert place in [other.data_ptr() for other in [large() for _ in range(4)]]


def test_a_gradient_through_pooled_memory_is_right():
    x = large().fill_(3.0)
    leaf = torch.full_like(x, 2.0, requires_grad=True)
    y = (leaf * x).sum()
    del x
    for _ in range(3):
        large().fill_(-1.0)
    y.backward()
    assert (leaf.grad == 3.0).all()


def saved(x):
    file = io.BytesIO()
    torch.save({"x": x, "view": x[1:]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["view"].data_ptr() == loaded["x"].data_ptr() + x.stride(0) * x.itemsize
    return loaded["x"]


COPIES = {
    "torch.save": saved,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "deepcopy": copy.deepcopy,
    "clone": torch.clone,
    "numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "parameter": lambda x: copy.deepcopy(torch.nn.Parameter(x)).detach(),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("strides", [None, (1, 1024)])
def test_copies_have_the_values_and_memory_of_their_own(way, strides):
    x = native.empty((1024, 600), torch.float32, strides)
    x.copy_(torch.arange(x.numel()).view(x.shape))
    y = COPIES[way](x)
    assert torch.equal(x, y)
    assert x.data_ptr() != y.data_ptr()
    x.zero_()
    assert y[-1, -1] == 1024 * 600 - 1


def test_share_memory_moves_the_values_and_gives_the_memory_back():
    x = large()
    x.copy_(torch.arange(x.numel()))
    place = x.data_ptr()
    x.share_memory_()
    assert x.is_shared()
    assert torch.equal(x, torch.arange(x.numel()).float())
    assert large().data_ptr() == place


def test_released_memory_is_the_systems_and_living_tensors_keep_theirs():
    code = """
import os, torch
from cnmix.kernels import native
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
large = lambda: native.empty((1 << 24,), torch.float32).fill_(1.0)
kept, other = large(), large()
before = resident()
del other
assert resident() > before - (16 << 20), "the memory is kept"
native.library().cnmix_release_memory()
assert resident() < before - (32 << 20), "the memory is given back"
assert (kept == 1.0).all()
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_take_and_give_back_at_once():
    def work(number: int) -> bool:
        generator = torch.Generator().manual_seed(number)
        held: list[torch.Tensor] = []
        for turn in range(100):
            value = 1000.0 * number + turn
            held.append(large(LARGE // 4 + int(torch.randint(0, 1 << 19, (), generator=generator))))
            held[-1][::4096] = value
            held[-1][-1] = value
            if len(held) > 3:
                first = held.pop(int(torch.randint(0, 3, (), generator=generator)))
                if first[-1] != first[0] or not (first[::4096] == first[0]).all() or first[0] // 1000 != number:
                    return False
            if turn % 25 == 0:
                library.cnmix_release_memory()
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(1, 5)))


@pytest.mark.parametrize("shape", [(1 << 44,), (1 << 60,), (1 << 61,), (1 << 62,), (1 << 63,), (1 << 40, 1 << 40)])
def test_memory_beyond_the_machine_is_an_error(shape):
    with pytest.raises(MemoryError, match=f"no memory for {4 * math.prod(shape)} bytes"):
        native.empty(shape, torch.float32)


def test_a_forked_process_takes_and_gives_back_while_threads_do():
    code = """
import os, signal, threading, torch
torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
from cnmix.kernels import native
large = lambda: native.empty((1 << 19,), torch.float32)
stop, before = threading.Event(), large().fill_(7.0)
def work():
    while not stop.is_set():
        large()
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
statuses = []
for _ in range(60):
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        right = bool((before == 7.0).all())
        del before
        for _ in range(3):
            large()[0] = 1.0
        os._exit(0 if right else 1)
    statuses.append(os.waitpid(child, 0)[1])
stop.set()
for thread in threads:
    thread.join()
assert not any(statuses), statuses
assert (before == 7.0).all()
"""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_quantized_operands_keep_layout_in_pooled_memory():
    x = torch.randn(8, 64, 64, 80).contiguous(memory_format=torch.channels_last)
    for rounding in ("nearest_even", "stochastic"):
        q = quantization.quantize(x, 8, -5, rounding)
        assert q.stride() == x.stride()
        assert torch.equal(q, quantization.quantize(x.contiguous(), 8, -5, rounding))
