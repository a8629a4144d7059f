"""From bytes on the disk to rows of values, a bounded number at a time, and on to a GPU, for `qlazy/stream.py`."""
