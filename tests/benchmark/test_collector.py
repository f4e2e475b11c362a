"""The collector of times, with a clock that is set by hand, and the logs that it writes."""

import re

import pytest
from benchmark_logs import records

from cnmix.benchmark import MetricCollector, collector

KEYS = [
    *("date", "net", "batch_size", "cards", "precision", "DPF_mode", "batch_time_avg", "batch_time_var"),
    *("hardware_time_avg", "hardware_time_var", "throughput", "device", "dataset"),
]


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(collector, "perf_counter", made)
    monkeypatch.setattr(collector.glob, "glob", lambda pattern: [])
    return made


@pytest.fixture
def log(tmp_path, monkeypatch, clock):
    monkeypatch.setenv("BENCHMARK_LOG", str(tmp_path / "benchmark.log"))
    return tmp_path / "benchmark.log"


def loop(times, clock, made):
    made.place()
    for seconds in times:
        clock.now += seconds
        made.record()
        made.place()


def test_exactly_the_first_iterations_are_left_out(log, clock, monkeypatch):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "100")
    made = MetricCollector(record_elapsed_time=True)
    loop([7.0] * 99 + [1e6] + [0.25, 0.75] * 25, clock, made)
    made.insert_metrics(net="resnet50", batch_size=64, precision="O1", cards=2, DPF_mode="ddp ")
    made.dump()
    (record,) = records(log)
    assert list(record) == KEYS
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", record.pop("date"))
    assert record == {
        "net": "resnet50",
        "batch_size": 64,
        "cards": 2,
        "precision": "O1",
        "DPF_mode": "ddp ",
        "batch_time_avg": 0.5,
        "batch_time_var": 0.0625,
        "hardware_time_avg": "unknow",
        "hardware_time_var": "unknow",
        "throughput": 256.0,
        "device": "Unkonw",
        "dataset": "unknow",
    }
    assert log.read_text().startswith('{\n    "date": ')


def test_time_between_record_and_place_is_nobodys(log, clock):
    made = MetricCollector(record_elapsed_time=True)
    made.place()
    clock.now += 0.5
    made.record()
    clock.now += 60  # an evaluation
    made.place()
    clock.now += 0.5
    made.record()
    assert made.get_metrics() == {"batch_time_avg": 0.5, "batch_time_var": 0.0}


def test_each_collector_leaves_its_own_out_and_appends(log, clock, monkeypatch):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "2")
    for seconds in (1.0, 2.0):
        made = MetricCollector(enable_only_benchmark=True, record_elapsed_time=True)
        loop([50, 60, seconds], clock, made)
        made.dump()
    assert [record["batch_time_avg"] for record in records(log)] == [1.0, 2.0]


def test_rounding_is_the_vendors(log, clock):
    made = MetricCollector(record_elapsed_time=True)
    loop([0.0104, 0.0124], clock, made)
    made.insert_metrics(batch_size=1, cards=1)
    assert made.get_metrics()["batch_time_avg"] == 0.011
    assert made.get_metrics()["batch_time_var"] == 1e-6
    made.dump()
    assert records(log)[0]["throughput"] == round(1 / 0.011, 2)


def test_a_step_under_half_a_millisecond_has_a_throughput(log, clock):
    made = MetricCollector(record_elapsed_time=True)
    loop([0.00025] * 4, clock, made)
    made.insert_metrics(batch_size=1, cards=1)
    made.dump()
    record = records(log)[0]
    assert (record["batch_time_avg"], record["throughput"]) == (0.0, pytest.approx(4000, abs=0.1))


@pytest.mark.parametrize("iterations", [3, 5])
def test_a_count_beyond_the_run_is_reported(iterations, log, clock, monkeypatch, caplog):
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "5")
    made = MetricCollector(record_elapsed_time=True)
    loop([1.0] * iterations, clock, made)
    made.insert_metrics(batch_size=8, cards=1)
    made.dump()
    record = records(log)[0]
    assert [record[key] for key in ("batch_time_avg", "batch_time_var", "throughput")] == ["unknow"] * 3
    assert f"MLU_ADAPTIVE_STRATEGY_COUNT=5 leaves out all of the {iterations} iterations" in caplog.text


