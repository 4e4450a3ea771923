"""The allocator of levels: dynamic programs against enumeration, the search's budget, the measured tables."""

import itertools
import random

import pytest
import torch

from engines.allocation import dynamic
from engines.allocation.evolution import Search, search, swap
from engines.allocation.problem import Level, Problem
from engines.allocation.tables import Judge, Variants, residuals
from engines.errors import InputError, StopRequested
from engines.models import matrices
from engines.pruning import _masks, _ratios
from tests.engines._micro import TASKS, context_of, micro


def table(errors, sizes, reference=None, budget=None) -> Problem:
    levels = tuple(tuple(Level(i, z, e) for i, (e, z) in enumerate(zip(row, col))) for row, col in zip(errors, sizes))
    return Problem(tuple(f"l{i}" for i in range(len(levels))), levels, reference, budget)


def every(problem):
    return itertools.product(*(range(len(levels)) for levels in problem.levels))


def random_table(rng, layers, levels, step=1):
    errors = [sorted((rng.random() * 10 for _ in range(levels)), reverse=True) for _ in range(layers)]
    sizes = [sorted(step * rng.randrange(1, 40) for _ in range(levels)) for _ in range(layers)]
    return table(errors, sizes, reference=(1,) * layers)


# -- dynamic programs ----------------------------------------------------------------------------------------
def test_least_size_gives_the_known_optimum():
    errors = [[4, 2, 1, .5], [3, 2, 1.5, 1], [8, 3, 2, 1]]
    sizes = [[1, 2, 4, 8], [10, 20, 40, 80], [2, 4, 8, 16]]
    p = table(errors, sizes, reference=(1, 1, 1))
    assert (p.error(p.reference), p.size(p.reference)) == (7, 26)
    found = dynamic.least_size(p)
    assert (found.choice, found.size, found.error, found.by) == ((2, 0, 1), 18, 7, "lgreco")
    squared = table([[e * e for e in row] for row in errors], sizes, reference=(1, 1, 1))
    assert (dynamic.least_size(squared).choice, dynamic.least_size(squared).size) == ((1, 0, 2), 20)


def test_least_size_equals_enumeration_and_keeps_the_cap():
    rng = random.Random(0)
    for _ in range(60):
        p = random_table(rng, 5, 4)
        found, cap = dynamic.least_size(p), p.error(p.reference)
        best = min(p.size(c) for c in every(p) if p.error(c) <= cap)
        assert found.size == best <= p.size(p.reference) and found.error <= cap * (1 + 1e-9)
        looser = dynamic.least_size(p, alpha=1.3)
        assert looser.size <= found.size and looser.error <= 1.3 * cap * (1 + 1e-9)


def test_coarse_buckets_never_pass_the_cap_nor_the_reference():
    rng = random.Random(1)
    for _ in range(40):
        p = random_table(rng, 6, 4)
        found = dynamic.least_size(p, buckets=7)
        assert found.error <= p.error(p.reference) * (1 + 1e-9) and found.size <= p.size(p.reference)


def test_least_error_gives_the_known_optimum():
    sizes, amounts = (4, 4, 8), (0, .5, 1)
    p = table([[0, 1, 2], [0, 4, 20], [0, 2, 30]], [[int(n * (1 - a)) for a in amounts] for n in sizes], budget=8)
    found = dynamic.least_error(p)
    assert (found.choice, found.error) == ((2, 0, 1), 4) and p.error((1, 1, 1)) == 7


@pytest.mark.parametrize("exact", (False, True))
def test_least_error_equals_enumeration(exact):
    rng = random.Random(2)
    for trial in range(60):
        p = random_table(rng, 1 + trial % 5, 4, step=rng.choice((1, 8)))
        budget = p.size(tuple(rng.randrange(4) for _ in p.names))
        allowed = [c for c in every(p) if (p.size(c) == budget if exact else p.size(c) <= budget)]
        found = dynamic.least_error(p, budget, exact=exact)
        assert found.error == pytest.approx(min(p.error(c) for c in allowed)) and found.choice in allowed


