"""CUDA kernels of this package: compiled by NVRTC when they are first used, kept on disk, started by the driver.

A kernel lives in a `.cu` file beside its operator, needs no header but this package's own, and is specialised by
`#define`s. NVRTC and the driver are reached through cuda-bindings, which CUDA builds of torch bring along, and what
runs before every kernel through ctypes, which costs the host less; no compiler has to be installed. The machine code
is kept in `$XDG_CACHE_HOME/deepwright/kernels` (`~/.cache` by default) under a hash of source, options and compiler.
Only Hopper (sm_90a) is compiled for: `wgmma` and the bulk tensor copies exist there alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = Path(__file__).parent
ARCHITECTURE = "sm_90a"
TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = 128, 64
# What a block may use of shared memory on Hopper, and what it gets without asking.
LARGEST_SHARED_BYTES, UNASKED_SHARED_BYTES = 232448, 48 * 1024

# CUresult of the driver's API for a thread without a context.
NO_CONTEXT = 201

# CUtensorMapDataType of the driver's API.
_TENSOR_MAP_TYPES = {
    torch.uint8: 0,
    torch.float8_e4m3fn: 0,
    torch.int32: 4,
    torch.float32: 7,
    torch.bfloat16: 9,
}
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
_PROMOTE_TO_256_BYTES = 3
_FLOAT, _INT = struct.Struct("=f"), struct.Struct("=I")


class CudaError(RuntimeError):
    """The driver or the compiler refused something."""


def _checked(result: tuple[Any, ...], what: str) -> Any:
    status, *values = result
    if int(status) != 0:
        raise CudaError(f"{what} failed: {status!s}.")
    return values[0] if len(values) == 1 else values


def source_of(path: Path) -> str:
    """The text of a `.cu` file, with what it includes from this package (`#include "name"`) in its place."""
    lines = path.read_text().splitlines(keepends=True)
    found = [re.fullmatch(r'#include "([\w.]+)"\n?', line) for line in lines]
    return "".join((PACKAGE / name[1]).read_text() if name else line for line, name in zip(lines, found, strict=True))


def compile_source(source: str, defines: Mapping[str, int | str]) -> bytes:
    """Machine code for `source` with these `#define`s, from the disk if it was compiled before.

    Raises `CudaError` with the compiler's log.
    """
    from cuda.bindings import nvrtc

    options = [f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", "-default-device"]
    options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    version = _checked(nvrtc.nvrtcVersion(), "asking NVRTC for its version")
    key = hashlib.sha256("\0".join([source, *options, str(version)]).encode()).hexdigest()
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepwright" / "kernels" / f"{key}.cubin"
    if kept.is_file():
        return kept.read_bytes()
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []), "creating a program")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if int(status) != 0:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "reading the compiler's log")
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CudaError(f"A CUDA kernel did not compile:\n{log.decode(errors='replace')}")
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "reading the machine code's size")
        _checked(nvrtc.nvrtcGetCUBIN(program, code), "reading the machine code")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    _keep(kept, code)
    return code


def _keep(path: Path, code: bytes) -> None:
    """Write whole or not at all; a disk that cannot be written only costs the next process a compilation."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass


class Kernel:
    """A compiled kernel on one device; `launch` starts it on torch's current stream."""

    def __init__(self, function: int, shared_bytes: int, device: int) -> None:
        self._function, self._shared_bytes, self._device = function, shared_bytes, device

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        *arguments: Tensor | TensorMap | int | float,
        early: bool = False,
    ) -> None:
        """A tensor is passed as its address, an int as 32 bits (or as an address, where the parameter is one), a float
        as float32, a `TensorMap` by value (a `const __grid_constant__` parameter).

        `early`: it may come onto the GPU while the kernel before it on the stream still runs (programmatic dependent
        launch). It then has to wait by itself, with `griddepcontrol.wait`, before it touches what that one writes.
        """
        # Eight bytes for each argument (the driver reads as many as the parameter has) and an array of their addresses.
        # This runs before every small kernel, so it is kept short, and goes to the driver by ctypes, with numbers only.
        values: list[int] = []
        maps: list[tuple[int, int]] = []
        for argument in arguments:
            kind = type(argument)
            if kind is int:
                values.append(argument)  # type: ignore[arg-type]
            elif kind is float:
                values.append(_INT.unpack(_FLOAT.pack(argument))[0])
            elif isinstance(argument, TensorMap):
                maps.append((len(values), argument.address))
                values.append(0)
            else:
                values.append(argument.data_ptr())  # type: ignore[union-attr]
        count = len(values)
        held = (ctypes.c_int64 * count)(*values)
        start = ctypes.addressof(held)
        addresses = (ctypes.c_int64 * count)(*range(start, start + 8 * count, 8))
        for place, address in maps:
            addresses[place] = address
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        where = ctypes.addressof(addresses)
        passed: tuple[Any, ...]
        if early:
            config = _early_launch(grid, block, self._shared_bytes, stream)
            call, passed = _driver().cuLaunchKernelEx, (config.address, self._function, where, None)
        else:
            call = _driver().cuLaunchKernel
            passed = (self._function, *grid, *block, self._shared_bytes, stream, where, None)
        status = call(*passed)
        if status == NO_CONTEXT:
            _use_torchs_context(self._device)
            status = call(*passed)
        if status:
            from cuda.bindings import driver

            raise CudaError(f"starting a CUDA kernel failed: {driver.CUresult(status)!s}.")


