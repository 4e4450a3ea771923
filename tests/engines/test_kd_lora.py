"""KD-LoRA: the soft term in numbers, soft labels by example, teachers that suit and that do not."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engines import models, registry
from engines.budget import Budget
from engines.distillation import _teacher
from engines.errors import InputError
from engines.losses.soft import chunked_soft_loss, soft_loss
from engines.profile import Batch
from engines.training.loop import Limit
from engines.training.loss import task_loss
from engines.training.settings import TrainSettings
from engines.training.stage import train
from tests.contract import micro


def close(a, b, bound=1e-6):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=bound, rtol=bound)


# -- the loss ------------------------------------------------------------------------------------------------
def test_worked_example():
    student, teacher = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True), torch.tensor([[2.0, 0.0]])
    soft = soft_loss(student, teacher, 2.0)
    close(soft, 0.10537834)
    close(0.5 * soft + 0.5 * F.cross_entropy(student.float(), torch.tensor([0])), 0.20932002)
    soft.backward()
    close(student.grad.float(), torch.tensor([[-0.21719849, 0.21719849]]))


def test_rows_are_averaged_and_classes_are_not():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    close(soft_loss(student, teacher, 3.0), sum(soft_loss(student[i:i + 1], teacher[i:i + 1], 3.0) for i in range(5)) / 5)


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it():
    z = torch.randn(4, 6, requires_grad=True)
    soft = soft_loss(z, z.detach(), 2.0)
    soft.backward()
    close(soft, 0.0)
    close(z.grad, torch.zeros(4, 6))


@pytest.mark.parametrize("chunk", [3, 64])
def test_the_chunked_loss_is_the_whole_one(chunk):
    g = torch.Generator().manual_seed(0)
    hidden, weight, other, other_weight = (torch.randn(*s, generator=g) for s in ((11, 5), (9, 5), (11, 7), (9, 7)))
    hidden.requires_grad_()
    whole = soft_loss(hidden @ weight.t(), other @ other_weight.t(), 2.5)
    (3.0 * whole).backward()
    wanted, hidden.grad = hidden.grad.clone(), None
    found = chunked_soft_loss(hidden, weight, other, other_weight, 2.5, chunk=chunk)
    (3.0 * found).backward()
    close(found, whole, 1e-5)
    close(hidden.grad, wanted, 1e-5)


# -- the method ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of micro teachers with other weights than the students."""
    root, out = tmp_path_factory.mktemp("teachers"), {}
    for architecture in micro.ARCHITECTURES:
        made = micro.model(architecture, seed=7)
        if micro.TASKS[architecture] != "causal-lm":
            made.config.id2label = dict(enumerate(micro.data(architecture).labels))
        models.save(made, micro.tokenizer(architecture), root / architecture)
        out[architecture] = str(root / architecture)
    return out


def begun(architecture, **changes):
    model = micro.model(architecture)
    profile = models.profile_of(model, "micro", micro.TASKS[architecture])
    method = registry.build({"method": "kd-lora", "dropout": 0.0, **changes}).fit(profile, Budget())[0]
    method.check(profile)
    context = micro.context(model, architecture)
    context.total_steps = 8
    return method.apply(model, context).train(), method, context


def losses(model, method, context, batch):
    plain = task_loss(model, batch, context.task)
    return plain, method.loss(model, plain, context)


