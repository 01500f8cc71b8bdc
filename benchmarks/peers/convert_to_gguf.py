"""python convert_to_gguf.py CONVERTER_FOLDER MODEL OUT: llama.cpp's converter for our tokenizers, to bf16.

The converter knows pre-tokenizers by a hash of how they cut one text. Ours are trained here, so no hash of theirs is
known; they cut like that of GPT-2, a plain `ByteLevel`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    folder, model, out = sys.argv[1:]
    sys.path.insert(0, folder)
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", "bf16"]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    convert_hf_to_gguf.main()
