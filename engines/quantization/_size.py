"""Groups that divide the widths of a model, and the choice of bits, group and table under a limit on size."""

from __future__ import annotations

import math

from engines.errors import InputError
from engines.method import AUTO
from engines.quantization import _shared
from engines.shapes import file_bytes

GROUPS = (32, 64, 128, 256)
"""Widths of a group that the kernels know (``engines.layers.int4`` holds the same, but imports torch)."""


def check_group(method, profile) -> None:
    """Refuse a group that does not divide the width of a layer, with what would work.

    Raises:
        InputError: as said.
    """
    group, id = method.group, method.card.id
    wanted = 32 if group == AUTO else group
    bad = [m for m in _shared.chosen(profile, method.skip) if (m.inp % wanted if wanted else m.inp % 32)]
    if not bad:
        return
    roles = ", ".join(dict.fromkeys(m.role for m in bad))
    widths = ", ".join(str(w) for w in dict.fromkeys(m.inp for m in bad))
    fits = valid_groups(profile, method.skip)
    if fits:
        remedy = f"Set group to {' or '.join(str(g) for g in fits)}, or leave those layers out with skip: {roles}"
    elif len(bad) < len(_shared.chosen(profile, method.skip)):
        remedy = f"No group divides it: leave those layers out with skip: {roles}, or use int8"
    else:
        remedy = "No group divides it: use int8"
    raise InputError(f"{id}.group", group, f"a width of {widths} ({roles}) cannot be cut into groups of {wanted or 'at least 32'}", remedy)


def valid_groups(profile, skip: str) -> list[int]:
    """The groups that divide the width of every layer to be packed."""
    widths = {m.inp for m in _shared.chosen(profile, skip)}
    return [g for g in GROUPS if all(w % g == 0 for w in widths)]


def usual_group(profile, skip: str) -> int:
    """The group taken without a limit on size: 64, or 32 where a width asks for it."""
    fits = valid_groups(profile, skip)
    return 64 if 64 in fits or not fits else fits[0]


def too_large(method, budget, least: int) -> InputError:
    """The refusal of a size limit that no choice of this method keeps; ``least`` bytes are the smallest possible."""
    smaller = {"int8": "use int4 or gptq, ", "int4": "use gptq with fewer bits, "}.get(method.card.id, "")
    return InputError("budget.size_mb", budget.size_mb, f"{method.card.name} needs at least {least / 1e6:.2f} MB here",
                      f"Raise the limit to {math.ceil(least / 1e4) / 100:.2f}, {smaller}or remove heads and channels first with structured")


def fit_size(method, profile, budget, options: list[dict] | None = None):
    """Take the first of ``options`` (changes to ``method``, best quality first) whose file stays under the size limit.

    Without ``options`` these are groups from 64 on (or 32) and then an int8 token table.

    Returns:
        (the method without ``auto``, the reason for each choice).

    Raises:
        InputError: none of them does.
    """
    if options is None:
        fits = [g for g in valid_groups(profile, method.skip) if g >= 64] or [32]
        groups = [method.group] if method.group != AUTO else fits
        options = [{"group": g} for g in groups]
    tables = [method.embedding]
    if method.embedding == AUTO:
        tables = ["int8"] if _shared.packs_table(profile, AUTO) else ["keep", "int8"] if _shared.tables(profile) else ["keep"]
    # An int8 table costs next to nothing in quality, so it comes before fewer bits or wider groups.
    options = [{**change, "embedding": table} for change in options for table in tables]
    limit = budget.size_mb * 1e6 if budget.size_mb is not None else None
    tried = [method.replace(**change) for change in options]
    best = tried[0]
    if limit is not None:
        sizes = []
        for best in tried:
            sizes.append(file_bytes(best._stored(profile)))
            if sizes[-1] <= limit:
                break
        else:
            if any(getattr(method, name, None) == AUTO for name in ("bits", "group", "embedding")):
                raise too_large(method, budget, min(sizes))
            best = tried[0]
    reasons = {}
    for name in ("bits", "group", "embedding"):
        if getattr(method, name, None) != AUTO:
            continue
        if limit is not None and getattr(best, name) != getattr(tried[0], name):
            reasons[name] = f"{getattr(best, name)} to stay under {budget.size_mb:g} MB"
        elif name == "embedding":
            share = sum(t.size for t in _shared.tables(profile)) / max(1, profile.parameters)
            reasons[name] = f"the token table is {share:.0%} of the parameters" if share else "there is no token table"
        elif name == "group":
            reasons[name] = "divides every layer's width" if best.group else "one grid per row"
        else:
            reasons[name] = "the usual choice where size sets no limit"
    return best, reasons
