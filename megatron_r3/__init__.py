"""Routing replay for megatron-core's mixture-of-experts routers."""
