"""Contrastive training: configuration, schedule, optimisers, loop, checkpoints, validation.

`cellfast.training.config` imports no torch; `cellfast.training.loop.train` is the whole thing.
"""
