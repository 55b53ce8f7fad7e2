"""What every engine must do, for the local one and for vLLM where it is installed (`make test-vllm`).

All of it on the miniature, which was trained: its answers end, and images and tools change them.
"""

import asyncio
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from asking import PICTURES, TOOL, Prompt, answers, fresh_logprobs, fresh_rows, longer, noise, request

from axpo.build import load_chat, load_model, make_engine
from axpo.chat import Chat
from axpo.config import Config, load_config
from axpo.engines.base import Counters, Engine, Finish, Generation, RolloutKey
from axpo.engines.vllm import VllmEngine
from axpo.policy import banned_tokens

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="make test-vllm runs these")
WITHIN = 1e-3  # nats, between the log-probs of an engine and of a fresh forward


@pytest.fixture(
    scope="module",
    params=["local", pytest.param("vllm", marks=needs_vllm), pytest.param("servers", marks=needs_vllm)],
)
def config(request: pytest.FixtureRequest) -> Config:
    rollout = "rollout={temperature: 1.0, max_tokens: 96, max_context: 1100, max_images: 4}"
    given = ["model=miniature_sft", "max_pixels=16384", rollout]
    name = "vllm" if request.param == "servers" else request.param
    given.append(f"engine={{name: {name}, max_batch: 128, kv_memory: 0.5}}")
    if request.param == "servers":
        untied, url = request.getfixturevalue("untied"), request.getfixturevalue("server")
        given += [f"model={untied}", f"vllm.servers=[{url}]"]
    return load_config(None, given)


@pytest.fixture(scope="module")
def chat(config: Config) -> Chat:
    return load_chat(config)


@pytest.fixture(scope="module")
def model(config: Config) -> Any:
    return load_model(config)


@pytest.fixture(scope="module")
def engine(config: Config, model: Any, chat: Chat) -> Engine:
    return make_engine(config, model, chat)


@pytest.fixture(scope="module")
def prompts(chat: Chat) -> dict[str, Prompt]:
    """Text alone; images in the prompt; one more in an observation; and a prefix that ends inside a turn after it."""
    told = [{"type": "text", "text": "What is 3 and 4 together? Look at the numbers again."}]
    seen = [{"type": "image"}, {"type": "text", "text": "What is here,"}, {"type": "image"}, *told]
    pictures = [noise(128, 96), PICTURES[0]]
    text = chat.prompt([{"role": "user", "content": told}], [], [TOOL])
    images = chat.prompt([{"role": "user", "content": seen}], pictures, [TOOL])
    turn = chat.turn('I look closer.\n</think>\n\n<tool_call>\n{"name": "zoom", "arguments": {}}\n</tool_call>')
    ids, shown = chat.observation([("closer", [noise(64, 64)]), ("and text", [])])
    observed = longer(images, [*turn, *ids], shown)
    return {"text": text, "images": images, "observed": observed, "fork": longer(observed, chat.turn("I see 1")[:3])}


@pytest.fixture
def restored(engine: Engine, model: Any) -> Iterator[None]:
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    yield
    model.load_state_dict(weights)
    engine.update_weights()


@pytest.fixture
def flat(engine: Engine, model: Any, restored: None) -> None:
    """Weights with which every token is about as likely, so that nothing ends soon and all that is allowed comes up."""
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(0.02)
    engine.update_weights()


def within(found: Sequence[Generation], expected: Sequence[Sequence[float]]) -> bool:
    """Whether the log-probs are those of a fresh forward."""
    pairs = zip(found, expected, strict=True)
    return all(np.allclose(answer.logprobs, logprobs, rtol=0, atol=WITHIN) for answer, logprobs in pairs)


def test_greedy_takes_the_likeliest_token(engine: Engine, model: Any, chat: Chat, prompts: dict[str, Prompt]) -> None:
    asked = [request(prompt, index=n, temperature=0.0, max_tokens=24) for n, prompt in enumerate(prompts.values())]
    found = answers(engine, asked)
    for one, answer in zip(asked, found, strict=True):
        assert answer.ids == fresh_rows(model, chat, one, answer.ids).argmax(-1).tolist()
        assert answer.logprobs == [0.0] * len(answer.ids)
    assert len({tuple(answer.ids) for answer in found}) == len(found)


