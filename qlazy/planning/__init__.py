"""What goes where, in bytes, before a weight is read: recipe, budget and demand make a plan (`plan.py`).

Nothing here imports torch or transformers.
"""
