"""Recommend."""

from __future__ import annotations


def build(home) -> None:
    """The section of ``/plan``."""
