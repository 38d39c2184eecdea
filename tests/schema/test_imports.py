"""``shared_schema`` stays light."""

import subprocess
import sys


def test_importing_the_schema_imports_no_framework():
    code = (
        "import sys, shared_schema\n"
        "heavy = {'torch', 'vllm', 'megatron', 'transformers', 'jax', 'tensorflow'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
