"""Plan, load and ask a model, in Python, with or without a GPU: python examples/quickstart.py [MODEL]"""

from __future__ import annotations

import sys

from transformers import AutoTokenizer

import qlazy
from qlazy.report import plan_summary, plan_table
from qlazy.sources.source import open_source


def main(model_id: str = "demo", question: str = "What is the capital of France?") -> None:
    # Exact bytes before anything is read; raises qlazy.errors.DoesNotFit with the numbers where there is no room.
    plan = qlazy.plan(model_id, bits=4)
    print(plan_table(plan), plan_summary(plan), sep="\n")

    # An ordinary transformers model whose linear layers hold 4-bit weights; nothing was ever held in 16 bits as a whole.
    model = qlazy.load_quantized(model_id, bits=4)
    print(model.qlazy_report)

    source = open_source(model_id)
    gguf = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(source.folder, **gguf)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
