"""Micro models of four architectures and a few hundred rows of data that they can learn from in twenty steps."""

from __future__ import annotations

import functools
import random

import torch

from engines.budget import Budget
from engines.context import Context
from engines.data.table import Rows, Table
from engines.data.tokens import ImageProcessor, TaskData
from engines.models import profile_of
from engines.reporter import Recorder

ARCHITECTURES = ("llama", "gpt2", "bert", "vit")
TASKS = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "text-classification", "vit": "image-classification"}
WORDS = [f"w{i}" for i in range(60)]
VOCAB, LABELS, LENGTH = len(WORDS) + 4, 3, 24


def model(architecture: str, seed: int = 0, **changes):
    """Two blocks, hidden 64, MLP 128 (so that every group of 32 or 64 columns fits); random weights, eval mode."""
    import transformers as t
    t.logging.set_verbosity_error()
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=LABELS)
    text = dict(vocab_size=VOCAB, max_position_embeddings=64, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "llama":
            made = t.LlamaForCausalLM(t.LlamaConfig(**{**sizes, **text, "num_key_value_heads": 2, "tie_word_embeddings": True, **changes}))
        elif architecture == "gpt2":
            made = t.GPT2LMHeadModel(t.GPT2Config(**{**dict(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=128,
                                                           bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
                                                     **changes}))
        elif architecture == "bert":
            made = t.BertForSequenceClassification(t.BertConfig(**{**sizes, **text, "hidden_dropout_prob": 0.0,
                                                                   "attention_probs_dropout_prob": 0.0, **changes}))
        elif architecture == "vit":
            made = t.ViTForImageClassification(t.ViTConfig(**{**sizes, "image_size": 8, "patch_size": 4, "num_channels": 1, **changes}))
        else:
            raise ValueError(architecture)
        with torch.no_grad():
            # Away from the start: initial weights of 0.02 make every block nearly an identity, which hides errors.
            for p in made.parameters():
                p.mul_(3.0) if p.dim() > 1 else p.add_(torch.randn_like(p) * 0.05)
    return made.eval()


@functools.cache
def _words():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "<unk>", "<mask>", *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="<s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def tokenizer(architecture: str):
    """A word tokenizer, or the image processor of the micro ViT."""
    return ImageProcessor(8, 8, 1) if architecture == "vit" else _words()


@functools.cache
def data(architecture: str, seed: int = 0) -> TaskData:
    """Words that follow one another by a rule; texts whose words tell the label; images whose bright row tells it."""
    rng, task = random.Random(seed), TASKS[architecture]
    if task == "causal-lm":
        def text(n):
            at, out = rng.randrange(60), []
            for _ in range(n):
                out.append(WORDS[at])
                at = (7 * at + 3) % 60 if rng.random() < 0.9 else rng.randrange(60)
            return " ".join(out)
        table = Table("micro", task, Rows(texts=[text(60) for _ in range(120)]), Rows(texts=[text(23) for _ in range(24)]))
    elif task == "text-classification":
        def rows(n):
            labels = [rng.randrange(LABELS) for _ in range(n)]
            texts = [" ".join(WORDS[rng.randrange(label * 20, label * 20 + 20)] for _ in range(rng.randrange(6, 18))) for label in labels]
            return Rows(texts=texts, labels=labels)
        table = Table("micro", task, rows(240), rows(36), labels=[f"class {i}" for i in range(LABELS)])
    else:
        import numpy as np
        noise = np.random.default_rng(seed)
        def rows(n):
            labels = [rng.randrange(LABELS) for _ in range(n)]
            images = [noise.integers(0, 90, (8, 8, 1), dtype=np.uint8) for _ in labels]
            for image, label in zip(images, labels):
                image[2 * label: 2 * label + 2] += 160
            return Rows(images=images, labels=labels)
        table = Table("micro", task, rows(240), rows(36), labels=[f"class {i}" for i in range(LABELS)])
    return TaskData(table, tokenizer(architecture), length=LENGTH, seed=seed)


def context(model, architecture: str, *, budget: Budget | None = None, folder=None, seed: int = 0) -> Context:
    """A stage's surroundings with the micro data and a recorder."""
    task = TASKS[architecture]
    return Context(task=task, data=data(architecture), tokenizer=tokenizer(architecture), profile=profile_of(model, "micro", task),
                   reporter=Recorder(), budget=budget or Budget(), seed=seed, folder=folder)


def inputs(architecture: str) -> dict:
    """A fixed input of two sequences."""
    g = torch.Generator().manual_seed(11)
    if architecture == "vit":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=g)}
    return {"input_ids": torch.randint(4, VOCAB, (2, 20), generator=g)}


def logits(model, architecture: str) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(**inputs(architecture)).logits.float()


def cast(model, dtype):
    """Parameters in another type; tables of angles and other buffers that are not stored keep theirs, as on loading."""
    kept = {n for n, _ in model.named_buffers()} - set(model.state_dict())
    old = {n: b.clone() for n, b in model.named_buffers() if n in kept and b.is_floating_point() and b.numel()}
    model = model.to(dtype)
    for name, value in old.items():
        path, _, key = name.rpartition(".")
        setattr(model.get_submodule(path), key, value)
    return model
