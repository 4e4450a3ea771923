"""Int4 weights in groups of columns."""

from __future__ import annotations

from engines.errors import InputError
from engines.method import AUTO, Card, Method, hyper, register
from engines.quantization import _shared
from engines.shapes import file_bytes

GROUPS = (32, 64, 128, 256)


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


@register
class Int4(Method):
    """Round-to-nearest int4 of every matrix inside the blocks, in groups of columns, computed by torch's int4 kernels."""

    card = Card(
        id="int4", name="Int4 weights", family="quantization",
        title="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers", year=2022,
        summary="Stores weights as 4-bit integers with a scale and a zero-point per group of columns; about an eighth of the fp32 size.",
        needs=("no data and no training", "widths that 32 divides"),
        cannot=("weights can be neither trained nor pruned afterwards", "costs quality that GPTQ saves in part",
                "faster than bf16 for few tokens at a time (generation), not for long inputs"),
        packs=True,
        differs="Only the paper's group-wise rounding of weights; activations stay 16-bit and layers are not distilled. Scales carry five "
                "significant bits, so that zero stays exactly zero in the kernel.")

    group: int = hyper(AUTO, "columns that share a scale: smaller is more exact and larger on disk; auto takes 64, or 32 where a width "
                             "asks for it, or more when the size limit does", choices=GROUPS, lever="size_mb")
    symmetric: bool = hyper(False, "zero-point in the middle of the grid instead of one per group", advanced=True)
    mse: bool = hyper(False, "shrink each group's range to the least sum of |error|^2.4 instead of its extremes", advanced=True)
    embedding: str = hyper(AUTO, "token embedding and output head: int8, or kept in bf16; auto packs them from 5 % of the parameters on, "
                                 "and always when the size limit asks for it", choices=("int8", "keep"), lever="size_mb")
    skip: str = hyper("", "layers left in bf16: roles or paths, separated by commas", advanced=True)

    def check(self, profile):
        _shared.check(self, profile)
        check_group(self, profile)

    def _group(self, profile) -> int:
        if self.group != AUTO:
            return self.group
        fits = valid_groups(profile, self.skip)
        return 64 if 64 in fits or not fits else fits[0]

    def _packed(self, profile):
        group = self._group(profile)
        return {m.name: _shared.int4_tensors(m.name, m.out, m.inp, 4, group, self.symmetric)
                for m in _shared.chosen(profile, self.skip)}

    def _stored(self, profile):
        return _shared.stored(profile, self._packed(profile), _shared.packs_table(profile, self.embedding))

    def fit(self, profile, budget):
        return fit_size(self, profile, budget)

    def footprint(self, profile, batch):
        return _shared.footprint(profile, batch, self._stored(profile), extra=13 * _shared.largest(profile))

    def apply(self, model, context):
        from engines import models
        from engines.layers.int4 import Int4Linear, quantize_groups

        self.check(context.profile)
        group = self._group(context.profile)
        for m, old in models.matrices(model):
            if _shared.skipped(m, self.skip):
                continue
            w = models.weight(old).detach().float()
            mask = _shared.kept(m, w, context)
            w = w * mask if mask is not None else w
            new = Int4Linear(m.inp, m.out, old.bias is not None, group, 4, self.symmetric, m.conv1d, w.device)
            new.fill(*quantize_groups(w, 4, group, self.symmetric, self.mse))
            _shared.note(context, m, 4.0, _shared.relative(w, new.dequantize()))
            _shared.swap(model, m.name, old, new)
        _shared.finish_packing(model, context, _shared.packs_table(context.profile, self.embedding), "weight-only")
        return model

    def layers(self, model, context):
        return _shared.figures(context)


def fit_size(method, profile, budget, options: list[dict] | None = None):
    """Take the first of ``options`` (changes to ``method``, best quality first) whose file stays under the size limit.

    Without ``options`` these are groups from 64 on (or 32) and then an int8 token table.

    Returns:
        (the method without ``auto``, the reason for each choice).
    """
    if options is None:
        fits = [g for g in valid_groups(profile, method.skip) if g >= 64] or [32]
        groups = [method.group] if method.group != AUTO else fits
        options = [{"group": g} for g in groups]
    tables = [method.embedding]
    if method.embedding == AUTO:
        tables = ["int8"] if _shared.packs_table(profile, AUTO) else ["keep", "int8"] if _shared.tables(profile) else ["keep"]
    options = [{**change, "embedding": table} for table in tables for change in options]
    limit = budget.size_mb * 1e6 if budget.size_mb is not None else None
    tried = [method.replace(**change) for change in options]
    best = tried[0]
    if limit is not None:
        sizes = [file_bytes(t._stored(profile)) for t in tried]
        best = next((t for t, size in zip(tried, sizes) if size <= limit), tried[min(range(len(tried)), key=sizes.__getitem__)])
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
