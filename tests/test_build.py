import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torch.distributed as dist

from axpo import build
from axpo.chat import ChatError
from axpo.config import Config, ConfigError, load_config
from axpo.engines import local
from axpo.engines.base import Sampling
from axpo.engines.local import LocalEngine
from axpo.policy import PolicyError
from axpo.questions import DataError
from axpo.tools.base import Conversation, ToolError


def config(*overrides: str) -> Config:
    return load_config(None, overrides)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"{number} + 1?", "answer": number + 1, "id": str(number)} for number in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MINIATURE_QUESTIONS", 12)
    monkeypatch.setattr(build, "MINIATURE_HELD_OUT", 6)


# Data -----------------------------------------------------------------------------------------------------------------


def test_data_that_is_not_given_is_none(questions: Path):
    assert build.load_data(config()) == build.Data(None, None)
    data = build.load_data(config(f"data.train={questions}"))
    assert [question.id for question in data.train or []] == ["0", "1", "2", "3", "4"]
    assert data.eval is None


def test_eval_questions_takes_the_first_ones_and_0_all_of_them(questions: Path):
    for count, ids in (2, ["0", "1"]), (5, ["0", "1", "2", "3", "4"]), (0, ["0", "1", "2", "3", "4"]):
        data = build.load_data(config(f"data.eval={questions}", f"eval.questions={count}"))
        assert [question.id for question in data.eval or []] == ids


def test_more_eval_questions_than_there_are(questions: Path):
    with pytest.raises(ConfigError, match=r"eval\.questions: got 6, but data\.eval holds 5"):
        build.load_data(config(f"data.eval={questions}", "eval.questions=6"))


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        build.load_data(config(f"data.eval={tmp_path / 'nowhere.jsonl'}"))


@pytest.mark.usefixtures("base")
def test_the_miniature_is_the_same_every_time_and_its_held_out_questions_are_others():
    given = config("data.train=miniature", "data.eval=miniature")
    data = build.load_data(given)
    assert data.train is not None
    assert data.eval is not None
    assert (len(data.train), len(data.eval)) == (12, 6)
    assert build.load_data(given) == data
    families = {question.family for question in data.train}
    assert families == {"perception", "computation", "lookup"} == {question.family for question in data.eval}
    assert not {question.id for question in data.train} & {question.id for question in data.eval}
    shown = [{(str(q.messages), q.images) for q in each} for each in (data.train, data.eval)]
    assert not shown[0] & shown[1]


def test_trajectories_come_from_a_file(tmp_path: Path):
    path = tmp_path / "trajectories.jsonl"
    row: dict[str, Any] = {"question": "1 + 1?", "answer": 2, "turns": [{"role": "assistant", "content": "2"}]}
    path.write_text(json.dumps(row))
    (trajectory,) = build.load_sft_data(config(f"data.sft={path}"))
    assert trajectory.turns[0].content == "2"
    for override in "data.sft=", "data.sft=miniature":
        with pytest.raises(ConfigError, match=r"data\.sft: must be a \.jsonl or \.parquet file of trajectories"):
            build.load_sft_data(config(override))


# Chat and tools -------------------------------------------------------------------------------------------------------


def test_max_pixels_bounds_what_the_model_sees():
    file = io.BytesIO()
    PIL.Image.new("RGB", (512, 512)).save(file, "PNG")
    for pixels, tokens in (4096, 4), (16384, 16):
        assert build.load_chat(config(f"max_pixels={pixels}")).encode_image(file.getvalue()).tokens == tokens


def test_a_folder_that_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(ChatError, match=r"is not a checkpoint: it holds no config\.json"):
        build.load_chat(config(f"model={tmp_path}"))
    with pytest.raises(PolicyError, match=r"is not a checkpoint: it holds no config\.json"):
        build.load_model(config(f"model={tmp_path}"))


def test_tools_are_those_that_are_named_over_the_given_corpus(tmp_path: Path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"title": f"Zebra {n}", "text": f"The zebra number {n} lives in Oz."} for n in range(4)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = config("tools.names=[search, zoom]", f"tools.corpus={corpus}", "tools.search_results=2")
    toolbox = build.load_toolbox(given, build.load_chat(given))
    assert toolbox.names == ["search", "image_zoom_in_tool"]
    found = asyncio.run(toolbox.call("search", {"query": "zebra"}, Conversation())).text
    assert "Oz" in found
    assert found.count("lives in") == 2


def test_tools_that_are_only_described_need_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TAVILY_API_KEY", raising=False)
    names = ["tools.names=[zoom, python, search]", "tools.sandbox={remote: http://localhost:9}"]
    given = config(*names, "tools.search=tavily", "eval.tools=[image_search]", "tools.image_search={url: nowhere}")
    chat = build.load_chat(given)
    with pytest.raises(ToolError):
        build.load_toolbox(given, chat)
    there = config(names[0], "tools.sandbox=none_i_trust_the_policy", "tools.corpus=miniature")
    expected = build.load_toolbox(there, chat).schemas
    assert build.load_toolbox(given, chat, described=True).schemas == expected


def test_the_processes_share_the_rate_of_searches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TAVILY_API_KEY", "key")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 8)
    given = config("tools.names=[search]", "tools.search=tavily", "tools.search_rate=4")
    rates: list[float | None] = []
    monkeypatch.setattr("axpo.tools.providers.tavily", lambda limits, cache: rates.append(limits.rate) or None)
    build.load_toolbox(given, build.load_chat(given))
    assert rates == [0.5]


def test_a_tool_file_that_raises_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text("x = 1\nx / 0\n")
    given = config(f"tools.names=[{path}]")
    with pytest.raises(ToolError, match=r"mine\.py:2: does not import: ZeroDivisionError"):
        build.load_toolbox(given, build.load_chat(given))


# Model, engine, agents ------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_model_has_the_precision_and_torch_the_threads_of_the_config():
    torch.set_num_threads(1)
    model = build.load_model(config("threads=2", "dtype=bfloat16"))
    assert model.dtype == torch.bfloat16
    assert torch.get_num_threads() == 2
    assert not model.training
    assert build.load_model(config()).dtype == torch.float32
    assert torch.get_num_threads() == 2


def test_training_and_evaluation_sample_and_end_as_the_config_says():
    given = config(
        "rollout={temperature: 0.7, top_p: 0.8, top_k: 5, max_tokens: 9, max_turns: 1, max_context: 99, max_images: 2}",
        "eval={temperature: 0, top_p: 0.6, top_k: 3}",
        "engine={max_batch: 7, overlap: 3, kv_memory: 0.5}",
    )
    chat = build.load_chat(given)
    toolbox = build.load_toolbox(given, chat)
    engine = build.make_engine(given, build.load_model(given), chat)
    training = build.training_agent(given, engine, chat, toolbox)
    evaluation = build.evaluation_agent(given, engine, chat, toolbox)
    assert training.sampling == Sampling(0.7, 0.8, 5, 9)
    assert evaluation.sampling == Sampling(0, 0.6, 3, 9)
    for agent in training, evaluation:
        assert (agent.limits.turns, agent.limits.context, agent.limits.images) == (1, 99, 2)
        assert agent.engine is engine
    assert isinstance(engine, LocalEngine)
    assert (engine._max_batch, engine._clock._overlap) == (7, 3)
    assert engine._cache._limit == 2**29 // local._token_bytes(engine._model)
