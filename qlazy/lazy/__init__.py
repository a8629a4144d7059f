"""Lazy building: any `nn.Module` constructed without memory, and given eager construction's values later. Needs torch only."""

from qlazy.lazy.build import Build as Build
from qlazy.lazy.build import lazy_build as lazy_build
from qlazy.lazy.materialize import materialize as materialize
from qlazy.lazy.materialize import release as release

__all__ = ["Build", "lazy_build", "materialize", "release"]
