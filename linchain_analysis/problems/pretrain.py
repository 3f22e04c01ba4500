"""`python -m linchain_analysis.problems.pretrain --out DIR`: make the built-in model anew.

Trains a small Llama on `pretraining_text`, saves as it goes (start it again with the same folder to go on after an
interruption, to the same result), and ends with a folder that holds everything the package ships: weights in
float16, configuration, tokenizer and the model card with its measured accuracies.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

ARCHITECTURE = {
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SEED = 20241
NUM_STEPS = 3000
ROW_LENGTH = 128  # tokens
NUM_ROWS = 16  # of a batch
LEARNING_RATE = 2e-3
NUM_WARMUP_STEPS = 100
NUM_COSINE_STEPS = 4000  # where the cosine would reach its end; the final decay comes first
NUM_DECAY_STEPS = 1000
SAVE_EVERY_STEPS = 250
PROMPT_WEIGHT = 0.1  # of a prompt's tokens in the loss: which numbers a sum begins with cannot be known


def pretrain(
    out: Annotated[Path, typer.Option(help="Folder for the model; an unfinished one is continued.")],
    threads: Annotated[int, typer.Option(help="Threads of torch.", min=1)] = 1,
) -> None:
    """Make the built-in model anew, with its card."""
    import torch

    from linchain_analysis.problems.characters import build_tokenizer

    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = _build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint = out / "unfinished.pt"
    done, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds = state["step"], state["seconds"]
        print(f"Going on after step {done} of {NUM_STEPS}.", flush=True)
    began = time.perf_counter()
    for step in range(done + 1, NUM_STEPS + 1):
        # Each step has its own generator, so that an interrupted training goes on with the text it would have seen.
        rows, weights = _draw_rows(tokenizer, random.Random(f"{SEED} {step}"))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step)
        scores = model(input_ids=rows).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(scores.transpose(1, 2), rows[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % SAVE_EVERY_STEPS == 0 or step == NUM_STEPS:
            elapsed = seconds + time.perf_counter() - began
            print(f"step {step} of {NUM_STEPS}: loss {loss.item():.4f}, {elapsed:.0f} s", flush=True)
            _save_checkpoint(checkpoint, model, optimizer, step, elapsed)
            save_model(model, tokenizer, out)
    _write_card(out, model, seconds + time.perf_counter() - began, threads)
    checkpoint.unlink(missing_ok=True)


def _write_card(out: Path, model: Any, seconds: float, threads: int) -> None:
    from linchain_analysis.problems.model_card import measure_abilities, write_card

    training = {
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,} (stored in float16)",
        "architecture": ", ".join(f"{name} {value}" for name, value in ARCHITECTURE.items()),
        "steps": f"{NUM_STEPS} of {NUM_ROWS} rows of {ROW_LENGTH} characters",
        "optimiser": f"AdamW, learning rate {LEARNING_RATE} (warm-up {NUM_WARMUP_STEPS} steps, "
        f"a cosine of {NUM_COSINE_STEPS} steps, linear decay to 0 over the last {NUM_DECAY_STEPS}), "
        "betas 0.9 and 0.98, weight decay 0.01, gradients clipped to norm 1",
        "loss": f"cross-entropy, weight 1 on completions and {PROMPT_WEIGHT} on prompts",
        "seed": SEED,
        "time": f"{seconds / 60:.0f} minutes on {threads} CPU {'thread' if threads == 1 else 'threads'}",
    }
    write_card(out, training=training, abilities=measure_abilities(out))


def save_model(model: Any, tokenizer: Any, out: Path) -> None:
    """Write weights (float16), configuration and tokenizer, as transformers reads them."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _build_model(tokenizer: Any) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **ARCHITECTURE,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def _schedule(step: int) -> float:
    """Return the factor on the learning rate: linear warm-up, the middle of a half cosine, linear decay to 0."""
    if step < NUM_WARMUP_STEPS:
        return step / NUM_WARMUP_STEPS
    progress = (step - NUM_WARMUP_STEPS) / (NUM_COSINE_STEPS - NUM_WARMUP_STEPS)
    cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * progress))
    return cosine * min(1.0, (NUM_STEPS + 1 - step) / NUM_DECAY_STEPS)


def _draw_rows(tokenizer: Any, generator: random.Random) -> tuple[Any, Any]:
    """Return token ids and their weights in the loss, each (NUM_ROWS, ROW_LENGTH).

    A row holds whole documents one after another; the rest of it is padding, of weight 0.
    """
    import torch

    rows = torch.full((NUM_ROWS, ROW_LENGTH), tokenizer.pad_token_id)
    weights = torch.zeros(NUM_ROWS, ROW_LENGTH)
    documents = _encode_documents(tokenizer, generator)
    tokens, token_weights = next(documents)
    for index in range(NUM_ROWS):
        filled = 0
        while filled + len(tokens) <= ROW_LENGTH:
            place = slice(filled, filled + len(tokens))
            rows[index, place], weights[index, place] = torch.tensor(tokens), torch.tensor(token_weights)
            filled += len(tokens)
            tokens, token_weights = next(documents)
    return rows, weights


def _encode_documents(tokenizer: Any, generator: random.Random) -> Iterator[tuple[list[int], list[float]]]:
    from linchain_analysis.problems.pretraining_text import draw_documents

    ids = tokenizer.get_vocab()
    for prompt, completion in draw_documents(generator):
        tokens = [
            tokenizer.bos_token_id,
            *(ids[character] for character in prompt + completion),
            tokenizer.eos_token_id,
        ]
        yield tokens, [PROMPT_WEIGHT] * (1 + len(prompt)) + [1.0] * (len(completion) + 1)


def _save_checkpoint(path: Path, model: Any, optimizer: Any, step: int, seconds: float) -> None:
    import torch

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


if __name__ == "__main__":
    typer.run(pretrain)
