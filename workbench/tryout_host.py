"""The process behind Try: loads variants, generates or classifies, writes events to a results file.

Only this file of Try touches torch. Decoding is a loop of our own with a KV cache, so that the time and the surprise of
every token are known exactly. Variants take turns of a third of a second: the columns of the page fill side by side,
and since only one computes at a time the times of one are not blurred by the others.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path

from workbench import tryout

TURN_SECONDS = 0.3
FLUSH_SECONDS = 0.05
KEEP_DAYS = 7


class Sink:
    """Appends events to the results file, at most every 50 ms for tokens so that a poll finds whole lines."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)
        self._pending: dict[int, list] = {}
        self._flushed = 0.0

    def put(self, **event) -> None:
        self.flush()
        self._file.write(json.dumps(event).encode() + b"\n")

    def token(self, variant: int, token: int, piece: str, nats: float, milliseconds: float) -> None:
        self._pending.setdefault(variant, []).append([token, piece, round(nats, 4), round(milliseconds, 3)])
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        for variant, tokens in self._pending.items():
            self._file.write(json.dumps({"v": variant, "t": tokens}).encode() + b"\n")
        self._pending.clear()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._file.close()


class Decoder:
    """Ids to text piece by piece: holds bytes back until they make a whole character."""

    def __init__(self, tokenizer, prompt_ids: list[int]):
        self.tokenizer, self.ids = tokenizer, list(prompt_ids)
        # The prompt's tail stays in view: some tokenizers put the space between two words into either of them.
        self.start, self.read = max(0, len(prompt_ids) - 4), len(prompt_ids)

    def push(self, token: int, last: bool = False) -> str:
        self.ids.append(token)
        before = self._text(self.ids[self.start:self.read])
        now = self._text(self.ids[self.start:])
        if now.endswith("\ufffd") and not last and len(self.ids) - self.read < 8:
            return ""
        self.start, self.read = self.read, len(self.ids)
        return now[len(before):]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def choose(logits, temperature: float, top_p: float, generator) -> tuple[int, float]:
    """Draw the next token.

    Args:
        logits: [vocabulary] of the model, untempered.
    Returns:
        its id, and its surprise in nats under the model's own distribution (temperature 1, all tokens).

    The draw is a race of exponential clocks (the Gumbel-max trick): variants that share a seed share the clocks, so they
    say the same as long as their probabilities favour the same token, and part only where the models differ.
    """
    import torch
    logits = logits.detach().float().cpu()
    log_p = torch.log_softmax(logits, dim=-1)
    if temperature == 0:
        token = int(log_p.argmax())
        return token, -float(log_p[token])
    p = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ordered, order = p.sort(descending=True)
        # Keep the smallest set that reaches top_p: drop what comes after it has been reached.
        beyond = ordered.cumsum(0) - ordered >= top_p
        p = p.scatter(0, order[beyond], 0.0)
    clocks = torch.empty_like(p).exponential_(generator=generator)
    token = int((p / clocks).argmax())
    return token, -float(log_p[token])


def tokens(loaded, prompt: str, *, seed: int, temperature: float, top_p: float, new_tokens: int):
    """Generate, one token per step of this generator.

    Yields:
        ("token", id, piece, nats, milliseconds) per token; at last ("done", figures).
    Raises:
        ValueError: the prompt leaves no room in the model's context; the text says by how much.
    """
    import torch

    from engines.data.tokens import encode, start_token
    model, tokenizer = loaded.model, loaded.tokenizer
    device = next(model.parameters()).device
    # As in training and evaluation: every text begins with the start token.
    ids = [start_token(tokenizer), *map(int, encode(tokenizer, [prompt])[0])]
    end = model.config.eos_token_id
    ends = set(end if isinstance(end, (list, tuple)) else [] if end is None else [end])
    context = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    if context and len(ids) >= context:
        raise ValueError(f"The prompt is {len(ids):,} tokens and the context of this model {context:,}. Shorten the prompt.")
    room = min(new_tokens, context - len(ids)) if context else new_tokens
    generator = torch.Generator().manual_seed(seed)
    decoder, cache, nats, times, step = Decoder(tokenizer, ids), None, [], [], torch.tensor([ids], device=device)
    prompt_nats = None
    stop = "length" if room == new_tokens else "context full"
    for i in range(room):
        began = time.perf_counter()
        with torch.inference_mode():
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            if i == 0 and len(ids) > 1:
                loss = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), step[0, 1:])
                prompt_nats = float(loss)
            token, surprise = choose(out.logits[0, -1], temperature, top_p, generator)
        times.append(time.perf_counter() - began)
        nats.append(surprise)
        if token in ends:
            stop = "end of text"
            break
        yield "token", token, decoder.push(token, last=i == room - 1), surprise, 1000 * times[-1]
        step = torch.tensor([[token]], device=device)
    decode = sum(times[1:])
    yield "done", {"count": len(times) - (stop == "end of text"), "prompt_tokens": len(ids), "seconds": sum(times),
                   "first_ms": 1000 * times[0], "tokens_per_second": (len(times) - 1) / decode if decode else 1 / times[0],
                   "nats": sum(nats) / len(nats), "prompt_nats": prompt_nats, "kv_bytes": cache_bytes(cache), "stop": stop}


