"""What a local folder holds, as a profile: a whole model, or an adapter with its base model. torch-free."""

from __future__ import annotations

from pathlib import Path

from engines.models import adapter
from engines.profile import ModelProfile, read_model


def read_folder(folder: str | Path, name: str | None = None) -> ModelProfile:
    """The profile of a folder with config.json and safetensors, or of an adapter's folder: its base model under the adapter's name.

    Raises:
        InputError: as ``engines.profile.read_model`` and ``engines.models.adapter.read``.
    """
    return adapter.read(folder, name) if adapter.is_adapter(folder) else read_model(folder, name)
