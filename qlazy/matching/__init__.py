"""Which rows of which stored tensors fill what of the model, and how: what `qlazy/match.py` puts together."""
