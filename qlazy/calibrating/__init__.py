"""Calibration: what each layer takes in is measured block by block, and decides how its weights are rounded."""
