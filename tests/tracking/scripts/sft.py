"""TRL's SFTTrainer on a tiny model and a tokenizer made here."""

import sys

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

set_seed(0)
words = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "finds", "big", "small", "red"]
vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
config = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=len(vocabulary),
)
texts = [f"the {a} cat {b} a {c} dog" for a in ("big", "small", "red") for b in words[5:9] for c in ("big", "red")]


class Printer(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            print(f"step loss={logs['loss']!r} grad_norm={logs['grad_norm']!r} epoch={state.epoch!r}")


trainer = SFTTrainer(
    model=LlamaForCausalLM(config),
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=sys.argv[1],
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.05,
        learning_rate=1e-2,
        max_length=16,
        logging_steps=1,
        bf16=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    ),
    train_dataset=Dataset.from_dict({"text": texts}),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    callbacks=[Printer()],
)
trainer.train()
