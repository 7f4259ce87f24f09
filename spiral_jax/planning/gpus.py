"""What XLA's compiler must know of a GPU that is not there, and jax's CUDA plugin, which holds it.

The plugin compiles without a driver and without NVIDIA's libraries (jax 0.10.2). It does not time
tiles of matrix products, as it would on a GPU, and cuDNN has no say: fused attention stays a call.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from jax.experimental import topologies

from spiral_jax.core.config import ConfigError

GPUS_A_HOST = 8
INSTALL = 'pip install ".[plan-gpu]"'

# Tiles are chosen by a rule: timing them needs the GPU.
COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The numbers in which GPUs differ; see `described` for those that these share.

    Attributes:
      capability: compute capability.
      cores: streaming multiprocessors.
      clock_ghz: boost.
      memory: bytes.
      memory_bytes_per_s: of reading and writing together.
      l2: bytes of the cache that all cores share.
      threads: of a core, at most.
      shared_memory: KiB of a core; a block may have one less.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory: int
    memory_bytes_per_s: int
    l2: int
    threads: int = 2048
    shared_memory: int = 228


# NVIDIA's data sheets and architecture papers of H100 SXM, H200 SXM, HGX B200 and GeForce RTX 4090.
_GB, _TB, _MIB = 10**9, 10**12, 2**20
GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 80 * _GB, 3350 * _GB, 50 * _MIB),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 141 * _GB, 4800 * _GB, 50 * _MIB),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 1.965, 180 * _GB, 7700 * _GB, 126 * _MIB),
    "rtx4090": Gpu(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 2.52, 24 * _GB, 1008 * _GB, 72 * _MIB, 1536, 100
    ),
}  # fmt: skip


def described(gpu: Gpu) -> str:
    """The description that the plugin takes, a `GpuTargetConfigProto` as text.

    Threads, registers and shared memory are those of the compute capability in the CUDA programming
    guide; versions are those that jax 0.10.2's cuda12 packages have at least.
    """
    major, minor = gpu.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.name}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
          name: "{gpu.name}"
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          core_count: {gpu.cores}
          clock_rate_ghz: {gpu.clock_ghz}
          device_memory_size: {gpu.memory}
          memory_bandwidth: {gpu.memory_bytes_per_s}
          l2_cache_size: {gpu.l2}
          fpus_per_core: 128
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: {gpu.threads}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_core: {gpu.shared_memory * 1024}
          shared_memory_per_block: {48 * 1024}
          shared_memory_per_block_optin: {(gpu.shared_memory - 1) * 1024}
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          driver_version: "12.8.0"
          runtime_version: "12.8.0"
          compile_time_toolkit_version: "12.8.0"
          dnn_version: "9.10.0"
        }}
    """


def missing_compiler() -> str | None:
    """What programs for GPUs cannot be compiled without; None where the plugin is installed."""
    try:
        plugin = importlib.util.find_spec("jax_plugins.xla_cuda12")
    except ModuleNotFoundError:  # there is no plugin at all
        plugin = None
    return None if plugin else f"jax's CUDA plugin is not installed: {INSTALL}"


def devices(kind: str, count: int) -> list[Any]:
    """So many GPUs of a kind, for the compiler alone; full hosts of 8 where there are more.

    Raises:
      ConfigError: a part of a host beside full ones, or the plugin cannot be loaded.
    """
    hosts = max(1, count // GPUS_A_HOST)
    if count > GPUS_A_HOST and count % GPUS_A_HOST:
        raise ConfigError(
            f"--topology={kind}:{count}: up to {GPUS_A_HOST} GPUs, or a multiple of {GPUS_A_HOST}."
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=f"{kind}:{count}",
            target_config=described(GPUS[kind]),
            topology=f"1x{hosts}x{count // hosts}",
        )
    except Exception as error:  # whatever class the plugin chooses
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"--topology={kind}:{count}: jax's CUDA plugin is installed and cannot be loaded "
            f"({reason}): {INSTALL}, or uninstall it and plan by arithmetic."
        ) from error
    return list(topology.devices)
