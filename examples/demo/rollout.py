"""The rollout: a client samples from the served model and keeps what a trainer needs."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openai import APIError, AsyncOpenAI

from examples.demo import DemoError
from shared_schema import (
    RoutedExperts,
    RoutingLayout,
    RowStatus,
    decode,
    encode,
    from_vllm_base64,
)

REQUEST_TIMEOUT_S = 600


@dataclass(frozen=True)
class Sample:
    """One sampled sequence of P prompt and O output tokens.

    `logprobs` is float64 `[O]`, in nats, of the output tokens as the rollout engine saw them;
    `routed` has the rows of positions 0 … P+O-2.
    """

    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: np.ndarray
    routed: RoutedExperts

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output, P+O ids."""
        return self.prompt_ids + self.output_ids


def roll_out(
    url: str,
    prompts: list[list[int]],
    max_tokens: int,
    layout: RoutingLayout,
    progress: Callable[[], None],
) -> list[Sample]:
    """Sample once from each prompt, all at the same time; call `progress` after each answer.

    Raises:
        DemoError: a request failed.
        RoutingSchemaError: the server's routed experts break the schema.

    """

    async def all_samples() -> list[Sample]:
        async with AsyncOpenAI(
            base_url=url, api_key="none", timeout=REQUEST_TIMEOUT_S, max_retries=0
        ) as client:
            return await asyncio.gather(*(one_sample(client, prompt) for prompt in prompts))

    async def one_sample(client: AsyncOpenAI, prompt: list[int]) -> Sample:
        answer = await client.completions.create(
            model="policy",
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=1.0,
            logprobs=0,
            extra_body={"return_token_ids": True},
        )
        progress()
        return to_sample(answer.choices[0].to_dict(), layout)

    try:
        return asyncio.run(all_samples())
    except APIError as error:
        raise DemoError(f"a request to vLLM at {url} failed: {error}") from error


def to_sample(choice: dict[str, Any], layout: RoutingLayout) -> Sample:
    """Read a choice of the answer; without routed experts, all rows are marked as missing.

    Raises:
        DemoError: more or fewer rows than the tokens call for.
        RoutingSchemaError: rows that break the schema.

    """
    prompt_ids, output_ids = choice["prompt_token_ids"], choice["token_ids"]
    num_rows = len(prompt_ids) + len(output_ids) - 1
    if choice.get("routed_experts"):
        routed = from_vllm_base64(choice["routed_experts"], layout)
    else:
        routed = RoutedExperts(
            np.zeros((num_rows, layout.num_moe_layers, layout.top_k), layout.dtype),
            layout,
            status=np.full(num_rows, RowStatus.MISSING, np.uint8),
        )
    if len(routed) != num_rows:
        raise DemoError(
            f"vLLM returned {len(routed)} rows of routed experts for {len(prompt_ids)} prompt and "
            f"{len(output_ids)} output tokens, expected {num_rows}."
        )
    return Sample(prompt_ids, output_ids, np.asarray(choice["logprobs"]["token_logprobs"]), routed)


def save(samples: list[Sample], folder: Path) -> None:
    """Write tokens and log-probs to `samples.json`, each sample's routes to `NNN.safetensors`."""
    for old in folder.glob("*.safetensors"):
        old.unlink()
    for index, sample in enumerate(samples):
        (folder / f"{index:03}.safetensors").write_bytes(encode(sample.routed))
    rows = [
        {"prompt_ids": s.prompt_ids, "output_ids": s.output_ids, "logprobs": s.logprobs.tolist()}
        for s in samples
    ]
    (folder / "samples.json").write_text(json.dumps(rows))


def load(folder: Path, layout: RoutingLayout) -> list[Sample]:
    """Read what `save` wrote."""
    return [
        Sample(
            row["prompt_ids"],
            row["output_ids"],
            np.asarray(row["logprobs"]),
            decode((folder / f"{index:03}.safetensors").read_bytes(), expect=layout),
        )
        for index, row in enumerate(json.loads((folder / "samples.json").read_text()))
    ]
