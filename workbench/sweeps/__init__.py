"""Sweeps: many runs of one spec, chosen by a sampler and judged by objectives.

``plan`` (what a sweep is) and ``space`` (over which fields) are checked at construction; ``search`` asks Optuna; ``conductor``
runs a sweep in a process of its own on an executor; ``service`` is what pages and commands call, ``view`` what they show.
"""
