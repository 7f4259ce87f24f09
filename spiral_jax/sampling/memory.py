"""How many pages and rows a device has room for, and the report that a run starts with."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core.config import ConfigError
from spiral_jax.core.mesh import bytes_on_a_device
from spiral_jax.model.attention.backends import XLA
from spiral_jax.sampling.programs import CompiledProgram, Name
from spiral_jax.sampling.settings import DecodeSettings, GroupLimits, Schedule
from spiral_jax.sampling.shapes import abstract_pool
from spiral_jax.sampling.weights import abstract_weights, bytes_laid_out

GIB = 2**30
KERNEL_PAGE = 128  # tokens, as kernels read them
# Of a shard, unless config.sampling.rows says more: the host's work grows with them, and without
# kernels, on CPUs, each row costs.
MOST_ROWS, MOST_ROWS_OF_LOOPS = 1024, 128
ROWS_MULTIPLE = 8
FEWEST_ROWS = 16  # with which a program of its own pays for its compilation
MOST_TOGETHER = 16  # traces of a group for which pages are reserved; more begin one by one


@dataclasses.dataclass(frozen=True)
class Room:
    """Bytes of one device.

    Attributes:
      device: all that it has.
      resident: of what lies there while traces are sampled, beside the sampler: state, base.
    """

    device: int
    resident: int


def make_schedule(
    c: ConfigDict, settings: DecodeSettings, limits: Sequence[GroupLimits], room: Room
) -> Schedule:
    """The pages that `config.sampling.memory` pays for, and the rows that they feed.

    Args:
      limits: of the groups of every stage of training and evaluation.

    Raises:
      ConfigError: not even the largest group has room.
    """
    s = c.sampling
    trace = max(stage.tokens for stage in limits)
    page = _page(settings, limits)
    together = min(max(stage.traces for stage in limits), s.rows or MOST_TOGETHER, MOST_TOGETHER)
    schedule = Schedule(
        page=page,
        pages=0,
        rows=(together,),
        width=_width(settings, limits),
        together=together,
        prompts=_prompt_lengths(settings, limits),
        trace=trace,
        chunk=s.chunk,
        prefill_tokens=s.prefill_tokens,
        # bundles that are not taken cost nothing where kernels read, else each has its copy
        fill=1 if settings.config.pages != XLA else min(2, _width(settings, limits)),
    )
    fit = int(_page_budget(s.memory, settings, schedule, room) // page_bytes(settings, page))
    most_rows = MOST_ROWS_OF_LOOPS if settings.config.pages == XLA else MOST_ROWS
    rows = s.rows or min(most_rows, _rows(schedule, limits, fit))
    schedule = dataclasses.replace(schedule, rows=_row_counts(rows, settings.config.pages))
    most = 1 + rows * schedule.own_pages + schedule.bundles(rows) * schedule.prompt_pages
    schedule = dataclasses.replace(schedule, pages=min(fit, most))
    _check_one_group(s.memory, settings, schedule)
    return schedule


def page_bytes(settings: DecodeSettings, page: int) -> int:
    """Bytes on a device of one page of all layers."""
    one = Schedule(page, 1, (1,), 1, 1, (1,), 1, 1, 1)
    return bytes_on_a_device(abstract_pool(settings, one))


def memory_of_a_device(mesh: Mesh) -> int:
    """Bytes of one device: what it reports, or its share of the host's on a CPU."""
    stats = mesh.local_devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return host // jax.local_device_count()


def describe(
    programs: dict[Name, CompiledProgram], settings: DecodeSettings, schedule: Schedule
) -> str:
    """The report of a start: pages, rows, and every program with its compile time and memory."""
    seconds = sum(program.seconds for program in programs.values())
    pool = bytes_on_a_device(abstract_pool(settings, schedule))
    weights = bytes_on_a_device(abstract_weights(settings.config, settings.mesh))
    tokens = (schedule.pages - 1) * schedule.page
    lines = [
        f"sampler: a shard has {schedule.pages - 1:,} pages of {schedule.page} tokens, "
        f"{tokens:,} in all, for {schedule.rows[-1]} rows; a device holds {pool / GIB:.2f} GiB of "
        f"keys and values beside {weights / GIB:.2f} GiB of weights; {len(programs)} programs, "
        f"compiled in {seconds:.1f} s"
    ]
    units = {"pool": "", "prefill": "tokens a prompt", "decode": "rows a shard"}
    for (kind, *size), program in programs.items():
        temporary = f"{program.temp_bytes / 2**20:9.1f} MiB temporary"
        sizes = f"{size[0]} {units[kind]}" if size else "all pages"
        lines.append(f"  {kind:7} {program.seconds:6.1f} s {temporary}  {sizes}")
    return "\n".join(lines)


