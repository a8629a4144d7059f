"""Products with packed weights, and what else is computed from them: one torch op a format, compiled loops, Triton kernels."""
