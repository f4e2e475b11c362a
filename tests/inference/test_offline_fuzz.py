"""Bad files: whatever is changed, a clear error comes, soon and without memory."""

import json
import random

import pytest
import torch
from offline_files import joined, parts, sealed, trained

from cnmix import inference

pytestmark = pytest.mark.usefixtures("bounded_memory")


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
