"""Documentation that can go stale is held current."""

import re
from pathlib import Path

from engines import registry
from engines.method import _REGISTRY

ROOT = Path(__file__).resolve().parent.parent


def test_methods_page_is_current():
    from workbench import docs
    assert docs.PAGE.read_text() == docs.page(), "run python -m workbench.docs"


def test_the_example_method_of_the_guide_works(tmp_path):
    """The file printed in docs/ADDING_A_METHOD.md registers, forecasts exactly and trains only what it says."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from engines import models
    from engines.profile import Batch
    text = (ROOT / "docs" / "ADDING_A_METHOD.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    registry.methods()
    try:
        space = {"__name__": "guide"}
        exec(compile(code, "guide", "exec"), space)
        method = registry.get("bias-only")()
        model = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                                         intermediate_size=32, max_position_embeddings=16))
        profile = models.profile_of(model, "micro", "text-classification")
        method.apply(model, None)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trained == method.footprint(profile, Batch(4, 16)).trainable > 0
        assert all(n.endswith(".bias") for n, p in model.named_parameters() if p.requires_grad)
        assert torch.is_grad_enabled()
    finally:
        _REGISTRY.pop("bias-only", None)


def test_readme_names_the_two_commands_and_every_page_it_links_exists():
    text = (ROOT / "README.md").read_text()
    assert "make run" in text and "make test" in text
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_presets_are_valid_specs():
    from workbench import spec
    found = sorted(spec.PRESETS.glob("*.yaml"))
    assert len(found) >= 5
    for path in found:
        assert spec.RunSpec.from_yaml(path.read_text()).pipeline, path.name


def test_every_method_has_a_card_worth_reading():
    for id, cls in registry.methods().items():
        card = cls.card
        assert card.summary.endswith(".") and len(card.summary) > 20, id
        assert card.cannot, f"{id}: every method has something it cannot do"
        assert all(row["help"] for row in cls.hyperparameters()), id
