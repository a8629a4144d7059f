"""What a checkpoint holds: headers of safetensors and GGUF files, on disk or on the hub, and the schemes of packed weights.

Nothing here imports torch or reads a weight; `source.py` opens whatever the user named.
"""
