"""Two planning laws against real training of tiny language models on bundled text.

Annealing: the law is fitted to a constant and a cosine curve and predicts a linear and a warmup-stable-decay curve, which are then
trained; the relative error of the last tenth is compared. Time matters: steps of shapes chosen by thirds are timed, the regressions by
memory copies and by FLOPs are fitted to the others, and their errors on the held-out shapes are compared; shapes are timed in turns and
the least of the turns' medians counts, so that a moment of other work does not spoil one shape.

Run: python -m benchmarks.laws [--steps 1000] [--turns 2]     (under four minutes on two cores)
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from benchmarks import common
from workbench.laws.annealing import Annealing, predict
from workbench.laws.history import Curve
from workbench.laws.schedule import Schedule, warm
from workbench.laws.time_matters import TimeMatters, designs, regress

WIDTH, LAYERS, BYTES, VOCAB = 64, 2, 256, 4096
PEAK, ROWS, LENGTH = 3e-3, 16, 64
SHAPES = ((1, 64), (2, 64), (4, 64), (8, 64), (1, 128), (3, 128), (6, 128), (2, 192), (1, 256), (2, 256), (4, 256), (1, 384))
BATCHES = ((8, 64), (2, 128), (16, 32))


def text_rows(length: int):
    """Packed rows of bytes of the bundled Python documentation, int64 [rows, length]. Bytes, because a tiny model gets past the first
    steep fall of the loss with them in a minute; the law does not describe that fall."""
    import torch

    from engines import data

    text = "\n".join(data.load("python-docs", task="causal-lm").train.texts[:3000])
    ids = torch.tensor(list(text.encode()[:2_000_000]))
    return ids[: len(ids) // length * length].view(-1, length)


def model_of(layers: int, width: int, vocab: int = VOCAB, seed: int = 0):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, hidden_size=width, intermediate_size=round(8 * width / 3), num_hidden_layers=layers,
                                        num_attention_heads=max(1, width // 32), num_key_value_heads=max(1, width // 32), max_position_embeddings=256,
                                        tie_word_embeddings=True, use_cache=False))


def train(rows, plan: Schedule) -> list[float]:
    """Training loss of each step; weights and order of the data are the same for every plan."""
    import torch

    model = model_of(LAYERS, WIDTH, BYTES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    draw, losses = torch.Generator().manual_seed(0), []
    for lr in plan.rates():
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        batch = rows[torch.randint(0, len(rows), (ROWS,), generator=draw)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def annealing(steps: int) -> dict:
    """Trains four schedules; errors of the predictions for the two that the fit has not seen."""
    rows = text_rows(LENGTH)
    plans = {k: Schedule(k, steps, PEAK, 0.03) for k in ("constant", "cosine", "linear", "wsd")}
    curves = {k: Curve(k, np.arange(1.0, steps + 1), np.array(train(rows, p)), p.rates()) for k, p in plans.items()}
    law = Annealing()
    out = []
    for seen in (("constant", "cosine"), ("constant", "wsd"), ("cosine",)):
        fitted = law.fit([curves[k] for k in seen])
        c = {k: fitted[k] for k in ("L0", "A", "alpha", "C")}
        for name, curve in curves.items():
            if name in seen:
                continue
            line = predict(c, curve.lr, fitted.extra["lambda"])
            begin = max(warm(curve.lr) + 1, steps // 10)
            end = slice(-max(10, steps // 10), None)
            parts = np.array_split(np.arange(begin, steps), 20)  # single steps are as noisy as their batch
            whole = statistics.mean(abs(line[p].mean() / curve.value[p].mean() - 1) for p in parts)
            flat = abs(np.mean(curves["constant"].value[end]) / np.mean(curve.value[end]) - 1)
            out.append(dict(fitted_to=" + ".join(seen), predicted=name, end=float(np.mean(curve.value[end])), said=float(line[end].mean()),
                            error_end=float(abs(line[end].mean() / np.mean(curve.value[end]) - 1)), error_curve=float(whole),
                            by_constant=float(flat), lambda_=fitted.extra["lambda"]))
    common.table(f"Annealing: relative error of the mean loss over the last tenth of {steps} steps, and of the curve", out)
    return dict(rows=out, steps=steps)


def seconds_of(model, rows, length: int, count: int, clock) -> float:
    """Median seconds of ``count`` training steps after two."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids, took = torch.randint(0, VOCAB, (rows, length)), []
    for i in range(count + 2):
        began = clock()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        if i > 1:
            took.append(clock() - began)
    return statistics.median(took)


def times(turns: int, clock=time.perf_counter) -> dict:
    """Times all shapes in turns and cross-validates by thirds."""
    cases = [(a, w, *BATCHES[i % len(BATCHES)]) for i, (a, w) in enumerate(SHAPES)]
    cases += [(a, w, *BATCHES[(i + 1) % len(BATCHES)]) for i, (a, w) in enumerate(SHAPES)]
    best = np.full(len(cases), np.inf)
    for _ in range(turns):
        for i, (layers, width, rows, length) in enumerate(cases):
            best[i] = min(best[i], seconds_of(model_of(layers, width), rows, length, 5, clock))
    layers, width, rows, length = (np.array(c, float) for c in zip(*cases))
    p = {"layers": layers, "hidden": width, "mlp": np.round(8 * width / 3), "heads": np.maximum(1, width // 32), "batch": rows, "length": length,
         "vocab": np.full(len(cases), float(VOCAB))}
    held, tried = {}, designs(p)
    for name, x in tried.items():
        errors = np.zeros(len(cases))
        for fold in range(3):
            out = np.arange(len(cases)) % 3 == fold
            errors[out] = x[out] @ regress(x[~out], best[~out]) / best[out] - 1
        held[name] = errors
    from workbench.laws.points import Points

    fitted = TimeMatters().fit(Points({"step_seconds": best, **p}, [str(c) for c in cases]))
    out = [dict(regression=k, median_error=float(np.median(np.abs(v))), worst=float(np.abs(v).max())) for k, v in held.items()]
    common.table(f"Time matters: relative error of a step's seconds on held-out shapes, {len(cases)} cases, chosen: {fitted.extra['design']}", out)
    return dict(rows=out, chosen=fitted.extra["design"], cases=[dict(layers=a, width=w, rows=r, length=n, seconds=float(s))
                                                                for (a, w, r, n), s in zip(cases, best)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time of one thread, for a busy machine")
    a = parser.parse_args()
    began = time.perf_counter()
    if a.clock == "cpu":
        import torch

        torch.set_num_threads(1)
    found = dict(clock=a.clock, times=times(a.turns, time.process_time if a.clock == "cpu" else time.perf_counter), annealing=annealing(a.steps))
    common.write("laws", found | dict(seconds=round(time.perf_counter() - began, 1)))


if __name__ == "__main__":
    main()
