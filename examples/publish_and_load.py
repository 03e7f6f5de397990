"""Publish a pruned checkpoint, and load it by its id in the ways that its form allows.

python examples/publish_and_load.py DIR OWNER/NAME
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_adaprune


def main(folder: str, repo_id: str) -> None:
    commit = hf_adaprune.push_to_hub(folder, repo_id, private=True, remote_code=True)
    print(commit.commit_url)
    model = AutoModelForCausalLM.from_pretrained(repo_id)  # with this package imported
    tokenizer = AutoTokenizer.from_pretrained(repo_id)
    there = AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)  # what people without it write
    ids = tokenizer("Pruning", return_tensors="pt").input_ids
    print((model(ids).logits - there(ids).logits).abs().max().item())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
