"""Configs: files, overrides, and a message for every mistake."""

import contextlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from axpo.config import Config, ConfigError, load_config, save_config
from axpo.config_errors import key_names
from axpo.options import MethodConfig, ToolsConfig


def problem(path: Path | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_no_file_gives_the_defaults_of_the_paper() -> None:
    config = load_config(None)
    assert (config.rollout.questions, config.rollout.rollouts, config.rollout.max_turns) == (16, 8, 3)
    assert (config.method.budget, config.method.continuations) == (0.25, 4)
    assert (config.method.clip_low, config.method.clip_high, config.method.kl) == (0.2, 0.4, 1e-3)


def test_every_key_is_described_with_its_default() -> None:
    def check(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                check(field.annotation)
            else:
                assert "Default: " in (field.description or ""), name

    check(Config)
    assert len(list(key_names(Config))) <= 125


def test_a_file_and_overrides_are_merged(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 3\ntrain:\n  steps: 7\n  learning_rate: 1e-4\neval:\n  # every: 5\n")
    config = load_config(path, ["train.learning_rate=2e-5", "tools.names=[zoom, python]", "method={name: grpo}"])
    assert (config.seed, config.train.steps, config.train.learning_rate) == (3, 7, 2e-5)
    assert config.tools.names == ["zoom", "python"]
    assert config.method.name == "grpo"
    assert load_config(path).train.learning_rate == 1e-4
    assert load_config(path, ["threads=2", "threads="]).threads is None
    assert load_config(write(tmp_path, "")) == load_config(None)


def test_paths_in_a_file_are_relative_to_it_and_in_an_override_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    path = write(
        tmp_path / "there",
        "model: base\noutput: run\ndata: {train: t.jsonl, eval: miniature}\n"
        "tools: {names: [zoom, mine.py], corpus: ../c.jsonl}\n",
    )
    config = load_config(path, ["data.sft=s.parquet"])
    assert config.model == str(tmp_path / "there" / "base")
    assert config.output == tmp_path / "there" / "run"
    assert config.data.train == tmp_path / "there" / "t.jsonl"
    assert config.data.eval == "miniature"
    assert config.data.sft == tmp_path / "here" / "s.parquet"
    assert config.tools.names == ["zoom", str(tmp_path / "there" / "mine.py")]
    assert config.tools.corpus == tmp_path / "c.jsonl"
    later = write(tmp_path / "there", "model: ../runs/sft/checkpoint\n")  # there once it is trained
    assert load_config(later).model == str(tmp_path / "runs" / "sft" / "checkpoint")
    assert load_config(None, ["model=./later"]).model == str(tmp_path / "here" / "later")
    assert load_config(None, ["model=runs/later/checkpoint"]).model == str(tmp_path / "here/runs/later/checkpoint")
    assert load_config(write(tmp_path / "there", "model: Qwen/Qwen3-VL-2B\n")).model == "Qwen/Qwen3-VL-2B"
    assert load_config(None).output == tmp_path / "here" / "runs" / "axpo"
    (tmp_path / "here" / "mine").mkdir()
    assert problem(write(tmp_path / "there", "model: mine\n")) == (
        f"model: got 'mine', a folder here but not in {tmp_path}/there; a path in a file is relative to that file"
    )


def test_a_saved_config_loads_back_equal_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(
        None,
        [
            "data.train=q.jsonl",
            "data.eval=miniature",
            "tools.names=[search, t.py]",
            "tools.corpus=c.jsonl",
            "train.learning_rate=1e-7",
            "threads=1",
            "output=rün",
        ],
    )
    saved = tmp_path / "config.yaml"
    save_config(config, saved)
    monkeypatch.chdir(tmp_path)
    assert load_config(saved) == config
    assert all(key.rpartition(".")[2] + ":" in saved.read_text() for key in key_names(Config))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rolout.n=8", "rolout.n: unknown key -> did you mean rollout.rollouts?"),
        ("rollout.rolouts=8", "rollout.rolouts: unknown key -> did you mean rollout.rollouts?"),
        ("methd.continuation=8", "methd.continuation: unknown key -> did you mean method.continuations?"),
        ("train.lr=1", "train.lr: unknown key -> did you mean train.learning_rate?"),
        ("warmup_steps=1", "warmup_steps: unknown key -> did you mean train.warmup_steps or sft.warmup_steps?"),
        ("sed=1", "sed: unknown key -> did you mean seed?"),
        ("method.name=ppo", "method.name: got 'ppo', must be 'grpo', 'axpo', 'tool_bonus'"),
        ("train.learning_rate=fast", "train.learning_rate: got 'fast', must be a valid number"),
        ("train.learning_rate=.nan", "train.learning_rate: got nan, must be a finite number"),
        ("train.learning_rate=0", "train.learning_rate: got 0, must be greater than 0"),
        ("seed=yes", "seed: got True, must be a number"),
        ("rollout.questions=2.5", "rollout.questions: got 2.5, must be a valid integer"),
        ("rollout.top_p=0", "rollout.top_p: got 0, must be greater than 0"),
        ("eval.top_p=1.01", "eval.top_p: got 1.01, must be less than or equal to 1"),
        ("rollout.temperature=0", "rollout.temperature: got 0, must be greater than 0"),
        ("method.continuations=1", "method.continuations: got 1, must be greater than or equal to 2"),
        ("data.train=[1]", "data.train: got [1], must be 'miniature' or must be a path"),
        (
            "tools.names=[zoom, foo]",
            "tools.names[1]: got 'foo', must be one of zoom, python, search, image_search, a Python file",
        ),
        (
            "tools.sandbox=docker",
            "tools.sandbox: got 'docker', must be bubblewrap, none_i_trust_the_policy or {remote:",
        ),
        ("tools.sandbox={remote: 8080}", "tools.sandbox: got {'remote': 8080}, must be bubblewrap"),
        ("tools.search=bing", "tools.search: got 'bing', must be local, tavily, serper, {tavily: URL}, {serper: URL}"),
        ("tools.search={url: a, searxng: b}", "tools.search: got {'url': 'a', 'searxng': 'b'}, must be local"),
        ("tools.image_search=serper", "tools.image_search: got 'serper', must be {url: URL}, {serper: UPLOAD URL} or"),
        ("tools=[{mcp: [npx]}]", "tools.names[0]: got {'mcp': ['npx']}, must be one of zoom"),
        ("tools=[{mcp: 3}]", "tools.names[0]: got {'mcp': 3}, must be one of zoom"),
        ("tools=[{env: []}]", "tools.names[0]: got {'env': []}, must be one of zoom"),
        ("tools=[{mcp: npx, envs: []}]", "tools.names[0]: got {'mcp': 'npx', 'envs': []}, must be one of zoom"),
        (
            "tools=[{mcp: npx, env: HOME}]",
            "tools.names[0]: got {'mcp': 'npx', 'env': 'HOME'}, must have a list of names",
        ),
        ("tools.concurrency=0", "tools.concurrency: got 0, must be greater than or equal to 1"),
        ("eval.tools=[saw]", "eval.tools[0]: got 'saw', must be one of zoom"),
        ("train=5", "train: got 5, must be a section that holds keys"),
        ("device=gpu", "device: got 'gpu', must be cpu, mps, cuda or cuda:INDEX"),
        ("seed", "override 'seed': must be KEY=VALUE"),
        ("seed=[1", "override 'seed=[1', line 1: not valid YAML"),
    ],
)
def test_a_mistake_names_the_key_what_was_given_and_what_is_allowed(override: str, expected: str) -> None:
    message = problem(None, override)
    assert message.startswith(expected)
    assert len(message.splitlines()) == 1


def test_a_key_that_resembles_none_gets_the_list() -> None:
    message = problem(None, "zzzz=1")
    assert message.startswith("zzzz: unknown key; the keys are model, output, seed")


def test_all_problems_are_named_at_once() -> None:
    message = problem(None, "sed=1", "train.steps=-1", "rollout.n=2", "method.name=ppo")
    assert [line.split(":")[0] for line in sorted(message.splitlines())] == [
        "method.name",
        "rollout.n",
        "sed",
        "train.steps",
    ]


def test_a_group_of_size_1_is_refused() -> None:
    message = problem(None, "rollout.rollouts=1", "method.name=grpo")
    assert message.startswith("rollout.rollouts: got 1, must be at least 2")
    assert "a group of size 1" in message


def test_a_budget_that_can_never_resample_is_refused_with_the_one_that_can() -> None:
    overrides = ["rollout.questions=3", "rollout.rollouts=4", "method.budget=0.25"]
    message = problem(None, *overrides)
    assert "method.budget: got 0.25" in message
    assert "r·B·N = 0.25·3·4 = 3 extra rollouts a step < method.continuations = 4" in message
    assert "the smallest budget that works is 0.333334" in message
    load_config(None, [*overrides, "method.budget=0.333334"])
    load_config(None, [*overrides, "method.continuations=3"])
    load_config(None, [*overrides, "method.name=grpo"])
    assert "the smallest budget that works is 0.5" in problem(None, "rollout.questions=1", "method.budget=0")


@given(st.integers(1, 40), st.integers(2, 16), st.integers(2, 12))
def test_the_smallest_budget_works_and_hardly_less_does_not(questions: int, rollouts: int, continuations: int) -> None:
    sizes = {"rollout.questions": questions, "rollout.rollouts": rollouts, "method.continuations": continuations}
    overrides = [f"{key}={value}" for key, value in sizes.items()]
    smallest = problem(None, *overrides, "method.budget=0").rpartition(" ")[2]
    load_config(None, [*overrides, f"method.budget={smallest}"])
    less = Fraction(smallest) - Fraction(2, 10**6)
    assert "nothing can ever be resampled" in problem(None, *overrides, f"method.budget={float(less):f}")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.minibatches=3"], "train.minibatches: got 3, must divide rollout.questions = 16"),
        (["rollout.max_tokens=64", "rollout.max_context=63"], "rollout.max_tokens: got 64, must be at most"),
        (["train.autocast=true", "dtype=bfloat16"], "train.autocast: got true, but with dtype = bfloat16"),
        (["eval.tools=[search]"], "tools.corpus: got nothing, but eval.tools has 'search'"),
        (
            ["eval.tools=[image_search]"],
            "tools.image_search: got nothing, but eval.tools has 'image_search'; must be {url",
        ),
        (["tools.names=[search]", "model=mine"], "tools.corpus: got nothing, but tools.names has 'search'"),
        (
            ["parallel.processes=17", "data.train=miniature"],
            "parallel.processes: got 17, must be at most rollout.questions = 16",
        ),
        (
            ["parallel.processes=9", "data.sft=miniature", "sft.batch=8"],
            "parallel.processes: got 9, must be at most sft.batch = 8",
        ),
        (
            ["parallel.processes=2", "method.adaptive_budget=1"],
            "method.adaptive_budget: got 1, but with parallel.processes = 2 must be 0",
        ),
        (
            ["parallel.processes=2", "method=grpo", "method.dynamic_sampling=3"],
            "method.dynamic_sampling: got 3, but with parallel.processes = 2 must be 0",
        ),
        (
            ["parallel.processes=2", "device=cuda:1"],
            "device: got 'cuda:1', but with parallel.processes = 2 must",
        ),
        (["parallel.sharding=full"], "parallel.sharding: got 'full', but parallel.processes = 1 has nobody to share"),
        (["parallel.offload=true"], "parallel.offload: got true, but with device = cpu"),
        (
            ["parallel.offload=true", "parallel.sharding=full", "parallel.processes=2", "device=cuda"],
            "parallel.offload: got true, but with parallel.sharding = full",
        ),
    ],
)
def test_keys_that_do_not_go_together(overrides: list[str], expected: str) -> None:
    assert problem(None, *overrides).startswith(expected)


