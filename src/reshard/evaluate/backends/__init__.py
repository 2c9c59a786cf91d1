"""What evaluates: one module each, with `make(config) -> Backend`. See `evaluate/backend.py` for what one promises."""
