"""A vocabulary divided over the ranks of a process group: which columns are whose, and what ranks exchange.

Each rank holds a range of the columns (of the logits, or of the LM head's rows); the ranges may be of unequal sizes.
torch.distributed is imported by the first call that has a group.
"""

from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from .arguments import describe, whole_number
from .errors import KDError


class VocabPart(NamedTuple):
    """This rank's part of the vocabulary: columns `start` to `start + size - 1` of `total`."""

    group: str  # the process group's name
    start: int
    size: int
    total: int
    parts: tuple[tuple[int, int], ...]  # start and size, of every rank

    @property
    def widest(self) -> int:
        """The columns of the largest part: what ranks that work in equal blocks are to plan for."""
        return max(size for _, size in self.parts)


def group_name(group: Any) -> str:
    """The name of a torch.distributed.ProcessGroup that this process belongs to: what an operator can take.
    Raises KDError for anything else."""
    from torch import distributed as dist

    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        found = "none: this process is no member of it" if type(group) is int else describe(group)
        raise KDError(
            f"group: got {found}; expected the torch.distributed.ProcessGroup over which the vocabulary is divided "
            "(of a DeviceMesh: mesh['tp'].get_group(); of all processes: torch.distributed.group.WORLD)."
        )
    return str(group.group_name)


def check_vocab_start(vocab_start: Any, group: Any) -> int:
    """The first column of this rank's part; -1 where it is None: the parts lie in the order of the ranks."""
    if vocab_start is None:
        return -1
    if group is None:
        raise KDError(f"vocab_start: got {vocab_start!r} without a group; pass the ranks' process group as group=.")
    return int(whole_number("vocab_start", vocab_start, "this rank's first column", 0))


def exchange_parts(name: str, size: int, start: int, device: torch.device, settings: str) -> Tensor:
    """First column and number of columns of every rank's part, and a checksum of its settings, int64 `[R, 3]` on the
    device, which is not waited for.

    size, start: of this rank; start -1 as by `check_vocab_start`. settings: as text, all that has to be the same on all
    ranks and that the host knows. One all-gather of three numbers, in every call: to remember them for a size would
    leave ranks waiting for each other where another vocabulary, divided over the same group, gives some ranks as many
    columns as before and some not.
    """
    own = torch.full((3,), size, dtype=torch.int64, device=device)
    own[0] = start  # filled there: a copy to a GPU would wait for it
    own[2] = crc32(settings.encode())
    parts = all_gather(own, name)
    sizes = parts[:, 1]
    in_order = sizes.cumsum(0) - sizes
    return torch.stack([torch.where((parts[:, 0] < 0).all(), in_order, parts[:, 0]), sizes, parts[:, 2]], 1)


def read_part(name: str, parts_R3: Tensor, vocab_size: int | None, what: str) -> VocabPart:
    """This rank's part, of `exchange_parts`. Reads the tensor: it waits for a GPU.

    vocab_size: the fewest columns that the parts may have together, and one of several parts may not; None: any. what:
    the tensor that is divided, for messages. Raises KDError, on all ranks alike, unless the parts are a division of one
    vocabulary of at least this size, and the settings are the same.
    """
    rows = parts_R3.tolist()
    parts, checksums = [(start, size) for start, size, _ in rows], [checksum for *_, checksum in rows]
    others = [rank for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    if others:
        raise KDError(
            f"group: got other settings on rank {others[0]} of the group than on rank 0; expected the same on all "
            "ranks: alpha, temperature and all else of the config, chunk_tokens, softcap, logit_scale, num_items, k "
            "and so on, and arguments of the same shapes."
        )
    listed = ", ".join(f"{start} to {start + size - 1}" if start >= 0 else f"? ({size})" for start, size in parts)
    end = 0
    for start, size in sorted(parts):
        if start != end or size < 1:
            raise KDError(
                f"vocab_start: got the columns {listed} on ranks 0 to {len(parts) - 1}; expected parts of at least one "
                "column that follow on each other from column 0. Pass each rank's first column, or None on all ranks "
                "if the parts lie in rank order."
            )
        end += size
    if vocab_size is None:
        vocab_size = 1
    elif len(parts) > 1 and all(size >= vocab_size for _, size in parts):
        raise KDError(
            f"{what}: got {parts[0][1]} columns on each of {len(parts)} ranks, as many as the whole vocabulary has "
            f"({vocab_size}); expected each rank's own columns. Leave group= out where every rank holds all of them "
            "(as with ColwiseParallel(output_layouts=Replicate()))."
        )
    if end < vocab_size:
        raise KDError(
            f"{what}: got {end} columns on all ranks of the group together ({listed}), fewer than the vocabulary; "
            f"expected at least {vocab_size}, one for each of the teacher's tokens. Is this the group of all ranks "
            "that hold a part?"
        )
    start, size = parts[_group(name).rank()]
    return VocabPart(name, start, size, end, tuple(parts))


def locate_part(name: str, parts_R3: Tensor, vocab_size: int) -> Tensor:
    """This rank's first column and the number of all columns, int64 `[2]`, of `exchange_parts`, without waiting for the
    device. The number is -1 where `read_part` would raise."""
    starts, sizes, checksums = parts_R3[parts_R3[:, 0].argsort()].unbind(1)
    divided = (starts == sizes.cumsum(0) - sizes).all() & (sizes > 0).all() & (checksums == checksums[0]).all()
    if len(sizes) > 1:
        divided &= (sizes < vocab_size).any()
    return torch.stack([parts_R3[_group(name).rank(), 0], torch.where(divided, sizes.sum(), -1)])


def gather_columns(x_NV: Tensor, part: VocabPart) -> Tensor:
    """All columns `[N, V]` of a matrix of which each rank holds its part."""
    equal = torch.nn.functional.pad(x_NV, (0, part.widest - part.size))
    by_rank = zip(all_gather(equal, part.group), part.parts, strict=True)
    ordered = sorted(((start, x[:, :size]) for x, (start, size) in by_rank), key=lambda each: each[0])
    return torch.cat([x for _, x in ordered], 1)


def all_gather(x: Tensor, name: str) -> Tensor:
    """Every rank's x, which has one shape and type on all ranks, as `[R, *x.shape]`."""
    from torch import distributed as dist

    group = _group(name)
    x = x.contiguous()
    out = x.new_empty((group.size(), *x.shape))
    # its name since torch 2.13
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    gather(out.view(-1), x.view(-1), group=group)
    return out


def all_reduce_sum_(x: Tensor, name: str) -> None:
    """x becomes the sum of all ranks' x."""
    from torch import distributed as dist

    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16):
        total = x.float()  # gloo does not add bfloat16 in every version
        dist.all_reduce(total, group=_group(name))
        x.copy_(total)
    else:
        dist.all_reduce(x, group=_group(name))


def _group(name: str) -> Any:
    """The group of this name. Raises KDError if it was destroyed."""
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    except (RuntimeError, ValueError, KeyError) as error:
        raise KDError(f"group: got {name!r}, which exists no more; expected a group that was not destroyed.") from error
