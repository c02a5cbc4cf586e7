"""A cloud for Ray's autoscaler whose machines are processes on this machine (see local.py).

Ray has such a provider for its own tests. Its nodes share one folder, where they overwrite each other's unpacked job files; so
here each node is a `ray start` with its own folder.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.local import start_node


class Processes(FakeMultiNodeProvider):
    """Starts and stops nodes as the autoscaler asks."""

    def _create_node_with_resources_and_labels(
        self, node_config: object, tags: Mapping[str, str], count: int, resources: Mapping[str, float], labels: object
    ) -> None:
        with self.lock:
            config = self.provider_config
            node: str = self._next_hex_node_id()  # type: ignore[no-untyped-call]
            variables = {
                "RAY_CLOUD_INSTANCE_ID": node,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node,
                "RAY_NODE_TYPE_NAME": tags[TAG_RAY_USER_NODE_TYPE],
            }
            cpus = int(resources["CPU"])
            process = start_node(Path(config["folder"]), config["address"], cpus, config["variables"] | variables)
            own = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_NAME: node, TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}
            entry: dict[str, Any] = {"tags": own | dict(tags), "node": process}
            self._nodes[node] = entry

    def _terminate_node(self, node: Mapping[str, Any]) -> None:
        process: subprocess.Popen[bytes] = node["node"]
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