def test_logprobs_are_those_of_a_fresh_forward(
    engine: Engine, model: Any, chat: Chat, prompts: dict[str, Prompt]
) -> None:
    """Of text, images, observations and forks, with and without truncation."""
    rules = [{}, {"temperature": 0.6}, {"temperature": 1.3, "top_k": 9}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9}]
    cases = [(prompt, some) for prompt in prompts.values() for some in rules]
    asked = [request(prompt, seed=n, index=n, max_tokens=16, **some) for n, (prompt, some) in enumerate(cases)]
    found = answers(engine, asked)
    assert within(found, [fresh_logprobs(model, chat, r, a.ids) for r, a in zip(asked, found, strict=True)])
    assert sum(logprob < -0.01 for answer in found for logprob in answer.logprobs) > len(found)


def test_a_fork_goes_on_where_its_prefix_ends(engine: Engine, prompts: dict[str, Prompt]) -> None:
    """Greedily, every continuation of a prefix of an answer is the rest of that answer."""
    whole = request(prompts["observed"], temperature=0.0, max_tokens=20)
    (answer,) = answers(engine, [whole])
    cuts = range(0, len(answer.ids), 3)
    asked = [request(longer(prompts["observed"], answer.ids[:cut]), temperature=0.0, max_tokens=20) for cut in cuts]
    for cut, fork in zip(cuts, answers(engine, asked), strict=True):
        assert [*answer.ids[:cut], *fork.ids][: len(answer.ids)] == answer.ids


def test_a_turn_ends_at_its_stop_token_or_its_limit(engine: Engine, chat: Chat, prompts: dict[str, Prompt]) -> None:
    asked = [request(prompts["text"], seed=n, index=n, max_tokens=96) for n in range(12)]
    found = answers(engine, asked)
    ends = [answer for answer in found if answer.finish is Finish.STOP]
    assert len(ends) > 6
    for answer in found:
        assert (answer.ids[-1] == chat.stop_id) == (answer.finish is Finish.STOP)
        assert chat.stop_id not in answer.ids[:-1]
        assert len(answer.ids) == len(answer.logprobs) <= 96
        assert len(answer.ids) == 96 or answer.finish is Finish.STOP
    (exact,) = answers(engine, [request(prompts["text"], temperature=0.0, max_tokens=96)])
    size = len(exact.ids)
    limits = [request(prompts["text"], temperature=0.0, max_tokens=size - cut) for cut in (0, 1)]
    met, cut = answers(engine, limits)
    assert (met.finish, cut.finish) == (Finish.STOP, Finish.LENGTH)
    assert (met.ids, cut.ids) == (exact.ids, exact.ids[:-1])


@pytest.mark.usefixtures("flat")
def test_a_seed_decides_what_is_drawn(engine: Engine, prompts: dict[str, Prompt]) -> None:
    asked = [request(prompts["images"], seed=seed, max_tokens=8) for seed in (5, 5, 6, 7, 2**64 - 1)]
    same, again, *others = (answer.ids for one in asked for answer in answers(engine, [one]))
    assert same == again
    assert len({tuple(ids) for ids in (same, *others)}) == 4


@pytest.mark.usefixtures("flat")
def test_banned_tokens_are_never_drawn(engine: Engine, model: Any, chat: Chat, prompts: dict[str, Prompt]) -> None:
    """Not even where the distribution is flat: most of 768 tokens come up."""
    asked = [request(prompts["text"], seed=n, index=n, max_tokens=24) for n in range(64)]
    found = answers(engine, asked)
    drawn = {i for answer in found for i in answer.ids}
    assert len(drawn) > 300
    assert not drawn & set(banned_tokens(chat, model).tolist())
    assert chat.image_token_id not in drawn
    assert within(found[:4], [fresh_logprobs(model, chat, r, a.ids) for r, a in zip(asked[:4], found, strict=False)])


