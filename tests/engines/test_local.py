import asyncio
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from asking import PICTURES, TOOL, Prompt, answers, fresh_logprobs, longer, request
from transformers import Qwen3Config, Qwen3ForCausalLM

from axpo.chat import Chat
from axpo.engines.base import Finish, Generation, RolloutKey, Sampling
from axpo.engines.local import LocalEngine
from axpo.policy import banned_tokens, vocabulary_size


@pytest.fixture
def engine(tiny_model: Any, chat: Chat) -> LocalEngine:
    return LocalEngine(tiny_model, chat, max_batch=8, overlap=4)


@pytest.fixture
def prompt(chat: Chat) -> Prompt:
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    return chat.prompt([{"role": "user", "content": content}], PICTURES[:1], [TOOL])


# What is sampled


@pytest.mark.parametrize("pictures", [0, 2])
@torch.no_grad()
def test_greedy_equals_generate_of_the_library(engine: LocalEngine, tiny_model: Any, chat: Chat, pictures: int) -> None:
    content = [{"type": "text", "text": "Name it. "}, *[{"type": "image"}] * pictures]
    ids, images = chat.prompt([{"role": "user", "content": content}], PICTURES[:pictures], [TOOL])
    vision = dict(zip(("pixel_values", "image_grid_thw"), chat.pixels(images), strict=True)) if images else {}
    tensor = torch.tensor([ids])
    generated = tiny_model.generate(
        input_ids=tensor,
        attention_mask=torch.ones_like(tensor),
        mm_token_type_ids=(tensor == chat.image_token_id).int(),
        **vision,
        do_sample=False,
        max_new_tokens=20,
        suppress_tokens=banned_tokens(chat, tiny_model).tolist(),
        eos_token_id=chat.stop_id,
    )
    (answer,) = answers(engine, [request((ids, images), temperature=0.0, max_tokens=20)])
    assert answer.ids == generated[0, len(ids) :].tolist()
    assert answer.logprobs == [0.0] * len(answer.ids)


def test_logprobs_equal_a_fresh_forward(engine: LocalEngine, tiny_model: Any, chat: Chat, prompt: Prompt) -> None:
    """Prompts with an image, a tool image in an observation, a fork; with and without truncation."""
    rules = [{}, {"temperature": 0.6}, {"temperature": 1.3, "top_k": 9}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9}]
    first = [request(prompt, seed=n, index=n, **some) for n, some in enumerate(rules)]
    turns = answers(engine, first)
    seen, tool_images = chat.observation([("closer", [PICTURES[2]]), ("and text", [])])
    second = [
        replace(asked, ids=whole[0], images=whole[1], seed=50 + n)
        for n, (asked, turn) in enumerate(zip(first, turns, strict=True))
        for whole in [longer(prompt, [*turn.ids, *seen], tool_images)]
    ]
    forks = [replace(asked, ids=longer(prompt, turns[0].ids[:5])[0], seed=90 + n) for n, asked in enumerate(first)]
    later = answers(engine, second + forks)
    for asked, answer in zip(first + second + forks, turns + later, strict=True):
        assert answer.logprobs == pytest.approx(fresh_logprobs(tiny_model, chat, asked, answer.ids), abs=1e-4)
    assert len({tuple(answer.ids) for answer in turns + later}) == 15


def test_a_prefix_with_another_picture_is_another_prefix(engine: LocalEngine, tiny_model: Any, chat: Chat) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    prompts = [chat.prompt([{"role": "user", "content": content}], [picture], [TOOL]) for picture in PICTURES[:2]]
    assert prompts[0][0] == prompts[1][0]
    asked = [request(some, seed=3) for some in prompts]
    for one in asked:
        (answer,) = answers(engine, [one])
        assert answer.logprobs == pytest.approx(fresh_logprobs(tiny_model, chat, one, answer.ids), abs=1e-4)
    assert engine.counters.reused_tokens == prompts[0][0].index(chat.image_token_id or -1)


