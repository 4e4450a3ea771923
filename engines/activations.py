"""Bytes of activations that one micro-batch of training keeps for the backward pass, from shapes alone; no torch.

The count follows what autograd saves in transformers' own blocks: inputs of the matrix products (one cast copy
for each product under autocast), inputs of norms and of non-linear functions, and query, key, value and output
of scaled-dot-product attention, whose score matrix is never kept unless attention dropout forbids the fused
kernel on a CPU. Widths are read from the matrices, so a model with removed heads or channels counts less.
"""

from __future__ import annotations

from collections.abc import Sequence

from engines.profile import Batch, ModelProfile

# Rows of the output embedding's product that are held at a time by the chunked loss.
CHUNK = 2048

MEMO = 4096
"""Answers that are kept with a profile: a planner asks for the same few again and again."""

_RMS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
_OUTPUTS = ("o_proj", "dense", "out_lin", "c_proj", "out_proj", "down_proj", "fc2", "lin2")
_DROPOUTS = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")


def widths(profile: ModelProfile, layer: int = 0, here: Sequence | None = None) -> tuple[int, int, int]:
    """Features of queries, of keys, and of the MLP in one block; what config.json says where a matrix is not found."""
    query = key = mlp = 0
    for m in _here(profile, layer) if here is None else here:
        part = m.role.rsplit(".", 1)[-1]
        if part in ("q_proj", "query", "q_lin"):
            query = m.out
        elif part in ("k_proj", "key", "k_lin"):
            key = m.out
        elif part == "c_attn":
            query = key = m.out // 3
        elif part in ("up_proj", "c_fc", "fc1", "lin1") or m.role == "intermediate.dense":
            mlp = m.out
    query = query or profile.heads * profile.head_dim
    return query, key or profile.kv_heads * profile.head_dim, mlp or profile.mlp


def _here(profile: ModelProfile, layer: int) -> list:
    return [m for m in profile.matrices if m.layer == layer]


def _positions(profile: ModelProfile, batch: Batch) -> tuple[int, int]:
    """Tokens of the micro-batch and length of one sequence; an image always fills its patches."""
    length = profile.context if profile.task == "image-classification" else batch.length
    return batch.rows * length, length


def _dropped(profile: ModelProfile) -> bool:
    return any(float(profile.config.get(name) or 0) > 0 for name in _DROPOUTS)


def _new_gelu(profile: ModelProfile) -> bool:
    """GPT-2's tanh form written out in separate operations, each of which keeps its input."""
    default = "gelu_new" if profile.architecture == "gpt2" else ""
    return str(profile.config.get("activation_function") or profile.config.get("hidden_act") or default) == "gelu_new"


