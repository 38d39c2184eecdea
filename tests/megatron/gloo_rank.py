"""What every rank of a `GlooPool` imports, done once in the process that they are forked from."""

import megatron_r3
import megatron_r3.cpu
import megatron_r3.reference_attention

megatron_r3.attach  # noqa: B018  what it needs is imported with its first use