def test_a_table_too_large_keeps_the_budget(monkeypatch):
    monkeypatch.setattr(dynamic, "CELLS", 50)
    rng = random.Random(3)
    for _ in range(30):
        p = random_table(rng, 4, 4)
        budget = p.size(tuple(rng.randrange(4) for _ in p.names)) + 3
        try:
            found = dynamic.least_error(p, budget)
        except InputError:
            continue
        assert found.size <= budget
    # Exact totals are then kept within the layers of equal sizes.
    errors = [[9, 1], [9, 8], [5, 1], [9, 1], [7, 1], [3, 2]]
    p = table(errors, [[100, 201]] * 3 + [[7, 1000]] * 3, reference=(0, 1, 0, 1, 0, 0))
    found = dynamic.least_error(p, p.size(p.reference), exact=True)
    assert found.size == p.size(p.reference) and found.choice == (1, 0, 0, 1, 0, 0)


def test_what_cannot_be_solved_is_said():
    p = table([[2, 1], [2, 1]], [[4, 8], [4, 8]])
    with pytest.raises(InputError, match="already take 8"):
        dynamic.least_error(p, 7)
    with pytest.raises(InputError, match="steps of 4"):
        dynamic.least_error(p, 13, exact=True)
    with pytest.raises(InputError, match="reference"):
        dynamic.least_size(p)
    with pytest.raises(InputError, match="best levels"):
        dynamic.least_size(p, cap=1.5)
    for size, error in ((-1, 0.0), (1.5, 0.0), (1, float("nan")), (1, -0.1)):
        with pytest.raises(InputError):
            Level(0, size, error)
    with pytest.raises(InputError, match="level that a layer does not have"):
        table([[1.0]], [[1]], reference=(1,))
    with pytest.raises(InputError, match="survivors"):
        Search(offspring=4, survivors=(2, 2), tokens=(1, 2))


