"""The `qlazy` command: one module a command. Importing it imports neither torch nor transformers, for quick help and plans."""

from qlazy.cli import chat, configs, doctor, load, models, plan, run
from qlazy.cli.app import app, main

__all__ = ["app", "chat", "configs", "doctor", "load", "main", "models", "plan", "run"]
