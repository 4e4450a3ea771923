"""Models with modules that their config.json does not know: which they are, and how they are made again on loading.

``fettle.json`` holds under ``added`` what ``description`` returns; the tensors lie in ``model.safetensors`` with the others.
"""

from __future__ import annotations

from engines.errors import InputError

VERSION = 1


def modules(model) -> dict:
    """Every added module of ``model`` by its path."""
    from engines.layers.parallel import NAME
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] == NAME}


def description(model) -> dict | None:
    """``{"version": 1, "modules": {path: {"kind": ..., ...}}}``, or None when the config says it all."""
    found = {name: m.describe() for name, m in modules(model).items()}
    return {"version": VERSION, "modules": found} if found else None


def rebuild(model, described: dict):
    """Attach empty modules to a freshly built model; ``load_state_dict`` fills them.

    Raises:
        InputError: a newer format, a kind of module that is not known, or a block that this model does not have.
    """
    from engines.layers.parallel import ParallelAdapter
    if described.get("version", 0) > VERSION:
        raise InputError("model", f"added modules, format {described['version']}", f"this version reads formats up to {VERSION}", "Update the workbench")
    kind = next(model.parameters()).dtype
    for path, facts in described["modules"].items():
        if facts.get("kind") != ParallelAdapter.kind:
            raise InputError("model", facts.get("kind"), "an unknown kind of added module", "Update the workbench")
        try:
            block = model.get_submodule(path.rpartition(".")[0])
        except AttributeError:
            raise InputError("model", path, "fettle.json describes a module in a block that config.json does not build",
                             "The folder is damaged: export the run again") from None
        ParallelAdapter(**{k: v for k, v in facts.items() if k != "kind"}).to(kind).attach(block)
    return model
