"""Int8 weights with one scale per output row."""

from __future__ import annotations

from engines.method import AUTO, Card, Method, hyper, register
from engines.quantization import _shared
from engines.quantization._size import fit_size

BY_TASK = "by-task"


def mode_for(mode: str, task: str) -> str:
    """``by-task``: exact activations where one token at a time is generated, int8 activations where whole inputs are read."""
    if mode != BY_TASK:
        return mode
    return "weight-only" if task == "causal-lm" else "dynamic"


@register
class Int8(Method):
    """Round-to-nearest int8 of every matrix inside the blocks, computed by integer kernels."""

    card = Card(
        id="int8", name="Int8 weights", family="quantization",
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", year=2018,
        summary="Stores weights as 8-bit integers with one scale per output row; a quarter of the fp32 size, faster at once.",
        needs=("no data and no training",),
        cannot=("weights can be neither trained nor pruned afterwards", "norms, biases and the task head stay bf16"),
        packs=True,
        differs="Weights are symmetric per output row and rounded to nearest after training; activations stay as they are (weight-only) or "
                "are rounded per token at run time (dynamic), without calibration. The paper trains with simulated rounding and "
                "calibrates fixed ranges.")

    mode: str = hyper(BY_TASK, "activations: as they are (weight-only, W8A16), rounded to int8 per token (dynamic, W8A8: faster on many rows), "
                               "or by task: weight-only for causal-lm, dynamic for classification",
                      choices=(BY_TASK, "weight-only", "dynamic"))
    embedding: str = hyper(AUTO, "token embedding and output head: int8, or kept in bf16; auto packs them from 5 % of the parameters on, "
                                 "and always when the size limit asks for it", choices=("int8", "keep"), lever="size_mb")
    skip: str = hyper("", "layers left in bf16: roles or paths, separated by commas", advanced=True)

    def check(self, profile):
        _shared.check(self, profile)

    def _packed(self, profile):
        return {m.name: _shared.int8_tensors(m.name, m.out, m.inp) for m in _shared.chosen(profile, self.skip)}

    def _stored(self, profile):
        return _shared.stored(profile, self._packed(profile), _shared.packs_table(profile, self.embedding))

    def fit(self, profile, budget):
        return fit_size(self, profile, budget, [{}])

    def footprint(self, profile, batch):
        return _shared.footprint(profile, batch, self._stored(profile), extra=9 * _shared.largest(profile))

    def apply(self, model, context):
        from engines import models
        from engines.layers.int8 import Int8Linear

        self.check(context.profile)
        mode = mode_for(self.mode, context.task)
        for m, old in models.matrices(model):
            if _shared.skipped(m, self.skip):
                continue
            w = models.weight(old).detach().float()
            mask = _shared.kept(m, w, context)
            w = w * mask if mask is not None else w
            new = Int8Linear(m.inp, m.out, old.bias is not None, mode, m.conv1d, w.device)
            new.fill(w)
            _shared.note(context, m, 8.0, _shared.relative(w, new.dequantize()))
            _shared.swap(model, m.name, old, new)
        _shared.finish_packing(model, context, _shared.packs_table(context.profile, self.embedding), mode)
        return model

    def layers(self, model, context):
        return _shared.figures(context)