# -- evolution -----------------------------------------------------------------------------------------------
def grid(sizes, steps=2, unit=100):
    rows = [[n // 2 + k * unit for k in range(steps, -steps - 1, -1)] for n in sizes]
    return Problem(tuple(f"l{i}" for i in range(len(sizes))),
                   tuple(tuple(Level(z, n - z) for z in row) for n, row in zip(sizes, rows)), (steps,) * len(sizes))


def test_one_swap_moves_the_same_number_of_weights():
    p = grid((1000, 4000), steps=1)
    assert [level.value for level in p.levels[0]] == [600, 500, 400] and [level.value for level in p.levels[1]] == [2100, 2000, 1900]
    rng = random.Random(0)
    seen = {swap(p, (1, 1), rng, 1) for _ in range(20)}
    assert seen == {(0, 2), (2, 0)} and all(sum(p.values(c).values()) == 2500 for c in seen)


def test_budget_is_met_exactly_in_every_generation_and_the_optimum_is_reached():
    p = grid((1000, 2000, 3000, 4000))
    cost = (1.0, 5.0, 2.0, 0.5)

    def fitness(choices, tokens, draw):
        asked.append((tokens, draw, len(choices)))
        assert all(p.size(c) == p.size(p.reference) for c in choices)
        return [sum(a * (k - 2) for a, k in zip(cost, c)) for c in choices]
    asked = []
    found = search(p, fitness, Search(generations=40, offspring=6, survivors=(1,), tokens=(64,), fresh=False), seed=1)
    values = [h["fitness"] for h in found.history]
    assert all(a >= b for a, b in zip(values, values[1:])) and all(h["size"] == found.size == p.size(p.reference) for h in found.history)
    best = min((c for c in every(p) if p.size(c) == found.size), key=lambda c: sum(a * k for a, k in zip(cost, c)))
    assert sum(a * k for a, k in zip(cost, found.choice)) == sum(a * k for a, k in zip(cost, best)) and found.size == p.size(best)
    assert {a[:2] for a in asked} == {(64, 0)}


def test_selection_goes_in_stages_on_fresh_batches_and_keeps_the_parent():
    p, asked = grid((1000,) * 5), []

    def fitness(choices, tokens, draw):
        asked.append((tokens, draw, list(choices)))
        return [random.Random(str((c, draw))).random() for c in choices]      # noise: the parent must still be there to win
    search(p, fitness, Search(generations=5, offspring=8, survivors=(4, 2, 1), tokens=(16, 32, 64)), seed=3)
    assert [a[0] for a in asked[:3]] == [16, 32, 64] and len({a[1] for a in asked}) == len(asked) == 15
    for first, second, last in zip(asked[::3], asked[1::3], asked[2::3]):
        assert len(set(first[2])) == len(first[2]) == 8 and len(second[2]) == 4 and len(last[2]) == 3
        assert set(second[2]) <= set(first[2]) and set(last[2][:2]) <= set(second[2]) and last[2][2] not in first[2]


def test_layers_of_unlike_steps_do_not_trade():
    p = Problem(("a", "b", "c"), ((Level(4, 10), Level(8, 20)), (Level(4, 10), Level(8, 20)), (Level(4, 30), Level(8, 77))), (1, 0, 1))
    rng = random.Random(0)
    assert {swap(p, (1, 0, 1), rng) for _ in range(50)} <= {(0, 1, 1), (1, 0, 1)}
    with pytest.raises(InputError, match="start from"):
        search(Problem(p.names, p.levels), lambda *a: [])


# -- tables from a live model -----------------------------------------------------------------------------------
def test_residual_of_a_diagonal_matrix():
    assert residuals(torch.diag(torch.tensor([3.0, 2.0, 1.0])), [0, 1, 2, 3]) == pytest.approx([14**.5, 5**.5, 1.0, 0.0], abs=1e-6)
    g = torch.Generator().manual_seed(0)
    a = torch.randn(1100, 6, generator=g) @ torch.randn(6, 1200, generator=g)
    rough = residuals(a, [2, 4, 6])
    tail = torch.linalg.svdvals(a).square().flip(0).cumsum(0).flip(0).sqrt()
    assert rough[:2] == pytest.approx([float(tail[2]), float(tail[4])], rel=1e-3) and rough[2] < 1e-2 * float(tail[0])


@pytest.mark.parametrize("architecture", ("llama", "gpt2", "bert", "vit"))
def test_distortion_is_the_squared_change_of_the_logits(architecture):
    model = micro(architecture)
    found = matrices(model)
    context = context_of(model, architecture)
    before = {n: p.clone() for n, p in model.named_parameters()}
    variants = Variants(found, lambda i, level, dense: dense * (1 - 0.3 * level))
    samples = context.calibration(4)
    with Judge(model, variants, samples, task=TASKS[architecture]) as judge:
        batches = judge.batch(32, 0)
        for worst in (True, False):
            rows = judge.distortion([2] * len(found), 32, worst=worst)
            assert all(row[0] == pytest.approx(0, abs=1e-10) for row in rows)
            for index in (0, len(found) // 2, len(found) - 1):
                each = []
                for batch in batches:
                    with torch.inference_mode():
                        variants.restore()
                        dense = model(**batch).logits.float()
                        variants.put(index, 1)
                        changed = model(**batch).logits.float()
                        variants.restore()
                    each += (changed - dense).square().flatten(1).mean(1).tolist()
                assert rows[index][1] == pytest.approx(max(each) if worst else sum(each) / len(each), rel=2e-3, abs=1e-9)
        assert judge.divergence([[0] * len(found)], 32, 1)[0] == pytest.approx(0, abs=1e-6)
        assert judge.divergence([[1] * len(found)], 32, 1)[0] > 1e-6
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_batch_has_exactly_the_tokens_asked():
    model = micro("llama")
    judge = Judge(model, Variants(matrices(model), None), context_of(model, "llama").calibration(20), task="causal-lm")
    for tokens in (5, 18, 40, 63):
        assert sum(b["input_ids"].numel() for b in judge.batch(tokens, 3)) == tokens
    assert [b["input_ids"].tolist() for b in judge.batch(40, 1)] == [b["input_ids"].tolist() for b in judge.batch(40, 1)]
    assert [b["input_ids"].tolist() for b in judge.batch(40, 1)] != [b["input_ids"].tolist() for b in judge.batch(40, 2)]


def test_rd_on_a_three_layer_mlp_equals_enumeration_and_distortions_add_up():
    g = torch.Generator().manual_seed(0)
    shapes, x = [(24, 16), (24, 24), (8, 24)], torch.randn(64, 16, generator=g)
    weights = [torch.randn(o, i, generator=g) / i**.5 for o, i in shapes]

    def run(ws):
        h = x
        for w in ws[:-1]:
            h = torch.relu(h @ w.t())
        return h @ ws[-1].t()

    def pruned(w, z):
        return w.masked_fill(_masks.smallest(w.abs(), z), 0)
    amounts = (0.0, 0.25, 0.5, 0.75)
    zeros = [[int(a * o * i) for a in amounts] for o, i in shapes]
    dense = run(weights)

    def joint(choice):
        return float((run([pruned(w, row[c]) for w, row, c in zip(weights, zeros, choice)]) - dense).square().mean())
    alone = [[joint([c if j == i else 0 for j in range(3)]) for c in range(4)] for i in range(3)]
    p = table(alone, [[o * i - z for z in row] for (o, i), row in zip(shapes, zeros)])
    for keep in (0.4, 0.6, 0.8):
        budget = int(keep * sum(o * i for o, i in shapes))
        allowed = [c for c in every(p) if p.size(c) <= budget]
        assert dynamic.least_error(p, budget).error == pytest.approx(min(p.error(c) for c in allowed))
    # Additivity is a claim about small distortions: up to half of the weights.
    choices = list(itertools.product(range(3), repeat=3))[1:]
    pairs = torch.tensor([[p.error(c), joint(c)] for c in choices])
    assert float(torch.corrcoef(pairs.t())[0, 1]) > 0.9


# -- in pruning --------------------------------------------------------------------------------------------------
def test_anchors_keep_total_and_bounds():
    rng = random.Random(0)
    for _ in range(200):
        most = [rng.randrange(5, 100) for _ in range(6)]
        least = [rng.randrange(0, m + 1) for m in most]
        wanted = [rng.randrange(0, 120) for _ in range(6)]
        found = _ratios.anchors(wanted, least, most)
        assert all(a <= f <= b for a, f, b in zip(least, found, most))
        assert sum(found) == min(max(sum(wanted), sum(least)), sum(most))


def test_level_maps_hold_nested_choices():
    scores = torch.rand(12, 20, generator=torch.Generator().manual_seed(0))
    for select in (_masks.smallest, _masks.smallest_by_row):
        counts = [200, 131, 70, 0]
        found = _ratios.level_map(scores, select, counts)
        for j, count in enumerate(counts):
            assert torch.equal(found > j, select(scores, count)) and int((found > j).sum()) == count
    rows = _masks.smallest_by_row(scores, 131).sum(1)
    assert rows.tolist() == [11] * 11 + [10]


def one_layer_matters():
    """A micro Llama whose logits hang on the second of its three blocks: what the others add is tiny."""
    model = micro("llama")
    with torch.no_grad():
        for m, module in matrices(model):
            if m.layer != 1 and m.role in ("o_proj", "down_proj"):
                module.weight.mul_(1e-3)
            elif m.role in ("o_proj", "down_proj"):
                module.weight.mul_(4)
    return model


@pytest.mark.parametrize("distribution", _ratios.SEARCHED)
@pytest.mark.parametrize("id", ("magnitude", "wanda"))
def test_searched_ratios_beat_equal_ones_where_one_layer_matters(id, distribution):
    from engines import registry
    model = one_layer_matters()
    context = context_of(model, "llama")
    more = {"samples": 4} if id == "wanda" else {}
    method = registry.get(id)(sparsity=0.6, distribution=distribution, search_tokens=64, step=0.1, generations=25, **more)
    model = method.apply(model, context)
    told = next(data for kind, _, data in context.reporter.events if kind == "choice")
    assert told["kept"] and told["found"] < 0.8 * told["uniform"]
    share = {layer: [v for a, _, v in method.layers(model, context)["sparsity"] if a == layer] for layer in (0, 1, 2)}
    assert min(sum(share[0]), sum(share[2])) / 7 > sum(share[1]) / 7 + 0.05
    equal = sum(method.zeros(m.out, m.inp) if id == "wanda" else round(0.6 * m.size) for m, _ in matrices(model))
    assert sum(int((x.weight == 0).sum()) for _, x in matrices(model)) == equal


def test_a_stop_while_measuring_leaves_the_weights_alone():
    from engines import registry
    model = micro("llama")
    before = [module.weight.clone() for _, module in matrices(model)]
    context = context_of(model, "llama")
    asked = iter(range(1000))
    context.reporter.wants = lambda: "stop" if next(asked) > 5 else None
    with pytest.raises(StopRequested):
        registry.get("magnitude")(distribution="rd", search_tokens=32).apply(model, context)
    assert all(torch.equal(module.weight, old) for (_, module), old in zip(matrices(model), before)) and not context.masks


def test_ratios_refuse_a_fixed_pattern():
    from engines import registry
    from engines.models import profile_of
    profile = profile_of(micro("llama"), "micro", "causal-lm")
    for id in ("magnitude", "wanda"):
        with pytest.raises(InputError, match="distribution"):
            registry.get(id)(pattern="2:4", distribution="rd").check(profile)
