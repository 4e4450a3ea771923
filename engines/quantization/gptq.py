"""GPTQ: rounding column by column with second-order compensation of the error."""

from __future__ import annotations

import dataclasses

from engines.errors import StopRequested
from engines.lazy import torch
from engines.method import AUTO, Card, Method, hyper, register
from engines.quantization import _shared
from engines.quantization._size import GROUPS, check_group, fit_size, usual_group, valid_groups
from engines.quantization.int8 import mode_for

SEQUENTIAL = (("q_proj", "k_proj", "v_proj", "query", "key", "value", "c_attn"),
              ("o_proj", "attn.c_proj", "attention.output.dense", "out_proj"),
              ("gate_proj", "up_proj", "c_fc", "fc1", "intermediate.dense"),
              ("down_proj", "mlp.c_proj", "fc2", "output.dense"))


def waves(rows: list, true_sequential: bool) -> list[list]:
    """The layers of one block in the order in which they are quantized; rows are (Matrix, module)."""
    if not true_sequential:
        return [rows]
    def place(role: str) -> int:
        for i, roles in enumerate(SEQUENTIAL):
            if any(role == r or role.endswith("." + r) for r in roles):
                return i
        return len(SEQUENTIAL)
    found: dict[int, list] = {}
    for row in rows:
        found.setdefault(place(row[0].role), []).append(row)
    return [found[i] for i in sorted(found)]


