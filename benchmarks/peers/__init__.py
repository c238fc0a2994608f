"""Other quantization libraries, each in a virtual environment of its own.

    python -m benchmarks.peers install aimet brevitas
    python -m benchmarks.ptq_accuracy --peers aimet brevitas --json out.json

A peer is started as a process in its environment (`runner`), which reads a `Request` as JSON and answers with one line.
What runs there imports of this repository only `lq_plugin.demo`, `benchmarks.common` and this package.
"""

from benchmarks.peers.environments import PEERS, PeerError, require
from benchmarks.peers.request import Request
from benchmarks.peers.rows import ITERATIONS, measure_peers
from benchmarks.peers.start import run_peer

__all__ = ["ITERATIONS", "PEERS", "PeerError", "Request", "measure_peers", "require", "run_peer"]
