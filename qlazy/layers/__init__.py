"""What stands in for a model's own layers and parameters: low-bit linear layers, packed experts, embeddings and tied heads."""
