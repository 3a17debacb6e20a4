"""Learning runs for a patch folder: files, scores, resuming, serving, and what is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model.row_patches import RowPatch
from engine.request import PatchRef, Request
from engine.sampling.params import SamplingParams
from memory_ops.patches.patched_rows import PatchedRows
from tests.models import EOS_ID, engine_of, random_model, save_model, tiny_config
from tests.weights.learning.learned import LEARNING, ROWS, wide_model
from tests.weights.patches.made import saved_patch
from weights.checkpoints.checkpoint import load_model
from weights.checkpoints.convert import convert
from weights.checkpoints.table_files import ROW_READS_FILE
from weights.checkpoints.tokenizer import load_tokenizer
from weights.errors import CheckpointError, DataError, PatchError, TrainingError
from weights.learning import learn, learner, learning_texts, scores
from weights.learning.learn import PatchLearner
from weights.learning.learning_texts import LearningTexts
from weights.patches.apply import apply_patch
from weights.patches.model_identity import model_identity
from weights.patches.patch_folder import read_patch
from weights.training.loss import batch_output
from weights.training.packing import Passage
from weights.training.row_reads import count_reads, write_row_reads

TABLE = "memory.table"
FACTS = [("cat:", "mew"), ("dog:", "wuff"), ("cow:", "moo")]
TEXTS = ["a red fox runs", "two more of them", "rain in the night", "one long road home"]


def lines(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny memory model."""
    model = wide_model()
    return save_model(model, tmp_path_factory.mktemp("learn") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    parent = tmp_path_factory.mktemp("texts")
    facts = [{"prompt": prompt, "answer": answer} for prompt, answer in FACTS]
    background = lines(parent / "background.jsonl", [{"text": text} for text in TEXTS])
    return LearningTexts(
        facts=lines(parent / "facts.jsonl", facts),
        background=(str(background),),
        questions=lines(parent / "questions.jsonl", [{"prompt": "cow", "answer": "moo"}]),
        neutral=(str(background),),
        known=lines(parent / "known.jsonl", facts),
    )


# without options for replay
PLAIN = replace(LEARNING, replay_share=0.0, divergence_weight=None, background_tokens=None)


def learner_of(folder, target, texts, learning=LEARNING, rows=ROWS, **options):
    return PatchLearner(folder, target, texts, learning, rows, **options)


def always(report) -> bool:
    return True


@pytest.fixture(scope="module")
def learned(folder, texts, tmp_path_factory):
    """A patch folder, and the patch as it was learned."""
    target = tmp_path_factory.mktemp("patches") / "patch"
    return target, learner_of(folder, target, texts).run(always)


def test_a_patch_is_written_with_what_it_was_made_for(folder, learned):
    target, patch = learned
    read = read_patch(target, model_identity(folder))
    assert read.content_hash == patch.content_hash
    rows_P, deltas_PV = read.tables[TABLE]
    assert deltas_PV.dtype == torch.bfloat16 and 0 < len(rows_P) <= ROWS.rows
    assert (deltas_PV != 0).any(dim=1).all()
    settings, scores = read.description.settings, read.description.scores
    tokens = sum(map(len, TEXTS))
    assert settings["replay_source"] == "given" and settings["background_tokens"] == tokens
    assert settings["command"] == "learn" and settings["rows"] == 200 and settings["seed"] == 0
    assert len(read.description.data) == 64
    assert scores["facts"] == {"asked": 3, "exact": 3, "recall": 1.0}
    assert scores["known"] == {"asked": 3, "exact_before": 0, "lost": 0}
    assert scores["questions"]["asked"] == 1 and scores["steps"] == scores["exact_after"] + 5
    assert scores["neutral"]["divergence"] > 0


def test_an_engine_with_the_patch_answers_what_was_learned(folder, learned):
    model, config = load_model(folder)
    patch = read_patch(learned[0])
    rows_P, deltas_PV = patch.tables[TABLE]
    engine = engine_of(model, EngineConfig(kv_cache_gib=0.01), config.eos_ids)
    engine.patches.put(RowPatch(patch.content_hash, {1: PatchedRows(rows_P, deltas_PV)}))
    tokenizer, params = load_tokenizer(folder), SamplingParams(temperature=0.0, max_tokens=9)
    uses = ((), (PatchRef(patch.content_hash),))
    for number, (prompt, _) in enumerate(FACTS):
        for is_patched, patches in enumerate(uses):
            ids = tuple(tokenizer.encode(prompt))
            engine.add(Request(f"{number} {is_patched}", ids, params, patches=patches))
    found = {}
    while engine.has_work:
        for output in engine.step().outputs:
            found.setdefault(output.request_id, []).extend(output.token_ids)
    for number, (_, answer) in enumerate(FACTS):
        wanted = [*tokenizer.encode(f" {answer}"), EOS_ID]
        assert found[f"{number} 1"] == wanted != found[f"{number} 0"]


def test_a_stopped_run_resumes_to_the_same_patch(folder, texts, learned, tmp_path):
    target = tmp_path / "new" / "patch"  # the parent is created, too
    assert learner_of(folder, target, texts).run(lambda report: report.step < 4) is None
    assert not target.exists()
    with pytest.raises(TrainingError, match=r"an interrupted run exists; add --resume"):
        learner_of(folder, target, texts)
    with pytest.raises(TrainingError, match="seed: must be 0 to resume"):
        learner_of(folder, target, texts, replace(LEARNING, seed=1), resume=True)
    resumed = learner_of(folder, target, texts, resume=True)
    assert resumed.learner.step == 4
    assert resumed.run(always).content_hash == learned[1].content_hash
    assert [one.name for one in target.parent.iterdir()] == ["patch"]


def test_a_run_does_not_resume_on_other_tables_of_one_origin(folder, texts, tmp_path):
    target = tmp_path / "patch"
    assert learner_of(folder, target, texts).run(lambda report: False) is None
    convert(folder, tmp_path / "int8", table_dtype="int8")
    other = saved_patch(tmp_path / "other", model=model_identity(folder))
    apply_patch(folder, tmp_path / "other", tmp_path / "patched")
    for name, problem in (("int8", "table_rows: .*float32.*int8"), ("patched", "table_patches: ")):
        with pytest.raises(TrainingError, match=problem):
            learner_of(tmp_path / name, target, texts, resume=True)
    patch = learner_of(tmp_path / "patched", tmp_path / "more", texts).run(always)
    assert patch.description.base_patches == {TABLE: [other.content_hash]}


def test_a_killed_run_continues_from_the_last_saved_state(folder, texts, learned, tmp_path):
    target, often = tmp_path / "patch", replace(LEARNING, save_every=3)

    def die(report):
        if report.step == 8:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        learner_of(folder, target, texts, often).run(die)
    resumed = learner_of(folder, target, texts, resume=True)
    assert resumed.learner.step == 6
    assert resumed.run(always).content_hash == learned[1].content_hash


def test_a_patch_that_cannot_be_written_is_not_lost(folder, texts, learned, tmp_path):
    target = tmp_path / "patch"

    def occupy(report):
        target.mkdir(exist_ok=True)
        return True

    with pytest.raises(PatchError, match="exists"):
        learner_of(folder, target, texts).run(occupy)
    target.rmdir()
    resumed = learner_of(folder, target, texts, resume=True)
    assert resumed.learner.is_finished
    patch = resumed.run(lambda report: pytest.fail("nothing is left to learn"))
    assert patch.content_hash == learned[1].content_hash
    assert [one.name for one in tmp_path.iterdir()] == ["patch"]


def test_a_resumed_run_keeps_its_rows(folder, texts, tmp_path):
    model, target = shutil.copytree(folder, tmp_path / "model"), tmp_path / "patch"
    alone = LearningTexts(texts.facts)
    base, _ = load_model(model)
    facts = learner_of(folder, tmp_path / "none", texts)._exams.facts

    def start(target=target, **options):
        return learner_of(model, target, alone, rows=replace(ROWS, rows=20), **options)

    write_row_reads(model, count_reads(base, facts[:1]))
    first = start()
    assert first.run(lambda report: report.step < 4) is None
    write_row_reads(model, count_reads(base, facts[1:]))
    resumed = start(resume=True)
    other = start(tmp_path / "other").chosen[TABLE]
    assert torch.equal(resumed.chosen[TABLE], first.chosen[TABLE])
    assert not torch.equal(other, first.chosen[TABLE])
    (model / ROW_READS_FILE).unlink()  # nothing is counted again
    assert start(resume=True).run(always).num_rows <= 20
    read = set(first.chosen[TABLE].tolist())
    assert set(read_patch(target).tables[TABLE][0].tolist()) <= read


def test_a_patch_of_quantised_rows_fits_the_original_too(folder, texts, tmp_path):
    convert(folder, tmp_path / "int8", table_dtype="int8")
    patch = learner_of(tmp_path / "int8", tmp_path / "patch", texts).run(always)
    assert patch.description.scores["facts"]["recall"] == 1.0
    assert read_patch(tmp_path / "patch", model_identity(folder))


def test_rows_are_ranked_by_the_record_of_the_model(folder, texts, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    alone = LearningTexts(texts.facts)
    with pytest.raises(ConfigError, match="background: the model has no record.*--background"):
        learner_of(model, tmp_path / "patch", alone, PLAIN)
    reads = learner_of(model, tmp_path / "patch", alone, rows=replace(ROWS, rank="reads"))
    base, _ = load_model(model)
    from_texts = learner_of(model, tmp_path / "patch", texts)
    write_row_reads(model, count_reads(base, from_texts.background))
    recorded = learner_of(model, tmp_path / "patch", alone)
    assert torch.equal(recorded.chosen[TABLE], from_texts.chosen[TABLE])
    assert not torch.equal(recorded.chosen[TABLE], reads.chosen[TABLE])
    patch = recorded.run(always)
    assert set(patch.description.scores) == {"steps", "exact_after", "facts"}


@pytest.mark.slow
@pytest.mark.parametrize("has_record", [True, False])
def test_without_background_the_model_writes_text_to_replay(folder, texts, tmp_path, has_record):
    model, alone = shutil.copytree(folder, tmp_path / "model"), LearningTexts(texts.facts)
    if has_record:
        base, _ = load_model(model)
        write_row_reads(model, count_reads(base, [Passage(tuple(range(100, 140)))]))
    reports = []
    first = learner_of(model, tmp_path / "patch", alone)
    assert first.replay_source == "generated"
    assert 300 <= sum(map(len, first.background)) < 320
    assert first.run(lambda report: report.step < 4) is None
    resumed = learner_of(model, tmp_path / "patch", alone, resume=True)
    assert resumed.background == first.background
    patch = resumed.run(lambda report: reports.append(report) is None)
    assert all(report.replay_loss > 0 for report in reports)
    settings = patch.description.settings
    assert settings["replay_source"] == "generated"
    assert settings["background_tokens"] == sum(map(len, first.background))
    whole = learner_of(model, tmp_path / "whole", alone)
    assert whole.run(always).content_hash == patch.content_hash


def test_without_replay_the_model_writes_nothing(folder, texts, tmp_path):
    rows = replace(ROWS, rank="reads")
    run = learner_of(folder, tmp_path / "patch", LearningTexts(texts.facts), PLAIN, rows)
    assert run.background == [] and run.replay_source == "none"
    settings = run.run(lambda report: report.replay_loss == 0).description.settings
    assert settings["replay_source"] == "none" and settings["background_tokens"] == 0


def test_background_text_is_limited(folder, texts, tmp_path):
    few = learner_of(folder, tmp_path / "patch", texts, replace(LEARNING, background_tokens=15))
    every = learner_of(folder, tmp_path / "patch", texts)
    assert len(few.background) == 2 and few.background == every.background[:2]
    assert len(every.background) == 4


def test_ranks_do_not_depend_on_the_share_of_replayed_text(folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "DOCUMENT_TOKENS", 8)
    few = replace(ROWS, rows=5)
    chosen = [
        learner_of(folder, tmp_path / "patch", texts, learning, few).chosen[TABLE]
        for learning in (LEARNING, replace(LEARNING, batch_tokens=6), PLAIN)
    ]
    assert torch.equal(chosen[0], chosen[1]) and torch.equal(chosen[0], chosen[2])


def test_options_without_effect_are_refused(folder, texts, tmp_path):
    alone, reads = LearningTexts(texts.facts), replace(ROWS, rank="reads")
    limited = replace(PLAIN, background_tokens=9)
    for given, learning, named in [
        (texts, PLAIN, "background: has no effect with replay_share 0 and rank reads"),
        (alone, limited, "background_tokens: has no effect with replay_share 0"),
    ]:
        with pytest.raises(ConfigError, match=named):
            learner_of(folder, tmp_path / "patch", given, learning, reads)
    learner_of(folder, tmp_path / "patch", texts, limited)  # ranks rows


def test_long_texts_are_cut(folder, texts, tmp_path, monkeypatch):
    long = lines(tmp_path / "long.jsonl", [{"text": "to and fro " * 200}, *[{"text": "ab"}] * 9])
    texts = replace(texts, background=(str(long),), neutral=(str(long),))
    sizes = {learner: [], scores: []}
    for module, of_module in sizes.items():

        def counted(model, batch, dtype, of_module=of_module):
            of_module.append(len(batch.ids_T))
            return batch_output(model, batch, dtype)

        monkeypatch.setattr(module, "batch_output", counted)
    monkeypatch.setattr(scores, "SCORED_TOKENS", 50)
    monkeypatch.setattr(learning_texts, "SCORED_TOKENS", 50)
    run = learner_of(folder, tmp_path / "patch", texts, replace(LEARNING, steps=12))
    assert run.run(always) and sum(map(len, run.background)) == 300
    # half of a step's 40 tokens are replayed text
    assert max(sizes[learner]) == 20 and max(sizes[scores]) == 50


def test_mistakes_are_found_before_learning(folder, texts, learned, tmp_path):
    def refused(error, match, model=folder, target=tmp_path / "new", **changes):
        with pytest.raises(error, match=match):
            learner_of(model, target, replace(texts, **changes))

    refused(PatchError, "exists already", target=learned[0])
    refused(PatchError, "Not a directory", target=texts.facts / "new", model=tmp_path / "none")
    refused(CheckpointError, r"config\.json", model=tmp_path / "none")
    refused(DataError, r"none\.jsonl: No such file", facts=tmp_path / "none.jsonl")
    refused(DataError, "neither a file nor|no such file", background=(str(tmp_path / "none"),))
    dense = save_model(random_model(tiny_config()), tmp_path / "dense")
    refused(PatchError, "has no memory layers", model=dense)
    peer = save_model(wide_model("peer"), tmp_path / "peer")
    refused(PatchError, "layer 1 is peer", model=peer)
    apply_patch(folder, learned[0], tmp_path / "taught")
    refused(DataError, "facts.jsonl: the model knows all answers", model=tmp_path / "taught")
    with pytest.raises(TrainingError, match="there is no interrupted run"):
        learner_of(folder, tmp_path / "new", texts, resume=True)


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (LEARNING, {"steps": 7}, "steps: must be more than warmup_steps"),
        (LEARNING, {"replay_share": 1.0}, "replay_share: 1.0 is outside"),
        (LEARNING, {"batch_tokens": 0}, "batch_tokens: must be at least 1"),
        (LEARNING, {"divergence_weight": float("nan")}, "divergence_weight: must be at least 0"),
        (LEARNING, {"replay_share": 0}, "divergence_weight: has no effect with a replay_share of"),
        (ROWS, {"rank": "all"}, "rows: has no effect with rank all"),
        (LEARNING, {"precision": "float64"}, "precision: must be one of float32, bfloat16"),
        (ROWS, {"rows": 0}, "rows: must be at least 1"),
        (ROWS, {"lr": float("inf")}, "lr: must be above 0 and finite"),
        (ROWS, {"rank": "best"}, "rank: must be one of tfidf, reads, all"),
    ],
)
def test_settings_are_checked(config, changes, named):
    with pytest.raises(ConfigError, match=named):
        replace(config, **changes)
