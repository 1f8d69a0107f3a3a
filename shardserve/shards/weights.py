"""Files of tensors in the safetensors format: their headers, and their tensors read or mapped.

The format: 8 bytes, little-endian, with the length of a JSON header; the header, name → dtype, shape and
data_offsets, which count from the header's end; the tensors' bytes, C order, without gaps. Read here rather than by the
safetensors package so that a tensor's bytes are read once, into its own memory, and hashed on the way.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardserve.errors import ShardError
from shardserve.shards.config import CONFIG_FILE
from shardserve.shards.expressions import MAX_INTEGER
from shardserve.shards.files import open_regular

CHUNK = 1 << 20
"""Bytes that are read, hashed or written at once."""
LONGEST_HEADER = 100_000_000
"""As the safetensors package has it."""
# Linux's asm-generic/mman.h; Python has no name for it. Without, the kernel refuses files larger than its memory.
_MAP_NORESERVE = 0x4000

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}

Watch = Callable[[int], None]
"""Told how many more bytes of a file have been read."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `start` and `stop` are bytes of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file: its tensors by name, in the order of their bytes, and where those begin."""

    path: Path
    entries: Mapping[str, Entry]
    begin: int
    size: int

    @classmethod
    def open(cls, path: str | Path) -> WeightsFile:
        """Reads the header; ShardError names the file and what of it is wrong."""
        path = Path(path)
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, LONGEST_HEADER):
                    raise ShardError(f"{path}: not a safetensors file, or cut short")
                header = json.loads(file.read(length))
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{path}: not a safetensors file: its header is no JSON") from error
        if not isinstance(header, dict):
            raise ShardError(f"{path}: not a safetensors file: its header is no object")
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, content, 8 + length) for name, content in header.items()}
        ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
        at = 8 + length
        for name, entry in ordered.items():
            if entry.start != at:
                raise ShardError(f"{path}: tensor '{name}' doesn't begin where the one before it ends")
            at = entry.stop
        if at != size:
            raise ShardError(f"{path}: has {size} bytes, its header speaks of {at}: cut short or damaged")
        return cls(path, ordered, 8 + length, size)

    def map(self) -> dict[str, Tensor]:
        """All tensors as views of the mapped file, which take no memory of this process's own.

        What is written to them is this process's own. They change when the file does, and whoever looks at them ends
        when it is cut short.
        """
        with open_regular(self.path) as file:
            return self._mapped(file)

    def map_hashed(self, watch: Watch | None = None) -> tuple[dict[str, Tensor], str]:
        """As `map`, and the sha256 of the very file that is mapped: another may get its name in the meantime."""
        with open_regular(self.path) as file:
            return self._mapped(file), _digest(self.path, file, watch)

    def _mapped(self, file: FileIO) -> dict[str, Tensor]:
        if self.size == self.begin:
            return {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in self.entries.items()}
        try:
            mapped = private_mapping(file.fileno(), 0)
        except (OSError, ValueError) as error:
            raise ShardError(f"{self.path}: {error}") from error
        if len(mapped) != self.size:
            raise ShardError(f"{self.path}: was changed while it was read")
        return {name: tensor_at(mapped, entry) for name, entry in self.entries.items()}

    def read(self, device: torch.device, watch: Watch | None = None) -> tuple[dict[str, Tensor], str]:
        """All tensors, each in memory of its own on `device`, and the file's sha256: it is read once, through memory of
        the CPU that holds one tensor at a time if it goes elsewhere.
        """
        tensors: dict[str, Tensor] = {}
        digest = hashlib.sha256()
        try:
            with open_regular(self.path) as file:
                _fill(self.path, file, memoryview(bytearray(self.begin)), digest.update, watch)
                for name, entry in self.entries.items():
                    tensor = torch.empty(entry.shape, dtype=entry.dtype)
                    _fill(self.path, file, bytes_of(tensor), digest.update, watch)
                    tensors[name] = tensor.to(device)
                if file.read(1):
                    raise ShardError(f"{self.path}: was changed while it was read")
        except OSError as error:
            raise ShardError(f"{self.path}: {error.strerror}") from error
        return tensors, digest.hexdigest()


