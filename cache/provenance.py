"""Where a cache comes from: teacher, tokenizer, chat template, data set, capture plan and seed, each with its hash.

spec.json holds it as three texts (`teacher`, `tokenizer`, `dataset`), which the hash of the settings covers, and field
by field (`provenance`). The texts are written and parsed here and nowhere else.
"""

import re
from dataclasses import dataclass
from typing import Any

TEXTS = ("teacher", "tokenizer", "dataset", "notes")  # the texts of a spec
_SHA256 = "[0-9a-f]{64}"
_HASH_IN_TEXT = re.compile(rf"\bsha256 ({_SHA256})\b")
_TOKENIZER = re.compile(
    r"tokenizer (?P<tokenizer>.{1,1000}?)(?:, template (?P<template>.{1,1000}?))?, loss_on (?P<loss_on>all|assistant)"
    r"(?:, text_documents (?P<text_documents>[a-z-]+))?",
    re.DOTALL,
)
_DATASET = re.compile(
    rf"sha256 (?P<dataset_sha256>{_SHA256})"
    rf"(?:, plan (?P<plan_sha256>{_SHA256}), draws of seed (?P<draw_seed>[0-9]{{1,20}}))?"
)


@dataclass(frozen=True)
class Identity:
    """The identity of a teacher, a tokenizer or a chat template.

    fingerprint: one line with everything that affects its output. name: its name, "" if it has none. sha256:
    of its contents, 64 hexadecimal digits; None where the fingerprint has none.
    """

    fingerprint: str
    name: str = ""
    sha256: str | None = None

    @classmethod
    def of(cls, fingerprint: str) -> "Identity":
        """The identity with this fingerprint: "<name>, ..., sha256 <digits>, ...", each part optional."""
        found = _HASH_IN_TEXT.search(fingerprint)
        name = "" if fingerprint.startswith("sha256 ") else fingerprint.partition(",")[0]
        return cls(fingerprint, name, found[1] if found else None)


@dataclass(frozen=True)
class Provenance:
    """The teacher and the data that a cache was captured from. Fields are None where they are unknown or do not apply.

    teacher: the model. tokenizer, template: what turned text or messages into tokens.
    loss_on: which positions of a conversation count: "all" or "assistant".
    text_documents: what a document of a text file is, unless it is a line: "blank-line" or "file".
    dataset_sha256: of the documents or examples. plan_sha256: of the capture plan (plan.json).
    draw_seed: the seed of the draws.
    """

    teacher: Identity | None = None
    tokenizer: Identity | None = None
    template: Identity | None = None
    loss_on: str | None = None
    text_documents: str | None = None
    dataset_sha256: str | None = None
    plan_sha256: str | None = None
    draw_seed: int | None = None

    @property
    def tokens(self) -> str | None:
        """What caches share whose token ids mean the same: the tokenizer by its hash, or its whole fingerprint if that
        has none. Not where documents end, the chat template, or which positions count. None if it is unknown."""
        return None if self.tokenizer is None else self.tokenizer.sha256 or self.tokenizer.fingerprint

    def texts(self) -> dict[str, str]:
        """The same as the texts `teacher`, `tokenizer` and `dataset` of a spec."""
        chosen = {"tokenizer": self.tokenizer, "template": self.template}
        parts = {name: identity.fingerprint for name, identity in chosen.items() if identity}
        parts |= {"loss_on": self.loss_on or "", "text_documents": self.text_documents or ""}
        dataset = ""
        if self.dataset_sha256:
            dataset = f"sha256 {self.dataset_sha256}"
            if self.plan_sha256:
                dataset += f", plan {self.plan_sha256}, draws of seed {self.draw_seed}"
        return {
            "teacher": self.teacher.fingerprint if self.teacher else "",
            "tokenizer": ", ".join(f"{name} {text}" for name, text in parts.items() if text) if self.tokenizer else "",
            "dataset": dataset,
        }

    @classmethod
    def from_texts(cls, teacher: str, tokenizer: str, dataset: str) -> "Provenance":
        """The provenance in the texts of a spec. Free text is a fingerprint; a free dataset text leaves fields None."""
        values: dict[str, Any] = {"teacher": Identity.of(teacher) if teacher else None}
        if match := _TOKENIZER.fullmatch(tokenizer):
            values |= match.groupdict()
            values |= {n: Identity.of(values[n]) for n in ("tokenizer", "template") if values[n]}
        elif tokenizer:
            values["tokenizer"] = Identity.of(tokenizer)
        if match := _DATASET.fullmatch(dataset):
            values |= match.groupdict()
            values["draw_seed"] = None if values["draw_seed"] is None else int(values["draw_seed"])
        return cls(**values)