def cache_bytes(cache) -> int | None:
    """Bytes of the keys and values that a cache holds; None for a cache whose tensors cannot be found."""
    import torch
    found = []
    for layer in getattr(cache, "layers", None) or (cache if isinstance(cache, (tuple, list)) else []):
        parts = layer if isinstance(layer, (tuple, list)) else vars(layer).values()
        found += [t for t in parts if isinstance(t, torch.Tensor) and t.dim() >= 3]
    return sum(t.numel() * t.element_size() for t in found) if found else None


def weight_bytes(model) -> int:
    """Bytes of the distinct storages behind parameters and buffers (tied tensors count once)."""
    seen = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


class Host:
    """Takes the requests of one home.

    Args:
        home: has ``path`` and ``store``. load: (source, task) -> object with ``model`` (eval mode) and ``tokenizer``.
    """

    def __init__(self, home, load=None):
        self.home, self.base, self.load = home, tryout.folder(home), load or _load
        self.loaded: dict[tuple, object] = {}

    def waiting(self) -> list[Path]:
        return sorted((self.base / "requests").glob("*.json"))

    def serve_one(self, path: Path) -> None:
        """Do one request and write its events; whatever goes wrong is an event too."""
        request = json.loads(path.read_text())
        name = request["id"]
        sink = Sink(self.base / "results" / f"{name}.jsonl")
        path.unlink()
        cancelled = (self.base / "requests" / f"{name}.cancel")
        try:
            busy = self._threads()
            work = {"generate": self._generate, "classify": self._classify}[request["kind"]]
            work(request, sink, cancelled.exists)
            sink.put(s="end", busy=busy)
        except Exception as e:                            # the page must learn of it, and the process must live on
            sink.put(s="end", error=_sentence(e))
            raise
        finally:
            cancelled.unlink(missing_ok=True)
            sink.close()

    def _threads(self) -> bool:
        """One thread while a run computes on this machine: two pools of spinning threads slow one another tenfold."""
        import torch
        busy = bool(self.home.store.count_runs(status="running"))
        torch.set_num_threads(1 if busy else max(1, len(os.sched_getaffinity(0))))
        return busy

    def _get(self, variant: dict):
        source = variant["source"]
        weights = sorted(Path(source).glob("*.safetensors")) if os.path.isdir(source) else []
        key = (source, *(f.stat().st_mtime_ns for f in weights))
        if key not in self.loaded:
            while len(self.loaded) >= 8:                  # oldest first; a comparison never needs more than four
                self.loaded.pop(next(iter(self.loaded)))
            began = time.perf_counter()
            loaded = self.load(source, variant["task"])
            loaded.model.eval()
            self.loaded[key] = (loaded, time.perf_counter() - began)
        else:
            self.loaded[key] = self.loaded.pop(key)       # most recently used at the end
        return self.loaded[key]

    def _open(self, request: dict, sink: Sink):
        """Load every variant; returns those that could be, with their place."""
        ready = []
        for v, variant in enumerate(request["variants"]):
            sink.put(v=v, s="loading")
            try:
                loaded, seconds = self._get(variant)
            except Exception as e:
                sink.put(v=v, s="error", error=_sentence(e))
                continue
            sink.put(v=v, s="ready", load_seconds=seconds, weight_bytes=weight_bytes(loaded.model), rss_bytes=_rss())
            ready.append((v, loaded))
        return ready

    def _generate(self, request: dict, sink: Sink, cancelled) -> None:
        settings = {k: request[k] for k in ("seed", "temperature", "top_p", "new_tokens")}
        going = {v: tokens(loaded, request["prompt"], **settings) for v, loaded in self._open(request, sink)}
        while going:
            for v in list(going):
                turn = time.monotonic() + TURN_SECONDS
                try:
                    while time.monotonic() < turn and not cancelled():
                        kind, *rest = next(going[v])
                        if kind == "done":
                            sink.put(v=v, s="done", rss_bytes=_rss(), **rest[0])
                            del going[v]
                            break
                        sink.token(v, *rest)
                except Exception as e:
                    del going[v]
                    sink.put(v=v, s="error", error=_sentence(e))
            if cancelled():
                for v in going:
                    sink.put(v=v, s="done", stop="you")
                return

    def _classify(self, request: dict, sink: Sink, cancelled) -> None:
        import torch
        for v, loaded in self._open(request, sink):
            if cancelled():
                return
            try:
                inputs, truth = self._inputs(request, loaded, request["variants"][v])
                with torch.inference_mode():
                    loaded.model(**inputs)                # the first call of a shape pays for kernels that it picks
                    began = time.perf_counter()
                    logits = loaded.model(**inputs).logits[0].float()
                    seconds = time.perf_counter() - began
                p = torch.softmax(logits, -1).tolist()
                names = loaded.model.config.id2label
                order = sorted(range(len(p)), key=lambda i: -p[i])[:8]
                sink.put(v=v, s="done", p=[[names.get(i, str(i)), round(p[i], 5)] for i in order], first_ms=1000 * seconds,
                         truth=truth, rss_bytes=_rss())
            except Exception as e:
                sink.put(v=v, s="error", error=_sentence(e))

    def _inputs(self, request: dict, loaded, variant: dict) -> tuple[dict, str | None]:
        """The model's inputs [1, ...] and the name of the true label where it is known."""
        truth, text, pixels = None, request.get("text"), None
        if request.get("item") is not None:
            found = tryout.raw_item(request["data"], variant["task"], request["item"])
            text, pixels, truth = found["text"], found["image"], found["label"]
        elif request.get("image"):
            pixels = tryout.read_image(request["image"])
        if pixels is not None:
            from engines.data.tokens import prepare_images
            return {"pixel_values": prepare_images([pixels], loaded.tokenizer)}, truth
        return _text_inputs(loaded, text), truth


