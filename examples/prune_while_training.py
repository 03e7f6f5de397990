"""Fine-tune a model on your own text while it loses two fifths of its layers' parameters, five per cent at a time.

python examples/prune_while_training.py MODEL OUTPUT TEXT.txt [STEPS]
"""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hf_adaprune import AdaPrunerCallback, PruningConfig

LENGTH = 256


def main(name: str, output: str, text: str, steps: int = 1000) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    ids = tokenizer(Path(text).read_text(), verbose=False)["input_ids"]
    windows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH, LENGTH)]
    config = PruningConfig.recipe("default", pruning_ratio=0.4, calibration={"sequence_length": LENGTH})
    trainer = Trainer(
        model,
        TrainingArguments(output, max_steps=steps, save_steps=max(1, steps // 4), learning_rate=1e-4, report_to=[]),
        train_dataset=Dataset.from_dict({"input_ids": windows}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[AdaPrunerCallback(config)],
    )
    trainer.train()
    again = AutoModelForCausalLM.from_pretrained(output)
    print(f"{again.num_parameters():,} parameters")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
