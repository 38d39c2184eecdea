"""Rollout and training in Ray actors, with routes in Ray's object store.

One actor samples with vLLM and puts one object for each data-parallel trainer into the store:
tokens, log-probs and routes of all its samples, each as one contiguous array. The trainers, actors
with Megatron, map those arrays into their memory and replay from them; nothing is copied, and the
store holds no object for a sample by itself.

It trains the small model that `make demo` leaves in build/demo:

    python -m examples.ray_pair
"""
