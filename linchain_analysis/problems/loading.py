"""Problems by name or from a file."""

from __future__ import annotations

import math
from pathlib import Path

from linchain_analysis.errors import InputError
from linchain_analysis.problems import sums
from linchain_analysis.problems.answers import AnswerForm, find_form
from linchain_analysis.problems.problem import ProblemDefaults, TextProblem
from linchain_analysis.problems.records import read_records, split_records
from linchain_analysis.problems.synthetic import MAP_NAMES
from linchain_analysis.problems.templates import find_template

BUILTIN_MODEL = Path(__file__).parent / "builtin"
PROBLEM_NAMES = ("sums",)
NUM_TRAIN = 4000  # records of the built-in problem

# Chosen so that every method is well above the base model at the end, and none is at its ceiling from the start.
SUMS_DEFAULTS = ProblemDefaults(learning_rate=2.5e-3, num_steps=320, batch_size=16, num_eval=200, max_length=256)
SUMS_ANSWER = AnswerForm("exact", max_new_tokens=4)
BUILTIN_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

# What the authors trained LLaMA with: LinChain's and LLM-Adapters' scripts.
FILE_LEARNING_RATE = 3e-4
FILE_NUM_EPOCHS = 3
FILE_BATCH_SIZE = 16
FILE_NUM_EVAL = 120
FILE_MAX_LENGTH = 256


def load_problem(
    name: str = "sums",
    *,
    model: str | None = None,
    data: str | Path | None = None,
    data_seed: int = 0,
    num_eval: int | None = None,
    template: str | None = None,
) -> TextProblem:
    """Return a problem: the built-in one, or the records of a file, for the built-in model or another one.

    The built-in problem is two-step sums told in words. A file is divided into trained and held-out records; what is
    trained on there is the whole text, as the authors do, and on the built-in problem the response.

    Args:
        name: Name of a built-in problem, for when no data is given.
        model: Folder or hub name of the base model; the built-in one unless given.
        data: JSON file of records; the problem then bears the name of the file, or of its folder for files called
            train.json or the like.
        data_seed: Seed of what is drawn: records and wordings of the built-in problem, the division of a file.
        num_eval: Number of held-out records.
        template: Layout of the prompts: `plain` unless given for the built-in model, `alpaca` for others, or
            `alpaca-authors`.

    Raises:
        InputError: If a name is unknown, or the file or the model cannot be read.
    """
    if num_eval is not None and num_eval < 1:
        raise InputError("num_eval", expected="at least 1", got=str(num_eval), do="hold out some records")
    layout = find_template(template or ("plain" if model is None else "alpaca"))
    if data is None:
        return _load_sums(name, model, data_seed, num_eval or SUMS_DEFAULTS.num_eval, layout.name)
    path = Path(data)
    records = read_records(path)
    if num_eval is None:
        num_eval = min(FILE_NUM_EVAL, max(len(records) // 5, 1))
    train, evaluation = split_records(records, num_held_out=num_eval, seed=data_seed)
    title = name_of_file(path)
    return TextProblem(
        name=title,
        model=str(BUILTIN_MODEL) if model is None else model,
        train=train,
        evaluation=evaluation,
        target_modules=_targets(model),
        defaults=ProblemDefaults(
            learning_rate=FILE_LEARNING_RATE,
            num_steps=math.ceil(FILE_NUM_EPOCHS * len(train) / FILE_BATCH_SIZE),
            batch_size=FILE_BATCH_SIZE,
            num_eval=len(evaluation),
            max_length=_max_length(model),
        ),
        template=layout,
        answer_form=find_form(title, [record.answer or record.output for record in records]),
        trains_on_prompt=True,
    )


def name_of_file(path: Path) -> str:
    """Return the name of a file's data set: ARC-Easy for ARC-Easy/train.json, cola for cola.json."""
    says_nothing = path.stem.lower() in {"train", "test", "dev", "valid", "validation", "trainset", "validset", "data"}
    return path.absolute().parent.name if says_nothing else path.stem


def _load_sums(name: str, model: str | None, data_seed: int, num_eval: int, template: str) -> TextProblem:
    if name not in PROBLEM_NAMES:
        sweep = "python -m linchain_analysis.sweep --problem"
        raise InputError(
            "problem",
            expected=f"one of {', '.join(PROBLEM_NAMES)}",
            got=repr(name),
            do=f"train maps by {sweep} {name}" if name in MAP_NAMES else f"choose one, or give data; maps: {sweep}",
        )
    return TextProblem(
        name=name,
        model=str(BUILTIN_MODEL) if model is None else model,
        train=sums.draw_records(NUM_TRAIN, held_out=False, seed=data_seed),
        evaluation=sums.draw_records(num_eval, held_out=True, seed=data_seed),
        target_modules=_targets(model),
        defaults=ProblemDefaults(
            learning_rate=SUMS_DEFAULTS.learning_rate,
            num_steps=SUMS_DEFAULTS.num_steps,
            batch_size=SUMS_DEFAULTS.batch_size,
            num_eval=num_eval,
            max_length=SUMS_DEFAULTS.max_length,
        ),
        template=find_template(template),
        answer_form=SUMS_ANSWER,
        trains_on_prompt=False,
    )


def _targets(model: str | None) -> tuple[str, ...]:
    if model is None:
        return BUILTIN_TARGETS
    from linchain_analysis.problems.models import find_target_modules

    return find_target_modules(model)


def _max_length(model: str | None) -> int:
    if model is None:
        return FILE_MAX_LENGTH
    from linchain_analysis.problems.models import load_context_length

    return min(FILE_MAX_LENGTH, load_context_length(model) or FILE_MAX_LENGTH)
