"""A script of the model zoo's shape, as it is, under ``cnmix run``."""

import json
from pathlib import Path

from scripts import run

SCRIPT = """
import argparse
import os
import sys

cur_path = os.path.dirname(os.path.realpath(__file__))
sys.path.append(os.path.join(cur_path, "../../../../../tools/utils/"))
from metric import MetricCollector
import torch
import torch.nn as nn

parser = argparse.ArgumentParser()
parser.add_argument("--iters", type=int, default=-1)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--cnmix", action="store_true")
parser.add_argument("--opt_level", default="O1")
args = parser.parse_args()

import torch_mlu
import torch_mlu.core.mlu_model as ct
import cnmix

model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(ct.mlu_device())
criterion = nn.CrossEntropyLoss().to(ct.mlu_device())
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model, optimizer = cnmix.initialize(model, optimizer, opt_level=args.opt_level)
cnmix.cnmix_set_amp_quantify_params("all", {"batch_size": args.batch_size, "data_num": 8000})

metric_collector = MetricCollector(
    enable_only_benchmark=True,
    record_elapsed_time=True,
    record_hardware_time=True if torch.is_mlu_available() else False)
metric_collector.place()
for i in range(args.iters):
    x = torch.randn(args.batch_size, 6).to(ct.mlu_device(), non_blocking=True)
    y = torch.randint(0, 3, (args.batch_size,)).to(ct.mlu_device(), non_blocking=True)
    loss = criterion(model(x), y)
    optimizer.zero_grad()
    with cnmix.scale_loss(loss, optimizer) as scaled_loss:
        scaled_loss.backward()
    optimizer.step()
    metric_collector.record()
    metric_collector.place()
metric_collector.insert_metrics(
    net="mlp",
    batch_size=args.batch_size,
    precision=args.opt_level if args.cnmix else "fp32",
    cards=1,
    DPF_mode="single")
metric_collector.dump()
states = cnmix.state_dict()["models"][0]["modules"].values()
print(sorted({operand["updates"] for state in states for operand in state["operands"].values()}))
"""


def test_it_closes_the_strategy_and_logs_the_vendors_fields(tmp_path: Path) -> None:
    folder = tmp_path / "built-in/cv/classification/mlp/models"
    folder.mkdir(parents=True)
    (folder / "train.py").write_text(SCRIPT)
    env = {"MLU_ADAPTIVE_STRATEGY_COUNT": "4", "BENCHMARK_LOG": str(tmp_path / "log"), "DATASET_NAME": "noise"}
    found = run(folder, "train.py", "--iters", "9", "--cnmix", **env)
    assert (found.returncode, found.stdout) == (0, "[4]\n"), found.stderr
    record = json.loads((tmp_path / "log").read_text())
    assert (record["net"], record["precision"], record["dataset"], record["batch_size"]) == ("mlp", "O1", "noise", 8)
    # The emulated card's time is the host's: both timers saw the same iterations.
    assert 0 <= record["hardware_time_avg"] <= record["batch_time_avg"] + 0.002
    assert record["throughput"] > 0


def test_a_module_of_that_name_comes_first(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/metric.py").write_text("MetricCollector = 'the script has its own'\n")
    (tmp_path / "script.py").write_text(
        "import sys\nsys.path.append('tools')\nfrom metric import MetricCollector\nprint(MetricCollector)\n"
    )
    found = run(tmp_path, "script.py")
    assert found.stdout == "the script has its own\n", found.stderr
