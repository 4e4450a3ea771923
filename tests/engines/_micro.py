"""Micro models with random weights and a stand-in for a stage's context, shared by the method tests of this folder."""

from __future__ import annotations

import torch

from engines.budget import Budget
from engines.context import Context
from engines.models import profile_of
from engines.reporter import Recorder

VOCAB, LABELS, LENGTH = 61, 3, 16
ARCHITECTURES = ("llama", "gpt2", "bert", "vit")
TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "text-classification", "vit": "image-classification"}


def micro(architecture: str, seed: int = 0, *, dropout: float = 0.0, **changes):
    """A model of two or three blocks, hidden 32, with biases and norms moved away from their trivial start."""
    import transformers as t
    t.logging.set_verbosity_error()
    torch.manual_seed(seed)
    if architecture == "llama":
        sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                     max_position_embeddings=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
        model = t.LlamaForCausalLM(t.LlamaConfig(**{**sizes, **changes}))
    elif architecture == "gpt2":
        sizes = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, attn_pdrop=dropout,
                     resid_pdrop=dropout, embd_pdrop=dropout)
        model = t.GPT2LMHeadModel(t.GPT2Config(**{**sizes, **changes}))
    elif architecture == "bert":
        sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, num_labels=LABELS,
                     max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        model = t.BertForSequenceClassification(t.BertConfig(**{**sizes, **changes}))
    else:
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4,
                     num_channels=1, num_labels=LABELS)
        model = t.ViTForImageClassification(t.ViTConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def inputs(architecture: str, rows: int = 4, seed: int = 1) -> dict:
    g = torch.Generator().manual_seed(seed)
    if architecture == "vit":
        return dict(pixel_values=torch.randn(rows, 1, 16, 16, generator=g))
    return dict(input_ids=torch.randint(0, VOCAB, (rows, LENGTH), generator=g))


def targets(architecture: str, rows: int = 4, seed: int = 2):
    g = torch.Generator().manual_seed(seed)
    if TASKS[architecture] == "causal-lm":
        return torch.randint(0, VOCAB, (rows, LENGTH), generator=g)
    return torch.randint(0, LABELS, (rows,), generator=g)


def logits(model, batch: dict):
    with torch.no_grad():
        return model.eval()(**batch).logits


def loss_of(model, architecture: str, rows: int = 4):
    out = model(**inputs(architecture, rows)).logits
    return torch.nn.functional.cross_entropy(out.float().flatten(0, -2), targets(architecture, rows).flatten())


class Data:
    """Calibration inputs only."""

    def __init__(self, architecture: str):
        self.architecture = architecture

    def calibration(self, sequences: int, length, seed: int) -> list[dict]:
        batch = inputs(self.architecture, sequences, seed + 100)
        return [{k: v[i: i + 1] for k, v in batch.items()} for i in range(sequences)]


def context_of(model, architecture: str, *, masks=None, folder=None, budget: Budget | None = None, compute="float32", seed=0) -> Context:
    task = TASKS[architecture]
    return Context(task=task, data=Data(architecture), tokenizer=None, profile=profile_of(model, "micro", task), reporter=Recorder(),
                   budget=budget or Budget(), compute=compute, seed=seed, folder=folder, masks={} if masks is None else masks)


def train(method, model, context, architecture: str, steps: int = 6, lr: float = 1e-2, total: int | None = None):
    """The hooks in the order of the training loop, on one repeated batch; the losses."""
    context.total_steps = total or steps
    optimizer = torch.optim.AdamW([dict(params=g["params"]) for g in method.parameter_groups(model, context)], lr=lr, weight_decay=0.0)
    seen = []
    model.train()
    for _ in range(steps):
        context.progress = context.step / context.total_steps
        method.before_step(model, context)
        with torch.autocast("cpu", torch.bfloat16, enabled=context.compute == "bfloat16"):
            loss = loss_of(model, architecture)
            full = method.loss(model, loss, context)
        full.backward()
        method.after_backward(model, context)
        optimizer.step()
        context.step += 1
        method.after_step(model, context)
        optimizer.zero_grad(set_to_none=True)
        params = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in context.masks.items():
                if name in params and params[name].requires_grad:
                    params[name].mul_(mask)
        seen.append(float(loss.detach()))
    context.progress = min(1.0, context.step / context.total_steps)
    model.eval()
    return seen


def half_masks(model, seed: int = 5) -> dict:
    """Random masks of every block matrix; the weights get the zeros."""
    from engines.models import matrices
    g, masks = torch.Generator().manual_seed(seed), {}
    for m, module in matrices(model):
        mask = torch.rand(module.weight.shape, generator=g) > 0.5
        module.weight.data.mul_(mask)
        masks[f"{m.name}.weight"] = mask
    return masks
