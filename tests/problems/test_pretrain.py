"""Making the built-in model: continued training ends where uninterrupted training does."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from safetensors.torch import load_file

from linchain_analysis.problems import pretrain as maker
from linchain_analysis.problems.characters import build_tokenizer


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(maker.ARCHITECTURE, "hidden_size", 8)
    monkeypatch.setitem(maker.ARCHITECTURE, "intermediate_size", 16)
    monkeypatch.setitem(maker.ARCHITECTURE, "num_hidden_layers", 1)
    monkeypatch.setattr(maker, "NUM_STEPS", 4)
    monkeypatch.setattr(maker, "SAVE_EVERY_STEPS", 2)
    monkeypatch.setattr(maker, "NUM_WARMUP_STEPS", 2)
    monkeypatch.setattr("linchain_analysis.problems.model_card.NUM_DOCUMENTS", 2)
    monkeypatch.setattr("linchain_analysis.problems.model_card.NUM_RECORDS", 2)


class Interruption(Exception):
    """Stands for whatever ends a process half-way."""


def test_interrupted_training_ends_in_the_same_weights(small, monkeypatch, tmp_path, capsys):
    maker.pretrain(tmp_path / "whole", threads=1)

    draw_rows, num_drawn = maker._draw_rows, itertools.count(1)

    def draw_three_times(*arguments):
        if next(num_drawn) > 3:
            raise Interruption
        return draw_rows(*arguments)

    monkeypatch.setattr(maker, "_draw_rows", draw_three_times)
    with pytest.raises(Interruption):
        maker.pretrain(tmp_path / "halves", threads=1)
    assert (tmp_path / "halves" / "unfinished.pt").exists()
    monkeypatch.setattr(maker, "_draw_rows", draw_rows)
    capsys.readouterr()
    maker.pretrain(tmp_path / "halves", threads=1)
    assert "Going on after step 2 of 4." in capsys.readouterr().out

    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert whole.keys() == halves.keys()
    assert {value.dtype for value in whole.values()} == {torch.float16}
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    card = (tmp_path / "whole" / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "| steps | 4 of 16 rows of 128 characters |" in card
    assert not (tmp_path / "halves" / "unfinished.pt").exists()


def test_rows_hold_whole_documents_and_weigh_completions():
    tokenizer = build_tokenizer()
    rows, weights = maker._draw_rows(tokenizer, random.Random(2))
    assert rows.shape == weights.shape == (16, 128)
    assert torch.equal(weights == 0, rows == tokenizer.pad_token_id)
    for row, weight in zip(rows, weights, strict=True):
        assert row[0] == tokenizer.bos_token_id
        begins, ends = row == tokenizer.bos_token_id, row == tokenizer.eos_token_id
        assert begins.sum() == ends.sum() > 1
        assert (weight[begins] == torch.tensor(0.1)).all()
        assert (weight[ends] == 1).all()
        assert (row[ends.nonzero().max() + 1 :] == tokenizer.pad_token_id).all()