def test_what_is_inserted_goes_over_the_collectors_own(log, clock, monkeypatch):
    monkeypatch.setenv("DATASET_NAME", "imagenet2012")
    made = MetricCollector(record_elapsed_time=True)
    loop([1.0], clock, made)
    made.insert_metrics(throughput=3.5, batch_time_avg=2.0, device="MLU590", other="left out of the log")
    made.dump()
    record = records(log)[0]
    assert [record[key] for key in ("throughput", "batch_time_avg", "device", "dataset")] == [
        3.5,
        2.0,
        "MLU590",
        "imagenet2012",
    ]
    assert list(record) == KEYS
    assert made.get_metrics()["other"] == "left out of the log"


@pytest.mark.parametrize(
    ("set_names", "options", "written"),
    [
        ((), {}, set()),
        (("BENCHMARK_LOG", "AVG_LOG"), {"enable": False}, set()),
        (("BENCHMARK_LOG",), {}, {"BENCHMARK_LOG"}),
        (("AVG_LOG",), {}, {"AVG_LOG"}),
        (("BENCHMARK_LOG", "AVG_LOG"), {}, {"BENCHMARK_LOG", "AVG_LOG"}),
        (("AVG_LOG",), {"enable_only_benchmark": True}, set()),
        (("BENCHMARK_LOG", "AVG_LOG"), {"enable_only_benchmark": True}, {"BENCHMARK_LOG"}),
        (("BENCHMARK_LOG",), {"enable_only_avglog": True}, set()),
        (("BENCHMARK_LOG", "AVG_LOG"), {"enable_only_avglog": True}, {"AVG_LOG"}),
    ],
)
def test_when_it_is_on(set_names, options, written, tmp_path, clock, monkeypatch):
    for name in set_names:
        monkeypatch.setenv(name, str(tmp_path / name))
    made = MetricCollector(record_elapsed_time=True, record_hardware_time=True, profile_memory=True, **options)
    loop([1.0, 1.0], clock, made)
    made.insert_metrics(net="n", batch_size=1, precision="fp32", cards=1, DPF_mode="single", accuracy=0.5)
    made.dump()
    assert {path.name for path in tmp_path.iterdir()} == written
    assert (made.get_metrics() == {}) == (not written)


def test_the_line_of_avg_log(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("AVG_LOG", str(tmp_path / "avg.log"))
    made = MetricCollector()
    made.insert_metrics(net="resnet50", accuracy=0.7613)
    made.dump()
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "100")
    made = MetricCollector()
    made.insert_metrics(net="resnet50", accuracy=0.0123)
    made.dump()
    assert (tmp_path / "avg.log").read_text().splitlines() == [
        "net:resnet50, accuracy:0.7613",
        "net:resnet50, accuracy:not valid (MLU_ADAPTIVE_STRATEGY_COUNT=100)",
    ]


def test_the_card_of_the_drivers_files(tmp_path, log, clock, monkeypatch):
    file = tmp_path / "information"
    file.write_text("Device name\t: MLU370-X8\nIRQ: 3\n")
    monkeypatch.setattr(collector.glob, "glob", lambda pattern: [str(tmp_path / "gone"), str(file)])
    made = MetricCollector()
    made.dump()
    assert records(log)[0]["device"] == "MLU370-X8"


def test_mistakes_are_named(log, clock, monkeypatch):
    with pytest.raises(RuntimeError, match=r"call place\(\) before the loop"):
        MetricCollector(record_elapsed_time=True).record()
    monkeypatch.setenv("MLU_ADAPTIVE_STRATEGY_COUNT", "some")
    with pytest.raises(ValueError, match=r"MLU_ADAPTIVE_STRATEGY_COUNT must be a whole number of iterations.*'some'"):
        MetricCollector()


@pytest.mark.parametrize("name", ["BENCHMARK_LOG", "AVG_LOG"])
def test_a_log_that_cannot_be_written_is_refused_before_the_run(name, tmp_path, clock, monkeypatch):
    monkeypatch.setenv(name, str(tmp_path / "missing/log"))
    with pytest.raises(ValueError, match=rf"{name}=.*missing/log cannot be written: there is no folder .*missing"):
        MetricCollector()
    MetricCollector(enable=False)
    monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(ValueError, match=f"{name}=.* cannot be written: give a file"):
        MetricCollector()
    assert not list(tmp_path.iterdir())
