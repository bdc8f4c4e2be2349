"""Whether the frozen weights of a file are its base model's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data_prep.errors import UserError
from pipeline.released.files import ModelWeights


@dataclass
class FrozenCheck:
    """Compares a file's frozen weights with the base's, by hash of their bytes in the wider of both types."""

    base: ModelWeights
    tables: tuple[str, ...]
    """Weights with a row for each token"""
    tokens: int
    """Of the base's tokenizer; rows after them are the trainer's own"""
    seen: int = 0
    changed: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)
    """Equal to the base's weights in bf16, which is what the released trainer loads"""
    broken: list[str] = field(default_factory=list)
    """With values that are no finite numbers, in rows that the trainer added too"""

    def see(self, name: str, tensor: Tensor) -> None:
        self.seen += 1
        if not tensor.isfinite().all():
            self.broken.append(name)
        theirs = self.base[name]
        if name in self.tables:
            rows = min(self.tokens, len(theirs))
            tensor, theirs = tensor[:rows], theirs[:rows]
        wide = torch.promote_types(tensor.dtype, theirs.dtype)
        ours = digest(tensor.to(wide))
        if ours != digest(theirs.to(wide)):
            alike = ours == digest(theirs.to(torch.bfloat16).to(wide))
            (self.rounded if alike else self.changed).append(name)

    def judge(self, base: str, export: str, allow_changed: bool) -> None:
        """Raise UserError where the export would not be the file's model, or its base another than said."""
        if self.broken:
            raise UserError(f"{len(self.broken)} weights have NaN or infinite values, such as {self.broken[0]}")
        if self.changed and not allow_changed:
            names = ", ".join(self.changed[:8]) + (f" and {len(self.changed) - 8} more" if self.changed[8:] else "")
            raise UserError(
                f"{len(self.changed)} of {self.seen} frozen weights are not those of {base}: {names};"
                " --allow_changed_base true takes them as they are into a merged export"
            )
        if self.rounded and export == "adapter":
            raise UserError(
                f"{len(self.rounded)} frozen weights are those of {base} rounded to bf16, such as {self.rounded[0]}:"
                " an adapter would run on others; use --export merged"
            )

    def describe(self, base: str) -> str:
        same = self.seen - len(self.changed) - len(self.rounded)
        parts = [f"{same} of {self.seen} frozen weights equal those of {base}"]
        parts += [f"{len(self.rounded)} equal them in bf16"] if self.rounded else []
        parts += [f"{len(self.changed)} do not ({', '.join(self.changed[:3])}, ...)"] if self.changed else []
        return ", ".join(parts)


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().data).digest()
