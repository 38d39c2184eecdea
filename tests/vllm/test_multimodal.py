"""Multimodal models: their language model routes, and tokens of an image have rows as any other."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .rigs.engine import start_engine
from .rigs.engine_process import run_in_engine_process
from .rigs.multimodal_models import ARIA, IMAGE_TOKEN_ID, IMAGE_TOKENS, make_aria
from .rigs.rollouts import Rollout, from_outputs, random_prompts
from .rigs.router_hook import RouterHook
from .rigs.transformers_oracle import Agreement, TransformersOracle

# What an image token stands for is known in prompts alone.
LETTERS = list(range(256))


def _images() -> list[Any]:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 7, 3), np.uint8)
    return [Image.fromarray(image).resize((980, 980)) for image in pixels]


def _run(path: Path) -> list[list[Rollout]]:
    """Rollouts of the same prompts for each image, twice."""
    from vllm import SamplingParams

    llm = start_engine(path, skip_tokenizer_init=False, max_num_batched_tokens=96)
    hook = RouterHook(llm)
    texts = random_prompts(np.random.default_rng(1), [5, 33] * 8)
    prompts = [
        [*before, IMAGE_TOKEN_ID, *behind]
        for before, behind in zip(texts[::2], texts[1::2], strict=True)
    ]
    params = SamplingParams(max_tokens=12, detokenize=False, allowed_token_ids=LETTERS)
    found = []
    for image in _images() * 2:
        inputs = [
            {"prompt_token_ids": prompt, "multi_modal_data": {"image": image}} for prompt in prompts
        ]
        rollouts = hook.attach_to(from_outputs(llm.generate(inputs, params, use_tqdm=False)))
        for rollout in rollouts:
            rollout.shape = ARIA
        found.append(rollouts)
    return found


@pytest.fixture(scope="module")
def aria(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_aria(tmp_path_factory.mktemp("aria"))


@pytest.fixture(scope="module")
def with_images(aria: Path) -> list[list[Rollout]]:
    return run_in_engine_process(_run, aria)


def test_tokens_of_images_have_rows_which_are_the_routers_own(
    with_images: list[list[Rollout]],
) -> None:
    for rollouts in with_images:
        for rollout in rollouts:
            assert rollout.prompt.count(IMAGE_TOKEN_ID) == IMAGE_TOKENS
        assert sum(rollout.ordered_differences() for rollout in rollouts) == 0


def test_rows_are_those_of_transformers_for_the_same_image(
    with_images: list[list[Rollout]], aria: Path
) -> None:
    from transformers import AutoProcessor

    oracle, processor = TransformersOracle(aria), AutoProcessor.from_pretrained(aria)
    agreement = Agreement(0, 0, 0)
    for rollouts, image in zip(with_images, _images() * 2, strict=True):
        seen = processor.image_processor(image, return_tensors="pt")
        inputs = {name: seen[name] for name in ("pixel_values", "pixel_mask")}
        for rollout in rollouts:
            agreement += oracle.agreement([rollout], **inputs)
    assert agreement.decisions > 2000
    assert agreement.differing == 0


def test_the_same_tokens_behind_another_image_hit_no_rows_of_the_first(
    with_images: list[list[Rollout]],
) -> None:
    first, other, again, _ = with_images
    assert all(rollout.num_cached == 0 for rollout in other)
    assert all(rollout.num_cached >= 32 for rollout in again)
    for a, b in zip(first, other, strict=True):
        num_shared = len(a.prompt) - 1
        assert (a.moe_ids()[:num_shared] != b.moe_ids()[:num_shared]).any()
