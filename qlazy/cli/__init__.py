"""The `qlazy` command: one module a command. Importing it imports neither torch nor transformers, for quick help and plans."""

from qlazy.cli import bench, chat, configs, doctor, load, models, plan, ppl, run, save, tune
from qlazy.cli.app import app, main

__all__ = ["app", "bench", "chat", "configs", "doctor", "load", "main", "models", "plan", "ppl", "run", "save", "tune"]
