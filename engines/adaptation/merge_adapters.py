"""Several adapters of one model added to it, with figures of how much they disturb one another."""

from __future__ import annotations

import json

from engines import cost
from engines.adaptation import _peft
from engines.errors import InputError
from engines.lazy import torch
from engines.method import Card, Method, hyper, register

SAMPLES = 8
"""Sequences of each adapter's own data on which its neighbours' outputs are compared with its own."""


@register
class MergeAdapters(Method):
    """W + sum_i weight_i B_i A_i over the adapter files of other runs; without training.

    Source: Orthogonal Adaptation for Modular Customization of Diffusion Models (the sum, and the two measures of crosstalk).
    """

    card = Card(
        id="merge-adapters", name="Merge adapters", family="adaptation",
        title="Orthogonal Adaptation for Modular Customization of Diffusion Models", year=2023,
        summary="Adds the adapters of two or more runs to their common model and scores the sum on each run's own data.",
        needs=("adapter files of two or more runs on this very model",),
        cannot=("adds nothing that the runs have not learned", "takes only adapters with two factors per matrix: none of DoRA, of pruned runs or of "
                                                               "methods that do not merge",
                "classification heads are averaged by the weights, which needs equal labels"),
        differs="For any adapters with two factors, not only those with orthogonal inputs. Weights are 1 unless told otherwise, the sum that is exact "
                "for orthogonal ones; the paper compares with 0.6 each.")

    adapters: str = hyper("", "Adapter folders of the runs, divided by semicolons: runs/3/adapter;runs/5/adapter")
    weights: str = hyper("1", "Weight of each adapter, divided by semicolons; one number is for all")
    data: str = hyper("", "Each run's own data as a JSON list, for scoring: [\"python-docs\", {\"source\": \"notes.csv\"}]; empty: only the run's",
                      advanced=True)

    # -- settings ----------------------------------------------------------------------------------------
    def folders(self) -> list[str]:
        return [f.strip() for f in self.adapters.split(";") if f.strip()]

    def factors(self) -> list[float]:
        """One weight for each adapter.

        Raises:
            InputError: not numbers, or another count of them.
        """
        count = len(self.folders())
        try:
            found = [float(w) for w in self.weights.split(";") if w.strip()]
        except ValueError:
            found = []
        found = found * count if len(found) == 1 else found
        if len(found) != count or not all(0 < abs(w) < 100 for w in found):
            raise InputError("merge-adapters.weights", self.weights, f"not {count} numbers other than zero, or one for all",
                             "Give for example 1, or " + ";".join(["0.6"] * max(count, 2)))
        return found

    def sources(self) -> list:
        """Data of each adapter, or nothing."""
        try:
            found = json.loads(self.data) if self.data else []
        except ValueError:
            found = None
        if not isinstance(found, list) or len(found) not in (0, len(self.folders())):
            raise InputError("merge-adapters.data", self.data[:60], "not a JSON list with one entry for each adapter", "Leave it empty")
        return found

    def read(self) -> list:
        from engines.models import adapter_files
        if len(self.folders()) < 2:
            raise InputError("merge-adapters.adapters", self.adapters, "a merge takes two adapters or more",
                             "Name their folders, or use python -m workbench merge RUN RUN")
        return [adapter_files.read(f) for f in self.folders()]

    def check(self, profile) -> None:
        from engines.models import adapter_files
        found, weights = self.read(), self.factors()
        self.sources()
        adapter_files.fit(found, profile)
        if found[0].heads and abs(sum(weights)) < 1e-6:
            raise InputError("merge-adapters.weights", self.weights, "they add up to zero, and classification heads are averaged by them",
                             "Give weights with another sum, such as 1")

    def footprint(self, profile, batch):
        try:
            held = 4 * sum(r * (out + inp) for one in self.read() for out, r, inp in one.shapes.values())
        except InputError:
            held = 0
        # The originals of the changed matrices wait while each adapter is scored alone.
        return cost.without_training(profile, batch, extra=held + 4 * profile.block_parameters, sequences=SAMPLES * max(1, len(self.folders())),
                                     length=batch.length)

    # -- in a live model ---------------------------------------------------------------------------------
    def apply(self, model, context):
        from engines.models import adapter_files, matrices, weight
        files = self.read()
        adapter_files.fit(files, context.profile)
        loaded, weights = [f.load() for f in files], self.factors()
        places = {m.name: module for m, module in matrices(model)}
        tables = [self._data(given, context) for given in self.sources()]
        before = {n: places[n].weight.detach().clone() for n in {n for f in files for n in f.shapes}}
        shift = {n: places[n].bias.detach().clone() for n in before if places[n].bias is not None}
        heads = {n: p for n, p in model.named_parameters() if n in files[0].heads}

        def put(shares: list[float]) -> None:
            """Base plus the adapters by these shares; a head is their mean."""
            with torch.no_grad():
                for name in before:
                    module = places[name]
                    module.weight.copy_(before[name])
                    total = weight(module).float()
                    for (factors, _, _), share in zip(loaded, shares):
                        if share and name in factors:
                            a, b = (t.to(total.device) for t in factors[name])
                            total = torch.addmm(total, b, a, alpha=share)
                    weight(module).copy_(total)
                    if name in shift:
                        added = sum(s * biases[name].to(total.device) for (_, biases, _), s in zip(loaded, shares) if name in biases)
                        module.bias.copy_(shift[name].float() + added)
                for name, p in heads.items():
                    p.copy_(sum(s * head[name] for (_, _, head), s in zip(loaded, shares)) / sum(shares))

        alone, cross = [], {}
        for i, data in enumerate(tables):
            put([float(j == i) for j in range(len(files))])
            alone.append(self._score(model, data, context))
            cross[i] = _outputs(model, data, context, places, [f for f, _, _ in loaded])
        put(weights)
        rows = []
        for i, data in enumerate(tables):
            found = self._score(model, data, context)
            rows.append(dict(adapter=str(files[i].folder), weight=weights[i], data=data.table.source, metric=found.metric, alone=alone[i].value,
                             merged=found.value, low=found.low, high=found.high, n=found.n))
            context.reporter.event("merge", f"On {data.table.source}: {found.value:.4g} {found.metric} merged, {alone[i].value:.4g} with its own "
                                   f"adapter alone (n = {found.n})", **rows[-1])
        context.state.update(parents=rows, overlap=_overlap([f for f, _, _ in loaded]), crosstalk=_crosstalk(cross))
        self._keep(model, context, loaded, weights, files)
        return model

    def _data(self, given, context):
        from engines import data as datasets
        from engines.data.tokens import TaskData
        given = {"source": given} if isinstance(given, str) else given
        table = datasets.load(given["source"], task=context.task, text=given.get("text"), label=given.get("label"), split=given.get("split", 0.1),
                              limit=given.get("limit"))
        if context.task != "causal-lm" and table.labels != context.data.labels:
            raise InputError("merge-adapters.data", given["source"], "its labels are not those of the run's data", "Merge runs on the same labels")
        return TaskData(table, context.tokenizer, length=context.data.length, seed=context.seed, items=len(context.data.items))

    def _score(self, model, data, context):
        from engines.evaluation import evaluate
        return evaluate(model, data, device=context.device, precision="bf16" if context.compute == "bfloat16" else "fp32")

    def _keep(self, model, context, loaded, weights, files) -> None:
        """The figures, and the sum as one adapter of the summed rank, which peft loads and which can be merged again."""
        if context.folder is None:
            return
        context.folder.mkdir(parents=True, exist_ok=True)
        (context.folder / "merge.json").write_text(json.dumps({k: context.state[k] for k in ("parents", "overlap", "crosstalk")}, indent=1))
        if context.stage > 0 or context.masks:
            context.reporter.log("no separate adapter: it would belong to what the stages before made of the model")
            return
        from peft import LoraConfig
        ranks, state, biases = {}, {}, any(b for _, b, _ in loaded)
        sides = {n: (out, inp) for f in files for n, (out, _, inp) in f.shapes.items()}
        for name, (out, _) in sides.items():
            parts = [(f[name], w) for (f, _, _), w in zip(loaded, weights) if name in f]
            state[f"{name}.lora_A.weight"] = torch.cat([a for (a, _), _ in parts])
            state[f"{name}.lora_B.weight"] = torch.cat([w * b for (_, b), w in parts], dim=1)
            ranks[name] = len(state[f"{name}.lora_A.weight"])
            if biases:
                state[f"{name}.lora_B.bias"] = sum((w * b[name] for (_, b, _), w in zip(loaded, weights) if name in b), torch.zeros(out))
        usual = max(set(ranks.values()), key=list(ranks.values()).count)
        other = {n: r for n, r in ranks.items() if r != usual}
        config = LoraConfig(r=usual, lora_alpha=usual, rank_pattern=other, alpha_pattern=dict(other), target_modules=sorted(ranks), bias="none",
                            lora_bias=biases, fan_in_fan_out=any(m.conv1d for m in context.profile.matrices))
        _peft.write_adapter(model, context, config, state)

    def layers(self, model, context):
        figures = {}
        for key in ("overlap", "crosstalk"):
            found = context.state.get(key) or {}
            rows = [[m.layer, m.role, found[m.name]] for m in context.profile.matrices if m.name in found]
            if rows:
                figures[key] = rows
        return figures


