"""Readable names for runs: an adjective and a noun from the foundry, and a number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

ADJECTIVES = (
    "annealed brazed bright bronze burnished cast chased clean cold copper cupric drawn dull etched fired flint forged fused "
    "gilded hammered hardened hot iron keen leaded lean malleable milled molten nickel pale patinated peened pewter "
    "plated polished quenched raw red riveted rolled rough rugged silver sintered slow smelted smooth soldered sound "
    "stamped steady steel stout strong supple swaged tempered tinned tough true turned warm welded white wrought zinc").split()
NOUNS = (
    "alloy anvil auger awl barrel bell bellows billet blank bloom bolt boss burr bushing casting chisel chuck clamp clinker coke "
    "collar core crank crucible die dross ember fettle file flange flask flux furnace gasket gauge hammer hearth "
    "hinge ingot jig kiln ladle lathe lever mallet mandrel mill mould nail pattern pig pinion plate punch "
    "rasp riser rivet runner scale shim slag spindle sprue spur swage tap tongs tuyere vice washer weld").split()


def name(taken: Iterable[str] | Callable[[str], bool] = (), rng: random.Random | None = None) -> str:
    """A name that is not yet taken, such as ``quenched-ingot-41``.

    Args:
        taken: the names in use, or a function that says whether one is.
        rng: for a repeatable choice; default: the operating system's randomness.
    """
    rng = rng or random.SystemRandom()
    used = taken if callable(taken) else frozenset(taken).__contains__
    digits = 2
    while True:
        for _ in range(50):
            found = f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}-{rng.randrange(10 ** (digits - 1), 10 ** digits)}"
            if not used(found):
                return found
        digits += 1