@pytest.mark.parametrize("architecture", micro.ARCHITECTURES)
def test_loss_and_gradient_of_a_batch(architecture, teachers):
    model, method, context = begun(architecture, teacher=teachers[architecture], weight=0.3, temperature=2.0)
    teacher = micro.model(architecture, seed=7).eval()
    batch = context.data.batch(0, 6)[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    _, full = losses(model, method, context, batch)
    found = torch.autograd.grad(full, parameters)

    inputs = {k: v for k, v in batch.items() if k != "labels"}
    mine, labels = model(**inputs).logits, batch["labels"]
    with torch.no_grad():
        other = teacher(**inputs).logits
    width = mine.shape[-1]
    soft = 4.0 * (other / 2).softmax(-1).mul((other / 2).log_softmax(-1) - (mine / 2).log_softmax(-1)).sum() / labels.numel()
    wanted = 0.3 * soft + 0.7 * F.cross_entropy(mine.reshape(-1, width), labels.reshape(-1))
    close(full, wanted, 1e-4)
    assert soft > 0.001
    for one, two in zip(found, torch.autograd.grad(wanted, parameters)):
        close(one, two, 1e-4)


def test_weight_zero_is_lora():
    def go(stage):
        model = micro.model("bert")
        context = micro.context(model, "bert")
        method = registry.build(stage)
        torch.manual_seed(0)
        model = method.apply(model, context)
        train(model, method, context, TrainSettings(lr=5e-3, batch=8, length=16, evaluations=1), Limit(steps=3))
        return method.finish(model, context).state_dict()
    ours, lora = go({"method": "kd-lora", "weight": 0.0}), go({"method": "lora", "rank": 8, "dropout": 0.1, "targets": "query,value"})
    assert ours.keys() == lora.keys() and all(torch.equal(ours[k], lora[k]) for k in ours)


def test_only_updates_and_the_head_are_trained_and_the_teacher_is_at_rest(teachers):
    model, method, context = begun("bert", teacher=teachers["bert"])
    assert {n.split(".")[0] if "lora_" not in n else "lora" for n, p in model.named_parameters() if p.requires_grad} == {"lora", "classifier"}
    assert {n.rsplit(".lora_")[0].rsplit(".", 1)[-1] for n, p in model.named_parameters() if "lora_" in n} == {"query", "value"}
    teacher = model._fettle_seat.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    train(model, method, context, TrainSettings(lr=5e-2, batch=8, length=16, evaluations=1), Limit(steps=3))
    assert not teacher.training and all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert "teacher" in context.state
    plain = method.finish(model, context)
    assert not any("lora" in n for n in plain.state_dict()) and "_fettle_seat" not in vars(plain) and "teacher" not in context.state
    assert not plain._forward_hooks


# -- labels by example ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture", ["bert", "vit"])
def test_soft_labels_belong_to_their_example_in_any_order(architecture, teachers):
    model, method, context = begun(architecture, teacher=teachers[architecture])
    teacher, data = model._fettle_seat.teacher, context.data
    rng, asked = np.random.default_rng(0), []
    inner = teacher.model.forward

    def counted(**inputs):
        asked.append(len(next(iter(inputs.values()))))
        return inner(**inputs)
    teacher.model.forward = counted
    first = {}
    for _ in range(3):
        for part in np.array_split(rng.permutation(30), 4):
            batch = data._collate(part)
            found = teacher.labels({k: v for k, v in batch.items() if k != "labels"})
            for i, row in zip(part, found):
                assert torch.equal(first.setdefault(int(i), row), row)
    assert sum(asked) <= 30, "each example is shown once"
    other = micro.model(architecture, seed=7).eval()
    for i, row in first.items():
        alone = {k: v for k, v in data._collate(np.array([i])).items() if k != "labels"}
        with torch.no_grad():
            close(row, other(**alone).logits[0], 1e-4)


def test_known_labels_come_back_with_a_checkpoint(teachers):
    model, method, context = begun("bert", teacher=teachers["bert"])
    inputs = {k: v for k, v in context.data._collate(np.arange(4)).items() if k != "labels"}
    context.state["teacher"] = torch.full((240, 3), 5.0)
    assert torch.equal(model._fettle_seat.teacher.labels(inputs), torch.full((4, 3), 5.0))


def test_labels_in_another_order_are_put_in_order(teachers, tmp_path):
    made, names = micro.model("bert", seed=7), micro.data("bert").labels
    made.config.id2label = {0: names[2], 1: names[0], 2: names[1]}
    models.save(made, micro.tokenizer("bert"), tmp_path / "t")
    inputs = {k: v for k, v in micro.data("bert")._collate(np.arange(4)).items() if k != "labels"}
    turned = begun("bert", teacher=str(tmp_path / "t"))[0]._fettle_seat.teacher.labels(inputs)
    straight = begun("bert", teacher=teachers["bert"])[0]._fettle_seat.teacher.labels(inputs)
    close(turned, straight[:, [1, 2, 0]], 1e-5)
    made.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    models.save(made, micro.tokenizer("bert"), tmp_path / "other")
    with pytest.raises(InputError, match=r"kd-lora.teacher = .*its labels \(cat, dog, cow \.\.\.\) are not the data's"):
        begun("bert", teacher=str(tmp_path / "other"))


def test_a_teacher_with_another_tokenizer_reads_the_texts_itself(tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "<unk>", *reversed(micro.WORDS)]
    plain = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")
    made = micro.model("bert", seed=7)
    made.config.id2label = dict(enumerate(micro.data("bert").labels))
    models.save(made, tokenizer, tmp_path / "t")
    teacher, data = begun("bert", teacher=str(tmp_path / "t"))[0]._fettle_seat.teacher, micro.data("bert")
    found = teacher.labels({k: v for k, v in data._collate(np.array([3])).items() if k != "labels"})
    ids = torch.tensor([[words.index(w) for w in data.table.train.texts[3].split()]])
    with torch.no_grad():
        close(found[0], made.eval()(input_ids=ids).logits[0], 1e-4)


# -- from shapes ---------------------------------------------------------------------------------------------
def test_forecast_counts_the_teacher():
    profile, batch = models.profile_of(micro.model("llama"), "micro", "causal-lm"), Batch(rows=4, length=24)
    lora = registry.build({"method": "lora", "dropout": 0.1, "targets": "q_proj,v_proj"}).footprint(profile, batch)
    own = registry.build({"method": "kd-lora"}).footprint(profile, batch)
    assert own.trainable == lora.trainable and own.weights == lora.weights + 4 * profile.parameters
    assert own.flops_per_token > lora.flops_per_token + profile.flops_per_token and own.extra > lora.extra
    assert registry.build({"method": "kd-lora", "weight": 0.0}).footprint(profile, batch) == lora
    named = registry.build({"method": "kd-lora", "teacher": "stdlib-lm"}).footprint(profile, batch)
    assert named.weights == lora.weights + 4 * _teacher.shapes("stdlib-lm", "f").parameters


@pytest.mark.parametrize("architecture, teacher, message", [
    ("llama", "stdlib-lm", "its vocabulary has .* tokens and the student's 64"),
    ("llama", "digits-vit", "it was made for image-classification, the student learns causal-lm"),
    ("vit", "nonsense", "kd-lora.teacher = 'nonsense': there is no such model"),
    ("bert", "owner/name", "it is not on this machine"),
    ("bert", "/no/such/folder", "there is no such folder"),
    ("llama", "stdlib-lm-init", "no .*safetensors")])
def test_refused_teachers(architecture, teacher, message):
    profile = models.profile_of(micro.model(architecture), "micro", micro.TASKS[architecture])
    with pytest.raises(InputError, match=message) as refused:
        registry.build({"method": "kd-lora", "teacher": teacher}).check(profile)
    assert refused.value.field == "kd-lora.teacher" and refused.value.remedy


def test_other_refusals(tmp_path):
    import dataclasses
    profile = models.profile_of(micro.model("bert"), "micro", "text-classification")
    headless = dataclasses.replace(profile, config={**profile.config, "architectures": ["BertForMaskedLM"]})
    with pytest.raises(InputError, match="it has no trained head, so that it has no labels to teach"):
        _teacher.suits(headless, profile, "t", "kd-lora.teacher")
    with pytest.raises(InputError, match="no trained head, so that it cannot teach itself"):
        registry.build({"method": "kd-lora"}).check(headless)
    model = micro.model("bert")
    context = micro.context(model, "bert")
    context.profile = dataclasses.replace(profile, source="stdlib-lm")      # a body without a head
    with pytest.raises(InputError, match="no trained head, so that it cannot teach itself"):
        registry.build({"method": "kd-lora"}).apply(model, context)
    with pytest.raises(InputError, match="kd-lora.rank = 80"):
        registry.build({"method": "kd-lora", "rank": 80}).check(profile)
    models.save(micro.model("bert", num_labels=5), micro.tokenizer("bert"), tmp_path / "t")
    with pytest.raises(InputError, match="it knows 5 labels, the data has 3"):
        begun("bert", teacher=str(tmp_path / "t"))
    models.save(micro.model("vit", image_size=16), micro.tokenizer("vit"), tmp_path / "v")
    with pytest.raises(InputError, match="it sees images of 16 pixels with 1 channels, the student of 8 pixels"):
        begun("vit", teacher=str(tmp_path / "v"))
