"""Adapters for inference engines, one module each; an engine is imported only when it is used.

Not a place for storage logic: an adapter translates an engine's KV into blocks and back.
"""