def _text_inputs(loaded, text: str) -> dict:
    """``input_ids`` [1, length] as the training data has them: cut to the context, special tokens around."""
    import torch

    from engines.data.tokens import encode
    tokenizer = loaded.tokenizer
    limit = getattr(loaded.model.config, "max_position_embeddings", None) or 512
    ids = encode(tokenizer, [text])[0].tolist()[:limit - tokenizer.num_special_tokens_to_add(pair=False)]
    if hasattr(tokenizer, "build_inputs_with_special_tokens"):
        ids = tokenizer.build_inputs_with_special_tokens(ids)
    return {"input_ids": torch.tensor([ids])}


def _load(source: str, task: str):
    from engines import models
    from engines.models.folder import read_folder
    from engines.profile import working_dtype
    where = models.locate(source)
    # In the type in which the engines evaluate, so that speed and surprise are those of the run's own figures.
    dtype = working_dtype(read_folder(where, source)) if isinstance(where, Path) else "float32"
    return models.load(source, task=task, dtype=dtype)


def _sentence(error: Exception) -> str:
    text = str(error).strip().splitlines()
    name = type(error).__name__
    return text[0] if text and name in ("InputError", "ValueError", "RunFailed") else f"{name}: {text[0] if text else 'no more is known'}"


def _rss() -> int:
    import psutil
    return psutil.Process().memory_info().rss


def serve(home_path: str, idle: float) -> None:
    """Take requests until none came for ``idle`` seconds. Returns at once if another process serves this home."""
    os.environ["WORKBENCH_HOME"] = home_path
    from workbench.home import Home
    home = Home.open()
    lock = open(tryout.folder(home) / "host.lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    host = Host(home)
    _sweep(host.base)
    _warm()
    last = time.monotonic()
    while time.monotonic() - last < idle:
        for path in host.waiting():
            try:
                host.serve_one(path)
            except Exception as e:                        # already told to the page; the log keeps the whole of it
                import traceback
                traceback.print_exception(e)
            last = time.monotonic()
        time.sleep(0.02)


def _warm() -> None:
    """Imports what every request needs; the page starts this process while the prompt is still being written."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import engines.models  # noqa: F401


def _sweep(base: Path) -> None:
    """Forget results and uploads after a week; what was voted on is kept in the database."""
    old = time.time() - KEEP_DAYS * 86400
    for file in [*(base / "results").iterdir(), *(base / "uploads").iterdir()]:
        if file.stat().st_mtime < old:
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else tryout.IDLE_SECONDS)
