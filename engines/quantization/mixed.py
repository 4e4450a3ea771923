"""Mixed precision: few bits for the matrices that bear it, eight for those that do not, under one exact total."""

from __future__ import annotations

import time

from engines import activations, cost
from engines.errors import InputError
from engines.method import AUTO, Card, Method, hyper, register
from engines.profile import BYTES, Batch
from engines.quantization import _shared, _total
from engines.quantization._size import GROUPS, check_group, too_large, usual_group, valid_groups
from engines.quantization.int8 import mode_for


@register
class Mixed(Method):
    """Each matrix inside the blocks becomes int8, int4 or less; which one is decided by a table of errors or by a search.

    Sources: L-GreCo: Layerwise-Adaptive Gradient Compression for Efficient and Accurate Deep Learning (lgreco); EvoPress: Towards
    Optimal Dynamic Model Compression via Evolutionary Search (evolution).
    """

    card = Card(
        id="mixed", name="Mixed-precision weights", family="quantization",
        title="EvoPress: Towards Optimal Dynamic Model Compression via Evolutionary Search", year=2024,
        summary="Chooses int8, int4 or fewer bits for each matrix so that the model changes least at a given average or size.",
        needs=("calibration sequences from the training data (no labels), except with lgreco", "widths that 32 divides"),
        cannot=("weights can be neither trained nor pruned afterwards", "2 and 3 bits save space on disk only: at run time they take 4 bits",
                "layers are rounded to nearest, not compensated as by GPTQ"),
        packs=True,
        differs="Allocates with L-GreCo's table and dynamic program, turned round to the least error at a given total instead of the least "
                "size at a given error, with RD-Prune's measured distortions, or with EvoPress's search, which here starts at L-GreCo's "
                "answer and uses rounding to nearest instead of GPTQ and some thousand tokens. The total is fixed before anything is "
                "measured, so that the size is known exactly.")

    bits: float = hyper(AUTO, "average bits of a weight inside the blocks; auto takes 5, or what the size limit allows", low=2.0, high=8.0,
                        lever="size_mb")
    by: str = hyper("evolution", "how matrices are chosen: lgreco (error of the weights, no data), rd (each one's distortion of the output), "
                                 "evolution (search by the whole model's divergence)", choices=_total.BY)
    levels: str = hyper("4,8", "bits that a matrix may take", choices=tuple(_total.LEVELS))
    group: int = hyper(AUTO, "columns that share a scale below 8 bits; auto takes 64, or 32 where a width asks for it", choices=GROUPS,
                       lever="size_mb")
    mse: bool = hyper(False, "shrink each group's range to the least sum of |error|^2.4 instead of its extremes", advanced=True)
    search_tokens: int = hyper(1024, "rd, evolution: calibration tokens of one measurement (the search's first choice takes a quarter)",
                               low=16, high=1 << 20, log=True, unit="tokens", advanced=True)
    generations: int = hyper(20, "evolution: generations", low=1, high=10000, log=True, advanced=True)
    offspring: int = hyper(8, "evolution: candidates in a generation", low=2, high=1024, log=True, advanced=True)
    embedding: str = hyper(AUTO, "token embedding and output head: int8, or kept in bf16; auto packs them from 5 % of the parameters on, "
                                 "and always when the size limit asks for it", choices=("int8", "keep"), lever="size_mb")
    skip: str = hyper("", "layers left in bf16: roles or paths, separated by commas", advanced=True)

    # -- before the run ----------------------------------------------------------------------------------
    def check(self, profile):
        _shared.check(self, profile)
        check_group(self, profile)
        low, high = _total.LEVELS[self.levels][0], _total.LEVELS[self.levels][-1]
        if self.bits != AUTO and not low <= self.bits <= high:
            raise InputError("mixed.bits", self.bits, f"with levels {self.levels} the average lies between {low} and {high}",
                             f"Choose a value from {low} to {high}, or other levels")

    def _frame(self, profile) -> _total.Frame:
        group = usual_group(profile, self.skip) if self.group == AUTO else self.group
        return _total.Frame(profile, _shared.chosen(profile, self.skip), _total.LEVELS[self.levels], group,
                            _shared.packs_table(profile, self.embedding))

    def _plan(self, profile) -> _total.Plan:
        return self._frame(profile).plan(5.0 if self.bits == AUTO else self.bits)

    def fit(self, profile, budget):
        """The most bits whose file stays under ``size_mb``; then an int8 table, then wider groups.

        Raises:
            InputError: no average does.
        """
        self.check(profile)
        tables = ["keep", "int8"] if self.embedding == AUTO and _shared.tables(profile) else [self.embedding]
        if self.embedding == AUTO and _shared.packs_table(profile, AUTO):
            tables = ["int8"]
        tables = ["keep"] if tables == [AUTO] else tables
        groups = [self.group] if self.group != AUTO else [g for g in valid_groups(profile, self.skip) if g >= 64] or [32]
        lowest, limit = float(_total.LEVELS[self.levels][0]), None if budget.size_mb is None else budget.size_mb * 1e6
        start = [self.bits] if self.bits != AUTO else [5.0, lowest] if lowest < 5.0 else [lowest]
        options = [self.replace(bits=b, group=g, embedding=t) for b in start for g in groups for t in tables]
        best = options[0]
        if limit is not None:
            sizes = []
            for best in options:
                sizes.append(best._plan(profile).file)
                if sizes[-1] <= limit:
                    break
            else:
                if AUTO in (self.bits, self.group, self.embedding):
                    raise too_large(self, budget, min(sizes))
                best = options[0]
            if self.bits == AUTO:
                frame = best._frame(profile)
                best = best.replace(bits=_total.most_bits(lambda b: frame.plan(b).file <= limit, best.bits, float(frame.levels[-1])))
        return best, self._reasons(best, options[0], profile, budget)

    def _reasons(self, best, usual, profile, budget) -> dict[str, str]:
        reasons, under = {}, f"to stay under {budget.size_mb:g} MB" if budget.size_mb is not None else ""
        if self.bits == AUTO:
            reasons["bits"] = f"{best.bits:g}, the most that stays under {budget.size_mb:g} MB" if under else "a little above int4, where its worst layers gain"
        if self.group == AUTO:
            reasons["group"] = f"{best.group} {under}" if best.group != usual.group else "divides every layer's width"
        if self.embedding == AUTO:
            share = sum(t.size for t in _shared.tables(profile)) / max(1, profile.parameters)
            reasons["embedding"] = f"{best.embedding} {under}" if best.embedding != usual.embedding else (
                f"the token table is {share:.0%} of the parameters" if share else "there is no token table")
        return reasons

    def _search(self):
        from engines.allocation.evolution import Search
        first = max(2, self.offspring // 4)
        survivors = (first, 1) if first < self.offspring else (1,)
        return Search(generations=self.generations, offspring=self.offspring, survivors=survivors,
                      tokens=(max(8, self.search_tokens // 4), self.search_tokens)[-len(survivors):])

    def footprint(self, profile, batch):
        plan, rows = self._plan(profile), _shared.chosen(profile, self.skip)
        size, extra, more = plan.file, 13 * _shared.largest(profile), {}
        if self.by != "lgreco":
            length = max(1, min(batch.length, self.search_tokens))
            if self.by == "rd":
                depth, count = max(1, profile.layers), len(plan.levels)
                tokens = round(sum(count * (1 - m.layer / depth) for m in rows) * self.search_tokens)
            else:
                found = self._search()
                tokens = found.evaluated + found.generations * sum(found.tokens)
            extra += BYTES.get(batch.weights, 4) * sum(m.size for m in rows) + self.search_tokens * profile.hidden * 4 * (profile.layers + 2)
            extra += min(self.search_tokens * max(profile.vocab, 1), 1 << 25) * 4
            more = dict(calibration_tokens=tokens, flops_per_token=profile.flops_per_token,
                        activations=activations.forward_bytes(profile, Batch(rows=max(1, min(8, self.search_tokens // length)), length=length)))
        return cost.without_training(profile, batch, extra=extra, result=size, bits_per_weight=8 * size / max(1, profile.parameters), **more)

    # -- in the run --------------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines import models
        from engines.layers.int4 import Int4Linear, quantize_groups
        from engines.layers.int8 import Int8Linear

        self.check(context.profile)
        plan, mode = self._plan(context.profile), mode_for("by-task", context.task)
        found = [(m, module) for m, module in models.matrices(model) if not _shared.skipped(m, self.skip)]
        masks = [_shared.kept(m, models.weight(module).detach().float(), context) for m, module in found]
        chosen = self._choose(model, context, plan, found, masks)
        for (m, old), mask, bits in zip(found, masks, chosen):
            w = models.weight(old).detach().float()
            w = w * mask if mask is not None else w
            if bits == 8:
                new = Int8Linear(m.inp, m.out, old.bias is not None, mode, m.conv1d, w.device)
                new.fill(w)
            else:
                new = Int4Linear(m.inp, m.out, old.bias is not None, plan.group, bits, False, m.conv1d, w.device)
                new.fill(*quantize_groups(w, bits, plan.group, False, self.mse))
            _shared.note(context, m, float(bits), _shared.relative(w, new.dequantize()))
            _shared.swap(model, m.name, old, new)
        _shared.finish_packing(model, context, plan.table, mode)
        # Which matrices have which bits changes the length of the file's header; a filler brings it to one length.
        model.fettle_header = plan.header
        return model

    def _choose(self, model, context, plan, found, masks) -> list[int]:
        """Bits of each matrix; ``plan.total`` bytes in all."""
        from engines.allocation.dynamic import least_error
        from engines.allocation.evolution import search
        from engines.allocation.problem import Level, Problem
        from engines.allocation.tables import Judge, Variants

        began, names = time.perf_counter(), tuple(m.name for m, _ in found)

        def rounded(index, level, dense):
            dense = dense.float() * masks[index] if masks[index] is not None else dense.float()
            return _total.rounded(dense, plan.levels[level], plan.group, self.mse)

        def problem(errors):
            rows = tuple(tuple(Level(b, plan.bytes[m.name][i], e) for i, (b, e) in enumerate(zip(plan.levels, row)))
                         for (m, _), row in zip(found, errors))
            return Problem(names, rows, plan.start)

        variants = Variants(found, rounded)
        # ||W - W'||_F, not squared: errors of layers are summed as norms.
        local = problem([[float((rounded(i, j, dense) - dense).norm()) for j in range(len(plan.levels))]
                         for i, dense in enumerate(variants.dense)])
        result = least_error(local, plan.total, exact=True)
        if self.by != "lgreco":
            length = getattr(context.data, "length", 0) or 1
            samples = context.calibration(max(16, 8 * self.search_tokens // max(1, length)))
            judge = Judge(model, variants, samples, task=context.task, device=context.device, seed=context.seed, wants=context.reporter.wants)
            with judge:
                if self.by == "rd":
                    result = least_error(problem(judge.distortion([len(plan.levels)] * len(found), self.search_tokens)), plan.total, exact=True)
                else:
                    result = search(local, judge.divergence, self._search(), start=result.choice, seed=context.seed * 1009 + context.stage)
        bits = [plan.levels[c] for c in result.choice]
        counts = ", ".join(f"{bits.count(b)} with {b} bits" for b in plan.levels)
        average = sum(b * m.size for b, (m, _) in zip(bits, found)) / sum(m.size for m, _ in found)
        context.reporter.event("choice", f"Bits by {self.by}: {counts}; {average:.3f} a weight on average", by=self.by, bits=average,
                               bytes=result.size, seconds=time.perf_counter() - began)
        return bits

    def layers(self, model, context):
        return _shared.figures(context)
