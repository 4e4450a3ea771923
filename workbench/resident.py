"""Which bytes of a run's process are resident: what is in use, and what the C library keeps of what was.

On a CPU the limit and the measured peak are those of the resident set. Blocks below ``MAPPED`` bytes live in the heap: there
are holes between them, and most of what is freed stays with the process and is used again. Larger blocks are mappings of their
own, which go back to the system at once. A GPU's allocator reports live tensors, so there nothing is added.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engines import activations
from engines.profile import Batch, ModelProfile

MAPPED = 32 * 2**20
"""The GNU C library's largest threshold (on 64 bits) from which a block is a mapping of its own; smaller ones raise it to their size."""
FRAGMENTS = 1.4
"""Resident bytes for each byte of live small blocks: holes between blocks of unlike sizes."""
FRAGMENTS_VARIED = 2.0
"""The same where micro-batches have all lengths: what one freed seldom fits the next."""
RECOMPUTED = 2.2
"""The same under checkpointing, where a block's activations and the gradients inside it exist together."""
KEPT = 0.9
"""Share of a phase's small blocks that stays resident after they were freed."""
UNFIT = 0.6
"""Share of what an evaluation left that the next phase or evaluation cannot use again: its blocks have other sizes."""
UNPACKED = 4 * 2**20
"""Entries of a packed table that are unpacked at a time (``engines.layers.int8``)."""
TOKENIZER_BYTES_PER_TOKEN = 60
"""Ids, offsets and masks that the tokenizer holds for a text while it is being encoded."""


@dataclass(frozen=True)
class Need:
    """Temporary bytes of a phase as they are resident, and how many of them are small blocks."""

    activations: int = 0
    logits: int = 0
    small: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.logits


def resident(live: tuple[int, int], logits: tuple[int, int], loose: float) -> Need:
    """Both given as (bytes, of which in large blocks); ``loose`` is the factor of the small ones."""
    small = [loose * max(0, whole - large) for whole, large in (live, logits)]
    return Need(round(live[1] + small[0]), round(logits[1] + small[1]), round(sum(small)))


def looseness(task: str, device: str, trains: bool, checkpointing: bool) -> float:
    """Resident bytes for each byte of a stage's small blocks."""
    if device == "cuda":
        return 1.0
    if not trains:
        return FRAGMENTS
    varied = FRAGMENTS_VARIED if task == "text-classification" else FRAGMENTS
    return max(varied, RECOMPUTED) if checkpointing else varied


def evaluation(profile: ModelProfile, batch: Batch, device: str, task: str, packed=None) -> Need:
    """One evaluation batch; ``packed`` is the method whose integer layers compute it, or None."""
    key = ("evaluation", batch, device, task, packed)
    if key not in profile.memo:
        profile.memo[key] = _evaluation(profile, batch, device, task, packed)
    return profile.memo[key]


def _evaluation(profile: ModelProfile, batch: Batch, device: str, task: str, packed) -> Need:
    mapped = MAPPED if device != "cuda" else 0
    live = activations.forward_bytes(profile, batch)
    large = activations.forward_bytes(profile, batch, above=mapped) if mapped else live
    logits = activations.logit_bytes(profile, batch)
    wide = activations.logit_bytes(profile, batch, above=mapped) if mapped else logits
    if packed is not None and mapped and task != "causal-lm":
        # Integer products of many rows are made in pieces that are joined: for a moment the result is there twice.
        live += 4 * profile.widest * batch.tokens
    elif packed is not None and mapped:
        # Each matrix in turn is unpacked to float32, a table in parts of at most ``UNPACKED`` entries.
        live += 8 * min(UNPACKED, max(profile.widest, profile.vocab) * profile.hidden)
    return resident((live, large), (logits, wide), looseness(task, device, task == "text-classification", False))


def training(profile: ModelProfile, batch: Batch, live: int, logits: int, loose: float, device: str, trains: bool) -> Need:
    """One training micro-batch (or calibration) whose method counts ``live`` bytes of activations and ``logits`` of the loss."""
    if device == "cuda":
        return Need(live, logits, 0)
    if not trains:  # calibration data and activations are one tensor a sequence
        return resident((live, 0), (logits, 0), loose)
    share = activations.train_bytes(profile, batch, above=MAPPED) / max(1, activations.train_bytes(profile, batch))
    each = min(batch.tokens, batch.chunk) * profile.vocab * (2 if batch.compute == "bfloat16" else 4)
    wide = (logits if each >= MAPPED else 2 / 3 * logits if 2 * each >= MAPPED and batch.compute == "bfloat16" else 0) if logits else 0
    return resident((live, round(share * live)), (logits, round(wide)), loose)


@dataclass
class Kept:
    """What the C library has not given back, as the phases go by. ``roomy``: a CPU's process."""

    roomy: bool
    tokenized: int = 0
    held: int = 0
    history: list = field(default_factory=list)

    def beside(self, small: int) -> int:
        """Bytes kept of earlier phases that a phase with ``small`` bytes of small blocks does not use again."""
        return max(0, self.held - small, self.tokenized - small) if self.roomy else 0

    def after(self, small: int, share: float) -> None:
        """A phase with ``small`` bytes of small blocks has ended."""
        if self.roomy:
            self.held = max(self.held, round(share * small), self.tokenized)
