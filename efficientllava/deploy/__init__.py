"""A checkpoint as files for llama.cpp (GGUF): written, run in the real runtime, compared and measured."""