def test_a_request_that_ends_in_an_image(engine: LocalEngine, tiny_model: Any, chat: Chat, prompt: Prompt) -> None:
    """The cache holds the whole image, but its last token must be computed again."""
    placeholders = [n for n, i in enumerate(prompt[0]) if i == chat.image_token_id]
    cut = request((prompt[0][: placeholders[-1] + 1], prompt[1]))
    answers(engine, [request(prompt)])
    (answer,) = answers(engine, [cut])
    assert answer.logprobs == pytest.approx(fresh_logprobs(tiny_model, chat, cut, answer.ids), abs=1e-4)
    assert engine.counters.reused_tokens == placeholders[-1]


def test_the_seed_alone_decides(engine: LocalEngine, prompt: Prompt) -> None:
    alone = answers(engine, [request(prompt, seed=7)])[0]
    together = answers(engine, [request(prompt, seed=n, index=n) for n in range(5, 9)])
    assert together[2].ids == alone.ids
    assert len({tuple(answer.ids) for answer in together}) == 4


def prefer(model: Any, ids: Sequence[int]) -> None:
    """Make the model want nothing but these ids."""

    def raise_logits(_module: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_add(-1, torch.tensor(ids), torch.full((*logits.shape[:-1], len(ids)), 100.0))

    model.lm_head.register_forward_hook(raise_logits)


def test_stops_at_the_end_of_turn(engine: LocalEngine, tiny_model: Any, chat: Chat, prompt: Prompt) -> None:
    (answer,) = answers(engine, [request(prompt)])
    assert (len(answer.ids), answer.finish) == (12, Finish.LENGTH)
    prefer(tiny_model, [chat.stop_id])
    (answer,) = answers(engine, [request(prompt)])
    assert answer == Generation([chat.stop_id], [pytest.approx(0, abs=1e-6)], Finish.STOP)


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}])
def test_banned_ids_are_never_sampled(
    engine: LocalEngine, tiny_model: Any, chat: Chat, prompt: Prompt, rules: dict[str, Any]
) -> None:
    banned = banned_tokens(chat, tiny_model).tolist()
    assert vocabulary_size(tiny_model) - 1 in banned
    prefer(tiny_model, banned)
    (answer,) = answers(engine, [request(prompt, **rules)])
    assert len(answer.ids) == 12
    assert not set(answer.ids) & set(banned)


def test_the_models_rope_deltas_do_not_matter(engine: LocalEngine, tiny_model: Any, prompt: Prompt) -> None:
    before = answers(engine, [request(prompt)])
    engine.update_weights()
    tiny_model.model.rope_deltas = torch.tensor([[999], [-3]])
    assert answers(engine, [request(prompt)]) == before
    assert tiny_model.model.rope_deltas.tolist() == [[999], [-3]]


