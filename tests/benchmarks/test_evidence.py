"""What docs/evidence/README.md says is what its files hold."""

import json
import re
from pathlib import Path

import pytest

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence"
KEYS = ("mean", "low", "high")
FOLDERS = (EVIDENCE, EVIDENCE / "longer")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_shows_the_rows_of_the_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EVIDENCE.parents[1] / "benchmarks")
    import evidence_rows

    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    text = (EVIDENCE / "README.md").read_text("utf-8")
    assert "\n".join(evidence_rows.rows(summary)) in text
    ablations = json.loads((EVIDENCE / "longer_ablations" / "summary.json").read_text("utf-8"))
    for each in (summary, ablations):
        assert "\n".join(evidence_rows.others(each)) in text
    assert all(summary["methods"][name]["seeds"] >= 5 for name in ("grpo", "grpo2x", "axpo"))


def test_the_first_paragraph_says_what_the_summary_does() -> None:
    summary = json.loads((EVIDENCE / "summary.json").read_text("utf-8"))
    methods, pairs = summary["methods"], summary["pairs"]
    said = " ".join((EVIDENCE / "README.md").read_text("utf-8").split())
    shares = [f"{100 * methods[name]['tool_use']['mean']:.0f}%" for name in ("axpo", "grpo", "grpo2x")]
    assert re.search("in {} of the rollouts, GRPO in {}, and GRPO with twice the rollouts in {};".format(*shares), said)
    for metric, phrases in (
        (
            "pass4",
            ("{:.1f} points more than GRPO [{:.1f}, {:.1f}]", "{:.1f} more than twice the rollouts [{:.1f}, {:.1f}]"),
        ),
        (
            "pass1",
            ("{:.1f} points above GRPO [{:.1f}, {:.1f}]", "{:.1f} below GRPO with twice the rollouts [{:.1f}, {:.1f}]"),
        ),
    ):
        for pair, phrase in zip(("axpo_minus_grpo", "axpo_minus_grpo2x"), phrases, strict=True):
            mean, low, high = (100 * pairs[pair][metric][key] for key in KEYS)
            size = -mean if "below" in phrase else mean
            assert phrase.format(size, low, high).replace("-", "−") in said.replace("-", "−")


def test_the_first_paragraph_says_what_the_longer_runs_did() -> None:
    summary = json.loads((EVIDENCE / "longer" / "summary.json").read_text("utf-8"))
    methods, pairs = summary["methods"], summary["pairs"]
    said = " ".join((EVIDENCE / "README.md").read_text("utf-8").split())
    shares = [f"{100 * methods[name]['pass1']['mean']:.1f}%" for name in ("axpo", "grpo", "grpo2x")]
    assert (
        "AXPO answers {} of the questions (Pass@1), GRPO {}, GRPO with twice the rollouts {}:".format(*shares) in said
    )
    front = " ".join((EVIDENCE.parents[1] / "README.md").read_text("utf-8").split())
    assert "AXPO answers {}, GRPO {}, GRPO with twice the rollouts {};".format(*shares) in front
    figures = [100 * pairs[f"axpo_minus_{other}"]["pass1"][key] for other in ("grpo", "grpo2x") for key in KEYS]
    assert "{:+.1f} points [{:.1f}, {:.1f}] and {:+.1f} [{:.1f}, {:.1f}]".format(*figures) in said
    more = methods["axpo"]["rollouts"]["mean"] / methods["grpo"]["rollouts"]["mean"] - 1
    assert f"at {100 * more:.0f}% more rollouts than GRPO" in said
    assert {methods[name]["seeds"] for name in ("axpo", "grpo", "grpo2x")} == {8}


def test_what_the_trees_say_is_in_the_readme() -> None:
    found = json.loads((EVIDENCE / "why.json").read_text("utf-8"))
    said = " ".join((EVIDENCE / "README.md").read_text("utf-8").split())
    ranking, groups, without = found["ranking"], found["one_group"], found["resample_no_tool"]
    shares = (100 * ranking["recovered_less_confident"][key] for key in KEYS)
    assert "in {:.0f}% of the comparisons [{:.0f}, {:.0f}]".format(*shares) in said
    assert f"only {ranking['candidates_per_prefix']['mean']:.1f} failed calls for each" in said
    assert (
        "in one step in {:.0f}% [{:.0f}, {:.0f}]".format(
            *(100 * ranking["recovered_less_confident_of_one_question"][key] for key in KEYS)
        )
        in said
    )
    assert "(correlation {:.2f} [{:.2f}, {:.2f}])".format(*(groups["correlation"][key] for key in KEYS)) in said
    apart, together = (100 * groups[key]["mean"] for key in ("nothing_apart", "nothing_together"))
    assert f"{apart:.0f}% of the prefixes and continuations have no advantage" in said
    assert f"in one group {together:.0f}%" in said
    spent, lost, kept = (
        100 * without[key]["mean"] for key in ("share_without_tool", "recovered_without_tool", "recovered_with_tool")
    )
    assert f"spends {spent:.0f}% of the resamplings" in said
    assert f"recovers {lost:.0f}% of these, against {kept:.0f}% of the calls" in said


def test_tables_of_other_questions_are_in_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EVIDENCE.parents[1] / "benchmarks")
    import further
    import kinds

    text = (EVIDENCE / "README.md").read_text("utf-8")
    assert "\n".join(kinds.rows(json.loads((EVIDENCE / "longer" / "kinds.json").read_text("utf-8")))) in text
    assert "\n".join(further.rows(json.loads((EVIDENCE / "further.json").read_text("utf-8")))) in text


def test_the_gap_of_the_front_page_is_that_of_the_diagnosis() -> None:
    found = json.loads((EVIDENCE / "diagnose.json").read_text("utf-8"))
    front = " ".join((EVIDENCE.parents[1] / "README.md").read_text("utf-8").split())
    wrong, without = (100 * found[key] for key in ("all_wrong_tool", "all_wrong_no_tool"))
    assert f"{100 * found['tool_use']:.0f}% of its rollouts call a tool" in front
    assert f"wrong in {wrong:.0f}% of cases (without a tool: {without:.0f}%)" in front
    right, guessed = (100 * found[key] for key in ("accuracy_tool", "accuracy_no_tool"))
    assert f"right in {right:.0f}% of cases with a tool and in {guessed:.0f}% without" in front
