import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnmix.torch_mlu.core.dumptool import Dumper
from cnmix.torch_mlu.logs import set_up_logs

CARD = "mlu"
VARIABLES = ("TORCH_MIN_CNLOG_LEVEL", "MM_CPP_MIN_LOG_LEVEL")
NAMES = ("torch_mlu", "torch_mlu.magicmind")


@pytest.fixture(autouse=True)
def fresh_loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = [
        (logging.getLogger(name), logging.getLogger(name).handlers, logging.getLogger(name).level) for name in NAMES
    ]
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for logger, _, _ in before:
        logger.handlers, logger.level = [], logging.NOTSET
    yield
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    set_up_logs()  # ends what was watched
    for logger, handlers, level in before:
        logger.handlers = handlers
        logger.setLevel(level)


class Printed:
    """What came to the standard error stream so far."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys, self._text = capsys, ""

    def getvalue(self) -> str:
        self._text += self._capsys.readouterr().err
        return self._text


@pytest.fixture
def stream(capsys: pytest.CaptureFixture[str]) -> Printed:
    return Printed(capsys)


def levels() -> list[int]:
    return [logging.getLogger(name).level for name in NAMES]


def test_warnings_are_printed_by_default(stream: Printed) -> None:
    set_up_logs()
    assert levels() == [logging.WARNING, logging.WARNING]
    logging.getLogger("torch_mlu").info("quiet")
    logging.getLogger("torch_mlu").warning("loud")
    logging.getLogger("torch_mlu.magicmind").error("of %s", "magicmind")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("[WARNING][")
    assert first.endswith("] loud")
    assert "[torch_mlu.magicmind]" in second
    assert second.endswith("] of magicmind")


@pytest.mark.parametrize(
    ("value", "level"),
    [
        ("-1", logging.DEBUG),
        ("0", logging.INFO),
        ("1", logging.WARNING),
        ("2", logging.ERROR),
        ("3", logging.CRITICAL),
        (" 2 ", logging.ERROR),
    ],
)
def test_levels_of_the_card(value: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_MIN_CNLOG_LEVEL", value)
    set_up_logs()
    assert levels() == [level, logging.WARNING]


@pytest.mark.parametrize(
    ("value", "level"),
    [("0", logging.INFO), ("1", logging.WARNING), ("2", logging.ERROR), ("3", logging.CRITICAL)],
)
def test_levels_of_magicmind(value: str, level: int, monkeypatch: pytest.MonkeyPatch, stream: Printed) -> None:
    monkeypatch.setenv("MM_CPP_MIN_LOG_LEVEL", value)
    set_up_logs()
    assert levels() == [logging.WARNING, level]
    logging.getLogger("torch_mlu.magicmind").log(level, "shown")
    logging.getLogger("torch_mlu.magicmind").log(level - 10, "hidden")
    assert stream.getvalue().count("shown") == 1
    assert "hidden" not in stream.getvalue()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("TORCH_MIN_CNLOG_LEVEL", "4"), ("TORCH_MIN_CNLOG_LEVEL", "DEBUG"), ("MM_CPP_MIN_LOG_LEVEL", "-1")],
)
def test_a_wrong_value_warns_and_the_default_holds(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, stream: Printed
) -> None:
    monkeypatch.setenv(variable, value)
    set_up_logs()
    assert levels() == [logging.WARNING, logging.WARNING]
    assert f"{variable}={value} is no level" in stream.getvalue()


def test_repeated_calls_do_nothing_more(monkeypatch: pytest.MonkeyPatch, stream: Printed) -> None:
    monkeypatch.setenv("TORCH_MIN_CNLOG_LEVEL", "-1")
    for _ in range(3):
        set_up_logs()
    torch.ones(2, device=CARD).abs()
    assert len(logging.getLogger("torch_mlu").handlers) == 1
    assert stream.getvalue().count("] abs(") == 1


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, stream: Printed) -> None:
    logger, root = logging.getLogger("torch_mlu"), logging.getLogger()
    mine = logging.StreamHandler(io.StringIO())
    logger.addHandler(mine)
    logger.setLevel(logging.ERROR)
    before = root.level, list(root.handlers)
    set_up_logs()
    assert logger.handlers == [mine]
    assert levels()[0] == logging.ERROR
    assert (root.level, root.handlers) == before
    assert logger.propagate


def test_a_root_logger_that_prints_is_enough(stream: Printed) -> None:
    printing, storing = logging.StreamHandler(sys.stderr), logging.StreamHandler(io.StringIO())
    set_up_logs()
    root = logging.getLogger()
    root.addHandler(storing)
    logging.getLogger("torch_mlu").warning("once")
    root.addHandler(printing)
    logging.getLogger("torch_mlu").warning("again")
    root.removeHandler(printing)
    root.removeHandler(storing)
    assert stream.getvalue().count("once") == 1
    assert stream.getvalue().count("again") == 1
    assert storing.stream.getvalue().splitlines() == ["once", "again"]


def test_debug_prints_each_operator_and_its_arguments(monkeypatch: pytest.MonkeyPatch, stream: Printed) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).to(CARD)
    x, y = torch.ones(2, 3, 4, 4, device=CARD), torch.tensor([0, 1], device=CARD)
    monkeypatch.setenv("TORCH_MIN_CNLOG_LEVEL", "-1")
    set_up_logs()
    F.cross_entropy(net(x), y).backward()
    text = stream.getvalue()
    assert (
        "convolution_overrideable(input=float32[2, 3, 4, 4], weight=float32[4, 3, 3, 3], bias=float32[4], "
        "stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1)" in text
    )
    for name in (
        "relu(self=float32[2, 4, 2, 2])",
        "addmm(",
        "convolution_backward_overrideable(",
        "threshold_backward(",
    ):
        assert text.count(f"] {name}") == 1, name
    monkeypatch.setenv("TORCH_MIN_CNLOG_LEVEL", "0")
    set_up_logs()
    x.abs()
    assert "] abs(" not in stream.getvalue()


def test_debug_and_the_dump_tool(monkeypatch: pytest.MonkeyPatch, stream: Printed, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_MIN_CNLOG_LEVEL", "-1")
    set_up_logs()
    x = torch.ones(2, device=CARD)
    with Dumper(str(tmp_path / "dump"), use_cpu=True, level=2):
        x.abs()
    x.neg()
    assert os.listdir(tmp_path / "dump") == ["1_abs"]
    assert (stream.getvalue().count("] abs("), stream.getvalue().count("] neg(")) == (1, 1)


_WHOLE_PROCESS = """
import io, sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import cnmix.torch_mlu
from cnmix.torch_mlu.logs import set_up_logs

