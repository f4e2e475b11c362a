"""Files with bad programs: whatever is changed, a clear error comes, soon and without memory."""

import json
import random
import time

import pytest
from offline_files import SECONDS, images, parts, sequences, with_program, write

from cnmix.inference import OfflineModel
from cnmix.inference.names import CONVOLUTION, FILTER, GROUPED, LINEAR, MATMUL, RECURRENCE

pytestmark = pytest.mark.usefixtures("bounded_memory")

WRONG_OPERATORS = [
    "aten.randn.default", "aten.relu_.default", "aten.add_.Tensor", "aten.from_file.default", "aten.save.default",
    "aten.dropout.default", "aten.as_strided.default", "aten.set_.source_Tensor", "aten.item.default",
    "aten.nonzero.default", "prim.device.default", "os.system", "builtins.eval", "cnmix.integer_linear", "relu", "",
    "aten.relu", "aten.relu.out", "aten..default", "aten.relu.default.default", "aten.__class__.default", None, 5, [],
]  # fmt: skip
JUNK = [
    None, True, -1, 0, 2**31, 2**62, 2**63, 10**40, 1e308, -0.5, "", "x" * 300, "a\nb", [], [[]],
    [None] * 3, {}, [-1, -1],
    [2**40, 2**40], {"value": "nothing"}, {"value": 1}, {"value": []}, {"dtype": "complex64"}, {"dtype": "object"},
    {"float": "1e5"}, {"memory_format": "x"}, {"device": "cpu"}, {"value": "x", "dtype": "int8"},
    [[[[[[[[[[[[1]]]]]]]]]]]],
]  # fmt: skip


def test_wrong_operators(raw, refused):
    for name in WRONG_OPERATORS:
        for place in (0, 5):

            def change(program, name=name, place=place):
                program["steps"][place]["operator"] = name

            refused(with_program(raw, change), f"operator {name!r}")


FINE = {  # by the place of the argument: names, answers, biases, output_padding
    CONVOLUTION: {2: [None], 7: [], 8: [[]], 11: [True], 12: [""]},
    LINEAR: {2: [None], 5: [True], 6: [""]},
    MATMUL: {6: [True], 7: [""]},
    FILTER: {7: [[]], 11: [True], 12: [""]},
    GROUPED: {6: [True], 7: [""]},
    RECURRENCE: {3: [None], 4: [None], 10: [True], 11: [True], 15: [""]},
}


@pytest.mark.parametrize("operator", FINE)
def test_wrong_arguments_of_products(raw, raw_kinds, refused, operator):
    """Half of the junk in place of each argument of a product, but where the junk is what may stand there."""
    contents = raw if operator in (CONVOLUTION, LINEAR) else raw_kinds
    header, _ = parts(contents)
    steps = json.loads(header["__metadata__"]["program"])["steps"]
    place, step = next(each for each in enumerate(steps) if each[1]["operator"] == operator)
    for index, argument in enumerate(step["arguments"]):
        tried = 0
        for junk in JUNK[index % 2 :: 2]:
            if any(junk == each and type(junk) is type(each) for each in (argument, *FINE[operator].get(index, ()))):
                continue

            def change(program, index=index, junk=junk):
                program["steps"][place]["arguments"][index] = junk

            refused(with_program(contents, change), f"argument {index}: {junk!r}")
            tried += 1
        assert tried > 10


def test_wrong_formats(raw, refused):
    formats = [[8, -4, 8], [8, -4, 8, -4, 1], [7, -4, 8, -4], [8, 200, 8, -4], [8, -4, 16, -4], [8, -4, 31, -4]]
    formats += [[8, -129, 8, -4], [8, -4, 8, 128], [8.0, -4, 8, -4], [16, None, 8, -4], [0, 0, 0, 0], [8, 2**70, 8, 0]]

    for each in formats:

        def change(program, each=each):
            step = next(step for step in program["steps"] if step["operator"] == CONVOLUTION)
            step["arguments"][9] = each

        refused(with_program(raw, change), f"formats {each}")


def _huge(program):
    """Declares consistent sizes that no machine has."""
    for each in program["values"].values():
        each["shape"] = [n * 2**20 for n in each["shape"]]


def _swap_steps(program):
    program["steps"].reverse()


def _repeat_step(program):
    program["steps"].append(program["steps"][0])


def _many_steps(program):
    program["steps"] += program["steps"] * 1000


def _forget_step(program):
    del program["steps"][3]


def _own_output(program):
    step = program["steps"][2]
    step["arguments"][0] = {"value": step["outputs"][0]}