@pytest.mark.usefixtures("restored")
def test_new_weights_take_effect(engine: Engine, model: Any, chat: Chat, prompts: dict[str, Prompt]) -> None:
    """Those of the language model, of the vision tower, and of the embedding that is the head, each by itself."""
    asked = [request(prompts[name], seed=3, max_tokens=12) for name in ("images", "observed")]
    before = answers(engine, asked)
    text, vision = model.model.language_model, model.model.visual
    for part in (text.layers[1].mlp, vision.blocks[0], text.embed_tokens):
        engine.sleep()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.mul_(1 + 0.3 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
        engine.update_weights()
        after = answers(engine, asked)
        assert within(after, [fresh_logprobs(model, chat, r, a.ids) for r, a in zip(asked, after, strict=True)])
        assert [a.logprobs for a in after] != [b.logprobs for b in before]
        before = after


def test_what_sleep_leaves_in_memory_reaches_no_text(
    engine: Engine, model: Any, chat: Chat, prompts: dict[str, Prompt]
) -> None:
    """vLLM adds features to the tokens of images, and to others what it takes for zeros."""
    if not isinstance(engine, VllmEngine):
        pytest.skip("no other engine here gives its memory back")
    engine._engine.apply_model(_spoil)
    engine.sleep()
    engine.update_weights()
    asked = [request(prompts["text"], seed=5, max_tokens=12)]
    found = answers(engine, asked)
    assert within(found, [fresh_logprobs(model, chat, r, a.ids) for r, a in zip(asked, found, strict=True)])


def _spoil(vllm_model: Any) -> None:
    for features in vllm_model.deepstack_input_embeds:
        features.fill_(3.0)


def test_hundreds_are_in_flight_and_share_their_prompts(
    engine: Engine, model: Any, chat: Chat, prompts: dict[str, Prompt]
) -> None:
    engine.update_weights()  # nothing is cached
    before = Counters(**vars(engine.counters))
    names = list(prompts)
    asked = [request(prompts[names[n % 4]], seed=n, index=n, max_tokens=6 + n % 5) for n in range(400)]
    found = answers(engine, asked)
    assert len(found) == 400
    assert all(1 <= len(answer.ids) <= 6 + n % 5 for n, answer in enumerate(found))
    some = range(0, 400, 57)
    assert within([found[n] for n in some], [fresh_logprobs(model, chat, asked[n], found[n].ids) for n in some])
    counted = engine.counters - before
    assert counted.decoded_tokens == sum(len(answer.ids) for answer in found)
    assert counted.hit_rate is not None
    assert 0.5 < counted.hit_rate < 1
    assert counted.prefilled_tokens + counted.reused_tokens == sum(len(one.ids) for one in asked)


@pytest.mark.usefixtures("flat")
def test_a_cancelled_request_leaves_the_others_alone(engine: Engine, prompts: dict[str, Prompt]) -> None:
    asked = [request(prompts["images"], seed=n, index=n, max_tokens=200) for n in range(6)]
    alone = [answers(engine, [one])[0] for one in asked[:1]]

    async def cancel_some() -> list[Generation]:
        tasks = [asyncio.ensure_future(engine.generate(one)) for one in asked]
        await asyncio.sleep(0.02)
        for task in tasks[3:]:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[3]
        with pytest.raises(RuntimeError, match="in flight"):
            engine.sleep()
        return await asyncio.gather(*tasks[:3])

    kept = asyncio.run(cancel_some())
    assert kept[0].ids == alone[0].ids
    engine.update_weights()  # which nothing in flight hinders
    assert answers(engine, asked[:1])[0].ids == alone[0].ids


def test_a_loop_that_ends_takes_its_requests_with_it(engine: Engine, prompts: dict[str, Prompt]) -> None:
    async def leave() -> None:
        asyncio.ensure_future(engine.generate(request(prompts["text"], max_tokens=60)))  # noqa: RUF006
        await asyncio.sleep(0.02)

    asyncio.run(leave())
    (answer,) = answers(engine, [request(prompts["text"], temperature=0.0, max_tokens=4)])
    assert len(answer.ids) <= 4
    engine.sleep()
    engine.update_weights()


def test_what_makes_no_sense_is_refused_alone(engine: Engine, chat: Chat, prompts: dict[str, Prompt]) -> None:
    ids, images = prompts["images"]
    wrong = [
        (request(([], ())), "at least one id"),
        (request(([3, 10**6], ())), "ids outside"),
        (request((ids, images[:1])), "image placeholders in the ids"),
        (request(prompts["text"], temperature=-1.0), "temperature is -1"),
        (request(prompts["text"], top_p=0.0), "top_p is 0"),
        (request(prompts["text"], max_tokens=0), "max_tokens is 0"),
    ]

    async def ask() -> list[Any]:
        good = request(prompts["text"], temperature=0.0, max_tokens=3)
        return await asyncio.gather(
            *(engine.generate(one) for one in [good, *(one for one, _ in wrong)]), return_exceptions=True
        )

    answer, *errors = asyncio.run(ask())
    assert len(answer.ids) == 3
    for error, (_, said) in zip(errors, wrong, strict=True):
        assert isinstance(error, ValueError)
        assert said in str(error)


def test_rollouts_open_and_settle(engine: Engine) -> None:
    async def one() -> None:
        key = RolloutKey("q", 1)
        with engine.rollout(key):
            await engine.settle(key)

    asyncio.run(asyncio.wait_for(one(), 20))