@register
class GPTQ(Method):
    """Weights rounded so that each layer's outputs, on calibration inputs, change least."""

    card = Card(
        id="gptq", name="GPTQ", family="quantization",
        title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", year=2022,
        summary="Rounds weights column by column and lets the columns after it make up for each error; 2 to 4 or 8 bits.",
        needs=("calibration sequences from the training data (no labels)", "widths that 32 divides, below 8 bits"),
        cannot=("weights can be neither trained nor pruned afterwards", "2 and 3 bits save space on disk only: at run time they take 4 bits"),
        packs=True,
        differs="Groups by default (the paper's main tables use one grid per row: group 0). The released code takes a group's grid from "
                "weights that lack the corrections of the current block of columns; here they are up to date. With act_order groups are "
                "static, because the kernels know no scattered groups. 8 bits use a symmetric grid per row. Scales carry five "
                "significant bits below 8 bits, and what was pruned before stays zero.")

    bits: int = hyper(AUTO, "bits of a weight on disk; auto takes 4, or 3 and 2 when the size limit asks for it",
                      choices=(2, 3, 4, 8), lever="size_mb")
    group: int = hyper(AUTO, "columns that share a scale and a zero-point, 0 for one grid per row; auto takes 64, or 32 where a width asks "
                             "for it, or more when the size limit does; no meaning at 8 bits", choices=(0, *GROUPS), lever="size_mb")
    samples: int = hyper(128, "calibration sequences", low=1, high=4096)
    length: int = hyper(0, "tokens of a calibration sequence; 0 takes the data's own length, at most 2048", low=0, high=32768, unit="tokens")
    damping: float = hyper(0.01, "share of the Hessian's mean diagonal that is added to it", low=0.0, high=1.0, log=True, advanced=True)
    block: int = hyper(128, "columns between two updates of the rest of the matrix; no influence on the result", low=1, high=4096,
                       advanced=True)
    act_order: bool = hyper(False, "columns with the largest inputs first")
    true_sequential: bool = hyper(False, "inside a block, quantize attention inputs, attention output, then the MLP, each on the inputs that "
                                         "the quantized ones before it give")
    static_groups: bool = hyper(False, "take the grids of all groups before the first column is rounded", advanced=True)
    symmetric: bool = hyper(False, "zero-point in the middle of the grid instead of one per group", advanced=True)
    mse: bool = hyper(False, "shrink each grid's range to the least sum of |error|^2.4 instead of its extremes", advanced=True)
    embedding: str = hyper("keep", "token embedding and output head: kept in bf16 as in the paper, int8, or auto (int8 from 5 % of the "
                                   "parameters on)", choices=("keep", "int8"), lever="size_mb")
    skip: str = hyper("", "layers left in bf16: roles or paths, separated by commas", advanced=True)

    def check(self, profile):
        _shared.check(self, profile)
        if self.bits == 8:
            return
        check_group(self, profile)

    def _resolved(self, profile) -> GPTQ:
        """Without ``auto`` in bits and group, as ``fit`` without a limit chooses."""
        bits = 4 if self.bits == AUTO else self.bits
        group = usual_group(profile, self.skip) if self.group == AUTO else self.group
        return self.replace(bits=bits, group=group)

    def _packed(self, profile):
        me, out = self._resolved(profile), {}
        for m in _shared.chosen(profile, self.skip):
            if me.bits == 8:
                out[m.name] = _shared.int8_tensors(m.name, m.out, m.inp)
            else:
                out[m.name] = _shared.int4_tensors(m.name, m.out, m.inp, me.bits, me.group or m.inp, me.symmetric)
        return out

    def _stored(self, profile):
        return _shared.stored(profile, self._packed(profile), _shared.packs_table(profile, self.embedding))

    def fit(self, profile, budget):
        fits = [g for g in valid_groups(profile, self.skip) if g >= 64] or [32]
        groups = [self.group] if self.group != AUTO else fits
        bits = [self.bits] if self.bits != AUTO else [4, 3, 2]
        return fit_size(self, profile, budget, [{"bits": b, "group": g} for b in bits for g in groups])

    def footprint(self, profile, batch):
        rows = _shared.chosen(profile, self.skip)
        block = [m for m in rows if m.layer == rows[0].layer] if rows else []
        widest, length = max([m.inp for m in rows] + [1]), self.length or min(batch.length, 2048)
        # Hessians of one block's layers; the factorization's copies; the matrix, its integers and its value.
        extra = sum(4 * m.inp**2 for m in block) + 16 * widest**2 + 20 * _shared.largest(profile)
        found = _shared.footprint(profile, batch, self._stored(profile), extra=extra, sequences=self.samples, length=length,
                                  passes=5.0 if self.true_sequential else 2.0)
        sweeps = sum(2.0 * m.inp**2 * m.out + 2.0 * m.inp**3 for m in rows) / max(1, found.calibration_tokens)
        return dataclasses.replace(found, flops_per_token=found.flops_per_token + sum(2.0 * m.inp**2 for m in rows) + sweeps)

    def apply(self, model, context):
        from engines.pruning._blocks import BlockWalk

        self.check(context.profile)
        me = self._resolved(context.profile)
        inputs = context.calibration(self.samples, self.length or None)
        walk = BlockWalk(model, inputs if self.length else [_cut(batch, 2048) for batch in inputs], device=context.device)
        packed = {}
        for at, block, linears in walk:
            want = context.reporter.wants()
            if want in ("stop", "pause"):
                raise StopRequested(want)
            rows = [(m, module) for m, module in linears if not _shared.skipped(m, self.skip)]
            for wave in waves(rows, self.true_sequential):
                packed.update(me._wave(block, wave, walk, context))
            if at + 1 < len(walk.blocks):
                walk.advance(block)
            context.reporter.log(f"GPTQ: block {at + 1} of {len(walk.blocks)}")
            context.reporter.layers(context.step, self.layers(model, context))
        # Integer layers take over only now: while blocks are run for calibration their weights are the dequantized ones.
        for m, old in walk.found:
            if m.name in packed:
                _shared.swap(model, m.name, old, packed[m.name])
        _shared.finish_packing(model, context, _shared.packs_table(context.profile, self.embedding), mode_for("by-task", context.task))
        return model

    def _wave(self, block, wave, walk, context) -> dict:
        """Quantize some layers of ``block`` on their present inputs; returns the filled packed layers by path."""
        from engines import models
        from engines.layers.int4 import Int4Linear
        from engines.layers.int8 import Int8Linear
        from engines.quantization._sweep import Hessian, output_error, sweep

        if not wave:
            return {}
        hessians = {m.name: Hessian(m.inp, module.weight.device) for m, module in wave}
        walk.run(block, {module: hessians[m.name].add for m, module in wave})
        packed = {}
        for m, module in wave:
            view = models.weight(module)
            w = view.detach().float()
            hessian = hessians.pop(m.name).matrix
            common = {"damping": self.damping, "block": self.block, "act_order": self.act_order, "mse": self.mse,
                      "mask": _shared.kept(m, w, context)}
            if self.bits == 8:
                # The int8 kernels know one scale per row and no zero-point: a symmetric grid of 255 values.
                scale = (w.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16).float()
                scale = torch.where(scale > 0, scale, torch.ones_like(scale))
                found = sweep(w, hessian, bits=8, grid=(scale, torch.full_like(scale, 128)), floor=1, **common)
                new = Int8Linear(m.inp, m.out, module.bias is not None, mode_for("by-task", context.task), m.conv1d, w.device)
                new.qweight.copy_(found.q - 128)
                new.scales.copy_(found.scale[:, 0])
            else:
                found = sweep(w, hessian, bits=self.bits, group=self.group, symmetric=self.symmetric, static_groups=self.static_groups,
                              **common)
                new = Int4Linear(m.inp, m.out, module.bias is not None, self.group or m.inp, self.bits, self.symmetric, m.conv1d, w.device)
                new.fill(found.q, found.scale, found.zero)
            value = new.dequantize()
            _shared.note(context, m, float(self.bits), output_error(w, value, hessian))
            if found.damping > self.damping:
                context.reporter.event("warning", f"{m.name}: the Hessian needed a damping of {found.damping:g} (few calibration tokens)")
            with torch.no_grad():
                view.copy_(value)
            packed[m.name] = new
        return packed

    def layers(self, model, context):
        return _shared.figures(context)


def _cut(batch: dict, length: int) -> dict:
    """At most ``length`` tokens of a text input."""
    return {k: v[:, :length] if k in ("input_ids", "attention_mask") else v for k, v in batch.items()}
