"""The teacher of a distillation: where it is, whether it suits the student, and its soft labels by example."""

from __future__ import annotations

import copy
import functools
import hashlib
from pathlib import Path

from engines.errors import InputError
from engines.heads import has_head
from engines.lazy import torch
from engines.models.folder import read_folder
from engines.models.locate import locate
from engines.profile import ModelProfile, working_dtype


def shapes(teacher: str, field: str) -> ModelProfile:
    """The profile of a teacher from its files; torch-free, read once for each state of the folder.

    Raises:
        InputError: not a bundled model or a local folder with weights.
    """
    try:
        where = locate(teacher)
        if not isinstance(where, Path):
            raise InputError(field, teacher, "it is not on this machine", "Give a bundled model, or the folder of a model or of a run's export")
        found = _read(where, (where / "config.json").stat().st_mtime_ns if (where / "config.json").is_file() else 0)
    except InputError as e:
        raise e if e.field == field else InputError(field, teacher, e.problem, e.remedy) from None
    if not found.has_weights:
        raise InputError(field, teacher, "the folder has a config.json but no *.safetensors", "Give a trained model")
    return found


@functools.lru_cache(maxsize=64)
def _read(folder: Path, stamp: int) -> ModelProfile:
    return read_folder(folder)


def suits(teacher: ModelProfile, student: ModelProfile, name: str, field: str) -> None:
    """Refuse a teacher of another task, with another number of classes, or with another vocabulary where tokens are compared."""
    if teacher.task != student.task:
        raise InputError(field, name, f"it was made for {teacher.task}, the student learns {student.task}", "Choose a teacher of the same task")
    if teacher.task != "causal-lm" and not has_head(teacher.config):
        raise InputError(field, name, "it has no trained head, so that it has no labels to teach", "Fine-tune it for this task first and name its export")
    if teacher.task == "causal-lm" and teacher.vocab != student.vocab:
        raise InputError(field, name, f"its vocabulary has {teacher.vocab:,} tokens and the student's {student.vocab:,}, so that their predictions of "
                         "the next token cannot be compared", "Choose a teacher of the same family with the same tokenizer")
    if teacher.task == "image-classification" and _image(teacher) != _image(student):
        raise InputError(field, name, f"it sees images of {_image(teacher)}, the student of {_image(student)}", "Choose a teacher for the same images")


def new_head(source: str) -> bool:
    """Whether the files of ``source`` are known to lack a classification head; False where there are none to look at."""
    try:
        where = locate(source)
        return isinstance(where, Path) and not has_head(_read(where, (where / "config.json").stat().st_mtime_ns).config)
    except (InputError, OSError):
        return False


def _image(profile) -> str:
    config = profile.config
    return f"{config.get('image_size')} pixels with {config.get('num_channels', 3)} channels"


class Teacher:
    """A frozen model in evaluation mode, and the logits of its class labels by example.

    Args:
        source: a bundled id or a folder; empty takes a copy of ``model``, the student before anything is done to it.
    """

    def __init__(self, source: str, model, context, field: str):
        from engines.models import load
        self.context, self.ids, self.order = context, None, None
        if not source:
            self.model, self.tokenizer, self.data = copy.deepcopy(model), context.tokenizer, context.data
        else:
            profile = shapes(source, field)
            loaded = load(source, context.task, dtype=working_dtype(profile), device=context.device)
            self.model, self.tokenizer, self.data = loaded.model, loaded.tokenizer, context.data
            self._match(source, field)
        self.model.requires_grad_(False).eval()

    def _match(self, source: str, field: str) -> None:
        mine, theirs = self.tokenizer, self.context.tokenizer
        same = not hasattr(theirs, "get_vocab") or mine.get_vocab() == theirs.get_vocab()
        if self.context.task == "causal-lm":
            if not same:
                raise InputError(field, source, "its tokenizer numbers the tokens in another way, so that predictions of the next token cannot be compared",
                                 "Choose a teacher with the student's tokenizer")
            return
        names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        wanted = list(self.data.labels)
        if len(names) != len(wanted):
            raise InputError(field, source, f"it knows {len(names)} labels, the data has {len(wanted)}", "Choose a teacher that was trained on these labels")
        if names != wanted:
            if sorted(names) == sorted(wanted):
                self.order = torch.tensor([names.index(n) for n in wanted])
            elif all(n.upper().startswith("LABEL_") for n in names):
                self.context.reporter.log("the teacher's labels have no names: they are taken to be in the order of the data's")
            else:
                raise InputError(field, source, f"its labels ({', '.join(names[:3])} ...) are not the data's ({', '.join(wanted[:3])} ...)",
                                 "Choose a teacher that was trained on these labels")
        if not same and self.context.task == "text-classification":
            from engines.data.tokens import TaskData
            self.data = TaskData(self.data.table, mine, length=self.data.length, seed=0, items=1)

    # -- labels of examples ------------------------------------------------------------------------------
    def _rows(self, inputs: dict) -> list[int]:
        """Numbers of the training examples in a batch, found by their content: the order of the data plays no part."""
        if self.ids is None:
            data = self.context.data
            pixels = getattr(data, "train_images", None)
            rows = [r.numpy() for r in pixels] if pixels is not None else [r.astype("int64") for r in data.train_ids]
            self.ids = {}
            for i, row in enumerate(rows):
                self.ids.setdefault(_key(row), i)
        if "pixel_values" in inputs:
            found = [r.cpu().numpy() for r in inputs["pixel_values"]]
        else:
            mask, ids = inputs.get("attention_mask"), inputs["input_ids"].cpu()
            found = [row.numpy() if mask is None else row[mask[i].cpu().bool()].numpy() for i, row in enumerate(ids)]
        return [self.ids[_key(row)] for row in found]

    def labels(self, inputs: dict):
        """Soft labels of a batch: [rows, classes], float32; each example is shown to the teacher once, whatever the order."""
        context, rows = self.context, self._rows(inputs)
        if "teacher" not in context.state:
            context.state["teacher"] = torch.full((context.data.rows, self.model.config.num_labels), float("nan"))
        known = context.state["teacher"]
        missing = [i for i in dict.fromkeys(rows) if torch.isnan(known[i, 0])]
        if missing:
            batch = {k: v.to(context.device) for k, v in self.data._collate(_array(missing)).items() if k != "labels"}
            with torch.no_grad():
                logits = self.model(**batch).logits.float().cpu()
            known[missing] = logits if self.order is None else logits[:, self.order]
        return known[rows].to(context.device)


def _array(rows: list[int]):
    import numpy as np
    return np.asarray(rows)


def _key(row) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()
