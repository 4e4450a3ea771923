"""An allocation on its own, without a run: ``python -m engines.allocation.study`` reads a request and prints the result as JSON.

A process of its own, because it imports torch; the workbench starts it and shows what it says.
"""

from __future__ import annotations

import json
import sys
import time

from engines.allocation.dynamic import least_error, least_size
from engines.allocation.problem import Level, Problem, answer
from engines.errors import FettleError, InputError

WHAT = ("sparsity", "bits", "rank")
BY = ("rd", "lgreco", "evolution")


class Study:
    """One model with its calibration data, and the table of one kind of level.

    Args:
        request: model, data, what, budget, by, tokens, generations, offspring, seed, and ``stage``, the method of a pipeline that
            would allocate so (magnitude, random or wanda; mixed; lora).
    """

    def __init__(self, request: dict):
        from engines import data as datasets
        from engines import models
        from engines.context import Context
        from engines.data.tokens import TaskData
        from engines.profile import working_dtype
        from engines.reporter import Recorder
        self.ask = request
        loaded = models.load(request["model"])
        if working_dtype(loaded.profile) == "bfloat16":
            loaded = models.load(request["model"], dtype="bfloat16")
        self.model, self.profile, task = loaded.model, loaded.profile, loaded.profile.task
        table = datasets.load(request["data"], task=task)
        length = max(8, min(256, self.profile.context))
        self.data = TaskData(table, loaded.tokenizer, length=length, seed=request["seed"], items=1)
        self.context = Context(task=task, data=self.data, tokenizer=loaded.tokenizer, profile=self.profile, reporter=Recorder(),
                               seed=request["seed"])
        self.context.reporter.log = lambda line: print(line, file=sys.stderr, flush=True)
        self.found = models.matrices(self.model)
        if not self.found:
            raise InputError("model", request["model"], "it has no dense matrices inside blocks (perhaps they are packed already)",
                             "Start from a model that is not quantized")
        self.judge = None

    # -- tables ------------------------------------------------------------------------------------------
    def problem(self, values, sizes, errors, reference) -> Problem:
        rows = tuple(tuple(Level(v, s, e) for v, s, e in zip(*columns)) for columns in zip(values, sizes, errors))
        return Problem(tuple(m.name for m, _ in self.found), rows, tuple(reference))

    def measure(self, make, counts) -> list[list[float]]:
        """Errors of every level: distortions of the output (for L-GreCo their roots, as it adds norms), or, for bits with
        L-GreCo and where a search follows anyway, norms of the weights' change.
        """
        from engines.allocation.tables import Judge, Variants
        variants = Variants(self.found, make)
        samples = self.context.calibration(max(16, 8 * self.ask["tokens"] // self.data.length))
        self.judge = Judge(self.model, variants, samples, task=self.context.task, seed=self.ask["seed"])
        if self.ask["by"] == "rd" or (self.ask["by"], self.ask["what"]) == ("lgreco", "sparsity"):
            with self.judge:
                found = self.judge.distortion(counts, self.ask["tokens"])
            self.error_is = "distortion of the logits" if self.ask["by"] == "rd" else "root of the distortion of the logits"
            return found if self.ask["by"] == "rd" else [[e**0.5 for e in row] for row in found]
        self.error_is = "norm of the weights' change"
        return [[float((make(i, level, dense).float() - dense.float()).norm()) for level in range(count)]
                for i, (count, dense) in enumerate(zip(counts, variants.dense))]

    def sparsity(self) -> Problem:
        from engines import registry
        from engines.pruning import _masks, _ratios
        method, sizes = registry.build(self.ask["stage"]), [m.size for m, _ in self.found]
        base = [round(self.ask["budget"] * n) for n in sizes]
        zeros, reference = _ratios.zero_levels(sizes, base, [0] * len(sizes), method.step)
        if method.card.id == "wanda":
            from engines.models import weight
            norms = method._dense_norms(self.model, self.context, self.context.calibration(32))
            maps = [_ratios.level_map(weight(x).detach().abs().float() * norms[m.name], _masks.smallest_by_row, row)
                    for (m, x), row in zip(self.found, zeros)]
        else:
            maps = [_ratios.level_map(method.score(m, x, self.context), _masks.smallest, row) for (m, x), row in zip(self.found, zeros)]
        errors = self.measure(lambda i, level, dense: dense.masked_fill(maps[i] > level, 0), [len(row) for row in zeros])
        shares = [[z / n for z in row] for n, row in zip(sizes, zeros)]
        return self.problem(shares, [[n - z for z in row] for n, row in zip(sizes, zeros)], errors, reference)

    def bits(self) -> Problem:
        from engines import registry
        from engines.quantization import _total
        method = registry.build(self.ask["stage"])
        method.check(self.profile)
        plan = method._plan(self.profile)
        rows = [m for m, _ in self.found]
        errors = self.measure(lambda i, level, dense: _total.rounded(dense.float(), plan.levels[level], plan.group), [len(plan.levels)] * len(rows))
        start = dict(zip((m.name for m in self.profile.matrices), plan.start))
        return self.problem([plan.levels] * len(rows), [plan.bytes[m.name] for m in rows], errors, [start[m.name] for m in rows])

    def rank(self) -> Problem:
        from engines.adaptation import _ranks
        from engines.allocation.tables import residuals
        rank, rows = self.ask["budget"], [m for m, _ in self.found]
        self.error_is = "low-rank error of the mean gradient"
        most = min(min(m.out, m.inp) for m in rows)
        if rank > most:
            raise InputError("budget", rank, f"the smallest matrix allows no rank above {most}", f"Choose at most {most}")
        gradients = _ranks.mean_gradients(self.model, self.context, rows)
        options = [_ranks.levels(rank, min(m.out, m.inp)) for m in rows]
        errors = [residuals(gradients.pop(m.name), ranks, seed=self.ask["seed"]) for m, ranks in zip(rows, options)]
        return self.problem(options, [[r * (m.out + m.inp) for r in ranks] for m, ranks in zip(rows, options)], errors,
                            [ranks.index(rank) for ranks in options])

    # -- the answer --------------------------------------------------------------------------------------
    def solve(self, table: Problem):
        from engines.allocation.evolution import Search, search
        size, by = table.size(table.reference), self.ask["by"]
        if by == "rd":
            return least_error(table, size, exact=True)
        if by == "lgreco":
            return least_size(table)
        count = self.ask["offspring"]
        first = max(2, count // 4)
        plan = Search(generations=self.ask["generations"], offspring=count, survivors=(first, 1) if first < count else (1,),
                      tokens=(max(8, self.ask["tokens"] // 4), self.ask["tokens"])[-(2 if first < count else 1):])

        def told(record: dict):
            print(f"generation {record['generation'] + 1} of {plan.generations}: KL {record['fitness']:.4f} nats", file=sys.stderr, flush=True)
        with self.judge:
            return search(table, self.judge.divergence, plan, seed=self.ask["seed"], watch=told)

    def run(self) -> dict:
        from engines.kernels import fast_float32
        from engines.pruning._ratios import CHECK
        with fast_float32():
            began = time.perf_counter()
            table = getattr(self, self.ask["what"])()
            measured = time.perf_counter() - began
            found, uniform = self.solve(table), answer(table, table.reference, "uniform")
            seconds = time.perf_counter() - began
            apart = (None, None)
            if self.judge is not None:
                with self.judge:
                    apart = self.judge.divergence([table.reference, found.choice], self.ask["tokens"], CHECK)
        searched = self.ask["by"] == "evolution"
        layers = [dict(name=m.name, layer=m.layer, role=m.role, value=row[c].value, uniform=row[u].value, size=row[c].size,
                       uniform_size=row[u].size, error=row[c].error, uniform_error=row[u].error)
                  for (m, _), row, c, u in zip(self.found, table.levels, found.choice, table.reference)]
        return dict(what=self.ask["what"], by=self.ask["by"], budget=self.ask["budget"], model=self.ask["model"], data=self.ask["data"],
                    error_is=self.error_is,
                    layers=layers, figures={self.ask["what"]: [[row["layer"], row["role"], row["value"]] for row in layers]},
                    total=dict(size=found.size, uniform_size=uniform.size, error=found.error, uniform_error=uniform.error, kl=apart[1],
                               uniform_kl=apart[0]),
                    seconds=dict(table=measured, solve=seconds - measured, total=seconds),
                    generations=len(found.history) if searched else 0)


def main() -> int:
    import os
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        print(json.dumps(Study(json.loads(sys.stdin.read())).run()))
        return 0
    except InputError as e:
        print(json.dumps(dict(error=dict(field=e.field, value=e.value if isinstance(e.value, (int, float, str, bool)) else str(e.value),
                                         text=str(e)))))
        return e.exit_code
    except FettleError as e:
        print(json.dumps(dict(error=dict(field=None, value=None, text=str(e)))))
        return e.exit_code


if __name__ == "__main__":
    sys.exit(main())
