"""One llama.cpp server in a process of its own, which an abort inside the runtime ends alone.

``python server.py <settings as JSON>`` says where it listens and how long loading took; to every line that it is sent
it answers with the seconds of CPU that it has used; when its input ends, it ends. This file imports nothing of ours.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Serve until the input ends."""
    import xllamacpp as x

    runtime: Any = x  # its names are in no file that a type checker reads

    asked = json.loads(sys.argv[1])
    settings = runtime.CommonParams()
    settings.model.path = asked["model"]
    if asked["mmproj"]:
        settings.mmproj.path = asked["mmproj"]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = asked["context"], 1, 0
    settings.n_batch = settings.n_ubatch = max(512, asked["context"] if asked["embeddings"] else 0)
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.warmup, settings.mmproj_use_gpu, settings.fit_params = False, False, False
    if asked["exact"]:
        settings.cache_type_k = settings.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if asked["embeddings"]:
        settings.embedding = True
        settings.pooling_type = runtime.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        settings.embd_normalize = -1
    started = time.perf_counter()
    server = runtime.Server(settings)
    print(json.dumps({"address": server.listening_address, "seconds": time.perf_counter() - started}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(time.process_time()), flush=True)


if __name__ == "__main__":
    main()