def _use_torchs_context(device: int) -> None:
    """Give this thread the device's context, if it has none: autograd's threads begin without, and torch's own calls
    that need one make it themselves."""
    from cuda.bindings import driver

    if int(_checked(driver.cuCtxGetCurrent(), "asking for the context")) == 0:
        handle = _checked(driver.cuDeviceGet(device), "finding the device")
        context = _checked(driver.cuDevicePrimaryCtxRetain(handle), "finding torch's context")
        _checked(driver.cuCtxSetCurrent(context), "using torch's context")


@cache
def _driver() -> Any:
    """The driver's library: cuda-bindings' calls cost the host several times as much as those of ctypes."""
    library = ctypes.CDLL("libcuda.so.1")
    pointer, size = ctypes.c_void_p, ctypes.c_uint
    library.cuLaunchKernel.argtypes = [pointer, *[size] * 7, pointer, pointer, pointer]
    library.cuLaunchKernelEx.argtypes = [pointer] * 4
    return library


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number that says which one, and room for its value."""

    _fields_ = [("id", ctypes.c_int), ("value", ctypes.c_int * 17)]  # the first word of the value is padding


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


# CUlaunchAttributeID of the driver's API: the kernel before need not have ended.
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _EarlyLaunch:
    def __init__(self, config: _Config) -> None:
        self._config, self.address = config, ctypes.addressof(config)


@lru_cache(maxsize=1024)
def _early_launch(
    grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, stream: int
) -> _EarlyLaunch:
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, (0, 1))
    config = _Config(grid, block, shared_bytes, stream, ctypes.pointer(attribute), 1)
    return _EarlyLaunch(config)  # a structure keeps what its pointers were made of


@cache
def _kernel(
    path: Path, name: str, defines: tuple[tuple[str, int | str], ...], shared_bytes: int, device: int
) -> Kernel:
    from cuda.bindings import driver

    code = compile_source(source_of(path), dict(defines))
    torch.cuda.current_stream(device)  # torch makes its context on the device
    _use_torchs_context(device)
    module = _checked(driver.cuModuleLoadData(code), f"loading {path.name}")
    function = _checked(driver.cuModuleGetFunction(module, name.encode()), f"finding {name} in {path.name}")
    if shared_bytes > UNASKED_SHARED_BYTES:
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes), f"giving {name} {shared_bytes} bytes")
    return Kernel(int(function), shared_bytes, device)


def kernel(path: Path, name: str, defines: Mapping[str, int | str], shared_bytes: int, device: torch.device) -> Kernel:
    """The kernel `name` (declared `extern "C"`) of a `.cu` file, specialised and ready for `device`; compiled once."""
    return _kernel(path, name, tuple(sorted(defines.items())), shared_bytes, device.index or 0)


class TensorMap:
    """How the copy engine reads or writes tiles of a tensor (CUtensorMap): `box` values at a time.

    Sizes go from the outermost to the innermost dimension, as in torch; strides are the tensor's own. What lies outside
    the tensor is read as zero. `swizzle`: 0, 32, 64 or 128 bytes; the box's innermost size must then not be wider.
    Whoever starts a kernel with it keeps the tensor.
    """

    def __init__(self, tensor: Tensor, box: Sequence[int], swizzle: int = 128) -> None:
        described = _described(
            tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.element_size(), tensor.dtype, tuple(box), swizzle
        )
        self.address, self._bytes = described


@lru_cache(maxsize=4096)
def _described(
    start: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    size: int,
    dtype: torch.dtype,
    box: tuple[int, ...],
    swizzle: int,
) -> tuple[int, Any]:
    """Where a description of this memory lies, and what holds it. Kept: caches and weights stay where they are, and
    the allocator gives the same places again."""
    held = (ctypes.c_char * (TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT))()
    address = -(-ctypes.addressof(held) // TENSOR_MAP_ALIGNMENT) * TENSOR_MAP_ALIGNMENT
    rank = len(shape)
    bytes_apart = [stride * size for stride in reversed(strides)]
    if bytes_apart[0] != size or any(apart % 16 for apart in bytes_apart[1:]):
        raise ValueError(
            f"A tensor with strides {strides} cannot be copied in tiles: its last must be 1 and the others "
            "multiples of 16 bytes."
        )
    status = _driver().cuTensorMapEncodeTiled(  # which cuda-bindings would not put at a multiple of 64 bytes
        ctypes.c_void_p(address),
        _TENSOR_MAP_TYPES[dtype],
        rank,
        ctypes.c_void_p(start),
        (ctypes.c_uint64 * rank)(*reversed(shape)),
        (ctypes.c_uint64 * max(1, rank - 1))(*bytes_apart[1:]),
        (ctypes.c_uint32 * rank)(*reversed(box)),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        0,  # not interleaved
        _SWIZZLES[swizzle],
        _PROMOTE_TO_256_BYTES,
        0,  # zeros outside
    )
    if status != 0:
        raise CudaError(f"Describing a tensor of shape {list(shape)} to the copy engine failed: {status}.")
    return address, held
