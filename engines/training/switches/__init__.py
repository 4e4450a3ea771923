"""Switches of the training loop, one file each, found by themselves (``engines.training.switch``)."""
