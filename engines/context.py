"""What a stage of a running pipeline can reach: data, device, progress, its own memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.budget import Budget
from engines.reporter import Reporter


@dataclass
class Context:
    """Passed to every hook of a method.

    ``state`` belongs to the stage and is saved with each checkpoint; ``masks`` belongs to the pipeline:
    parameter name (``model.layers.0.mlp.up_proj.weight``) -> bool tensor of the weight's shape, True = kept.
    """

    task: str
    data: Any
    """``engines.data.tokens.TaskData``: ``train``, ``evaluation``, ``calibration(n, length)``."""
    tokenizer: Any
    """Tokenizer or image processor of the model."""
    profile: Any
    """``engines.profile.ModelProfile`` of the stage's input model."""
    reporter: Reporter
    budget: Budget = field(default_factory=Budget)
    device: str = "cpu"
    compute: str = "float32"
    """Type of the matrix products in training: float32 or bfloat16."""
    seed: int = 0
    stage: int = 0
    folder: Path | None = None
    """Where the stage may write large files; None in tests."""
    state: dict[str, Any] = field(default_factory=dict)
    masks: dict[str, Any] = field(default_factory=dict)
    progress: float = 0.0
    """Share of this training stage's budget used, 0 to 1."""
    step: int = 0
    """Optimizer steps done in this stage."""
    total_steps: int | None = None
    """Optimizer steps of this stage when the limit is in steps or tokens; an estimate under minutes."""
    resuming: bool = False
    """True while ``apply`` is repeated for a resume: weights and state are restored afterwards."""
    checkpoint: Path | None = None
    """What is resumed from; a method whose parameters change shape on the way looks into it (``checkpoint.state_of``) in ``apply``."""
    optimizer: Any = None
    """The optimizer of the training stage, from the first step on; groups may be added and states dropped. A group's ``born`` is the
    progress at which its own schedule of the learning rate begins."""

    def generator(self, salt: int = 0):
        """A torch.Generator that depends on the seed, the stage and ``salt`` only."""
        import torch
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.stage * 7919 + salt) % (2**63 - 1))

    def calibration(self, sequences: int, length: int | None = None) -> list[dict]:
        """``sequences`` model inputs without padding (one dict of tensors each, leading dimension 1), from training data."""
        return self.data.calibration(sequences, length, self.seed)
