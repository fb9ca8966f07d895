"""Sizes of the Triton kernels of top-k and draws: what a call of them gives each program. Needs no triton.

`Tuning` and `DrawTuning` are what may be changed for speed; the functions apply them to a call.
"""

from dataclasses import dataclass

# float32 bits that a logit of so many bytes never uses, by its type's name: a bisection need not look at them
UNUSED_BITS = {"bfloat16": 16, "float16": 13, "float32": 0}


class Tuning:
    """Sizes that affect speed only."""

    group = 128  # tokens a group; fewer for more than 128 top-k entries
    runs = 8  # runs of neighbouring tokens a group, of at least 8
    scan_block = 8192  # tokens a program
    scan_warps = 4
    pick_groups = 8  # a thread
    select_tile = 4096  # tokens at a time
    sift_tile = 1024  # the same
    select_warps = 4


class DrawTuning:
    """The same for the draws."""

    group = 512  # neighbouring tokens whose units are one sum
    block = 8192  # tokens a program
    warps = 4
    draw_warps = 2  # of the program of a draw


@dataclass(frozen=True)
class TopKSizes:
    """Of the kernels of one call. All but `parts`, `groups` and `take` are powers of two.

    A program of `_scan` reads `block` tokens, which are `block // group` groups. A group is `group // run` runs of
    `run` neighbouring tokens, `block // group * run` apart: group c of a block has the runs c, c + block // group, ...
    """

    group: int
    run: int
    block: int
    parts: int  # programs of `_scan` a row
    groups: int  # a row
    take: int  # groups that are picked, without those that tie
    candidates: int  # for top-k entries, at most
    tile: int  # groups that `_select` reads at a time
    sift_tile: int  # runs that `_sift` reads at a time
    scan_warps: int
    pick_warps: int
    select_warps: int
    finish_warps: int

    @property
    def groups_a_block(self) -> int:
        return self.block // self.group

    @property
    def picked(self) -> int:
        """Groups that are picked, at most: of the last block that has one which ties, all that tie."""
        return self.take + self.groups_a_block


def topk_sizes(vocab_size: int, entries: int) -> TopKSizes:
    """Sizes for rows of `vocab_size` logits and so many top-k entries."""
    group = Tuning.group
    for limit in (128, 256):
        group //= 2 if entries > limit else 1
    block = max(group, min(Tuning.scan_block, power_of_2(vocab_size)))
    parts = -(-vocab_size // block)
    groups = parts * (block // group)
    candidates = max(64, 2 * power_of_2(entries))
    return TopKSizes(
        group=group,
        run=min(group, max(8, group // Tuning.runs)),
        block=block,
        parts=parts,
        groups=groups,
        take=min(entries, groups),
        candidates=candidates,
        # at least 16: of few entries, many groups may tie
        tile=max(1, min(Tuning.select_tile // group, max(16, power_of_2(entries)))),
        sift_tile=min(Tuning.sift_tile // 8, candidates),
        scan_warps=Tuning.scan_warps,
        pick_warps=min(16, max(4, power_of_2(groups) // (32 * Tuning.pick_groups))),
        select_warps=Tuning.select_warps,
        finish_warps=max(1, min(8, candidates // 128)),
    )


@dataclass(frozen=True)
class DrawSizes:
    """Of the kernels of the draws. All but `parts` and `groups` are powers of two."""

    group: int  # neighbouring tokens whose units are one sum
    block: int  # tokens a program of `_weigh`
    parts: int  # its programs a row
    groups: int  # a row
    warps: int
    draw_warps: int


def draw_sizes(vocab_size: int) -> DrawSizes:
    """Sizes for rows of `vocab_size` logits."""
    group = min(DrawTuning.group, power_of_2(vocab_size))
    block = max(group, min(DrawTuning.block, power_of_2(vocab_size)))
    parts = -(-vocab_size // block)
    return DrawSizes(group, block, parts, parts * (block // group), DrawTuning.warps, DrawTuning.draw_warps)


def power_of_2(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(0, number - 1).bit_length()
