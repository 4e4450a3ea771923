"""What a process that runs, measures or probes has imported before it begins."""

from __future__ import annotations

import importlib
import pkgutil

PRELOAD = ("torch", "torch.nn.functional", "safetensors.torch", "psutil", "yaml", "workbench.worker", "torch._dynamo",
           "transformers", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
           "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert",
           "transformers.models.vit.modeling_vit", "transformers.models.gpt2.modeling_gpt2",
           "transformers.tokenization_utils_tokenizers", "engines.*", "peft", "peft.tuners.lora", "peft.tuners.adalora")
EXTRAS = ("transformers.generation.utils", "transformers.models.auto.image_processing_auto",
          "transformers.models.vit.image_processing_vit", "transformers.models.vit.image_processing_pil_vit",
          "pyarrow.parquet", "pynvml")
"""Loaded one by one while nobody calls."""


def preload(name: str) -> None:
    """Import one module, or every module of a package (``engines.*``); one that is missing or broken is left to the run."""
    try:
        if not name.endswith(".*"):
            importlib.import_module(name)
            return
        package = importlib.import_module(name[:-2])
    except Exception as e:
        print(f"not preloaded: {name} ({type(e).__name__}: {e})", flush=True)
        return
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".", onerror=lambda _: None):
        if not info.name.rsplit(".", 1)[-1].startswith("__"):
            preload(info.name)


def everything(packages: bool = True) -> None:
    """All of it at once, for a process whose start nobody waits for; ``packages``: also every module of our own."""
    for name in (*PRELOAD, *EXTRAS):
        if packages or not name.endswith(".*"):
            preload(name)
