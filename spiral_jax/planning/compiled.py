"""A lowered program -> what the compiler made of it: its text and its memory.

Kept on disk, so that the same program is compiled once: a 4B program takes minutes.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
import time
from typing import Any

import jax
from jax.stages import Lowered

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler made; bytes are those of one chip.

    Attributes:
      text: optimised HLO; "" where the program does not fit.
      arguments, results, temporary: bytes.
      aliased: bytes of the results that lie where arguments were.
      needed: bytes that a program needs which does not fit; 0 where it fits.
      seconds: what compiling took, when it was done.
    """

    text: str
    arguments: int = 0
    results: int = 0
    aliased: int = 0
    temporary: int = 0
    needed: int = 0
    seconds: float = 0.0


def cache_directory() -> pathlib.Path:
    """Where compiled programs are kept: SPIRAL_JAX_PLANS, or ~/.cache/spiral_jax/plans."""
    default = pathlib.Path.home() / ".cache" / "spiral_jax" / "plans"
    return pathlib.Path(os.environ.get("SPIRAL_JAX_PLANS", default))


def compile_kept(lowered: Lowered, target: str, options: dict[str, Any] | None = None) -> Compiled:
    """Compiles for `target`, or reads what an earlier call has compiled.

    Args:
      target: all that the compiler is told of the devices.
      options: of `Lowered.compile`.

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails, for another reason than too little memory.
    """
    compilers = [_version(package) for package in ("jaxlib", "libtpu", "jax-cuda12-pjrt")]
    key = [target, str(options), jax.__version__, *compilers, lowered.as_text()]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    file = cache_directory() / f"{name}.json.gz"
    if file.exists():
        return Compiled(**json.loads(gzip.decompress(file.read_bytes())))

    compiled = _compile(lowered, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode(), 3))
    unfinished.replace(file)
    return compiled


def _compile(lowered: Lowered, options: dict[str, Any] | None) -> Compiled:
    start = time.monotonic()
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise
        return Compiled("", needed=needed, seconds=time.monotonic() - start)
    memory = program.memory_analysis()
    return Compiled(
        text=program.as_text(),
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        seconds=time.monotonic() - start,
    )


def needed_bytes(message: str) -> int | None:
    """HBM that a program needs, from the compiler's "Used 20.61G of 15.75G hbm".

    None for any other error.
    """
    match = re.search(r"Used ([\d.]+)([KMG]?) of [\d.]+[KMG]? hbm", message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
