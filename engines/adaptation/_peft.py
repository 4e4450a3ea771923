"""What the methods built on peft share: targets, heads, insertion into a model, merging, saving the adapter.

Adapters are inserted in place (``peft.inject_adapter_in_model``), so the model keeps its class and every name
outside the adapted layers; their forward pass is replaced by one fused function (``engines.layers.lowrank``).
"""

from __future__ import annotations

import re
import types

from engines.errors import InputError
from engines.heads import is_head
from engines.lazy import torch
from engines.method import AUTO
from engines.profile import _role

ADAPTER = "default"
TARGETS = ("all-linear", "attention", "mlp")
TARGETS_HELP = ("Which matrices inside the blocks are adapted: all-linear, attention, mlp, or roles separated by commas "
                "such as q_proj,v_proj")


# -- from shapes ---------------------------------------------------------------------------------------------
def targeted(profile, targets: str) -> list:
    """The ``Matrix`` entries of ``profile`` that ``targets`` names.

    Raises:
        InputError: a role that the model does not have.
    """
    return choose(profile.matrices, targets, profile.roles)


def choose(found, targets: str, roles) -> list:
    """Filter matrices by ``all-linear``, ``attention``, ``mlp`` or a comma-separated list of roles."""
    if targets == "all-linear":
        return list(found)
    if targets in ("attention", "mlp"):
        return [m for m in found if ("att" in m.name.lower()) == (targets == "attention")]
    asked = [part.strip() for part in targets.split(",") if part.strip()]
    known = set(roles) | {r.rsplit(".", 1)[-1] for r in roles}
    for role in asked:
        if role not in known:
            raise InputError("targets", targets, f"the model has no matrix called {role!r}",
                             "Choose all-linear, attention, mlp or some of " + ", ".join(roles))
    return [m for m in found if m.role in asked or m.role.rsplit(".", 1)[-1] in asked]


def head_tensors(profile) -> list:
    """Tensors of the classification head, which stays trainable beside the adapter."""
    if profile.task == "causal-lm":
        return []
    return [t for t in profile.tensors if is_head(t.name)]


def head_parameters(profile) -> int:
    """Parameters of the classification head, also of one that is added when the model is loaded."""
    if profile.task == "causal-lm":
        return 0
    found = head_tensors(profile)
    if found:
        return sum(t.size for t in found)
    bias = profile.architecture not in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2")
    return profile.labels * (profile.hidden + bias)


def largest(profile, budget, found, sizes, count, *, field: str = "rank", usual: int = 8) -> tuple[int, str]:
    """The largest of ``sizes`` whose trainable parameters obey ``budget.trainable``, and the reason in words.

    Args:
        sizes: what the matrices allow, ascending.
        count: size -> trainable parameters of the whole model.
        usual: size where no limit says otherwise.

    Raises:
        InputError: not even the smallest fits.
    """
    limit = budget.trainable_count(profile.parameters)
    if limit is None:
        return max(n for n in sizes if n <= max(usual, sizes[0])), f"no limit on trainable parameters: the usual {field}"
    fitting = [n for n in sizes if count(n) <= limit]
    if not fitting:
        raise InputError("budget.trainable", budget.trainable, f"{field} {sizes[0]} on {len(found)} matrices already trains "
                         f"{count(sizes[0]):,} parameters, the limit is {limit:,}", "Raise the limit, or adapt fewer matrices with targets")
    best = max(fitting)
    more = next((n for n in sizes if n > best), None)
    why = f"{count(best):,} trainable parameters obey the limit of {limit:,}"
    return best, why + (f"; {field} {more} would need {count(more):,}" if more else "; no matrix allows more")


def ranks_up_to(top: int) -> range:
    """Ranks that are tried by a search."""
    return range(1, min(top, 1024) + 1)


def check_rank(method: str, field: str, rank, found, targets: str = "all-linear") -> None:
    """Refuse a rank above the smaller side of a matrix, or targets that name none.

    Raises:
        InputError: names the matrix.
    """
    if not found:
        raise InputError(f"{method}.targets", targets, "the model has no dense matrices of this kind inside its blocks (perhaps they are "
                         "packed into integers)", "Choose all-linear, or start from a model that is not quantized")
    if rank == AUTO:
        return
    for m in found:
        if rank > min(m.out, m.inp):
            raise InputError(f"{method}.{field}", rank, f"{m.name} is {m.out} by {m.inp}, so no update of it has a higher rank than "
                             f"{min(m.out, m.inp)}", f"Choose at most {min(min(x.out, x.inp) for x in found)}")


