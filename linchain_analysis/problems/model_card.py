"""The card of the built-in model: what it is, how it was made, and what it can do, measured when it was made."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

NUM_DOCUMENTS = 200  # of each kind, for an accuracy
NUM_RECORDS = 200
DOCUMENT_SEED = "model card"


@dataclass(frozen=True)
class Abilities:
    """What a pretrained model gets right.

    Attributes:
        pretraining: Share of freshly drawn documents completed word for word, by kind.
        held_out_sums: The same for sums of two steps whose numbers were never trained on.
        problem: Accuracy on the built-in problem, before any fine-tuning.
    """

    pretraining: Mapping[str, float]
    held_out_sums: Mapping[str, float]
    problem: float


def measure_abilities(folder: Path) -> Abilities:
    """Measure the model in `folder` by greedy generation."""
    from linchain_analysis.problems import pretraining_text, sums
    from linchain_analysis.problems.evaluation import complete_prompts
    from linchain_analysis.problems.loading import load_problem

    problem = replace(load_problem(num_eval=NUM_RECORDS), model=str(folder))
    model, tokenizer = problem.load_model(), problem.load_tokenizer()

    def share_right(documents: list[tuple[str, str]]) -> float:
        longest = max(len(completion) for _, completion in documents)
        prompts = [list(tokenizer(prompt).input_ids) for prompt, _ in documents]
        completions = complete_prompts(model, tokenizer, prompts, longest + 1, batch_size=64)
        return sum(found == wanted for found, (_, wanted) in zip(completions, documents, strict=True)) / len(documents)

    generator = random.Random(DOCUMENT_SEED)
    held_out = generator.sample(sums.list_triples(held_out=True), NUM_DOCUMENTS)
    return Abilities(
        pretraining={
            kind.__name__: share_right([kind(generator) for _ in range(NUM_DOCUMENTS)])
            for kind in pretraining_text.MIXTURE
        },
        held_out_sums={
            write.__name__: share_right([write(triple, generator) for triple in held_out])
            for write in pretraining_text.TWO_STEP_WRITERS
        },
        problem=problem.evaluate(model, tokenizer)["accuracy"],
    )


def write_card(folder: Path, *, training: Mapping[str, Any], abilities: Abilities) -> None:
    """Write `MODEL_CARD.md` into the model's folder.

    Args:
        folder: Where the model is.
        training: What it was trained with, value by name.
        abilities: What it can do.
    """
    from linchain_analysis.problems import pretraining_text, sums

    kinds = "\n".join(
        f"| `{kind.__name__}` | {share:.0%} | `{_show(kind)}` | {abilities.pretraining[kind.__name__]:.3f} |"
        for kind, share in pretraining_text.MIXTURE.items()
    )
    held_out = ", ".join(f"`{name}` {accuracy:.3f}" for name, accuracy in abilities.held_out_sums.items())
    facts = "\n".join(f"| {name} | {value} |" for name, value in training.items())
    (folder / "MODEL_CARD.md").write_text(
        f"""# The built-in model

A small decoder of the Llama architecture with one token per character. It was made by this project, on text that
this project generates, to have a pretrained model to fine-tune where there is neither network nor accelerator. It
knows numbers up to {sums.LARGEST}, their names, sums, and stories of one step. It cannot answer a
question about a story of two, which is what fine-tuning teaches it (`load_problem("sums")`). It is of no other use.

Made by `python -m linchain_analysis.problems.pretrain --out DIR`, which also wrote this card.

| training | |
|---|---|
{facts}

## What it was trained on, and what it can do

Share of documents of each kind; an example, the prompt before the bar; and the share of
{NUM_DOCUMENTS} freshly drawn documents that greedy generation completes word for word.

| kind | share | example | accuracy |
|---|---|---|---|
{kinds}

The same of {NUM_DOCUMENTS} sums of two steps whose numbers are held out, never trained on: {held_out}.
The built-in problem before fine-tuning: {abilities.problem:.3f} of {NUM_RECORDS} held-out records.

The text holds no fact about the world and no personal data. Licence: that of the package (MIT).
""",
        encoding="utf-8",
    )


def _show(kind: Any) -> str:
    prompt, completion = kind(random.Random(DOCUMENT_SEED))
    return f"{prompt}¦{completion}"
