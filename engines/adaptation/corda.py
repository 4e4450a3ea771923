"""CorDA: LoRA that starts as the part of each weight which the given context uses most, or least."""

from __future__ import annotations

from engines import cost
from engines.adaptation import _calibration, _peft
from engines.adaptation._adapter import AdapterMethod, adapters, merge, save_lora
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import Card, hyper, register


@register
class Corda(AdapterMethod):
    """(W - s B0 A0) + s B A; B0 A0 are the largest (``ipm``) or smallest (``kpm``) components of W under its inputs' second moments.

    Source: CorDA: Context-Oriented Decomposition Adaptation of Large Language Models.
    """

    card = Card(
        id="corda", name="CorDA", family="adaptation", title="CorDA: Context-Oriented Decomposition Adaptation of Large Language Models",
        year=2024,
        summary="Splits each matrix by what the given text uses of it, trains the most used part (or the least used one) and "
                "freezes the rest.",
        needs=("training data", "forward passes over some hundred sequences before the first step",
               "one decomposition and one inverse of each matrix's size of inputs"),
        cannot=("does not make the model smaller or faster", "no separate adapter file after pruning",
                "keeps only what the text for form kpm shows: without data of its own the training data stand in for it"),
        trains=True,
        differs="The numbers are those of peft's preprocess_corda and its residual start (the released code divides the second moments by "
                "256 whatever the number of samples, which shifts the balance between the factors); equal inputs share one matrix, padding "
                "is left out, and the residual is computed in float32 also where products run in half precision. The paper takes rank "
                "128 and 256 sequences of 2,048 tokens; the separate adapter has twice the rank, because it is the difference to the "
                "model as it came.")

    claims = (
        Claim("above-lora", "Instruction-previewed adaptation is above full fine-tuning and other adapters on mathematics, code and instructions "
              "(no figures in the abstract).", ours={"method": "corda", "rank": 8}, against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, rank 8"),
        Claim("kpm-above-lora", "Knowledge-preserved adaptation learns the task better than LoRA (mathematics, code, instructions).",
              ours={"method": "corda", "form": "kpm", "keep": "python-code", "rank": 8}, against={"method": "lora", "rank": 8},
              differs="a model of 5.3 M parameters on Python's reference prose, 60 steps, rank 8; what it keeps is the standard library's source"),
        Claim("forgets-less", "Knowledge-preserved adaptation forgets less world knowledge than LoRA, and learns the task better.",
              ours={"method": "corda", "form": "kpm", "keep": "python-code", "rank": 8}, against={"method": "lora", "rank": 8},
              measure="forgetting", elsewhere="python-code",
              differs="a model of 5.3 M parameters whose knowledge is the standard library's source, not answers about the world; what it keeps "
                      "is sampled from the training part of that source and scored on its held-out modules; 60 steps"),
    )

    rank: int = hyper(8, "Rank of every update; auto takes the largest that obeys the limit on trainable parameters", low=1, high=1024,
                      lever="trainable", log=True)
    form: str = hyper("ipm", "ipm: train what the training data use most; kpm: train what the data to be kept use least",
                      choices=("ipm", "kpm"))
    samples: int = hyper(256, "Sequences or examples that the second moments are taken from", low=1, high=4096)
    length: int = hyper(0, "Tokens of such a sequence; 0 takes the data's own length", low=0, high=32768, unit="tokens")
    keep: str = hyper("", "Form kpm: the data whose abilities are to be kept, a bundled set or a file; empty: the training data")
    alpha: float = hyper(0.0, "Scale of the update times the rank; 0 means the rank, so a scale of one", low=0.0, high=4096.0)
    dropout: float = hyper(0.0, "Dropout before the update, in training", low=0.0, high=0.9)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    learning_rate = 1e-3

    @property
    def scale(self) -> float:
        return (self.alpha or float(self.rank)) / self.rank

    # -- from shapes -------------------------------------------------------------------------------------
    def check(self, profile) -> None:
        super().check(profile)
        if self.keep and self.form != "kpm":
            raise InputError("corda.keep", self.keep, "form ipm looks at the training data only", "Set form to kpm, or leave keep empty")

    def extra_bytes(self, profile, batch, found) -> int:
        # Second moments of all inputs, and the work of the widest decomposition; gone before the optimizer has its moments.
        wide = max(m.inp for m in found)
        work = 4 * (sum(m.inp**2 for m in found) + 3 * wide**2 + 3 * max(m.size for m in found))
        return max(0, work - 16 * self.trained(profile))

    def start_flops(self, profile, batch) -> float:
        found = self.targeted(profile)
        inputs = {(m.layer, m.inp, m.role if m.inp != profile.hidden else ""): m for m in found}.values()
        length = self.length or batch.length
        tokens = self.samples * (profile.context if profile.task == "image-classification" else length)
        moments = sum(2.0 * tokens * m.inp**2 + cost.INVERSE * m.inp**3 for m in inputs)
        return cost.passes(profile, self.samples, length) + moments + cost.decompositions(found) + sum(2.0 * m.size * m.inp for m in found)

    # -- in a live model ---------------------------------------------------------------------------------
    def prepare(self, model, context, chosen) -> None:
        start = _calibration.once(context, "context", lambda: self.start(model, context, chosen))
        with torch.no_grad():
            for m, module in chosen:
                a, b = (start[f"{m.name}.{part}"].to(module.weight.device) for part in "ab")
                residual = torch.addmm(_calibration.oriented(m, module.weight).float(), b, a, alpha=-self.scale)
                mask = context.masks.get(f"{m.name}.weight")
                if mask is not None:
                    residual = residual * _calibration.oriented(m, mask).to(residual.device)
                module.weight.data = _calibration.oriented(m, residual).contiguous().to(module.weight.dtype)
        # ``build`` takes the factors from here; they are no part of what a checkpoint must hold.
        object.__setattr__(context, "_start", start)
        # After the base has changed: what is set aside for the merge under half precision is the residual.
        super().prepare(model, context, chosen)

    def start(self, model, context, chosen) -> dict:
        """Factors by name: ``<matrix>.a`` [rank, in] and ``<matrix>.b`` [out, rank], with the scale taken out."""
        from engines.allocation.variance import inputs_of, same_inputs
        from engines.layers.context import SecondMoment, damped, decompose
        modules, samples = {m.name: module for m, module in chosen}, self.context_samples(context)

        def run(batch, see):
            _calibration.look(model, context, batch, {modules[n]: callback for n, callback in see.items()})

        with _calibration.frozen(model, context):
            owners = same_inputs(inputs_of(samples[0], list(modules), run))
            moments = {n: SecondMoment() for n in modules if n not in owners}
            for sample in samples:
                run(sample, moments)
        out, shares, ready = {}, {}, {}
        for m, module in chosen:
            owner = owners.get(m.name, m.name)
            if owner not in ready:
                found = damped(moments.pop(owner).mean())
                ready = {n: v for n, v in ready.items() if n in owners.values()} | {owner: found}
                if found[2] > 0.01:
                    context.reporter.log(f"{owner}: its inputs' second moments needed a damping of {found[2]:g} (few or repetitive samples)")
            moment, inverse, _ = ready[owner]
            u, s, v, shares[m.name] = decompose(_calibration.oriented(m, module.weight.detach()), moment, inverse, self.rank, self.form)
            root = (s / self.scale).sqrt()
            out |= {f"{m.name}.a": (root[:, None] * v).contiguous(), f"{m.name}.b": (u * root).contiguous()}
        context.state["share"] = shares
        mean = sum(shares.values()) / len(shares)
        context.reporter.event("choice", f"Decomposed by {len(samples)} samples: the trained part holds {mean:.1%} of what they use of a "
                               "matrix on average", by="corda", share=mean, samples=len(samples))
        return out

    def context_samples(self, context) -> list[dict]:
        """One sequence or example each, without padding."""
        if self.form == "ipm" or not self.keep:
            if self.form == "kpm":
                context.reporter.log("corda.keep is empty: what is kept is what the training data use")
            return context.calibration(self.samples, self.length or None)
        from engines import data
        from engines.data.tokens import TaskData
        table = data.load(self.keep, task=context.task)
        return TaskData(table, context.tokenizer, length=context.data.length, seed=context.seed, items=1).calibration(
            self.samples, self.length or None, context.seed)

    def build(self, matrix, module, context, generator, mask):
        from engines.layers.factors import Factors
        a, b = (context._start[f"{matrix.name}.{part}"] for part in "ab")
        return Factors(module, a, b, self.scale, dropout=self.dropout, mask=mask)

    def apply(self, model, context):
        model = super().apply(model, context)
        object.__delattr__(context, "_start")
        return model

    def finish(self, model, context):
        file = _calibration.start_file(context, "context")
        if file is not None and file.is_file():
            from safetensors.torch import load_file
            start = load_file(file)
            # The model as it came is W, not the residual: the difference has the factors of now and, negated, those of the start.
            save_lora(model, context, [
                (n, torch.cat([x.a.detach().cpu(), start[f"{n}.a"]]), torch.cat([x.b.detach().cpu(), -start[f"{n}.b"]], dim=1) * self.scale)
                for n, x in adapters(model)])
            file.unlink()
        return merge(model)

    def layers(self, model, context):
        share = context.state.get("share", {})
        return _peft.place_map(model, [(n, n) for n in share], "share", lambda name: share[name])
