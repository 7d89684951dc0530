"""As test_vllm, on vLLM 0.33: its Python over compiled parts of 0.32 (tests/engines/venvs.sh)."""

from typing import Final

from engines.test_vllm import *  # noqa: F403

ENGINE: Final = "vllm33"
