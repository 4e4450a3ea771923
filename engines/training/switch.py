"""What can be switched on in the training loop beside any stage that trains; torch-free.

A switch is one file in ``engines/training/switches``: a class that derives from ``Switch``, is decorated with ``@register`` and
carries a card of the family ``switch``. It is found by itself and named in ``training.switches`` of a spec. Its settings are
frozen; what it does in a stage is an ``Observer``, of which the loop makes one for each stage that trains.
"""

from __future__ import annotations

from engines.method import Configured


class Observer:
    """The live part of a switch in one stage. The loop calls it in this order::

        [restored] -> [before_step -> after_backward -> after_step]*

    Everything that must survive a pause goes into ``state`` (numbers, texts, lists, tensors by text), which each checkpoint holds.
    """

    ended = False
    """True: the stage ends before its budget is used up; the observer has told why."""

    def __init__(self, switch: Switch, loop):
        """``loop`` is the ``engines.training.loop.Trainer``: its model, context, optimizer, reporter and ``progress()``."""
        self.switch, self.loop, self.context = switch, loop, loop.context

    @property
    def state(self) -> dict:
        return self.context.state.setdefault(f"switch {self.switch.card.id}", {})

    def restored(self) -> None:
        """Weights, optimizer and ``state`` are those of a checkpoint."""

    def before_step(self) -> None:
        """The method has prepared the step; called again when a step is repeated."""

    def after_backward(self) -> None:
        """Gradients of the whole step are there, not yet clipped."""

    def after_step(self) -> None:
        """Weights have changed, ``context.step`` counts the step, gradients are still there."""

    def layers(self) -> dict[str, list]:
        """Figures for the layer map: ``{"frozen": [[layer, role, value], ...]}``."""
        return {}


class Switch(Configured):
    """Base of every switch. Subclasses are frozen dataclasses made by ``@register``."""

    def check(self, pipeline) -> None:
        """Raise ``InputError`` when this cannot be switched on beside these stages (a tuple of methods)."""

    def extra_bytes(self, profile, footprint) -> int:
        """Bytes held beside a stage of this ``Footprint`` on a model of this profile."""
        return 0

    def step_cost(self, profile, footprint) -> tuple[float, float]:
        """Floating-point operations and bytes moved that each optimizer step takes more, on the average."""
        return 0.0, 0.0

    def observer(self, loop) -> Observer:
        """What watches one stage."""
        raise NotImplementedError(f"{type(self).__name__} must say what watches a stage")
