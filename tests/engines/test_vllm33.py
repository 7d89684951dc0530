"""As test_vllm, test_vllm_docs, test_vllm_requests and test_vllm_tier, on vLLM 0.33.

That is its Python over compiled parts of 0.32 (tests/engines/venvs.sh).
"""

from pathlib import Path
from typing import Final

from engines.test_vllm import *  # noqa: F403
from engines.test_vllm import check_faults
from engines.test_vllm_docs import *  # noqa: F403
from engines.test_vllm_requests import *  # noqa: F403
from engines.test_vllm_tier import *  # noqa: F403
from support.daemon import running_daemon
from support.faultydisks import FaultyDisks
from support.vllms import Vllm, transfer_config
from twfs.devices.formatting import DeviceSpec
from twfs.warehouse import Warehouse

ENGINE: Final = "vllm33"


def test_a_step_may_wait_for_its_loads(model: Path, scratch: Path, disks: FaultyDisks) -> None:
    """New in 0.33: small loads happen within the step that needs them, and may fail there."""
    directory = scratch / "w"
    Warehouse.create(directory, [DeviceSpec(disks.loops["a"])])
    with running_daemon(directory) as daemon:
        config = transfer_config(daemon.socket, sync_load_budget_bytes=1 << 30)
        with Vllm(ENGINE, model, config) as vllm:
            check_faults(vllm, daemon, disks)
            threads = vllm.ask(do="threads")
            assert any(name.startswith("twfs-urgent") for name in threads)
            assert not any(name.startswith("twfs-load") for name in threads)
