"""The rule that asks in the experiment, and what looking gives in the laboratory."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from dng_models.pipelines.judges import DetectorJudge, VisionLanguageJudge
from dng_models.pipelines.tiny import tiny_clip
from dng_models.text_to_image import compare, dry_run, scores, store
from dng_models.text_to_image.__main__ import main
from dng_models.text_to_image.config import JUDGE, PAPER_MODEL, TINY, Config, Point
from dng_models.text_to_image.generation import Materials
from dng_models.text_to_image.laboratory import oracle
from dng_models.text_to_image.laboratory.oracle import Gate, OracleLaboratory, gate
from dng_models.text_to_image.laboratory.prompts import LABORATORY
from dng_models.text_to_image.store import RunFolder
from tests.helpers.talking import tiny_llava

BREAKFAST = LABORATORY[-1]
ASK = Point(BREAKFAST, "ask", "related", 4.0)


# ---------------------------------------------------------------------- settings


def test_each_concept_is_asked_for_and_pushed_on_its_own():
    config = Config(rules=("ask",))
    assert config.concepts(ASK) == ("egg", "sausage")
    prompts = ("an english breakfast, with egg", "an english breakfast, with sausage")
    assert config.texts(ASK) == ("an english breakfast", prompts)
    rule: Any = config.rule(ASK, lambda images, step: [])
    assert rule.concepts == dict(zip(("egg", "sausage"), prompts, strict=True))
    assert (rule.guidance_scale, rule.reference, rule.on_error) == (4.0, None, "raise")
    assert dry_run.rows(config, ASK) == 3
    with pytest.raises(ValueError, match="ask must be given for the rule 'ask', got None"):
        config.rule(ASK)


def test_its_scales_are_the_published_ones():
    config = Config(model=PAPER_MODEL, rules=("np", "ask"))
    largest = [config.scales_of("ask", prompt)[-1] for prompt in config.prompts]
    assert min(largest) == 6.8 and max(largest) == 13.6  # published: 7.5 to 15
    assert config.scales_of("np", config.prompts[0])[-1] == 3.4


@pytest.mark.parametrize(
    ("model", "asked"),
    [("laboratory", JUDGE), (TINY, TINY), ("x", "openai/clip-vit-large-patch14")],
)
def test_who_is_asked_depends_on_the_model(model, asked):
    given = Config(model=model, rules=("ask",))
    assert given.ask == asked and given.hyperparameters(given.points()[1]) == {"asked": asked}


def test_who_is_asked_counts_only_where_somebody_is():
    assert "ask" not in Config(rules=("np",)).shared
    assert Config(rules=("np", "ask"), ask="some/model").shared["ask"] == "some/model"


def test_a_folder_keeps_who_was_asked(tmp_path):
    folder = RunFolder(tmp_path)
    point = Point(BREAKFAST, "np", "related", 1.0)

    def opened(**options: Any) -> dict[str, Any]:
        store.open_run(folder, Config(prompts=(BREAKFAST,), **options), {"torch": "x"})
        found: dict[str, Any] = json.loads(folder.settings.read_text())["settings"]
        return found

    assert "ask" not in opened(rules=("np",))
    folder.work.mkdir()
    line = {"file": store.image_name(point, 0), "sha256": "0", "unguided": "u"}
    (folder.work / "0000.jsonl").write_text(json.dumps(line) + "\n")
    assert "ask" not in opened(rules=("np",), ask="another")
    assert opened(rules=("ask",))["ask"] == JUDGE
    assert opened(rules=("np",))["ask"] == JUDGE
    with pytest.raises(ValueError, match="ask was 'judge' and is 'another'"):
        opened(rules=("ask",), ask="another")


def test_what_is_asked_is_loaded_by_its_kind(tmp_path):
    judged = scores.load_asked(JUDGE)(("egg",))
    assert isinstance(judged, DetectorJudge) and judged.concepts == ("egg",)
    assert isinstance(scores.load_asked(TINY)(("egg",)), DetectorJudge)
    clip, processor = tiny_clip()
    for each in (clip, processor):
        each.save_pretrained(tmp_path / "clip")
    assert isinstance(scores.load_asked(str(tmp_path / "clip"))(("egg",)), DetectorJudge)
    for each in tiny_llava("none"):
        each.save_pretrained(tmp_path / "llava")
    talks = scores.load_asked(str(tmp_path / "llava"))(("egg", "sausage"))
    assert isinstance(talks, VisionLanguageJudge) and talks.concepts == ("egg", "sausage")
    # It may answer with anything, at the same image of every run: the run goes on.
    rule: Any = Config(rules=("ask",)).rule(ASK, talks)
    assert rule.on_error == "keep"
    with pytest.raises(FileNotFoundError, match="there is no CLIP model in"):
        scores.load_asked(str(tmp_path))


# ---------------------------------------------------------------------- rules of attention


@pytest.mark.parametrize("rule", ["nag", "nag-gated", "vsf"])
def test_what_has_no_attention_cannot_be_guided_there(rule):
    with pytest.raises(ValueError, match=f"rules must be without '{rule}' for the laboratory"):
        Config(rules=(rule,))
    config = Config(model="runs/laboratory", prompts=LABORATORY, rules=("np", rule), cfg_scale=2.0)
    point = Point(BREAKFAST, rule, "related", 1.5)
    # The negative stands alone, and the pipeline's own guidance is its own.
    assert config.texts(point)[1] == ("egg, sausage",) and config.cfg_of(point) is None
    assert dry_run.rows(config, point) == (4 if rule == "nag-gated" else 2)
    found: Any = config.rule(point)
    assert found.scale == 1.5 and (found.gate is not None) == (rule == "nag-gated")
    if found.gate is not None:
        assert found.gate.posterior.prior == 0.25 and found.gate.guidance_scale == 1.0


# ---------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("asked")
    told = ["run", "--only", BREAKFAST.name, "--rules", "np", "ask", "--relative-scales", "1"]
    told += ["--device", "cpu", "--quiet", "--num-images", "12", "--steps", "10", "--out", str(out)]
    assert main(told) == 0
    return RunFolder(out)


def test_a_run_draws_asks_and_says_what_was_seen(run_folder):
    records = [record for record in store.read_table(run_folder) if record["rule"] == "ask"]
    assert len(records) == 24 and {record["guidance_scale"] for record in records} == {4.0}
    for record in records:
        concepts = record["concepts"]
        assert [step for step, _, _ in record["questions"]] == [1, 2, 3, 4, 5, 6, 8]
        assert all(
            set(seen) <= set(concepts) and not error for _, seen, error in record["questions"]
        )
        # What is held from each question on is evaluated at every step until the next.
        ends = [step for step, _, _ in record["questions"][1:]] + [10]
        held = sum(
            (end - step) * len(seen)
            for (step, seen, _), end in zip(record["questions"], ends, strict=True)
        )
        assert record["evaluations"] == held
        assert record["evaluations"] + record["evaluations_saved"] == 10 * len(concepts)
    assert any(record["evaluations"] for record in records)
    others = [record for record in store.read_table(run_folder) if record["rule"] == "np"]
    assert all("questions" not in record for record in others)


def test_its_table_has_the_rule(run_folder):
    table = (run_folder.path / "table.md").read_text()
    assert re.search(r"^\| VL-DNP \| 4 \|", table, re.MULTILINE)
    truths = {one.rule: one for one in compare.truths(store.read_table(run_folder))}
    # What nobody sees is not pushed: an unrelated negative costs nothing, and NP breaks images.
    assert truths["ask"].cells_changed == 0.0 < truths["np"].cells_changed
    assert (run_folder.figures / "scales_ask.png").is_file()


def test_started_again_it_draws_nothing(run_folder, monkeypatch):
    before = run_folder.table.read_bytes()
    monkeypatch.setattr(Materials, "pipeline", None)
    told = ["generate", "--only", BREAKFAST.name, "--rules", "ask", "--relative-scales", "1"]
    told += ["--device", "cpu", "--quiet", "--num-images", "12", "--steps", "10"]
    assert main([*told, "--out", str(run_folder.path)]) == 0
    assert run_folder.table.read_bytes() == before


def test_a_model_that_is_nowhere_stops_a_run_before_it_draws(tmp_path, capsys):
    told = ["run", "--rules", "ask", "--ask", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*told, "--device", "cpu", "--quiet"]) == 2
    assert "there is no CLIP model in" in capsys.readouterr().err
    assert not (tmp_path / "out" / "images").exists()


# ---------------------------------------------------------------------- the laboratory's tables


@pytest.fixture(scope="module")
def found() -> list[Gate]:
    return gate(OracleLaboratory(24, (BREAKFAST,)))


@pytest.mark.slow
def test_the_gate_and_the_posterior_agree_at_the_end(found):
    """And not at the beginning, where x0 is a mean of all pictures: the posterior is the share."""
    first, last = found[0], found[-1]
    assert (first.step, last.step) == (0, 49)
    # Martingale: at pure noise the posterior is nearly the share .7 of such breakfasts.
    assert first.exact == pytest.approx(0.7, abs=0.05)
    assert last.agrees == 1.0 and last.error < 1e-3 and last.seen_of_those == 1.0
    # x0 is nearly the same in all images, and so is the answer, right or wrong.
    assert first.error > 0.25
    assert first.tracked_error < 0.1  # DNG's begins with the share
    errors = [one.error for one in found]
    assert errors[-1] < errors[-4] < errors[0]


@pytest.mark.slow
def test_the_table_of_rules_has_what_each_leaves_and_costs():
    laboratory = OracleLaboratory(8, (BREAKFAST,))
    settings = {setting.names: setting for setting in oracle.compared(laboratory)}
    costs, left = {}, {}
    for names in (("NP", "", "1"), ("DNG", "every step", "2"), ("VL-DNP", "50 questions", "4")):
        laboratory.evaluated = {}
        left[names[0]] = laboratory.measure(settings[names])
        costs[names[0]] = [float(np.mean(laboratory.evaluated[kind])) for kind in oracle.KINDS]
    assert costs["NP"] == costs["DNG"] == [50.0, 50.0]
    related, unrelated = costs["VL-DNP"]
    assert 0.0 < related < 50.0 and unrelated < 5.0
    # Nobody sees a skyline: the unrelated negative changes no image, and NP changes nearly all.
    assert left["VL-DNP"][3] == 0.0 and left["NP"][3] > 0.5
