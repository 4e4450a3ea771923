"""What the adapters with a frozen input factor share: the forecast of the activations that they do not keep."""

from __future__ import annotations

from engines import cost
from engines.adaptation._adapter import AdapterMethod, adapters, merge, save_lora
from engines.method import Footprint


class FrozenInput(AdapterMethod):
    """Base of methods whose layers are ``engines.layers.core.FrozenDown``; not registered itself."""

    def width(self, matrix, size: int) -> int:
        """Width of the thin product that one matrix keeps for each token; 0: it keeps its input and builds its changed weight."""
        return size

    def frozen_numbers(self, matrix, size: int) -> int:
        """Numbers in float32 that lie frozen beside one matrix: factors, where training began."""
        return 0

    def finish(self, model, context):
        layers = [layer for _, layer in adapters(model)]
        ranks = [layer.factors()[0].shape[0] for layer in layers]
        if sum(r * (x.out + x.inp) for r, x in zip(ranks, layers)) <= sum(x.out * x.inp for x in layers):
            save_lora(model, context)
        elif context.folder is not None:
            context.reporter.log("no separate adapter: its factors would be larger than the matrices; the merged model is "
                                 "complete")
        return merge(model)

    def footprint(self, profile, batch) -> Footprint:
        found, size = self.targeted(profile), self.size()
        widths = [self.width(m, size) for m in found]
        whole = [m for m, w in zip(found, widths) if not w]
        trainable = self.trained(profile)
        weights = cost.held_bytes(profile, batch.weights)
        if batch.compute == "bfloat16" and batch.weights == "float32":
            weights -= 2 * sum(m.size for m in found)
        number = 2 if batch.compute == "bfloat16" else 4
        tokens = batch.rows * (profile.context if profile.task == "image-classification" else batch.length)
        # Layers that build their weight keep it; the scaled factor and the gradient of the sum are there for one of them at a time.
        extra = 4 * sum(self.frozen_numbers(m, size) for m in found)
        extra += number * sum(m.size for m in whole) + 8 * max((m.size for m in whole), default=0)
        parts = cost.with_training(profile, batch, trainable=trainable, frozen=True, backward=1.0, weights=weights,
                                   adapter=4 * trainable, adapted=tuple(dict.fromkeys(m.role for m in whole)), extra=extra)
        kept = tokens * number * sum(widths)
        parts["activations"] += kept // max(1, profile.layers) if batch.checkpointing else kept
        # Once a step the sum is built and its gradient brought to the diagonal.
        built = lambda m: m.size * (2.0 + 4.0 * (size or min(m.out, m.inp)) / tokens)  # noqa: E731
        parts["flops_per_token"] += sum(4.0 * w * (m.out + m.inp) if w else built(m) for m, w in zip(found, widths))
        return Footprint(**parts)


class Diagonal(FrozenInput):
    """Base of methods that train a diagonal between two frozen factors, all of it where ``rank`` is 0; not registered itself."""

    whole = "the whole diagonal"
    """What rank 0 trains, in words."""

    def chosen(self, matrix, size: int) -> int:
        """Entries trained in one matrix."""
        return size or min(matrix.out, matrix.inp)

    def count(self, matrix, size: int) -> int:
        return self.chosen(matrix, size)

    def frozen_numbers(self, matrix, size: int) -> int:
        return self.chosen(matrix, size) * (matrix.out + matrix.inp + 1)

    def width(self, matrix, size: int) -> int:
        rank = self.chosen(matrix, size)
        return rank if rank * (matrix.out + matrix.inp) <= matrix.size else 0

    def largest(self, profile, budget):
        limit, every = budget.trainable_count(profile.parameters), self.trained(profile, 0)
        if limit is None:
            return 0, f"{self.whole}, no limit on trainable parameters"
        if every <= limit:
            return 0, f"{self.whole}: {every:,} trainable parameters obey the limit of {limit:,}"
        return super().largest(profile, budget)