def _overlap(adapters: list[dict]) -> dict[str, float]:
    """By matrix the mean over pairs of ||A_i A_j^T|| / sqrt(||A_i A_i^T|| ||A_j A_j^T||): 0 orthogonal inputs, 1 the same ones."""
    out = {}
    for name in dict.fromkeys(n for one in adapters for n in one):
        parts = [one[name][0] for one in adapters if name in one]
        pairs = [float((x @ y.t()).norm() / ((x @ x.t()).norm() * (y @ y.t()).norm()).sqrt().clamp_min(1e-12))
                 for i, x in enumerate(parts) for y in parts[:i]]
        if pairs:
            out[name] = round(sum(pairs) / len(pairs), 6)      # below that it is rounding
    return out


def _outputs(model, data, context, places: dict, adapters: list[dict]) -> dict[str, list[float]]:
    """By matrix the squared length of every adapter's output on what the matrix reads from ``data``; None where it has none there."""
    sums = {n: [0.0 if n in one else None for one in adapters] for n in places}

    def listen(name):
        def hook(module, given):
            x = given[0].detach().flatten(0, -2).float()
            for j, one in enumerate(adapters):
                if name in one:
                    a, b = (t.to(x.device) for t in one[name])
                    sums[name][j] += float(((x @ a.t()) @ b.t()).double().square().sum())
        return hook
    handles = [places[n].register_forward_pre_hook(listen(n)) for n in places if any(n in one for one in adapters)]
    try:
        with torch.inference_mode():
            for batch in data.calibration(SAMPLES, min(data.length or 128, 256), context.seed):
                model(**{k: v.to(context.device) for k, v in batch.items()})
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _crosstalk(found: dict[int, dict]) -> dict[str, float]:
    """By matrix the mean over pairs of ||delta_j X_i|| / ||delta_i X_i||: how loud the others are on inputs of i's own data."""
    out = {}
    for name in next(iter(found.values()), {}):
        ratios = [(sums[name][j] / sums[name][i]) ** 0.5 for i, sums in found.items() if sums[name][i]
                  for j in range(len(sums[name])) if j != i and sums[name][j] is not None]
        if ratios:
            out[name] = sum(ratios) / len(ratios)
    return out
