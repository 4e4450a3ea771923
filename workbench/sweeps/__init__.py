"""Sweeps: many runs of one spec, chosen by a sampler, judged by objectives."""
