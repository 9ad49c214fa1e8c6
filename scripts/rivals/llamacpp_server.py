"""llama.cpp's server, its own C++ code, through xllamacpp: prints its address, serves until its input ends.

The job (JSON on the command line's file) names the GGUF file, the context and whether the context shifts.
"""

import importlib.metadata
import json
import sys

import xllamacpp


def main() -> None:
    """Serve."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    params = xllamacpp.CommonParams()
    params.model.path = job["gguf"]
    params.n_ctx = job["cap"]
    params.n_parallel = 1
    params.ctx_shift = job["shift"]
    params.port = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    server = xllamacpp.Server(params)
    told = {"address": server.listening_address, "version": importlib.metadata.version("xllamacpp")}
    print(json.dumps(told), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
