"""Allocation from the command line: one child process, plain data, sentences for bad input."""

import json

import pytest

from engines.errors import InputError
from tests.contract import micro
from workbench import allocate, cli


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from engines import models
    folder = tmp_path_factory.mktemp("model") / "m"
    models.save(micro.model("llama"), micro.tokenizer("llama"), folder)
    text = folder.parent / "text.txt"
    text.write_text("\n\n".join(" ".join(micro.WORDS[(7 * i + j) % 60] for j in range(40)) for i in range(60)))
    return str(folder), str(text)


def run(capsys, *args):
    code = cli.main(["allocate", *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_bits_keep_their_total_and_name_the_stage(model, capsys):
    code, out, _ = run(capsys, model[0], "--data", model[1], "--what", "bits", "--budget", "6", "--by", "rd", "--search-tokens", "64", "--json")
    assert code == 0
    found = json.loads(out)
    layers, total = found["layers"], found["total"]
    assert len(layers) == 14 and {row["value"] for row in layers} == {4, 8} and found["unit"] == "bytes"
    assert sum(row["size"] for row in layers) == total["size"] == total["uniform_size"] == sum(row["uniform_size"] for row in layers)
    assert sum(row["error"] for row in layers) == pytest.approx(total["error"]) and total["error"] <= total["uniform_error"]
    assert total["kl"] >= 0 and total["uniform_kl"] > 0 and found["stage"]["method"] == "mixed" and found["stage"]["bits"] == 6
    assert found["figures"]["bits"] == [[row["layer"], row["role"], row["value"]] for row in layers]


def test_ranks_as_text(model, capsys):
    code, out, err = run(capsys, model[0], "--data", model[1], "--what", "rank", "--budget", "4", "--by", "lgreco")
    assert code == 0 and "low-rank error of the mean gradient" in out and "--method lora:rank=4,ranks=gradient" in out, err
    total = next(line for line in out.splitlines() if line.startswith("total")).split()
    size, uniform, error, cap = (float(x.replace(",", "")) for x in total[1:])
    assert size <= uniform and error <= cap * 1.001


@pytest.mark.parametrize("changes, says", (
    (dict(what="width"), "Choose sparsity, bits, rank"), (dict(by="greedy"), "Choose rd, lgreco, evolution"),
    (dict(what="sparsity", budget="1.5"), "share of zeros"), (dict(what="sparsity", budget="most"), "not a number"),
    (dict(what="bits", budget="9"), "outside"), (dict(what="bits", budget="0.001mb"), "Raise the limit"),
    (dict(what="rank", budget="2.5"), "whole number"), (dict(what="rank", budget="400"), "Choose at most"),
    (dict(what="rank", budget="4", by="evolution"), "after training"), (dict(tokens=3), "from 16 on"), (dict(method="int8"), "magnitude")))
def test_bad_input_is_refused_before_torch_is_loaded(model, changes, says):
    asked = {**dict(what="sparsity", budget="0.5", by="rd"), **changes}
    with pytest.raises(InputError, match=says):
        allocate.allocate(*model, **asked)


def test_what_the_child_refuses_reaches_the_person(model, capsys):
    code, out, err = run(capsys, model[0], "--data", "no-such-data", "--what", "rank", "--budget", "2")
    assert code == 2 and not out and "no-such-data" in err and err.count("\n") == 1
