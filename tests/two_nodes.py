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
    failures = []

    def run():
        try:
            importlib.import_module(f"jobs.{job}").main(words)
        except BaseException as error:
            failures.append(error)
            raise

    # Nodes come and go in the main thread, because starting one registers signal handlers.
    runner = threading.Thread(target=run)
    runner.start()
    try:
        while runner.is_alive() and len(glob.glob(pattern)) < count:
            time.sleep(0.02)
        is_early = not runner.is_alive()
        if not is_early:
            cluster.add_node(num_cpus=1)
            cluster.remove_node(nodes[0], allow_graceful=False)
        runner.join()
    finally:
        ray.shutdown()
        cluster.shutdown()
    return 1 if failures else 3 * is_early


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]))
