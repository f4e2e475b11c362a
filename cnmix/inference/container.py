"""The container of offline models: a safetensors file with a digest over all of it.

The header is checked against the size of the file, and the digest against every byte, before any number is believed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from ..files import replacing
from ..version import __version__

FORMAT = "cnmix-offline"
VERSION = 1
MAX_HEADER = 8 * 2**20
# Of brackets and commas: what Python needs for a parsed header is bounded by it.
MAX_TOKENS = 500_000
DAMAGED = "the file is damaged: copy it again, or save it anew"

_ITEM_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1
}  # fmt: skip
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_NO_DIGEST = b'"sha256":"' + b"0" * 64 + b'"'
_BLOCK = 2**20


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        entries: of its metadata, without the digest.
        tensors: by name, mapped from the file.
        digest: SHA-256 of the file, its own digits taken as zeros; 64 hexadecimal digits.
        size: of the file, in bytes.
    """

    entries: dict[str, str]
    tensors: dict[str, Tensor]
    digest: str
    size: int


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> str:
    """Writes a file under a temporary name, and renames it.

    Args:
        path: the file; its folder is made where it is missing.
        tensors: contiguous, none in the memory of another.
        entries: of the metadata.

    Returns:
        The digest.

    Raises:
        ModuleNotFoundError: if safetensors is not installed.
        ValueError: if there is more to say in the header than a file may hold.
    """
    save_file = _safetensors("torch").save_file
    with replacing(path) as temporary:
        metadata = {**entries, "format": FORMAT, "format_version": str(VERSION), "sha256": "0" * 64}
        save_file(dict(tensors), temporary, metadata)
        with open(temporary, "r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError(f"the program and its metadata take {length} bytes; a file may have {MAX_HEADER}")
            header = file.read(length)
            read_json(header, "the program")  # what is refused when it is read is not written
            digest = _digest(file, header)
            file.seek(8 + header.index(_NO_DIGEST))
            file.write(_NO_DIGEST.replace(b"0" * 64, digest.encode()))
    return digest


def read(path: str | os.PathLike[str], sha256: str | None = None) -> Contents:
    """Reads a file.

    Args:
        path: the file.
        sha256: the digest that it must have; any where None.

    Raises:
        ModuleNotFoundError: if safetensors is not installed.
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is no such file, of a newer format, truncated or changed.
    """
    safe_open = _safetensors("").safe_open
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is no file, but a folder or a device")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if state.st_size < 10 or file.peek(1)[:1] != b"{":
            raise ValueError("it is no offline model of cnmix: cnmix.inference.FusedModel.save writes one")
        if length > MAX_HEADER:
            raise ValueError(
                f"its header claims {length} bytes, more than the {MAX_HEADER} that one may have: {DAMAGED}"
            )
        if 8 + length > state.st_size:
            raise ValueError(f"its header claims {length} bytes, but the file has {state.st_size}: {DAMAGED}")
        header = file.read(length)
        tensors = read_json(header, "its header")
        entries = _metadata(tensors)
        _check_version(entries)
        _check_extents(tensors, state.st_size - 8 - length, 8 + length)
        found = _DIGEST.findall(header)
        if len(found) != 1 or found[0].decode() != entries.pop("sha256", None):
            raise ValueError(f"it has no digest: {DAMAGED}")
        digest = _digest(file, _DIGEST.sub(_NO_DIGEST, header))
    if digest != found[0].decode():
        raise ValueError(f"its contents do not have the digest that it carries: {DAMAGED}")
    if sha256 is not None and sha256.lower() != digest:
        raise ValueError(f"its digest is {digest}, not the one asked for, {ascii(sha256)[:70]}: it is another file")
    with safe_open(path, framework="pt") as opened:
        return Contents(entries, {name: opened.get_tensor(name) for name in tensors}, digest, state.st_size)


def read_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Parses an object, strictly, if it is not too large.

    Raises:
        ValueError: if it is none, has a key twice, a number that is none, or is too large or nested too deeply.
    """
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if sum(map(raw.count, (b"[", b"{", b","))) > MAX_TOKENS:
        raise ValueError(f"{what} is too large: {MAX_TOKENS} brackets and commas are the most")
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply: {DAMAGED}") from None
    except ValueError as error:
        raise ValueError(f"{what} is no proper JSON ({ascii(str(error))[1:81]}): {DAMAGED}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{what} is no JSON object: {DAMAGED}")
    return parsed


def is_size(value: Any) -> bool:
    """Says whether this is a natural number that a tensor's size can be."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands there twice")
    return made


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _safetensors(module: str) -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'offline models need {error.name}: pip install "cnmix[inference]"') from error
    return safetensors.torch if module == "torch" else safetensors


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    """Takes the metadata out of a header."""
    entries = header.pop("__metadata__", None)
    if not isinstance(entries, dict) or entries.get("format") != FORMAT:
        raise ValueError("it is a safetensors file, but no offline model of cnmix")
    if not all(isinstance(value, str) for value in entries.values()):
        raise ValueError(f"its metadata are no strings: {DAMAGED}")
    return entries


def _check_version(entries: dict[str, str]) -> None:
    del entries["format"]
    version = entries.pop("format_version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise ValueError(f"its format version {ascii(version)[:40]} is no number: {DAMAGED}")
    if int(version) > VERSION:
        writer = entries.get("cnmix_version", "")
        wanted = f"cnmix>={writer}" if re.fullmatch(r"[0-9][0-9a-z.+]{0,30}", writer) else "--upgrade cnmix"
        raise ValueError(
            f"it has format version {version}, and cnmix {__version__} reads up to {VERSION}: pip install '{wanted}'"
        )


def _check_extents(tensors: dict[str, Any], size: int, start: int) -> None:
    """Checks that tensors lie one behind the other and fill the file."""
    extents = []
    for name, each in tensors.items():
        where = f"its tensor {ascii(name)[:80]}"
        if not isinstance(each, dict) or set(each) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{where} is not described by dtype, shape and data_offsets: {DAMAGED}")
        dtype, shape, offsets = each["dtype"], each["shape"], each["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _ITEM_SIZES:
            raise ValueError(f"{where} has the dtype {ascii(dtype)[:40]}: it may be one of {', '.join(_ITEM_SIZES)}")
        for numbers in (shape, offsets):
            if not isinstance(numbers, list) or len(numbers) > 64 or not all(map(is_size, numbers)):
                raise ValueError(f"{where} has sizes that are none: {DAMAGED}")
        item = _ITEM_SIZES[dtype]
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * item or (start + offsets[0]) % item:
            raise ValueError(f"{where} does not fill its place in the file: {DAMAGED}")
        extents.append(offsets)
    end = 0
    for first, after in sorted(extents):
        if first != end:
            raise ValueError(f"its tensors do not lie one behind the other: {DAMAGED}")
        end = after
    if end != size:
        raise ValueError(f"its tensors take {end} bytes, but the file has {size} for them: {DAMAGED}")


def _digest(file: BinaryIO, header: bytes) -> str:
    """Returns the digest, of a file that stands at the end of its header."""
    made = hashlib.sha256(len(header).to_bytes(8, "little") + header)
    while block := file.read(_BLOCK):
        made.update(block)
    return made.hexdigest()
