"""Weights to codes, scales and zeros, and back: what each format is by definition, and loops and kernels with equal bytes."""
