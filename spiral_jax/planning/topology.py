"""What may be rented: TPU slices and GPUs.

libtpu describes slices without a TPU, jax's CUDA plugin GPUs without a GPU. Without them chips are
known by the numbers below alone.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError
from spiral_jax.model.flops import PEAK_FLOPS_PER_S
from spiral_jax.planning import gpus

GB, GIB = 1e9, 2**30
INSTALL = 'pip install ".[plan]"'


@dataclasses.dataclass(frozen=True)
class Chip:
    """Numbers of one chip, from its vendor's data sheet.

    Attributes:
      flops_per_s: dense bfloat16.
      hbm_bytes: that programs may use.
      hbm_bytes_per_s: of reading and writing together.
      link_bytes_per_s: that a chip sends on a ring along one axis of the mesh, to both of its
        neighbours together.
      far_bytes_per_s: the same beyond `near` chips; 0 where all links are alike.
      dimensions: of a TPU slice; 0 for GPUs.
    """

    name: str
    flops_per_s: float
    hbm_bytes: int
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    far_bytes_per_s: float = 0.0
    near: int = 0
    dimensions: int = 0


def _tpu(name: str, memory: float, hbm: float, links: float, *, dimensions: int) -> Chip:
    return Chip(name, PEAK_FLOPS_PER_S[name], int(memory), hbm, links, dimensions=dimensions)


def _gpu(name: str, kind: str, memory: float, hbm: float, links: float) -> Chip:
    """`kind`: what the device calls itself beyond its name."""
    flops_per_s = PEAK_FLOPS_PER_S[name + kind]
    return Chip(name, flops_per_s, int(memory), hbm, links, far_bytes_per_s=50 * GB, near=8)


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Memory is what the compiler says that it has
# (its error message when a program is too large), a little less than the data sheet's 32, 16, 95
# and 32 GB. Links: the data sheet's bidirectional interconnect bandwidth a chip, 600, 400, 1200 and
# 800 GB/s over 6, 4, 6 and 4 ports; a ring uses two ports, each one way. GPUs: NVIDIA's data sheets
# of H100 SXM, H200 SXM and HGX B200, memory less 5 % for CUDA and NCCL, NVLink one way, and beyond
# 8 GPUs one 400 Gb/s network card for each; and of GeForce RTX 4090, which has PCIe 4.0 alone.
#      name, its key in PEAK_FLOPS_PER_S,       memory,           HBM,        links
CHIPS = {
    "v4":   _tpu("TPU v4",                     30.75 * GIB,  1228 * GB,  100 * GB, dimensions=3),
    "v5e":  _tpu("TPU v5e",                    15.75 * GIB,   819 * GB,  100 * GB, dimensions=2),
    "v5p":  _tpu("TPU v5p",                    95.74 * GIB,  2765 * GB,  200 * GB, dimensions=3),
    "v6e":  _tpu("TPU v6e",                    31.25 * GIB,  1638 * GB,  200 * GB, dimensions=2),
    "h100": _gpu("NVIDIA H100", " 80GB HBM3",      76 * GB,  3350 * GB,  450 * GB),
    "h200": _gpu("NVIDIA H200", "",               134 * GB,  4800 * GB,  450 * GB),
    "b200": _gpu("NVIDIA B200", "",               171 * GB,  7700 * GB,  900 * GB),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", "", 22.8 * GB, 1008 * GB,  32 * GB),
}  # fmt: skip
KNOWN = (
    "TPU slices v4:AxBxC, v5p:AxBxC, v5e:AxB, v6e:AxB (v5e:8x8 has 64 chips; libtpu knows those "
    "that can be rented), and GPUs h100:N, h200:N, b200:N, rtx4090:N"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind.

    Attributes:
      devices: what programs are compiled for; None where they are planned by arithmetic alone.
      description: what the compiler is told of them beside their name.
      compiler_options: of `jax.stages.Lowered.compile`.
      missing: why nothing is compiled, and how to change it; "" where programs are.
    """

    name: str
    chip: Chip
    chips: int
    devices: list[Any] | None
    description: str = ""
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    missing: str = ""


def find_topology(name: str) -> Topology:
    """The slice or cluster of that name, such as "v5p:4x4x4" or "h100:8".

    Raises:
      ConfigError: it is not known, or jax's CUDA plugin is installed and cannot be loaded.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ConfigError(f"--topology={name}: unknown. Known are {KNOWN}.")
    sizes = [int(size) for size in shape.split("x")]
    dimensions = chip.dimensions or 1
    if len(sizes) != dimensions:
        raise ConfigError(
            f"--topology={name}: {kind} has {dimensions} dimensions. Known are {KNOWN}."
        )
    count = math.prod(sizes)
    missing = missing_compiler(chip)
    if missing:
        return Topology(name, chip, count, devices=None, missing=missing)
    if chip.dimensions:
        return Topology(name, chip, count, _tpu_devices(name))
    return Topology(
        name,
        chip,
        count,
        gpus.devices(kind, count),
        description=gpus.described(gpus.GPUS[kind]),
        compiler_options=gpus.COMPILER_OPTIONS,
    )


def missing_compiler(chip: Chip) -> str | None:
    """What programs for the chip cannot be compiled without; None where it is installed."""
    if not chip.dimensions:
        return gpus.missing_compiler()
    if importlib.util.find_spec("libtpu") is None:
        return f"libtpu, which needs no TPU, is not installed: {INSTALL}"
    return None


def make_mesh(sizes: ConfigDict, topology: Topology) -> Mesh | AbstractMesh:
    """config.mesh on the topology's devices; without any, its sizes alone.

    Raises:
      ConfigError: sizes whose product is another number of chips.
    """
    if topology.devices is not None:
        return meshes.make_mesh(sizes, topology.devices)
    return meshes.abstract_mesh(meshes.mesh_shape(sizes, topology.chips, "chip"))


def _tpu_devices(name: str) -> list[Any]:
    # else libtpu asks a metadata server that is not there
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # whatever class the plugin chooses
        reason = str(error).strip().splitlines()[0]
        if "lockfile" in reason or "in use" in reason:
            message = f"one process at a time may use libtpu: {reason}"
        else:
            message = f"libtpu does not know it ({reason}). Known are {KNOWN}."
        raise ConfigError(f"--topology={name}: {message}") from error
