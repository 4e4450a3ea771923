"""Where a model or a data set comes from, and its shapes and counts; torch-free and cached.

A model source is a bundled id (``assets/models/<id>``), a local folder, or a hub id. Of a hub model only config.json and
the header of its safetensors files are asked for, and kept under the home, so that a forecast downloads no weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from engines import shapes
from engines.data.order import longest
from engines.errors import InputError
from engines.models import adapter
from engines.models.folder import read_folder
from engines.models.locate import bundled
from engines.profile import HEADER_DTYPES, ModelProfile, Tensor, from_config
from engines.registry import suggestion

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_TIMEOUT = 8.0
_PROFILES: dict[tuple, ModelProfile] = {}
_REFUSED: dict[str, tuple[float, InputError]] = {}


@dataclass(frozen=True)
class Source:
    """A resolved model source: ``kind`` is bundled, folder, hub or adapter (``folder`` is then its base model's); no folder for a hub id."""

    id: str
    kind: str
    folder: Path | None


def resolve(source: str) -> Source:
    """What kind of source this is.

    Raises:
        InputError: neither a bundled id, nor a folder, nor of the form of a hub id.
    """
    if not isinstance(source, str) or not source.strip():
        raise InputError("model", source, "no model named", "Give a bundled id, a local folder or a hub id")
    known = bundled()
    if source in known:
        return Source(source, "bundled", known[source])
    path = Path(source).expanduser()
    if path.is_dir():
        if adapter.is_adapter(path):    # tokenizer and files are its base model's
            try:
                return Source(source, "adapter", resolve(adapter.base_of(path)).folder)
            except InputError as e:
                if e.value != str(path):
                    adapter.read(path)  # says what is wrong in the adapter's own terms
                raise
        return Source(source, "folder", path)
    if source.startswith((".", "/", "~")) or path.exists():
        problem = "it is a file, not a folder" if path.exists() else "there is no such folder"
        raise InputError("model", source, problem, "Give a folder with config.json and *.safetensors")
    if HUB_ID.match(source):
        return Source(source, "hub", None)
    raise InputError(
        "model", source, "there is no such model", suggestion(source, known) + ", or give a local folder or a hub id (owner/name)"
    )


def profile(source: str) -> ModelProfile:
    """Shapes of a model source; cached until its files change.

    Raises:
        InputError: unknown, unreadable, only pickle weights, or the hub does not answer.
    """
    found = resolve(source)
    if found.kind == "adapter":
        folder = Path(source).expanduser()
        return adapter.profile(folder, profile(adapter.base_of(folder)), source)
    key = (found.id, _stamp(found.folder))
    if key not in _PROFILES:
        _PROFILES[key] = _hub_profile(source) if found.kind == "hub" else _with_shapes(read_folder(found.folder, source))
    return _PROFILES[key]


def _stamp(folder: Path | None) -> tuple:
    if folder is None:
        return ()
    return tuple(
        (p.name, p.stat().st_mtime_ns, p.stat().st_size)
        for p in sorted(folder.iterdir())
        if p.suffix in (".json", ".safetensors")
    )


_BUFFERS = re.compile(r"(^|\.)(position_ids|masked_bias|rotary_emb\.inv_freq|attn\.bias)$")


def _with_shapes(profile: ModelProfile) -> ModelProfile:
    """Without the buffers that old files carry; a folder with config.json only gets the tensors that its config implies."""
    if profile.tensors:
        kept = tuple(t for t in profile.tensors if not _BUFFERS.search(t.name))
        return profile if len(kept) == len(profile.tensors) else from_config(profile.source, profile.config, kept)
    made = from_config(profile.source, profile.config, shapes.tensors(profile.config, dtype="float32"))
    object.__setattr__(made, "has_weights", False)
    return made


# -- the hub -----------------------------------------------------------------------------------------------------------
def _hub_config(repo: str) -> dict:
    """config.json of a hub model (a few kilobytes), in one request: the client's own downloads retry for 23 seconds."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    answer = get_session().get(
        hf_hub_url(repo, "config.json"), headers=build_hf_headers(), timeout=HUB_TIMEOUT, follow_redirects=True
    )
    hf_raise_for_status(answer)
    return answer.json()


def _hub_downloaded(repo: str) -> Path | None:
    """The snapshot of a hub model that an earlier run has downloaded with its weights, so that it plans offline."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "config.json")
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def _hub_tensors(repo: str) -> list[tuple[str, list[int], str]]:
    """(name, shape, safetensors type) of every stored tensor, from the remote headers alone."""
    from huggingface_hub import HfApi

    found = HfApi().get_safetensors_metadata(repo, timeout=HUB_TIMEOUT)
    return [
        (name, list(info.shape), str(info.dtype)) for file in found.files_metadata.values() for name, info in file.tensors.items()
    ]


def _hub_profile(repo: str) -> ModelProfile:
    kept = _cache("hub", repo)
    if kept is None:
        folder = _hub_downloaded(repo)
        if folder is not None:
            return read_folder(folder, repo)
        when, refused = _REFUSED.get(repo, (0.0, None))
        if refused is not None and time.time() - when < 30:  # a slider must not knock at a dead hub at each move
            raise refused
        try:
            kept = {"config": _hub_config(repo), "tensors": _hub_tensors(repo)}
        except Exception as e:
            error = _hub_error(repo, e)
            _REFUSED[repo] = (time.time(), error)
            raise error from None
        _cache("hub", repo, kept)
    rows = tuple(Tensor(n, tuple(s), HEADER_DTYPES.get(d, d.lower())) for n, s, d in kept["tensors"])
    return _with_shapes(from_config(repo, kept["config"], rows))


def _hub_error(repo: str, error: Exception) -> InputError:
    """What went wrong with the hub, told by the class names in the chain of causes (no import of its client)."""
    names = set()
    cause: BaseException | None = error
    while cause is not None:
        names |= {c.__name__ for c in type(cause).__mro__}
        cause = cause.__cause__ or cause.__context__
    if "GatedRepoError" in names:
        return InputError(
            "model",
            repo,
            "the hub shows this model only to those who accepted its terms",
            "Accept them on its page and log in with `hf auth login`, or choose another model",
        )
    if "RepositoryNotFoundError" in names:
        return InputError(
            "model", repo, "the hub has no such model, or it is private", "Check the id, or log in with `hf auth login`"
        )
    if "NotASafetensorsRepoError" in names:
        return InputError(
            "model",
            repo,
            "it has no safetensors weights; pickle weights can run code when loaded",
            "Choose a model with model.safetensors, or convert it in an environment that you trust",
        )
    if "SafetensorsParsingError" in names:
        return InputError(
            "model", repo, "the header of its weights cannot be read", "Choose another model, or download it and give the folder"
        )
    if "EntryNotFoundError" in names and not names & {"LocalEntryNotFoundError"}:
        return InputError("model", repo, "it has no config.json", "Choose a transformers model")
    if isinstance(error, ImportError):
        return InputError("model", repo, "the package huggingface_hub is not installed", "Run pip install huggingface_hub")
    return InputError(
        "model",
        repo,
        f"the hub cannot be reached ({type(error).__name__})",
        "Check the network, or use " + " or ".join(bundled() or ["a bundled model"]) + " or a local folder",
    )


# -- data --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class DataFacts:
    """What the planner needs of a data set. ``lengths``: a sample of examples' lengths in tokens, ascending."""

    source: str
    task: str
    train: int
    evaluation: int
    labels: int
    tokens: int
    """Training tokens (causal-lm), or the sum of the examples' lengths."""
    evaluation_tokens: int
    characters: int
    lengths: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()
    how: str = ""
    order: tuple[int, ...] = ()
    """The length of every training example in the order of the data, where all are known."""

    def length_at(self, share: float) -> int:
        """The length that ``share`` of the examples do not exceed; 0 when unknown."""
        return self.lengths[min(len(self.lengths) - 1, int(share * len(self.lengths)))] if self.lengths else 0


_DESCRIBED: dict[tuple, dict] = {}


SAMPLE = 48
"""Rows that a description carries: enough to measure characters per token."""


def description(
    source: str, *, task: str = "auto", text: str | None = None, label: str | None = None, split: float = 0.1
) -> dict:
    """``engines.data.describe``, kept in memory until the file changes; that of bundled data is kept under the home as well.

    Raises:
        InputError: the data cannot be used; the sentence names the columns that exist.
    """
    from engines import data

    key = (source, task, text, label, split, _data_stamp(source))
    if key not in _DESCRIBED:
        if len(_DESCRIBED) > 64:
            _DESCRIBED.clear()
        name = f"{key} {sys.version} {_code_stamp()}" if source in data.BUNDLED else None
        found = _cache("data", name) if name else None
        if found is None:
            found = data.describe(source, task=task, text=text, label=label, split=split, rows=SAMPLE)
            if name:
                _cache("data", name, found)
        _DESCRIBED[key] = found
    return _DESCRIBED[key]


@functools.cache
def _code_stamp() -> float:
    from engines import data

    return max(p.stat().st_mtime for p in Path(data.__file__).parent.glob("*.py"))


def _data_stamp(source: str) -> tuple:
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return (path.stat().st_mtime_ns, path.stat().st_size)
        if path.is_dir():
            return (path.stat().st_mtime_ns, sum(1 for _ in path.iterdir()))
    except OSError:
        pass
    return ()


_FACTS: dict[tuple, DataFacts] = {}


def facts(data, model: ModelProfile, task: str = "auto") -> DataFacts:
    """Counts of a ``spec.Data`` in the tokens of ``model``.

    Args:
        data: source, columns, split and limit.
        task: ``auto`` lets the columns decide.

    Raises:
        InputError: the data cannot be used for the task.
    """
    key = (data, model.source, task, _data_stamp(data.source))
    if key in _FACTS:
        return _FACTS[key]
    found = description(data.source, task=task, text=data.text, label=data.label, split=data.split)
    share = min(1.0, data.limit / found["train"]) if data.limit else 1.0
    train = min(found["train"], data.limit) if data.limit else found["train"]
    labels = len(found["labels"])
    if found["task"] == "image-classification":
        made = DataFacts(
            data.source,
            found["task"],
            train,
            found["evaluation"],
            labels,
            train * model.context,
            found["evaluation"] * model.context,
            0,
            (model.context,),
            tuple(found["warnings"]),
            "patches per image, from config.json",
        )
    else:
        ratio, how = characters_per_token(model, found)
        extra = 0 if found["task"] == "causal-lm" else 2  # [CLS] and [SEP]
        order = tuple(max(1, round(n / ratio)) + extra for n in found["lengths"])
        made = DataFacts(
            data.source,
            found["task"],
            train,
            found["evaluation"],
            labels,
            round(found["characters"] * share / ratio) + extra * train,
            round(found["evaluation_characters"] / ratio) + extra * found["evaluation"],
            round(found["characters"] * share),
            tuple(sorted(order)),
            tuple(found["warnings"]),
            how,
            order if extra and len(order) == train else (),
        )
    if len(_FACTS) > 64:
        _FACTS.clear()
    _FACTS[key] = made
    return made


@functools.lru_cache(maxsize=256)
def longest_row(facts: DataFacts, batch: int, seed: int, steps: int) -> int:
    """Tokens of the longest of the first batches: as they will be drawn where every length is known, else of a usual draw."""
    if facts.order and steps * batch < len(facts.order):
        return longest(facts.order, batch, seed, steps)
    return 8 + facts.length_at(1 - 1 / (steps + 1))


TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


def check_tokenizer(model: ModelProfile) -> None:
    """Refuse a local text model without a tokenizer before anything is started.

    Raises:
        InputError: none of the usual files is in the folder.
    """
    folder = resolve(model.source).folder
    if folder is not None and not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError("model", model.source, "the folder has no tokenizer", "Put tokenizer.json beside config.json")


@functools.lru_cache(maxsize=8)
def _tokenizer(path: str, stamp: int):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def characters_per_token(model: ModelProfile, found: dict) -> tuple[float, str]:
    """Mean characters of a token on this data, and how it is known: its own tokenizer over a few rows, else 4."""
    try:
        folder = resolve(model.source).folder
    except InputError:
        folder = None
    file = folder / "tokenizer.json" if folder else None
    texts = [row["text"] for row in found["rows"] if row.get("text")]
    if file is None or not file.is_file() or not texts:
        return 4.0, "4 characters a token assumed: the tokenizer is not at hand"
    try:
        read = _tokenizer(str(file), file.stat().st_mtime_ns)
        read.no_truncation()
        read.no_padding()
        count = sum(len(e.ids) for e in read.encode_batch(texts, add_special_tokens=False))
    except Exception as e:  # the tokenizers package raises plain Exception
        return 4.0, f"4 characters a token assumed: the tokenizer cannot be read ({e})"
    return max(0.25, sum(map(len, texts)) / max(1, count)), f"the model's tokenizer over {len(texts)} rows"


# -- the cache under the home ------------------------------------------------------------------------------------------
def _cache(kind: str, key: str, value=None):
    """Read, or write when ``value`` is given, one JSON file under the home; a home that cannot be written is no obstacle."""
    from workbench.home import Home

    try:
        folder = Home.open().path / "cache" / kind
        file = folder / (hashlib.sha256(key.encode()).hexdigest()[:24] + ".json")
        if value is None:
            return json.loads(file.read_text()) if file.is_file() else None
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    except (InputError, OSError, ValueError):
        return None
    return value
