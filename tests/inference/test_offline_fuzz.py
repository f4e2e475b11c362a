"""Bad files: whatever is changed, a clear error comes, soon and without memory."""

import json
import random
import re
import time
from pathlib import Path

import pytest
import torch
from offline_files import Everything, Kinds, images, joined, parts, sealed, sequences, trained, with_program, write

from cnmix import inference
from cnmix.inference import OfflineModel
from cnmix.inference.names import CONVOLUTION, FILTER, GROUPED, LINEAR, MATMUL, RECURRENCE, STORED_WEIGHTS

SECONDS = 1.0
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


@pytest.fixture(autouse=True)
def bounded_memory(raw):
    """Asserts that no test needs much memory, at its peak."""
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


def test_truncations(raw, refused):
    length = 8 + int.from_bytes(raw[:8], "little")
    draw = random.Random(0)
    places = {*range(16), length - 1, length, length + 1, len(raw) - 1, len(raw) - 8}
    places |= {draw.randrange(length) for _ in range(60)} | {draw.randrange(length, len(raw)) for _ in range(60)}
    for place in sorted(places):
        refused(raw[:place], f"the first {place} bytes")
    for more in (b"\0", b"\0" * 8, raw):
        refused(raw + more, f"{len(more)} more bytes")


def test_bit_flips(raw, refused):
    length = 8 + int.from_bytes(raw[:8], "little")
    draw = random.Random(1)
    places = [*range(64), *(8 * draw.randrange(8, length) + draw.randrange(8) for _ in range(200))]
    places += [8 * draw.randrange(length, len(raw)) + draw.randrange(8) for _ in range(200)]
    for place in places:
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        refused(bytes(changed), f"bit {place}")


def test_bytes_of_nothing(refused):
    draw = random.Random(2)
    for size in (0, 1, 7, 8, 9, 10, 100, 5000):
        refused(b"\0" * size, f"{size} zeros")
        refused(b"\xff" * size, f"{size} ones")
        refused(draw.randbytes(size), f"{size} random bytes")
        refused(b"\x80\x02}q\x00." * size, f"{size} times a pickle")


HEADERS = {
    "no object": [],
    "no metadata": {},
    "metadata no object": {"__metadata__": []},
    "another format": {"__metadata__": {"format": "pt"}},
}
TEXTS = {
    "deep lists": b'{"a":' + b"[" * 400_000,
    "deep objects": b'{"a":' * 100_000,
    "many lists": b'{"a":[' + b"[]," * 1_000_000 + b"[]]}",
    "a long number": b'{"a":' + b"9" * 1_000_000 + b"}",
    "NaN": b'{"a":NaN}',
    "a key twice": b'{"a":1,"a":2}',
    "not UTF-8": b'{"\xff":1}',
    "a lone surrogate": b'{"\\ud800":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}',
}


@pytest.mark.parametrize("what", HEADERS)
def test_wrong_headers(refused, what):
    refused(joined(HEADERS[what], b""), what)


@pytest.mark.parametrize("what", TEXTS)
def test_headers_that_are_bombs(refused, what):
    refused(sealed(TEXTS[what], b""), what)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 9 * 2**20, 0, 1])
def test_wrong_header_lengths(raw, refused, length):
    refused(length.to_bytes(8, "little") + raw[8:], f"length {length}")


# Of one tensor's entry in the header.
ENTRIES = [
    ("dtype", ["F8_E4M3", "I99", None, 5, [], "I64", "F64"]),
    ("shape", [None, "x", [-1], [2**62, 2**62], [2**63], [1.5], [True], [[1]], [0], [1] * 100, {}]),
    ("data_offsets", [None, [0], [0, 1, 2], [-1, 0], [2**64, 2**65], [10**30, 10**31], ["a", "b"], [4, 0], [0, 3]]),
    ("extra", [1]),
]


@pytest.mark.parametrize("which", [0, 1, -1])
def test_wrong_tensors(raw, refused, which):
    for key, values in ENTRIES:
        for value in values:
            header, data = parts(raw)
            name = [each for each in header if each != "__metadata__"][which]
            header[name][key] = value
            refused(joined(header, data), f"{name} {key} {value}")
    header, data = parts(raw)
    name = [each for each in header if each != "__metadata__"][which]
    header[f"{name}_"] = header.pop(name)
    refused(joined(header, data), "renamed")


def test_swapped_tensors(raw, refused):
    header, data = parts(raw)
    names = sorted(each for each in header if each != "__metadata__")
    shapes = {name: (header[name]["dtype"], header[name]["shape"]) for name in names}
    tried = 0
    for first in names:
        for second in names:
            if first < second and shapes[first] != shapes[second]:
                changed = {**header, first: header[second], second: header[first]}
                refused(joined(json.loads(json.dumps(changed)), data), f"{first} and {second}")
                tried += 1
    assert tried > 20


METADATA = [
    ("format", ["", "x"]),
    ("format_version", ["", "0", "-1", "2", "9" * 50, "1.0", "x", "१"]),
    ("name", ["x" * 1000, "a\nb", "\x1b[31m", "\ud800"]),
    ("core_number", ["", "-1", "1e9", "9" * 40, "x"]),
    ("core_version", ["x" * 500, "\n"]),
    ("batch_size", ["0", "3", "-2", "many"]),
    ("cnmix_version", ["\r\n"]),
    ("metadata", ["", "[]", "{", '{"a":1}', '{"a":NaN}', "[" * 5000]),
    ("program", ["", "[]", "null", "{}", "NaN", "[" * 5000, "{" * 5000, '{"steps":' * 2000, "9" * 5000]),
    ("unknown", ["x"]),
]


@pytest.mark.parametrize(("key", "values"), METADATA, ids=[key for key, _ in METADATA])
def test_wrong_metadata(raw, refused, key, values):
    for value in values:
        header, data = parts(raw)
        header["__metadata__"][key] = value
        refused(joined(header, data), f"{key} {value[:50]!r}")
    for value in (None, 1, [], {}):
        header, data = parts(raw)
        header["__metadata__"][key] = value
        refused(joined(header, data), f"{key} {value!r}")
    header, data = parts(raw)
    if key in header["__metadata__"]:
        del header["__metadata__"][key]
        refused(joined(header, data), f"no {key}")


def test_wrong_digests(raw, refused):
    header, data = parts(raw)
    for value in ("", "0" * 63, "Z" * 64, "0" * 65, "0" * 64, None, 1, [], {"sha256": "0" * 64}):
        header["__metadata__"]["sha256"] = value
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        refused(len(text).to_bytes(8, "little") + text + data, f"sha256 {value!r}")


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


def test_int31_weights_of_more_bits(tmp_path, refused):
    path = tmp_path / "wide.cambricon"
    model = trained(lambda: torch.nn.Linear(4, 4), [torch.ones(1, 4)], bitwidth=31)
    inference.fuse(model, torch.ones(1, 4)).save(path)
    header, data = parts(path.read_bytes())
    start, _ = header[next(name for name in header if name != "__metadata__" and header[name]["dtype"] == "I32")][
        "data_offsets"
    ]
    changed = data[:start] + (2**31 - 1).to_bytes(4, "little") + data[start + 4 :]
    assert "more than 31 bits" in refused(joined(header, changed), "31 bits")
