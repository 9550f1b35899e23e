"""Runs llama.cpp's converter on several folders in one process.

    python llama_cpp_driver.py LLAMA_CPP PRE FOLDER OUT TYPE [FOLDER OUT TYPE …]

Tokenizers of tests are none of those that it knows by their hashes, so that it is told how these
cut texts (PRE).
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    root, pre, *rest = sys.argv[1:]
    sys.path[:0] = [root, f"{root}/gguf-py"]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    for place in range(0, len(rest), 3):
        folder, out, outtype = rest[place : place + 3]
        sys.argv = [f"{root}/convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", outtype]
        runpy.run_path(sys.argv[0], run_name="__main__")
        assert Path(out).is_file()


if __name__ == "__main__":
    main()
