"""What an engine under Ray is told of its nodes: a real cluster of two, both on this machine.

`python -m support.raynodes CONFIG` runs in the engine's environment; CONFIG is JSON, the transfer
configuration and vLLM's arguments. It prints one line for each strategy that places the ranks.
"""

import json
import sys

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, remove_placement_group
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from twfs.engines.vllm_layout import prepare
from twfs.errors import InvalidInput


def main() -> None:
    """Place two ranks on one node, then on two."""
    transfer, options = json.loads(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    for strategy in ("STRICT_PACK", "STRICT_SPREAD"):
        group = placement_group([{"CPU": 1}] * 2, strategy=strategy)
        ray.get(group.ready())
        given = EngineArgs(**options, kv_transfer_config=KVTransferConfig(**transfer))
        config = given.create_engine_config()
        config.parallel_config.placement_group = group  # as vLLM's executor does
        try:
            prepare(config, ("TwfsSpec", "twfs.engines.vllm"))
            said = "accepted"
        except InvalidInput as error:
            said = str(error)
        sys.stdout.write(f"{strategy}: {said}\n")
        remove_placement_group(group)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