def block_tensors(profile: ModelProfile, batch: Batch, layer: int = 0, *, frozen: bool = False, adapted: tuple[str, ...] | None = None,
                  rank: int = 0, device: str = "cpu", dropout: bool | None = None, here: Sequence | None = None) -> list[tuple[int, int]]:
    """(how many, bytes of each) of the tensors that one block keeps until its backward pass, for one micro-batch.

    Args:
        frozen: the norms' own weights get no gradient.
        adapted: with ``frozen``, the roles whose inputs are needed by an adapter; None means all of them.
        rank: width of the adapters, whose inner activations are kept too.
        dropout: attention dropout is active; None reads the config.
        here: the matrices of this block, when they are at hand.
    """
    tokens, length = _positions(profile, batch)
    here = _here(profile, layer) if here is None else here
    a, k, m = widths(profile, layer, here)
    h, heads = profile.hidden, max(1, a // max(profile.head_dim, 1))
    half = batch.compute == "bfloat16"
    c, w = (2, 4) if half else (4, 4)          # bytes of a product's result; of the residual stream and the norms
    rms = profile.architecture in _RMS
    kept = here if adapted is None or not frozen else [x for x in here if x.role in adapted]
    # A product keeps its input for the gradient of its weight. Under autocast each keeps its own cast of the
    # normed tensor; otherwise all that read one tensor share it. The attention's output is kept by the attention.
    outputs = [x for x in here if x.out == h and x.role.rsplit(".", 1)[-1] in _OUTPUTS]
    joined = {x.name for x in outputs}
    readers = [x for x in kept if x.name not in joined]
    if half:
        found = [(len(readers), c * h)]
    else:
        found = [(any("att" in x.name for x in readers) + any("att" not in x.name for x in readers), w * h)]
    # Non-linear function and, where there is one, the gate; the last is the input of the second product.
    down = any(x in kept and "att" not in x.name for x in outputs)
    curved = 3 if rms else 4 if _new_gelu(profile) else 1
    found += [(curved + (1 if down else 0), c * m),
              (2 if not rms or frozen else 4, w * h),                         # inputs of two norms, and what scales their weight
              (2, c * a), (2, c * k), (1, 4 * heads + 16)]
    if any(float(profile.config.get(name) or 0) > 0 for name in ("hidden_dropout_prob", "resid_pdrop", "dropout")):
        found.append((2, h * (c if device == "cpu" else 1)))
    if not here:
        found.append((2, w * h))
    found.append((len(kept), c * rank))
    if (_dropped(profile) if dropout is None else dropout) and device == "cpu":
        # The CPU's fused attention has no dropout: softmax, mask and their product are kept in float32.
        found += [(3, 4 * heads * length), (1, 0 if not half else 2 * (a + 2 * k))]
    return [(count, tokens * each) for count, each in found if count and each]


def block_bytes(profile: ModelProfile, batch: Batch, layer: int = 0, *, above: int = 0, **options) -> int:
    """Bytes that one block keeps until its backward pass: those of its tensors of ``above`` bytes and more. See ``block_tensors``."""
    return sum(count * each for count, each in block_tensors(profile, batch, layer, **options) if each >= above)


def train_bytes(profile: ModelProfile, batch: Batch, *, above: int = 0, **options) -> int:
    """Bytes of activations of all blocks at the start of the backward pass of one micro-batch.

    With checkpointing each block keeps only its input, and one block at a time is computed again.
    ``above`` counts only tensors of so many bytes and more; ``options`` are those of ``block_tensors``.
    """
    key = ("train_bytes", batch, above, *sorted(options.items()))
    if key not in profile.memo:
        if len(profile.memo) > MEMO:
            profile.memo.clear()
        profile.memo[key] = _train_bytes(profile, batch, above, options)
    return profile.memo[key]


def _train_bytes(profile: ModelProfile, batch: Batch, above: int, options: dict) -> int:
    tokens, _ = _positions(profile, batch)
    layers = max(profile.layers, 1)
    stream = tokens * profile.hidden * 4
    stream = stream if stream >= above else 0
    sizes = [(count, block_bytes(profile, batch, first, above=above, here=here, **options)) for count, first, here in profile.blocks]
    if batch.checkpointing:
        return stream * (layers + 2) + max(size for _, size in sizes)
    return 2 * stream + sum(count * size for count, size in sizes)


def logits_bytes(profile: ModelProfile, batch: Batch, *, chunk: int | None = None) -> int:
    """Bytes of the loss: chunked logits of a language model with their gradient and the gradient of the hidden states.

    ``chunk`` tokens are held at a time, ``batch.chunk`` where it is None.

    ``chunk`` 0 counts all logits at once (result, float32 copy, log-softmax and gradient).
    """
    tokens, _ = _positions(profile, batch)
    chunk = batch.chunk if chunk is None else chunk
    c = 2 if batch.compute == "bfloat16" else 4
    if profile.task != "causal-lm":
        return batch.rows * max(profile.labels, 1) * 12
    if not chunk:
        return tokens * profile.vocab * (2 * c + 8 if c == 2 else 12)
    rows = min(tokens, chunk)
    work = rows * profile.vocab * (4 if c == 4 else 4 + c)   # float32 logits become their gradient in place
    return work + tokens * profile.hidden * (2 * c) + (profile.vocab * profile.hidden * 2 if c == 2 else 0)


def logit_bytes(profile: ModelProfile, batch: Batch, *, above: int = 0) -> int:
    """Bytes of scoring without gradients: logits of one chunk, their float32 copy where they are bf16, and the log-softmax.

    ``above`` counts only tensors of so many bytes and more.
    """
    if profile.task != "causal-lm":
        return 0
    each = min(batch.tokens, batch.chunk) * profile.vocab
    return sum(size for size in (4 * each, 4 * each, 2 * each if batch.compute == "bfloat16" else 0) if size >= above)


def forward_bytes(profile: ModelProfile, batch: Batch, *, above: int = 0) -> int:
    """Bytes alive at the widest moment of a forward pass without gradients; of tensors of ``above`` bytes and more."""
    tokens, _ = _positions(profile, batch)
    a, k, m = widths(profile, here=profile.blocks[0][2])
    c = 2 if batch.compute == "bfloat16" else 4     # the residual stream and the norms stay float32
    curved = 3 if profile.architecture in _RMS or _new_gelu(profile) else 2

    def of(*rows: tuple[int, int]) -> int:
        return sum(count * tokens * width for count, width in rows if tokens * width >= above)
    h = profile.hidden
    return of((2, 4 * h)) + max(of((curved, c * m)), of((2, c * a), (2, c * k), (1, 4 * h)))
