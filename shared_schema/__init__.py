"""Typed routed-experts data shared by the rollout engine and the trainer."""
