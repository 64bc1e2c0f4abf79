"""Which blocks `test_blocks.py` neither runs nor reads, and why not."""

# (page, language): the test that runs these blocks, with what they need
RUN_ELSEWHERE = {
    ("README.md", "python"): "tests/test_readme.py",
    ("docs/guide/axolotl_and_swift.md", "python"): "tests/integrations/interfaces.py",
    ("docs/guide/axolotl_and_swift.md", "yaml"): "tests/integrations/interfaces.py",
    ("docs/guide/chat_and_serve.md", "python"): "tests/endpoint/test_guide.py",
    ("docs/guide/merge.md", "python"): "tests/merging/test_guide.py",
    ("docs/guide/tasks.md", "python"): "tests/training/test_tasks.py",
}

# (page, first line): what a block without a language is, that is not printed by the code before it
NO_CODE = {
    ("README.md", "src/mixora/"): "the map of files; tests/test_readme.py holds it to the folder",
    ("docs/design.md", "errors = short_names"): "the order of modules; tests/test_architecture.py reads it",
    ("docs/guide/data.md", "my_data/train.jsonl: 2 bad rows"): "a message; tests/data/test_sources.py has its parts",
    ("docs/guide/train.md", "error: step 3: the router"): "a message; tests/training/test_bad_steps.py has its parts",
}

# programs that are not ours, nor of a library that the tests install
PROGRAMS_OF_OTHERS = {
    "swift": "of ms-swift, which `make test-plugins` installs without what its command needs",
    "vllm": "a server for GPUs",
    "convert_lora_to_gguf.py": "a script of llama.cpp",
}