# -- in a live model -----------------------------------------------------------------------------------------
def prepare(model, context, names: list[str]) -> None:
    """Freeze the model and bring its weights into the type of the products.

    Under bfloat16 the matrices in ``names`` are held in bfloat16, which spares a cast in every pass; the originals
    wait beside the model (in a file where the stage has a folder) for an exact merge.
    """
    model.requires_grad_(False)
    kept = types.SimpleNamespace(dtypes={n: p.dtype for n, p in model.named_parameters()}, originals={}, file=None)
    if context.compute == "bfloat16":
        targets = {f"{n}.weight" for n in names}
        for name, p in model.named_parameters():
            if name in targets and p.dtype == torch.float32:
                kept.originals[name] = p.data
                p.data = p.data.to(torch.bfloat16)
        if kept.originals and context.folder is not None:
            from safetensors.torch import save_file
            context.folder.mkdir(parents=True, exist_ok=True)
            kept.file = context.folder / f"frozen-{context.stage}.safetensors"
            save_file({n: t.contiguous() for n, t in kept.originals.items()}, kept.file)
            kept.originals = dict.fromkeys(kept.originals)
    object.__setattr__(model, "_fettle_kept", kept)


def restore(model, layers: list | None = None) -> None:
    """Bring back the float32 originals of matrices that were held in bfloat16; ``layers``: (name, adapter or plain module), None: peft's."""
    kept = model._fettle_kept
    if kept.file is not None:
        from safetensors import safe_open
        with safe_open(kept.file, "pt") as f:
            for name in kept.originals:
                kept.originals[name] = f.get_tensor(name)
        kept.file.unlink(missing_ok=True)
        kept.file = None
    for name, layer in adapted(model) if layers is None else layers:
        original = kept.originals.pop(f"{name}.weight", None)
        if original is not None:
            weight = (layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer).weight
            weight.data = original.to(weight.device)


def inject(model, config, context) -> None:
    """Insert peft layers, put adapters in float32, free the head, and replace the forward passes."""
    import warnings

    from peft import inject_adapter_in_model
    # The stage's own seed, so that the start does not depend on what ran before.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(context.generator(1).initial_seed())
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, p in model.named_parameters():
        if "lora_" in name and p.is_floating_point():
            p.data = p.data.float()
        if ".ranknum." in name:      # a constant of AdaLoRA, which peft's move to another type makes trainable
            p.requires_grad_(False)
    free_head(model, context)
    for name, layer in adapted(model):
        mask = context.masks.get(f"{name}.weight")
        if mask is not None:
            mask = mask.to(layer.get_base_layer().weight.device)
        object.__setattr__(layer, "_fettle_mask", mask)
        layer.forward = types.MethodType(_forward, layer)


def free_head(model, context) -> None:
    """The classification head is trained beside every adapter, in float32."""
    if context.task == "causal-lm":
        return
    for name, p in model.named_parameters():
        if is_head(name):
            p.requires_grad_(True)
            p.data = p.data.float()


def adapted(model) -> list:
    """(name of the base layer, peft layer) for every adapted layer of a live model."""
    from peft.tuners.lora import LoraLayer
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]


def rank_map(model, value) -> dict[str, list]:
    """Layer map ``rank`` with ``value(layer)`` for each adapted matrix."""
    return place_map(model, adapted(model), "rank", value)


def place_map(model, layers, key: str, value) -> dict[str, list]:
    """Layer map ``key`` with ``value(layer)`` for each of ``layers``; None leaves a layer out."""
    rows = []
    for name, layer in layers:
        number, found = re.search(r"\.(\d+)\.", name), value(layer)
        if found is not None:
            rows.append([int(number.group(1)) if number else 0, _role(name), found])
    return {key: rows} if rows else {}


def view(layer, tensor):
    """A weight or mask of a peft layer as [out, in]."""
    return tensor.t() if layer.fan_in_fan_out else tensor


def factors(layer) -> tuple:
    """(a [rank, in], b [out, rank], scale) of a LoRA or AdaLoRA layer, so that the update is scale (b a)."""
    a, b, scale = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling[ADAPTER]
    if hasattr(layer, "lora_E"):
        # The divisor is the initial rank for ever, also when components have been zeroed.
        return a * layer.lora_E[ADAPTER], b, scale / (layer.r[ADAPTER] + 1e-5)
    return a.weight, b.weight, scale