if __name__ == "__main__":
    cnmix.torch_mlu.install(cards=1)
    set_up_logs()
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).to("mlu")
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    for location in (None, "cpu", "mlu"):
        file.seek(0)
        loaded = torch.load(file, map_location=location, weights_only=True)
        assert loaded["0.weight"].device.type == ("cpu" if location == "cpu" else "mlu")
        net.load_state_dict(loaded)
    data = TensorDataset(torch.arange(24.0).view(6, 4))
    for workers in (0, 2):
        total = 0.0
        for (x,) in DataLoader(data, batch_size=3, num_workers=workers, pin_memory=True):
            total += x.to("mlu").sum().item()
        assert total == 276.0
    x = torch.ones(2, 4, device="mlu")
    traced = torch.jit.trace(net, x)
    assert torch.equal(traced(x), net(x))
    convolution, image = nn.Conv2d(1, 2, 2).to("mlu"), torch.ones(1, 1, 3, 3, device="mlu")
    assert torch.equal(torch.jit.trace(convolution, image)(-image), convolution(-image))
    try:
        net(torch.ones(2, 5, device="mlu"))
    except RuntimeError:
        print("raised")
    print("done", repr(x.sum()))
"""


@pytest.mark.parametrize("level", ["-1", "1"])
def test_a_whole_process_at_a_level(level: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_WHOLE_PROCESS)
    environment = {**os.environ, "TORCH_MIN_CNLOG_LEVEL": level}
    found = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout == "raised\ndone tensor(8., device='mlu:0')\n"
    assert ("addmm(" in found.stderr) == (level == "-1")
    assert "Traceback" not in found.stderr
