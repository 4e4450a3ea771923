"""Int4 weights in groups of columns."""

from __future__ import annotations

from engines.method import AUTO, Card, Method, hyper, register
from engines.quantization import _shared
from engines.quantization._size import GROUPS, check_group, fit_size, usual_group


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
        return usual_group(profile, self.skip) if self.group == AUTO else self.group

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
