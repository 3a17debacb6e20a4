"""Generated text: its tokens, its length, its seed, and its tensors."""

import pytest
import torch

from tests.models import EOS_ID, plain_logits
from tests.weights.learning.learned import memory_model
from weights.errors import TrainingError
from weights.learning.generated_text import generated_passages, passage_tensors, take_passages
from weights.training.packing import Passage

FIRST = (5, 9)


def text_of(num_tokens=400, length=12, seed=0, ends=frozenset({EOS_ID})):
    return generated_passages(memory_model(), FIRST, ends, num_tokens, length, seed)


def test_documents_begin_as_given_and_end_in_time():
    end_ids = frozenset(range(0, 256, 8))
    passages = text_of(ends=end_ids)
    assert {passage.ids[0] for passage in passages} == set(FIRST)
    assert all(passage.num_given == 1 for passage in passages)
    sizes = [len(passage) for passage in passages]
    assert sum(sizes) >= 400 and sum(sizes[:-1]) < 400
    assert max(sizes) == 12 and min(sizes) < 12
    for passage in passages:
        ends = [id_ in end_ids for id_ in passage.ids[1:]]
        assert not any(ends[:-1]) and (ends[-1] or len(passage) == 12)


def test_a_seed_gives_the_same_text():
    assert text_of() == text_of() != text_of(seed=1)
    assert len(set(text_of())) == len(text_of())


def test_a_document_fits_into_the_model():
    model = memory_model()
    passages = generated_passages(model, FIRST, frozenset(), 300, 9999, 0)
    assert {len(one) for one in passages} == {min(256, model.config.max_positions - 1)}


def test_tokens_follow_the_models_probabilities():
    model = memory_model()
    passages = generated_passages(model, FIRST[:1], frozenset(), 4000, 1, 0)
    found_V = torch.bincount(torch.tensor([one.ids[1] for one in passages])) / len(passages)
    with torch.no_grad():
        wanted_V = plain_logits(model, [FIRST[0]])[-1].softmax(-1)
    likeliest = int(wanted_V.argmax())
    assert abs(float(found_V[likeliest] - wanted_V[likeliest])) < 0.03


def test_passages_are_read_back_from_tensors():
    passages, tensors = text_of(60), {"other": torch.zeros(1)}
    tensors |= passage_tensors(passages)
    assert take_passages(tensors) == passages and list(tensors) == ["other"]


@pytest.mark.parametrize(
    "change",
    [
        {"replay.ids": torch.arange(5)},
        {"replay.ids": torch.ones(6)},
        {"replay.lengths": torch.tensor([[2, 4]])},
        {"replay.lengths": torch.tensor([7, -1])},
        {"replay.lengths": None},
    ],
)
def test_malformed_tensors_of_passages_are_refused(change):
    tensors = passage_tensors([Passage((1, 2)), Passage((3, 4, 5, 6))]) | change
    with pytest.raises(TrainingError, match="no valid text to replay"):
        take_passages({name: one for name, one in tensors.items() if one is not None})
