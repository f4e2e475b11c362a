import re
import time
from pathlib import Path

import pytest
from offline_files import SECONDS, Everything, Kinds, images, sequences, trained, write

from cnmix import inference
from cnmix.inference import OfflineModel
from cnmix.inference.names import CONVOLUTION, STORED_WEIGHTS

MEBIBYTES = 64


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "net.cambricon"
    inference.fuse(trained(Everything, [images()]), images()).save(path)
    OfflineModel(path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def raw_kinds(tmp_path_factory):
    """A file with a product of each kind."""
    path = tmp_path_factory.mktemp("fuzz") / "kinds.cambricon"
    inference.fuse(trained(Kinds, [sequences()]), sequences()).save(path)
    found = {step.operator for step in OfflineModel(path).program.steps} & set(STORED_WEIGHTS)
    assert found == set(STORED_WEIGHTS) - {CONVOLUTION}
    return path.read_bytes()


@pytest.fixture
def refused(tmp_path):
    """Asserts that a file is refused: with ValueError, in one line, in time."""
    path = tmp_path / "bad.cambricon"

    def check(contents, what):
        write(path, contents)
        start = time.process_time()
        try:
            OfflineModel(path)
        except ValueError as error:
            message = str(error)
        else:
            pytest.fail(f"a file was taken: {what}")
        assert time.process_time() - start < SECONDS, what
        assert message.startswith(str(path)), what
        assert len(message.splitlines()) == 1, what
        assert len(message) < 600, what
        assert message.isprintable(), what
        return message

    return check


@pytest.fixture
def bounded_memory(raw):
    """Asserts that a test needs little memory, at its peak."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        before = peak()
    except OSError:  # no Linux, or not allowed
        yield
        return
    yield
    assert peak() - before < MEBIBYTES


def peak():
    """Returns the process's highest memory so far, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
