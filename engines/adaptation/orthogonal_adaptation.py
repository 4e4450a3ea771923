"""Orthogonal Adaptation: updates that read the input through columns of a shared orthogonal basis, so that several can be added."""

from __future__ import annotations

import dataclasses
import hashlib

from engines.adaptation import _peft
from engines.adaptation._frozen import FrozenInput
from engines.claim import Claim
from engines.errors import InputError
from engines.lazy import torch
from engines.method import AUTO, Card, hyper, register

DENSE = 2048
"""The widest input for which the shared basis is an evenly drawn orthogonal matrix."""


@register
class OrthogonalAdaptation(FrozenInput):
    """W + A B^T with B frozen: ``rank`` columns of an orthogonal matrix that all adapters with the same ``basis_seed`` share.

    Source: Orthogonal Adaptation for Modular Customization of Diffusion Models.
    """

    card = Card(
        id="orthogonal-adaptation", name="Orthogonal Adaptation", family="adaptation",
        title="Orthogonal Adaptation for Modular Customization of Diffusion Models", year=2023,
        summary="Trains adapters apart from one another that can later be added: each reads its input through other directions.",
        needs=("training data", "the same basis_seed in all runs that are to be merged"),
        cannot=("does not make the model smaller or faster", "learns no new input directions",
                "real inputs are not confined to an adapter's own directions, so merging disturbs less but not nothing",
                "no separate adapter file after pruning, which also breaks the orthogonality"),
        trains=True,
        differs="The paper adapts a diffusion model and has no public code; A starts at zero, as in LoRA (reconstructed). Columns are drawn from the seed "
                "and the data, without replacement; adapter_number gives bins that cannot overlap. Above width 2,048 the basis is a cosine "
                "transform with random signs, because an evenly drawn one costs the square of the width. Default rank 8 for small models, "
                "the paper's is 20; its learning rate (1e-5) belongs to another model. Its two text embeddings are not trained.")

    claims = (
        Claim("merging", "Adapters added to one model keep what each has learned better than merged LoRA adapters (twelve concepts in Stable "
              "Diffusion, no figure in the abstract).", measure="merging",
              ours={"method": "orthogonal-adaptation", "rank": 16}, against={"method": "lora", "rank": 8}, parts=3, steps=30, rates=(1.0, 3.0),
              differs="three groups of Python's reference pages on a language model of 5.3 M parameters, about equal trained parameters; the "
                      "measure is what the merged model loses against each adapter alone, on the pages that this adapter was trained on; weights of 1 "
                      "on both sides (0.6 in the paper's comparison)"),
        Claim("half-trained", "At equal rank about half of LoRA's parameters are trained, because the input factor is fixed.", measure="trainable",
              expect="at most", factor=0.6, ours={"method": "orthogonal-adaptation", "rank": 8}, against={"method": "lora", "rank": 8}, steps=24,
              differs="Stable Diffusion's linear layers there, a small language model here"),
    )

    rank: int = hyper(8, "Columns of the shared basis that each matrix reads (the paper uses 20); auto takes the largest that obeys the limit "
                         "on trainable parameters", low=1, high=1024, lever="trainable", log=True)
    adapter_number: int = hyper(0, "Adapters with different numbers (1, 2, ...) share no column at all; 0 draws the columns from the run's "
                                   "seed and data, which rarely share any", low=0, high=4096)
    basis: str = hyper("orthogonal", "orthogonal: columns of one orthogonal matrix; gaussian: drawn vectors, orthogonal in expectation "
                                     "only, with more crosstalk", choices=("orthogonal", "gaussian"))
    basis_seed: int = hyper(0, "Which shared basis: must agree between adapters that are to be merged", low=0, high=2**31 - 1, advanced=True)
    targets: str = hyper("all-linear", _peft.TARGETS_HELP)

    learning_rate = 5e-3

    def count(self, matrix, size: int) -> int:
        return size * matrix.out

    def frozen_numbers(self, matrix, size: int) -> int:
        return size * matrix.inp

    def allowed(self, found, size: int) -> bool:
        return self.adapter_number * size <= min(m.inp for m in found)

    def check(self, profile) -> None:
        super().check(profile)
        found = self.targeted(profile)
        narrow = min(found, key=lambda m: m.inp)
        rank = 1 if self.rank == AUTO else self.rank
        if self.adapter_number * rank > narrow.inp:
            raise InputError("orthogonal-adaptation.adapter_number", self.adapter_number, f"{narrow.name} has {narrow.inp} input directions, which "
                             f"make {narrow.inp // rank} adapters of rank {rank} without a common one",
                             f"Choose at most {narrow.inp // rank}, a lower rank, or 0 to draw the columns")

    def columns(self, matrix, context, rank: int):
        """Numbers of the basis columns that this run takes for ``matrix``: [rank], whole."""
        if self.adapter_number:
            return torch.arange(rank) + (self.adapter_number - 1) * rank
        # The data is part of the key, so that runs that were all left at seed 0 do not choose the same columns.
        text = f"{context.seed} {getattr(getattr(context.data, 'table', None), 'fingerprint', '')} {matrix.name}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.randperm(matrix.inp, generator=torch.Generator().manual_seed(key))[:rank]

    def footprint(self, profile, batch):
        found = super().footprint(profile, batch)
        # The square is drawn before gradients, moments and activations are there.
        square = max((m.inp for m in self.targeted(profile) if m.inp <= DENSE), default=0) if self.basis == "orthogonal" else 0
        later = found.gradients + found.optimizer + found.activations + found.logits
        return dataclasses.replace(found, extra=found.extra + max(0, 32 * square * square - later))

    def build(self, matrix, module, context, generator, mask):
        from engines.layers import orthogonal
        columns = self.columns(matrix, context, self.rank)
        # One basis for each width, whatever the layer: runs that adapt other layers still agree on it.
        a = orthogonal.basis(matrix.inp, columns, self.basis, self.basis_seed * 65537 + matrix.inp, DENSE)
        return orthogonal.Orthogonal(module, a.t(), mask=mask)

    def apply(self, model, context):
        from engines.layers import orthogonal
        model = super().apply(model, context)
        orthogonal._drawn.cache_clear()      # squares of the width, needed no more
        return model
