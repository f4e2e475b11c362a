"""Writes the telemetry that a training would have left, made up of plausible numbers."""

import json
import math
import random
from pathlib import Path

from cnmix.config import QuantizeConfig
from cnmix.fixed_point import choose_position
from cnmix.operand import OperandState

PARTS = {"quantize": 0.2, "product": 0.45, "adapt": 0.02, "other": 0.33}


def write_training(
    folder: Path,
    modules: list[str],
    *,
    steps: int = 440,
    steps_per_epoch: int = 22,
    every: int = 50,
    level: str = "O1",
    seed: int = 0,
    max_bitwidth: int = 31,
    curves: bool = True,
) -> Path:
    """Writes telemetry.jsonl and metrics.csv of one training; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(f"{level} {seed}")
    lines = [_header(level, every, steps_per_epoch)]
    if level != "O0":
        lines += _operands(draw, modules, steps, steps_per_epoch, every, max_bitwidth)
        lines += _times(draw, len(modules), steps, every, lines)
    lines[1:] = sorted(lines[1:], key=lambda line: (line.get("step", line.get("first", -1)), line["kind"] != "operand"))
    (folder / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if curves:
        write_curves(folder / "metrics.csv", steps, steps_per_epoch, 0.004 * seed + (0 if level == "O0" else 0.003))
    return folder


def write_curves(file: Path, steps: int, steps_per_epoch: int, offset: float) -> None:
    """Writes a metrics.csv as Lightning's CSVLogger does."""
    rows = ["epoch,step,test_accuracy,test_loss,train_loss"]
    for epoch in range(steps // steps_per_epoch):
        step = (epoch + 1) * steps_per_epoch - 1
        loss = 0.9 * math.exp(-epoch / 4) + 0.02 + offset
        rows += [f"{epoch},{step},{1 - loss / 5},{loss * 1.1},", f"{epoch},{step},,,{loss}"]
    file.write_text("\n".join(rows) + "\n")


def _header(level: str, every: int, steps_per_epoch: int) -> dict:
    return {
        "kind": "run",
        "version": 1,
        "cnmix": "0.9",
        "torch": "2.13",
        "threads": 2,
        "level": level,
        "every_n_steps": every,
        "steps_per_epoch": steps_per_epoch,
        "first_step": 0,
    }


def _operands(draw, modules, steps, steps_per_epoch, every, max_bitwidth):
    config = QuantizeConfig(steps_per_epoch=steps_per_epoch)
    for number, module in enumerate(modules):
        product = "convolution" if "conv" in module else "matmul"
        for index, operand in enumerate(("input", "weight", "grad_output")):
            identity = 3 * number + index
            threshold = config.threshold_for(product)
            yield {
                "kind": "operand",
                "id": identity,
                "module": module,
                "operand": operand,
                "product": product,
                "bits": 8,
                "max_bitwidth": max_bitwidth,
                "threshold": threshold,
                "step": -1,
            }
            yield from _history(
                draw, identity, operand, threshold, steps, steps_per_epoch, every, max_bitwidth, 1 + number % 3
            )


def _history(draw, identity, operand, threshold, steps, steps_per_epoch, every, max_bitwidth, spread):
    state, center = OperandState(bits=8), {"input": 0, "weight": -4, "grad_output": -9}[operand]
    start = {"input": 1.5, "weight": 1.0, "grad_output": 0.6 + draw.random() * 1.5 * spread / 2}[operand]
    due, interval = 0, 1
    for step in range(steps):
        middle = center - (3 * step / steps if operand == "grad_output" else 0) + draw.gauss(0, 0.2)
        width = start + (0.8 * math.log10(1 + step) if operand == "grad_output" else 0)
        top = middle + 2.2 * width
        if step >= due:
            reason = "first" if step == 0 else "interval ended" if step < steps_per_epoch else "new epoch"
            errors = {}
            before, bits = (state.bits, state.position), state.bits
            while True:
                below = 0.5 * math.erfc((middle - (top - bits + 1)) / (width * math.sqrt(2)))
                errors[str(bits)] = threshold * (4 * below + 0.002) * math.exp(draw.gauss(0, 0.3))
                wider = {8: 16, 16: 31}.get(bits)
                if errors[str(bits)] <= threshold or wider is None or wider > max_bitwidth:
                    break
                bits = wider
            state.bits, state.position = bits, choose_position(2.0**top, bits)
            outcome = "widened" if bits > before[0] else "over" if errors[str(bits)] > threshold else "kept"
            interval = 1 if step < 8 else min(draw.choice([2, 5, 9]), steps_per_epoch - step % steps_per_epoch)
            why = "first share of the epoch" if step < 8 else draw.choice(["range moves", "coarse format"])
            if step >= steps_per_epoch:
                interval, why = steps_per_epoch - step % steps_per_epoch, "end of the epoch"
            due = step + interval
            yield {
                "kind": "decision",
                "step": step,
                "id": identity,
                "at": step,
                "reason": reason,
                "errors": errors,
                "bits": [before[0], bits],
                "position": [before[1], state.position],
                "outcome": outcome,
                "interval": interval,
                "interval_reason": why,
            }
        if step % every == 0:
            exponents = [math.floor(draw.gauss(middle, width)) for _ in range(1024)]
            first, lowest = min(exponents), state.position - 1
            counts = [exponents.count(each) for each in range(first, max(exponents) + 1)]
            yield {
                "kind": "sample",
                "step": step,
                "id": identity,
                "bits": state.bits,
                "position": state.position,
                "interval": interval,
                "error": errors[str(state.bits)],
                "saturation": sum(each >= state.position + state.bits - 1 for each in exponents) / 1024,
                "underflow": sum(each < lowest for each in exponents) / 1024,
                "snr": 6.02 * state.bits - 15 + draw.gauss(0, 1),
                "histogram": {
                    "first": first,
                    "counts": counts,
                    "zeros": int(draw.random() * 300) if operand == "input" else 0,
                },
            }


def _times(draw, modules, steps, every, lines):
    widths = {}
    decisions = [line for line in lines if line["kind"] == "decision"]
    for step in range(0, steps, every):
        widths = {line["id"]: line["bits"][1] for line in decisions if line["step"] <= step}
        macs: dict[str, int] = {}
        for module in range(modules):
            left, right, gradient = (widths.get(3 * module + index, 8) for index in range(3))
            for a, b in ((left, right), (gradient, right), (gradient, left)):
                key = f"{min(a, b)}x{max(a, b)}"
                macs[key] = macs.get(key, 0) + 1_000_000 * (1 + module % 5)
        seconds = 0.012 * math.exp(draw.gauss(0, 0.05))
        split = {name: seconds * share for name, share in PARTS.items()}
        yield {"kind": "time", "step": step, "seconds": seconds, **split, "macs": macs}
        last = min(step + every, steps) - 1
        if last > step:
            yield {"kind": "steps", "first": step + 1, "last": last, "seconds": 0.0115 * (last - step)}
