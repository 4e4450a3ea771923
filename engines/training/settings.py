"""Resolved knobs of the training loop: no ``auto`` is left."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainSettings:
    """What the loop needs to know; made by the planner from ``workbench.spec.Training``, or by hand in tests."""

    lr: float = 1e-3
    head_lr: float = 0.0
    """Peak rate of the classification head; 0: that of everything else. A new head learns slowly at the rates that adapters bear."""
    batch: int = 16
    """Rows of one optimizer step."""
    length: int = 256
    accumulation: int = 1
    checkpointing: bool = False
    precision: str = "fp32"
    """fp32 or bf16 (autocast; weights and optimizer stay as they are held)."""
    schedule: str = "cosine"
    warmup: float = 0.03
    final: float = 0.0
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    evaluations: int = 4
    items: int = 256
    checkpoint_seconds: float = 30.0
    loss_chunk: int = 2048
    """Rows of logits held at a time (causal-lm)."""
    switches: tuple = ()
    """``engines.training.switch.Switch`` objects, in the order in which they are called."""
