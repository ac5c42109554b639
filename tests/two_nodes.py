"""Run a job on a cluster of two nodes, one of which dies when a pattern matches enough files.

`python two_nodes.py <pattern> <count> <job> field=value …`; a third node stands in for the dead one, as an
autoscaler would see to. Exits with 3 when the job ended before the node died.
"""

import glob
import importlib
import sys
import threading
import time

import ray
from ray.cluster_utils import Cluster


def main(pattern, count, job, words):
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    ray.init(address=cluster.address)
    died = threading.Event()

    def kill():
        while len(glob.glob(pattern)) < count:
            time.sleep(0.02)
        cluster.add_node(num_cpus=1)
        cluster.remove_node(nodes[0], allow_graceful=False)
        died.set()

    threading.Thread(target=kill, daemon=True).start()
    try:
        importlib.import_module(f"jobs.{job}").main(words)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 0 if died.is_set() else 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