@torch.no_grad()
def test_text_only_model(byte_tokenizer: Callable[..., Any]) -> None:
    chat = Chat(byte_tokenizer())
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(chat.tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    model: Any = Qwen3ForCausalLM(config).eval()
    ids, _ = chat.prompt([{"role": "user", "content": "Hi"}], [], [])
    generated = model.generate(
        input_ids=torch.tensor([ids]),
        do_sample=False,
        max_new_tokens=12,
        suppress_tokens=list(chat.banned_ids),
        eos_token_id=chat.stop_id,
    )
    (answer,) = answers(LocalEngine(model, chat), [request((ids, ()), temperature=0.0)])
    assert answer.ids == generated[0, len(ids) :].tolist()


# What is computed


def test_what_is_shared_is_computed_once(engine: LocalEngine, chat: Chat, prompt: Prompt) -> None:
    length = len(prompt[0])
    turns = answers(engine, [request(prompt, seed=n, index=n) for n in range(5)])
    done = engine.counters
    assert done.prefilled_tokens == length + 4  # each copy computes the last token again, for its logits
    assert done.reused_tokens == 4 * (length - 1)
    assert done.decoded_tokens == 5 * 12

    seen, images = chat.observation([("closer", [PICTURES[2]])])
    done.prefilled_tokens = done.reused_tokens = 0
    answers(engine, [request(longer(prompt, [*turns[2].ids, *seen], images), index=2)])
    assert done.prefilled_tokens == 1 + len(seen)  # the last token sampled was never fed
    assert done.reused_tokens == length + 11

    done.prefilled_tokens = done.reused_tokens = 0
    fork = longer(prompt, turns[4].ids[:6])
    answers(engine, [request(fork, seed=n, index=n) for n in range(3)])
    assert done.prefilled_tokens == 3
    assert done.reused_tokens == 3 * (length + 5)


def test_each_image_is_encoded_once(engine: LocalEngine, tiny_model: Any, chat: Chat) -> None:
    encoded: list[int] = []
    tiny_model.model.visual.register_forward_pre_hook(
        lambda _module, _args, kwargs: encoded.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    content = [*[{"type": "image"}] * 2, {"type": "text", "text": "Which?"}]
    prompts = [chat.prompt([{"role": "user", "content": content}], [PICTURES[0], PICTURES[n]], []) for n in (1, 2)]
    answers(engine, [request(some, index=n) for n, some in enumerate(prompts)])
    answers(engine, [request(some, index=n) for n, some in enumerate(prompts)])
    assert sum(encoded) == 3
    engine.update_weights()
    answers(engine, [request(prompts[0])])
    assert sum(encoded) == 5


def test_more_requests_than_places(tiny_model: Any, chat: Chat, prompt: Prompt) -> None:
    """Two in flight and two idle rows serve seven different prompts, twice over, with eviction in between."""
    engine = LocalEngine(tiny_model, chat, max_batch=2)
    requests = [request(longer(prompt, [n] * n), seed=n, index=n, max_tokens=4 + n) for n in range(7)]
    for _ in range(2):
        for asked, answer in zip(requests, answers(engine, requests), strict=True):
            assert answer.logprobs == pytest.approx(fresh_logprobs(tiny_model, chat, asked, answer.ids), abs=1e-4)


def test_over_the_memory_limit_paths_are_computed_again(tiny_model: Any, chat: Chat, prompt: Prompt) -> None:
    """Room for two trunks and tails: seven prompts at once take turns, and none of it is an error."""
    longest = len(prompt[0]) + 7
    token_bytes = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, their width, bytes
    limit = 2 * (-(-longest // 64) * 64 + 64) * token_bytes / 2**30
    engines = [LocalEngine(tiny_model, chat, kv_memory=some) for some in (1.0, limit, 1e-9)]
    requests = [request(longer(prompt, [n] * n), seed=n, index=n, max_tokens=4 + n) for n in range(7)]
    free, bounded_, one_by_one = ([answers(engine, requests) for _ in range(2)] for engine in engines)
    assert [a.ids for a in free[0] + free[1]] == [a.ids for a in bounded_[0] + bounded_[1]]
    assert [a.ids for a in free[0] + free[1]] == [a.ids for a in one_by_one[0] + one_by_one[1]]
    counts = [engine.counters.prefilled_tokens for engine in engines]
    assert counts[0] < counts[1] < counts[2]
    held = [rows.count * rows.columns for rows in (engines[1]._cache.trunks, engines[1]._cache.tails)]
    assert sum(held) * token_bytes <= limit * 2**30


def test_one_long_prompt_does_not_widen_what_comes_after(tiny_model: Any, chat: Chat, prompt: Prompt) -> None:
    """Room for one prompt of 900 tokens and little else, then many short ones: the limit holds at every moment."""
    token_bytes = 2 * 3 * 2 * 16 * 4
    limit = 1280
    engine = LocalEngine(tiny_model, chat, kv_memory=limit * token_bytes / 2**30)
    held: list[int] = []
    reserve = engine._cache.reserve

    def watched(**wanted: int) -> None:
        reserve(**wanted)
        held.append(sum(rows.count * rows.columns for rows in (engine._cache.trunks, engine._cache.tails)))

    engine._cache.reserve = watched  # type: ignore[method-assign]
    long = longer(prompt, [5] * (900 - len(prompt[0])))
    short = [request(longer(prompt, [6, n]), seed=n, index=n, max_tokens=8) for n in range(12)]
    answers(engine, [request(long, max_tokens=8)])
    assert held[-1] >= 900
    answers(engine, short)
    assert max(held) <= limit


def test_a_limit_that_binds_is_told_once(
    tiny_model: Any, chat: Chat, prompt: Prompt, caplog: pytest.LogCaptureFixture
) -> None:
    engine = LocalEngine(tiny_model, chat, kv_memory=1e-9)
    for _ in range(2):
        answers(engine, [request(longer(prompt, [n]), index=n, max_tokens=2) for n in range(3)])
    assert [record.message[:48] for record in caplog.records] == ["engine.kv_memory has room for only 1 rollouts at"]


def test_new_weights(engine: LocalEngine, tiny_model: Any, chat: Chat, prompt: Prompt) -> None:
    before = answers(engine, [request(prompt)])
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.mul_(1.1)
    engine.update_weights()
    after = answers(engine, [request(prompt)])
    assert after != before
    assert after == answers(LocalEngine(tiny_model, chat), [request(prompt)])


# How it runs


def run_rollouts(engine: LocalEngine, chat: Chat, prompt: Prompt, naps: random.Random) -> list[list[Generation]]:
    """Ten rollouts of up to three turns, whose tools take as long as they like."""

    async def one(index: int) -> list[Generation]:
        with engine.rollout(RolloutKey("q", index)):
            path, turns = prompt, []
            for turn in range(1 + index % 3):
                await asyncio.sleep(naps.choice([0, 0, 0.003, 0.02]))
                asked = request(path, seed=100 * index + turn, index=index, max_tokens=3 + (5 * index + turn) % 9)
                turns.append(await engine.generate(asked))
                seen, images = chat.observation([("closer", PICTURES[1:2])])
                path = longer(path, [*turns[-1].ids, *seen], images)
            await asyncio.sleep(naps.choice([0, 0.005]))
            return turns

    async def everyone() -> list[list[Generation]]:
        return await asyncio.gather(*map(one, range(10)))

    return asyncio.run(everyone())


@pytest.mark.parametrize("overlap", [0, 2, 16])
def test_repeated_exactly_whatever_time_tools_take(tiny_model: Any, chat: Chat, prompt: Prompt, overlap: int) -> None:
    batches: list[tuple[int, ...]] = []
    tiny_model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: batches.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    runs = []
    for seed in range(3):
        batches.clear()
        engine = LocalEngine(tiny_model, chat, max_batch=4, overlap=overlap)
        runs.append((run_rollouts(engine, chat, prompt, random.Random(seed)), tuple(batches)))
    assert runs[0] == runs[1] == runs[2]
    assert max(rows for rows, _ in batches) > 1


def test_nobody_waits_for_a_rollout_that_ended(engine: LocalEngine, prompt: Prompt) -> None:
    async def scene() -> Generation:
        with engine.rollout(RolloutKey("q", 0)), engine.rollout(RolloutKey("q", 1)):
            asking = asyncio.create_task(engine.generate(request(prompt)))
            await asyncio.sleep(0.05)
            assert not asking.done()  # the other has opened, and may ask yet
        return await asking

    assert len(asyncio.run(scene()).ids) == 12
    again = engine.rollout(RolloutKey("q", 0))
    with engine.rollout(RolloutKey("q", 0)), pytest.raises(ValueError, match="open already"), again:
        pass


def bounded(scene: Coroutine[Any, Any, Any]) -> Any:
    """Run a scene that must not hang."""
    return asyncio.run(asyncio.wait_for(scene, timeout=20))


def test_a_cancelled_request_frees_its_place(tiny_model: Any, chat: Chat, prompt: Prompt) -> None:
    engine = LocalEngine(tiny_model, chat, max_batch=1)
    expected = answers(LocalEngine(tiny_model, chat, max_batch=1), [request(prompt, seed=1)])

    async def scene() -> Generation:
        first = asyncio.create_task(engine.generate(request(prompt, max_tokens=100_000)))
        second = asyncio.create_task(engine.generate(request(prompt, seed=1, index=1)))
        third = asyncio.create_task(engine.generate(request(prompt, seed=2, index=2)))
        while not engine.counters.decoded_tokens:
            await asyncio.sleep(0)
        third.cancel()
        first.cancel()
        assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], asyncio.CancelledError)
        return await second

    assert bounded(scene()).ids == expected[0].ids


@pytest.mark.parametrize("failing", [0, 1, 6])  # while a trunk is computed, while a tail is, while decoding
def test_an_error_of_the_model_reaches_everybody(
    engine: LocalEngine, tiny_model: Any, prompt: Prompt, failing: int
) -> None:
    expected = answers(engine, [request(prompt)])
    engine.update_weights()
    steps = iter(range(100))

    def fail(*_: Any) -> None:
        if next(steps) == failing:
            raise RuntimeError("out of memory")

    hook = tiny_model.lm_head.register_forward_hook(fail)

    async def scene() -> list[Any]:
        # Eight in flight, four waiting; all share a trunk, and two of them the tail.
        tails = [[], [5, 6, 7], [5, 6, 7, 8], *[[n] for n in range(9)]]
        many = [engine.generate(request(longer(prompt, tail), seed=n, index=n)) for n, tail in enumerate(tails)]
        return await asyncio.gather(*many, return_exceptions=True)

    assert [str(error) for error in bounded(scene())] == ["out of memory"] * 12
    hook.remove()
    assert answers(engine, [request(prompt)]) == expected


def test_runs_in_one_loop_after_another(engine: LocalEngine, prompt: Prompt) -> None:
    async def leave() -> None:
        task = asyncio.ensure_future(engine.generate(request(prompt, max_tokens=100_000)))
        while not engine.counters.decoded_tokens:
            await asyncio.sleep(0)
        del task

    asyncio.run(leave())  # ends with a request in flight, which asyncio cancels
    with engine.rollout(RolloutKey("q", 0)):
        expected = bounded(engine.generate(request(prompt)))

    abandoned = asyncio.new_event_loop()  # and one that is closed over a request, without any cancelling
    engine.counters.decoded_tokens = 0
    abandoned.run_until_complete(leave())
    abandoned.close()
    assert bounded(engine.generate(request(prompt))).ids == expected.ids


def test_weights_cannot_change_under_a_request(engine: LocalEngine, prompt: Prompt) -> None:
    async def scene() -> None:
        task = asyncio.create_task(engine.generate(request(prompt, max_tokens=100_000)))
        while not engine.counters.decoded_tokens:
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="while 1 generations are in flight"):
            engine.update_weights()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        engine.update_weights()

    bounded(scene())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "at least one id"),
        ({"ids": [5, 10_000]}, r"outside 0\.\."),
        ({"images": ()}, "6 image placeholders in the ids, but the images take 0"),
        ({"sampling": Sampling(top_p=2)}, "top_p is 2"),
    ],
)
def test_requests_that_make_no_sense(engine: LocalEngine, prompt: Prompt, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded(engine.generate(replace(request(prompt), **change)))
    assert len(bounded(engine.generate(request(prompt))).ids) == 12


def test_options_out_of_range(tiny_model: Any, chat: Chat) -> None:
    with pytest.raises(ValueError, match="max_batch is 0 and overlap 16"):
        LocalEngine(tiny_model, chat, max_batch=0)
    with pytest.raises(ValueError, match="overlap -1"):
        LocalEngine(tiny_model, chat, overlap=-1)
    with pytest.raises(ValueError, match="kv_memory is 0"):
        LocalEngine(tiny_model, chat, kv_memory=0)
