"""How good a quantized model is: logits, perplexity, and how far predictions are from another model's."""
