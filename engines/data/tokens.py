"""Tensors from tables: tokenization, packing, batches that are a pure function of (seed, step).

Because a batch depends on nothing but the seed and its number, exact resume needs no data position
beyond the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from engines.data.order import like_lengths
from engines.data.table import Table
from engines.errors import InputError

IGNORE = -100


@dataclass
class Items:
    """The evaluation part, one entry an item. ``weights``: bytes of each item's text (causal-lm) or None."""

    ids: list[np.ndarray] | None
    images: torch.Tensor | None
    labels: np.ndarray | None
    weights: np.ndarray | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids) if self.ids is not None else len(self.images)


def encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, without special tokens, as int32 arrays."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Straight to the Rust tokenizer: building transformers' BatchEncoding of 30 MB of text costs minutes.
        backend.no_truncation()
        backend.no_padding()
        return [np.asarray(e.ids, dtype=np.int32) for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    return [np.asarray(tokenizer(t, add_special_tokens=False)["input_ids"], dtype=np.int32) for t in texts]


def start_token(tokenizer) -> int:
    """The token that begins every text: bos, else eos, else cls, else 0."""
    for name in ("bos_token_id", "eos_token_id", "cls_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    return 0


class TaskData:
    """Training batches, evaluation items and calibration inputs of one task."""

    def __init__(self, table: Table, tokenizer, *, length: int, seed: int = 0, items: int = 0):
        self.table, self.tokenizer, self.task, self.length, self.seed = table, tokenizer, table.task, length, seed
        self.labels = table.labels
        if self.task == "causal-lm":
            self._prepare_lm(items)
        elif self.task == "text-classification":
            self._prepare_text(items)
        else:
            self._prepare_images(items)
        if len(self.items) == 0:
            raise InputError("data", table.source, "no evaluation item is left", "Give more evaluation rows")

    # -- causal-lm ---------------------------------------------------------------------------------------
    def _prepare_lm(self, items: int) -> None:
        start = start_token(self.tokenizer)
        pieces: list[np.ndarray] = []
        head = np.asarray([start], dtype=np.int32)
        for ids in encode(self.tokenizer, self.table.train.texts):
            pieces += [head, ids]
        self.stream = np.concatenate(pieces)
        if len(self.stream) < 16:
            raise InputError("data", self.table.source, f"only {len(self.stream)} tokens of training text", "Give more text")
        self.length = max(8, min(self.length, len(self.stream) // 2))
        chunks, weights = [], []
        for text, ids in zip(self.table.evaluation.texts, encode(self.tokenizer, self.table.evaluation.texts)):
            size = len(text.encode("utf-8", "replace"))
            if len(ids) < 1:
                continue
            # Long texts become windows; the bytes of a text are shared among its windows by tokens, so the sum stays exact.
            for at in range(0, len(ids), self.length - 1):
                part = ids[at: at + self.length - 1]
                chunks.append(np.concatenate([head, part]))
                weights.append(size * len(part) / len(ids))
        keep = _spread(len(chunks), items)
        self.items = Items([chunks[i] for i in keep], None, None, np.asarray([weights[i] for i in keep], dtype=np.float64),
                           f"{self.table.fingerprint}:{self.length}:{len(keep)}")

    @property
    def rows(self) -> int:
        """Rows of one pass over the training data."""
        if self.task == "causal-lm":
            return max(1, (len(self.stream) - 1) // self.length)
        return len(self.table.train)

    @property
    def train_tokens(self) -> int:
        """Tokens (causal-lm) or examples of one pass."""
        return self.rows * self.length if self.task == "causal-lm" else self.rows

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)

    def _lm_batch(self, step: int, size: int) -> list[dict]:
        rows = self.rows
        out = np.empty((size, self.length + 1), dtype=np.int64)
        for i in range(size):
            epoch, at = divmod(step * size + i, rows)
            if getattr(self, "_order", (None,))[0] != epoch:
                # A new offset in every pass: other row borders, so a row is never seen twice in the same cut.
                spare = max(1, len(self.stream) - 1 - rows * self.length + 1)
                self._order = (epoch, self._permutation(epoch), int(np.random.default_rng([self.seed, epoch, 1]).integers(spare)))
            begin = self._order[2] + int(self._order[1][at]) * self.length
            row = self.stream[begin: begin + self.length + 1]
            out[i, : len(row)] = row
            out[i, len(row):] = row[-1]
        tokens = torch.from_numpy(out)
        return [dict(input_ids=tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())]

    # -- classification ----------------------------------------------------------------------------------
    def _prepare_text(self, items: int) -> None:
        tok = self.tokenizer
        def ids(texts):
            limit = self.length - tok.num_special_tokens_to_add(pair=False)
            return [np.asarray(tok.build_inputs_with_special_tokens(e[:limit].tolist()) if hasattr(tok, "build_inputs_with_special_tokens")
                               else e[:limit], dtype=np.int32) for e in encode(tok, texts)]
        self.train_ids = ids(self.table.train.texts)
        self.train_labels = np.asarray(self.table.train.labels)
        self.sizes = np.asarray([max(1, len(e)) for e in self.train_ids])
        held = ids(self.table.evaluation.texts)
        keep = _spread(len(held), items)
        self.items = Items([held[i] for i in keep], None, np.asarray(self.table.evaluation.labels)[keep], None,
                           f"{self.table.fingerprint}:{self.length}:{len(keep)}")
        self.pad = int(tok.pad_token_id if tok.pad_token_id is not None else tok.eos_token_id or 0)

    def _prepare_images(self, items: int) -> None:
        self.train_images = prepare_images(self.table.train.images, self.tokenizer)
        self.train_labels = np.asarray(self.table.train.labels)
        keep = _spread(len(self.table.evaluation), items)
        self.items = Items(None, prepare_images([self.table.evaluation.images[i] for i in keep], self.tokenizer),
                           np.asarray(self.table.evaluation.labels)[keep], None, f"{self.table.fingerprint}:{len(keep)}")

    def _order_of(self, epoch: int, size: int) -> np.ndarray:
        """Examples of one pass, batches of like lengths in random order."""
        if self.task == "image-classification":
            return np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return like_lengths(self.sizes, size, self.seed, epoch)

    def _examples(self, step: int, size: int) -> np.ndarray:
        per_pass = max(1, math.ceil(self.rows / size))
        epoch, at = divmod(step, per_pass)
        if getattr(self, "_pass", (None, None))[:2] != (epoch, size):
            self._pass = (epoch, size, self._order_of(epoch, size))
        return self._pass[2][at * size: (at + 1) * size]

    # -- what the loop asks for --------------------------------------------------------------------------
    def batch(self, step: int, size: int, accumulation: int = 1) -> list[dict]:
        """Micro-batches of optimizer step ``step``: dicts of int64 tensors [rows, length] (or pixel_values) and ``labels``.

        ``size`` rows are divided into ``accumulation`` micro-batches of about equal tokens.
        """
        if self.task == "causal-lm":
            whole = self._lm_batch(step, size)[0]
            return [{k: v[i::accumulation].contiguous() for k, v in whole.items()} for i in range(accumulation)] if accumulation > 1 else [whole]
        chosen = self._examples(step, size)
        parts = [chosen] if accumulation == 1 else [p for p in np.array_split(chosen, accumulation) if len(p)]
        return [self._collate(part) for part in parts]

    def _collate(self, chosen: np.ndarray) -> dict:
        labels = torch.from_numpy(self.train_labels[chosen].astype(np.int64))
        if self.task == "image-classification":
            return dict(pixel_values=self.train_images[torch.from_numpy(chosen)], labels=labels)
        return dict(pad([self.train_ids[i] for i in chosen], self.pad), labels=labels)

    def calibration(self, sequences: int, length: int | None = None, seed: int = 0) -> list[dict]:
        """Inputs without padding from the training part, one sequence a dict (leading dimension 1), no labels."""
        rng = np.random.default_rng([seed, 977])
        if self.task == "causal-lm":
            length = min(length or self.length, len(self.stream) - 1)
            starts = rng.integers(0, len(self.stream) - length, size=sequences)
            return [dict(input_ids=torch.from_numpy(self.stream[s: s + length].astype(np.int64))[None]) for s in starts]
        chosen = rng.choice(self.rows, size=min(sequences, self.rows), replace=False)
        if self.task == "image-classification":
            return [dict(pixel_values=self.train_images[int(i)][None]) for i in chosen]
        return [pad([self.train_ids[i][: length or None]], self.pad) for i in chosen]

    def longest(self, size: int) -> dict:
        """The micro-batch that needs the most memory: ``size`` rows of the longest kind."""
        if self.task == "text-classification":
            return self._collate(np.argsort(-self.sizes, kind="stable")[:size])
        return self.batch(0, size)[0]


def pad(rows: list[np.ndarray], value: int) -> dict:
    """Right-padded ``input_ids`` and ``attention_mask``; the mask is left out when nothing is padded (a faster path)."""
    longest = max(len(r) for r in rows)
    out = np.full((len(rows), longest), value, dtype=np.int64)
    for i, r in enumerate(rows):
        out[i, : len(r)] = r
    batch = dict(input_ids=torch.from_numpy(out))
    if any(len(r) != longest for r in rows):
        sizes = torch.tensor([len(r) for r in rows])
        batch["attention_mask"] = (torch.arange(longest)[None] < sizes[:, None]).long()
    return batch


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` indices spread evenly over ``count`` (all when 0): the same items for every run."""
    if wanted <= 0 or wanted >= count:
        return list(range(count))
    return [int((i + 0.5) * count / wanted) for i in range(wanted)]


@dataclass(frozen=True)
class ImageProcessor:
    """Size and scale of the images that a vision model expects; the facts of ``preprocessor_config.json``."""

    height: int
    width: int
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    config: dict = field(default_factory=dict, compare=False)

    @classmethod
    def from_config(cls, config: dict, model: dict) -> ImageProcessor:
        size = config.get("size") or model.get("image_size") or 224
        if isinstance(size, dict):
            height, width = size.get("height", size.get("shortest_edge", 224)), size.get("width", size.get("shortest_edge", 224))
        else:
            height = width = int(size)
        return cls(int(height), int(width), int(model.get("num_channels", 3)), tuple(config.get("image_mean") or (0.5,)),
                   tuple(config.get("image_std") or (0.5,)), config)


def prepare_images(images: list[np.ndarray], processor: ImageProcessor) -> torch.Tensor:
    """Float32 [images, channels, height, width], resized (bilinear), scaled to [0, 1] and normalized."""
    from PIL import Image

    out = np.empty((len(images), processor.channels, processor.height, processor.width), dtype=np.float32)
    mean, std = np.asarray(processor.mean, np.float32), np.asarray(processor.std, np.float32)
    for i, image in enumerate(images):
        if image.shape[:2] != (processor.height, processor.width):
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            image = np.asarray(picture.resize((processor.width, processor.height), Image.Resampling.BILINEAR))
            image = image if image.ndim == 3 else image[:, :, None]
        if image.shape[2] != processor.channels:
            image = image.mean(axis=2, keepdims=True) if processor.channels == 1 else np.repeat(image[:, :, :1], processor.channels, axis=2)
        out[i] = ((image.astype(np.float32) / 255.0 - mean) / std).transpose(2, 0, 1)
    return torch.from_numpy(out)
