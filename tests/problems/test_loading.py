"""Problems by name and from files, with the built-in model and with others."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from linchain_analysis.errors import InputError
from linchain_analysis.problems import PROBLEM_NAMES, Record, load_problem
from linchain_analysis.problems.answers import FORMS
from linchain_analysis.problems.characters import build_tokenizer
from linchain_analysis.problems.loading import name_of_file
from linchain_analysis.problems.models import PAPER_TARGETS, find_target_modules

SHARED = Path(__file__).resolve().parents[2] / "../shared"


@pytest.fixture
def records_file(tmp_path):
    path = tmp_path / "mine.json"
    entries = [{"instruction": f"Double {n}.", "output": str(2 * n), "answer": str(2 * n)} for n in range(50)]
    path.write_text(json.dumps(entries))
    return path


def save_small_llama(folder, **options):
    config = LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, **options
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_builtin_problem():
    problem = load_problem(num_eval=7)
    assert problem.name in PROBLEM_NAMES
    assert len(problem.evaluation) == problem.defaults.num_eval == 7
    assert problem.target_modules == PAPER_TARGETS
    assert problem.answer_form.kind == "exact"
    assert not problem.trains_on_prompt
    assert problem == load_problem(num_eval=7)
    assert problem.evaluation != load_problem(num_eval=7, data_seed=1).evaluation


def test_problem_travels_to_another_process():
    problem = load_problem(num_eval=3)
    assert pickle.loads(pickle.dumps(problem)) == problem


def test_file_with_the_builtin_model(records_file):
    problem = load_problem(data=records_file, num_eval=5)
    assert problem.name == "mine"
    assert (len(problem.train), len(problem.evaluation)) == (45, 5)
    assert not set(problem.train) & set(problem.evaluation)
    assert problem.defaults.num_steps == 9  # 3 epochs of 45 records in batches of 16: 8.4
    assert problem.template.name == "plain"
    assert problem.answer_form == FORMS["gsm8k"]
    assert problem == load_problem(data=str(records_file), num_eval=5)
    assert problem.evaluation != load_problem(data=records_file, num_eval=5, data_seed=1).evaluation


def test_a_fifth_of_a_small_file_is_held_out_unless_told_otherwise(records_file):
    assert len(load_problem(data=records_file).evaluation) == 10


def test_other_model_with_the_builtin_records(tmp_path):
    problem = load_problem(model=save_small_llama(tmp_path / "model"), num_eval=3)
    tokenizer, model = problem.load_tokenizer(), problem.load_model()
    assert problem.template.name == "alpaca"
    assert problem.train == load_problem().train
    encoded = problem.encode(problem.train[0], tokenizer)
    assert tokenizer.decode(encoded["input_ids"]).startswith("<bos>Below is an instruction")
    assert set(problem.evaluate(model, tokenizer)) == {"accuracy"}


def test_texts_are_no_longer_than_the_context_of_the_model(tmp_path, records_file):
    model = save_small_llama(tmp_path / "model", max_position_embeddings=100)
    problem = load_problem(model=model, data=records_file)
    assert problem.defaults.max_length == 100
    assert len(problem.encode(problem.train[0], problem.load_tokenizer())["input_ids"]) == 100


def test_end_token_pads_where_there_is_no_padding_token(tmp_path):
    model = save_small_llama(tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    content = json.loads(settings.read_text())
    content["pad_token"] = None
    settings.write_text(json.dumps(content))
    assert load_problem(model=model).load_tokenizer().pad_token == "<eos>"
    content["eos_token"] = None
    settings.write_text(json.dumps(content))
    with pytest.raises(InputError, match="expected a tokenizer with a padding or an end token, got one with neither"):
        load_problem(model=model).load_tokenizer()


@pytest.mark.parametrize(
    ("model", "targets"),
    [
        (GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)), {"c_attn", "c_proj", "c_fc"}),
        (
            OPTForCausalLM(
                OPTConfig(
                    vocab_size=16,
                    hidden_size=8,
                    ffn_dim=8,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    word_embed_proj_dim=8,
                )
            ),
            {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_every_linear_layer_but_the_head_is_adapted_elsewhere(tmp_path, model, targets):
    model.save_pretrained(tmp_path)
    assert set(find_target_modules(str(tmp_path))) == targets


def test_looking_for_targets_draws_no_random_number(tmp_path):
    model = save_small_llama(tmp_path / "model")
    stream = torch.get_rng_state()
    assert find_target_modules(model) == PAPER_TARGETS
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ARC-Easy/train.json", "ARC-Easy"),
        ("mawps/trainset.json", "mawps"),
        ("some/gsm8k.json", "gsm8k"),
        ("a/commonsense_15k.json", "commonsense_15k"),
    ],
)
def test_name_of_file(path, name):
    assert name_of_file(Path(path)) == name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "sum"}, "problem: expected one of sums, got 'sum'"),
        ({"num_eval": 0}, "num_eval: expected at least 1, got 0"),
        ({"template": "chat"}, "template: .* got 'chat'"),
        ({"model": "/no/such/folder"}, "model /no/such/folder: expected a folder with a model, got no such folder"),
        ({"data": "/no/such.json"}, "data /no/such.json: expected a readable file"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message):
        load_problem(**options)


def test_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match=f"model {tmp_path}: expected a causal language model"):
        load_problem(model=str(tmp_path))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside this checkout")
@pytest.mark.parametrize("name", ["ARC-Easy", "ARC-Challenge", "openbookqa"])
def test_real_training_files(name):
    problem = load_problem(data=SHARED / "data/llm-adapters" / name / "train.json", num_eval=20)
    assert problem.name == name
    assert len(problem.evaluation) == 20
    assert all(problem.answer_form.is_right(record.output, record.answer) for record in problem.train)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside this checkout")
def test_real_model_on_real_data():
    problem = load_problem(
        model=str(SHARED / "models/stories260k"), data=SHARED / "data/llm-adapters/ARC-Easy/train.json", num_eval=4
    )
    tokenizer, model = problem.load_tokenizer(), problem.load_model()
    assert tokenizer.pad_token_id is not None
    assert problem.target_modules == PAPER_TARGETS
    encoded = problem.encode(Record("Say hi.", "", "hi", "hi"), tokenizer)
    assert encoded["labels"] == encoded["input_ids"]
    assert encoded["input_ids"][0] == tokenizer.bos_token_id
    assert encoded["input_ids"][-1] == tokenizer.eos_token_id
    assert 0 <= problem.evaluate(model, tokenizer)["accuracy"] <= 1
