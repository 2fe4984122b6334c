"""A question to vLLM's EngineCore: is anything left of the prefix cache?"""

from __future__ import annotations

from typing import Any


def cached_blocks(core: Any) -> int:
    """How many KV blocks of earlier requests a later one would find. core: vLLM's EngineCore, which register() gives
    this function as the utility oapl_cached_blocks (EngineCoreClient.call_utility_async)."""
    return len(core.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)
