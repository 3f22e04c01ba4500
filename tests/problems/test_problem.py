"""From records to tokens and from answers to accuracies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from linchain_analysis.errors import InputError
from linchain_analysis.problems import Record, load_problem
from linchain_analysis.problems.evaluation import answer_records, complete_prompts, evaluation_mode

RECORD = Record("Hi", "", "42", "42")


@pytest.fixture(scope="module")
def problem():
    return load_problem(num_eval=8)


@pytest.fixture(scope="module")
def tokenizer(problem):
    return problem.load_tokenizer()


@pytest.fixture(scope="module")
def model(problem):
    return problem.load_model()


class Oracle(torch.nn.Module):
    """Answers every prompt with the same text, whatever it is asked."""

    def __init__(self, text, tokenizer):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.dropout = torch.nn.Dropout()
        self.config = type("Config", (), {"max_position_embeddings": 64})()
        self.tokens = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        self.asked = []

    def generate(self, input_ids, attention_mask, **options):
        assert not self.training and not self.dropout.training
        self.asked += [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.cat([input_ids, torch.tensor([self.tokens] * len(input_ids))], dim=1)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_encoding_by_hand(problem, tokenizer):
    # One token per character: the specials are 0 to 3, the newline is 4, the space (code 32) is 5.
    h, i, four, two = (ord(character) - 27 for character in "Hi42")
    assert problem.encode(RECORD, tokenizer) == {
        "input_ids": [1, h, i, 4, four, two, 2],
        "attention_mask": [1] * 7,
        "labels": [-100] * 4 + [four, two, 2],
    }
    assert problem.encode_question(RECORD, tokenizer) == [1, h, i, 4]


def test_labels_cover_the_whole_text_where_the_prompt_is_trained_on(problem, tokenizer):
    encoded = replace(problem, trains_on_prompt=True).encode(RECORD, tokenizer)
    assert encoded["labels"] == encoded["input_ids"]


@pytest.mark.parametrize(
    ("max_length", "num_tokens", "num_labels"),
    [(7, 7, 3), (6, 6, 2), (5, 5, 1), (4, 4, 0), (2, 2, 0)],
)
def test_texts_are_cut_on_the_right_and_end_only_if_there_is_room(
    problem, tokenizer, max_length, num_tokens, num_labels
):
    short = replace(problem, defaults=replace(problem.defaults, max_length=max_length))
    encoded = short.encode(RECORD, tokenizer)
    whole = problem.encode(RECORD, tokenizer)
    assert encoded["input_ids"] == whole["input_ids"][:max_length]
    assert {len(values) for values in encoded.values()} == {num_tokens}
    assert sum(label != -100 for label in encoded["labels"]) == num_labels


def test_accuracy_is_the_share_of_right_answers(problem, tokenizer):
    records = [Record(f"{index}?", "", answer, answer) for index, answer in enumerate(["9", "9", "8", "9"])]
    assert problem.evaluate(Oracle("9", tokenizer), tokenizer, records, batch_size=3) == {"accuracy": 0.75}
    assert problem.evaluate(Oracle("8", tokenizer), tokenizer, records) == {"accuracy": 0.25}
    assert problem.evaluate(Oracle("", tokenizer), tokenizer, records) == {"accuracy": 0.0}


def test_output_is_the_reference_where_there_is_no_answer(problem, tokenizer):
    assert problem.evaluate(Oracle("9", tokenizer), tokenizer, [Record("?", "", "9", "")]) == {"accuracy": 1.0}


def test_long_question_loses_its_beginning(problem, tokenizer):
    oracle = Oracle("9", tokenizer)
    problem.evaluate(oracle, tokenizer, [Record("a" * 70 + "b" * 20, "", "9", "9")])
    (asked,) = oracle.asked
    assert tokenizer.decode(asked) == "a" * (64 - 4 - 21) + "b" * 20 + "\n"


def test_nothing_to_ask_is_refused(problem, tokenizer, model):
    with pytest.raises(InputError, match="records: expected at least one to ask, got none"):
        problem.evaluate(model, tokenizer, [])
    with pytest.raises(InputError, match="batch_size: expected at least 1, got 0"):
        problem.evaluate(model, tokenizer, batch_size=0)


def test_evaluation_leaves_no_trace(problem, tokenizer):
    model = problem.load_model()
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    stream = torch.get_rng_state()
    first = problem.evaluate(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert problem.evaluate(model, tokenizer) == first


def test_modes_return_after_a_fault(tokenizer):
    module = Oracle("", tokenizer).train()
    module.dropout.eval()
    with pytest.raises(KeyError), evaluation_mode(module):
        raise KeyError
    assert module.training and not module.dropout.training


def test_answers_do_not_depend_on_what_is_asked_beside_them(problem, tokenizer, model):
    prompts = [ids(tokenizer, text) for text in ("3 + 4 = ", "twelve minus five is ", "7 8 9 10 ", "9 - 3 + 12 = ")]
    prompts = [[tokenizer.bos_token_id, *prompt] for prompt in prompts]
    alone = [complete_prompts(model, tokenizer, [prompt], 8, 1)[0] for prompt in prompts]
    assert complete_prompts(model, tokenizer, prompts, 8, 64) == alone


def test_answers_come_in_the_order_of_the_records(problem, tokenizer, model):
    records = list(problem.evaluation)
    answers = answer_records(problem, model, tokenizer, records, 3)
    backwards = answer_records(problem, model, tokenizer, records[::-1], 3)
    assert backwards == answers[::-1]
