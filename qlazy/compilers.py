"""Finds the machine's compilers."""

from __future__ import annotations

import os
import shutil


def find_compilers() -> tuple[str | None, str | None]:
    """The compilers for `csrc/`: what `CC` and `CXX` say, or the usual names.

    Returns:
        That of C and that of C++, each None where there is none.
    """
    c = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    cpp = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return c, cpp
