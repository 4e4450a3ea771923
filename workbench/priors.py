"""What is expected of a pipeline before any run of it is known: a rough gain from card flags, shapes and published figures.

Gains live on a scale where they add up and where models of unlike quality may be compared: the logarithm of base over result for
bits/byte (0.1 is about 10 % fewer bits), the difference of log-odds for accuracy. Positive is better. Torch-free and numpy-free.

Published figures are those of 7B language models: what a method costs another model is not even of that order at times (models that
have seen little for their size lose far less), which is why the 90 % interval around a prior is about as wide as the prior itself.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

ODDS_POWER = 2.2
"""Damage of zeroed weights grows with this power of s / (1 - s), as between 50, 60 and 70 % in the paper of Wanda."""
RECOVERY_UNITS = 40_000.0
"""Training units after which about half of the damage of pruning is repaired."""
ACCURACY_SCALE = 4.0
"""Log-odds of accuracy for each unit of log bits/byte: a loose exchange rate between the two metrics."""


@dataclass(frozen=True)
class Damage:
    """A published figure: the log-ratio of loss to the base at a reference setting, and where it stands."""

    log_ratio: float
    source: str
    at: tuple = ()
    """Of a claim: the (field, value) pairs of the stage that it was made for; sparsity and bits are understood."""


# Perplexity on WikiText2, unpruned or 16-bit against changed: log(ln after / ln before).
WANDA = "A Simple and Effective Pruning Approach for Large Language Models"
HALF_ZERO = {
    "wanda": Damage(0.132, f"{WANDA} (LLaMA-7B, half of the weights: perplexity 5.68 to 7.26)"),
    "magnitude": Damage(0.495, f"{WANDA} (LLaMA-7B, half of the weights by size: perplexity 5.68 to 17.29)"),
    "random": Damage(2.0, "no published figure: random zeros ruin a model"),
}
PATTERNS = {"2:4": 2.6, "4:8": 1.6}
"""Damage of fixed patterns over that of free ones of the same sparsity (Wanda's table: 11.53 and 8.57 against 7.26)."""
AWQ = "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration"
FOUR_BITS = {
    True: Damage(0.023, f"{AWQ} (Llama-2-7B, 4 bits by GPTQ: perplexity 5.47 to 5.69)"),
    False: Damage(0.027, f"{AWQ} (Llama-2-7B, 4 bits rounded to nearest: perplexity 5.47 to 5.73)"),
}
UNKNOWN_MASK = {True: 0.15, False: 0.4}
SHRUNK_HALF = 0.6


@dataclass(frozen=True)
class Stage:
    """What a prior and a distance need of a stage, the same for a planned and for a finished one.

    ``sparsity``, ``removed``: share of the weights inside blocks that this stage zeroes, or takes away; ``bits``: of packed weights,
    0 otherwise; ``units``: training tokens or examples; ``share``: trainable over all parameters.
    """

    method: str
    family: str = ""
    trains: bool = False
    sparsity: float = 0.0
    removed: float = 0.0
    bits: float = 0.0
    calibrated: bool = False
    units: float = 0.0
    share: float = 0.0
    pattern: str = ""

    @property
    def damages(self) -> bool:
        return self.sparsity > 0 or self.removed > 0 or self.bits > 0


@dataclass(frozen=True)
class Prior:
    """``trained`` and ``lost`` make up ``gain``; ``sources`` say on which published figures it rests."""

    trained: float
    lost: float
    sources: tuple[str, ...] = field(default=())

    @property
    def gain(self) -> float:
        return self.trained - self.lost


def _thumb(stage: Stage) -> tuple[float, str]:
    found, source = 0.0, ""
    if stage.sparsity > 0:
        known = HALF_ZERO.get(stage.method)
        half = known.log_ratio if known else UNKNOWN_MASK[stage.calibrated]
        odds = min(stage.sparsity, 0.99) / (1 - min(stage.sparsity, 0.99))
        found += half * odds**ODDS_POWER * PATTERNS.get(stage.pattern, 1.0)
        source = known.source if known else ""
    if stage.removed > 0:
        share = min(stage.removed, 0.99)
        found += SHRUNK_HALF * share / (1 - share)
    if stage.bits > 0:
        known = FOUR_BITS[stage.calibrated]
        found += known.log_ratio * 4.0 ** (4 - stage.bits)
        source = known.source if stage.bits < 8 else source
    return found, source


def damage(stage: Stage, claims: dict | None = None) -> tuple[float, str]:
    """Loss of one stage on the scale of log bits/byte, before anything repairs it, and its source (empty: only a rule of thumb)."""
    found, source = _thumb(stage)
    claim = (claims or {}).get(stage.method)
    if claim and found:
        there, _ = _thumb(dataclasses.replace(stage, **dict(claim.at)))
        found, source = (found * claim.log_ratio / there, claim.source) if there else (found, source)
    return found / (1 + 0.5 * found), source


def training(stage: Stage, task: str, familiar: bool) -> float:
    """Gain of one training stage: it grows with the logarithm of what is seen, and somewhat with the share that is trained."""
    if stage.units <= 0:
        return 0.0
    capacity = max(0.5, min(1.0, 1.0 + 0.12 * math.log10(max(stage.share, 1e-6))))
    if task == "causal-lm":
        return (0.02 if familiar else 0.18) * capacity * math.log2(1 + stage.units / 8000.0) / 5
    top = 0.3 if familiar else 3.0
    return top * capacity * (1 - 2.0 ** (-stage.units / 1500.0))


def prior(stages, *, task: str, familiar: bool = False, claims: dict | None = None) -> Prior:
    """The gain expected of ``stages`` in order.

    Args:
        familiar: the model was made on this data, so that there is little left to learn.
        claims: method -> ``Damage`` measured here (``claims_of``), in place of the published one.
    """
    scale = 1.0 if task == "causal-lm" else ACCURACY_SCALE
    trained, open_loss, sources = 0.0, 0.0, []
    for stage in stages:
        lost, source = damage(stage, claims)
        open_loss += scale * lost
        if source and source not in sources:
            sources.append(source)
        if stage.trains:
            trained += training(stage, task, familiar)
            units = stage.units * (1.0 if task == "causal-lm" else 100.0)  # an example teaches more than a token
            open_loss *= 1 / (1 + math.sqrt(units / RECOVERY_UNITS))
    return Prior(trained, open_loss, tuple(sources))


def claims_of(store) -> dict[str, Damage]:
    """Figures of the claims in this database that can serve as a prior: those with numbers ``base`` and ``ours`` (or ``paper``).

    A claim that was not reproduced speaks with what was measured, never with the paper's figure.
    """
    found = {}
    for row in store.claims() if store is not None else ():
        value = row.get("ours") if isinstance(row.get("ours"), (int, float)) else None
        if value is None and row.get("verdict") != "not reproduced" and isinstance(row.get("paper"), (int, float)):
            value = row["paper"]
        base = row.get("base")
        if value is None or not isinstance(base, (int, float)) or row.get("metric", "bits/byte") != "bits/byte" or min(base, value) <= 0:
            continue
        if value > base:
            at = {k: v for k, v in (row.get("settings") or {}).items() if k in ("sparsity", "bits") and isinstance(v, (int, float))}
            found[row["method"]] = Damage(math.log(value / base), f"claim {row['key']} of {row['method']}", tuple(at.items()))
    return found


def spread(found: Prior, task: str) -> tuple[float, float]:
    """Standard deviations of the training part and of the loss: priors are good to about half of themselves."""
    least = 1.0 if task == "causal-lm" else ACCURACY_SCALE
    return 0.55 * abs(found.trained), 0.65 * abs(found.lost) + 0.003 * least * (found.lost > 0)
