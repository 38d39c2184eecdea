"""A plain Megatron training loop on rollouts, with replay.

It takes policy-gradient steps on what `make demo` rolled out, on any parallel layout:

    python -m examples.megatron_loop
    torchrun --nproc-per-node 2 -m examples.megatron_loop --pipeline-parallel 2
    torchrun --nproc-per-node 2 -m examples.megatron_loop --tensor-parallel 2

Every rank is given the same kind of routes and replays the rows and layers of its own routers;
nothing here says which ones those are. What replay adds to the loop is marked `# R3` in loop.py.
"""