@dataclass
class Weights:
    """What a process has loaded, by the files' sha256: programs that are given the same Weights share tensors.

    `mapped`: map the files rather than read them. `told` hears how many bytes have been read, and of how many in the
    files that it was given so far.
    """

    mapped: bool = False
    told: Callable[[int, int], None] | None = None
    _done: int = 0
    _total: int = 0
    _loaded: dict[tuple[str, torch.device], dict[str, Tensor]] = field(default_factory=dict)

    def load(self, file: WeightsFile, sha256: str, device: torch.device) -> Mapping[str, Tensor]:
        """The tensors of a file, on `device`; ShardError unless its content has this sha256."""
        key = sha256, device
        if key not in self._loaded:
            self._total += file.size
            self._watch(0)
            if self.mapped:
                mapped, found = file.map_hashed(self._watch)
                tensors = {name: tensor.to(device) for name, tensor in mapped.items()}
            else:
                tensors, found = file.read(device, self._watch)
            check_digest(file.path, found, sha256)
            self._loaded[key] = tensors
        return self._loaded[key]

    def _watch(self, count: int) -> None:
        self._done += count
        if self.told is not None:
            self.told(self._done, self._total)


def check_digest(path: Path, found: str, expected: str) -> None:
    """ShardError unless the two are the same."""
    if found != expected:
        raise ShardError(f"{path}: its sha256 is not the one in {CONFIG_FILE}: the file was altered or mixed up")


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    assert tensor.is_contiguous()
    if not tensor.numel():
        return memoryview(b"")
    flat: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def private_mapping(descriptor: int, size: int) -> mmap.mmap:
    """A mapping of a file, or of zeros for -1: memory is needed for what is written to it only, and none set aside."""
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE | (mmap.MAP_ANONYMOUS if descriptor < 0 else 0)
    return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def tensor_at(memory: mmap.mmap, entry: Entry) -> Tensor:
    """A tensor in a mapping, which lives as long as the tensor does."""
    count = math.prod(entry.shape)
    if not count:
        return torch.empty(entry.shape, dtype=entry.dtype)
    flat = torch.frombuffer(memory, dtype=entry.dtype, count=count, offset=entry.start)
    return flat.view(entry.shape)


def pieces(memory: memoryview) -> Iterator[memoryview]:
    """`memory` in parts of at most CHUNK bytes."""
    for start in range(0, len(memory), CHUNK):
        yield memory[start : start + CHUNK]


def _digest(path: Path, file: FileIO, watch: Watch | None) -> str:
    """The sha256 of an open file's content."""
    digest = hashlib.sha256()
    scratch = memoryview(bytearray(CHUNK))
    try:
        while count := file.readinto(scratch):
            digest.update(scratch[:count])
            if watch is not None:
                watch(count)
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


def _fill(
    path: Path, file: FileIO, memory: memoryview, take: Callable[[memoryview], None], watch: Watch | None
) -> None:
    for piece in pieces(memory):
        done = 0
        while done < len(piece):
            count = file.readinto(piece[done:])
            if not count:
                raise ShardError(f"{path}: was cut short while it was read")
            done += count
        take(piece)
        if watch is not None:
            watch(len(piece))


def _entry(path: Path, name: str, content: Any, begin: int) -> Entry:
    try:
        dtype, shape, (start, stop) = content["dtype"], tuple(content["shape"]), content["data_offsets"]
        numbers = (*shape, start, stop)
    except (TypeError, KeyError, ValueError) as error:
        raise ShardError(f"{path}: tensor '{name}' has no dtype, shape and data_offsets in the header") from error
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ShardError(f"{path}: tensor '{name}' has the dtype {dtype!r}, which isn't supported")
    if not all(type(number) is int and number >= 0 for number in numbers) or _too_large(shape):
        raise ShardError(f"{path}: tensor '{name}' has the shape {list(shape)} at {[start, stop]}")
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ShardError(f"{path}: tensor '{name}' of shape {list(shape)} and {dtype} has {stop - start} bytes")
    return Entry(DTYPES[dtype], shape, begin + start, begin + stop)


def _too_large(shape: tuple[int, ...]) -> bool:
    """Beyond what PyTorch can count: a tensor without elements takes no bytes, whatever its other sizes."""
    return math.prod(max(size, 1) for size in shape) > MAX_INTEGER