def _magnitude(layer):
    vectors = getattr(layer, "lora_magnitude_vector", {})
    return vectors[ADAPTER].weight if ADAPTER in vectors else None


def _forward(layer, x, *args, **kwargs):
    from engines.layers import lowrank
    magnitude = _magnitude(layer)
    if layer.disable_adapters or layer.merged or args or kwargs or magnitude is not None and layer._fettle_mask is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    base, (a, b, scale), mask = layer.get_base_layer(), factors(layer), layer._fettle_mask
    weight = view(layer, base.weight)
    mask = view(layer, mask) if mask is not None else None
    if magnitude is not None:
        return lowrank.masked_direction_linear(x, weight, base.bias, a, b, scale, magnitude, mask)
    dropout = layer.lora_dropout[ADAPTER]
    dropped = dropout(x) if layer.training and not isinstance(dropout, torch.nn.Identity) else None
    return lowrank.low_rank_linear(x, weight, base.bias, a, b, scale, mask=mask, dropped=dropped)


def effective(layer):
    """The weight [out, in] that a peft layer uses and that a merge stores, float32; masked entries are exactly zero."""
    from engines.layers import lowrank
    (a, b, scale), magnitude, mask = factors(layer), _magnitude(layer), layer._fettle_mask
    weight, mask = view(layer, layer.get_base_layer().weight), view(layer, mask) if mask is not None else None
    if magnitude is not None:
        new = lowrank.direction(weight, a, b, scale, magnitude, mask if mask is not None else 1.0)
    else:
        new = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    return new if mask is None else new.masked_fill_(~mask, 0)


def merge(model):
    """Add every update to its frozen weight in float32, take the adapters out, return the plain model.

    Masked entries stay exactly zero. Weights get back the types that the model came with.
    """
    restore(model)
    with torch.no_grad():
        for name, layer in adapted(model):
            base, new = layer.get_base_layer(), effective(layer)
            base.weight.data = (new.t() if layer.fan_in_fan_out else new).contiguous()
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, base)
    return release(model)


def release(model):
    """After a merge: weights get back the types that the model came with, and everything may be trained again."""
    for name, p in model.named_parameters():
        p.data = p.data.to(model._fettle_kept.dtypes[name])
        p.requires_grad_(True)
    for attribute in ("peft_config", "_fettle_kept"):
        if attribute in model.__dict__:
            object.__delattr__(model, attribute)
    return model


def keeps_adapter(context, masked: bool) -> bool:
    """Whether a separate adapter file makes sense; where it does not, the log says why.

    Not without a folder, not after another stage (it would not fit the model that the run began with), and not where there
    are masks, which a plain peft adapter cannot keep.
    """
    if context.folder is None:
        return False
    if context.stage > 0:
        context.reporter.log("no separate adapter: it belongs to what the stages before made of the model; the merged model is complete")
        return False
    from engines.models.adapter import is_adapter
    if is_adapter(str(getattr(context.profile, "source", ""))):
        context.reporter.log("no separate adapter: the run began with another adapter, merged; the merged model is complete")
        return False
    if masked:
        context.reporter.log("no separate adapter: a peft adapter would fill the pruned zeros again; the merged model keeps them")
        return False
    return True


def write_adapter(model, context, config, state: dict) -> None:
    """Write ``state`` and ``config`` to ``context.folder / "adapter"``, as peft reads them.

    Names in ``state`` are the model's (``<layer>.lora_A.weight``) or begin with ``base_model.`` where peft keeps a tensor elsewhere. The classification head goes with it under ``modules_to_save``.
    """
    from safetensors.torch import save_file
    folder = context.folder / "adapter"
    folder.mkdir(parents=True, exist_ok=True)
    heads = {}
    if context.task != "causal-lm":
        heads = {n: p for n, p in model.named_parameters() if is_head(n)}
    save_file({n if n.startswith("base_model.") else f"base_model.model.{n}": t.detach().cpu().contiguous() for n, t in {**state, **heads}.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.modules_to_save = sorted({n.split(".", 1)[0] for n in heads}) or None
    config.base_model_name_or_path = getattr(context.profile, "source", None)
    config.inference_mode = True
    config.save_pretrained(folder)


def save_adapter(model, config, context) -> None:
    """Write the adapter that peft holds, where a separate one makes sense (``keeps_adapter``)."""
    if not keeps_adapter(context, any(layer._fettle_mask is not None for _, layer in adapted(model))):
        return
    from peft import get_peft_model_state_dict
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    write_adapter(model, context, config, {k: v for k, v in state.items() if "lora_" in k})