def test_search_may_have_the_miniatures_corpus() -> None:
    load_config(None, ["tools.names=[search]", "model=mine", "tools.corpus=miniature"])
    with pytest.raises(ConfigError, match=r"tools\.corpus"):
        load_config(None, ["tools.names=[search]", "data.train=miniature"])


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    assert problem(None, f"output={tmp_path / 'run'}").startswith("output: got ")
    assert f"{tmp_path / 'run'} is a file" in problem(None, f"output={tmp_path / 'run' / 'below'}")
    load_config(None, [f"output={tmp_path}"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\ntrain: [\n", "config.yaml, line 3: not valid YAML"),
        ("seed: 1\nmodel: x\nseed: 2\n", "config.yaml, line 3: not valid YAML: the key 'seed' is given twice"),
        ("- seed\n", "config.yaml: must hold keys and values"),
        ("[a]: 1\n", "config.yaml"),
        ("train:\n  1: 2\n", "train.1"),
        ("rolout:\n  n: 8\n  rollouts: 4\n", "rolout.rollouts: unknown key -> did you mean rollout.rollouts?"),
    ],
)
def test_a_file_with_mistakes(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in problem(write(tmp_path, text))


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    assert problem(tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such file; must be a YAML file"
    assert "is not a file" in problem(tmp_path)


@example("~no-such-user")  # whose home is not known
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=2)))
def test_any_value_is_taken_or_refused_by_a_config_error(value: Any) -> None:
    for key in ("seed", "train", "model", "tools.names", "data.train", "output"):
        with contextlib.suppress(ConfigError):
            load_config(None, [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}"])


def test_a_method_by_one_word(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: {budget: 0.5, continuations: 2}")
    assert load_config(file, ["method=grpo"]).method == MethodConfig(name="grpo", budget=0.5, continuations=2)
    assert load_config(file, ["method=cispo"]).method.kl == 0
    file.write_text("method: cispo")
    assert load_config(file, ["method.kl=0.5"]).method == MethodConfig(name="cispo", kl=0.5)
    whole = tmp_path / "whole.yaml"
    for old, new in (("axpo", "cispo"), ("cispo", "grpo")):  # a saved config spells all keys out
        save_config(load_config(None, [f"method={old}", "method.clip_high=0.3"]), whole)
        assert load_config(whole, [f"method={new}"]).method == MethodConfig(name=new, clip_high=0.3)
    saved = tmp_path / "saved.yaml"
    for overrides in (
        ["method=axpo", "method.prefix_fix=false"],
        ["method=cispo"],
        ["method=arpo", "method.arpo_rule=code"],
    ):
        config = load_config(None, overrides)
        save_config(config, saved)
        assert load_config(saved) == config


def test_num_rollouts_multiplies_the_group() -> None:
    assert load_config(None, ["method=grpo", "method.num_rollouts=2x"]).group_size == 16
    assert "method.num_rollouts: got 'x2', must" in problem(None, "method.num_rollouts=x2")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=ppo"], "method.name: got 'ppo', must be 'grpo', 'axpo', 'tool_bonus'"),
        (
            ["method=grpo", "method.prefix_fix=false"],
            "method.prefix_fix: got False, but that is an option of axpo, not of grpo; must be left out or True",
        ),
        (["method=axpo", "method.dynamic_sampling=3"], "option of grpo, cispo, not of axpo"),
        (
            ["method=rltf", "method.arpo_rule=code"],
            "method.arpo_rule: got 'code', but that is an option of arpo, not of rltf",
        ),
        (["method.threshold=0"], "method.threshold: got 0, must be greater than 0"),
        (["method.threshold=1.5"], "method.threshold: got 1.5, must be less than or equal to 1"),
        (["method=rltf", "judge.url=http://localhost:1/v1"], "judge.model: got nothing, but judge.url is given"),
        (["method=rltf", "judge={url: localhost, model: m}"], "judge.url: got 'localhost', must begin with http://"),
        (
            ["method=rltf", "judge={url: 'http://x', model: m, key: AXPO_NO_KEY}"],
            "judge.key: got 'AXPO_NO_KEY', but no",
        ),
        (["judge={url: 'http://x', model: m}"], "judge.url: got 'http://x', but only method=rltf asks a judge"),
    ],
)
def test_options_of_other_methods_and_out_of_range(overrides: list[str], expected: str) -> None:
    assert expected in problem(None, *overrides)


