"""Lazy building: any `nn.Module` constructed without memory, and given eager construction's values later. Needs torch only."""

from qlazy.lazy.build import Build as Build
from qlazy.lazy.build import lazy_build as lazy_build
from qlazy.lazy.materialize import materialize as materialize
from qlazy.lazy.materialize import release as release
from qlazy.lazy.report import LazyReport as LazyReport
from qlazy.lazy.shard import materialize_shard as materialize_shard
from qlazy.lazy.weights import Loaded as Loaded
from qlazy.lazy.weights import load_weights as load_weights

__all__ = ["Build", "LazyReport", "Loaded", "lazy_build", "load_weights", "materialize", "materialize_shard", "release"]
