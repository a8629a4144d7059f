"""Lazy building: any `nn.Module` constructed without storage for its parameters. Depends on torch only."""

from qlazy.lazy.build import lazy_build as lazy_build

__all__ = ["lazy_build"]
