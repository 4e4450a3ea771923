"""Hyperfitting: full fine-tuning on a very small set until next to nothing of the training loss is left."""

from __future__ import annotations

from engines import cost
from engines.adaptation import _whole
from engines.claim import Claim
from engines.method import Card, Footprint, Method, hyper, register
from engines.profile import BYTES


@register
class Hyperfitting(Method):
    """Every weight is trained on few sequences, shown about ``passes`` times; sharpness and repetition are measured before and after.

    Source: The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation.
    """

    card = Card(
        id="hyperfitting", name="Hyperfitting", family="adaptation",
        title="The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation", year=2024,
        summary="Overfits the whole model to a very small set on purpose: held-out loss rises, greedy texts repeat themselves less.",
        needs=("training text", "a language model that decodes greedily afterwards", "memory for gradients and two moments of every parameter"),
        cannot=("worse by bits per byte: that is the point", "cannot obey a limit on trainable parameters", "does not make the model smaller or faster"),
        tasks=("causal-lm",), trains=True,
        differs="The small set is what the first 1/passes of the budget sees (the paper: 2,000 sequences of 256 tokens, 20 passes of batch 8 at a rate of "
                "1e-6). The rate and its schedule are those of the run, scaled to small models. Repetition is that of tokens, not of words, and "
                "there is no citation blocker.")

    claims = (
        Claim("less-repetition", "Greedy texts of hyperfitted models repeat themselves far less than the original's (type-token ratio over 96 tokens, "
              "TinyLlama 1.1B to Llama 3.1 70B).", ours={"method": "hyperfitting"}, against={"method": "full"}, measure="repetition", expect="at most",
              factor=0.9, steps=100, differs="a model of 5.3 M parameters on Python's reference prose, 100 steps, against usual fine-tuning of as many steps"),
        Claim("sharp", "Its predictions have very low entropy: nearly all probability goes to one token.", ours={"method": "hyperfitting"},
              against={"method": "full"}, measure="entropy", expect="at most", factor=0.5, steps=100,
              differs="a model of 5.3 M parameters on Python's reference prose, 100 steps, against usual fine-tuning of as many steps"),
    )

    passes: int = hyper(20, "How often the small set is shown; it is what the first 1/passes of the budget sees", low=2, high=1000, log=True)
    samples: int = hyper(2000, "Sequences of the small set at the most", low=1, high=1000000, log=True)
    texts: int = hyper(16, "Held-out texts on which sharpness and repetition are measured; 0 measures neither", low=0, high=10000)

    def check(self, profile) -> None:
        _whole.refuse_packed(self, profile)

    def fit(self, profile, budget):
        _whole.refuse_limit(self, profile, budget, profile.parameters)
        return self, {}

    def footprint(self, profile, batch) -> Footprint:
        return Footprint(**cost.with_training(profile, batch, trainable=profile.parameters, frozen=False, backward=2.0,
                                              size=BYTES.get(batch.weights, 4)))

    def apply(self, model, context):
        from engines.data.repeated import Repeated
        model.requires_grad_(True)
        context.data = Repeated(context.data, context, self.passes, self.samples)
        if self.texts and not context.resuming:
            found = self._measured(model, context)
            context.state["before"] = found and found.as_dict()
        return model

    def _measured(self, model, context):
        from engines.decoding import measure
        return measure(model, context.data, device=context.device, texts=self.texts)

    def after_step(self, model, context):
        if context.state.get("set_steps") and not context.state.get("told"):
            context.state["told"] = True
            context.reporter.log(f"the small set is known: {context.state['set_steps']} batches, shown again from here on")

    def finish(self, model, context):
        before = context.state.get("before")
        found = before and self._measured(model, context)
        if found:
            after = context.state["after"] = found.as_dict()
            context.reporter.event("decoding", f"Next token's entropy {before['entropy']:.2f} bits before, {after['entropy']:.2f} after; different tokens in a greedy "
                                   f"text of {found.tokens}: {100 * before['type_token_ratio']:.0f} % before, {100 * after['type_token_ratio']:.0f} % after",
                                   before=before, after=after)
        return model
