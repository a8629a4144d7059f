"""Models whose weights are packed already: mapped from their files instead of read and quantized."""
