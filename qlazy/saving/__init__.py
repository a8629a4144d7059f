"""Saved models: layouts that other libraries read, written shard by shard, whole or not at all."""
