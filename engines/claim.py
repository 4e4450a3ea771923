"""What a paper says of a method, in a form that can be checked here: two stages, one measure, one expectation; torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

MEASURES = {
    "quality": "the main metric on held-out items after equal training",
    "seconds": "median seconds of a training step",
    "duration": "seconds of the whole training, which a switch may end early",
    "memory": "peak bytes of training above the loaded model: gradients, optimizer, activations",
    "optimizer": "bytes of the optimizer's state at the end",
    "trainable": "trained parameters",
    "repetition": "share of repeated tokens in greedy continuations of held-out texts after equal training",
    "entropy": "mean bits of the next token's distribution on held-out texts after equal training",
    "forgetting": "the main metric on held-out items of other data, which the model knew before, after equal training",
    "merging": "what the main metric loses on each adapter's own passages when the adapters of all parts are added to one model",
}
SCORED = ("quality", "forgetting", "merging")
"""Measures with a figure per item and seed: better, or not worse by a margin; all others are ratios."""
EXPECTATIONS = {
    "better": "better than the other side",
    "not worse": "not worse than the other side by more than the margin",
    "at most": "at most this factor of the other side",
}

LARGER = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64,
          "vocab_size": 8192, "tie_word_embeddings": False}
"""``Claim.shape`` of 20.5 M parameters for claims on memory: of full fine-tuning's peak, gradients and moments are 245 of 350 MB there, on the
bundled 5.3 M only 64 of 138 (docs/BENCHMARKS.md)."""


def steps_taken(measure: str, steps: int) -> int:
    """Steps that an experiment really makes of a claim's ``steps``: a peak or the time of a step shows itself in fewer."""
    if measure == "memory":
        return max(6, min(12, steps))
    return max(12, steps // 4) if measure in ("seconds", "optimizer", "trainable") else steps


@dataclass(frozen=True)
class Claim:
    """One claim of one paper. A method lists its claims in ``claims``.

    Raises:
        ValueError: a measure or expectation that is not known, or a stage without a method.
    """

    key: str
    """Tells the claims of one method apart: ``above-lora``."""
    says: str
    """The paper's sentence in our words, with its figure and setting."""
    ours: dict = field(default_factory=dict)
    """The stage of the method: ``{"method": "bone", "rank": 16}``; with switches: ``{..., "training": {"switches": ["grades"]}}``."""
    against: dict = field(default_factory=dict)
    """The stage that it is compared with; both get the same search over learning rates."""
    measure: str = "quality"
    expect: str = "better"
    factor: float = 1.0
    """For ``at most``."""
    margin: float = 0.01
    """For ``not worse``: relative to the other side's value."""
    model: str = "stdlib-lm"
    data: str = "python-docs"
    steps: int = 60
    batch: int = 4
    length: int = 128
    precision: str = "bf16"
    rates: tuple[float, ...] = (0.33, 1.0, 3.0)
    """Factors on each side's own usual learning rate."""
    head_lr: float = 0.0
    """Rate of a classification head on both sides; 0: that of the method, which then decides how fast a new head learns."""
    before: tuple[dict, ...] = ()
    """Training-free stages that both sides start from (a pruned model to recover)."""
    parts: int = 1
    """For ``merging``: groups of passages that one adapter each is trained on."""
    elsewhere: str = ""
    """For ``forgetting``: the data that must not be forgotten; nothing is trained on them."""
    shape: dict = field(default_factory=dict)
    """Changes to the model's config.json (``{"hidden_size": 1024}``) for speed and memory: its weights are random then."""
    differs: str = ""
    """How this setting differs from the paper's."""
    not_comparable: str = ""
    """Why no experiment of this size can say anything; nothing is run then."""

    def __post_init__(self):
        if self.measure not in MEASURES or self.expect not in EXPECTATIONS:
            raise ValueError(f"claim {self.key}: measure is one of {tuple(MEASURES)}, expect one of {tuple(EXPECTATIONS)}")
        if not self.not_comparable and not (self.ours.get("method") and self.against.get("method")):
            raise ValueError(f"claim {self.key}: both sides need a method")
        if self.expect == "at most" and self.measure in SCORED:
            raise ValueError(f"claim {self.key}: {self.measure} is compared with better or not worse")
        if (self.measure == "merging") != (self.parts > 1):
            raise ValueError(f"claim {self.key}: merging takes two parts or more, and only merging takes parts")
        if (self.measure == "forgetting") != bool(self.elsewhere):
            raise ValueError(f"claim {self.key}: forgetting is scored elsewhere, and only forgetting is")
        if self.shape and self.measure not in ("seconds", "memory", "optimizer", "trainable"):
            raise ValueError(f"claim {self.key}: a model with random weights says nothing of {self.measure}")
