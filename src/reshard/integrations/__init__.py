"""For use in a trainer: `transformers` for its callbacks, `submit` for any other loop.

Neither ever blocks a training step or ends a training: what goes wrong is one warning.
"""
