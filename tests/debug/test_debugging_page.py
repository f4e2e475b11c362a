import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "debugging.md"


def test_page_says_what_its_code_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # as the page says: torch adds up in another order on more
    text = PAGE.read_text(encoding="utf-8")
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    in_float, in_int8 = map(float, printed.splitlines()[0].split())
    assert in_float > 0.9 > 0.75 > in_int8
    with_rules = float(re.findall(r"^(0\.\d+)$", printed, re.MULTILINE)[-1])
    assert with_rules > 0.9
    # Errors differ in their digits from machine to machine; what is first, and the rules, do not.
    for line in (
        "{'modules': ['0'], 'operands': ['input', 'weight'], 'width': 16}",
        "int16 x int16         0.0%    5.7%",
    ):
        assert line in printed
        assert line in text
    tables = re.findall(r"^ *0 +(?:0\.|input).*$", printed, re.MULTILINE)
    assert len(tables) == 2
    assert re.search(r"width +error of the output +error of the gradients\n0 +input", printed)