def _page(settings: DecodeSettings, limits: Sequence[GroupLimits]) -> int:
    """Tokens of a page.

    Without kernels pages are copied, which is fastest where a trace has few of them.
    """
    if settings.config.pages != XLA:
        return KERNEL_PAGE
    trace = max(stage.tokens for stage in limits)
    return min(KERNEL_PAGE, max(16, 2 ** math.ceil(math.log2(trace))))


def _width(settings: DecodeSettings, limits: Sequence[GroupLimits]) -> int:
    """Rows of a bundle.

    Kernels compute no place that is empty. Without them empty places cost, so bundles are as wide
    as the narrower of most groups.
    """
    traces = sorted(min(stage.traces, ROWS_MULTIPLE) for stage in limits)
    return traces[len(traces) // 2] if settings.config.pages == XLA else traces[-1]


def _prompt_lengths(settings: DecodeSettings, limits: Sequence[GroupLimits]) -> tuple[int, ...]:
    """Of prefill programs: the longest, and others where they are less than half as long."""
    lengths: list[int] = []
    for prompt in sorted({max(1, stage.prompt - 1) for stage in limits}, reverse=True):
        if not lengths or 2 * prompt < lengths[-1]:
            lengths.append(prompt)
    return tuple(settings.in_chunks(prompt) for prompt in reversed(lengths))


def _page_budget(memory: float, settings: DecodeSettings, schedule: Schedule, room: Room) -> float:
    """Bytes of a device for pages."""
    if memory > 1:
        return memory
    weights = bytes_laid_out(settings.config, settings.mesh)
    longest = schedule.prompts[-1]
    pages_of_a_call = schedule.prompts_of_a_call(longest) * schedule.pages_of(longest)
    as_computed = dataclasses.replace(settings, cache_dtype=settings.config.compute_dtype)
    prefilled = pages_of_a_call * page_bytes(as_computed, schedule.page)
    return memory * (room.device - room.resident - weights - prefilled)


def _rows(schedule: Schedule, limits: Sequence[GroupLimits], pages: int) -> int:
    """Rows that so many pages feed, if traces and prompts are half as long as they can be.

    A running row then holds a third of the longest trace (`planning.usage`), and as many rows as
    its group has traces share the prompt. Too many rows would only wait, too few leave pages empty:
    the mean over the stages decides.
    """
    needs = [
        schedule.pages_of(stage.tokens) / 3 + schedule.pages_of(stage.prompt) / stage.traces / 2
        for stage in limits
    ]
    rows = int(pages * len(needs) / sum(needs))
    return max(schedule.together, rows // ROWS_MULTIPLE * ROWS_MULTIPLE)


def _row_counts(rows: int, pages: str) -> tuple[int, ...]:
    """For which there are programs: all of them, a quarter, and without kernels a half.

    Where kernels read, a row that does not run costs its share of the products alone, which take
    what reading the weights takes until there are hundreds of rows.
    """
    counts = {rows}
    for share in (2, 4) if pages == XLA else (4,):
        fewer = -(-rows // share // ROWS_MULTIPLE) * ROWS_MULTIPLE
        if rows >= share * FEWEST_ROWS and fewer < rows:
            counts.add(fewer)
    return tuple(sorted(counts))


def _check_one_group(memory: float, settings: DecodeSettings, schedule: Schedule) -> None:
    needed = schedule.least_pages
    missing = (needed - schedule.pages) * page_bytes(settings, schedule.page)
    if missing > 0:
        raise ConfigError(
            f"config.sampling.memory = {memory:g}: pays for {max(0, schedule.pages):,} pages of "
            f"{schedule.page} tokens a shard, but the largest group needs {needed:,}, "
            f"{missing / GIB:.2f} GiB more a device. Raise it, lower the limits on prompts or "
            "traces, set sampling.cache_dtype = 'int8', or raise mesh.tensor."
        )
