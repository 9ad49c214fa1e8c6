"""Run the examples of a README with the installed package, as a reader would: in an empty folder, offline.

    python -I scripts/check_install.py README.md             Python examples, on a tiny random model
    python -I scripts/check_install.py README.md --builtin   Python examples and an evaluation, on the built-in model

Only what this machine cannot have is replaced, and told: the hub, the GPU, and the length.
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

REPLACED = {
    '"fused"': '"ring"',
    '.to("cuda")': "",
    "window=1020": "window=60",
    "100_000": "300",
    "max_new_tokens=1000": "max_new_tokens=60",
}
SHORTENED = {"--tokens 2048": "--tokens 500", "--cap 256": "--cap 128"}
HUB_NAME = re.compile(r'"HuggingFaceTB/[\w.-]+"')


def python_examples(readme: str) -> list[str]:
    """The Python blocks of a README."""
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)


def eval_command(readme: str) -> str:
    """The README's first `sinkstream eval` command, its continuation lines joined."""
    return re.search(r"^ {4}(sinkstream eval (?:.*\\\n)*.*)$", readme, re.MULTILINE).group(1).replace("\\\n", " ")


def tiny_model(folder: str) -> str:
    """A tiny random Llama with a tokenizer of single characters; returns its folder."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {chr(32 + i): i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ").save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(vocab_size=95, max_position_embeddings=4096, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def builtin_model() -> str:
    """The built-in model's folder."""
    from sinkstream.models.gguf_file import BUILTIN_FILE, BUILTIN_PACKAGE, converted
    from sinkstream.models.hashing import sha256_of_files

    path = Path(importlib.util.find_spec(BUILTIN_PACKAGE).submodule_search_locations[0]) / BUILTIN_FILE
    return str(converted(path, sha256_of_files([path]), "builtin"))


def run_example(code: str, model: str) -> None:
    """Run one example; whatever is replaced in it is printed."""
    for old, new in REPLACED.items():
        if old in code:
            print(f"  ({old} replaced by {new or 'nothing'})")
            code = code.replace(old, new)
    code = HUB_NAME.sub(lambda _: repr(model), code)
    shown, names = io.StringIO(), {}
    with contextlib.redirect_stdout(shown), warnings.catch_warnings():
        warnings.filterwarnings("error", category=FutureWarning, message=".*past_key_values.*")
        exec(compile(code, "README", "exec"), names)
    print("  " + shown.getvalue().strip()[:300].replace("\n", "\n  "))
    if "cache" in names:
        stats = names["cache"].stats()
        assert stats["kept"] == 64 and stats["evicted"] == stats["seen"] - 64 > 20, stats


def main(readme_path: str, *options: str) -> None:
    """Run all examples of the README; an exception or a failed command ends it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    readme_path = os.path.abspath(readme_path)
    readme = Path(readme_path).read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        import sinkstream

        assert not Path(sinkstream.__file__).is_relative_to(Path(readme_path).resolve().parent / "src")
        model = builtin_model() if "--builtin" in options else tiny_model(folder)
        examples = python_examples(readme)
        assert len(examples) >= 2, "the README has lost its Python examples"
        for number, code in enumerate(examples, 1):
            print(f"README, Python example {number}:")
            run_example(code, model)
        commands = ["sinkstream --help", "sinkstream env"]
        if "--builtin" in options:
            command = eval_command(readme)
            for old, new in SHORTENED.items():
                command = command.replace(old, new)
            commands.append(command)
        for command in commands:
            print(f"$ {command}")
            program, *arguments = shlex.split(command)
            subprocess.run([str(Path(sys.executable).parent / program), *arguments], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