def test_an_adaptive_budget_may_need_several_steps_for_a_prefix() -> None:
    sizes = ["rollout.questions=1", "rollout.rollouts=8", "method.adaptive_budget=1"]
    load_config(None, sizes)  # 2 rollouts a step, of which one step's are kept: 4
    assert "nothing can ever be resampled" in problem(None, *sizes, "method.adaptive_budget=0.5")


def test_tools_by_a_list(tmp_path: Path) -> None:
    path = write(tmp_path, "tools: [zoom, mine.py, {mcp: npx server, only: [look]}]\neval: {tools: [yours.py]}\n")
    config = load_config(path)
    assert config.tools.names == ["zoom", str(tmp_path / "mine.py"), {"mcp": "npx server", "only": ["look"]}]
    assert config.eval.tools == [str(tmp_path / "yours.py")]
    changed = load_config(path, ["tools.timeout=5", "tools=[python]"])
    assert (changed.tools.names, changed.tools.timeout) == (["python"], 5)


def test_a_choice_with_an_address_replaces_the_one_before(tmp_path: Path) -> None:
    path = write(tmp_path, "tools: {search: {searxng: http://a}, image_search: {table: hits.jsonl}, cache: kept}\n")
    config = load_config(path, ["tools.search={url: 'http://b?q={query}'}"])
    assert config.tools.search == {"url": "http://b?q={query}"}
    assert config.tools.image_search == {"table": str(tmp_path / "hits.jsonl")}
    assert config.tools.cache == tmp_path / "kept"
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ToolsConfig().cache == tmp_path / "axpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ToolsConfig().cache == Path.home() / ".cache" / "axpo"