PROGRAMS = [
    _huge,
    _swap_steps,
    _repeat_step,
    _many_steps,
    _forget_step,
    _own_output,
    lambda p: p["inputs"].append("y"),
    lambda p: p["inputs"].append(p["inputs"][0]),
    lambda p: p["inputs"].clear(),
    lambda p: p["inputs"].append("no name"),
    lambda p: p["outputs"].append("nothing"),
    lambda p: p["outputs"].reverse() or p["outputs"].pop(),
    lambda p: p.update(extra=1),
    lambda p: p.pop("steps"),
    lambda p: p.update(steps={}),
    lambda p: p.update(steps=[None]),
    lambda p: p.update(steps=[{}]),
    lambda p: p.update(values=[]),
    lambda p: p.update(constants=[]),
    lambda p: p["constants"].popitem(),
    lambda p: p["constants"].update(more={"order": []}),
    lambda p: p.update(structure=0),
    lambda p: p.update(structure={"dict": [["a", 0], ["a", 1], ["b", 2]]}),
    lambda p: p.update(structure={"tuple": [2, 1, 0]}),
    lambda p: p.update(structure={"set": [0, 1, 2]}),
    lambda p: p.update(structure={"tuple": [{"tuple": [{"tuple": [{"tuple": [0, 1, -2]}]}]}]}),
    lambda p: p["values"].update(unused={"shape": [1], "dtype": "float32", "strides": [1]}),
    lambda p: '{"steps":' + "[" * 900 + "]" * 900 + "}",
    lambda p: json.dumps(p).replace('"aten.cat.default"', "1e999"),
    lambda p: json.dumps(p).replace("[8,", "[NaN,", 1).replace("[8, ", "[NaN, ", 1),
    lambda p: json.dumps(p)[:-1],
    lambda p: json.dumps(p) + "}",
    lambda p: json.dumps(p).replace('"inputs":', '"inputs":[],"inputs":', 1),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_wrong_programs(raw, refused, number):
    refused(with_program(raw, PROGRAMS[number]), f"program {number}")


def test_wrong_values(raw, refused):
    """Shapes, dtypes and strides of each value that are not what its operator returns."""
    header, _ = parts(raw)
    names = list(json.loads(header["__metadata__"]["program"])["values"])
    shapes = [None, [], [-1], [2**31, 2], [2**63], [0], [1.0], "x", [2, 3, 8, 9], [1] * 100]
    for name in names:
        for key, values in [("shape", shapes), ("dtype", ["float16", "complex64", None]), ("strides", [None, [2**60]])]:
            for value in values:

                def change(program, name=name, key=key, value=value):
                    program["values"][name][key] = value

                refused(with_program(raw, change), f"{key} of {name}: {value!r}")


def test_wrong_orders(raw, refused):
    header, _ = parts(raw)
    for name in json.loads(header["__metadata__"]["program"])["constants"]:
        for order in (None, [5], [0, 0], ["a"], [-1], [0] * 70, [True]):

            def change(program, name=name, order=order):
                program["constants"][name]["order"] = order

            refused(with_program(raw, change), f"order of {name}: {order}")


def test_operators_that_would_read_beside_their_tensors(raw, refused):
    one = {"value": "x"}
    calls = [
        ("aten.upsample_nearest2d.default", [one, [16, 16], 1e-300, None], [2, 3, 16, 16]),
        ("aten.upsample_nearest2d.default", [one, [16, 16], {"float": "inf"}, None], [2, 3, 16, 16]),
        ("aten.upsample_bilinear2d.default", [one, [16, 16], False, {"float": "nan"}, 2.0], [2, 3, 16, 16]),
        ("aten._native_batch_norm_legit_no_training.default", [one, None, None, one, one, 0.1, 1e-5], [2, 3, 8, 8]),
        ("aten.scaled_dot_product_attention.default", [one, one, one, None, 0.5], [2, 3, 8, 8]),
        ("aten.full.default", [[2**40, 2**40], 1.0], [1]),
        ("aten.arange.default", [2**62], [1]),
        ("aten.repeat.default", [one, [2**20, 2**20, 1, 1]], [1]),
        ("aten.constant_pad_nd.default", [one, [2**40, 2**40]], [1]),
        ("aten.index.Tensor", [one, [one]], [1]),
        ("aten.einsum.default", ["aaaa,bbbb,cccc->abc", [one, one, one]], [1]),
        ("aten.max_pool2d.default", [one, [0, 0]], [2, 3, 8, 8]),
        ("aten.group_norm.default", [one, 0], [2, 3, 8, 8]),
        ("aten.conv2d.default", [one, one, None, 0], [2, 2, 1, 1]),
        ("aten.unfold.default", [one, 2, 2, 0], [1]),
    ]
    for operator, arguments, shape in calls:

        def change(program, operator=operator, arguments=arguments, shape=shape):
            strides = [1] * len(shape)
            program["values"]["bad"] = {"shape": shape, "dtype": "float32", "strides": strides}
            outputs = ["bad", None, None] if "native_batch_norm" in operator else ["bad"]
            step = {"operator": operator, "arguments": arguments, "keywords": {}, "outputs": outputs}
            program["steps"].insert(0, step)

        refused(with_program(raw, change), operator)


@pytest.mark.parametrize("which", ["raw", "raw_kinds"])
def test_random_changes_of_the_program(which, request, tmp_path):
    """What a change at random leaves is refused, or runs: no other error comes, and no other type of one."""
    raw, inputs = request.getfixturevalue(which), images() if which == "raw" else sequences()
    draw = random.Random(3)
    path = tmp_path / "random.cambricon"
    taken = 0
    for _ in range(200):

        def change(program):
            place = program
            while True:
                key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.1:
                    break
                place = place[key]
            other = draw.choice(program["steps"])
            place[key] = draw.choice([*JUNK, other["arguments"][0], other["outputs"][0], other["operator"], 1, 2, 8])

        write(path, with_program(raw, change))
        start = time.process_time()
        try:
            OfflineModel(path)(inputs)
            taken += 1
        except ValueError:
            pass
        assert time.process_time() - start < SECONDS
    assert taken < 60
