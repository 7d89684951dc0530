"""As test_vllm, test_vllm_docs, test_vllm_requests and test_vllm_tier, on vLLM 0.33.

That is its Python over compiled parts of 0.32 (tests/engines/venvs.sh).
"""

from pathlib import Path
from typing import Final

from engines.test_vllm import *  # noqa: F403
from engines.test_vllm import HELD, PROMPT
from engines.test_vllm_docs import *  # noqa: F403
from engines.test_vllm_requests import *  # noqa: F403
from engines.test_vllm_tier import *  # noqa: F403
from support.daemon import Daemon
from support.engines import until_stored
from support.vllms import STORED_TOKENS, Vllm, transfer_config

ENGINE: Final = "vllm33"


def test_a_step_may_wait_for_its_loads(model: Path, daemon: Daemon) -> None:
    """New in 0.33: small loads happen within the step that needs them."""
    config = transfer_config(daemon.socket, sync_load_budget_bytes=1 << 30)
    with Vllm(ENGINE, model, config) as vllm:
        cold = vllm.generate(PROMPT)
        until_stored(daemon, HELD // STORED_TOKENS)
        assert vllm.ask(do="reset")
        warm = vllm.generate(PROMPT)
        assert (warm["cached"], warm["tokens"]) == ([HELD], cold["tokens"])
